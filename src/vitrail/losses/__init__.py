"""Training losses."""

from vitrail.losses.classification import classification_loss
from vitrail.losses.distillation import hard_distance, soft_distance
from vitrail.losses.semantic import SemanticSoftmaxLoss

__all__ = ["SemanticSoftmaxLoss", "classification_loss", "hard_distance", "soft_distance"]
