"""Tensors in a file of the safetensors format, streamed: no pickle, no second copy in memory.

https://github.com/huggingface/safetensors, README, "Format". The library maps files into memory, which keeps Windows
from replacing them and kills the process that reads one while it is truncated, and its errors have lost their number,
so that a full disk cannot be told; hence plain reads and writes. The tests hold both implementations against each
other.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from vitrail.checkpoints.storage import DamagedError
from vitrail.errors import UserError

MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 20_000

_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Entry(NamedTuple):
    """What a file's header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the end of the header."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors, as `dump_tensors` does. `storage.publish` makes the file durable."""
    with open(path, "wb") as file:
        dump_tensors(file, tensors)


def dump_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device, shared ones too.

    Raises:
        TypeError: For a type of number that the format, or this module, does not know.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    # Widest numbers first keeps every tensor aligned for readers that map the file.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES or tensor.layout is not torch.strided:
            raise TypeError(f"{name} is a {tensor.layout} tensor of {tensor.dtype}, which cannot be stored.")
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for name in names:
        file.write(_raw(tensors[name].detach().cpu().contiguous()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, in the order of the file.

    Raises:
        DamagedError: A UserError, when the file is not what the format says, or oversized.
    """
    tensors: dict[str, Tensor] = {}
    with open(path, "rb") as file:
        for name, entry in _header(file, path).items():
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            if file.readinto(_raw(tensor)) != tensor.nbytes:
                raise DamagedError(f"{path} ends before its tensor {name!r}; restore it from a copy.")
            tensors[name] = tensor
    return tensors


class TensorFile:
    """A file of tensors that is read in pieces.

    Raises:
        DamagedError: A UserError, when the file is not what the format says, or oversized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.entries = _header(file, path)
            self._base = file.tell()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or rows of it: those of the first axis from `rows.start` to `rows.stop`.

        Raises:
            DamagedError: A UserError, when the file has been truncated since.
        """
        entry = self.entries[name]
        shape, start = entry.shape, entry.start
        if rows is not None:
            shape = (rows.stop - rows.start, *entry.shape[1:])
            start += rows.start * math.prod(entry.shape[1:]) * entry.dtype.itemsize
        tensor = torch.empty(shape, dtype=entry.dtype)
        with open(self.path, "rb") as file:
            file.seek(self._base + start)
            if file.readinto(_raw(tensor)) != tensor.nbytes:
                raise DamagedError(f"{self.path} ends before its tensor {name!r}; restore it from a copy.")
        return tensor


def read_header(path: Path) -> dict[str, Entry]:
    """Return what a file holds, in the order of the file, without reading the tensors. Raises as `read_tensors`."""
    with open(path, "rb") as file:
        return _header(file, path)


def _header(file: BinaryIO, path: Path) -> dict[str, Entry]:
    """Read and check the header; the file is left at the first tensor. All sizes are Python's unbounded integers."""
    size = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > size - 8:
        raise DamagedError(f"{path} is truncated, or not a safetensors file; restore it from a copy.")
    if length > MAX_HEADER_BYTES:
        raise UserError(f"{path} has a header of {length:,} bytes; vitrail reads up to {MAX_HEADER_BYTES:,}.")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise UserError(f"{path} lists {len(header):,} tensors; vitrail reads up to {MAX_TENSORS:,}.")
        entries = {name: _entry(described) for name, described in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} has a damaged header ({error}); restore it from a copy.") from error
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, _size(item[1]))))
    end = 0
    for name, entry in entries.items():
        if entry.start != end:
            raise DamagedError(f"{path}: tensor {name!r} begins at byte {entry.start}, not {end}; the file is damaged.")
        end += _size(entry)
    if end != size - 8 - length:
        raise DamagedError(f"{path} holds {size - 8 - length:,} bytes of tensors instead of {end:,}; it is damaged.")
    return entries


def _entry(described: Any) -> Entry:
    dtype, shape, (start, end) = described["dtype"], described["shape"], described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError("sizes must be whole numbers from 0")
    # torch itself counts elements and strides in 63 bits, also of a tensor with no elements
    if len(shape) > 64 or math.prod(max(number, 1) for number in shape) >= 2**48:
        raise ValueError("a shape is too large")
    entry = Entry(_DTYPES[dtype], tuple(shape), start)
    if _size(entry) != end - start:
        raise ValueError("a shape and its number of bytes disagree")
    return entry


def _size(entry: Entry) -> int:
    return math.prod(entry.shape) * entry.dtype.itemsize


def _raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in memory, without copying them."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
