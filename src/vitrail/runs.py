"""A whole run: train, then evaluate what came out, and show it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.checkpoints import load_model
from vitrail.checkpoints.storage import write_file
from vitrail.config.codec import from_json
from vitrail.config.run import RunConfig
from vitrail.data.base import Splits
from vitrail.errors import UserError
from vitrail.evaluation import predict_logits
from vitrail.metrics import Evaluation
from vitrail.parallel import pick_device, rank
from vitrail.report import RunRecord, write_report
from vitrail.training import Callback, RunResult, run_training
from vitrail.training.folder import RunFolder
from vitrail.training.setup import open_run_data

log = logging.getLogger("vitrail")


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Train as `config` says, then evaluate `best/` and write `evaluation.json` and `report.html`.

    Args:
        config: The run; `data` and `out` must be set.
        callbacks: Told of the run's course.

    Raises:
        UserError: For mistakes in settings or data.
        Interrupted: When a signal stopped the run; its state is saved.
    """
    result = run_training(config, callbacks)
    if rank() == 0:
        report_run(result.folder)
    return result


def report_run(
    path: str | Path, *, data: Splits | None = None, baseline: dict[str, Any] | None = None
) -> tuple[str, Evaluation]:
    """Evaluate a run's best model on its test part (validation where there is none) and write the report.

    Args:
        path: The run folder.
        data: The run's data, where it is open already.
        baseline: A simpler method's result to show beside it: its `name` and metrics.

    Returns:
        The name of the part and the evaluation.

    Raises:
        UserError: When this is no run folder, or its data has gone.
    """
    folder = RunFolder(Path(path), writes=True)
    document = folder.stored()
    if document is None:
        raise UserError(f"{path} is not a run folder: it has no config.json.")
    config = from_json(RunConfig, document["resolved"], "config.json")
    model = load_model(folder.best)
    split, source = (data or open_run_data(config)).for_evaluation()
    evaluation = predict_logits(
        model,
        source,
        workers=config.input.workers,
        device=pick_device(),
        max_broken=config.input.max_broken,
    )
    timing = folder.rows("timing.jsonl")
    record = RunRecord(
        config=config,
        metrics=folder.rows(),
        seconds=sum(row["seconds"] for row in timing),
        environment=document["environment"],
        data=document["data"],
    )
    result = {
        "split": split,
        "metrics": evaluation.metrics(),
        "per_class": evaluation.per_class(),
        "baseline": baseline,
    }
    write_file(folder.path / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())
    write_report(
        folder.path / "report.html",
        title=f"{folder.path.resolve().name}: {split} pictures",
        evaluation=evaluation,
        source=source,
        model=model,
        run=record,
        baseline=baseline,
    )
    return split, evaluation
