"""Labels for pictures: files, folders and globs in, the likeliest classes out."""

import csv
import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vitrail.arrow import pyarrow
from vitrail.checkpoints.storage import write_file
from vitrail.data.base import Source
from vitrail.data.folders import PICTURE_SUFFIXES, FileSource
from vitrail.engines import EngineName, require_engine
from vitrail.engines.choice import engine_for
from vitrail.engines.start import Engine
from vitrail.errors import UserError
from vitrail.evaluation import ask
from vitrail.metrics import probabilities
from vitrail.models import ImageModel


@dataclass(frozen=True)
class Prediction:
    """The answer for one picture, or the reason why there is none."""

    name: str
    """Path of the picture."""
    labels: tuple[tuple[str, float], ...] = ()
    """Likeliest classes with their probability, best first."""
    problem: str = ""
    """Why the picture could not be read; empty when it could."""
    rejected: bool | None = None
    """Whether the likeliest class has a lower probability than was asked for; None where nothing was asked for."""

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        labels = [{"label": label, "probability": round(p, 6)} for label, p in self.labels]
        verdict = {} if self.rejected is None else {"rejected": self.rejected}
        return {"name": self.name, "labels": labels, **verdict, "problem": self.problem or None}


def find_pictures(patterns: Iterable[str | Path]) -> list[Path]:
    """Return the pictures that files, folders (searched in depth) and globs stand for, in order, each once.

    Raises:
        UserError: When a path does not exist or nothing is found.
    """
    found: dict[Path, None] = {}
    for pattern in map(str, patterns):
        path = Path(pattern)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"no pictures in {path}; known suffixes: {' '.join(sorted(PICTURE_SUFFIXES))}.")
            found.update(dict.fromkeys(inside))
        elif path.exists():
            found[path] = None
        elif matches := sorted(glob.glob(pattern, recursive=True)):
            found.update(dict.fromkeys(map(Path, matches)))
        else:
            raise UserError(f"no such picture, folder or glob: {pattern}.")
    if not found:
        raise UserError("no pictures to classify: name files, folders or globs after the model.")
    return list(found)


def predict(
    model: ImageModel,
    images: Sequence[str | Path] | Source,
    *,
    top: int = 5,
    reject: float | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    engine: EngineName = "auto",
) -> list[Prediction]:
    """Classify pictures, one answer each, in the order found.

    Args:
        model: A trained model; its labels and preprocessing are used.
        images: Files, folders and globs, or a source of pictures, whose labels are not looked at: `ArraySource` holds
            decoded ones.
        top: Number of classes per picture.
        reject: Mark answers whose likeliest class has a probability below this, as `Prediction.rejected`. The report of
            a run names thresholds (see `Evaluation.threshold_for`).
        batch_size: Pictures at a time, by default as many as the device is fast with; the answer does not depend on it.
        workers: Decoding threads.
        engine: What computes the answers: see `vitrail.engines`. They are the same but for rounding.

    Raises:
        UserError: When a path does not exist, the engine is not installed or cannot take the model, or `reject` is no
            probability.
    """
    require_engine(engine)
    if reject is not None:
        require_probability(reject)
    source = images if isinstance(images, Source) else open_pictures(images, model)
    answer = engine_for(model, engine, len(source))
    return classify(model, source, answer, top=top, reject=reject, batch_size=batch_size, workers=workers)


def open_pictures(images: Sequence[str | Path], model: ImageModel) -> Source:
    """Return the pictures of files, folders and globs as a source, whose labels say nothing. Errors as `predict`."""
    paths = find_pictures(images)
    targets = np.zeros(len(paths), np.int64)
    return FileSource(paths, targets, model.class_names, channels=model.preprocessing.channels)


def classify(
    model: ImageModel,
    source: Source,
    answer: Engine,
    *,
    top: int,
    reject: float | None,
    batch_size: int | None = None,
    workers: int,
) -> list[Prediction]:
    """Return the answer for each picture of a source, in its order; arguments are those of `predict`."""
    labels = model.class_names
    answers = ask(model, source, answer=answer, batch_size=batch_size, workers=workers, max_broken=1.0)
    found = {index: Prediction(source.name(index), problem=reason) for index, reason in answers.broken}
    for index, row in zip(answers.indices.tolist(), probabilities(answers.rows, model.multi_label), strict=True):
        rejected = None if reject is None else bool(row.max() < reject)
        found[index] = Prediction(source.name(index), top_classes(row, labels, top), rejected=rejected)
    return [found[index] for index in range(len(source))]


def top_classes(
    shares: Float[np.ndarray, " classes"], labels: Sequence[str], count: int
) -> tuple[tuple[str, float], ...]:
    """Return the likeliest classes with their probability, best first."""
    best = np.argsort(-shares, kind="stable")[:count]
    return tuple((str(labels[i]), float(shares[i])) for i in best)


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """Write predictions to a `.csv`, `.jsonl` or `.parquet` file, whole or not at all.

    Raises:
        UserError: For another suffix, or when Parquet's package is missing.
    """
    require_suffix(path)
    if path.suffix == ".parquet":
        write_file(path, to_parquet(predictions, _width(predictions)))
        return
    text = StringIO(newline="")
    if path.suffix == ".jsonl":
        text.writelines(json.dumps(p.to_json(), ensure_ascii=False) + "\n" for p in predictions)
    else:
        width = _width(predictions)
        columns = [f"{kind}_{i}" for i in range(1, width + 1) for kind in ("label", "probability")]
        asked = any(p.rejected is not None for p in predictions)
        writer = csv.writer(text)
        writer.writerow(["name", *columns, *["rejected"] * asked, "problem"])
        for p in predictions:
            cells = [str(cell) for label, share in p.labels for cell in (plain_cell(label), round(share, 6))]
            verdict = ["" if p.rejected is None else str(p.rejected).lower()] * asked
            writer.writerow([plain_cell(p.name), *cells, *[""] * (2 * width - len(cells)), *verdict, p.problem])
    write_file(path, text.getvalue().encode())


def to_parquet(predictions: Sequence[Prediction], width: int) -> bytes:
    """Return a Parquet file: `name`, `label_1`, `probability_1` to `width`, `rejected`, `problem`; null where empty.

    Raises:
        UserError: When pyarrow is not installed.
    """
    arrow, parquet = pyarrow("a Parquet file"), pyarrow("a Parquet file", "pyarrow.parquet")
    columns = {"name": arrow.array([p.name for p in predictions], arrow.string())}
    for place in range(width):
        found = [p.labels[place] if place < len(p.labels) else (None, None) for p in predictions]
        columns[f"label_{place + 1}"] = arrow.array([label for label, _ in found], arrow.string())
        columns[f"probability_{place + 1}"] = arrow.array([share for _, share in found], arrow.float32())
    columns["rejected"] = arrow.array([p.rejected for p in predictions], arrow.bool_())
    columns["problem"] = arrow.array([p.problem or None for p in predictions], arrow.string())
    file = BytesIO()
    parquet.write_table(arrow.table(columns), file)
    return file.getvalue()


def _width(predictions: Sequence[Prediction]) -> int:
    return max((len(p.labels) for p in predictions), default=0)


def require_suffix(path: Path) -> None:
    """Raise UserError when predictions cannot be written to a file of this name."""
    if path.suffix not in (".csv", ".jsonl", ".parquet"):
        raise UserError(f"{path}: predictions are written as .csv, .jsonl or .parquet; choose one of these suffixes.")
    if path.suffix == ".parquet":
        pyarrow(path)


def require_probability(reject: float) -> None:
    """Raise UserError when answers cannot be rejected below this."""
    if not 0 < reject <= 1:
        raise UserError(f"answers are rejected below a probability, more than 0 and at most 1, not {reject:g}.")


def plain_cell(cell: str) -> str:
    """Keep a spreadsheet from running a name that looks like a formula."""
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
