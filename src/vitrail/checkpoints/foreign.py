"""Weight files of others: read into arrays by their suffix, recognised by their names, and written again."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.coatnet_names import TIMM_COATNET
from vitrail.checkpoints.cvt_names import CVT, HF_CVT
from vitrail.checkpoints.efficientnet_names import EFFICIENTNET_PYTORCH, TIMM_EFFICIENTNET
from vitrail.checkpoints.hf_vit import HF_VIT
from vitrail.checkpoints.names import Arrays, Hints, NameTable
from vitrail.checkpoints.partitioned import read_partitioned, write_partitioned
from vitrail.checkpoints.pickled import read_pickle
from vitrail.checkpoints.storage import replace_file
from vitrail.checkpoints.tensors import dump_tensors, read_tensors
from vitrail.checkpoints.timm_vit import TIMM_VIT
from vitrail.checkpoints.vit_names import BIG_VISION, VIT, VIT_PUBLISHED
from vitrail.checkpoints.vmoe_names import VMOE
from vitrail.config.model import ModelConfig
from vitrail.config.vit import ConvStem, ViTConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel
from vitrail.npz import read_npz

TABLES: tuple[NameTable, ...] = (
    VIT,
    VIT_PUBLISHED,
    BIG_VISION,
    VMOE,
    TIMM_VIT,
    TIMM_COATNET,
    TIMM_EFFICIENTNET,
    HF_VIT,
    HF_CVT,
    CVT,
    EFFICIENTNET_PYTORCH,
)
"""Every convention of names, one table per convention and family."""
CONVENTIONS: tuple[str, ...] = tuple(dict.fromkeys(table.name for table in TABLES))
"""Names that `export_names` can write under."""

WRITTEN = (".npz", ".safetensors", ".pth", ".index")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".npz", ".safetensors", ".index", *PICKLES)
"""Of the files that may hold weights."""
OF_TRAINING = (
    *("dropout", "drop_path", "head_bias", "frozen_norm", "expert_dropout"),
    *("train_capacity_factor", "noise_std", "importance_loss", "load_loss"),
)
"""Settings that decide nothing once the weights are made."""
MAX_RATIO = 20
"""Weights hardly compress; a file that unpacks to more than this many times its size is a trap, not a model."""
FREE_BYTES = 16_000_000
"""Small files of zeros may compress as they like."""


def read_arrays(path: Path, *, allow_pickle: bool = False) -> Arrays:
    """Return the arrays of a weight file under their names.

    Args:
        path: `.npz`, `.safetensors`, the `.index` of a partitioned V-MoE checkpoint, or a PyTorch file.
        allow_pickle: Whether PyTorch files, which are pickles, may be read. Nothing in them is executed.

    Raises:
        UserError: When the file is damaged, or of a kind that vitrail does not read.
    """
    match path.suffix:
        case ".npz":
            limit = MAX_RATIO * path.stat().st_size + FREE_BYTES
            return read_npz(path, limit=limit, advice="it does not look like weights and is not read.")
        case ".safetensors":
            return {name: _as_array(tensor) for name, tensor in read_tensors(path).items()}
        case ".index":
            return read_partitioned(path)
        case suffix if suffix in PICKLES and allow_pickle:
            return read_pickle(path)
        case suffix if suffix in PICKLES:
            raise UserError(
                f"{path} is a pickle, a kind of file that can carry a program. Vitrail runs nothing it finds in one "
                "(weights_only=True); if you want it read, say allow_pickle=True, or on the command line: "
                f"vitrail convert {path} FOLDER --allow-pickle"
            )
        case _:
            raise UserError(f"{path} is not a weight file that vitrail knows; it reads {', '.join(SUFFIXES)}.")


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


def from_arrays(arrays: Arrays, overrides: Mapping[str, Any], source: str) -> ImageModel:
    """Return the model that foreign arrays stand for, before any override that they can do without."""
    table = table_of(arrays, source)
    hints = Hints(image_size=_pair(overrides.get("image_size")), heads=_heads(overrides.get("heads")))
    try:
        config, state = table.to_ours(arrays, hints=hints, source=source)
    except UserError as problem:  # sizes that no configuration allows do not know where they come from
        raise problem if source in str(problem) else UserError(f"{source}: {problem}") from problem
    model = assemble(config, state, source)
    model.preprocessing, model.position_resize = table.preprocessing(config), table.position_resize
    return model


def tables_of(config: ModelConfig) -> list[NameTable]:
    """Return the conventions that models of a family go by; none for a member that Vitrail alone has."""
    if isinstance(config, ViTConfig) and (isinstance(config.stem, ConvStem) or config.pool == "gap+max"):
        return []
    return [table for table in TABLES if table.family is type(config)]


def names_for(model: ImageModel) -> str:
    """Return the convention whose files leave the least to be said about a model of this family.

    Raises:
        UserError: When no convention has a place for such a model.
    """
    reasons: list[UserError] = []
    untold_by: dict[str, int] = {}
    for table in tables_of(model.config):
        try:
            untold_by[table.name] = len(untold(model, table.from_ours(model)))
        except UserError as reason:
            reasons.append(reason)
    if not untold_by:
        raise reasons[0] if reasons else _without_names(model)
    return min(untold_by, key=lambda name: untold_by[name])


def untold(model: ImageModel, arrays: Arrays) -> dict[str, object]:
    """Return the settings of a model that whoever reads its foreign arrays will not know, with their values."""
    hints = Hints(image_size=model.config.image_size, heads=getattr(model.config, "heads", None))
    read, _ = table_of(arrays, "the file").to_ours(arrays, hints=hints)
    settings = {field.name: getattr(model.config, field.name) for field in fields(read)}
    return {name: value for name, value in settings.items() if name not in OF_TRAINING and value != getattr(read, name)}


def to_arrays(model: ImageModel, names: str) -> dict[str, np.ndarray]:
    """Return a model's weights under foreign names.

    Raises:
        UserError: When the names are unknown or have no place for such a model.
    """
    if names not in CONVENTIONS:
        raise UserError(f"there are no names {names!r}; choose one of {', '.join(CONVENTIONS)}.")
    fitting = tables_of(model.config)
    for table in fitting:
        if table.name == names:
            return table.from_ours(model)
    if not fitting:
        raise _without_names(model)
    choice = " or ".join(table.name for table in fitting)
    raise UserError(f"the names {names!r} have no place for a {type(model).__name__}; choose {choice}.")


def require_written(path: Path) -> None:
    """Raise UserError unless `write_arrays` can write a file of this suffix."""
    if path.suffix not in WRITTEN:
        raise UserError(f"{path}: weights are written as {', '.join(WRITTEN)}; choose one of these suffixes.")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays in the format that the suffix says, complete or not at all.

    Raises:
        UserError: When the suffix is none of `WRITTEN`, or the file cannot be written.
    """
    require_written(path)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    size = sum(array.nbytes for array in arrays.values())
    match path.suffix:
        case ".npz":
            replace_file(path, lambda file: np.savez(file, **arrays), size=size)  # pyright: ignore[reportArgumentType]
        case ".safetensors":
            replace_file(path, lambda file: dump_tensors(file, tensors), size=size)
        case ".pth":
            replace_file(path, lambda file: torch.save(tensors, file), size=size)
        case _:
            write_partitioned(path, arrays)


def _without_names(model: ImageModel) -> UserError:
    return UserError(
        f"no convention of names has a place for a {type(model).__name__}; `save_model` keeps it in a folder instead."
    )


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


def _heads(number: object) -> int | tuple[int, ...] | None:
    """Return a number of heads, or one per stage, or None for what `with_overrides` will refuse."""
    match number:
        case int() if number > 0:
            return number
        case (int(), *_):
            return tuple(number)
        case _:
            return None
