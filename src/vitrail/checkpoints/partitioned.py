"""Partitioned checkpoints, the container of the published V-MoE weights: PREFIX.index, PREFIX.data-NNNNN-of-MMMMM.

The index is a tree of names; a leaf tells the array's shape, its type, its parts and which data file holds each part.
Data files know arrays by number: leaves are counted in the order of JAX, by sorted names (google-research/vmoe
`checkpoints/partitioned.py`, `serialization.py`). All files are msgpack with extension types. They may come from
anywhere: no code is run, and every size is checked before memory is taken.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vitrail.checkpoints.msgpack import Ext, Malformed, Reader, Span, bytes_head, ext_head, list_head, map_head, pack
from vitrail.checkpoints.storage import DamagedError, replace_file
from vitrail.errors import UserError

ROOT = "params/"
"""Where a training state keeps the weights; files of weights alone may do without."""
VERSION = "20220622"
CHUNKS = "__msgpack_array_chunk_a87ca2__"
"""The name that marks the tree of a data file."""
NDARRAY, SLICES, INDEX_INFO = 1, 6, 8
"""Codes of the extension types."""
MAX_PIECE = 2**30
"""Bytes that an extension holds (flax `MAX_CHUNK_SIZE`); longer parts come in several pieces."""
MAX_PARTS, MAX_AXES, MAX_FILES = 4096, 8, 99_999
"""Far beyond any checkpoint."""

_NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _NUMBERS} | {"bfloat16": np.dtype("V2")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Slices = tuple[tuple[int, int], ...]
"""A part of an array: the first place and the one past the last, on each axis."""


class Leaf(NamedTuple):
    """What an index says of one array."""

    number: int
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    """None for one that vitrail does not know."""
    parts: dict[Slices, int]
    """The number of the data file that holds each part."""


def read_partitioned(path: Path) -> dict[str, np.ndarray]:
    """Return the weights of a partitioned checkpoint by name ("Encoder/encoderblock_0/...", without "params/").

    Args:
        path: The `.index` file. The data files lie beside it. The optimizer's part of a training state is left out.
            bfloat16, which numpy does not know, comes as two raw bytes a number.

    Raises:
        UserError: When a file is missing, damaged or of a newer version. It names the file, and the array if it can.
    """
    leaves, count = _read_index(path)
    leaves = [leaf for leaf in leaves if leaf.name.startswith(ROOT)] or leaves
    files = {number: _data_path(path, number, count) for leaf in leaves for number in leaf.parts.values()}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"{file} is missing; {path.name} needs it beside it. Fetch all its data files.")
    left = sum(file.stat().st_size for file in files.values())
    for leaf in leaves:
        if leaf.dtype is None:
            raise UserError(f"{path}: {leaf.name!r} has numbers of a type that vitrail does not know.")
        left -= math.prod(leaf.shape) * leaf.dtype.itemsize
        if left < 0:
            raise DamagedError(
                f"{path}: {leaf.name!r} of shape {leaf.shape} is larger than the data files; fetch again."
            )
    arrays = {leaf.number: np.empty(leaf.shape, leaf.dtype) for leaf in leaves}
    for number, file in sorted(files.items()):
        parts = {(leaf.number, part): leaf.name for leaf in leaves for part, n in leaf.parts.items() if n == number}
        _read_data(file, parts, arrays)
    return {leaf.name.removeprefix(ROOT): arrays[leaf.number] for leaf in leaves}


def write_partitioned(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write weights as a partitioned checkpoint of one data file, as google-research/vmoe reads it.

    An older checkpoint stands until the new data is written. From then on there is no index, until the new one stands.

    Args:
        path: The `.index` file; the data file comes beside it.
        arrays: By name, without "params/".

    Raises:
        UserError: When the suffix is another, or a file cannot be written.
    """
    if path.suffix != ".index":
        raise UserError(f"{path}: a partitioned checkpoint is named by its index; choose a name that ends in .index.")
    tree: dict[str, Any] = {}
    names = sorted(arrays, key=lambda name: f"{ROOT}{name}".split("/"))
    for name in names:
        *branches, last = f"{ROOT}{name}".split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
        node[last] = _index_info(arrays[name])
    index = pack({"shard_count": 1, "index": tree, "version": VERSION})
    ordered = [np.asarray(arrays[name], order="C") for name in names]
    size = sum(array.nbytes for array in ordered)

    def write(file: BinaryIO) -> None:
        _write_data(file, ordered)
        # An older index over the new data could be read, and give a mix of both; without one it is an error.
        path.resolve().unlink(missing_ok=True)

    replace_file(_data_path(path, 0, 1), write, size=size)
    replace_file(path, lambda file: file.write(index), size=len(index))


def _data_path(path: Path, number: int, count: int) -> Path:
    return path.with_name(f"{path.stem}.data-{number:05d}-of-{count:05d}")


# The index


def _read_index(path: Path) -> tuple[list[Leaf], int]:
    """Return the leaves of an index and the number of its data files."""
    try:
        with open(path, "rb") as file:
            reader = Reader(file)
            match reader.whole_file():
                case {"shard_count": int(count), "index": dict(tree), **rest} if 0 < count <= MAX_FILES:
                    pass
                case _:
                    raise Malformed("it does not begin as one")
            if rest.get("version", VERSION) != VERSION:  # the oldest files have none
                raise UserError(f"{path} is of version {rest['version']!r}; vitrail reads up to version {VERSION}.")
            found = enumerate(_flat(tree))
            return [_read_leaf(reader, span, number, name, count) for number, (name, span) in found], count
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except Malformed as error:
        raise DamagedError(f"{path} is damaged, or not the index of a checkpoint: {error}. Fetch it again.") from error


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Span]]:
    """Yield names and leaves in the order of JAX, which does not count what is empty."""
    for branch in sorted(tree):
        name = prefix + branch
        match tree[branch]:
            case dict(below):
                yield from _flat(below, f"{name}/")
            case Span() as span:
                yield name, span
            case None:
                pass
            case _:
                raise Malformed(f"{name!r} is not an array")


def _read_leaf(reader: Reader, span: Span, number: int, name: str, count: int) -> Leaf:
    try:
        match reader.inside(span, INDEX_INFO):
            case [described, [*spans], [*files]] if len(spans) == len(files) <= MAX_PARTS:
                pass
            case _:
                raise Malformed("it is not described")
        match reader.inside(described):
            case [[*sides], str(dtype), _, _] if len(sides) <= MAX_AXES:
                shape = tuple(_size(side) for side in sides)
            case _:
                raise Malformed("its shape is not described")
        parts = {
            _read_slices(reader.inside(part), reader): _size(file) for part, file in zip(spans, files, strict=True)
        }
    except Malformed as error:
        raise Malformed(f"{name!r}: {error}") from error
    if not _tiles(list(parts), shape) or max(parts.values(), default=0) >= count:
        raise Malformed(f"{name!r}: its parts do not make up its shape {shape}")
    return Leaf(number, name, shape, _DTYPES.get(dtype), parts)


def _read_slices(spans: object, reader: Reader) -> Slices:
    slices: list[tuple[int, int]] = []
    for span in spans if isinstance(spans, list) and len(spans) <= MAX_AXES else [None]:
        match reader.inside(span):
            case [start, stop, None | 1]:
                slices.append((_size(start), _size(stop)))
            case _:
                raise Malformed("a part is not described")
    return tuple(slices)


def _size(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise Malformed(f"{value!r} is not a size")
    return value


def _tiles(parts: Sequence[Slices], shape: tuple[int, ...]) -> bool:
    """Return whether parts fill a shape, each place once."""
    for part in parts:
        if len(part) != len(shape) or not all(a <= b <= side for (a, b), side in zip(part, shape, strict=True)):
            return False
    if sum(_volume(part) for part in parts) != math.prod(shape):
        return False
    meet = np.ones((len(parts), len(parts)), bool)
    for axis in range(len(shape)):
        starts, stops = (np.array([part[axis][end] for part in parts]) for end in (0, 1))
        meet &= (starts[:, None] < stops) & (starts < stops[:, None])
    return int(meet.sum()) <= len(parts)


def _volume(part: Slices) -> int:
    return math.prod(stop - start for start, stop in part)


def _index_info(array: np.ndarray) -> Ext:
    described = pack([list(array.shape), _NAMES[array.dtype.newbyteorder("<")], False, {}])
    return Ext(INDEX_INFO, pack([described, [_whole(array)], [0]]))


def _whole(array: np.ndarray) -> bytes:
    """Return the slices of an array that is in one part."""
    return pack([pack([0, side, None]) for side in array.shape])


# Data files


def _read_data(path: Path, parts: dict[tuple[int, Slices], str], arrays: Mapping[int, np.ndarray]) -> None:
    """Fill arrays with the parts that a data file must hold, given by the array's number and the part's slices."""
    try:
        with open(path, "rb") as file:
            reader = Reader(file)
            tree = reader.whole_file()
            if not isinstance(tree, dict) or tree.pop(CHUNKS, None) is not True:
                raise Malformed("it does not begin as one")
            for number, pieces, slices in _chunks(tree):
                if number in arrays:
                    part = _read_slices(reader.inside(slices, SLICES), reader)
                    if (number, part) not in parts:
                        raise Malformed(f"it holds a part of array {number} that the index does not expect in it")
                    _read_part(reader, pieces, arrays[number], part, parts.pop((number, part)))
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except Malformed as error:
        raise DamagedError(f"{path} is damaged, or not the data of a checkpoint: {error}. Fetch it again.") from error
    if parts:
        raise DamagedError(f"{path} lacks {next(iter(parts.values()))!r}, or a part of it; fetch it again.")


def _chunks(tree: Mapping[str, Any]) -> Iterator[tuple[int, list[Any], Any]]:
    for number, chunks in tree.items():
        for chunk in chunks if isinstance(chunks, list) and number.isdecimal() else [None]:
            match chunk:
                case [[*pieces], slices]:
                    yield int(number), pieces, slices
                case _:
                    raise Malformed(f"{number!r} is not an array in parts")


def _read_part(reader: Reader, pieces: Sequence[object], array: np.ndarray, part: Slices, name: str) -> None:
    buffer = np.empty(_volume(part) * array.itemsize, np.uint8)
    end = 0
    for piece in pieces:
        match reader.inside(piece, NDARRAY):
            case [_, str(dtype), Span(code=None) as numbers] if _DTYPES.get(dtype) == array.dtype:
                start, end = end, end + numbers.stop - numbers.start
            case _:
                raise Malformed(f"{name!r} is not an array of {_NAMES[array.dtype]}")
        if end > len(buffer):
            break
        reader.read_into(buffer[start:end], numbers)
    if end != len(buffer):
        raise Malformed(f"{name!r} has a part of another size than it should")
    array[tuple(slice(*side) for side in part)] = buffer.view(array.dtype).reshape([b - a for a, b in part])


def _write_data(file: BinaryIO, arrays: Sequence[np.ndarray]) -> None:
    file.write(map_head(len(arrays) + 1) + pack(CHUNKS) + pack(True))
    for number, array in enumerate(arrays):
        dtype = array.dtype.newbyteorder("<")
        raw = array.astype(dtype, copy=False).reshape(-1).view(np.uint8).data
        pieces = [raw[start : start + MAX_PIECE] for start in range(0, len(raw), MAX_PIECE)]
        file.write(pack(str(number)) + list_head(1) + list_head(2) + list_head(len(pieces)))
        for piece in pieces:
            described = list_head(3) + pack([len(piece) // dtype.itemsize]) + pack(_NAMES[dtype])
            described += bytes_head(len(piece))
            file.write(ext_head(NDARRAY, len(described) + len(piece)) + described)
            file.write(piece)
        file.write(pack(Ext(SLICES, _whole(array))))
