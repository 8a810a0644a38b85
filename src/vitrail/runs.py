"""A whole run: train, then evaluate what came out, and show it."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitrail.checkpoints import load_model
from vitrail.checkpoints.resume import load_latest
from vitrail.checkpoints.storage import write_file
from vitrail.config.codec import from_json
from vitrail.config.masked import MaskedConfig
from vitrail.config.run import RunConfig
from vitrail.data.base import Splits
from vitrail.data.view import denormalise, evaluation_view
from vitrail.errors import BrokenPicture, UserError
from vitrail.evaluation import predict_logits
from vitrail.metrics import Evaluation, score
from vitrail.parallel import pick_device, rank
from vitrail.recipes.masked import MaskedLearner
from vitrail.report import Comparison, RestoredPicture, RunRecord, write_pretraining_report, write_report
from vitrail.training import Callback, RunResult, run_training
from vitrail.training.folder import RunFolder
from vitrail.training.setup import Parts, assemble, open_run_data

log = logging.getLogger("vitrail")
RESTORED = 12  # pictures that a report of masked pre-training shows


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Train as `config` says, then evaluate `best/` and write `evaluation.json` and `report.html`.

    A model that was pre-trained without labels has no answers to evaluate: its best validation stands for them.

    Args:
        config: The run; `data` and `out` must be set.
        callbacks: Told of the run's course.

    Raises:
        UserError: For mistakes in settings or data.
        Interrupted: When a signal stopped the run; its state is saved.
    """
    result = run_training(config, callbacks)
    if rank() == 0:
        if isinstance(config.recipe, MaskedConfig):
            report_pretraining(result.folder)
        else:
            report_run(result.folder)
    return result


def report_run(
    path: str | Path, *, data: Splits | None = None, comparison: Comparison | None = None
) -> tuple[str, Evaluation]:
    """Evaluate a run's best model on its test part (validation where there is none) and write the report.

    Args:
        path: The run folder.
        data: The run's data, where it is open already.
        comparison: What other methods reached on the same pictures, to show beside it.

    Returns:
        The name of the part and the evaluation.

    Raises:
        UserError: When this is no run folder, or its data has gone.
    """
    folder, document, config = _open_run(path)
    model = load_model(folder.best)
    split, source = (data or open_run_data(config)).for_evaluation()
    evaluation = predict_logits(
        model,
        source,
        workers=config.input.workers,
        device=pick_device(),
        max_broken=config.input.max_broken,
    )
    result = {
        "split": split,
        "metrics": evaluation.metrics(),
        "per_class": evaluation.per_class(),
        "others": [dict(other) for other in comparison.others] if comparison else [],
    }
    write_file(folder.path / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())
    write_report(
        folder.path / "report.html",
        title=f"{folder.path.resolve().name}: {split} pictures",
        evaluation=evaluation,
        source=source,
        model=model,
        run=_record(folder, document, config),
        comparison=comparison,
    )
    return split, evaluation


def report_pretraining(path: str | Path) -> None:
    """Write the report of a masked run: its curves, and validation pictures that the model fills in.

    Args:
        path: The run folder.

    Raises:
        UserError: When this is no run folder, or its data or checkpoints have gone.
    """
    folder, document, config = _open_run(path)
    found = load_latest(folder.checkpoints)
    if found is None:
        raise UserError(f"{folder.path} has no checkpoint, so there is no decoder to fill pictures in with.")
    parts = assemble(config, open_run_data(config), pick_device(), "fp32")
    parts.learner.load_state_dict(found[0]["learner"])
    run = _record(folder, document, config)
    best = max((row["val"] for row in run.metrics if "val" in row), key=score)
    result = {"split": "val", "metrics": best, "per_class": [], "others": []}
    write_file(folder.path / "evaluation.json", (json.dumps(result, indent=1) + "\n").encode())
    write_pretraining_report(
        folder.path / "report.html",
        title=f"{folder.path.resolve().name}: masked pre-training",
        metrics=best,
        model=load_model(folder.best),
        run=run,
        restored=_restored(parts),
    )


def _restored(parts: Parts) -> list[RestoredPicture]:
    """Return pictures of the validation part as they are, with patches hidden, and filled in."""
    learner, source = parts.learner, parts.data.val
    assert isinstance(learner, MaskedLearner) and source is not None  # pre-training data has a part set aside
    count, shown = min(RESTORED, len(source)), []
    with learner.shipped_weights():
        learner.models.eval()
        for index in (i * len(source) // count for i in range(count)):
            try:
                picture = source.load(index)
            except BrokenPicture:
                continue
            view = evaluation_view(picture, learner.model.preprocessing)[None].to(parts.device)
            levels = (denormalise(view, learner.model.preprocessing), *learner.restore(view))
            pixels = (each[0].clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy() for each in levels)
            shown.append(RestoredPicture(source.name(index), *pixels))
    return shown


def _open_run(path: str | Path) -> tuple[RunFolder, dict[str, Any], RunConfig]:
    folder = RunFolder(Path(path), writes=True)
    document = folder.stored()
    if document is None:
        raise UserError(f"{path} is not a run folder: it has no config.json.")
    return folder, document, from_json(RunConfig, document["resolved"], "config.json")


def _record(folder: RunFolder, document: dict[str, Any], config: RunConfig) -> RunRecord:
    return RunRecord(
        config=config,
        metrics=folder.rows(),
        seconds=sum(row["seconds"] for row in folder.rows("timing.jsonl")),
        environment=document["environment"],
        data=document["data"],
    )
