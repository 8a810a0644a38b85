"""The page's sections about results: what each shows, as plain values for the template. None: it does not apply."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vitrail.data.base import Picture, Source
from vitrail.data.view import view_pixels
from vitrail.errors import BrokenPicture, UserError
from vitrail.metrics import Answer, Evaluation, wilson_interval
from vitrail.models import ImageModel
from vitrail.report.charts import bar_chart, heat_map, reliability_chart, risk_chart
from vitrail.report.comparison import NAMES
from vitrail.report.figures import is_small, png_uri, thumbnail

Section = dict[str, Any]

LARGEST_MATRIX = 40  # classes; beyond, cells get too small to read
PAIRS_BESIDE_MATRIX, PAIRS_ALONE = 6, 20
ACCURACIES = (0.9, 0.95, 0.99)  # that thresholds are named for
MISTAKES, RIGHT = 18, 9  # pictures in the gallery
THUMBNAIL = 120  # pixels of a gallery picture's longer side: keeps a page of 100 classes below 3 MB


def summary(evaluation: Evaluation, metrics: Mapping[str, float], model: ImageModel, seconds: float | None) -> Section:
    """Return the headline and its cards."""
    cards = [(NAMES[key], f"{metrics[key]:.1%}", "") for key in NAMES if key in metrics]
    if evaluation.multi_label:
        sentence = f"{len(evaluation):,} pictures that may carry several of {len(evaluation.labels):,} labels."
    else:
        low, high = wilson_interval(metrics["top1"], len(evaluation))
        cards[0] = (*cards[0][:2], f"95% interval {low:.1%} to {high:.1%}")
        right = round(metrics["top1"] * len(evaluation))
        sentence = f"{right:,} of {len(evaluation):,} pictures of {len(evaluation.labels):,} classes named right."
        after = metrics.get("ece_calibrated")
        detail = "" if after is None else f"{after:.1%} with temperature {metrics['temperature']:.2f}"
        cards.append(("Calibration error", f"{metrics['ece']:.1%}", detail))
    cards.append(("Pictures", f"{len(evaluation):,}", _broken(evaluation)))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cards.append(("Parameters", *short_number(parameters)))
    if seconds is not None:
        cards.append(("Training time", duration(seconds), ""))
    return {"sentence": sentence, "cards": cards}


def confusion_section(evaluation: Evaluation) -> Section | None:
    """Return the confusion matrix, unless classes are too many for it, and the most frequent confusions."""
    if evaluation.multi_label:
        return None
    counts, names = evaluation.confusion(), evaluation.labels
    fits = len(names) <= LARGEST_MATRIX
    wrong = counts * (1 - np.eye(len(names), dtype=np.int64))
    order = np.argsort(-wrong, axis=None, kind="stable")[: PAIRS_BESIDE_MATRIX if fits else PAIRS_ALONE]
    totals = counts.sum(axis=1)
    pairs = [
        (names[i], names[j], f"{wrong[i, j]:,}", f"{wrong[i, j] / totals[i]:.1%}")
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]
    if not fits and not pairs:
        return None
    matrix = heat_map(counts, names, label=f"Confusion matrix of {len(names)} classes.") if fits else None
    return {"matrix": matrix, "pairs": pairs}


def classes_section(evaluation: Evaluation) -> Section:
    """Return the table of classes, the weakest first."""
    key = "ap" if evaluation.multi_label else "f1"
    rows: list[dict[str, Any]] = [dict(row) for row in evaluation.per_class()]
    rows.sort(key=lambda row: (row[key] is None, row[key] or 0.0, row["name"]))
    columns = ("precision", "recall", "f1", "ap") if evaluation.multi_label else ("precision", "recall", "f1")
    table = [
        {
            "name": row["name"],
            "pictures": f"{row['pictures']:,}",
            "shares": [_share(row[column]) for column in columns],
            "width": f"{100 * (row[key] or 0.0):.1f}%",
        }
        for row in rows
    ]
    heads = {"precision": "Precision", "recall": "Recall", "f1": "F1", "ap": "AP"}
    empty = sum(row["pictures"] == 0 for row in rows)
    return {"heads": [heads[column] for column in columns], "sorted_by": heads[key], "rows": table, "empty": empty}


def calibration_section(evaluation: Evaluation, metrics: Mapping[str, float]) -> Section | None:
    """Return the reliability diagram before and after temperature scaling."""
    if evaluation.multi_label or len(evaluation) < 2:
        return None
    confidence = float(evaluation.probabilities().max(axis=1).mean())
    return {
        "chart": reliability_chart(evaluation.reliability(), evaluation.calibrated().reliability()),
        "confidence": f"{confidence:.1%}",
        "accuracy": f"{metrics['top1']:.1%}",
        "before": f"{metrics['ece']:.1%}",
        "after": f"{metrics['ece_calibrated']:.1%}",
        "temperature": f"{metrics['temperature']:.2f}",
    }


def risk_section(evaluation: Evaluation) -> Section | None:
    """Return the risk-coverage curve, its area, and the thresholds that reach some accuracies."""
    if evaluation.multi_label:
        return None
    curve = evaluation.risk_coverage()
    error = curve[-1].risk
    if not error:
        return None
    marks, rows = [], []
    for accuracy in ACCURACIES:
        kept = evaluation.threshold_for(accuracy)
        if kept is None:
            rows.append((f"{accuracy:.0%}", "not reached", "", ""))
            continue
        low, high = wilson_interval(1 - kept.risk, round(kept.coverage * len(evaluation)))
        threshold = "none needed" if kept is curve[-1] else _rounded_down(kept.threshold)
        rows.append((f"{accuracy:.0%}", threshold, f"{kept.coverage:.1%}", f"{low:.1%} to {high:.1%}"))
        marks.append((f"{accuracy:.0%}", kept))
    return {
        "chart": risk_chart(curve, marks),
        "rows": rows,
        "error": f"{error:.1%}",
        "area": f"{evaluation.aurc():.3f}",
        "chance": f"{error:.3f}",
        "best": f"{error + (1 - error) * np.log1p(-error):.3f}" if error < 1 else f"{error:.3f}",
    }


def answers_section(evaluation: Evaluation, source: Source, model: ImageModel) -> Section:
    """Return galleries of the worst mistakes and of some right answers."""
    groups = {"wrong": evaluation.worst(MISTAKES), "right": evaluation.right(RIGHT)}
    return {
        kind: [shown_answer(answer, picture_of(answer, source, model)) for answer in answers]
        for kind, answers in groups.items()
    } | {"multi_label": evaluation.multi_label}


def shown_answer(answer: Answer, pixels: Picture) -> Section:
    """Return a picture with the model's answer, for the template's gallery."""
    return {
        "uri": png_uri(thumbnail(pixels, THUMBNAIL)),
        "crisp": is_small(pixels),
        "name": answer.name,
        "truth": answer.truth,
        "predicted": answer.predicted,
        "confidence": f"{answer.confidence:.0%}",
    }


def picture_of(answer: Answer, source: Source, model: ImageModel) -> Picture:
    """Return what the model saw of a picture.

    Raises:
        UserError: When it cannot be read any more.
    """
    try:
        return view_pixels(source.load(answer.index), model.preprocessing)
    except BrokenPicture as problem:
        raise UserError(
            f"{answer.name} could be evaluated, but not be read again for the report: {problem}."
        ) from problem


def data_section(evaluation: Evaluation, source: Source, facts: Mapping[str, object]) -> Section:
    """Return what the model was trained and measured on: sizes, hash, balance, broken pictures."""
    rows = [
        *data_rows(facts),
        ("Pictures evaluated here", f"{len(evaluation):,}"),
        ("Classes", f"{len(evaluation.labels):,}"),
        ("Hash of the pictures evaluated", source.fingerprint()),
    ]
    return {"rows": rows, "broken": evaluation.broken, **_balance(source)}


def data_rows(facts: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return what is known of the training data: the size of its parts, and its hash."""
    parts = [("Training pictures", "train"), ("Validation pictures", "val"), ("Test pictures", "test")]
    rows = [(name, f"{facts[key]:,}") for name, key in parts if facts.get(key)]
    if "fingerprint" in facts:
        rows.append(("Hash of the training data", str(facts["fingerprint"])))
    return rows


def duration(seconds: float) -> str:
    """Return a time in the two units that matter."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _balance(source: Source) -> Section:
    counts = source.class_counts().tolist()
    ordered = sorted(zip(source.classes, counts, strict=True), key=lambda item: -item[1])
    (most, high), (fewest, low) = ordered[0], ordered[-1]
    if high == low:
        return {"balance": f"Every class has {high:,} pictures.", "balance_chart": None}
    sentence = f"Pictures per class: from {low:,} ({fewest}) to {high:,} ({most})."
    return {"balance": sentence, "balance_chart": bar_chart(ordered, label=sentence)}


def _broken(evaluation: Evaluation) -> str:
    return f"{len(evaluation.broken):,} could not be read" if evaluation.broken else ""


def _rounded_down(threshold: float) -> str:
    """Return a threshold with four digits, none of the answers that it keeps being lost."""
    return f"{np.floor(1e4 * threshold) / 1e4:.4f}"


def _share(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1%}"


def short_number(count: int) -> tuple[str, str]:
    """Return a number and its detail, where the number is too long to read at a glance."""
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.3g} {unit}", f"{count:,}"
    return f"{count:,}", ""
