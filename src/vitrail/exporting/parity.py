"""Whether an exported file answers as the model does."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from vitrail.data.base import Picture
from vitrail.data.view import evaluation_view
from vitrail.exporting.pictures import Sample
from vitrail.models import ImageModel

TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of a logit, relative to the largest logit, that counts as agreement. In int8 classes alone count:
a single logit says little where all are rounded to 256 values."""
AGREEMENT = {"fp32": 1.0, "fp16": 0.98, "bf16": 0.98, "int8": 0.98}
"""Least share of pictures for which the same class comes first; in int8 only of those as they are. The odd ones are
there for the view, which is computed in 32 bits; models are not sure of anything in a picture of six pixels."""
SPREAD = 0.01
"""Of the largest logit: what answers must differ by from picture to picture. Else their agreement says nothing."""

Logits = Float[np.ndarray, "n classes"]
Answer = Callable[[UInt8[np.ndarray, "b h w c"]], Float[np.ndarray, "b classes"]]
"""What the script beside the file calls `logits`."""


@dataclass(frozen=True)
class Kind:
    """How pictures of one kind are answered."""

    name: str
    pictures: int
    difference: float
    """Largest of any logit, relative to the largest logit of all pictures."""
    agreeing: int
    """Pictures for which the same class comes first."""


@dataclass(frozen=True)
class Parity:
    """How a file's answers compare with the model's."""

    kinds: tuple[Kind, ...]
    complaints: tuple[str, ...]
    """Why they may not count as equal; empty when they may."""

    @property
    def pictures(self) -> int:
        """Pictures compared."""
        return sum(kind.pictures for kind in self.kinds)

    @property
    def difference(self) -> float:
        """Largest difference of a logit, relative to the largest logit. NaN when there is a NaN."""
        return float(np.max([kind.difference for kind in self.kinds]))

    @property
    def agreement(self) -> float:
        """Share of pictures for which the same class comes first."""
        return sum(kind.agreeing for kind in self.kinds) / self.pictures

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        total = {"pictures": self.pictures, "difference": self.difference, "top1_agreement": self.agreement}
        return {**total, "kinds": [asdict(kind) for kind in self.kinds], "complaints": list(self.complaints)}


def compare(
    model: ImageModel,
    samples: Sequence[Sample],
    precision: str,
    *,
    pixels: Callable[[Path], Picture],
    answer: Answer,
) -> Parity:
    """Ask model and file about the same pictures.

    Args:
        model: On the CPU, in evaluation mode.
        samples: The pictures.
        precision: Of the file.
        pixels: What the script beside the file reads a picture with.
        answer: The file.
    """
    kinds, asked, misread = list[str](), list[Picture](), list[str]()
    for sample in samples:
        kinds.append(sample.kind)
        asked.append(sample.pixels)
        if not np.array_equal(pixels(sample.path), sample.pixels):
            misread.append(sample.path.name)
    found = [answer(picture[None])[0] for picture in asked]
    together = np.stack([asked[0], asked[0][::-1], asked[0][:, ::-1]])
    found.extend(answer(together))
    kinds.extend(["in a batch"] * len(together))
    with torch.inference_mode():
        views = (evaluation_view(picture, model.preprocessing) for picture in (*asked, *together))
        expected = [_logits(model, view) for view in views]
    parity = judge(np.stack(expected), np.stack(found), kinds, precision)
    if not misread:
        return parity
    complaint = f"the script beside the file reads {len(misread)} pictures otherwise than Vitrail ({misread[0]}, ...)"
    return Parity(parity.kinds, (*parity.complaints, complaint))


def judge(expected: Logits, found: Logits, kinds: Sequence[str], precision: str) -> Parity:
    """Return how answers compare with those expected.

    Args:
        expected: By the model.
        found: From the file.
        kinds: Of the pictures; the first one's is that of pictures as they are.
        precision: Of the file: it says what counts as agreement.
    """
    scale = float(np.abs(expected).max())
    differences = np.abs(found - expected).max(axis=1) / (scale or 1.0)
    same = found.argmax(axis=1) == expected.argmax(axis=1)
    names = np.array(kinds)
    rows = tuple(
        Kind(name, int(of.sum()), float(differences[of].max()), int(same[of].sum()))
        for name in dict.fromkeys(kinds)
        if (of := names == name).any()
    )
    complaints = list[str]()
    if not np.isfinite(expected).all():
        complaints.append("the model itself answers NaN or infinity; mend its weights")
    spread = float(np.ptp(expected, axis=0).max())
    if spread <= SPREAD * scale:
        complaints.append(
            f"the model answers all pictures alike (its logits differ by {spread:.1e}, the largest is {scale:.1e}), so "
            "agreement would say nothing: train it, or name pictures with --data that differ"
        )
    elif expected.shape[1] > 1 and precision != "fp32" and len(set(expected.argmax(axis=1).tolist())) == 1:
        complaints.append("one class comes first for all pictures: name pictures with --data that differ")
    bound, least = TOLERANCE.get(precision), AGREEMENT[precision]
    if not (worst := float(differences.max())) <= (np.inf if bound is None else bound):  # NaN is no agreement
        complaints.append(f"logits differ by {worst:.1e} of the largest, more than {bound or np.inf:.0e}")
    share = float(same[names == kinds[0]].mean() if precision == "int8" else same.mean())
    if share < least:
        complaints.append(f"the same class comes first for {share:.1%} of the pictures, less than {least:.0%}")
    return Parity(rows, tuple(complaints))


def _logits(model: ImageModel, view: torch.Tensor) -> Float[np.ndarray, " classes"]:
    answer = model(view[None])
    assert isinstance(answer, torch.Tensor)  # WithLoss comes in training only
    return answer[0].numpy()
