"""A trained model on one page: `write_report` makes a single HTML file that needs nothing beside it.

The page has no script and loads nothing; its content security policy says so. Every name that comes from outside
(classes, files, settings) is escaped, by the template engine in the page and by the XML writer in the charts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.config.run import RunConfig
from vitrail.data.base import Source
from vitrail.metrics import Evaluation
from vitrail.models import ImageModel
from vitrail.report.attention import attention_section
from vitrail.report.comparison import Comparison, comparison_section
from vitrail.report.page import write_page
from vitrail.report.pretraining import (
    RestoredPicture,
    pretraining_data_section,
    pretraining_summary,
    restored_section,
)
from vitrail.report.sections import (
    answers_section,
    calibration_section,
    classes_section,
    confusion_section,
    data_section,
    risk_section,
    summary,
)
from vitrail.report.training import configuration_section, curves_section


@dataclass(frozen=True)
class RunRecord:
    """What the page tells of the run that made the model."""

    config: RunConfig
    """Settings of the run."""
    metrics: list[dict[str, Any]]
    """Rows of `metrics.jsonl`: training rows with `step`, `loss`, `lr`; evaluation rows with `step`, `val`."""
    seconds: float
    """Time spent in training."""
    environment: Mapping[str, object]
    """Versions, device, command and so on, shown as they are."""
    data: Mapping[str, object]
    """Facts of the training data: `fingerprint`, `classes`, `train`, `val`, `test`."""


def write_report(
    path: str | Path,
    *,
    title: str,
    evaluation: Evaluation,
    source: Source,
    model: ImageModel,
    run: RunRecord | None = None,
    comparison: Comparison | None = None,
) -> None:
    """Write one self-contained HTML page about a model and its answers. Sections that do not apply are left out.

    Args:
        path: The file to write; a file that is there is replaced in one step.
        title: Heading of the page.
        evaluation: The model's answers.
        source: The pictures that were evaluated; some are shown.
        model: The model; put into evaluation mode.
        run: How it was trained.
        comparison: What other methods reached on the same pictures.

    Raises:
        UserError: When a picture that was evaluated can no longer be read.
    """
    model.eval()
    metrics = evaluation.metrics()
    sections = {
        "summary": summary(evaluation, metrics, model, run.seconds if run else None),
        "comparison": comparison_section(metrics, len(evaluation), comparison) if comparison else None,
        "curves": curves_section(run.config, run.metrics) if run else None,
        "restored": None,
        "confusion": confusion_section(evaluation),
        "classes": classes_section(evaluation),
        "calibration": calibration_section(evaluation, metrics),
        "risk": risk_section(evaluation),
        "answers": answers_section(evaluation, source, model),
        "attention": attention_section(evaluation, source, model),
        "data": data_section(evaluation, source, run.data if run else {}),
        "configuration": configuration_section(run.config, model.config) if run else None,
        "environment": dict(run.environment) if run else None,
    }
    write_page(Path(path), "page.html.jinja", title=title, **sections)


def write_pretraining_report(
    path: str | Path,
    *,
    title: str,
    metrics: Mapping[str, float],
    model: ImageModel,
    run: RunRecord,
    restored: Sequence[RestoredPicture],
) -> None:
    """Write one self-contained HTML page about a model that was pre-trained without labels, and has no classifier.

    Args:
        path: The file to write; a file that is there is replaced in one step.
        title: Heading of the page.
        metrics: Of the best validation: `masked_loss`.
        model: The model.
        run: How it was trained.
        restored: Pictures that it filled in.
    """
    absent = dict.fromkeys(("comparison", "confusion", "classes", "calibration", "risk", "attention"))
    sections = {
        "summary": pretraining_summary(metrics, model, run.data, run.seconds),
        "curves": curves_section(run.config, run.metrics),
        "restored": restored_section(restored, run.config.recipe),
        "answers": {"wrong": [], "right": []},
        "data": pretraining_data_section(run.data),
        "configuration": configuration_section(run.config, model.config),
        "environment": dict(run.environment),
    }
    write_page(Path(path), "page.html.jinja", title=title, **absent, **sections)
