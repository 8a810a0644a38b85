"""The evaluation view: a picture of any size becomes the model's input, in floating point from end to end.

Resizing is two matrix products, one per axis. The matrices hold Pillow's antialiased filters, so the result differs
from Pillow's `resize(box=...)` only by rounding: see `resample`. The same matrices make random crops.
"""

import math
from functools import lru_cache
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor
from torch.nn import functional as F

from vitrail.config.preprocessing import Interpolation, Preprocessing
from vitrail.data.base import Picture, Resized
from vitrail.data.operations import pictures_at_once
from vitrail.errors import UserError

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # reach of the filters, in pixels of the coarser grid
BLOCK = 16  # rows of a result made at once, from the band of the source that they touch


class Box(NamedTuple):
    """A rectangle of a picture in pixels; need not fall on whole ones."""

    top: float
    left: float
    height: float
    width: float


def resize_matrix(
    source: int,
    target: int,
    filter: Interpolation,
    *,
    start: float = 0.0,
    length: float | None = None,
    antialias: bool = True,
) -> Float[Tensor, "target source"]:
    """Return the matrix that resamples `source` samples to `target`, as Pillow's `resize` does along one axis.

    Args:
        source: Samples of the input.
        target: Samples of the output.
        filter: Triangle, or Keys' cubic with a = -0.5.
        start: Where the part of the input that is kept begins.
        length: How long it is; the whole input by default. The filter reads beyond the part, never beyond the input.
        antialias: Widen the filter when shrinking.
    """
    starts = torch.tensor([start], dtype=torch.float64, device="cpu")
    lengths = torch.full_like(starts, source if length is None else length)
    return resize_matrices(source, target, starts, lengths, filter, antialias=antialias)[0]


def resize_matrices(
    source: int | torch.SymInt,  # an exported file calculates them for pictures of any size
    target: int,
    starts: Float[Tensor, " b"],
    lengths: Float[Tensor, " b"],
    filter: Interpolation,
    *,
    antialias: bool = True,
) -> Float[Tensor, "b target source"]:
    """Return one `resize_matrix` per part (`starts`, `lengths`), as float32, computed in the precision of `starts`."""
    step = (lengths / target)[:, None, None]
    wide = step.clamp(min=1.0) if antialias else torch.ones_like(step)
    at = torch.arange(target, dtype=starts.dtype, device=starts.device)[:, None]
    centre = starts[:, None, None] + (at + 0.5) * step
    x = (torch.arange(cast(int, source), dtype=starts.dtype, device=starts.device) + 0.5 - centre).abs_().div_(wide)
    weights = (1.0 - x).clamp_(min=0.0)
    if filter == "bicubic":
        # The two pieces of the cubic, |x| < 1 and |x| < 2, as sums of truncated powers: no branches.
        outer = (2.0 - x).clamp_(min=0.0)
        weights = weights**2 * (1.0 - 2.0 * weights) + 0.5 * outer**2 * (outer - 1.0)
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


def resample(
    images: Num[Tensor, "b c h w"], box: Box, size: tuple[int, int], filter: Interpolation
) -> Float[Tensor, "b c rows columns"]:
    """Return one box of all pictures at rows and columns `size`: float levels in [0, 255].

    As in Pillow, the horizontal axis comes first and each axis clips its result; unlike there, nothing is rounded.
    Rounded at the end, it is within one level of Pillow on noise, black and white dots, and photographs, at any size.
    Pillow 13 takes the vertical axis of tall pictures first; between the two orders, bicubic results differ by up to
    31 levels at hard edges, where the first axis clips. An axis that keeps its extent and size is left alone.
    """
    height, width = images.shape[2:]
    images = images.contiguous()  # a band of rows must lie in one piece
    if (box.left, box.width) != (0.0, width) or width != size[1]:
        bands = _bands(width, size[1], filter, float(box.left), float(box.width), images.device)
        parts = [images[..., first:stop].float() @ matrix.mT for first, stop, matrix in bands]
        images = torch.cat(parts, dim=3).clamp_(0.0, 255.0)
    if (box.top, box.height) != (0.0, height) or height != size[0]:
        bands = _bands(height, size[0], filter, float(box.top), float(box.height), images.device)
        parts = [matrix @ images[:, :, first:stop].float() for first, stop, matrix in bands]
        images = torch.cat(parts, dim=2).clamp_(0.0, 255.0)
    return images.float()


def resample_boxes(
    images: Num[Tensor, "b c h w"], boxes: Float[Tensor, "b 4"], size: tuple[int, int], filter: Interpolation
) -> Float[Tensor, "b c rows columns"]:
    """Return every picture's own box (top, left, height, width) at rows and columns `size`, as `resample` does."""
    height, width = images.shape[2:]
    levels = images.contiguous().float()
    top, left, tall, broad = boxes.unbind(dim=1)
    rows = resize_matrices(height, size[0], top, tall, filter)[:, None]
    columns = resize_matrices(width, size[1], left, broad, filter)[:, None].mT
    return (rows @ (levels @ columns).clamp_(0.0, 255.0)).clamp_(0.0, 255.0)


def view_levels(images: Num[Tensor, "b c h w"], preprocessing: Preprocessing) -> Float[Tensor, "b c rows columns"]:
    """Return the evaluation view of pictures of one size before normalisation: float levels in [0, 255].

    `crop` keeps the largest centre box of the model's aspect ratio, times `crop_fraction`; `squash` keeps all and
    distorts; `pad` keeps all, centred on a border of mean colour. Pictures that fit exactly are left as they are.

    Raises:
        UserError: When the pictures' channels are not the model's.
    """
    height, width = images.shape[2:]
    rows, columns = preprocessing.image_size
    mean, _ = _statistics(preprocessing, images.device)
    check_channels(images.shape[1], preprocessing)
    if preprocessing.fit == "squash":
        return resample(images, Box(0.0, 0.0, height, width), (rows, columns), preprocessing.interpolation)
    if preprocessing.fit == "crop":
        step = preprocessing.crop_fraction * min(height / rows, width / columns)  # input pixels per output pixel
        tall, broad = rows * step, columns * step
        box = Box((height - tall) / 2, (width - broad) / 2, tall, broad)
        return resample(images, box, (rows, columns), preprocessing.interpolation)
    step = max(height / rows, width / columns)
    inner = max(1, min(rows, round(height / step))), max(1, min(columns, round(width / step)))
    levels = resample(images, Box(0.0, 0.0, height, width), inner, preprocessing.interpolation)
    top, left = (rows - inner[0]) // 2, (columns - inner[1]) // 2
    # Shifted by the mean, a border of zeros is one of mean colour.
    border = (left, columns - inner[1] - left, top, rows - inner[0] - top)
    return F.pad(levels - mean, border) + mean if any(border) else levels


def evaluation_view(picture: Picture, preprocessing: Preprocessing) -> Float[Tensor, "c rows columns"]:
    """Return one picture as the model's input.

    Raises:
        UserError: When the picture's channels are not the model's.
    """
    return normalise(view_levels(_to_tensor(picture), preprocessing), preprocessing)[0]


def view_pixels(picture: Picture, preprocessing: Preprocessing) -> Resized:
    """Return the evaluation view before normalisation, rounded: to look at, or to train on without a random crop.

    Raises:
        UserError: When the picture's channels are not the model's.
    """
    levels = view_levels(_to_tensor(picture), preprocessing)[0]
    return levels.round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def fits_view(images: Num[Tensor, "b c h w"], preprocessing: Preprocessing) -> bool:
    """Return whether `view_levels` leaves pictures of this size as they are."""
    same_size = (images.shape[2], images.shape[3]) == preprocessing.image_size
    return same_size and (preprocessing.fit != "crop" or preprocessing.crop_fraction == 1.0)


def normalise(
    images: Num[Tensor, "b c h w"], preprocessing: Preprocessing, *, out: Float[Tensor, "b c h w"] | None = None
) -> Float[Tensor, "b c h w"]:
    """Return (levels / 255 - mean) / std of levels in [0, 255], bytes or floats. The mean colour becomes exactly 0.

    Args:
        images: Levels.
        preprocessing: What the model takes.
        out: Where the result is to stand; new memory by default.
    """
    check_channels(images.shape[1], preprocessing)
    mean, gain = _statistics(preprocessing, images.device)
    if out is None:
        return (images.float() - mean).mul_(gain)
    most = pictures_at_once(images)
    for levels, part in zip(images.split(most), out.split(most), strict=True):
        part.copy_(levels).sub_(mean).mul_(gain)  # while it lies in the cache
    return out


def denormalise(images: Float[Tensor, "b c h w"], preprocessing: Preprocessing) -> Float[Tensor, "b c h w"]:
    """Return the levels in [0, 255] that `normalise` made `images` of."""
    check_channels(images.shape[1], preprocessing)
    mean, gain = _statistics(preprocessing, images.device)
    return images / gain + mean


def mean_levels(preprocessing: Preprocessing, device: torch.device) -> Float[Tensor, "c 1 1"]:
    """Return the mean colour in levels: what is 0 after normalisation."""
    return _statistics(preprocessing, device)[0]


def check_channels(channels: int, preprocessing: Preprocessing) -> None:
    """Raise UserError unless pictures of `channels` channels are what the model takes."""
    if channels != preprocessing.channels:
        names = {1: "grey (1 channel)", 3: "colour (3 channels)"}
        raise UserError(
            f"the pictures are {names.get(channels, f'of {channels} channels')}, the model takes "
            f"{names.get(preprocessing.channels, f'{preprocessing.channels} channels')}; convert the pictures, "
            f"or make a model with channels={channels}."
        )


@lru_cache(maxsize=64)
def _bands(
    source: int, target: int, filter: Interpolation, start: float, length: float, device: torch.device
) -> tuple[tuple[int, int, Tensor], ...]:
    """Return `resize_matrix` cut into blocks of rows, each with the first and last column + 1 that it uses.

    Shrinking a 12-megapixel photo touches a tenth of the dense matrix.
    """
    step = length / target
    reach = SUPPORT[filter] * max(step, 1.0)
    bands = []
    with torch.inference_mode(False):  # a cached inference tensor would spoil later training
        for row in range(0, target, BLOCK):
            rows = min(BLOCK, target - row)
            first = max(0, math.floor(start + (row + 0.5) * step - reach))
            stop = min(source, math.ceil(start + (row + rows - 0.5) * step + reach))
            block = resize_matrix(stop - first, rows, filter, start=start + row * step - first, length=rows * step)
            bands.append((first, stop, block.to(device)))
    return tuple(bands)


@lru_cache(maxsize=64)
def _statistics(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the mean in levels, and one over the deviation in levels, as (c, 1, 1)."""
    with torch.inference_mode(False):
        mean = torch.tensor(_per_channel("mean", preprocessing), dtype=torch.float64, device="cpu")
        std = torch.tensor(_per_channel("std", preprocessing), dtype=torch.float64, device="cpu")
        levels, gain = (x.float().view(-1, 1, 1).to(device) for x in (mean * 255, 1 / (std * 255)))
    return levels, gain


def _per_channel(name: str, preprocessing: Preprocessing) -> tuple[float, ...]:
    values: tuple[float, ...] = getattr(preprocessing, name)
    if len(set(values)) == 1:  # one value, however often it is written, stands for all channels
        return values[:1] * preprocessing.channels
    if len(values) != preprocessing.channels:
        raise UserError(
            f"{name} has {len(values)} values for pictures of {preprocessing.channels} channels; give one or as many."
        )
    return values


def _to_tensor(picture: Picture) -> UInt8[Tensor, "1 c h w"]:
    # torch refuses arrays it may not write to (decoders and memory maps give them) or that run backwards (flips).
    picture = np.require(picture, requirements=["C", "W"])
    return torch.from_numpy(picture).permute(2, 0, 1)[None]
