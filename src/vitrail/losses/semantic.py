"""Semantic softmax: classes in a tree, an independent softmax for every level of it.

Ridnik et al., 2021, "ImageNet-21K Pretraining for the Masses" (arXiv 2104.10972), section 3.2, and its code
(Alibaba-MIIL/ImageNet21K, src_files/semantic). A picture of an oak is a picture of a tree, too; one softmax over both
would make them rivals.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UserError

MAX_WEIGHT = 20.0
"""Largest weight of a level (`max_normalization_factor` of the code)."""
CONFIDENT = 20
"""A teacher is as sure as its best 1 / 20 of a level's classes are likely together."""
NONE = -1


class SemanticSoftmaxLoss(nn.Module):
    """Cross-entropy summed over the levels of a class tree, each with its weight.

    The outputs of a model are all classes of the tree. Those of one depth make a level, levels of a single class are
    left out. The label and each of its ancestors is the target at its own level; below the label there is none, and
    the picture adds nothing there, though the mean is over all pictures. The weight of the level of depth i is the
    number of classes divided by the number of those of depth i or more, 20 at most.

    The authors' code differs in two ways. It never visits the deepest level, see `deepest`. And it stops with an error
    where a level of a single class lies above one that it visits; here only that level is left out, and the weights of
    the others still go by their depth.
    """

    columns: Tensor
    """Outputs in the order of levels."""
    targets: Tensor
    """Place within each level of a class or its ancestor: classes x levels, -1 for none."""

    def __init__(
        self, class_tree: Sequence[Sequence[int]], label_smoothing: float = 0.2, *, deepest: bool = True
    ) -> None:
        """Work out levels, weights and targets.

        Args:
            class_tree: Per class, the numbers of itself, its parent, and so on to its root: a
                `vitrail.data.class_tree.ClassTree`, or `class_tree_list` of the authors' file.
            label_smoothing: Share of a target spread over all classes of its level.
            deepest: Whether the deepest level is one of them. The authors' code leaves it out, so that nothing
                teaches a model to tell these classes apart: in CIFAR-100's tree, all hundred.

        Raises:
            UserError: When the lists are not those of a tree, or no level has two classes.
        """
        super().__init__()
        depths = _depths(class_tree)
        counts = [depths.count(depth) for depth in range(max(depths, default=0) + 1)]
        kept = [depth for depth in range(len(counts) if deepest else len(counts) - 1) if counts[depth] > 1]
        if not kept:
            raise UserError("no level of the class tree has two classes to tell apart.")
        self.label_smoothing = label_smoothing
        self.depths = tuple(kept)
        """Depth of each level."""
        self.sizes = [counts[depth] for depth in kept]
        """Classes of each level."""
        self.weights = tuple(min(len(depths) / sum(counts[depth:]), MAX_WEIGHT) for depth in kept)
        """Factor of each level's loss."""
        levels = {depth: [c for c, d in enumerate(depths) if d == depth] for depth in kept}
        place = {c: i for level in levels.values() for i, c in enumerate(level)}
        # Reversed, a list of ancestors has at each index the one of that depth.
        rows = [[place[chain[-1 - depth]] if depth < len(chain) else NONE for depth in kept] for chain in class_tree]
        self.register_buffer("columns", torch.tensor([c for d in kept for c in levels[d]]), persistent=False)
        self.register_buffer("targets", torch.tensor(rows), persistent=False)

    def forward(self, logits: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Return the loss, mean over the pictures; computed in fp32 (or fp64) whatever the logits are.

        Args:
            logits: One output per class of the tree.
            labels: The class of each picture.

        Raises:
            UserError: When there is not one output per class of the tree.
        """
        total = logits.new_zeros((), dtype=_wide(logits))
        for level, target, weight in zip(self.levels(logits), self.level_targets(labels), self.weights, strict=True):
            log_likely = level.log_softmax(dim=1)
            own = log_likely.gather(1, target.clamp(min=0)[:, None])[:, 0]
            smoothed = (1 - self.label_smoothing) * own + self.label_smoothing * log_likely.mean(dim=1)
            total = total - weight * torch.where(target == NONE, 0.0, smoothed).mean()
        return total

    def distill(
        self, logits: Float[Tensor, "b classes"], teacher_logits: Float[Tensor, "b classes"]
    ) -> Float[Tensor, ""]:
        """Return how far the probabilities of every level are from a teacher's: squared, summed, not averaged.

        The authors' semantic knowledge distillation (section 3.3): each picture counts at each level as much as the
        teacher is sure there, by the probability of its likeliest twentieth of the classes. Levels have no other
        weight. No gradient reaches the teacher.

        Raises:
            UserError: When there is not one output per class of the tree.
        """
        total = logits.new_zeros((), dtype=_wide(logits))
        for level, taught in zip(self.levels(logits), self.levels(teacher_logits.detach()), strict=True):
            wanted = taught.softmax(dim=1)
            sure = wanted.topk(math.ceil(wanted.shape[1] / CONFIDENT), dim=1).values.sum(dim=1, keepdim=True)
            total = total + (sure * (level.softmax(dim=1) - wanted).square()).sum()
        return total

    @torch.no_grad()
    def count_right(
        self, logits: Float[Tensor, "b classes"], labels: Int[Tensor, " b"]
    ) -> tuple[Int[Tensor, ""], Int[Tensor, ""]]:
        """Return how many pairs of picture and level have a target, and how many of these are right: right, all.

        Their ratio over a data set is semantic top-1, the accuracy that the paper reports of ImageNet-21K-P.
        """
        targets = self.level_targets(labels)
        best = torch.stack([level.argmax(dim=1) for level in self.levels(logits)])
        return (best == targets).sum(), (targets != NONE).sum()

    def levels(self, logits: Float[Tensor, "b classes"]) -> tuple[Tensor, ...]:
        """Return the logits of each level, in fp32 or wider.

        Raises:
            UserError: When there is not one per class of the tree.
        """
        if logits.shape[1] != len(self.targets):
            raise UserError(f"the class tree has {len(self.targets)} classes, but the model {logits.shape[1]} outputs.")
        return logits.to(_wide(logits)).index_select(1, self.columns.to(logits.device)).split(self.sizes, dim=1)

    def level_targets(self, labels: Int[Tensor, " b"]) -> Int[Tensor, "levels b"]:
        """Return the place within each level of a label or its ancestor, -1 for none."""
        return self.targets.to(labels.device)[labels].T


def _wide(logits: Tensor) -> torch.dtype:
    """Return the type to compute in: sums over ten thousand classes are beyond half precision."""
    return torch.promote_types(logits.dtype, torch.float32)


def _depths(class_tree: Sequence[Sequence[int]]) -> list[int]:
    """Return the depth of each class.

    Raises:
        UserError: When a list does not begin with its own class, or has an ancestor at another depth than its own.
    """
    depths = [len(chain) - 1 for chain in class_tree]
    for label, chain in enumerate(class_tree):
        if not chain or chain[0] != label:
            raise UserError(f"class tree: the list of class {label} must begin with {label}, but is {list(chain)}.")
        for i, ancestor in enumerate(chain):
            if not 0 <= ancestor < len(depths) or depths[ancestor] != len(chain) - 1 - i:
                raise UserError(
                    f"class tree: class {label} has the ancestors {list(chain[1:])}, and {ancestor} is not where "
                    "its own list puts it."
                )
    return depths
