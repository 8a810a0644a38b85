"""Recipes: how a model learns. `build_learner` turns a recipe's configuration into its `Learner`."""

import copy
from typing import Any

import numpy as np
import torch

from vitrail.config.distillation import DistillationConfig
from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.recipes import SamConfig, SupervisedConfig
from vitrail.config.run import RunConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.data.augment import Augment
from vitrail.errors import UserError
from vitrail.models.base import ImageModel
from vitrail.parallel import Precision
from vitrail.recipes.base import Learner, Place, move
from vitrail.recipes.distillation import DistillationLearner
from vitrail.recipes.masked import MaskedLearner
from vitrail.recipes.meta_pseudo_labels import MetaPseudoLabelsLearner
from vitrail.recipes.sam import SamLearner
from vitrail.recipes.semantic import SemanticLearner
from vitrail.recipes.supervised import SupervisedLearner

__all__ = ["Learner", "build_learner"]


def build_learner(
    config: RunConfig,
    model: ImageModel,
    *,
    class_counts: np.ndarray,
    device: torch.device,
    precision: Precision,
    teacher: ImageModel | None = None,
    place: Place = move,
) -> Learner:
    """Return the learner of a run.

    Args:
        config: The run.
        model: The model to train; its preprocessing says what size pictures have.
        class_counts: Training pictures per class.
        device: Where to compute.
        precision: Of the matrix products.
        teacher: The model whose answers are learned from, where the recipe names one.
        place: Puts models that learn onto the device.

    Raises:
        UserError: When settings ask of the recipe what it cannot do.
    """
    if config.optim.in_backward:
        _require_one_pass(config, precision)
    parts: dict[str, Any] = {
        "augment": Augment(config.augment, model.preprocessing),
        "class_counts": class_counts,
        "device": device,
        "precision": precision,
        "place": place,
    }
    match config.recipe:
        case SupervisedConfig():
            return SupervisedLearner(model, config.recipe, config.optim, **parts)
        case SamConfig():
            return SamLearner(model, config.recipe, config.optim, **parts)
        case SemanticConfig():
            return SemanticLearner(model, config.recipe, config.optim, **parts, teacher=teacher)
        case DistillationConfig():
            return DistillationLearner(model, config.recipe, config.optim, **parts, teacher=teacher)
        case MaskedConfig():
            del parts["class_counts"]
            return MaskedLearner(model, config.recipe, config.optim, **parts)
        case MetaPseudoLabelsConfig():
            del parts["class_counts"]
            if config.find_lr:
                raise UserError(
                    "--find-lr watches how fast a loss falls, but what the student learns moves with its teacher: "
                    "leave it out, and set --optim.lr."
                )
            if config.loop.patience is not None:
                raise UserError(
                    "--loop.patience would end a run of Meta Pseudo Labels before its student has learned: it waits "
                    "for its teacher at first, and is fine-tuned in the end. Leave it out."
                )
            # From weights at hand both start alike: they know more of the classes than a random teacher would teach.
            twin = copy.deepcopy(model) if config.init is not None else None
            return MetaPseudoLabelsLearner(model, config.recipe, config.optim, **parts, teacher=twin)


def _require_one_pass(config: RunConfig, precision: Precision) -> None:
    """Refuse updates in the backward pass where its gradients are not yet those of the update."""
    if isinstance(config.recipe, SamConfig | MetaPseudoLabelsConfig):
        reason = "this recipe takes several backward passes for an update"
    elif config.loop.accumulation > 1:
        reason = "--loop.accumulation sums the gradients of several backward passes"
    elif precision == "fp16":
        reason = "gradients in fp16 are scaled until the pass is over: take --loop.precision bf16 or fp32"
    else:
        return
    raise UserError(f"--optim.in-backward updates weights within a backward pass, but {reason}.")
