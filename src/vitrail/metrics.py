"""What a set of answers is worth: accuracy, F1, average precision, likelihood, calibration.

A value that is not defined (the recall of a class without pictures) is None in a table, and left out of
`Evaluation.metrics` and of every mean over classes. NaN never appears.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import average_precision_score

from vitrail.errors import UserError

Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class Answer:
    """One picture, its labels, and what the model said."""

    index: int
    """Place of the picture in its source."""
    name: str
    truth: str
    """Class name; with several labels, all of them with commas between."""
    predicted: str
    confidence: float
    """Probability of the predicted class; with several labels, how far off the worst label is (0 to 1)."""


@dataclass(frozen=True)
class Bin:
    """Predictions with a confidence in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean confidence, None without predictions."""
    accuracy: float | None
    """Share that is right, None without predictions."""


@dataclass(frozen=True)
class Kept:
    """Answers of at least some confidence, the others being rejected."""

    threshold: float
    """Least confidence of an answer that is kept."""
    coverage: float
    """Share of the pictures whose answers are kept."""
    risk: float
    """Share of the kept answers that are wrong."""


@dataclass(frozen=True)
class Evaluation:
    """Logits and labels of a set of pictures, and every figure that follows from them."""

    logits: Float[np.ndarray, "n classes"]
    """The model's output, float32."""
    targets: Int[np.ndarray, " n"] | Float[np.ndarray, "n classes"]
    """Class indices (int64), or 0/1 rows when a picture may carry several labels."""
    labels: tuple[str, ...]
    """Class names."""
    names: list[str]
    """Names of the pictures."""
    broken: list[tuple[str, str]]
    """Pictures that could not be read, and why. They are in no figure."""
    indices: Int[np.ndarray, " n"] | None = None
    """Place of each picture in its source; None: one after the other, none left out."""

    def __post_init__(self) -> None:
        if not len(self.logits):
            raise UserError("there is no picture to evaluate.")
        if self.logits.shape[1] != len(self.labels):
            raise UserError(f"the model has {self.logits.shape[1]} outputs, the data {len(self.labels)} classes.")
        bad = np.flatnonzero(~np.isfinite(self.logits).all(axis=1))
        if len(bad):
            raise UserError(
                f"the model answers with NaN or infinity for {len(bad)} of {len(self.logits)} pictures, first for "
                f"{self.names[bad[0]]}. Its training has diverged, or half precision overflows: try fp32."
            )

    @property
    def multi_label(self) -> bool:
        """Whether a picture may carry several labels."""
        return self.targets.ndim == 2

    def __len__(self) -> int:
        return len(self.logits)

    def probabilities(self) -> Float[np.ndarray, "n classes"]:
        """Return softmax probabilities, or one independent sigmoid per class with several labels."""
        return probabilities(self.logits, self.multi_label)

    def metrics(self) -> dict[str, float]:
        """Return the headline figures, as shares of 1 where they are shares.

        One label: `top1`, `top5` (more than 5 classes), `macro_f1`, `balanced_accuracy`, `nll` (natural logarithm),
        `ece` (Guo et al., 2017, arXiv 1706.04599, section 2; 15 bins), `temperature` fitted on all pictures, and
        `ece_calibrated` (see `calibrated`). Several: `mAP`, `micro_f1`, `macro_f1` at 0.5, `nll` (mean over labels).
        Means over classes count the classes that have pictures.
        """
        rows = self.per_class()
        values = {"macro_f1": _mean([row["f1"] for row in rows]), "nll": float(self.losses().mean())}
        if self.multi_label:
            hits, pictures, predicted = (int(counts.sum()) for counts in self._counts())
            values["mAP"] = _mean([row["ap"] for row in rows])
            values["micro_f1"] = 2 * hits / (pictures + predicted) if pictures + predicted else None
        else:
            ranks = self._ranks()
            values["top1"] = float((ranks == 0).mean())
            values["top5"] = float((ranks < 5).mean()) if len(self.labels) > 5 else None
            values["balanced_accuracy"] = _mean([row["recall"] for row in rows])
            values["ece"] = self.ece()
            values["temperature"] = fit_temperature(self.logits, self.targets)
            values["ece_calibrated"] = self.calibrated().ece() if len(self) > 1 else None
        order = ("top1", "top5", "mAP", "micro_f1", "macro_f1", "balanced_accuracy", "nll", "ece", "temperature")
        found = {key: values.get(key) for key in (*order, "ece_calibrated")}
        return {key: value for key, value in found.items() if value is not None}

    def per_class(self) -> list[Row]:
        """Return per class `name`, `pictures`, `precision`, `recall`, `f1`, and `ap` with several labels.

        Precision is None for a class that is never predicted; recall, F1 and AP are None for one without pictures.
        """
        rows: list[Row] = []
        for i, (name, counts) in enumerate(zip(self.labels, zip(*self._counts(), strict=True), strict=True)):
            hits, pictures, predicted = (int(count) for count in counts)
            row: Row = {
                "name": name,
                "pictures": pictures,
                "precision": hits / predicted if predicted else None,
                "recall": hits / pictures if pictures else None,
                "f1": 2 * hits / (pictures + predicted) if pictures else None,
            }
            if self.multi_label:
                truth = self.targets[:, i] > 0.5
                row["ap"] = float(average_precision_score(truth, self.logits[:, i])) if pictures else None
            rows.append(row)
        return rows

    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Return counts of pictures, a row per true class and a column per predicted class."""
        self._needs_one_label("a confusion matrix")
        table = np.zeros((len(self.labels), len(self.labels)), np.int64)
        np.add.at(table, (self.targets, self.logits.argmax(axis=1)), 1)
        return table

    def reliability(self, bins: int = 15) -> list[Bin]:
        """Return the reliability diagram: predictions by confidence in bins of equal width (Guo et al., section 2)."""
        self._needs_one_label("a reliability diagram")
        confidence, right = self.probabilities().max(axis=1), self._right()
        place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
        diagram = []
        for i in range(bins):
            inside = place == i
            some = bool(inside.any())
            diagram.append(
                Bin(
                    low=i / bins,
                    high=(i + 1) / bins,
                    count=int(inside.sum()),
                    confidence=float(confidence[inside].mean()) if some else None,
                    accuracy=float(right[inside].mean()) if some else None,
                )
            )
        return diagram

    def ece(self, bins: int = 15) -> float:
        """Return the expected calibration error of the top label (Guo et al., 2017, arXiv 1706.04599, equation 3)."""
        gaps = [
            b.count * abs(b.accuracy - b.confidence)
            for b in self.reliability(bins)
            if b.accuracy is not None and b.confidence is not None
        ]
        return sum(gaps) / len(self)

    def risk_coverage(self) -> list[Kept]:
        """Return the error among the answers that are kept, from the surest alone to all: a row per confidence.

        Source: El-Yaniv and Wiener, 2010, "On the foundations of noise-free selective classification" (JMLR 11).
        """
        self._needs_one_label("a risk-coverage curve")
        confidence, wrong = self.probabilities().max(axis=1), ~self._right()
        order = np.argsort(-confidence, kind="stable")
        confidence, errors = confidence[order], wrong[order].cumsum()
        last = np.flatnonzero(np.append(confidence[1:] < confidence[:-1], True))  # equal ones are kept together
        return [Kept(float(confidence[i]), (int(i) + 1) / len(self), float(errors[i] / (i + 1))) for i in last.tolist()]

    def aurc(self) -> float:
        """Return the area under the risk-coverage curve: the mean error over all shares that may be kept.

        Source: Geifman, Uziel and El-Yaniv, 2019, "Bias-reduced uncertainty estimation for deep neural classifiers"
        (arXiv 1805.08206), section 3.
        """
        area = before = 0.0
        for kept in self.risk_coverage():
            area += (kept.coverage - before) * kept.risk
            before = kept.coverage
        return area

    def threshold_for(self, accuracy: float) -> Kept | None:
        """Return the threshold that keeps the most answers of which this share is right; None where none does."""
        fit = [kept for kept in self.risk_coverage() if 1 - kept.risk >= accuracy]
        return fit[-1] if fit else None

    def calibrated(self) -> "Evaluation":
        """Return the same answers with each half of the pictures scaled by the other half's temperature.

        So no picture is scaled by a temperature that it took part in fitting, and what is measured on the result is
        honest. The halves alternate within each class; there must be two pictures.
        """
        self._needs_one_label("temperature scaling")
        order = np.argsort(self.targets, kind="stable")
        logits = self.logits.copy()
        for ours, others in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            logits[ours] = self.logits[ours] / fit_temperature(self.logits[others], self.targets[others])
        return replace(self, logits=logits)

    def worst(self, k: int) -> list[Answer]:
        """Return up to `k` mistakes: the most confident ones, or with several labels those of the largest loss."""
        badness = self.losses() if self.multi_label else self.probabilities().max(axis=1)
        wrong = np.flatnonzero(~self._right())
        return [self.answer(int(row)) for row in wrong[np.argsort(-badness[wrong], kind="stable")[:k]]]

    def right(self, k: int) -> list[Answer]:
        """Return up to `k` pictures answered right, from classes as many and as evenly spread as can be."""
        right = self._right()
        by_class = [np.flatnonzero(right & self._carries(label)).tolist() for label in range(len(self.labels))]
        by_class = [rows for rows in by_class if rows]
        if len(by_class) > k:
            by_class = [by_class[i * len(by_class) // k] for i in range(k)]
        in_turn = [rows[turn] for turn in range(k) for rows in by_class if turn < len(rows)]
        return [self.answer(row) for row in list(dict.fromkeys(in_turn))[:k]]

    def answer(self, row: int) -> Answer:
        """Return what the model said about the picture in one row of `logits`."""
        logits = self.logits[row].astype(np.float64)
        if self.multi_label:
            carried = self.targets[row] > 0.5
            truth, predicted = self._join(carried), self._join(logits > 0)
            confidence = float(np.abs(expit(logits) - carried).max())
        else:
            truth, predicted = self.labels[int(self.targets[row])], self.labels[int(logits.argmax())]
            confidence = float(softmax(logits).max())
        index = row if self.indices is None else int(self.indices[row])
        return Answer(index=index, name=self.names[row], truth=truth, predicted=predicted, confidence=confidence)

    def losses(self) -> Float[np.ndarray, " n"]:
        """Return the negative log-likelihood of each picture's label; with several, its mean over labels."""
        logits = self.logits.astype(np.float64)
        if self.multi_label:
            return (np.logaddexp(0, logits) - self.targets * logits).mean(axis=1)
        return -log_softmax(logits, axis=1)[np.arange(len(self)), self.targets]

    def _right(self) -> Bool[np.ndarray, " n"]:
        """Whether the top class is the label; with several labels, whether every one is right at 0.5."""
        if self.multi_label:
            return ((self.logits > 0) == (self.targets > 0.5)).all(axis=1)
        return self.logits.argmax(axis=1) == self.targets

    def _carries(self, label: int) -> Bool[np.ndarray, " n"]:
        return self.targets[:, label] > 0.5 if self.multi_label else self.targets == label

    def _ranks(self) -> Int[np.ndarray, " n"]:
        """Number of classes placed before the label; of equal logits the lower class goes first, as in argmax."""
        own = self.logits[np.arange(len(self)), self.targets][:, None]
        earlier = np.arange(len(self.labels)) < self.targets[:, None]
        return ((self.logits > own) | ((self.logits == own) & earlier)).sum(axis=1)

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per class: pictures found, pictures, predictions."""
        if self.multi_label:
            truth, given = self.targets > 0.5, self.logits > 0
            return (truth & given).sum(axis=0), truth.sum(axis=0), given.sum(axis=0)
        found = self.targets[self._right()]
        classes = len(self.labels)
        return (
            np.bincount(found, minlength=classes),
            np.bincount(self.targets, minlength=classes),
            np.bincount(self.logits.argmax(axis=1), minlength=classes),
        )

    def _join(self, given: Bool[np.ndarray, " classes"]) -> str:
        return ", ".join(self.labels[i] for i in np.flatnonzero(given)) or "(none)"

    def _needs_one_label(self, what: str) -> None:
        if self.multi_label:
            raise UserError(f"{what} is defined for pictures with one label each; these may carry several.")


def judged_by(metrics: dict[str, float]) -> str:
    """Return the name of the metric that decides between models: `top1`, or `mAP` where pictures have several labels.

    `nll` where neither is defined, because no picture carries any label; `masked_loss` where no model classifies.
    """
    return next(name for name in ("top1", "mAP", "nll", "masked_loss") if name in metrics)


def mean_loss(losses: Float[np.ndarray, "n 1"]) -> dict[str, float]:
    """Return the metrics of a learner that does not classify: the mean loss of its pictures, `masked_loss`.

    Raises:
        UserError: When there is none, or a loss is not a number.
    """
    if not len(losses):
        raise UserError("there is no picture to evaluate.")
    if not np.isfinite(losses).all():
        raise UserError(
            "the validation loss is NaN or infinite. The training has diverged, or half precision overflows: try fp32."
        )
    return {"masked_loss": float(losses.mean(dtype=np.float64))}


def score(metrics: dict[str, float]) -> tuple[float, float]:
    """Return what makes one result better than another, larger being better: accuracy or mAP, then a lower loss."""
    loss = metrics["nll"] if "nll" in metrics else metrics["masked_loss"]
    return metrics.get("top1", metrics.get("mAP", 0.0)), -loss


def probabilities(logits: Float[np.ndarray, "n classes"], multi_label: bool) -> Float[np.ndarray, "n classes"]:
    """Return softmax probabilities, or one independent sigmoid per class when a picture may carry several labels.

    Softmax is right for a model trained with sigmoids on pictures of one label, too: given that exactly one of the
    independent labels holds, class i has the probability p_i prod(1 - p_j), j != i, normalised. As p / (1 - p) is
    exp(logit), this is the softmax of the logits.
    """
    wide = logits.astype(np.float64)
    return expit(wide) if multi_label else softmax(wide, axis=1)


def fit_temperature(logits: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]) -> float:
    """Return the temperature that minimises the negative log-likelihood (Guo et al., arXiv 1706.04599, section 4.2).

    Divide logits by it. It is 1 where these answers have none: they are all right, so that the likelihood grows as the
    temperature falls to 0, or they tell nothing of the labels, so that it grows without end.
    """
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    spread = -float(logits.min())
    if not spread:
        return 1.0
    logits /= spread  # the search then fits logits of any size
    own = logits[np.arange(len(logits)), targets]

    def slope(log_scale: float) -> float:
        """Derivative of the loss by the scale 1/T; the loss is convex in it, so that this rises."""
        scaled = softmax(np.exp(log_scale) * logits, axis=1)
        return float(((scaled * logits).sum(axis=1) - own).mean())

    low, high = -14.0, 14.0  # 1/T from one millionth to a million over the spread of the logits
    if slope(low) >= 0 or slope(high) <= 0:
        return 1.0
    found: Any = brentq(slope, low, high, xtol=1e-6)
    return spread / float(np.exp(found))


def real_accuracy(predictions: Int[np.ndarray, " n"], valid_labels: Sequence[Collection[int]]) -> float | None:
    """Return the share of pictures whose predicted class is any of their valid labels.

    Pictures without a valid label are left out of numerator and denominator; None when there is no other.

    Source: Beyer et al., 2020, "Are we done with ImageNet?" (arXiv 2006.07159), section 4.
    """
    right = [int(said) in valid for said, valid in zip(predictions, valid_labels, strict=True) if valid]
    return sum(right) / len(right) if right else None


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share measured on `count` pictures (Wilson, 1927, equation 9)."""
    z = 1.959963984540054  # normal quantile at 0.975
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _mean(values: Iterable[str | float | None]) -> float | None:
    """Mean of the values that are defined."""
    known = [value for value in values if isinstance(value, float)]
    return sum(known) / len(known) if known else None
