"""Losses against torch's own and against numbers worked out by hand."""

import math

import torch
from torch.nn import functional as F

from vitrail.losses import classification_loss


def test_softmax_loss_equals_torch_with_smoothing() -> None:
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    ours = classification_loss(logits, F.one_hot(labels, 5).float(), label_smoothing=0.1)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="none"))


def test_class_weights_scale_the_loss_of_their_class() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([0.5, 1.0, 2.0])
    ours = classification_loss(logits, F.one_hot(labels, 3).float(), class_weights=weights)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, weight=weights, reduction="none"))


def test_sigmoid_loss_sums_over_classes() -> None:
    loss = classification_loss(torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 1.0, 0.0]]), sigmoid=True)
    torch.testing.assert_close(loss, torch.tensor([4 * math.log(2.0)]))


def test_mixed_targets_give_the_mean_of_both_losses() -> None:
    logits = torch.randn(1, 3)
    one, two = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 0, 1.0]])
    mixed = classification_loss(logits, 0.3 * one + 0.7 * two)
    torch.testing.assert_close(mixed, 0.3 * classification_loss(logits, one) + 0.7 * classification_loss(logits, two))
