"""Distillation: supervised learning beside a teacher's answers (Hinton et al., arXiv 1503.02531; DeiT, 2012.12877)."""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from vitrail.config.distillation import DistillationConfig
from vitrail.config.run import OptimConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.errors import UserError
from vitrail.losses import hard_distance, soft_distance
from vitrail.models.base import ImageModel, WithLoss
from vitrail.parallel import Precision
from vitrail.recipes.base import Place, move
from vitrail.recipes.teacher import TaughtLearner

HARD_SHARE = 0.5
"""Share of the labels' loss in hard distillation (DeiT, section 4)."""


@final
class DistillationLearner(TaughtLearner):
    """The labels' loss and the teacher's, weighed, then one clipped update."""

    def __init__(
        self,
        model: ImageModel,
        recipe: DistillationConfig,
        optim: OptimConfig,
        *,
        augment: Augment,
        class_counts: np.ndarray,
        device: torch.device,
        precision: Precision,
        teacher: ImageModel | None,
        place: Place = move,
    ) -> None:
        """Put the teacher beside the model.

        Args:
            model: The student, which is shipped.
            recipe: How to learn from the teacher.
            optim: Optimizer and schedule.
            augment: From stored pixels to pictures.
            class_counts: Training pictures per class.
            device: Where to compute.
            precision: Of the matrix products, the teacher's too.
            teacher: The model at `recipe.teacher`.
            place: Puts the model onto the device.

        Raises:
            UserError: When there is no teacher, or its classes or channels are not the data's, or pictures may carry
                several labels.
        """
        if teacher is None:
            raise UserError(
                "distillation needs a teacher: name a model folder (as RUN/best of a larger model that was fine-tuned "
                "on this data), a weight file or a name with weights at hand with --recipe.teacher."
            )
        if model.multi_label or teacher.multi_label:
            raise UserError("distillation needs one label per picture, and a teacher that learned so.")
        super().__init__(
            model,
            recipe,
            optim,
            augment=augment,
            class_counts=class_counts,
            device=device,
            precision=precision,
            teacher=teacher,
            place=place,
        )
        self._distillation = recipe
        self._distance = torch.zeros((), device=device)

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Make one update; `distance` is the teacher's part of the loss, before it is weighed."""
        self._distance = torch.zeros_like(self._distance)
        scalars = super().step(micro_batches)
        return scalars | {"distance": self._distance / sum(len(batch) for batch in micro_batches)}

    def _loss(self, answer: Tensor | WithLoss, targets: Tensor, pictures: int) -> Tensor:
        logits, own = answer if isinstance(answer, WithLoss) else (answer, None)
        labelled = super()._loss(logits, targets, pictures)
        if self._distillation.kind == "soft":
            share = self._distillation.alpha
            taught = soft_distance(logits, self._wanted, self._distillation.temperature).sum()
        else:
            share = HARD_SHARE
            taught = hard_distance(logits, self._wanted).sum()
        self._distance += taught.detach()
        loss = share * labelled + (1 - share) * taught
        return loss if own is None else loss + pictures * own
