"""Semantic softmax: learning from classes that lie in a tree."""

from dataclasses import dataclass

from vitrail.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticConfig:
    """Semantic softmax: one softmax per level of a class tree (ImageNet-21K-P)."""

    tree: str = "cifar100"
    """Class tree: `cifar100` for its 20 superclasses, a .json, a folder of nested class folders, or MIIL's .pth."""
    label_smoothing: float = 0.2
    """Share of the target spread over all classes of a level."""
    deepest: bool = True
    """Train the deepest level too; the released code never does."""
    teacher: str | None = None
    """Model whose answers are learned beside the labels: a model folder or weight file of the same classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--recipe.label-smoothing must lie in [0, 1), not {self.label_smoothing}.")
        if not self.tree:
            raise UserError("--recipe.tree must name a class tree: cifar100, or a file or folder.")
