"""The page's section about other methods: the same pictures, answered by a model and by what it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitrail.metrics import wilson_interval
from vitrail.report.charts import Row, interval_chart

NAMES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "mAP": "Mean average precision",
    "micro_f1": "Micro-F1",
    "macro_f1": "Macro-F1",
    "balanced_accuracy": "Balanced accuracy",
}
"""Metrics that are shown, as a reader calls them."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What other methods reached on the same pictures."""

    others: Sequence[Mapping[str, Any]]
    """One row per method: its `name`, and metrics named as those of `Evaluation.metrics`."""
    ours: str = "this model"
    """What the model of the page is called beside them."""
    lesson: str = ""
    """What the comparison is about, in a sentence or two."""


def comparison_section(metrics: Mapping[str, float], count: int, comparison: Comparison) -> dict[str, Any] | None:
    """Return the model beside other methods on `count` pictures, for every metric that all have."""
    charts = []
    for key in NAMES:
        if key in metrics and comparison.others and all(key in other for other in comparison.others):
            values = [(comparison.ours, metrics[key]), *((str(o["name"]), float(o[key])) for o in comparison.others)]
            rows = []
            for name, value in values:
                # The other metrics are not shares of pictures, so that this interval does not hold for them.
                low, high = wilson_interval(value, count) if key in ("top1", "top5") else (None, None)
                rows.append(Row(name, value, low, high))
            text = ", ".join(f"{row.name} {row.value:.1%}" for row in rows)
            charts.append((NAMES[key], interval_chart(rows, label=f"{NAMES[key]}: {text}.")))
    if not charts:
        return None
    verdicts = [
        {"name": other["name"]} | _verdict(metrics["top1"], float(other["top1"]), count)
        for other in comparison.others
        if "top1" in metrics and "top1" in other
    ]
    names = [str(other["name"]) for other in comparison.others]
    return {"names": names, "charts": charts, "verdicts": verdicts, "lesson": comparison.lesson}


def _verdict(ours: float, theirs: float, count: int) -> dict[str, str]:
    """Return both methods' mistakes, and how much fewer or more ours are."""
    mine, other = round((1 - ours) * count), round((1 - theirs) * count)
    change = "as many"
    if mine != other:
        change = f"{abs(other - mine) / max(other, 1):.0%} {'fewer' if mine < other else 'more'}"
    return {"mine": f"{mine:,}", "other": f"{other:,}", "change": change}
