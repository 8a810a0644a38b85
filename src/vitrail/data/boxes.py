"""Which part of a picture training looks at: boxes drawn from a picture's key, of whole batches or one by one."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data.random import Draw, choice, high_words, uniform

TRIES = 10  # boxes tried until one fits into the picture, as in torchvision and timm
STEPS = {512: 1, 1024: 2, 2048: 4}
"""Shorter side of a picture from which on its boxes are of so many pixels' coarser steps, all added to 1."""


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

    In pictures of `STEPS` and more, boxes move and grow in steps of 2, 4 or 8 pixels: less than anyone would see, and
    where a JPEG is decoded at a fraction of its size they still end on whole pixels, which is quicker to resize.
    """
    height, width, fits = random_sizes(keys, (Draw.CROP_AREA, Draw.CROP_RATIO), heights, widths, area, ratio)
    height = torch.where(fits, height, torch.minimum(heights, (widths / ratio[0]).round().long()))
    width = torch.where(fits, width, torch.minimum(widths, (heights * ratio[1]).round().long()))
    shorter = torch.minimum(heights, widths)
    step = 1 + sum(add * (shorter >= side) for side, add in STEPS.items())
    height, width = ((n // step).clamp(min=1) * step for n in (height, width))
    high, wide = (heights - height) // step, (widths - width) // step
    top = torch.where(fits, choice(keys, Draw.CROP_TOP, high + 1), high // 2) * step
    left = torch.where(fits, choice(keys, Draw.CROP_LEFT, wide + 1), wide // 2) * step
    return torch.stack([top, left, height, width], dim=1).float()


def random_sizes(
    keys: Int[Tensor, " b"],
    draws: tuple[Draw, Draw],
    heights: Int[Tensor, " b"],
    widths: Int[Tensor, " b"],
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"], Bool[Tensor, " b"]]:
    """Return height and width of the first of ten random rectangles that fits, and whether one does."""
    shares, shapes = _shares_and_shapes(keys, draws, area, ratio)
    pixels = (heights * widths)[:, None] * shares
    width, height = (pixels * shapes).sqrt_().round_().long(), (pixels / shapes).sqrt_().round_().long()
    fits = (height >= 1) & (width >= 1) & (height <= heights[:, None]) & (width <= widths[:, None])
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    return height.gather(1, first)[:, 0], width.gather(1, first)[:, 0], fits.any(dim=1)


class BoxDraws:
    """The random numbers of a batch's `training_boxes`, all drawn at once, before the pictures' sizes are known.

    Decoders learn a picture's size one by one, and tensors of one element would cost more than a small picture.
    """

    def __init__(self, keys: Int[Tensor, " b"], config: AugmentConfig, preprocessing: Preprocessing) -> None:
        self._config = config
        self._preprocessing = preprocessing
        if config.crop == "resized":
            draws = (Draw.CROP_AREA, Draw.CROP_RATIO)
            shares, shapes = _shares_and_shapes(keys, draws, config.crop_area, config.crop_ratio)
            self._shares, self._shapes = shares.numpy(), shapes.numpy()
            self._places = [high_words(keys, draw).tolist() for draw in (Draw.CROP_TOP, Draw.CROP_LEFT)]
        else:
            self._places = [uniform(keys, draw).tolist() for draw in (Draw.CROP_TOP, Draw.CROP_LEFT)]

    def box(self, row: int, height: int, width: int) -> tuple[float, float, float, float]:
        """Return the same box as `training_boxes` for one picture of the batch, bit for bit."""
        top, left = self._places[0][row], self._places[1][row]
        if self._config.crop == "resized":
            return self._in_whole_pixels(row, height, width)
        step = self._preprocessing.crop_fraction * min(
            n / size for n, size in zip((height, width), self._preprocessing.image_size, strict=True)
        )
        rows, columns = (n * step for n in self._preprocessing.image_size)
        return top * (height - rows), left * (width - columns), rows, columns

    def _in_whole_pixels(self, row: int, height: int, width: int) -> tuple[float, float, float, float]:
        fitting = self._size(row, height, width)
        rows, columns = fitting or self._largest(height, width)
        step = 1 + sum(add for side, add in STEPS.items() if min(height, width) >= side)
        rows, columns = (max(1, n // step) * step for n in (rows, columns))
        places = []
        for words, spare in zip(self._places, ((height - rows) // step, (width - columns) // step), strict=True):
            places.append((words[row] * (spare + 1) >> 32 if fitting else spare // 2) * step)
        return float(places[0]), float(places[1]), float(rows), float(columns)

    def _size(self, row: int, height: int, width: int) -> tuple[int, int] | None:
        """Return height and width of the first rectangle that fits, in the float32 arithmetic of `random_sizes`."""
        pixels = np.float32(height * width) * self._shares[row]
        shapes = self._shapes[row]
        widths, heights = np.rint(np.sqrt(pixels * shapes)), np.rint(np.sqrt(pixels / shapes))
        for tall, broad in zip(heights.tolist(), widths.tolist(), strict=True):
            if 1 <= tall <= height and 1 <= broad <= width:
                return int(tall), int(broad)
        return None

    def _largest(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the largest box whose shape is within the ratio."""
        low, high = (np.float32(n) for n in self._config.crop_ratio)
        return min(height, int(np.rint(width / low))), min(width, int(np.rint(height * high)))


def _shares_and_shapes(
    keys: Tensor, draws: tuple[Draw, Draw], area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Float[Tensor, "b tries"], Float[Tensor, "b tries"]]:
    """Return shares of the area and widths over heights of the rectangles to try."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    shares = area[0] + (area[1] - area[0]) * uniform(keys, draws[0], (TRIES,))
    shapes = torch.exp(low + (high - low) * uniform(keys, draws[1], (TRIES,)))
    return shares, shapes
