"""Feature vectors of pictures: what the classifier's head sees, for search, clustering, and probes."""

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Float32

from vitrail.arrow import pyarrow
from vitrail.checkpoints.storage import replace_file
from vitrail.config.codec import to_json
from vitrail.data.base import Source
from vitrail.errors import UserError
from vitrail.evaluation import ask
from vitrail.models import ImageModel
from vitrail.npz import read_npz
from vitrail.parallel import Precision
from vitrail.prediction import open_pictures, plain_cell

MAX_BYTES = 256 * 2**30  # of features in a file: ten million pictures of 6,000 numbers


@dataclass(frozen=True)
class Embeddings:
    """A feature vector per picture, in the order found."""

    names: list[str]
    """Path of each picture that could be read, or its name in its source."""
    features: Float32[np.ndarray, "n d"]
    """A row per name."""
    problems: list[tuple[str, str]]
    """Pictures that could not be read, and why. They have no row."""
    model: str
    """Hash of the model that made the features."""


def embed(
    model: ImageModel,
    pictures: Sequence[str | Path] | Source,
    *,
    batch_size: int = 32,
    workers: int = 2,
    device: torch.device | None = None,
    precision: Precision = "fp32",
    max_broken: float = 1.0,
) -> Embeddings:
    """Return the vector per picture that the model's head classifies, in the model's evaluation view.

    Args:
        model: The model; it needs no head.
        pictures: Files, folders and globs, or a source.
        batch_size: Pictures at a time; the answer does not depend on it.
        workers: Decoding threads; 0 decodes between the passes.
        device: Where to compute; the model is moved there. By default where it is.
        precision: Of matrix products.
        max_broken: Share of the pictures that may be unreadable; they are named and left out.

    Raises:
        UserError: When a path does not exist, too much is broken, or a feature is not finite.
    """
    source = pictures if isinstance(pictures, Source) else open_pictures(pictures, model)
    answers = ask(
        model,
        source,
        answer=model.features,
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        max_broken=max_broken,
    )
    names = [source.name(int(index)) for index in answers.indices]
    bad = np.flatnonzero(~np.isfinite(answers.rows).all(axis=1))
    if len(bad):
        raise UserError(
            f"the features of {len(bad)} of {len(names)} pictures hold NaN or infinity, first of {names[bad[0]]}. "
            "The model's training has diverged, or half precision overflows: try fp32."
        )
    problems = [(source.name(index), reason) for index, reason in answers.broken]
    return Embeddings(names, answers.rows, problems, model_hash(model))


def model_hash(model: ImageModel) -> str:
    """Return a hash of everything that a model's features depend on: settings, preprocessing and weights."""
    digest = hashlib.sha256(repr((to_json(model.config), to_json(model.preprocessing))).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_embeddings(embeddings: Embeddings, path: Path) -> None:
    """Write features to a file, whole or not at all.

    `.npz`: arrays `names` [n], `features` [n d], `problem_names`, `problem_reasons` and `model`. `.parquet` and
    `.csv`: columns `name`, `features` (`.csv`: a column each) and `problem`; pictures that could not be read come last,
    without features.

    Raises:
        UserError: For another suffix, when Parquet's package is missing, or the file cannot be written.
    """
    require_writable(path)
    replace_file(path, lambda file: _WRITERS[path.suffix](embeddings, file), size=embeddings.features.nbytes)


def require_writable(path: Path) -> None:
    """Raise UserError when features cannot be written to a file of this name."""
    if path.suffix not in _WRITERS:
        raise UserError(f"{path}: features are written as {', '.join(_WRITERS)}; choose one of these suffixes.")
    if path.suffix == ".parquet":
        pyarrow(path)


def read_embeddings(path: Path) -> Embeddings:
    """Return the features of a `.npz` file that `write_embeddings` wrote.

    Raises:
        UserError: When the file cannot be read, or holds something else.
    """
    arrays = read_npz(path, limit=MAX_BYTES, advice="embed fewer pictures at once.")
    names, features = arrays.get("names"), arrays.get("features")
    rest = [arrays.get(name) for name in ("problem_names", "problem_reasons", "model")]
    if names is None or features is None or any(array is None or array.dtype.kind != "U" for array in (names, *rest)):
        raise UserError(f"{path} holds no features with names; write it with vitrail embed.")
    if features.dtype != np.float32 or features.ndim != 2 or names.shape != features.shape[:1]:
        raise UserError(f"{path}: {features.dtype} features of shape {features.shape} do not fit {len(names)} names.")
    broken, reasons, model = (array.tolist() for array in rest if array is not None)
    return Embeddings(names.tolist(), features, list(zip(broken, reasons, strict=True)), str(model))


def _write_npz(embeddings: Embeddings, file: BinaryIO) -> None:
    broken, reasons = zip(*embeddings.problems, strict=True) if embeddings.problems else ((), ())
    arrays = {
        "names": np.array(embeddings.names, np.str_),
        "features": embeddings.features,
        "problem_names": np.array(broken, np.str_),
        "problem_reasons": np.array(reasons, np.str_),
        "model": np.array(embeddings.model),
    }
    np.savez(file, **arrays)


def _write_csv(embeddings: Embeddings, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    width = embeddings.features.shape[1] if embeddings.names else 0
    writer.writerow(["name", *(f"feature_{i}" for i in range(width)), "problem"])
    for name, row in zip(embeddings.names, embeddings.features, strict=True):
        writer.writerow([plain_cell(name), *map(str, row), ""])  # float32 prints as few digits as give it back
    for name, reason in embeddings.problems:
        writer.writerow([plain_cell(name), *[""] * width, plain_cell(reason)])
    text.detach()  # writes what is left; closing the file is its owner's part


def _write_parquet(embeddings: Embeddings, file: BinaryIO) -> None:
    arrow, parquet = pyarrow("a Parquet file"), pyarrow("a Parquet file", "pyarrow.parquet")
    count, width = embeddings.features.shape
    kind = arrow.list_(arrow.float32(), width)
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(embeddings.features.reshape(-1)), width)
    broken = embeddings.problems
    table = arrow.table(
        {
            "name": arrow.array([*embeddings.names, *(name for name, _ in broken)], arrow.string()),
            "features": arrow.chunked_array([rows, arrow.nulls(len(broken), kind)], kind),
            "problem": arrow.array([*[None] * count, *(reason for _, reason in broken)], arrow.string()),
        }
    )
    parquet.write_table(table, file)


_WRITERS: dict[str, Callable[[Embeddings, BinaryIO], None]] = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
    ".csv": _write_csv,
}
