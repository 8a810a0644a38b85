"""Weights for another task: other picture size, classes or channels. Used when loading and to start a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, get_args

from torch import Tensor

from vitrail.checkpoints.assemble import assemble, empty_model
from vitrail.config.model import FAMILIES, ModelConfig, override
from vitrail.config.preprocessing import Preprocessing
from vitrail.errors import UserError, did_you_mean
from vitrail.layers.embedding import PositionResize
from vitrail.models import ImageModel

SHAPES = ("image_size", "num_classes", "channels")
"""Overrides that bring other tensors; every other field of a configuration may be changed as long as none changes."""


def check_overrides(overrides: Mapping[str, object]) -> None:
    """Raise a UserError for a keyword that loading does not know, before anything is read."""
    known = {field.name for family in FAMILIES for field in fields(family)} | {"position_resize"}
    for key in overrides:
        if key not in known:
            raise UserError(f"a loaded model cannot be given {key!r}.{did_you_mean(key, known)}")
    method = overrides.get("position_resize")
    if method is not None and method not in get_args(PositionResize):
        raise UserError(f"position_resize must be one of {', '.join(get_args(PositionResize))}, not {method!r}.")


def with_overrides(model: ImageModel, overrides: Mapping[str, object]) -> ImageModel:
    """Return the model with the keywords of `load_model` applied; it takes over the tensors of `model`."""
    check_overrides(overrides)
    config = model.config
    own = {field.name for field in fields(config)}
    changes = {key: value for key, value in overrides.items() if key != "position_resize"}
    for key in changes:
        if key not in own:
            raise UserError(f"a {type(model).__name__} has no {key!r}.{did_you_mean(key, own)}")
    wanted = override(config, changes)
    settings = {key: getattr(wanted, key) for key in changes if key not in SHAPES}
    if settings:
        model = _with_settings(model, replace(config, **settings), settings)
    shapes = {key: getattr(wanted, key) for key in SHAPES if key in overrides}
    method: Any = overrides.get("position_resize")
    return adapt(model, **shapes, position_resize=method)


def _with_settings(model: ImageModel, config: ModelConfig, settings: Mapping[str, object]) -> ImageModel:
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if {name: tuple(tensor.shape) for name, tensor in empty_model(config).state_dict().items()} != shapes:
        raise UserError(
            f"{', '.join(f'{key}={value!r}' for key, value in settings.items())} does not fit the weights that were "
            "loaded: only what changes no tensor can be given, and image_size, num_classes, channels."
        )
    return _described(assemble(config, state, "the model"), model, model.preprocessing, model.labels)


def adapt(
    model: ImageModel,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    channels: int | None = None,
    labels: Sequence[str] | None = None,
    position_resize: PositionResize | None = None,
) -> ImageModel:
    """Return a model for another task, which takes over the tensors of `model` where they still fit.

    Args:
        model: Not to be used afterwards.
        image_size: Picture size in pixels, height and width or one number; learned positions are resized.
        num_classes: Outputs. Another number than the model's brings a fresh head of zeros, in a ViT in place of
            `pre_logits` too, as its paper does (section 3.2); 0 removes the head alone.
        channels: 3 to 1 sums the first kernel over the channels, 1 to 3 spreads it evenly: a grey picture gives
            the same answer either way, when all channels are normalised alike.
        labels: Class names. Others than those the model knows bring a fresh head, even where their number is the same.
        position_resize: Whose method resizes positions; that of the weights' source if None.

    Raises:
        UserError: When a value is impossible.
    """
    if position_resize is not None and image_size is None:
        raise UserError("position_resize= says how positions are resized; it needs image_size= to say to what.")
    if num_classes is None:
        num_classes = len(labels) if labels else model.config.num_classes
    if num_classes < 0 or (labels and len(labels) != num_classes):
        raise UserError(f"num_classes={num_classes} does not fit {len(labels or ())} labels; give a label per class.")

    config, state, preprocessing = model.config, dict(model.state_dict()), model.preprocessing
    changes = {"image_size": image_size, "channels": channels}
    target = override(config, {key: value for key, value in changes.items() if value is not None})
    if target.image_size != config.image_size:
        model.resize_tables(state, target.image_size, position_resize or model.position_resize)
    if target.channels != config.channels:
        _change_channels(state, model, target.channels)
        preprocessing = replace(preprocessing, mean=_grey(preprocessing.mean), std=_grey(preprocessing.std))
    preprocessing = replace(preprocessing, image_size=target.image_size, channels=target.channels)

    names = tuple(labels) if labels else model.labels
    same_head = num_classes == config.num_classes and (not model.labels or names == model.labels)
    if not same_head:
        target = _replace_head(state, model, target, num_classes)
        names = tuple(labels) if labels else ()
    if target == config and names == model.labels and same_head:
        return model
    adapted = assemble(target, state, "the model")
    adapted = _described(adapted, model, preprocessing, names)
    adapted.multi_label = model.multi_label and same_head
    return adapted


def _change_channels(state: dict[str, Tensor], model: ImageModel, new: int) -> None:
    name, old = model.input_kernel, model.config.channels
    if (old, new) == (3, 1) and model.input_kernel_sums:
        state[name] = state[name].sum(dim=1, keepdim=True)
    elif (old, new) == (1, 3):
        state[name] = (state[name] / 3).repeat(1, 3, 1, 1)
    elif (old, new) == (3, 1):
        raise UserError(
            "this model standardises its first filters, so they cannot be summed to one channel. "
            "Keep channels=3: grey pictures are then read as colour."
        )
    else:
        raise UserError(
            f"weights for {old} channels cannot be adapted to {new}, only 3 to 1 and 1 to 3. "
            f"Start from fresh weights with create_model(..., channels={new}), or give pictures of {old} channels."
        )


def _replace_head(state: dict[str, Tensor], model: ImageModel, config: ModelConfig, num_classes: int) -> ModelConfig:
    """Put a head of zeros in place of the old one, and return the configuration for it."""
    head = replace(config, num_classes=0) if num_classes == 0 else model.with_classes(num_classes)
    config = replace(head, image_size=config.image_size, channels=config.channels)
    like = next(model.parameters())
    wanted = empty_model(config).state_dict()
    for name in [name for name in state if name not in wanted or name.startswith("head.")]:
        del state[name]
    for name in wanted:
        if name.startswith("head."):
            state[name] = like.new_zeros(wanted[name].shape)
    return config


def _grey(values: tuple[float, ...]) -> tuple[float, ...]:
    """Return one value for all channels: what a grey picture is normalised by in place of a coloured one."""
    return values if len(set(values)) == 1 else (sum(values) / len(values),)


def _described(model: ImageModel, like: ImageModel, preprocessing: Preprocessing, labels: Sequence[str]) -> ImageModel:
    """Return the model with what no tensor holds, and in the mode of the one that it is made from."""
    model.preprocessing, model.labels, model.multi_label = preprocessing, tuple(labels), like.multi_label
    model.position_resize = like.position_resize
    return model.train(like.training)
