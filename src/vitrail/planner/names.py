"""What is planned: a preset, or a model with the settings that training has by itself."""

import math
from dataclasses import dataclass, replace

from vitrail.config.model import ALIASES, MODELS, ModelConfig, model_config, override
from vitrail.config.run import RunConfig
from vitrail.config.vit import vit_of_any_patch
from vitrail.errors import UserError, did_you_mean
from vitrail.presets import PRESETS
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.describe import model_name
from vitrail.weights import config_at_hand, weights_at_hand


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run and its length."""

    name: str
    preset: bool
    model: str
    """The published size, or the family where it is of none."""
    config: RunConfig
    steps: int | None
    """Updates; None where nothing says how long the run is, or it is as many as fit into `minutes`."""
    minutes: float | None
    data: str | None
    """The data set that the number of updates follows from."""
    accumulation: int
    """Micro-batches of an update that `vitrail train` makes where it is not told otherwise."""
    flags: str
    """What tells `vitrail train` of a batch and picture size that are not the preset's."""


def named(name: str, *, batch_size: int | None = None, image_size: int | None = None) -> Run:
    """Return the run of a preset, or of a model's name or leaderboard alias, with a batch and picture size of its own.

    A name of both stands for the model, as everywhere but in `vitrail train`.

    Raises:
        UserError: When there is neither of that name, or a size is none.
    """
    for flag, size in (("batch-size", batch_size), ("image-size", image_size)):
        if size is not None and size < 1:
            raise UserError(f"--{flag} must be at least 1, not {size}.")
    model = _model(name)
    if model is None and name not in PRESETS:
        hint = did_you_mean(name, [*MODELS, *ALIASES, *PRESETS])
        raise UserError(
            f"there is no model and no preset named {name!r}.{hint} `vitrail models` and `vitrail train --list` list "
            "them."
        )
    config = PRESETS[name].config if model is None else RunConfig(model=model)
    accumulation, flags = config.loop.accumulation, list[str]()
    if image_size is not None:
        config = replace(config, model=override(config.model, {"image_size": (image_size, image_size)}))
        flags.append(f"--model.image-size {image_size} {image_size}")
    if batch_size is not None:
        flags.append(f"--loop.batch-size {batch_size}")
        config = replace(config, loop=replace(config.loop, batch_size=batch_size, accumulation=1))
    data = None if model is not None else _data_set(name)
    size = model_name(config.model) or type(config.model).__name__.removesuffix("Config")
    return Run(
        name=name,
        preset=model is None,
        model=name if model is not None else size,
        config=config,
        steps=_steps(config, data) if model is None else None,
        minutes=config.minutes,
        data=data,
        accumulation=accumulation,
        flags=" ".join(flags),
    )


def _model(name: str) -> ModelConfig | None:
    if name in weights_at_hand():
        return config_at_hand(name)
    known = ALIASES.get(name, name)
    return model_config(name) if known in MODELS or vit_of_any_patch(known) is not None else None


def _data_set(name: str) -> str | None:
    """Return the data set that a preset is named after."""
    return next((word for word in name.split("-") if word in DATA_SETS), None)


def _steps(config: RunConfig, data: str | None) -> int | None:
    loop = config.loop
    if config.minutes is not None:
        return None
    if loop.steps is not None:
        return loop.steps
    if data is None or loop.epochs is None:
        return None
    held_out = 0.0 if config.input.val is not None else config.input.val_fraction
    return max(1, math.floor(loop.epochs * DATA_SETS[data].pictures * (1 - held_out) / loop.batch_size))
