"""Recipes: how a model learns. `build_learner` turns a recipe's configuration into its `Learner`."""

import numpy as np
import torch

from vitrail.config.run import RunConfig, SupervisedConfig
from vitrail.data.augment import Augment
from vitrail.models.base import ImageModel
from vitrail.parallel import Precision
from vitrail.recipes.base import Learner
from vitrail.recipes.supervised import SupervisedLearner

__all__ = ["Learner", "build_learner"]


def build_learner(
    config: RunConfig, model: ImageModel, *, class_counts: np.ndarray, device: torch.device, precision: Precision
) -> Learner:
    """Return the learner of a run.

    Args:
        config: The run.
        model: The model to train; its preprocessing says what size pictures have.
        class_counts: Training pictures per class.
        device: Where to compute.
        precision: Of the matrix products.
    """
    augment = Augment(config.augment, model.preprocessing)
    match config.recipe:
        case SupervisedConfig():
            return SupervisedLearner(
                model,
                config.recipe,
                config.optim,
                augment=augment,
                class_counts=class_counts,
                device=device,
                precision=precision,
            )
