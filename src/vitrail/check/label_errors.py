"""Labels that a model contradicts: confident learning.

Source: Northcutt, Jiang and Chuang, 2021, "Confident learning: estimating uncertainty in dataset labels" (arXiv
1911.00068), section 3.1. Its counts hold for probabilities that are out of sample: of pictures that the model was not
trained on.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from vitrail.check.base import Finding, Suspect, tell
from vitrail.metrics import Evaluation

SURE = 0.9
"""A probability that is always confident. The mean alone is no bar for a model that is nearly certain of all its
answers: half of them, of pictures with wrong labels too, lie below it. The paper has no such bound."""


def confident_classes(
    probabilities: Float[np.ndarray, "n classes"], targets: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Return the class that each picture is confidently counted for: its own label where there is no other.

    A class is confident at the mean probability that its own pictures get for it (equation 2), or at `SURE`. Of
    several, the likelier counts. A class without pictures never is.
    """
    own = probabilities[np.arange(len(targets)), targets]
    counts = np.bincount(targets, minlength=probabilities.shape[1])
    sums = np.bincount(targets, own, minlength=probabilities.shape[1])
    thresholds = np.where(counts > 0, np.minimum(sums / np.maximum(counts, 1), SURE), np.inf)
    confident = np.where(probabilities >= thresholds, probabilities, -np.inf)
    return np.where(np.isfinite(confident).any(axis=1), confident.argmax(axis=1), targets)


def suspects(evaluation: Evaluation, part: str) -> Iterator[Suspect]:
    """Yield the pictures of one part whose label the model contradicts with confidence, in their order.

    With several labels, each class is a question of its own, with the answers yes and no; a picture may come twice.
    """
    probabilities, names, labels = evaluation.probabilities(), evaluation.names, evaluation.labels
    if not evaluation.multi_label:
        guesses = confident_classes(probabilities, evaluation.targets)
        for row in np.flatnonzero(guesses != evaluation.targets).tolist():
            given, guess = int(evaluation.targets[row]), int(guesses[row])
            shares = float(probabilities[row, given]), float(probabilities[row, guess])
            yield _suspect(names[row], part, (labels[given], labels[guess]), shares)
        return
    for number, label in enumerate(labels):
        carried = (evaluation.targets[:, number] > 0.5).astype(np.int64)
        answers = np.stack([1 - probabilities[:, number], probabilities[:, number]], axis=1)
        words = (f"not {label}", label)
        for row in np.flatnonzero(confident_classes(answers, carried) != carried).tolist():
            given = int(carried[row])
            shares = float(answers[row, given]), float(answers[row, 1 - given])
            yield _suspect(names[row], part, (words[given], words[1 - given]), shares)


def suspect_labels(found: Sequence[Suspect], pictures: int) -> Iterator[Finding]:
    """The suspects of all parts, the least likely label first: what is surest to be wrong.

    On planted errors this order beats the margin to the likeliest class (benchmarks/results/label-errors.md).
    """
    if found:
        text = (
            f"{tell(len(found), 'label', 'labels')} of {pictures:,} pictures that the model contradicts, the most "
            "suspect first; look at them, mend what is wrong, and leave what the model has wrong."
        )
        ranked = sorted(found, key=lambda suspect: suspect.label_probability)
        yield Finding("suspect-label", "warning", text, tuple(ranked))


def _suspect(name: str, part: str, labels: tuple[str, str], shares: tuple[float, float]) -> Suspect:
    (label, suggested), (own, other) = labels, shares
    return Suspect(
        (name,),
        f"{part}: labelled {label} ({own:.1%}), looks like {suggested} ({other:.1%})",
        label=label,
        suggested=suggested,
        label_probability=own,
        suggested_probability=other,
    )
