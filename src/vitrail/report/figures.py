"""Arrays to pictures inside a page: PNG data URIs, colour maps, overlays and mosaics."""

import base64
import colorsys
from io import BytesIO

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from vitrail.data.base import Picture

SMALL = 64  # pictures with a shorter side below this are shown as crisp squares
NUMBERED = 22  # pixels along a side of a patch that a number of two digits fits into
GLOW = np.array((0.46, 0.24, 0.04))  # amber, as red, green and blue in [0, 1]

# Nine even steps of viridis (matplotlib; van der Walt and Smith, 2015): even to the eye, also to a colour-blind one.
VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 45, 123),
        (59, 82, 139),
        (44, 114, 142),
        (33, 145, 140),
        (40, 174, 128),
        (93, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float64,
)


def png_uri(pixels: UInt8[np.ndarray, "h w c"]) -> str:
    """Return a picture of 1 (grey), 3 (RGB) or 4 (RGB and alpha) channels as a PNG data URI."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode("ascii")


def png_bytes(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """Return a picture of 1 (grey), 3 (RGB) or 4 (RGB and alpha) channels as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def is_small(pixels: Picture) -> bool:
    """Whether a picture should be enlarged without smoothing."""
    return min(pixels.shape[:2]) < SMALL


def thumbnail(pixels: Picture, side: int) -> UInt8[np.ndarray, "rows columns c"]:
    """Return the picture shrunk so that its longer side is at most `side`; smaller ones as they are."""
    scale = side / max(pixels.shape[:2])
    return pixels if scale >= 1 else _resized(pixels, scale, Image.Resampling.LANCZOS)


def spotlight(
    pixels: Picture, relevance: Float[np.ndarray, "rows columns"], side: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Return the picture lit where `relevance` is high, as figure 6 of the ViT paper (arXiv 2010.11929) does.

    Brightness is relevance over its largest value, at least a tenth. Dark places glow faintly, because the
    paper's product shows nothing on black. The longer side of the result is about `side`.
    """
    shown = enlarged(pixels, side)
    height, width = shown.shape[:2]
    light = _spread(relevance / max(float(relevance.max()), 1e-12), (height, width))[:, :, None].clip(0.1, 1.0)
    colours = np.broadcast_to(shown, (height, width, 3)) / 255
    darkness = (1 - colours.max(axis=2, keepdims=True)) ** 2
    return (255 * (colours * light + GLOW * darkness * light**2)).round().astype(np.uint8)


def heat(
    pixels: Picture, relevance: Float[np.ndarray, "rows columns"], side: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Return the picture in grey under the colours of `relevance`, from its smallest value (violet) to its largest.

    The longer side of the result is about `side`.
    """
    shown = enlarged(pixels, side)
    height, width, channels = shown.shape
    low, high = float(relevance.min()), float(relevance.max())
    colours = viridis(_spread((relevance - low) / max(high - low, 1e-12), (height, width))) / 255
    grey = shown[:, :, 0] if channels == 1 else np.asarray(Image.fromarray(shown).convert("L"))
    return (255 * (0.45 * grey[:, :, None] / 255 + 0.55 * colours)).round().astype(np.uint8)


def enlarged(pixels: Picture, side: int) -> UInt8[np.ndarray, "rows columns c"]:
    """Return the picture with a longer side of about `side`; small ones keep crisp squares for pixels."""
    if not is_small(pixels):
        return thumbnail(pixels, side)
    times = max(1, side // max(pixels.shape[:2]))
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def _spread(values: Float[np.ndarray, "rows columns"], size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """Return values of a grid smoothly spread over pixels; a cubic filter, which may go a little beyond them."""
    grid = Image.fromarray(values.astype(np.float32))
    return np.asarray(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def viridis(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape 3"]:
    """Return colours of values in [0, 1]."""
    place = np.clip(values, 0.0, 1.0) * (len(VIRIDIS) - 1)
    channels = [np.interp(place, np.arange(len(VIRIDIS)), VIRIDIS[:, i]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def mosaic(tiles: UInt8[np.ndarray, "rows columns h w c"], times: int = 1) -> UInt8[np.ndarray, "height width 4"]:
    """Return a grid of small pictures, each enlarged `times`, with transparent lines between."""
    rows, columns, height, width, channels = tiles.shape
    colours = np.broadcast_to(tiles, (rows, columns, height, width, 3)) if channels == 1 else tiles
    colours = colours.repeat(times, axis=2).repeat(times, axis=3)
    gap = min(times, 6)
    padded = np.zeros((rows, columns, height * times + gap, width * times + gap, 4), np.uint8)
    padded[:, :, : height * times, : width * times, :3] = colours
    padded[:, :, : height * times, : width * times, 3] = 255
    joined = padded.transpose(0, 2, 1, 3, 4).reshape(rows * padded.shape[2], columns * padded.shape[3], 4)
    return joined[:-gap, :-gap]


def similarity_mosaic(
    similarity: Float[np.ndarray, "rows columns rows columns"], most: int = 14
) -> UInt8[np.ndarray, "height width 4"]:
    """Return one map per patch position: the brighter, the more alike are the embeddings there and at that patch.

    The scale runs from the smallest value to 1. Of a grid with more than `most` rows or columns, some are shown.
    """
    low = float(similarity.min())
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) for n in similarity.shape[:2])
    chosen = similarity[rows][:, columns]
    tiles = viridis((chosen - low) / max(1.0 - low, 1e-12))
    return mosaic(tiles, times=max(1, 420 // (tiles.shape[1] * tiles.shape[3])))


def filter_mosaic(filters: Float[np.ndarray, "k c h w"], columns: int = 7) -> UInt8[np.ndarray, "height width 4"]:
    """Return filters as small pictures, middle grey for 0, each scaled by its largest weight; full rows only."""
    columns = min(columns, len(filters))
    filters = filters[: len(filters) // columns * columns]
    scaled = filters / np.maximum(np.abs(filters).max(axis=(1, 2, 3), keepdims=True), 1e-12)
    levels = ((0.5 + 0.5 * scaled) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    tiles = levels.reshape(-1, columns, *levels.shape[1:])
    return mosaic(tiles, times=max(1, 420 // (columns * levels.shape[2])))


def _resized(pixels: Picture, scale: float, kernel: Image.Resampling) -> UInt8[np.ndarray, "rows columns c"]:
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    resized = np.asarray(image.resize((width, height), kernel))
    return resized[:, :, None] if resized.ndim == 2 else resized


def expert_mosaic(
    pixels: Picture, experts: Int[np.ndarray, "rows columns"], kept: Bool[np.ndarray, "rows columns"], side: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Return the picture tinted in the colour of the expert that took each patch, with its number; dark where none did.

    The longer side of the result is about `side`, or more where numbers would not fit into a patch.
    """
    rows, columns = experts.shape
    cell = max(NUMBERED, round(side / max(rows, columns)))
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    grey = np.asarray(image.convert("L").resize((columns * cell, rows * cell), Image.Resampling.BICUBIC)) / 255
    tints = np.array([expert_colour(int(number)) for number in experts.flat]).reshape(rows, columns, 3)
    tints = np.where(kept[:, :, None], tints, 0.0).repeat(cell, axis=0).repeat(cell, axis=1)
    lit = np.where(kept.repeat(cell, axis=0).repeat(cell, axis=1), grey, 0.3 * grey)
    canvas = Image.fromarray((255 * (0.45 * lit[:, :, None] + 0.55 * tints)).round().astype(np.uint8))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for row, column in np.argwhere(kept).tolist():
        text = str(experts[row, column])
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        x, y = (column + 0.5) * cell - (left + right) / 2, (row + 0.5) * cell - (top + bottom) / 2
        draw.text((x + 1, y + 1), text, font=font, fill="black")  # a shadow, so that it can be read on any picture
        draw.text((x, y), text, font=font, fill="white")
    return np.array(canvas)


def expert_colour(number: int) -> tuple[float, float, float]:
    """Return red, green and blue in [0, 1] of an expert; hues of neighbours lie far apart, by the golden section."""
    return colorsys.hls_to_rgb(number * 0.61803398875 % 1.0, 0.5, 0.75)
