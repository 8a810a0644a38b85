"""What run folders say, read side by side. Nothing is computed again, so a run that is still going can be looked at."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vitrail.checkpoints.assemble import empty_model
from vitrail.checkpoints.folder import read_config
from vitrail.checkpoints.storage import standing
from vitrail.config.codec import from_json, to_json
from vitrail.config.model import ModelConfig, list_models, model_config
from vitrail.config.run import RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.metrics import judged_by, score
from vitrail.training.folder import RunFolder

Points = list[tuple[int, float]]

# What may vary while a model is still the published size: the data and the training decide these.
_NOT_SIZE = ("image_size", "channels", "num_classes", "dropout", "drop_path", "head_bias")
# Where a run lies and whether it was continued decide nothing.
_NOT_SETTINGS = ("out", "resume")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run folder says."""

    name: str
    """The folder's name; its path where two folders have the same name."""
    folder: str
    model: str
    """Published name or main sizes, and the picture size."""
    parameters: int | None
    """Number of parameters; None while a run that began from other weights has not saved a model."""
    step: int
    """Updates made, as far as the log tells."""
    steps: int
    """Updates planned."""
    finished: bool
    """Whether the run came to its end; with patience that may be before the last planned update."""
    metric: str | None
    """What validation is judged by: `top1`, or `mAP` where pictures have several labels; None before the first."""
    val: dict[str, float] | None
    """Metrics of the best validation."""
    val_step: int | None
    """Updates made at the best validation."""
    split: str | None
    """Part of the data that the final evaluation used."""
    evaluation: dict[str, float] | None
    """Metrics of the final evaluation of the best model."""
    seconds: float
    """Time spent on updates, without evaluations."""
    pictures_per_second: float | None
    """Training pictures over that time."""
    data: dict[str, Any]
    """Fingerprint of the training pictures, and the number of classes and pictures."""
    settings: dict[str, Any]
    """All resolved settings under dotted names."""
    loss: Points
    """Step and training loss."""
    score: Points
    """Step and validation `metric`."""


@dataclass(frozen=True)
class Comparison:
    """Runs, the best validation first, and how they differ."""

    runs: tuple[Run, ...]
    differences: dict[str, list[Any]]
    """Settings that are not the same in all runs: one value per run, None where a run has no such setting."""

    @property
    def same_data(self) -> bool:
        """Whether all runs learned from the same pictures and labels."""
        return len({run.data["fingerprint"] for run in self.runs}) == 1

    def to_json(self) -> dict[str, Any]:
        """Return everything as dicts, lists and plain values."""
        return {
            "same_data": self.same_data,
            "runs": [asdict(run) for run in self.runs],
            "differences": self.differences,
        }


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Return what run folders say, side by side; the same folder given twice counts once.

    Runs are ordered by the best validation (accuracy or mAP, then a lower loss), never by the test part, which is not
    there to choose by. Runs without validation come last.

    Raises:
        UserError: When a folder is no run folder, or a file of it is damaged.
    """
    folders = list({Path(path).resolve(): Path(path) for path in runs}.values())
    if not folders:
        raise UserError("no runs to compare: name run folders, such as runs/a runs/b.")
    names = [folder.resolve().name for folder in folders]
    found = [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
    found.sort(key=lambda run: score(run.val) if run.val else (-1.0, 0.0), reverse=True)
    keys = dict.fromkeys(key for run in found for key in run.settings)
    columns = {key: [run.settings.get(key) for run in found] for key in keys}
    differing = {key: values for key, values in columns.items() if any(value != values[0] for value in values)}
    return Comparison(tuple(found), differing)


def read_run(folder: Path, name: str) -> Run:
    """Return what one run folder says.

    Raises:
        UserError: When it is no run folder, or a file of it is damaged.
    """
    document = _read_document(folder)
    config = _parsed(RunConfig, document["resolved"], folder / "config.json")
    model = _trained_model(folder, config, document["data"]["classes"])
    finished = (folder / "last" / "config.json").is_file()
    rows = _read_log(folder / "metrics.jsonl", _check_metrics, needed=finished)
    timing = _read_log(folder / "timing.jsonl", _check_timing, needed=finished)
    validations = [row for row in rows if "val" in row]
    best = max(validations, key=lambda row: score(row["val"]), default=None)
    metric = None if best is None else judged_by(best["val"])
    split, evaluation = _read_evaluation(folder / "evaluation.json")
    seconds = sum((row["seconds"] for row in timing), 0.0)
    pictures = sum(row["seconds"] * row["pictures_per_second"] for row in timing)
    return Run(
        name=name,
        folder=str(folder),
        model=_describe(model or config.model),
        parameters=None if model is None else sum(p.numel() for p in empty_model(model).parameters()),
        step=max((row["step"] for row in rows), default=0),
        steps=config.loop.steps or 0,
        finished=finished,
        metric=metric,
        val=None if best is None else best["val"],
        val_step=None if best is None else best["step"],
        split=split,
        evaluation=evaluation,
        seconds=round(seconds, 3),
        pictures_per_second=round(pictures / seconds, 2) if seconds else None,
        data=document["data"],
        settings=_dotted(to_json(replace(config, model=model or config.model))),
        loss=[(row["step"], row["loss"]) for row in rows if "loss" in row],
        score=[(row["step"], row["val"][metric]) for row in validations] if metric else [],
    )


def _read_document(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name run folders, as `vitrail train` leaves them.")
    file = folder / "config.json"
    document = RunFolder(folder, writes=False).stored()
    if document is None:
        raise UserError(f"{folder} is no run folder: it has no config.json.")
    if "resolved" not in document:
        raise UserError(
            f"{folder} is no run folder: its config.json has no settings of a run. Name the folder above it."
        )
    data = document.get("data")
    if not isinstance(data, dict) or not {"fingerprint", "classes", "train"} <= data.keys():
        raise UserError(f"{file} is damaged: what it says of the data is incomplete. Leave this run out.")
    return document


def _parsed(kind: object, value: object, file: Path) -> Any:
    try:
        return from_json(kind, value)
    except UserError as problem:
        raise UserError(f"{file}: {problem}") from problem


def _trained_model(folder: Path, config: RunConfig, classes: int) -> ModelConfig | None:
    """Return the model that the run trains: data decide its classes, and `init` its sizes. None: not known yet."""
    best = standing(folder / "best")
    if best.is_dir():
        return _parsed(ModelConfig, read_config(best)["model"], best / "config.json")
    return None if config.init else replace(config.model, num_classes=classes)


def _read_log(file: Path, check: Callable[[dict[str, Any]], object], *, needed: bool) -> list[dict[str, Any]]:
    """Return the whole lines of a log; one that is just being written has no line end yet and is left out."""
    if not file.is_file():
        if needed:
            raise UserError(f"{file} is missing, though the run is finished; restore it from a copy.")
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            check(row)
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{file}, line {number} is damaged ({problem}); restore it from a copy.") from problem
        rows.append(row)
    return rows


def _check_metrics(row: dict[str, Any]) -> float:
    return row["step"] + (score(row["val"])[0] if "val" in row else row["loss"])


def _check_timing(row: dict[str, Any]) -> float:
    return row["seconds"] * row["pictures_per_second"]


def _read_evaluation(file: Path) -> tuple[str | None, dict[str, float] | None]:
    """Return the part and metrics of the final evaluation, where there has been one."""
    if not file.is_file():
        return None, None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        score(document["metrics"])
        return document["split"], document["metrics"]
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{file} is damaged ({problem}); restore it from a copy, or remove it.") from problem


def _describe(config: ModelConfig) -> str:
    """Return a model's published name, or its main sizes where it has none, and the size of its pictures."""
    size = f"{config.image_size[0]} x {config.image_size[1]} px"
    for name in list_models():
        if _size_only(model_config(name)) == _size_only(config):
            return f"{name} at {size}"
    family = type(config).__name__.removesuffix("Config")
    if isinstance(config, ViTConfig):
        patch = "x".join(map(str, config.cell))
        return f"{family} {patch}, width {config.width}, depth {config.depth}, at {size}"
    return f"{family} of no published size, at {size}"


def _size_only(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in to_json(config).items() if key not in _NOT_SIZE}


def _dotted(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _dotted(value, f"{where}{key}.")
        elif where or key not in _NOT_SETTINGS:
            flat[f"{where}{key}"] = value
    return flat
