"""The verbs that put pictures or runs before us: `evaluate`, `predict`, `check` and `compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import Positional

from vitrail.cli.console import Console, Data, Model, print_json, require_workers
from vitrail.engines import PACKAGES, EngineName, require_engine
from vitrail.errors import UserError

if TYPE_CHECKING:
    from vitrail.metrics import Evaluation


def evaluate(
    model: Model,
    data: Data,
    *,
    split: str | None = None,
    real: Path | None = None,
    calibrate: Path | None = None,
    json: bool = False,
) -> int:
    """Measure a model on labelled pictures: top-1, top-5, macro-F1, calibration, per class.

    Args:
        model: Model folder or weight file.
        data: Folder of pictures, CSV manifest, CIFAR or IDX folder, .npz, or clothing (embedded).
        split: Part to evaluate: train, val or test; default: test where there is one, else val.
        real: For ImageNet's validation pictures, the file real.json with their reassessed labels.
        calibrate: Save the model, its logits divided by the temperature that fits these pictures, to this folder;
            take pictures that you will not report on.
        json: Print one JSON document on stdout.
    """
    from vitrail import evaluation as home
    from vitrail.checkpoints import load_model, save_model
    from vitrail.parallel import pick_device

    loaded = load_model(model)
    evaluation = home.evaluate(loaded, data, split=split, device=pick_device())
    metrics = evaluation.metrics()
    if real is not None and (share := home.real_top1(evaluation, real)) is not None:
        metrics["real_top1"] = share
    if calibrate is not None:
        temperature = home.calibrate(loaded, evaluation)
        facts = {"model": model, "data": data, "split": split, "temperature": temperature}
        save_model(loaded, calibrate, recipe={"calibrated": facts})
    broken = [{"name": name, "reason": reason} for name, reason in evaluation.broken]
    if json:
        print_json(
            {**metrics, "pictures": len(evaluation.names), "per_class": evaluation.per_class(), "broken": broken}
        )
    else:
        _print_evaluation(evaluation, metrics)
    return 3 if broken else 0


def predict(
    model: Model,
    images: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE ...")]],
    *,
    top: int = 5,
    reject: Annotated[float | None, tyro.conf.arg(metavar="BELOW")] = None,
    out: Path | None = None,
    engine: EngineName | Literal["ray"] = "auto",
    workers: int = 2,
    json: bool = False,
) -> int:
    """Classify pictures: files, folders or globs.

    Args:
        model: Model folder or weight file.
        images: Pictures, folders, globs.
        top: Classes per picture.
        reject: Mark answers of a lower probability than this as rejected; the report of a run names thresholds.
        out: Write to this .csv, .jsonl or .parquet file instead of the terminal; with ray, to this folder of .parquet.
        engine: What computes the answers; auto takes the fastest that is installed, where finding it pays. ray spreads
            the pictures over a Ray cluster, and goes on where an earlier call with the same folder stopped.
        workers: Decoding threads.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import load_model
    from vitrail.parallel import pick_device
    from vitrail.prediction import predict as classify
    from vitrail.prediction import require_probability, require_suffix, write_predictions

    if top < 1:
        raise UserError(f"--top must be at least 1, not {top}.")
    require_workers(workers)
    if reject is not None:
        require_probability(reject)
    if engine == "ray":
        return _predict_on_ray(model, images, top=top, reject=reject, out=out, workers=workers, json=json)
    require_engine(engine)
    if out is not None:
        require_suffix(out)  # before the work, not after it
    device = "cpu" if engine in PACKAGES else pick_device()
    loaded = load_model(model).to(device)
    predictions = classify(loaded, images, top=top, reject=reject, workers=workers, engine=engine)
    if out is not None:
        write_predictions(predictions, out)
    if json:
        print_json([p.to_json() for p in predictions])
    elif out is None:
        # Names fold where they must: one that is cut short names no file. They are no markup either.
        table = Table(Column("picture", overflow="fold"), "classes, likeliest first")
        for p in predictions:
            answer = ", ".join(f"{label} {share:.1%}" for label, share in p.labels) or f"skipped: {p.problem}"
            table.add_row(Text(p.name), Text(f"rejected: {answer}" if p.rejected else answer))
        Console().print(table)
    return 3 if any(p.problem for p in predictions) else 0


def _predict_on_ray(
    model: str, images: tuple[str, ...], *, top: int, reject: float | None, out: Path | None, workers: int, json: bool
) -> int:
    from vitrail.checkpoints import load_model
    from vitrail.distributed_prediction import predict_distributed, require_ray

    require_ray()
    if out is None or out.suffix:
        raise UserError("--engine ray writes many files; name a folder for them with --out.")
    done = predict_distributed(load_model(model), images, out, top=top, reject=reject, workers=workers)
    if json:
        print_json({"out": str(done.out), "pictures": done.pictures, "broken": done.broken, "files": done.parts})
    else:
        print(f"{done.out}: {done.pictures:,} rows in {done.parts:,} files, {done.broken:,} of them with a problem")
    return 3 if done.broken else 0


def check(
    data: Data, *, model: str | None = None, out: Path | None = None, workers: int = 2, json: bool = False
) -> int:
    """Tell what is wrong with a data set: broken pictures, duplicates, leakage, imbalance, odd formats, wrong labels.

    Args:
        data: Folder of pictures, CSV manifest, CIFAR or IDX folder, .npz, or clothing (embedded).
        model: Model folder or weight file, best trained on other pictures of these classes: find labels that are
            probably wrong, and pictures that look almost the same.
        out: Write a page with the pictures concerned to this .html file.
        workers: Decoding threads.
        json: Print one JSON document on stdout.
    """
    from vitrail.check import check as inspect
    from vitrail.check import print_report
    from vitrail.checkpoints import load_model, training_data
    from vitrail.parallel import pick_device

    require_workers(workers)
    if out is not None:
        _require_page(out)
    loaded = None if model is None else load_model(model).to(pick_device())
    report = inspect(data, model=loaded, trained_on=training_data(model) if model else None, workers=workers)
    if out is not None:
        from vitrail.report.checking import write_check_page

        channels = 3 if loaded is None else loaded.preprocessing.channels
        write_check_page(report, out, title=f"Check of {Path(data).name}", channels=channels)
    if json:
        print_json(report.to_json())
    else:
        print_report(report, Console())
    return 0 if report.ok else 3


def compare(
    runs: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="RUN ...")]],
    *,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Compare runs: results, settings that differ, curves.

    Args:
        runs: Run folders.
        out: Write a page with the curves to this .html file.
        json: Print one JSON document on stdout.
    """
    from vitrail.compare import compare as put_side_by_side
    from vitrail.compare import print_comparison, write_page

    if out is not None:
        _require_page(out)
    comparison = put_side_by_side(runs)
    if out is not None:
        write_page(comparison, out)
    if json:
        return print_json(comparison.to_json())
    print_comparison(comparison, Console())
    return 0


def _require_page(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path}: the page is written as .html; choose this suffix.")


def _print_evaluation(evaluation: "Evaluation", metrics: dict[str, Any]) -> None:
    console = Console()
    summary = Table("measure", "value")
    for name, value in metrics.items():
        summary.add_row(name, "-" if value is None else f"{value:.4f}")
    console.print(summary)
    rows = evaluation.per_class()
    table = Table(*rows[0])
    for row in rows:
        cells = ("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*map(Text, cells))
    console.print(table)
    for name, reason in evaluation.broken:
        console.print(f"skipped {name}: {reason}", markup=False)
