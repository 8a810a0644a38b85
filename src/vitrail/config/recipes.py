"""Recipes that learn from labels alone: supervised learning, and sharpness-aware minimization."""

import math
from dataclasses import dataclass
from typing import Literal

from vitrail.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What recipes that learn from labels share."""

    loss: Literal["auto", "softmax", "sigmoid"] = "auto"
    """`auto`: softmax cross-entropy, sigmoid when pictures carry several labels."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""
    class_weights: Literal["none", "auto"] = "none"
    """`auto`: weigh each class by the inverse of its number of training pictures, mean 1 over the pictures."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--recipe.label-smoothing must lie in [0, 1), not {self.label_smoothing}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedConfig(LossConfig):
    """Supervised learning from labelled pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamConfig(LossConfig):
    """Sharpness-aware minimization: descend by the gradient of the worst weights nearby. An update costs two passes.

    SAM: Foret et al., 2021 (arXiv 2010.01412). ASAM: Kwon et al., 2021 (arXiv 2102.11600). GSAM: Zhuang et al., 2022
    (arXiv 2203.08065). Each process perturbs by the gradient of its own pictures (m-sharpness, SAM section 4.1); where
    they share one set of weights (`--loop.sharding`), all by that of all.
    """

    variant: Literal["sam", "asam", "gsam"] = "sam"
    """`asam` measures the neighbourhood in units of the weights' size; `gsam` also closes the gap to the worst loss."""
    rho: float = 0.05
    """Radius of the neighbourhood: 0.05 to 0.2 for `sam`, 0.5 to 1 for `asam`; of `gsam` (0.6 for ViT on ImageNet) at
    the peak learning rate."""
    rho_min: float | None = None
    """`gsam`: radius at learning rate 0, linear in the rate between it and `rho`; left out, the radius is constant."""
    alpha: float = 0.6
    """`gsam`: share of the clean gradient's part orthogonal to the perturbed one that is taken off the latter."""
    eta: float = 0.01
    """`asam`: added to the weights' size, so that weights of 0 move, too."""
    accumulation: Literal["micro", "full"] = "micro"
    """Pictures perturbed together, with `--loop.accumulation`: each micro-batch, as the paper's accelerators do with
    theirs, or `full`: all of the process, as without accumulation."""
    l2_penalty: float = 0.0
    """Factor on half the squared norm of all weights, biases and norms in the loss, where the authors' code has its
    weight decay: it bends the perturbation as well. Set --optim.weight-decay to 0 beside it."""

    def __post_init__(self) -> None:
        LossConfig.__post_init__(self)  # a dataclass with slots is another class than the one `super()` knows
        for name in ("rho", "alpha", "l2_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = name.replace("_", "-")
                raise UserError(f"--recipe.{flag} must be a number of at least 0, not {getattr(self, name)}.")
        if not 0 < self.eta < math.inf:
            raise UserError(f"--recipe.eta must be positive, not {self.eta}.")
        if self.rho_min is not None:
            if self.variant != "gsam":
                raise UserError("--recipe.rho-min needs --recipe.variant gsam; elsewhere the radius is constant.")
            if not 0 <= self.rho_min <= self.rho:
                raise UserError(f"--recipe.rho-min must lie between 0 and rho, {self.rho}, not {self.rho_min}.")
