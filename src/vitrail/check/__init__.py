"""What is wrong with a data set, before training finds out."""

from pathlib import Path
from statistics import median

from vitrail.check.answers import ask_model
from vitrail.check.base import CheckReport, Finding, Item, Suspect
from vitrail.check.findings import balance, broken, making, ratio_of, same_pictures, sizes
from vitrail.check.scan import scan
from vitrail.check.show import print_report
from vitrail.check.tree import beside
from vitrail.data import FileSource, read_parts
from vitrail.models import ImageModel

__all__ = ["CheckReport", "Finding", "Item", "Suspect", "check", "print_report"]

_ORDER = ("error", "warning", "note")


def check(
    data: str | Path,
    *,
    model: ImageModel | None = None,
    trained_on: str | None = None,
    workers: int = 2,
    channels: int = 3,
) -> CheckReport:
    """Look at every picture of a data set and return what is wrong with it.

    Every picture is decoded once; only hashes are kept, so memory does not grow with the pictures' size. Pictures count
    as the same when all their pixels are; copies that were resized or compressed again are found by a model.

    Args:
        data: What `read_parts` reads: folder of pictures, CSV manifest, CIFAR or IDX folder, `.npz`.
        model: Finds labels that are probably wrong, and pictures that are almost the same. It should not have been
            trained on these pictures: see `vitrail.check.label_errors`.
        trained_on: Hash of the data that it was trained on (`data.fingerprint` of its folder's `config.json`), so that
            the report can say so.
        workers: Decoding threads.
        channels: 3 for RGB, 1 for grey: how training will read the pictures. A model decides it itself.

    Raises:
        UserError: When nothing that can be read is there, or it is no data set.
    """
    channels = channels if model is None else model.preprocessing.channels
    splits = read_parts(data, channels)
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    parts = {part: source for part, source in parts.items() if source is not None}
    classes = parts["train"].classes
    scans = list(scan(parts, channels, workers))
    readable = [picture for picture in scans if picture.problem is None]
    counts = parts["train"].class_counts()
    findings = [
        *broken(scans),
        *same_pictures(readable, classes),
        *balance(counts, classes),
        *sizes(readable),
        *making(readable, channels),
    ]
    files = {part: source for part, source in parts.items() if isinstance(source, FileSource)}
    if files and Path(data).is_dir():
        findings += beside(Path(data), files)
    if model is not None:
        findings += ask_model(model, parts, scans, trained_on=trained_on, workers=workers)
    return CheckReport(
        data=str(data),
        classes=classes,
        counts={part: tuple(map(int, source.class_counts())) for part, source in parts.items()},
        imbalance=ratio_of(counts),
        median_size=_median_size([picture.size for picture in readable]),
        findings=tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity))),
    )


def _median_size(sizes: list[tuple[int, int]]) -> tuple[int, int] | None:
    if not sizes:
        return None
    return round(median(height for height, _ in sizes)), round(median(width for _, width in sizes))
