"""A model folder: `model.safetensors`, `config.json`, a model card `README.md`, and the manifest of their hashes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail import __version__
from vitrail.checkpoints.adapt import check_overrides, with_overrides
from vitrail.checkpoints.assemble import assemble, check_fit, empty_model
from vitrail.checkpoints.card import model_card
from vitrail.checkpoints.storage import MANIFEST, publish, standing, verify
from vitrail.checkpoints.tensors import read_header, read_tensors, write_tensors
from vitrail.config.codec import from_json, to_json
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.errors import UserError
from vitrail.models import ImageModel

FORMAT = 1
"""Version of `config.json`. A newer vitrail reads every older one."""
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CARD = "README.md"


def save_model(
    model: ImageModel,
    folder: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    half: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder, complete or not at all.

    Args:
        model: Weights with their configuration, preprocessing and labels.
        folder: The place; a model folder that stands there is replaced.
        metrics: What was measured, by name; numbers, or objects of numbers.
        recipe: The settings that made the weights.
        data: What they were made from.
        half: Round the weights to 16 bits: half as large a file, which loads into 32 bits again.
        weights: The model's state dict, where the model itself holds but a part of it; by default its own.

    Raises:
        UserError: When the labels do not fit the head, 16 bits cannot hold a weight, the disk is full, or the place
            holds something else.
    """
    document = model_document(model, metrics=metrics, recipe=recipe, data=data)
    config = (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    card = model_card(model, metrics=metrics, recipe=recipe, data=data).encode()
    state = dict(model.state_dict() if weights is None else weights)
    if half:
        state = _halved(state)

    def write(place: Path) -> None:
        write_tensors(place / WEIGHTS, state)
        (place / CONFIG).write_bytes(config)
        (place / CARD).write_bytes(card)

    size = sum(tensor.nbytes for tensor in state.values()) + len(config) + len(card)
    publish(Path(folder), write, size=size)


def model_document(
    model: ImageModel,
    *,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what `config.json` says of a model. Arguments and errors are those of `save_model`."""
    if model.labels and len(model.labels) != model.config.num_classes:
        raise UserError(
            f"the model has {len(model.labels)} labels but {model.config.num_classes} classes; "
            "set model.labels to one name per class, in the order of the logits."
        )
    return {
        "format": FORMAT,
        "vitrail": __version__,
        "model": to_json(model.config),
        "preprocessing": to_json(model.preprocessing),
        "position_resize": model.position_resize,
        "labels": list(model.labels),
        "multi_label": model.multi_label,
        "metrics": _plain(metrics),
        "recipe": _plain(recipe),
        "data": _plain(data),
    }


def load_folder(folder: str | Path, **overrides: Any) -> ImageModel:
    """Return the model of a folder that `save_model` wrote, in evaluation mode.

    The weights are checked against the manifest, where the folder has one; `config.json` and the card may be edited.

    Args:
        folder: The model folder.
        **overrides: As those of `load_model`.

    Raises:
        UserError: When the folder is not a model folder, is damaged, or was written by a newer vitrail.
    """
    check_overrides(overrides)
    folder = standing(Path(folder))
    document = read_config(folder)
    weights = folder / WEIGHTS
    if (folder / MANIFEST).exists():
        verify(folder, [WEIGHTS])
    if not weights.is_file():
        raise UserError(f"{weights} is missing; restore it from a copy.")
    config = from_json(ModelConfig, document["model"], "model")
    shapes = {name: entry.shape for name, entry in read_header(weights).items()}
    check_fit(empty_model(config), shapes, weights)
    return with_overrides(described(document, read_tensors(weights), weights), overrides)


def described(document: Mapping[str, Any], state: Mapping[str, Tensor], source: object) -> ImageModel:
    """Return the model that a `config.json` describes, in evaluation mode, with its tensors, read from `source`.

    Raises:
        UserError: When the tensors do not fit.
    """
    model = assemble(from_json(ModelConfig, document["model"], "model"), state, source)
    model.preprocessing = from_json(Preprocessing, document["preprocessing"], "preprocessing")
    model.labels, model.multi_label = tuple(document["labels"]), document["multi_label"]
    model.position_resize = document.get("position_resize", "official")  # not in the oldest folders
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a model folder, checked for what every model folder has.

    Raises:
        UserError: When it is missing, damaged, from a newer vitrail, or the folder is not a model folder.
    """
    path = folder / CONFIG
    if (folder / "best" / CONFIG).is_file():
        raise UserError(f"{folder} is a run folder; its models lie in {folder / 'best'} and {folder / 'last'}.")
    if (checkpoints := folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} is a run folder without a model yet; {checkpoints} has one of its newest checkpoint."
        )
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no {CONFIG}.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it from a copy.") from error
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise UserError(f"{path} was not written by vitrail: it does not say which format it has.")
    if document["format"] > FORMAT:
        raise UserError(
            f"{path} was written by a newer vitrail (format {document['format']}; this one reads up to {FORMAT}). "
            "Update it with pip install -U vitrail."
        )
    for key, kind in {"model": dict, "preprocessing": dict, "labels": list, "multi_label": bool}.items():
        if not isinstance(document.get(key), kind):
            raise UserError(f"{path} lacks {key!r}, or it is not what it should be; restore it from a copy.")
    if not all(isinstance(label, str) for label in document["labels"]):
        raise UserError(f"{path}: labels must be a list of names.")
    if (classes := len(document["labels"])) not in (0, document["model"].get("num_classes", classes)):
        raise UserError(f"{path} has {classes} labels for {document['model']['num_classes']} classes; mend its labels.")
    return document


def _halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with numbers of 32 bits rounded to 16."""
    halved = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
    for name, tensor in halved.items():
        if bool(state[name].isfinite().all()) and not bool(tensor.isfinite().all()):
            raise UserError(f"{name} holds numbers beyond 65,504, which 16 bits cannot hold; store it in 32.")
    return halved


def _plain(value: Any) -> Any:
    """Return `value` for JSON: plain numbers, and null for NaN and infinity, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
