"""How good `vitrail check --model` is: label errors and copies are planted, and what it lists is counted.

    python benchmarks/label_errors.py [CIFAR-100-BINARY] [--seeds 5]

About 2 minutes on one core. CIFAR-100's test pictures are judged by `vitrail-mini`, which was not trained on them; the
embedded clothes by linear classifiers of its features, each trained with the wrong labels on the other four fifths.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from machine import table, write_result
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vitrail.check.label_errors import suspects
from vitrail.check.near_duplicates import SIDE, near_pairs
from vitrail.checkpoints import load_model
from vitrail.data import ArraySource, Source, read_parts
from vitrail.evaluation import ask, evaluate
from vitrail.metrics import Evaluation, probabilities
from vitrail.models import ImageModel

RATES = (0.02, 0.05, 0.1)
TOP = 100
COPIES = 100
CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 40": lambda picture: _compressed(picture, 40),
    "half the size, and back": lambda picture: picture.resize((40, 40)).resize(picture.size),
    "a tenth darker": lambda picture: picture.point([round(0.9 * level) for level in range(256)] * 3),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "1 pixel of 80 cut off each side": lambda picture: picture.crop((1, 1, 79, 79)).resize(picture.size),
    "2 pixels of 80 cut off each side": lambda picture: picture.crop((2, 2, 78, 78)).resize(picture.size),
}

TEXT = """\
## Wrong labels

Labels are changed at random, to any other class ("any") or to one of the same superclass ("similar"); what the data had
wrong before counts as right, so that true precision is higher. Means over {seeds} draws. Listed: labels that the model
contradicts (confident learning; Northcutt et al., 2021, arXiv 1911.00068), and how many of the planted ones are among
them. Precision at k: share of planted ones among the first k (or all that are listed), n being their number; the list
begins with the label of the lowest probability. By margin: the same pictures in the order of the margin to the
likeliest other class. In brackets: how often the model that judges is right. Trained on: one that was trained on these
very pictures and their wrong labels, which it should not be.

{errors}

## Copies

{copies} of the {photos:,} embedded clothes, changed and added, one change at a time. Found: copies listed with their
original. Other pairs: pairs listed that were not planted; the photos have {before} before.

{near}
"""


def planted(
    targets: np.ndarray, rate: float, rng: np.random.Generator, allowed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels of which a share is wrong, and which: `allowed` tells what class may become what other."""
    bad = rng.random(len(targets)) < rate
    wrong = targets.copy()
    for row in np.flatnonzero(bad):
        wrong[row] = rng.choice(np.flatnonzero(allowed[targets[row]]))
    return wrong, bad


def counted(logits: np.ndarray, wrong: np.ndarray, bad: np.ndarray) -> tuple[float, ...]:
    """Return listed, planted, found, precision at 100 and at n, and the latter two by margin."""
    labels = tuple(map(str, range(logits.shape[1])))
    evaluation = Evaluation(logits.astype(np.float32), wrong, labels, list(map(str, range(len(wrong)))), [])
    found = sorted(suspects(evaluation, "test"), key=lambda suspect: suspect.label_probability)
    ranked = np.array([int(suspect.names[0]) for suspect in found], np.int64)
    shares = probabilities(logits, multi_label=False)[ranked]
    others = shares.copy()
    others[np.arange(len(ranked)), wrong[ranked]] = -np.inf
    by_margin = ranked[np.argsort(shares[np.arange(len(ranked)), wrong[ranked]] - others.max(axis=1), kind="stable")]
    count = int(bad.sum())
    firsts = [order[:k] for order in (ranked, by_margin) for k in (TOP, count)]
    precisions = (bad[first].sum() / max(len(first), 1) for first in firsts)
    return len(ranked), count, bad[ranked].sum(), *precisions


def linear(features: np.ndarray, labels: np.ndarray, *, known: bool) -> np.ndarray:
    """Return log-probabilities of each picture by a linear classifier trained on the other fifths, or on all."""
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    logits = np.zeros((len(labels), int(labels.max()) + 1))
    everyone = np.arange(len(labels))
    folds = StratifiedKFold(5, shuffle=True, random_state=0).split(scaled, labels)
    for learn, judge in [(everyone, everyone)] if known else folds:
        fitted = LogisticRegression(C=0.01, max_iter=200).fit(scaled[learn], labels[learn])
        logits[judge] = fitted.predict_log_proba(scaled[judge])
    return logits


def errors_of(
    name: str, targets: np.ndarray, judge: Callable[[np.ndarray], np.ndarray], kinds: dict[str, np.ndarray], seeds: int
) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for every kind and rate of planted errors."""
    for kind, allowed in kinds.items():
        for rate in RATES:
            draws, right = [], []
            for seed in range(seeds):
                wrong, bad = planted(targets, rate, np.random.default_rng(seed), allowed)
                logits = judge(wrong)
                draws.append(counted(logits, wrong, bad))
                right.append((logits.argmax(axis=1) == targets).mean())
            listed, count, found, *precisions = np.mean(draws, axis=0)
            shares = (f"{share:.1%}" for share in precisions)
            yield (
                f"{name} ({np.mean(right):.0%})",
                kind,
                f"{rate:.0%}",
                f"{count:.0f}",
                f"{listed:.0f}",
                f"{found / count:.1%}",
                *shares,
            )


def seen(model: ImageModel, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return features and small pictures, as `check` takes them."""

    def answer(images: Tensor) -> Tensor:
        return torch.cat([adaptive_avg_pool2d(images, SIDE).flatten(1), model.features(images)], dim=1)

    rows = ask(model, source, answer=answer).rows
    width = model.preprocessing.channels * SIDE**2
    return rows[:, width:], rows[:, :width].reshape(len(rows), -1, SIDE, SIDE)


def copies_of(model: ImageModel, photos: Source, count: int) -> tuple[int, list[tuple[str, ...]]]:
    """Return the pairs among the photos as they are, and a row of the table for every change."""
    features, small = seen(model, photos)
    before = len(near_pairs(features, small)[0])
    chosen = np.random.default_rng(0).choice(len(photos), count, replace=False)
    rows = []
    for name, change in CHANGES.items():
        changed = np.stack([np.asarray(change(Image.fromarray(photos.load(int(i))))) for i in chosen])
        more, tiny = seen(model, ArraySource(changed, np.zeros(count, np.int64), ("all",)))
        pairs, _ = near_pairs(np.concatenate([features, more]), np.concatenate([small, tiny]))
        found = {(int(i), len(photos) + place) for place, i in enumerate(chosen)} & set(map(tuple, pairs.tolist()))
        rows.append((name, f"{len(found) / count:.0%}", str(len(pairs) - len(found) - before)))
    return before, rows


def _compressed(picture: Image.Image, quality: int) -> Image.Image:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def _clothes() -> ArraySource:
    parts = read_parts("clothing")
    assert parts.test is not None
    sources = parts.train, parts.test
    pixels = [source.pixels() for source in sources]
    targets = np.concatenate([source.targets for source in sources])
    return ArraySource(np.concatenate([part for part in pixels if part is not None]), targets, parts.train.classes)


def _of_cifar(model: ImageModel, folder: Path, seeds: int) -> Iterator[tuple[str, ...]]:
    source = read_parts(folder).test
    assert source is not None
    logits, targets = evaluate(model, source).logits, np.asarray(source.targets)
    coarse = dict(np.fromfile(folder / "test.bin", np.uint8).reshape(-1, 3074)[:, 1::-1].tolist())
    superclass = np.array([coarse[label] for label in range(100)])
    different = ~np.eye(100, dtype=bool)
    kinds = {"any": different, "similar": different & (superclass[:, None] == superclass)}
    yield from errors_of("CIFAR-100, test", targets, lambda _: logits, kinds, seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path, nargs="?", help="folder of the official binary files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="rehearse in seconds; nothing is written")
    asked = parser.parse_args(arguments)
    model, photos = load_model("vitrail-mini"), _clothes()
    if asked.tiny:
        photos = ArraySource(photos.images[::10], photos.targets[::10], photos.classes)
    features, _ = seen(model, photos)
    kinds = {"any": ~np.eye(len(photos.classes), dtype=bool)}
    seeds, copies = (1, 3) if asked.tiny else (asked.seeds, COPIES)
    errors: list[tuple[str, ...]] = []
    for name, known in (("clothes", False), ("clothes, trained on", True)):
        judge = partial(linear, features, known=known)
        errors += errors_of(name, np.asarray(photos.targets), judge, kinds, seeds)
    if asked.cifar is not None:
        errors = [*_of_cifar(model, asked.cifar, seeds), *errors]
    before, near = copies_of(model, photos, copies)
    shares = [f"precision at {TOP}", "at n"]
    head = ["pictures", "wrong labels", "share", "planted (n)", "listed", "planted listed", *shares]
    body = TEXT.format(
        seeds=seeds,
        errors=table([*head, *(f"{name}, by margin" for name in shares)], errors),
        copies=copies,
        photos=len(photos),
        before=before,
        near=table(("change", "found", "other pairs"), near),
    )
    print(body if asked.tiny else write_result("label-errors", "python benchmarks/label_errors.py CIFAR", body))


if __name__ == "__main__":
    main()
