"""Semantic softmax: supervised learning in which a label stands for its superclasses too (ImageNet-21K-P)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.config.run import OptimConfig, SupervisedConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.data.class_tree import read_class_tree
from vitrail.errors import UserError
from vitrail.losses import SemanticSoftmaxLoss
from vitrail.models.base import ImageModel, WithLoss
from vitrail.parallel import Precision
from vitrail.recipes.base import Place, move
from vitrail.recipes.teacher import TaughtLearner
from vitrail.sharding import whole


@final
class SemanticLearner(TaughtLearner):
    """Semantic softmax on a class tree, from labels and, if wanted, a teacher.

    Superclasses that are not classes of the data, as all of CIFAR-100's, need outputs to learn: while it trains, the
    head has rows for them after those of the classes. They begin at zero, as ViT's head does. What is evaluated and
    shipped is the model without these rows: it answers with the classes of the data, in their order.
    """

    def __init__(
        self,
        model: ImageModel,
        recipe: SemanticConfig,
        optim: OptimConfig,
        *,
        augment: Augment,
        class_counts: np.ndarray,
        device: torch.device,
        precision: Precision,
        teacher: ImageModel | None = None,
        place: Place = move,
    ) -> None:
        """Read the tree and widen the model's head to it.

        Args:
            model: The model to train; its labels are found in the tree by name.
            recipe: The tree, and how to learn from it.
            optim: Optimizer and schedule.
            augment: From stored pixels to pictures. Must not mix pictures.
            class_counts: Training pictures per class.
            device: Where to compute.
            precision: Of the matrix products.
            teacher: The model at `recipe.teacher`.
            place: Puts the model onto the device.

        Raises:
            UserError: When tree, data, augmentation or teacher do not fit.
        """
        _require_one_label(model, augment)
        tree = read_class_tree(recipe.tree).for_classes(model.labels)
        if all(len(chain) == 1 for chain in tree):
            raise UserError(
                f"the class tree {recipe.tree} has no class above another one of this data, so there is nothing "
                "semantic in it; train with plain supervised learning, or name another --recipe.tree."
            )
        _widen_head(model, len(tree))
        super().__init__(
            model,
            SupervisedConfig(loss="softmax"),
            optim,
            augment=augment,
            class_counts=class_counts,
            device=device,
            precision=precision,
            teacher=teacher,
            place=place,
        )
        self._semantic = SemanticSoftmaxLoss(tree, recipe.label_smoothing, deepest=recipe.deepest).to(device)
        self._right, self._pairs = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        if teacher is not None:
            own = tree.for_classes(model.labels, ancestors=False)
            self._taught = SemanticSoftmaxLoss(own, deepest=recipe.deepest or len(own) < len(tree)).to(device)

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        self._right.zero_()
        self._pairs.zero_()
        scalars = super().step(micro_batches)
        return scalars | {"semantic_top1": self._right / self._pairs.clamp(min=1)}

    @contextmanager
    def shipped_weights(self) -> Iterator[None]:
        """Yield with `model` as it ships: averaged weights if there are any, no rows of mere superclasses."""
        with super().shipped_weights():
            wide, classes = _head(self.model), self.model.config.num_classes
            if wide.out_features == classes:
                yield
                return
            self.model.head = _with_rows(wide, classes)
            try:
                yield
            finally:
                self.model.head = wide

    def _loss(self, answer: Tensor | WithLoss, targets: Tensor, pictures: int) -> Tensor:
        """Return the loss summed over the pictures, and count what was right.

        The teacher's part is a mean over the pictures like the other one, and counts as much: how the authors put both
        together has not been released.
        """
        logits, own = answer if isinstance(answer, WithLoss) else (answer, None)
        labels = targets.argmax(dim=1)
        right, pairs = self._semantic.count_right(logits, labels)
        self._right += right
        self._pairs += pairs
        loss = pictures * self._semantic(logits, labels)
        if self._teacher is not None:
            loss = loss + self._taught.distill(logits[:, : self.model.config.num_classes], self._wanted)
        return loss if own is None else loss + pictures * own


def _require_one_label(model: ImageModel, augment: Augment) -> None:
    if model.multi_label:
        raise UserError("semantic softmax needs one label per picture; this data may give several.")
    if augment.config.mixup or augment.config.cutmix:
        raise UserError(
            "semantic softmax learns from whole labels, not from mixed ones: set --augment.mixup 0 --augment.cutmix 0."
        )


def _widen_head(model: ImageModel, outputs: int) -> None:
    """Add rows of zeros to the head; one that was widened already stays as it is."""
    head = _head(model)
    if head.out_features < outputs:
        model.head = _with_rows(head, outputs)


def _head(model: ImageModel) -> nn.Linear:
    head = model.head
    assert isinstance(head, nn.Linear)  # by the contract of ImageModel
    return head


def _with_rows(head: nn.Linear, rows: int) -> nn.Linear:
    """Return a head of other length: cut off, or filled up with zeros."""
    empty = nn.Linear(head.in_features, rows, bias=head.bias is not None, device="meta", dtype=head.weight.dtype)
    other = empty.to_empty(device=head.weight.device)  # drawing numbers would shift everything random after it
    kept = min(rows, head.out_features)
    with torch.no_grad():
        for old, new in zip(head.parameters(), other.parameters(), strict=True):
            new.zero_()
            new[:kept] = whole(old)[:kept]
            new.requires_grad_(old.requires_grad)
    return other
