"""Mixing pictures and their targets in pairs: mixup and CutMix."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.data.operations import pictures_at_once, rectangle_masks
from vitrail.data.random import Draw, beta, choice, uniform


def mix(
    images: Float[Tensor, "b c h w"],
    targets: Float[Tensor, "b classes"],
    keys: Int[Tensor, " b"],
    *,
    mixup: float,
    cutmix: float,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
    """Mix every picture with the one before it in the batch, and the targets in the same proportion.

    Mixup (Zhang et al., 2018, arXiv 1710.09412) averages pixels; of the two shares, the larger goes to the picture
    itself, as in big_vision. CutMix (Yun et al., 2019, arXiv 1905.04899) pastes a rectangle of the neighbour, cut off
    at the edges; targets follow the area that was pasted. With both on, the batch takes either one, at even odds.

    Args:
        images: Normalised pictures, overwritten.
        targets: A row of class probabilities per picture.
        keys: What each picture's share is drawn from.
        mixup: Alpha of the Beta distribution of the shares; 0 is off.
        cutmix: Alpha for CutMix.
    """
    size = images.shape[2], images.shape[3]
    if cutmix:
        weights = _cutmix_weights(keys, cutmix, size)
        if mixup:
            # Both are drawn and one is kept, so that a GPU need not report the choice.
            pick = uniform(keys[:1], Draw.MIX_CHOICE) < 0.5
            weights = torch.where(pick.view(1, 1, 1, 1), _mixup_weights(keys, mixup), weights)
    else:
        weights = _mixup_weights(keys, mixup)
    shares = weights.mean(dim=(1, 2, 3))[:, None]
    _mix_with_the_one_before(images, weights)
    return images, torch.lerp(targets.roll(1, dims=0), targets, shares)


def _mix_with_the_one_before(images: Tensor, weights: Tensor) -> None:
    """Make `lerp(images.roll(1, dims=0), images, weights)` of the pictures, in place and from the last to the first.

    New memory for a whole batch would cost a CPU more than the mixing.
    """
    last, most = images[-1:].clone(), pictures_at_once(images)
    for start in reversed(range(0, len(images), most)):
        part, shares = images[start : start + most], weights[start : start + most]
        before = images[start - 1 : start - 1 + len(part)] if start else torch.cat([last, part[:-1]])
        torch.lerp(before if len(part) == 1 else before.clone(), part, shares, out=part)


def _mixup_weights(keys: Tensor, alpha: float) -> Float[Tensor, "b 1 1 1"]:
    share = beta(keys, Draw.MIXUP, alpha)
    return torch.maximum(share, 1.0 - share).view(-1, 1, 1, 1)


def _cutmix_weights(keys: Tensor, alpha: float, size: tuple[int, int]) -> Float[Tensor, "b 1 h w"]:
    """Return 0 inside the rectangle that the neighbour fills and 1 elsewhere."""
    side = torch.sqrt(1.0 - beta(keys, Draw.CUTMIX, alpha))
    height, width = ((side * n).floor().long() for n in size)
    # The middle falls anywhere, so a rectangle may be cut off (appendix A of the paper).
    top = choice(keys, Draw.CUTMIX_TOP, size[0]) - height // 2
    left = choice(keys, Draw.CUTMIX_LEFT, size[1]) - width // 2
    return 1.0 - rectangle_masks(top, left, height, width, size)[:, None].float()
