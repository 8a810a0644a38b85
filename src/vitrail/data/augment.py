"""Training augmentation of whole batches: every picture draws its own parameters from its key, on any device.

The same code runs on CPU and GPU. Nothing depends on a picture's place in the batch, save its partner in mixup.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data.base import Batch
from vitrail.data.mix import mix
from vitrail.data.operations import brightness, color, contrast, rectangle_masks
from vitrail.data.policies import apply_policy
from vitrail.data.random import Draw, choice, normal_at, uniform
from vitrail.data.view import (
    Box,
    check_channels,
    denormalise,
    mean_levels,
    normalise,
    resample,
    resample_boxes,
    view_levels,
)

TRIES = 10  # boxes tried until one fits into the picture, as in torchvision and timm
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
        config, keys = self.config, batch.keys
        images = self._crop(batch)
        if config.flip:
            flipped = (uniform(keys, Draw.FLIP) < config.flip).view(-1, 1, 1, 1)
            torch.where(flipped, images.flip(-1), images, out=images)
        if config.policy != "none" or config.color_jitter:
            images.round_()  # the operations work on whole levels
        if config.policy != "none":
            fill = mean_levels(self.preprocessing, images.device).round()
            images = apply_policy(images, keys, config, fill)
        if config.color_jitter:
            images = jitter(images, keys, config.color_jitter)
        if config.crop == "padded":
            images = shift(images, keys, config.pad, mean_levels(self.preprocessing, images.device))
        images = normalise(images, self.preprocessing)
        if config.erase:
            erase(images, keys, config.erase)
        if config.cutout:
            cutout(images, keys, config.cutout)
        targets = batch.targets if batch.targets.ndim == 2 else F.one_hot(batch.targets, classes)
        targets = targets.float()
        if config.mixup or config.cutmix:
            images, targets = mix(images, targets, keys, mixup=config.mixup, cutmix=config.cutmix)
        return self._at_model_size(images), targets

    def _crop(self, batch: Batch) -> Float[Tensor, "b c rows columns"]:
        """Return levels at the size to augment at, in memory of their own."""
        images, config, preprocessing = batch.images, self.config, self._view
        check_channels(images.shape[1], preprocessing)
        if batch.cropped:
            return images.contiguous().float()
        if config.crop in ("resized", "random"):
            height, width = (torch.full_like(batch.keys, n) for n in images.shape[2:])
            boxes = training_boxes(batch.keys, height, width, config, preprocessing)
            return resample_boxes(images, boxes, preprocessing.image_size, preprocessing.interpolation)
        return view_levels(images, preprocessing)

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


def training_boxes(
    keys: Int[Tensor, " b"],
    heights: Int[Tensor, " b"],
    widths: Int[Tensor, " b"],
    config: AugmentConfig,
    preprocessing: Preprocessing,
) -> Float[Tensor, "b 4"]:
    """Return the box (top, left, height, width) of each picture of these heights and widths that training looks at.

    `resized`: see `random_boxes`. `random`: as large as the evaluation view's centre crop, anywhere in the picture
    (big_vision's `resize_small` and `random_crop`), where it need not fall on whole pixels.
    """
    if config.crop == "resized":
        return random_boxes(keys, heights, widths, config.crop_area, config.crop_ratio)
    rows, columns = preprocessing.image_size
    # In fp64, or a box that reaches the edge could lie beyond it by a rounding error, which decoders refuse. MPS
    # has no fp64, and no decoder runs there.
    exact = torch.float32 if keys.device.type == "mps" else torch.float64
    heights, widths = heights.to(exact), widths.to(exact)
    step = preprocessing.crop_fraction * torch.minimum(heights / rows, widths / columns)  # pixels per pixel of the view
    height, width = rows * step, columns * step
    top = uniform(keys, Draw.CROP_TOP) * (heights - height)
    left = uniform(keys, Draw.CROP_LEFT) * (widths - width)
    return torch.stack([top, left, height, width], dim=1)


def random_boxes(
    keys: Int[Tensor, " b"],
    heights: Int[Tensor, " b"],
    widths: Int[Tensor, " b"],
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> Float[Tensor, "b 4"]:
    """Return a random box (top, left, height, width, in whole pixels) of each picture of these heights and widths.

    The rule of torchvision's `RandomResizedCrop.get_params` (after Szegedy et al., 2015, arXiv 1409.4842, section 6):
    share of the area uniform in `area`, width over height log-uniform in `ratio`, ten tries to fit into the picture,
    else the largest centre box whose shape is within `ratio`.
    """
    height, width, fits = _random_sizes(keys, (Draw.CROP_AREA, Draw.CROP_RATIO), heights, widths, area, ratio)
    height = torch.where(fits, height, torch.minimum(heights, (widths / ratio[0]).round().long()))
    width = torch.where(fits, width, torch.minimum(widths, (heights * ratio[1]).round().long()))
    top = torch.where(fits, choice(keys, Draw.CROP_TOP, heights - height + 1), (heights - height) // 2)
    left = torch.where(fits, choice(keys, Draw.CROP_LEFT, widths - width + 1), (widths - width) // 2)
    return torch.stack([top, left, height, width], dim=1).float()


def shift(
    images: Float[Tensor, "b c h w"], keys: Int[Tensor, " b"], pad: int, border: Float[Tensor, "c 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Shift each picture by up to `pad` whole pixels along both axes: padding and random crop in one (CIFAR)."""
    batch, channels, height, width = images.shape
    y = torch.arange(height, device=keys.device) + choice(keys, Draw.CROP_TOP, 2 * pad + 1)[:, None] - pad
    x = torch.arange(width, device=keys.device) + choice(keys, Draw.CROP_LEFT, 2 * pad + 1)[:, None] - pad
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    # One pixel of the border's colour after the last: all places outside point to it.
    places = torch.where(inside, y[:, :, None] * width + x[:, None, :], height * width).flatten(1)
    pixels = torch.cat([images.flatten(2), border.flatten(1).expand(batch, channels, 1)], dim=2)
    return pixels.gather(2, places[:, None].expand(-1, channels, -1)).view_as(images)


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
    tall, broad, fits = _random_sizes(keys, draws, heights, widths, ERASE_AREA, ERASE_RATIO)
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


def _random_sizes(
    keys: Tensor,
    draws: tuple[Draw, Draw],
    heights: Tensor,
    widths: Tensor,
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"], Bool[Tensor, " b"]]:
    """Return height and width of the first of ten random rectangles that fits, and whether one does."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    pixels = (heights * widths)[:, None] * (area[0] + (area[1] - area[0]) * uniform(keys, draws[0], (TRIES,)))
    shape = torch.exp(low + (high - low) * uniform(keys, draws[1], (TRIES,)))
    width, height = (pixels * shape).sqrt_().round_().long(), (pixels / shape).sqrt_().round_().long()
    fits = (height >= 1) & (width >= 1) & (height <= heights[:, None]) & (width <= widths[:, None])
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    return height.gather(1, first)[:, 0], width.gather(1, first)[:, 0], fits.any(dim=1)
