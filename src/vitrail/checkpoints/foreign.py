"""Weight files of others: read into arrays by their suffix, recognised by their names, and written again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.names import Arrays, Hints, NameTable
from vitrail.checkpoints.storage import replace_file
from vitrail.checkpoints.tensors import read_tensors
from vitrail.checkpoints.vit_names import BIG_VISION, VIT, VIT_PUBLISHED
from vitrail.errors import UserError
from vitrail.models import ImageModel
from vitrail.npz import read_npz

TABLES: tuple[NameTable, ...] = (VIT, VIT_PUBLISHED, BIG_VISION)
"""Every convention of names, one table per convention and family."""
CONVENTIONS: tuple[str, ...] = tuple(dict.fromkeys(table.name for table in TABLES))
"""Names that `export_names` can write under."""

MAX_RATIO = 20
"""Weights hardly compress; a file that unpacks to more than this many times its size is a trap, not a model."""
FREE_BYTES = 16_000_000
"""Small files of zeros may compress as they like."""


def read_arrays(path: Path) -> Arrays:
    """Return the arrays of a weight file under their names.

    Raises:
        UserError: When the file is damaged, or of a kind that vitrail does not read.
    """
    match path.suffix:
        case ".npz":
            limit = MAX_RATIO * path.stat().st_size + FREE_BYTES
            return read_npz(path, limit=limit, advice="it does not look like weights and is not read.")
        case ".safetensors":
            return {name: _as_array(tensor) for name, tensor in read_tensors(path).items()}
        case _:
            raise UserError(f"{path} is not a weight file that vitrail reads: .npz or .safetensors.")


def table_of(arrays: Arrays, source: str) -> NameTable:
    """Return the table that arrays are named by.

    Raises:
        UserError: When they are under no names that vitrail knows.
    """
    for table in TABLES:
        if table.claims(arrays):
            return table
    shown = ", ".join(list(arrays)[:3])
    raise UserError(
        f"{source} is not a model that vitrail knows by its names ({shown}, ...); it knows {', '.join(CONVENTIONS)}. "
        "Weights of vitrail itself need their config.json beside them."
    )


def from_arrays(arrays: Arrays, overrides: Mapping[str, Any], source: str) -> tuple[ImageModel, NameTable]:
    """Return the model that foreign arrays stand for, before any override, and the table that read them."""
    table = table_of(arrays, source)
    hints = Hints(image_size=_pair(overrides.get("image_size")), heads=_whole(overrides.get("heads")))
    config, state = table.to_ours(arrays, hints=hints, source=source)
    model = assemble(config, state, source)
    model.preprocessing = table.preprocessing(config)
    return model, table


def to_arrays(model: ImageModel, names: str) -> dict[str, np.ndarray]:
    """Return a model's weights under foreign names.

    Raises:
        UserError: When the names are unknown or have no place for such a model.
    """
    if names not in CONVENTIONS:
        raise UserError(f"there are no names {names!r}; choose one of {', '.join(CONVENTIONS)}.")
    for table in TABLES:
        if table.name == names and table.family is type(model.config):
            return table.from_ours(model)
    fitting = [table.name for table in TABLES if table.family is type(model.config)]
    raise UserError(f"the names {names!r} have no place for a {type(model).__name__}; choose {' or '.join(fitting)}.")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as `.npz`, complete or not at all.

    Raises:
        UserError: When the suffix is another, or the file cannot be written.
    """
    if path.suffix != ".npz":
        raise UserError(f"{path}: weights are written as .npz; choose this suffix.")
    size = sum(array.nbytes for array in arrays.values())
    replace_file(path, lambda file: np.savez(file, **arrays), size=size)  # pyright: ignore[reportArgumentType]


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's numbers as an array; numpy has no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _pair(size: object) -> tuple[int, int] | None:
    """Return a picture size as height and width, or None for what `with_overrides` will refuse."""
    match size:
        case int():
            return size, size
        case (int(height), int(width)):
            return height, width
        case _:
            return None


def _whole(number: object) -> int | None:
    return number if isinstance(number, int) and number > 0 else None
