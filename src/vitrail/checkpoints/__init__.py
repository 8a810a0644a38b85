"""Weights on disk: model folders, official files of others, and the state of a run."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.checkpoints.adapt import adapt, check_overrides, with_overrides
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.folder import CONFIG, WEIGHTS, load_folder, save_model
from vitrail.checkpoints.names import NameTable
from vitrail.checkpoints.storage import replace_file, standing
from vitrail.checkpoints.vit_names import BIG_VISION, VIT, VIT_PUBLISHED, official_table
from vitrail.config.model import ALIASES, ViTConfig, model_config
from vitrail.errors import UserError
from vitrail.models import ImageModel
from vitrail.npz import read_npz

__all__ = ["NAME_TABLES", "adapt", "export_names", "load_folder", "load_model", "save_model"]

NAME_TABLES: dict[str, NameTable] = {table.name: table for table in (VIT, VIT_PUBLISHED, BIG_VISION)}
"""Foreign names that weights can be written under."""

MAX_RATIO = 20
"""Weights hardly compress; a file that unpacks to more than this many times its size is a trap, not a model."""
FREE_BYTES = 16_000_000
"""Small files of zeros may compress as they like."""

_SOURCES = "a model folder, its model.safetensors, or an official ViT or big_vision .npz file"
_log = logging.getLogger("vitrail")


def load_model(source: str | Path, **overrides: Any) -> ImageModel:
    """Return a model with its weights, in evaluation mode. Official files need no name: all is read off the arrays.

    Args:
        source: A model folder, the `model.safetensors` in one, or an official ViT or big_vision `.npz` file.
        **overrides: What the file cannot tell, or is to be another way: `gelu="tanh"|"erf"|"quick"`, `dropout=`,
            `drop_path=`; `image_size=`, with `position_resize="official"|"timm"|"timm-npz"|"hf"`; `num_classes=` and
            `channels=` (see `adapt`).

    Raises:
        UserError: When there is no such source, it is damaged, or an override is unknown.
    """
    check_overrides(overrides)
    path = Path(source)
    if standing(path).is_dir():
        return load_folder(path, **overrides)
    if path.suffix == ".npz" and path.is_file():
        return _load_npz(path, overrides)
    if path.suffix == ".safetensors" and path.is_file():
        if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
            return load_folder(path.parent, **overrides)
        raise UserError(f"{path} does not say what model it holds; vitrail needs a {CONFIG} beside a {WEIGHTS}.")
    raise UserError(_why_not(str(source), path))


def export_names(model: ImageModel, path: str | Path, names: str = "vit") -> None:
    """Write a model's weights as `.npz` under foreign names; reading the file gives the same weights, bit for bit.

    Args:
        model: The model. What arrays cannot hold, as labels and preprocessing, is left behind.
        path: The file to write.
        names: A key of `NAME_TABLES`: "vit", "vit-published" or "big-vision".

    Raises:
        UserError: When the names are unknown or have no place for such a model, or the file cannot be written.
    """
    if names not in NAME_TABLES:
        raise UserError(f"there are no names {names!r}; choose one of {', '.join(NAME_TABLES)}.")
    arrays = NAME_TABLES[names].from_ours(model)
    official = ViTConfig()
    for setting in ("gelu", "norm_eps"):
        if (value := getattr(model.config, setting)) != getattr(official, setting):
            _log.warning("%s cannot say that the model has %s=%r; tell whoever loads it.", path, setting, value)
    size = sum(array.nbytes for array in arrays.values())
    replace_file(Path(path), lambda file: np.savez(file, **arrays), size=size)  # pyright: ignore[reportArgumentType]


def _load_npz(path: Path, overrides: dict[str, Any]) -> ImageModel:
    limit = MAX_RATIO * path.stat().st_size + FREE_BYTES
    arrays = read_npz(path, limit=limit, advice="it does not look like weights and is not read.")
    table = official_table(arrays)
    config, state = table.to_ours(arrays, image_size=_pair(overrides.get("image_size")), source=str(path))
    model = assemble(config, state, path)
    model.preprocessing = table.preprocessing(config)
    return with_overrides(model, overrides)


def _pair(size: object) -> tuple[int, int] | None:
    """Return a picture size as height and width, or None for what `with_overrides` will refuse."""
    match size:
        case int():
            return size, size
        case (int(height), int(width)):
            return height, width
        case _:
            return None


def _why_not(source: str, path: Path) -> str:
    if source.startswith(("hf:", "timm:")) or path.suffix in (".pth", ".pt", ".bin", ".ckpt", ".index"):
        return f"{source} is not a source that vitrail can load yet; it loads {_SOURCES}."
    if path.exists():
        return f"{path} is not a weight file that vitrail knows; it loads {_SOURCES}."
    try:
        model_config(source)
    except UserError:
        return f"there is no file or folder {source}; vitrail loads {_SOURCES}."
    name = ALIASES.get(source, source)
    return (
        f"there are no weights at hand for {source!r}; give the path of {_SOURCES}, "
        f"or take fresh weights with create_model({name!r})."
    )
