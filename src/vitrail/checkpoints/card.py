"""The model card: what a stranger who finds the folder should know."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vitrail.models import ImageModel

_SHOWN_LABELS = 200


def model_card(
    model: ImageModel,
    *,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a model folder's `README.md`."""
    config, view = model.config, model.preprocessing
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = view.image_size
    answer = "any number of labels per picture" if model.multi_label else "one label per picture"
    sections = [
        "---\nlibrary_name: vitrail\npipeline_tag: image-classification\n---",
        "# Image classifier",
        f"A {type(model).__name__} with {parameters:,} parameters and {config.num_classes:,} classes ({answer}).\n"
        f"It sees pictures at {height} x {width} pixels with {view.channels} channels (`{view.fit}`, "
        f"{view.interpolation}); `config.json` says exactly how they are prepared.",
        "## Use\n```python\nimport vitrail\n\n"
        'print(vitrail.predict(vitrail.load_model("PATH/OF/THIS/FOLDER"), ["picture.jpg"]))\n```',
    ]
    if metrics:
        sections.append("## Metrics\n" + _table("metric", metrics))
    if data:
        sections.append("## Training data\n" + _table("fact", data))
    if recipe:
        sections.append("## Training\nThe settings that made these weights are under `recipe` in `config.json`.")
    sections.append("## Labels\n" + _labels(model))
    sections.append("## Limits\n" + _limits(model))
    return "\n\n".join(sections) + "\n"


def _labels(model: ImageModel) -> str:
    if not model.labels:
        return "The names of the classes are not known; answers are numbers."
    shown = ", ".join(_escaped(label) for label in model.labels[:_SHOWN_LABELS])
    more = len(model.labels) - _SHOWN_LABELS
    return shown + (f", and {more:,} more in `config.json`." if more > 0 else ".")


def _limits(model: ImageModel) -> str:
    closed = "" if model.multi_label else " A picture of anything else still gets one of these labels."
    return (
        f"- The model knows the labels above and nothing else.{closed}\n"
        "- The metrics hold for pictures like those it was evaluated on; measure again on yours.\n"
        "- Its probabilities are estimates. Do not let it decide alone where a mistake can hurt somebody."
    )


def _table(kind: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {_escaped(name)} | {_escaped(_number(value))} |" for name, value in _flat(values)]
    return "\n".join([f"| {kind} | value |", "|---|---|", *rows])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield single values under dotted names; lists, as values per class, stay in `config.json`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{name}", value


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is: a class name must not become a link, a tag or a table cell."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~$])", r"\\\1", " ".join(text.split()))
