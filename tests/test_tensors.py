"""The weight file: read and written as the safetensors library does it; what lies is refused."""

import json
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from vitrail.checkpoints.tensors import read_header, read_tensors, write_tensors
from vitrail.errors import UserError


def some_tensors() -> dict[str, Tensor]:
    shared = torch.randn(4, 6)
    kinds = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return {
        **{str(dtype): torch.arange(7).to(dtype) for dtype in kinds},
        **{str(dtype): torch.randn(3, 5).to(dtype) for dtype in floats},
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(3, 4).T,
        "shared": shared,
        "part": shared[1:3, ::2],
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "été": torch.ones(1),
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    first, second = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(first, second)


def test_weight_files_and_the_safetensors_library_read_each_other(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_tensors(tmp_path / "ours", tensors)
    plain = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, tmp_path / "theirs")
    for read in (
        read_tensors(tmp_path / "ours"),
        read_tensors(tmp_path / "theirs"),
        safetensors.torch.load_file(tmp_path / "ours"),
    ):
        assert read.keys() == tensors.keys()
        assert all(same_bits(read[name], tensors[name]) for name in tensors)


def test_tensors_that_the_format_cannot_hold_are_a_type_error(tmp_path: Path) -> None:
    for tensor in (torch.ones(2, dtype=torch.complex128), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match="odd is a"):
            write_tensors(tmp_path / "x", {"odd": tensor})


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: object, offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"{", "damaged header"),
        (b"[" * 200_000, "damaged header"),
        (b"\xff\xfe", "damaged header"),
        ([], "damaged header"),
        ({"a": 1}, "damaged header"),
        ({"a": entry([1], [0])}, "damaged header"),
        ({"a": entry([1], [0, 4], "F31")}, "unknown dtype 'F31'"),
        ({"a": entry([1], [0, 4], ["F32"])}, "unknown dtype"),
        ({"a": entry([-1], [4, 0])}, "whole numbers"),
        ({"a": entry([1.0], [0, 4])}, "whole numbers"),
        ({"a": entry([True], [0, 4])}, "whole numbers"),
        ({"a": entry([2], [0, 4])}, "disagree"),
        ({"a": entry([2**62, 4], [0, 0])}, "too large"),
        ({"a": entry([0, 2**62], [0, 0])}, "too large"),
        ({"a": entry([1] * 65, [0, 4])}, "too large"),
        ({"a": entry([1], [4, 8])}, "begins at byte 4, not 0"),
        ({"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, "begins at byte 4, not 8"),
        ({"a": entry([1], [0, 4])}, "holds 8 bytes of tensors instead of 4"),
        ({"a": entry([4], [0, 16])}, "holds 8 bytes of tensors instead of 16"),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: object, told: str) -> None:
    path = header_file(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(UserError, match=rf"x\.safetensors.*{told}"):
        read_tensors(path)


def test_headers_beyond_the_limits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header_file(path, b" " * 10_000_001)
    with pytest.raises(UserError, match="header of 10,000,001 bytes"):
        read_header(path)
    header_file(path, {str(i): entry([0], [0, 0]) for i in range(20_001)})
    with pytest.raises(UserError, match="lists 20,001 tensors"):
        read_header(path)
    for data in (b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="truncated, or not a safetensors file"):
            read_header(path)


def test_a_damaged_weight_file_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, some_tensors())
    data = path.read_bytes()
    moments = random.Random(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    refused = 0
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(moments.randint(1, 3)):
            damaged[moments.randrange(header)] = moments.randrange(256)
        path.write_bytes(damaged[: moments.choice([len(data), moments.randrange(len(data))])])
        try:
            read = read_tensors(path)
        except UserError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in read.values()) == len(data) - header
    assert refused > 300
