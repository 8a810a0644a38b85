"""Picture operations of the augmentation policies, on batches, every picture with its own strength.

Pictures are float tensors that hold whole levels from 0 to 255, and stay so. The operations are those of AutoAugment
(Cubuk et al., 2019, arXiv 1805.09501, table 6), and mean what Pillow's ImageOps, ImageEnhance and affine `transform`
mean. Tests hold them to Pillow's answers: exactly, save AutoContrast and the affine ones, where one level may differ.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor
from torch.nn import functional as F

Images = Float[Tensor, "b c h w"]
PerPicture = Float[Tensor, " b"]

CACHE = 2**18
"""Numbers that a CPU works on at once: a step finds in its cache what the step before it wrote."""


def on_cpu(images: Num[Tensor, "b c h w"]) -> bool:
    """Return whether pictures lie in a CPU's memory. `vitrail plan` has tensors of another type stand for a GPU's."""
    return images.device.type == "cpu" and type(images) is Tensor


def pictures_at_once(images: Num[Tensor, "b c h w"]) -> int:
    """Return how many of these pictures to hand to an operation at once; a GPU takes all."""
    if not on_cpu(images):
        return max(1, len(images))
    return max(1, CACHE // max(1, images.shape[1:].numel()))


def put(images: Num[Tensor, "b c h w"], rows: Int[Tensor, " n"], pictures: Num[Tensor, "n c h w"]) -> None:
    """Overwrite some pictures of a batch."""
    if images.device.type == "cpu":  # NumPy copies a picture at a time, torch a number
        images.numpy()[rows.numpy()] = pictures.numpy()
    else:
        images.index_copy_(0, rows, pictures)


def auto_contrast(images: Images) -> Images:
    """Stretch every channel from its darkest and brightest level to 0 and 255."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    span = high - low
    flat = span == 0  # such a channel stays as it is
    # The small addend undoes float32's error where a whole level comes out just below itself.
    stretched = (images - low.masked_fill(flat, 0.0)).mul_((255.0 / span).masked_fill_(flat, 1.0))
    return stretched.add_(1e-3).floor_()


def equalize(images: Images) -> Images:
    """Give every channel a flat histogram, by Pillow's integer rule."""
    pixels = images.shape[2:].numel()
    channels = torch.arange(images.shape[0] * images.shape[1], device=images.device).view(-1, 1)
    places = (images.reshape(-1, pixels).long() + 256 * channels).flatten()  # of each level in the table of its channel
    if images.device.type == "cpu":
        counts = torch.bincount(places, minlength=256 * len(channels))  # on a GPU it would wait for the largest
    else:
        counts = torch.zeros(256 * len(channels), dtype=torch.int64, device=images.device)
        counts.scatter_add_(0, places, torch.ones((), dtype=torch.int64, device=images.device).expand_as(places))
    # In float32, which divides faster: whole numbers and their quotients are exact up to 4096 x 4096 pixels.
    counts, levels = counts.view(-1, 256).to(images.dtype), torch.arange(256.0, device=images.device)
    brightest = counts.gather(1, (levels * counts.clamp(max=1.0)).amax(dim=1, keepdim=True).long())
    step = ((pixels - brightest) / 255.0).floor_()
    below = counts.cumsum(dim=1).sub_(counts)
    table = below.add_((step / 2.0).floor_()).div_(step.clamp(min=1.0)).floor_().clamp_(max=255.0)
    table = torch.where(step > 0, table, levels)
    return table.flatten().index_select(0, places).view_as(images)


def invert(images: Images) -> Images:
    """Return the negative."""
    return 255.0 - images


def posterize(images: Images, bits: PerPicture) -> Images:
    """Keep the `bits` highest bits (0 to 8) of every level."""
    step = torch.exp2(8.0 - bits).view(-1, 1, 1, 1)
    return (images / step).floor_().mul_(step)


def solarize(images: Images, threshold: PerPicture) -> Images:
    """Invert levels at and above `threshold`."""
    # Arithmetic, because comparing and choosing cost a CPU several times as much: 1 from the threshold on, else 0.
    inverted = (images - (threshold.ceil() - 1.0).view(-1, 1, 1, 1)).clamp_(0.0, 1.0)
    return inverted.mul_(-255.0).add_(images).abs_()


def solarize_add(images: Images, amount: PerPicture) -> Images:
    """Add `amount` to levels below 128."""
    dark = (128.0 - images).clamp_(0.0, 1.0)  # 1 or 0
    return dark.mul_(amount.view(-1, 1, 1, 1)).add_(images).clamp_(0.0, 255.0)


def color(images: Images, factor: PerPicture) -> Images:
    """Move colours away from grey (factor above 1) or towards it (below 1). Grey pictures stay as they are."""
    return images if images.shape[1] == 1 else _blend(_grey(images), images, factor)


def contrast(images: Images, factor: PerPicture) -> Images:
    """Move levels away from the picture's mean grey, or towards it."""
    mean = (_grey(images).mean(dim=(2, 3), keepdim=True) + 0.5).floor_()
    return _blend(mean, images, factor)


def brightness(images: Images, factor: PerPicture) -> Images:
    """Multiply all levels."""
    return (images * factor.view(-1, 1, 1, 1)).clamp_(0.0, 255.0).floor_()


def sharpness(images: Images, factor: PerPicture) -> Images:
    """Move levels away from a smoothed picture, or towards it. The outermost pixels stay as they are."""
    # Pillow's SMOOTH kernel: ones with a 5 in the middle, over 13. Whole sums, so nothing rounds before the division.
    rows = (images[..., :-2, :] + images[..., 1:-1, :]).add_(images[..., 2:, :])
    total = torch.add(rows[..., :-2] + rows[..., 1:-1], rows[..., 2:]).add_(images[..., 1:-1, 1:-1], alpha=4.0)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = total.div_(13.0).add_(0.5).floor_()
    return _blend(smooth, images, factor)


def cutout(
    images: Images, half: PerPicture, rows: Int[Tensor, " b"], columns: Int[Tensor, " b"], fill: Float[Tensor, "c 1 1"]
) -> Images:
    """Fill a square of side 2 * `half` around row and column with the colour `fill`."""
    inside = []
    for middles, length in ((rows, images.shape[2]), (columns, images.shape[3])):
        places, first = torch.arange(length, device=half.device), (middles - half)[:, None]
        inside.append(((places >= first) & (places < first + 2 * half[:, None])).to(images.dtype))
    mask = inside[0][:, None, :, None] * inside[1][:, None, None, :]
    return (fill - images).mul_(mask).add_(images)


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
    lengths = torch.tensor([images.shape[3], images.shape[2]], dtype=maps.dtype, device=maps.device).view(2, 1, 1, 1)
    x, y = ((torch.arange(n, dtype=maps.dtype, device=maps.device) + 0.5) for n in (images.shape[3], images.shape[2]))
    from_x, from_y, shift = maps.permute(2, 1, 0)[..., None]  # each (2, b, 1): of x and y in the source
    source = ((from_x * x)[:, :, None, :] + (from_y * y)[..., None]).add_(shift[..., None])
    # Arithmetic, because comparing and choosing cost a CPU several times as much: how many pixels beyond the edge.
    middle = (lengths - 1.0) / 2.0
    beyond = source.floor().sub_(middle).abs_().sub_(middle)
    inside = (1.0 - torch.maximum(beyond[0], beyond[1]).clamp_(0.0, 1.0))[:, None]
    # From -1 at one edge of the picture to 1 at the other, as `grid_sample` counts.
    grid = source.mul_(2.0 / lengths).sub_(1.0).permute(1, 2, 3, 0)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.round_().sub_(fill).mul_(inside).add_(fill)


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


def translate(images: Images, pixels: Sequence[int], axis: int, fill: Float[Tensor, "c 1 1"]) -> Images:
    """Return each picture, on the CPU, shifted so many pixels to the left (`axis` 3) or upwards (2), as by `affine`."""
    moved = fill.expand_as(images).clone(memory_format=torch.contiguous_format)
    length, before, after = images.shape[axis], images.movedim(axis, 1).numpy(), moved.movedim(axis, 1).numpy()
    for row, offset in enumerate(pixels):  # one by one as arrays: NumPy starts a copy ten times as fast as torch
        start, stop = min(length, max(0, -offset)), max(0, length - max(0, offset))
        after[row, start:stop] = before[row, start + offset : stop + offset]
    return moved


def _blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Go from `start` towards `images` by `factor`, beyond them above 1; clip, and cut fractions off as Pillow does."""
    moved = (images - start).mul_(factor.view(-1, 1, 1, 1)).add_(start)
    return moved.clamp_(0.0, 255.0).floor_()


def _grey(images: Tensor) -> Tensor:
    """Return Pillow's luma, (b, 1, h, w): ITU-R 601 weights over 2^16, rounded. All sums are exact in float32."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    total = (19595.0 * red).add_(green, alpha=38470.0).add_(blue, alpha=7471.0)
    return total.add_(32768.0).mul_(2.0**-16).floor_()
