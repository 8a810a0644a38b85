"""The verbs about a model's features: `embed` and `probe`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import Positional

from vitrail.cli.console import Console, Data, Model, print_json, require_workers

if TYPE_CHECKING:
    from vitrail.probe import ProbeResult


def embed(
    model: Model,
    images: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE ...")]],
    *,
    out: Path,
    workers: int = 2,
    json: bool = False,
) -> int:
    """Write the feature vectors of pictures: files, folders or globs.

    Args:
        model: Model folder or weight file.
        images: Pictures, folders, globs.
        out: File to write: .npz, .parquet or .csv.
        workers: Decoding threads.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import load_model
    from vitrail.embedding import embed as take
    from vitrail.embedding import require_writable, write_embeddings
    from vitrail.parallel import pick_device

    require_workers(workers)
    require_writable(out)  # before the work, not after it
    embeddings = take(load_model(model), images, workers=workers, device=pick_device())
    write_embeddings(embeddings, out)
    count, width = embeddings.features.shape
    if json:
        broken = [{"name": name, "reason": reason} for name, reason in embeddings.problems]
        print_json({"out": str(out), "pictures": count, "features": width, "broken": broken})
    else:
        console = Console(soft_wrap=True)
        _print_skipped(console, embeddings.problems)
        console.print(f"{out}: {width} features of each of {count:,} pictures.", markup=False)
    return 3 if embeddings.problems else 0


def probe(model: Model, data: Data, *, features: Path | None = None, workers: int = 2, json: bool = False) -> int:
    """Tell what a model's features are worth on labelled pictures: few-shot, linear and nearest-neighbour probes.

    Args:
        model: Model folder or weight file; its head is not asked.
        data: Folder of pictures, CSV manifest, CIFAR or IDX folder, .npz, or clothing (embedded).
        features: Keep the features in this .npz file, and take them from it when it exists.
        workers: Decoding threads.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import load_model
    from vitrail.parallel import pick_device
    from vitrail.probe import probe as measure

    require_workers(workers)
    result = measure(load_model(model), data, features=features, workers=workers, device=pick_device())
    if json:
        print_json(result.to_json())
    else:
        _print_result(result)
    return 3 if result.problems else 0


def _print_result(result: "ProbeResult") -> None:
    console = Console()
    trained, measured = result.pictures["train"], result.pictures[result.part]
    console.print(
        f"{result.width} features; trained on {trained:,} pictures, measured on {measured:,} ({result.part})."
    )
    figures = [name for name in ("top1", "mAP", "micro_f1", "macro_f1") if name in result.rows[-1].metrics]
    figures = figures if result.left_out else ["top1"]
    table = Table("probe", "setting", *(Column(name, justify="right") for name in figures), "draws")
    for row in result.rows:
        cells = (f"{row.metrics[name]:.4f}" for name in figures)
        table.add_row(row.method, row.setting, *cells, " ".join(f"{draw:.3f}" for draw in row.draws))
    console.print(table)
    if result.left_out:
        console.print(result.left_out)
    _print_skipped(Console(soft_wrap=True), result.problems)


def _print_skipped(console: Console, problems: list[tuple[str, str]]) -> None:
    for name, reason in problems:
        console.print(Text(f"skipped {name}: {reason}"))
