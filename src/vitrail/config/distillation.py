"""Distillation: learning from the answers of a larger model."""

import math
from dataclasses import dataclass
from typing import Literal

from vitrail.config.recipes import LossConfig
from vitrail.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig(LossConfig):
    """Distillation: learn from a teacher's answers beside the labels. The teacher sees the same augmented pictures.

    `soft`: Hinton et al., 2015 (arXiv 1503.02531, section 2). `hard`: DeiT (Touvron et al., 2021, arXiv 2012.12877,
    section 4), without its distillation token, a second class token with a head of its own: here the one head learns
    from both, the paper's "hard distillation" in table 3.
    """

    teacher: str | None = None
    """The model to learn from: a model folder, a weight file, or a name with weights at hand. It must know the classes
    of the data by name; its picture size and normalisation may be others."""
    kind: Literal["soft", "hard"] = "soft"
    """Learn the teacher's probabilities, or its likeliest class as a second label that counts as much as the first."""
    temperature: float = 4.0
    """`soft`: divides the logits of both models; the higher, the more the unlikely classes tell."""
    alpha: float = 0.1
    """`soft`: share of the labels' loss; the rest is the teacher's, times the squared temperature."""

    def __post_init__(self) -> None:
        LossConfig.__post_init__(self)  # a dataclass with slots is another class than the one `super()` knows
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--recipe.temperature must be positive, not {self.temperature}.")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--recipe.alpha is a share, in [0, 1], not {self.alpha}.")
