"""The model card: what a stranger who finds the folder, or its page on the hub, should know."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from vitrail.errors import UserError
from vitrail.models import ImageModel

PLACE = "PATH/OF/THIS/FOLDER"
"""Stands in a card for what `load_model` takes."""
_SHOWN_LABELS = 200
_SETTINGS = (
    "recipe.type",
    "data",
    "init",
    "optim.name",
    "optim.lr",
    "optim.schedule",
    "optim.weight_decay",
    "loop.batch_size",
    "loop.epochs",
    "loop.steps",
    "augment.crop",
    "augment.policy",
    "augment.mixup",
    "augment.cutmix",
    "seed",
)
"""Settings of a run that the card shows; `config.json` has them all."""
_HUB_METRICS = {
    "top1": ("accuracy", "Top-1 accuracy"),
    "macro_f1": ("f1", "Macro-F1"),
    "mAP": ("mean_average_precision", "Mean average precision"),
}
"""Metrics that the hub knows: what it calls them, and what a reader does."""

_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
"""What YAML takes for something else than text."""


def model_card(
    model: ImageModel,
    *,
    metrics: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a model folder's `README.md`: Markdown behind the YAML that the Hugging Face hub reads.

    Args:
        model: The model.
        metrics: As `save_model` takes them.
        recipe: As `save_model` takes it. Of paths in it, only the last part is shown.
        data: As `save_model` takes it.
    """
    config, view = model.config, model.preprocessing
    parameters = sum(parameter.numel() for parameter in model.parameters())
    height, width = view.image_size
    answer = "any number of labels per picture" if model.multi_label else "one label per picture"
    name = type(model).__name__
    article = "An" if name[0] in "AEIOU" else "A"
    known = {} if data is None else dict(data)
    sections = [
        f"---\n{_yaml(_front_matter(name, metrics or {}, _data_name(recipe)))}---",
        "# Image classifier",
        f"{article} {name} with {parameters:,} parameters and {config.num_classes:,} classes ({answer}).\n"
        f"It sees pictures at {height} x {width} pixels with {view.channels} channels (`{view.fit}`, "
        f"{view.interpolation}); `config.json` says exactly how they are prepared.",
        f'## Use\n```python\nimport vitrail\n\nmodel = vitrail.load_model("{PLACE}")\n'
        'print(vitrail.predict(model, ["picture.jpg"]))\n```',
        "## Results\n" + (_table("metric", metrics) if metrics else "Nothing has been measured yet."),
        "## Data\n" + (_table("fact", known) if known else "What it was trained on is not recorded here."),
        "## Recipe\n" + _recipe(recipe),
        "## Labels\n" + _labels(model),
        "## Limits\n" + _limits(model),
        "## Licence\nNone is stated here: ask whoever made the model. That of the data and of the weights it began "
        "with may bind you, too.",
    ]
    return "\n\n".join(sections) + "\n"


def card_of(text: str, place: str, license: str | None) -> str:
    """Return a card for the hub: with what `load_model` takes in its place, and the licence where one is given.

    Everything else stays as it is: a person may have edited it.

    Raises:
        UserError: When the licence is no identifier.
    """
    text = text.replace(PLACE, place)
    if license is None:
        return text
    if not re.fullmatch(r"\w[\w.-]*", license, re.ASCII):
        raise UserError(f"the hub names licences by identifiers such as apache-2.0, not {license!r}.")
    found = re.match(r"---\n(.*?)^---\n", text, re.DOTALL | re.MULTILINE)
    front, body = (found[1], text[found.end() :]) if found else ("", f"\n{text}")
    lines = [line for line in front.splitlines(keepends=True) if not line.startswith("license:")]
    stated = rf"\g<1>{license}. That of the data and of the weights it began with may bind you, too."
    body = re.sub(r"(^## Licence\n)None is stated here.*$", stated, body, flags=re.MULTILINE)
    return f"---\nlicense: {license}\n{''.join(lines)}---\n{body}"


def without_paths(value: Any) -> Any:
    """Return settings without how somebody's disk is laid out: of absolute paths only the last part."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return _last_part(value)
    return value


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _front_matter(name: str, metrics: Mapping[str, Any], data: str | None) -> dict[str, Any]:
    """Return what the hub reads of a model."""
    front: dict[str, Any] = {
        "library_name": "vitrail",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "vitrail"],
    }
    if data:
        front["datasets"] = [data]
    results = []
    for part, values in [("", metrics), *metrics.items()]:
        measured = [
            {"type": kind, "name": title, "value": round(float(values[key]), 6)}
            for key, (kind, title) in _HUB_METRICS.items()
            if isinstance(values, Mapping) and _is_finite(values.get(key))
        ]
        if measured:
            described = {"type": data or "unknown", "name": data or "unknown", **({"split": part} if part else {})}
            task = {"type": "image-classification", "name": "Image classification"}
            results.append({"task": task, "dataset": described, "metrics": measured})
    if results:
        front["metrics"] = list(dict.fromkeys(metric["type"] for result in results for metric in result["metrics"]))
        front["model-index"] = [{"name": name, "results": results}]
    return front


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(float(value))


def _yaml(value: Mapping[str, Any], indent: int = 0) -> str:
    """Return plain values as YAML; text is quoted as in JSON, which YAML reads."""
    lines = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            lines.append(f"{' ' * indent}{key}:\n{_yaml(item, indent + 2)}")
        elif isinstance(item, list):
            lines.append(f"{' ' * indent}{key}:\n")
            for each in item:
                if isinstance(each, Mapping):
                    block = _yaml(each, indent + 2)
                    lines.append(f"{' ' * indent}- {block[indent + 2 :]}")
                else:
                    lines.append(f"{' ' * indent}- {_scalar(each)}\n")
        else:
            lines.append(f"{' ' * indent}{key}: {_scalar(item)}\n")
    return "".join(lines)


def _scalar(value: str | float) -> str:
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.-]*", value, re.ASCII) and value.lower() not in _WORDS
    return value if isinstance(value, str) and plain else json.dumps(value)


def _data_name(recipe: Mapping[str, Any] | None) -> str | None:
    """Return the name of the data that a run was trained on, without the way to it."""
    data = (recipe or {}).get("data")
    return _last_part(data) or None if isinstance(data, str) else None


def _recipe(recipe: Mapping[str, Any] | None) -> str:
    if not recipe:
        return "How these weights were made is not recorded here."
    values = dict(_flat(recipe))
    shown = {key: values[key] for key in _SETTINGS if values.get(key) not in (None, "", "none", 0.0)}
    if not shown:  # converted, calibrated: a few facts
        shown = values
    return _table("setting", without_paths(shown)) + "\n\nAll settings are under `recipe` in `config.json`."


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
