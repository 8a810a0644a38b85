"""What frozen features are worth: few-shot ridge regression, a linear classifier, nearest neighbours.

Features are computed once per picture; every probe then takes them as they are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from scipy.optimize import minimize
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional

from vitrail.data import read_parts
from vitrail.data.base import Source, Splits, Subset
from vitrail.embedding import Embeddings, embed, model_hash, read_embeddings, write_embeddings
from vitrail.errors import UserError
from vitrail.metrics import Evaluation, score
from vitrail.models import ImageModel
from vitrail.parallel import Precision

SHOTS, SEEDS = (1, 5, 10, 25), 3
RIDGE, BIAS = 2.0**10, 100.0
NEIGHBOURS, TEMPERATURE = 20, 0.07
STRENGTHS = (1e0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Weight decays that the linear probe tries, strong to weak."""
HELD_OUT = 0.1  # share of the training pictures, where a part is needed and the data has none

_LEFT_OUT = (
    "few-shot and nearest-neighbour probes need one label per picture; these may carry several, "
    "so that only the linear probe applies."
)


@dataclass(frozen=True)
class Labelled:
    """Features of one part of the data."""

    features: Float32[np.ndarray, "n d"]
    targets: Int[np.ndarray, " n"] | Float32[np.ndarray, "n classes"]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Int[np.ndarray, " k"]) -> "Labelled":
        """Return some of the pictures."""
        return Labelled(self.features[rows], self.targets[rows], self.classes)


@dataclass(frozen=True)
class ProbeRow:
    """One probe's result."""

    method: str
    setting: str
    metrics: dict[str, float]
    """Means over draws where there are several."""
    draws: tuple[float, ...] = ()
    """Few-shot: top-1 of every draw of the support set."""


@dataclass(frozen=True)
class ProbeResult:
    """What features are worth, by every probe that applies to the data."""

    part: str
    """Part of the data that the figures are of."""
    pictures: dict[str, int]
    """Pictures with features per part, `train` and the one measured."""
    width: int
    """Numbers per feature vector."""
    rows: list[ProbeRow]
    left_out: str
    """Which probes do not apply, and why; empty when all do."""
    problems: list[tuple[str, str]]
    """Pictures that could not be read, and why. They are in no figure."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        probes = [
            {"method": row.method, "setting": row.setting, **row.metrics}
            | ({"draws": list(row.draws)} if row.draws else {})
            for row in self.rows
        ]
        broken = [{"name": name, "reason": reason} for name, reason in self.problems]
        return {
            "part": self.part,
            "pictures": self.pictures,
            "features": self.width,
            "probes": probes,
            "left_out": self.left_out or None,
            "broken": broken,
        }


def probe(
    model: ImageModel,
    data: str | Path,
    *,
    features: Path | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | None = None,
    precision: Precision = "fp32",
    max_broken: float = 0.01,
) -> ProbeResult:
    """Return what the model's features are worth on labelled pictures. The model's own head is not asked.

    The figures are of the data's test part, else of its validation part, else of a tenth of every class that the
    probes do not train on. The linear probe picks its weight decay on a validation part that is not the measured one.

    Args:
        model: The model.
        data: A path of data.
        features: A `.npz` file of this model's features, as `embed` writes it. When it does not exist yet, the
            features are computed and written there.
        batch_size: Pictures per forward pass.
        workers: Decoding threads.
        device: Where to compute; the model is moved there. By default where it is.
        precision: Of the model's matrix products.
        max_broken: Share of the pictures that may be unreadable; they are named and left out.

    Raises:
        UserError: When the data cannot be opened, too much is broken, or the file holds other features.
    """
    if features is not None and features.suffix != ".npz":
        raise UserError(f"{features}: features are kept as .npz; choose this suffix.")
    parts, measured = _parts(read_parts(data, model.preprocessing.channels), str(data))
    if features is not None and features.exists():
        found = read_embeddings(features)
        if found.model != model_hash(model):
            raise UserError(f"{features} holds the features of another model; name another file, or remove this one.")
    else:
        settings: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": device}
        made = [embed(model, source, precision=precision, **settings) for source in parts.values()]
        found = _together(made)
        if features is not None:
            write_embeddings(found, features)
    problems: list[tuple[str, str]] = []
    labelled = {name: _labelled(source, found, problems, features) for name, source in parts.items()}
    total = sum(len(source) for source in parts.values())
    if len(problems) > max_broken * total:
        name, reason = problems[0]
        raise UserError(
            f"{len(problems)} of {total} pictures cannot be read, more than {max_broken:.1%}; the first is {name}: "
            f"{reason}. Mend or remove them."
        )
    train, tested = labelled["train"], labelled[measured]
    rows = probe_features(train, tested, None if measured == "val" else labelled.get("val"))
    return ProbeResult(
        part=measured,
        pictures={"train": len(train), measured: len(tested)},
        width=train.features.shape[1],
        rows=rows,
        left_out=_LEFT_OUT if train.targets.ndim == 2 else "",
        problems=problems,
    )


def probe_features(train: Labelled, tested: Labelled, val: Labelled | None = None) -> list[ProbeRow]:
    """Return every probe that applies; `val` is for the linear probe's choice (see `linear_probe`)."""
    rows: list[ProbeRow] = []
    if train.targets.ndim == 1:
        for shots in SHOTS:
            draws = tuple(few_shot(train, tested, shots, seed) for seed in range(SEEDS))
            setting = f"{shots} shot{'s' * (shots > 1)}"
            rows.append(ProbeRow("few-shot ridge", setting, {"top1": float(np.mean(draws))}, draws))
    decay, evaluation = linear_probe(train, tested, val)
    rows.append(ProbeRow("linear", f"weight decay {decay:g}", evaluation.metrics()))
    if train.targets.ndim == 1:
        near = min(NEIGHBOURS, len(train))
        rows.append(ProbeRow("nearest neighbours", f"k {near}", {"top1": nearest_neighbours(train, tested)}))
    return rows


def few_shot(train: Labelled, tested: Labelled, shots: int, seed: int) -> float:
    """Return the accuracy of ridge regression on a few pictures of each class.

    As big_vision's `evaluators/fewshot_lsr.py`: the first `shots` of a seeded permutation of each class, fewer where it
    has fewer; features standardised by the mean and (standard deviation + 1e-5) of these; a constant feature of 100 for
    a bias that is hardly regularised; targets -1 and 1; weight decay 2^10. The official code computes in float32, this
    in float64.
    """
    draw = np.random.default_rng(seed)
    places = [draw.permutation(np.flatnonzero(train.targets == label))[:shots] for label in range(len(train.classes))]
    support = train.take(np.concatenate(places))
    x = support.features.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-5
    weights = ridge_weights(_with_bias((x - mean) / scale), 2.0 * np.eye(len(train.classes))[support.targets] - 1.0)
    predicted = (_with_bias((tested.features - mean) / scale) @ weights).argmax(axis=1)
    return float((predicted == tested.targets).mean())


def ridge_weights(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n classes"], decay: float = RIDGE
) -> Float[np.ndarray, "d classes"]:
    """Return the weights that minimise |x w - y|^2 + decay |w|^2, by the smaller of the two Gram matrices."""
    primal = len(x) >= x.shape[1]
    values, vectors = np.linalg.eigh(x.T @ x if primal else x @ x.T)
    if primal:
        return (vectors / (values + decay)) @ (vectors.T @ (x.T @ y))
    return x.T @ ((vectors / (values + decay)) @ (vectors.T @ y))


def linear_probe(train: Labelled, tested: Labelled, val: Labelled | None = None) -> tuple[float, Evaluation]:
    """Return the best weight decay, and the answers of a linear classifier trained with it.

    Logistic regression on features standardised by the training part's mean and standard deviation; with several
    labels per picture, one regression per label. The best of `STRENGTHS` is picked on `val`; without it, on a tenth of
    every class of the training part (all of it where no class has two pictures), and then fitted to all of that.
    """
    mean, scale = train.features.mean(axis=0), train.features.std(axis=0) + 1e-5

    def standardised(part: Labelled) -> Labelled:
        return Labelled((part.features - mean) / scale, part.targets, part.classes)

    train, tested = standardised(train), standardised(tested)
    if val is None:
        rest, aside = held_out(train.targets)
        fitted, chosen_on = (train.take(rest), train.take(aside)) if len(aside) else (train, train)
    else:
        fitted, chosen_on = train, standardised(val)
    paths = regression_path(fitted, STRENGTHS)
    results = [score(_answers(weights, chosen_on).metrics()) for weights in paths]
    best = max(range(len(STRENGTHS)), key=results.__getitem__)
    decay, weights = STRENGTHS[best], paths[best]
    if val is None:
        (weights,) = regression_path(train, (decay,), start=weights)
    return decay, _answers(weights, tested)


def regression_path(
    train: Labelled, decays: tuple[float, ...], start: Float[np.ndarray, "d_plus_1 classes"] | None = None
) -> list[Float[np.ndarray, "d_plus_1 classes"]]:
    """Return logistic regression's weights, the bias as last row, for each weight decay in turn.

    They minimise the mean loss + decay / 2 |weights|^2, without the bias, by L-BFGS in float64.

    Args:
        train: Features and labels.
        decays: Each starts from the solution of the one before.
        start: Weights that the first starts from; by default 0.
    """
    x, classes = torch.from_numpy(train.features).double(), len(train.classes)
    several = train.targets.ndim == 2
    targets = train.targets if several else np.eye(classes)[train.targets]
    y = torch.from_numpy(targets).double()

    def objective(flat: Float[np.ndarray, " k"], decay: float) -> tuple[float, Float[np.ndarray, " k"]]:
        weights = torch.from_numpy(flat).reshape(-1, classes).requires_grad_()
        logits = torch.addmm(weights[-1], x, weights[:-1])
        if several:
            loss = functional.binary_cross_entropy_with_logits(logits, y, reduction="sum") / len(x)
        else:
            loss = functional.cross_entropy(logits, y)
        loss = loss + decay / 2 * weights[:-1].square().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        return float(loss.detach()), gradient.reshape(-1).numpy()

    flat, path = np.zeros((x.shape[1] + 1) * classes) if start is None else start.reshape(-1), []
    for decay in decays:
        flat = minimize(objective, flat, (decay,), "L-BFGS-B", jac=True, options={"maxiter": 300, "gtol": 1e-6}).x
        path.append(flat.reshape(-1, classes))
    return path


def nearest_neighbours(train: Labelled, tested: Labelled) -> float:
    """Return the accuracy of a vote of the nearest neighbours by cosine, each with weight exp(cosine / 0.07).

    As DINO's `eval_knn.py` (Caron et al., 2021, arXiv 2104.14294, appendix F.1: k = 20).
    """

    def closeness(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / TEMPERATURE)

    settings: dict[str, Any] = {"metric": "cosine", "algorithm": "brute", "weights": closeness}
    vote = KNeighborsClassifier(min(NEIGHBOURS, len(train)), **settings)
    predicted = vote.fit(train.features, train.targets).predict(tested.features)
    return float((predicted == tested.targets).mean())


def held_out(
    targets: Int[np.ndarray, " n"] | Float[np.ndarray, "n classes"],
) -> tuple[Int[np.ndarray, " a"], Int[np.ndarray, " b"]]:
    """Return the places of most pictures and of a tenth of each class, at least one; a class's only picture stays."""
    # Uniform numbers and sorting instead of `permutation`, whose result NumPy may change from release to release.
    order = np.argsort(np.random.Generator(np.random.PCG64(0)).random(len(targets)), kind="stable")
    groups = [order] if targets.ndim == 2 else [order[targets[order] == label] for label in np.unique(targets)]
    aside = [group[: min(max(round(len(group) * HELD_OUT), 1), len(group) - 1)] for group in groups]
    chosen = np.sort(np.concatenate(aside))
    return np.setdiff1d(order, chosen), chosen


def _parts(data: Splits, path: str) -> tuple[dict[str, Source], str]:
    """Return the parts to read, and the name of the one to measure."""
    if len(data.train.classes) < 2:
        raise UserError(f"{path} has {len(data.train.classes)} class; a probe needs two.")
    parts = {"train": data.train, "val": data.val, "test": data.test}
    found = {name: source for name, source in parts.items() if source is not None and len(source)}
    for name in ("test", "val"):
        if name in found:
            return found, name
    rest, aside = held_out(data.train.targets)
    if not len(aside):
        raise UserError(f"{path} has one picture per class; a probe needs others to measure on.")
    return {"train": Subset(data.train, rest), "held out": Subset(data.train, aside)}, "held out"


def _together(made: list[Embeddings]) -> Embeddings:
    return Embeddings(
        names=[name for each in made for name in each.names],
        features=np.concatenate([each.features for each in made if each.names] or [made[0].features]),
        problems=[problem for each in made for problem in each.problems],
        model=made[0].model,
    )


def _labelled(source: Source, found: Embeddings, problems: list[tuple[str, str]], file: Path | None) -> Labelled:
    """Return a part's features by the names of its pictures; broken ones are added to `problems`."""
    rows, broken = {name: row for row, name in enumerate(found.names)}, dict(found.problems)
    names = [source.name(index) for index in range(len(source))]
    missing = [name for name in names if name not in rows and name not in broken]
    if missing:
        raise UserError(
            f"{file} lacks the features of {len(missing)} of {len(names)} pictures, first of {missing[0]}; "
            "name another file for this data, or embed them under these names."
        )
    problems += [(name, broken[name]) for name in names if name not in rows]
    places = np.array([place for place, name in enumerate(names) if name in rows], np.int64)
    chosen = np.array([rows[names[place]] for place in places], np.int64)
    if not len(chosen):
        raise UserError(f"none of the {len(names)} pictures of one part could be read, first {names[0]}.")
    return Labelled(found.features[chosen], source.targets[places], source.classes)


def _answers(weights: Float[np.ndarray, "d_plus_1 classes"], part: Labelled) -> Evaluation:
    logits = (part.features @ weights[:-1] + weights[-1]).astype(np.float32)
    return Evaluation(logits, part.targets, part.classes, [""] * len(part), [])


def _with_bias(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d_plus_1"]:
    return np.pad(x, ((0, 0), (0, 1)), constant_values=BIAS)
