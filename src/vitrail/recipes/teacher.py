"""A teacher: a frozen model whose answers another one learns from."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config.recipes import LossConfig
from vitrail.config.run import OptimConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.data.view import Box, denormalise, normalise, resample
from vitrail.errors import UserError
from vitrail.models.base import ImageModel
from vitrail.parallel import Precision
from vitrail.recipes.base import Place, move
from vitrail.recipes.supervised import SupervisedLearner


@final
class Teacher:
    """Answers for a student's pictures, in the student's classes: frozen, in evaluation mode, without a gradient.

    It sees what the student sees, augmentation and mixing included, at its own picture size and normalisation (Beyer
    et al., 2022, arXiv 2106.05237: views that differ cost much of what a teacher is worth).
    """

    def __init__(self, model: ImageModel, student: ImageModel, device: torch.device) -> None:
        """Find the student's classes among the teacher's, and move the teacher to the device.

        Args:
            model: The teacher.
            student: Tells classes, size and normalisation of the pictures.
            device: Where to compute.

        Raises:
            UserError: When the teacher does not answer with all classes of the student, or reads other channels.
        """
        if model.preprocessing.channels != student.preprocessing.channels:
            raise UserError(
                f"the teacher reads pictures of {model.preprocessing.channels} channels, the model of "
                f"{student.preprocessing.channels}; set --model.channels to the teacher's."
            )
        columns = None if model.labels == student.labels else _columns(model.labels, student.labels)
        self._columns = None if columns is None else torch.tensor(columns, device=device)
        self._model = model.to(device).eval().requires_grad_(False)
        self._student = student.preprocessing

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Return the logits of the student's classes for the student's pictures."""
        logits = self._model(self.view(images))
        return logits if self._columns is None else logits.index_select(1, self._columns)

    def view(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c rows columns"]:
        """Return the student's pictures as the teacher reads them: all of each, resized, in the teacher's colours."""
        theirs = self._model.preprocessing
        # Outside of autocast: in half precision, the products of resizing would tell fewer levels apart.
        with torch.autocast(images.device.type, enabled=False):
            levels = denormalise(images, self._student)
            height, width = images.shape[2:]
            if (height, width) != theirs.image_size:
                whole = Box(0.0, 0.0, float(height), float(width))
                levels = resample(levels, whole, theirs.image_size, theirs.interpolation)
            return normalise(levels, theirs)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights, to tell whether a run goes on with the teacher that it was begun with."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class TaughtLearner(SupervisedLearner):
    """Supervised learning in which `_loss` finds the teacher's answers, if there is a teacher, in `_wanted`.

    The teacher is no part of a checkpoint, nor of the model that ships; a checkpoint knows its fingerprint.
    """

    def __init__(
        self,
        model: ImageModel,
        recipe: LossConfig,
        optim: OptimConfig,
        *,
        augment: Augment,
        class_counts: np.ndarray,
        device: torch.device,
        precision: Precision,
        teacher: ImageModel | None,
        place: Place = move,
    ) -> None:
        super().__init__(
            model,
            recipe,
            optim,
            augment=augment,
            class_counts=class_counts,
            device=device,
            precision=precision,
            place=place,
        )
        self._teacher = None if teacher is None else Teacher(teacher, model, device)
        self._wanted: Tensor

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        if self._teacher is None:
            return super().step(micro_batches)
        # For the update alone: the model is evaluated and copied in between, without its teacher.
        hook = self._replica.register_forward_pre_hook(self._ask_teacher)
        try:
            return super().step(micro_batches)
        finally:
            hook.remove()

    def _ask_teacher(self, student: nn.Module, arguments: tuple[Float[Tensor, "b c h w"]]) -> None:
        """Note what the teacher says of the pictures that the student is about to see."""
        assert self._teacher is not None
        self._wanted = self._teacher(arguments[0])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | ({} if self._teacher is None else {"teacher": self._teacher.fingerprint})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._teacher is not None and state.get("teacher") != self._teacher.fingerprint:
            raise UserError(
                "the teacher's weights have changed since the run was begun, so it cannot go on exactly. "
                "Bring the old ones back, or begin a new run in another --out."
            )
        super().load_state_dict(state)


def _columns(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
    """Return the place of each of our classes among theirs.

    Raises:
        UserError: When one is not there, or stands there more than once.
    """
    if not theirs:
        raise UserError(
            "the teacher's classes have no names; a model folder keeps them: train or adapt it on this data."
        )
    found = Counter(theirs)
    if wrong := [label for label in ours if found[label] != 1]:
        raise UserError(
            f"the teacher answers with {len(theirs)} classes, in which '{wrong[0]}' is "
            f"{'missing' if not found[wrong[0]] else 'there more than once'} ({len(wrong)} of the data's {len(ours)} "
            "classes are not there, or not once); train or adapt it on this data."
        )
    return [theirs.index(label) for label in ours]
