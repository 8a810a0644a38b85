"""Meta Pseudo Labels: learning from few labels and many pictures, taught by a teacher that learns from its pupil."""

import math
from dataclasses import dataclass
from typing import Literal

from vitrail.config.checks import require_least
from vitrail.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaPseudoLabelsConfig:
    """Meta Pseudo Labels with UDA: a teacher labels pictures that have no labels, a student learns from these alone.

    Pham et al., 2021 (arXiv 2003.10580); UDA: Xie et al., 2020 (arXiv 1904.12848). The student is what is evaluated
    and shipped. The teacher is a model of the same kind; with `--init` both start from the weights given.
    """

    unlabelled_ratio: int = 7
    """Pictures without labels per labelled one: an update learns from `--loop.batch-size` labelled pictures and so many
    times as many others."""
    label_smoothing: float = 0.15
    """Share of the target spread over all classes, where the teacher learns from labels."""
    uda_weight: float = 8.0
    """Factor on the teacher's UDA loss: that it says of a strong view what it says of the weak one."""
    uda_steps: int = 5000
    """Updates over which that factor grows from 0; at most a fifth of the run."""
    uda_temperature: float = 0.7
    """The teacher's answers to weak views are sharpened by this temperature, for UDA."""
    uda_threshold: float = 0.6
    """UDA learns from pictures whose largest sharpened probability is at least this."""
    labels: Literal["hard", "sampled"] = "hard"
    """Pseudo labels: the class the teacher thinks likeliest, or one drawn from its probabilities."""
    feedback: Literal["meta", "released", "none"] = "meta"
    """What the teacher hears of its labels: how much they helped the student with labelled pictures (`meta`); nothing
    (`none`, pure UDA); or what the released code tells it, which comes to nothing, beside soft labels (`released`)."""
    teacher_lr_ratio: float = 1.0
    """The teacher's learning rate in units of the student's, `--optim.lr`."""
    student_wait: int = 3000
    """Updates before the student learns; its warm-up follows. At most a fifth of the run."""
    finetune_steps: int = 1000
    """Updates at the end of the run in which the student, averaged if `--optim.ema` is on, learns from labelled
    pictures alone; at most a fifth of the run."""
    finetune_lr: float = 1e-5
    """Learning rate of these."""

    def __post_init__(self) -> None:
        require_least(self, unlabelled_ratio=1, uda_steps=0, student_wait=0, finetune_steps=0)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--recipe.label-smoothing must lie in [0, 1), not {self.label_smoothing}.")
        if not 0 <= self.uda_threshold <= 1:
            raise UserError(f"--recipe.uda-threshold must lie in [0, 1], not {self.uda_threshold}.")
        if not 0 <= self.uda_weight < math.inf:
            raise UserError(f"--recipe.uda-weight must be a number of at least 0, not {self.uda_weight}.")
        for name in ("uda_temperature", "teacher_lr_ratio", "finetune_lr"):
            if not 0 < getattr(self, name) < math.inf:
                flag = name.replace("_", "-")
                raise UserError(f"--recipe.{flag} must be a positive number, not {getattr(self, name)}.")
