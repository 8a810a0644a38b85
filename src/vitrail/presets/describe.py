"""A preset in words: where it is from, what it reached, and which settings it has."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from vitrail.config.distillation import DistillationConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import MODELS, ModelConfig
from vitrail.config.run import RECIPES, RunConfig
from vitrail.config.vit import ConvStem, ResNetStem
from vitrail.presets.base import Preset

STRUCTURE = {
    "patch_size", "stem", "width", "depth", "mlp_dim", "heads", "widths", "depths", "mlp_dims", "stem_width",
    "head_width", "head_dim", "mbconv_before_s3", "moe_layers", "experts",
}  # fmt: skip
"""What makes a model's size, in any family; all else is the run's to choose."""
MAIN = {
    "optim.name", "optim.lr", "optim.weight-decay", "optim.schedule", "optim.warmup-steps", "optim.clip-norm",
    "loop.batch-size", "loop.epochs", "loop.steps",
}  # fmt: skip
"""What a recipe is told by, whether or not it is our default."""

WORDS: dict[type, str] = {ConvStem: "convolutions", ResNetStem: "a ResNet"}
"""Parts of a model that no one flag sets."""


def sentence(text: str) -> str:
    """Return a text with a capital in front and a full stop behind."""
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def told(preset: Preset) -> dict[str, str]:
    """Return what is known of a preset, a sentence or more under each heading that has any."""
    texts = {
        "Source": preset.source,
        "Published": preset.published,
        "Measured": measured(preset),
        "Cost": preset.cost,
        "Departs from its source": preset.departs,
        "On the leaderboard": preset.alias or "",
    }
    return {heading: sentence(text) for heading, text in texts.items() if text}


def measured(preset: Preset) -> str:
    """Return what we measured, without the word for it."""
    return preset.measured.removeprefix("Measured: ")


def command(name: str, preset: Preset) -> str:
    """Return how to run a preset; words in capitals are the user's to fill in."""
    config = preset.config
    wanted = {
        "--data PATH": config.data is None,
        "--init WEIGHTS": preset.needs_init and config.init is None,
        "--input.unlabelled PATH": isinstance(config.recipe, MetaPseudoLabelsConfig)
        and config.input.labelled is None
        and config.input.unlabelled is None,
        "--recipe.teacher MODEL": isinstance(config.recipe, DistillationConfig) and config.recipe.teacher is None,
    }
    return " ".join(["vitrail train", name, *(flag for flag, is_wanted in wanted.items() if is_wanted)])


def model_name(config: ModelConfig) -> str | None:
    """Return the published size that a model is a variant of (`vitrail models`), None where it is of none."""

    def differing(size: ModelConfig) -> set[str]:
        return {field.name for field in fields(config) if getattr(size, field.name) != getattr(config, field.name)}

    same = {name: differing(size) for name, size in MODELS.items() if type(size) is type(config)}
    same = {name: other for name, other in same.items() if not other & STRUCTURE}
    return min(same, key=lambda name: len(same[name]), default=None)


def settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the flags of a run, with their values: what is not as it would be without being told, and `MAIN`.

    Without being told, a model is as its published size has it, and a recipe as it is by itself. A switch has no
    value. For a part of a model that no one flag sets, words take the flag's place: `model stem`.
    """
    name = model_name(config.model)
    if name is not None:
        yield "--model", name
    yield from _changes(config.model, type(config.model)() if name is None else MODELS[name], "model.")
    yield "--recipe", next(name for name, kind in RECIPES.items() if type(config.recipe) is kind)
    yield from _changes(config.recipe, type(config.recipe)(), "recipe.")
    default = RunConfig()
    rest = replace(config, model=default.model, recipe=default.recipe)
    if rest.loop.steps is not None:  # they rule, whatever the epochs are
        rest = replace(rest, loop=replace(rest.loop, epochs=None))
    yield from _changes(rest, default, "")


def _changes(config: Any, default: Any, where: str) -> Iterator[tuple[str, str]]:
    for field in fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        flag = f"{where}{field.name.replace('_', '-')}"
        if is_dataclass(value) and type(value) is type(usual):
            yield from _changes(value, usual, f"{flag}.")
        elif value is None if flag in MAIN else value == usual:
            continue
        elif is_dataclass(value):
            parts = ", ".join(f"{part.name} {_text(getattr(value, part.name))}" for part in fields(value))
            yield flag.replace(".", " "), f"{WORDS.get(type(value), type(value).__name__)} with {parts}"
        elif isinstance(value, bool):
            yield f"--{flag}" if value else f"--{where}no-{field.name.replace('_', '-')}", ""
        else:
            yield f"--{flag}", _text(value)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, cast(tuple[Any, ...], value)))
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.4g}"
    return str(value)
