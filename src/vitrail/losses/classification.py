"""Cross-entropy on soft targets, one row per picture."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def classification_loss(
    logits: Float[Tensor, "b classes"],
    targets: Float[Tensor, "b classes"],
    *,
    sigmoid: bool = False,
    label_smoothing: float = 0.0,
    class_weights: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, " b"]:
    """Return one loss per picture.

    Args:
        logits: The model's output.
        targets: Probabilities per class: one-hot rows, mixed rows, or 0/1 rows of several labels.
        sigmoid: Independent binary cross-entropies, summed over classes (as big_vision's `sigmoid_xent`),
            instead of softmax cross-entropy.
        label_smoothing: Share of the target spread over all classes (Szegedy et al., 2016, arXiv 1512.00567,
            section 7); with `sigmoid`, targets move by half of it towards 0.5.
        class_weights: Factor per class.
    """
    logits = logits.float()
    if sigmoid:
        smoothed = targets * (1 - label_smoothing) + 0.5 * label_smoothing
        per_class = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
        return (per_class if class_weights is None else per_class * class_weights).sum(dim=-1)
    smoothed = targets * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    per_class = -smoothed * torch.log_softmax(logits, dim=-1)
    return (per_class if class_weights is None else per_class * class_weights).sum(dim=-1)
