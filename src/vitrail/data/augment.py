"""Training augmentation of whole batches: every picture draws its own parameters from its key, on any device.

The same code runs on CPU and GPU. Nothing depends on a picture's place in the batch, save its partner in mixup.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int, Num, UInt8
from torch import Tensor

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data.base import Batch
from vitrail.data.boxes import random_sizes, training_boxes
from vitrail.data.mix import mix
from vitrail.data.operations import brightness, color, contrast, on_cpu, pictures_at_once, put, rectangle_masks
from vitrail.data.parts import by_parts, in_large_pages
from vitrail.data.policies import apply_policy
from vitrail.data.random import Draw, choice, normal_at, uniform
from vitrail.data.view import (
    Box,
    check_channels,
    denormalise,
    fits_view,
    mean_levels,
    normalise,
    resample,
    resample_boxes,
    view_levels,
)

ERASE_AREA, ERASE_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)


class Augment:
    """Batches of stored pixels to normalised pictures and soft targets."""

    def __init__(self, config: AugmentConfig, preprocessing: Preprocessing) -> None:
        self.config = config
        self.preprocessing = preprocessing
        self._view = augmented_view(config, preprocessing)

    @torch.no_grad()
    def __call__(self, batch: Batch, *, classes: int) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b classes"]]:
        """Return augmented, normalised pictures and one row of class probabilities (or 0/1 labels) per picture.

        Pad-and-crop comes after the policy, as in the code of AutoAugment for CIFAR and all that followed it.

        Raises:
            UserError: When the pictures' channels are not the model's.
        """
        config, keys, stored = self.config, batch.keys, batch.images
        check_channels(stored.shape[1], self.preprocessing)
        shape = stored.shape if batch.cropped else (*stored.shape[:2], *self._view.image_size)
        images = torch.empty(shape, device=stored.device)
        if on_cpu(stored):
            in_large_pages(images)
            by_parts(
                lambda part: self._augment(stored[part], keys[part], cropped=batch.cropped, out=images[part]),
                tuple(shape),
            )
        else:
            self._augment(stored, keys, cropped=batch.cropped, out=images)
        targets = batch.targets.float() if batch.targets.ndim == 2 else one_hot(batch.targets, classes)
        if config.mixup or config.cutmix:
            images, targets = mix(images, targets, keys, mixup=config.mixup, cutmix=config.cutmix)
        return self._at_model_size(images), targets

    def _augment(
        self,
        stored: UInt8[Tensor, "b c h w"],
        keys: Int[Tensor, " b"],
        *,
        cropped: bool,
        out: Float[Tensor, "b c rows columns"],
    ) -> None:
        """Write into `out` all that becomes of pictures by themselves."""
        config, device = self.config, stored.device
        images = self._cropped_and_flipped(stored, keys, cropped=cropped)
        if config.policy != "none" or config.color_jitter:
            images = out.copy_(images).round_()  # these work on whole levels
        if config.policy != "none":
            images = apply_policy(images, keys, config, mean_levels(self.preprocessing, device).round())
        if config.color_jitter:
            images = jitter(images, keys, config.color_jitter)
        normalise(images, self.preprocessing, out=out)
        if config.crop == "padded":
            shift(out, keys, config.pad, out.new_zeros(out.shape[1], 1, 1), out=out)
        if config.erase:
            erase(out, keys, config.erase)
        if config.cutout:
            cutout(out, keys, config.cutout)

    def _cropped_and_flipped(
        self, images: UInt8[Tensor, "b c h w"], keys: Int[Tensor, " b"], *, cropped: bool
    ) -> Num[Tensor, "b c rows columns"]:
        """Return bytes, or levels where pictures were resized, at the size to augment at, in memory of their own."""
        config, view = self.config, self._view
        if not cropped and config.crop in ("resized", "random"):
            height, width = (torch.full_like(keys, n) for n in images.shape[2:])
            boxes = training_boxes(keys, height, width, config, view)
            images = resample_boxes(images, boxes, view.image_size, view.interpolation)
        elif cropped or fits_view(images, view):
            images = images.clone(memory_format=torch.contiguous_format)
        else:
            images = view_levels(images, view)
        if config.flip:
            flip(images, uniform(keys, Draw.FLIP) < config.flip)
        return images

    def _at_model_size(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c rows columns"]:
        """Return pictures that were augmented at a size of their own at the model's, clipped as evaluation clips."""
        size = images.shape[2], images.shape[3]
        if size == self.preprocessing.image_size:
            return images
        levels = denormalise(images, self.preprocessing)
        levels = resample(levels, Box(0, 0, *size), self.preprocessing.image_size, self.preprocessing.interpolation)
        return normalise(levels, self.preprocessing)


def augmented_view(config: AugmentConfig, preprocessing: Preprocessing) -> Preprocessing:
    """Return how pictures are prepared for augmentation: as for the model, but at the size to augment at."""
    return preprocessing if config.size is None else replace(preprocessing, image_size=config.size)


def one_hot(labels: Int[Tensor, " b"], classes: int) -> Float[Tensor, "b classes"]:
    """Return a row for each picture that is 1 at its label, else 0."""
    return torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels[:, None], 1.0)


def flip(images: Num[Tensor, "b c h w"], chosen: Bool[Tensor, " b"]) -> None:
    """Mirror the chosen pictures left to right, in place."""
    if images.device.type != "cpu":  # which they are, a GPU need not report
        torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images, out=images)
        return
    for rows in chosen.nonzero()[:, 0].split(pictures_at_once(images)):
        put(images, rows, images.index_select(0, rows).flip(-1))


def shift(
    images: Float[Tensor, "b c h w"],
    keys: Int[Tensor, " b"],
    pad: int,
    border: Float[Tensor, "c 1 1"],
    *,
    out: Float[Tensor, "b c h w"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Shift each picture by up to `pad` whole pixels along both axes: padding and random crop in one (CIFAR).

    Args:
        images: Pictures.
        keys: What they draw from.
        pad: Pixels.
        border: What comes into a picture from outside.
        out: Where the result is to stand, which may be where the pictures are; new memory by default.
    """
    out = torch.empty_like(images) if out is None else out
    height, width = images.shape[2:]
    top, left = choice(keys, Draw.CROP_TOP, 2 * pad + 1), choice(keys, Draw.CROP_LEFT, 2 * pad + 1)
    most = min(len(images), pictures_at_once(images))
    padded = border.expand(most, -1, height + 2 * pad, width + 2 * pad).clone()
    # A view of all places where a picture may begin, of which each takes its own.
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    for part, moved, y, x in zip(*(each.split(most) for each in (images, out, top, left)), strict=True):
        padded[: len(part), :, pad : pad + height, pad : pad + width] = part
        if images.device.type == "cpu":
            # One by one as arrays: NumPy starts a copy ten times as fast.
            places = zip(y.tolist(), x.tolist(), strict=True)
            for after, before, (row, column) in zip(moved.numpy(), crops.numpy(), places, strict=False):
                after[...] = before[:, row, column]
        else:
            moved.copy_(crops[torch.arange(len(part), device=keys.device), :, y, x])
    return out


def jitter(images: Float[Tensor, "b c h w"], keys: Int[Tensor, " b"], strength: float) -> Float[Tensor, "b c h w"]:
    """Change brightness, contrast and saturation, in this order, by factors from 1 - `strength` to 1 + `strength`."""
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    for draw, operation in ((Draw.BRIGHTNESS, brightness), (Draw.CONTRAST, contrast), (Draw.SATURATION, color)):
        images = operation(images, low + (high - low) * uniform(keys, draw))
    return images


def erase(images: Float[Tensor, "b c h w"], keys: Int[Tensor, " b"], probability: float) -> None:
    """Replace a random rectangle of some pictures by normal noise, in place (Zhong et al., 2020, arXiv 1708.04896).

    As timm's `pixel` mode: share of the area uniform from 0.02 to 1/3, height over width log-uniform from 0.3 to 1/0.3.
    """
    _, channels, height, width = images.shape
    heights, widths = torch.full_like(keys, height), torch.full_like(keys, width)
    draws = (Draw.ERASE_AREA, Draw.ERASE_RATIO)
    tall, broad, fits = random_sizes(keys, draws, heights, widths, ERASE_AREA, ERASE_RATIO)
    hit = fits & (uniform(keys, Draw.ERASE) < probability)
    top = choice(keys, Draw.ERASE_TOP, (heights - tall).clamp_(min=0) + 1)
    left = choice(keys, Draw.ERASE_LEFT, (widths - broad).clamp_(min=0) + 1)
    mask = rectangle_masks(top, left, tall * hit, broad, (height, width))
    row, y, x = mask.nonzero(as_tuple=True)
    places = torch.arange(channels, device=keys.device) * (height * width) + (y * width + x)[:, None]
    noise = normal_at(keys[row].repeat_interleave(channels), Draw.ERASE_NOISE, places.flatten())
    images[row, :, y, x] = noise.view(-1, channels)


def cutout(images: Float[Tensor, "b c h w"], keys: Int[Tensor, " b"], side: int) -> None:
    """Set a square around a random pixel to 0, the mean colour, in place (DeVries and Taylor, 2017, arXiv 1708.04552).

    It may lie partly outside the picture.
    """
    size = images.shape[2], images.shape[3]
    top = choice(keys, Draw.CUTOUT_TOP, size[0]) - side // 2
    left = choice(keys, Draw.CUTOUT_LEFT, size[1]) - side // 2
    sides = torch.full_like(keys, side)
    images.masked_fill_(rectangle_masks(top, left, sides, sides, size)[:, None], 0.0)
