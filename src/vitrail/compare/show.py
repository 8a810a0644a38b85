"""A comparison on a terminal, and as one HTML page with curves."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vitrail.checkpoints.storage import write_file
from vitrail.compare.runs import Comparison, Points, Run
from vitrail.metrics import judged_by
from vitrail.report.charts import Series, line_chart
from vitrail.report.comparison import NAMES
from vitrail.report.sections import duration

LINES = 6
"""Runs in a chart: more lines than the page's style has colours for could not be told apart."""
HEADS = ("updates", "validation, best", "final evaluation", "time", "pictures/s")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Show results, the settings that differ, and a warning when the runs saw different data."""
    results = Table("run", *HEADS, title="Results, best validation first")
    for run in comparison.runs:
        title = Text.assemble((run.name, "bold"), (f"\n{run.model}\n{_parameters(run)}", "dim"))
        results.add_row(title, *map(Text, _cells(run)))
    console.print(results)
    if comparison.differences:
        settings = Table("setting", *(escape(run.name) for run in comparison.runs), title="Settings that differ")
        for key, values in comparison.differences.items():
            settings.add_row(key, *(Text(_value(value)) for value in values))
        console.print(settings)
    elif len(comparison.runs) > 1:
        console.print("All settings are the same.")
    if (warning := data_warning(comparison)) is not None:
        console.print(Text(warning, style="bold yellow"))


def write_page(comparison: Comparison, path: str | Path) -> None:
    """Write one self-contained HTML page: results, curves, and the settings that differ.

    Raises:
        UserError: When the file cannot be written.
    """
    runs = [
        {
            "name": run.name,
            "folder": run.folder,
            "model": f"{run.model}, {_parameters(run)}",
            "cells": _cells(run),
        }
        for run in comparison.runs
    ]
    settings = [(key, [_value(value) for value in values]) for key, values in comparison.differences.items()]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("vitrail.compare") / "page.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        style=(files("vitrail.report") / "style.css").read_text(encoding="utf-8"),
        heads=HEADS,
        runs=runs,
        warning=data_warning(comparison),
        charts=list(_charts(comparison.runs[:LINES])),
        left_out=max(0, len(runs) - LINES),
        settings=settings,
    )
    # A folder's name that is not valid UTF-8 carries half characters, which no file can hold.
    write_file(Path(path), page.encode("utf-8", errors="replace"))


def data_warning(comparison: Comparison) -> str | None:
    """Return a line that says which runs saw which data, or None when all saw the same."""
    if comparison.same_data:
        return None
    groups: dict[str, list[Run]] = {}
    for run in comparison.runs:
        groups.setdefault(run.data["fingerprint"], []).append(run)
    parts = [
        f"{', '.join(run.name for run in runs)} ({runs[0].data['train']:,} pictures, hash {fingerprint[:8]})"
        for fingerprint, runs in groups.items()
    ]
    return f"these runs saw different data, so their results do not compare: {'; '.join(parts)}."


def _charts(runs: tuple[Run, ...]) -> Iterator[tuple[str, str]]:
    """Yield titles and charts with a line per run, called by its place in the results."""
    if any(run.loss for run in runs):
        lines = [_line(place, run.loss) for place, run in enumerate(runs, start=1)]
        yield "Training loss", line_chart(lines, label="Training loss over the updates.", x_label="updates")
    for metric in dict.fromkeys(run.metric for run in runs if run.metric):
        # A run that is judged by another metric keeps its place, and so its colour, without a line.
        lines = [_line(place, run.score if run.metric == metric else []) for place, run in enumerate(runs, start=1)]
        name = f"{NAMES.get(metric, 'Loss')} on validation pictures"
        yield name, line_chart(lines, label=f"{name} over the updates.", x_label="updates", percent=metric in NAMES)


def _line(place: int, points: Points) -> Series:
    return Series(str(place), [(float(step), value) for step, value in points])


def _cells(run: Run) -> list[str]:
    """Return a run's line of results, as `HEADS` calls them; empty where there is nothing yet."""
    rate = "" if run.pictures_per_second is None else f"{run.pictures_per_second:,.0f}"
    val = "" if run.val is None else f"{_headline(run.val)}, step {run.val_step:,}"
    final = "" if run.evaluation is None else f"{_headline(run.evaluation)} ({run.split})"
    return [_steps(run), val, final, duration(run.seconds), rate]


def _steps(run: Run) -> str:
    """Return how far a run came."""
    if run.finished and run.step < run.steps:
        return f"{run.step:,}/{run.steps:,}, stopped early"
    return f"{run.step:,}/{run.steps:,}" + ("" if run.finished else ", not finished")


def _headline(metrics: dict[str, float]) -> str:
    name = judged_by(metrics)
    if "nll" not in metrics:  # a learner without a classifier
        return f"{name} {metrics[name]:.4f}"
    return f"{name} {metrics[name]:.1%}, nll {metrics['nll']:.3f}"


def _parameters(run: Run) -> str:
    return "parameters not known yet" if run.parameters is None else f"{run.parameters:,} parameters"


def _value(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
