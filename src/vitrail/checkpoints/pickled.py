"""Weights in PyTorch's own files (`.pth`, `.pt`, `.bin`), read without running what such a file may say to run.

A pickle is a program. `torch.load(weights_only=True)` (torch 2.10 or newer) interprets the few instructions that
tensors need and refuses the rest. What it leaves open is size: a file of a kilobyte may declare terabytes.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.errors import UserError

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training scripts put weights beside an optimizer's state. Averaged ones first: they are what was evaluated."""
PARALLEL = "module."
"""What DataParallel and DistributedDataParallel put before every name."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
COUNTERS = (torch.int64, torch.int32)

MAX_RATIO = 4
"""Bytes of arrays per byte of the file: twice for halves that are widened, twice for tensors under two names."""
FREE_BYTES = 1_000_000
"""Small files may repeat numbers as they like."""


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Return the weights of a PyTorch file under their names, floats as float32 and counters as int64.

    The state dict is the file itself, or what it holds under one of `NESTED`; nothing in the file is executed.

    Args:
        path: The file. Its arrays come back in memory of their own.

    Raises:
        UserError: When the file cannot be read, is damaged, asks for Python code, holds something other than weights,
            or would unpack to far more than its size.
    """
    try:
        size = path.stat().st_size
        _check_archive(path, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on old formats, and advice to load with code
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
        tensors = _state_dict(loaded, path)
        _check_sizes(tensors, MAX_RATIO * size + FREE_BYTES, path)
        return _arrays(tensors)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except MemoryError as error:
        raise UserError(f"{path} asks for more memory than there is; it is not read.") from error
    except Exception as error:  # torch's readers raise a dozen types on damaged files
        raise UserError(_what_is_wrong(path, error)) from error


def _check_archive(path: Path, size: int) -> None:
    """Raise a UserError for an archive with compressed or repeated contents, which torch never writes."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # the format before torch 1.6 is read piece by piece, never more than the file holds
    with zipfile.ZipFile(path) as archive:
        declared = sum(member.file_size for member in archive.infolist())
    if declared > size:
        raise UserError(f"{path} would unpack to {declared:,} bytes, more than the {size:,} it has; it is not read.")


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of what a file holds, by name."""
    weights = loaded
    if isinstance(loaded, Mapping):
        weights = next((loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping)), loaded)
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f"{path} holds no state dict but a {type(loaded).__name__}; save `model.state_dict()`.")
    parallel = all(isinstance(name, str) and name.startswith(PARALLEL) for name in weights)
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor; save `model.state_dict()`.")
        if tensor.dtype not in (*FLOATS, *COUNTERS):
            raise UserError(
                f"{path}: {name!r} has numbers of type {tensor.dtype}; "
                "weights are float32, float16 or bfloat16, and counters int64."
            )
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path}: {name!r} is a {tensor.layout} tensor on {tensor.device}, without plain numbers.")
        tensors[name.removeprefix(PARALLEL) if parallel else name] = tensor.detach()
    return tensors


def _check_sizes(tensors: Mapping[str, Tensor], limit: int, path: Path) -> None:
    """Raise a UserError when tensors, which may repeat one number or share one memory, would fill more than `limit`."""
    total = 0
    for name, tensor in tensors.items():
        total += tensor.numel() * (4 if tensor.dtype in FLOATS else 8)
        if total > limit:
            raise UserError(
                f"{path} would unpack to more than {limit:,} bytes at {name!r} of the shape {tuple(tensor.shape)}; "
                "it does not look like weights and is not read."
            )


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return every tensor as an array that shares its memory with no other, so that none is trained in two places."""
    arrays: dict[str, np.ndarray] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        wanted = tensor.resolve_neg().to(torch.float32 if tensor.dtype in FLOATS else torch.int64).contiguous()
        storage = wanted.untyped_storage()
        if storage.data_ptr() in memory or storage.nbytes() != wanted.nbytes:
            wanted = wanted.clone()
        memory.add(wanted.untyped_storage().data_ptr())
        arrays[name] = wanted.numpy()
    return arrays


def _what_is_wrong(path: Path, error: Exception) -> str:
    """Return what to tell a person. Torch's own words advise to run the file's code, so they stay out."""
    if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{path} asks to run {match[1]}, and vitrail runs nothing that a file brings. "
            "If you trust it, load it where it was made and save `model.state_dict()` alone."
        )
    return f"{path} is damaged, or not a file of PyTorch weights; fetch it again."
