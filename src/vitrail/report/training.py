"""The page's sections about the run: learning curves and settings."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitrail.config.codec import to_json
from vitrail.config.model import ModelConfig
from vitrail.config.run import RunConfig
from vitrail.report.charts import Series, line_chart

ACCURACY = {"top1": "Top-1 accuracy", "mAP": "Mean average precision"}


def curves_section(config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return charts of loss, validation accuracy and learning rate over the updates; None without rows."""
    trained = [row for row in rows if "loss" in row]
    validated = [row for row in rows if "val" in row]
    charts = []
    losses = [
        Series("training", _points((row["step"], row["loss"]) for row in trained)),
        Series("validation", _points((row["step"], _validation_loss(row["val"])) for row in validated)),
    ]
    losses = [series for series in losses if series.points]
    if losses:
        charts.append(
            ("Loss", line_chart(losses, label="Loss over the updates.", x_label="updates"), _loss_note(config))
        )
    for key, name in ACCURACY.items():
        points = _points((row["step"], row["val"].get(key)) for row in validated)
        if points:
            chart = line_chart(
                [Series("validation", points)], label=f"{name} over the updates.", x_label="updates", percent=True
            )
            best_step, best = max(points, key=lambda point: point[1])
            note = f"On the validation pictures, higher is better. Best: {best:.1%} after {best_step:,} updates."
            charts.append((name, chart, note))
    rates = _points((row["step"], row.get("lr")) for row in trained)
    if rates:
        chart = line_chart([Series("", rates)], label="Learning rate over the updates.", x_label="updates")
        charts.append(("Learning rate", chart, "Size of the steps that the optimizer takes."))
    return {"charts": charts} if charts else None


def configuration_section(config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults, and all of them as JSON.

    The model is shown as it was built: the data decide its classes, and weights to start from its sizes.
    """
    settings = to_json(config) | {"model": to_json(model)}
    defaults = _flat(to_json(RunConfig()) | {"model": to_json(type(model)())})
    changed = [
        (key, _shown(value), _shown(defaults[key]) if key in defaults else "")
        for key, value in _flat(settings).items()
        if key not in defaults or defaults[key] != value
    ]
    return {"changed": changed, "json": json.dumps(settings, indent=2, ensure_ascii=False)}


def _points(pairs: Iterable[tuple[int, float | None]]) -> list[tuple[int, float]]:
    """Return the points that are numbers: a metric may be undefined, a diverged run may have logged NaN."""
    return [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]


def _validation_loss(metrics: Mapping[str, float]) -> float:
    return metrics["nll"] if "nll" in metrics else metrics["masked_loss"]  # of a learner without a classifier


def _loss_note(config: RunConfig) -> str:
    note = "Lower is better. Validation should fall along with training; when it turns upwards, the model overfits."
    augment, recipe = config.augment, config.recipe
    causes = [
        name
        for name, on in (
            ("augmentation", augment.crop != "none" or augment.policy != "none"),
            ("mixed pictures", augment.mixup or augment.cutmix),
            ("label smoothing", getattr(recipe, "label_smoothing", 0.0)),
        )
        if on
    ]
    return f"{note} Training loss includes {' and '.join(causes)}, so it may lie higher." if causes else note


def _flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{where}{key}.")
        elif key != "type":
            flat[f"{where}{key}"] = value
    return flat


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
