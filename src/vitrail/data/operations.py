"""Picture operations of the augmentation policies, on batches, every picture with its own strength.

Pictures are float tensors that hold whole levels from 0 to 255, and stay so. The operations are those of AutoAugment
(Cubuk et al., 2019, arXiv 1805.09501, table 6), and mean what Pillow's ImageOps, ImageEnhance and affine `transform`
mean. Tests hold them to Pillow's answers: exactly, save AutoContrast and the affine ones, where one level may differ.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

Images = Float[Tensor, "b c h w"]
PerPicture = Float[Tensor, " b"]


def auto_contrast(images: Images) -> Images:
    """Stretch every channel from its darkest and brightest level to 0 and 255."""
    low, high = torch.aminmax(images.flatten(2), dim=2)
    span = (high - low)[..., None, None]
    # The small addend undoes float32's error where a whole level comes out just below itself.
    stretched = ((images - low[..., None, None]) * (255.0 / span.clamp(min=1.0)) + 1e-3).floor_()
    return torch.where(span > 0, stretched, images)


def equalize(images: Images) -> Images:
    """Give every channel a flat histogram, by Pillow's integer rule."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = counts.gather(2, flat.amax(dim=2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = counts.cumsum(dim=2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    levels = torch.where(step > 0, table.gather(2, flat), flat)
    return levels.to(images.dtype).view_as(images)


def invert(images: Images) -> Images:
    """Return the negative."""
    return 255.0 - images


def posterize(images: Images, bits: PerPicture) -> Images:
    """Keep the `bits` highest bits (0 to 8) of every level."""
    step = torch.exp2(8.0 - bits).view(-1, 1, 1, 1)
    return (images / step).floor_() * step


def solarize(images: Images, threshold: PerPicture) -> Images:
    """Invert levels at and above `threshold`."""
    return torch.where(images < threshold.view(-1, 1, 1, 1), images, 255.0 - images)


def solarize_add(images: Images, amount: PerPicture) -> Images:
    """Add `amount` to levels below 128."""
    return torch.where(images < 128, (images + amount.view(-1, 1, 1, 1)).clamp_(0.0, 255.0), images)


def color(images: Images, factor: PerPicture) -> Images:
    """Move colours away from grey (factor above 1) or towards it (below 1). Grey pictures stay as they are."""
    return images if images.shape[1] == 1 else _blend(_grey(images), images, factor)


def contrast(images: Images, factor: PerPicture) -> Images:
    """Move levels away from the picture's mean grey, or towards it."""
    mean = (_grey(images).mean(dim=(2, 3), keepdim=True) + 0.5).floor_()
    return _blend(mean, images, factor)


def brightness(images: Images, factor: PerPicture) -> Images:
    """Multiply all levels."""
    return _blend(torch.zeros((), device=images.device), images, factor)


def sharpness(images: Images, factor: PerPicture) -> Images:
    """Move levels away from a smoothed picture, or towards it. The outermost pixels stay as they are."""
    # Pillow's SMOOTH kernel: ones with a 5 in the middle, over 13. Whole sums, so nothing rounds before the division.
    total = F.avg_pool2d(images, 3, stride=1, divisor_override=1) + 4.0 * images[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (total / 13.0 + 0.5).floor_()
    return _blend(smooth, images, factor)


def cutout(
    images: Images, half: PerPicture, rows: Int[Tensor, " b"], columns: Int[Tensor, " b"], fill: Float[Tensor, "c 1 1"]
) -> Images:
    """Fill a square of side 2 * `half` around row and column with the colour `fill`."""
    side = 2 * half
    mask = rectangle_masks(rows - half, columns - half, side, side, (images.shape[2], images.shape[3]))
    return torch.where(mask[:, None], fill, images)


def rectangle_masks(
    top: Tensor, left: Tensor, height: Tensor, width: Tensor, size: tuple[int, int]
) -> Bool[Tensor, "b h w"]:
    """Return for every picture of rows and columns `size` which pixels lie in its rectangle, of (b,) numbers."""
    y = torch.arange(size[0], device=top.device)
    x = torch.arange(size[1], device=top.device)
    rows = (y >= top[:, None]) & (y < (top + height)[:, None])
    columns = (x >= left[:, None]) & (x < (left + width)[:, None])
    return rows[:, :, None] & columns[:, None, :]


def affine(images: Images, maps: Float[Tensor, "b 2 3"], fill: Float[Tensor, "c 1 1"]) -> Images:
    """Return for every pixel what lies where its picture's map sends it, bilinear; `fill` outside the picture.

    Maps take (x, y, 1), pixels' centres at halves, to x and y in the source, as Pillow's `transform` does.
    """
    height, width = images.shape[2:]
    x = torch.arange(width, dtype=maps.dtype, device=maps.device) + 0.5
    y = torch.arange(height, dtype=maps.dtype, device=maps.device)[:, None] + 0.5
    at = maps[..., None, None]
    source_x = at[:, 0, 0] * x + at[:, 0, 1] * y + at[:, 0, 2]
    source_y = at[:, 1, 0] * x + at[:, 1, 1] * y + at[:, 1, 2]
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    grid = torch.stack([source_x * (2.0 / width) - 1.0, source_y * (2.0 / height) - 1.0], dim=-1)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside[:, None], moved.round_(), fill)


def affine_maps(name: str, amount: PerPicture, size: tuple[int, int]) -> Float[Tensor, "b 2 3"]:
    """Return the maps for `affine` of pictures of rows and columns `size`.

    `ShearX` and `ShearY` shift a row (column) by `amount` times its distance from the top (left); `TranslateX` and
    `TranslateY` shift to the left (upwards) by `amount` pixels; `Rotate` turns counter-clockwise around the middle by
    `amount` degrees.
    """
    maps = torch.eye(2, 3, dtype=amount.dtype, device=amount.device).repeat(len(amount), 1, 1)
    if name == "Rotate":
        angle = torch.deg2rad(amount)
        maps[:, 0, 0] = maps[:, 1, 1] = torch.cos(angle)
        maps[:, 1, 0] = torch.sin(angle)
        maps[:, 0, 1] = -maps[:, 1, 0]
        middle = torch.tensor([size[1] / 2, size[0] / 2], dtype=amount.dtype, device=amount.device)
        maps[:, :, 2] = middle - maps[:, :, :2] @ middle
    else:
        row, column = {"ShearX": (0, 1), "ShearY": (1, 0), "TranslateX": (0, 2), "TranslateY": (1, 2)}[name]
        maps[:, row, column] = amount
    return maps


def _blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Go from `start` towards `images` by `factor`, beyond them above 1; clip, and cut fractions off as Pillow does."""
    return (start + factor.view(-1, 1, 1, 1) * (images - start)).clamp_(0.0, 255.0).floor_()


def _grey(images: Tensor) -> Tensor:
    """Return Pillow's luma, (b, 1, h, w): ITU-R 601 weights over 2^16, rounded. All sums are exact in float32."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(dim=1)
    return ((19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0) * 2.0**-16).floor_()[:, None]
