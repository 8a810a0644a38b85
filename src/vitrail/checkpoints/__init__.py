"""Weights on disk: model folders, official files of others, and the state of a run."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from vitrail.checkpoints.adapt import adapt, check_overrides, with_overrides
from vitrail.checkpoints.folder import CONFIG, WEIGHTS, load_folder, save_model
from vitrail.checkpoints.foreign import CONVENTIONS, from_arrays, read_arrays, table_of, to_arrays, write_arrays
from vitrail.checkpoints.names import Hints
from vitrail.checkpoints.storage import standing
from vitrail.config.model import ALIASES, model_config
from vitrail.errors import UserError
from vitrail.models import ImageModel

__all__ = ["CONVENTIONS", "adapt", "export_names", "load_folder", "load_model", "save_model"]

_SOURCES = "a model folder, its model.safetensors, or an official ViT or big_vision .npz file"
_OF_TRAINING = ("dropout", "drop_path", "head_bias")
"""Settings that decide nothing once the weights are made."""
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
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        return load_folder(path.parent, **overrides)
    if path.suffix in (".npz", ".safetensors") and path.is_file():
        model, table = from_arrays(read_arrays(path), overrides, str(path))
        return with_overrides(model, overrides, position_resize=table.position_resize)
    raise UserError(_why_not(str(source), path))


def export_names(model: ImageModel, path: str | Path, names: str = "vit") -> None:
    """Write a model's weights as `.npz` under foreign names; reading the file gives the same weights, bit for bit.

    Args:
        model: The model. What arrays cannot hold, as labels and preprocessing, is left behind.
        path: The file to write.
        names: One of `CONVENTIONS`: "vit", "vit-published", "big-vision", ...

    Raises:
        UserError: When the names are unknown or have no place for such a model, or the file cannot be written.
    """
    arrays = to_arrays(model, names)
    hints = Hints(image_size=model.config.image_size)
    config, _ = table_of(arrays, str(path)).to_ours(arrays, hints=hints, source=str(path))
    for field in fields(config):
        ours, read = getattr(model.config, field.name), getattr(config, field.name)
        if ours != read and field.name not in _OF_TRAINING:
            _log.warning("%s cannot say that the model has %s=%r; tell whoever loads it.", path, field.name, ours)
    write_arrays(Path(path), arrays)


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
