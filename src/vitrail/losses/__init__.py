"""Training losses."""

from vitrail.losses.classification import classification_loss
from vitrail.losses.semantic import SemanticSoftmaxLoss

__all__ = ["SemanticSoftmaxLoss", "classification_loss"]
