"""How a picture of any size becomes the model's input. Stored with the weights: an answer depends on it."""

from dataclasses import dataclass
from typing import Literal

Fit = Literal["crop", "pad", "squash"]
Interpolation = Literal["bilinear", "bicubic"]

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """The evaluation view: decode in full, resize in floating point, crop, normalise."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width of the result in pixels."""
    channels: int = 3
    """1 (grey) or 3 (RGB)."""
    fit: Fit = "crop"
    """Centre crop of the resized picture, the whole picture on a border of mean colour, or squashed to size."""
    crop_fraction: float = 0.875
    """For `crop`: share of the resized picture's shorter side that is kept."""
    interpolation: Interpolation = "bicubic"
    """Antialiased filter of the resize."""
    mean: tuple[float, ...] = HALF
    """Subtracted from values in [0, 1], per channel (one value stands for all)."""
    std: tuple[float, ...] = HALF
    """Then divided by this, per channel."""
