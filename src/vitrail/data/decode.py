"""Pictures from bytes: upright, 8 bits, grey or RGB. A picture whose pixels would be silently wrong is refused by name.

Read are JPEG, PNG, WebP, GIF, BMP and TIFF; of animations and pages the first. Transparent pixels are laid over white.
16-bit grey is scaled to 8 bits, round(value / 257); of 16-bit colour Pillow keeps the upper byte, which differs by
at most 1. CMYK and YCbCr follow Pillow's formulas. Colour profiles (ICC) are not applied, as in the papers' pipelines.
Pillow's warnings of odd TIFF tags pass through; where warnings are errors, such a picture counts as broken.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch.nn import functional as F

from vitrail.data.base import BoxChooser, Picture, Resized
from vitrail.data.orientation import Edges, exif_orientation, lies_across, stored_edges, upright
from vitrail.errors import BrokenPicture, UserError

MAX_PIXELS = 100_000_000
"""Largest width x height that is decoded; a header that declares more is refused before any pixel is read."""

DRAFT_MARGIN = 1.7
"""A JPEG is decoded at a half, quarter or eighth while the crop keeps this many times the target's rows and columns.

On 147 photos and crops of 64 to 128 pixels the result stays above 38 dB of the full decode; 1.5 falls to 35 dB, 1.25 to
33, and 2 would stay above 45.
"""

REACH = 2.0  # pixels of the coarser grid that the widest of the filters reaches on either side
SMALL = 256 * 256
"""Pixels up to which a picture is small: always decoded in full, so that one from a pack is the same as a new one."""
RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# TIFF tags
PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 262, 322, 323, 339


class _Jpeg(JpegImageFile):
    """Without Pillow's search of EXIF for a resolution, which warns of every damaged EXIF block."""

    def _read_dpi_from_exif(self) -> None:
        pass


class _Tiff(TiffImageFile):
    """Without Pillow's own pixel check, which warns below `MAX_PIXELS`; ours has been made from the header."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.core.new(self.mode, self._tile_size)
        super().load_prepare()


# The plugins are called directly: `Image.open` would also try formats that we do not want, warn of large pictures
# in a way that becomes an error under `-W error`, and open a phone's multi-picture JPEG as another format.
PLUGINS: dict[bytes, type[ImageFile]] = {
    b"\xff\xd8\xff": _Jpeg,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"GIF87a": GifImageFile,
    b"GIF89a": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\0": _Tiff,
    b"MM\0*": _Tiff,
    b"II+\0": _Tiff,
    b"MM\0+": _Tiff,
}


def decode(data: bytes, channels: int = 3, *, most: int = MAX_PIXELS) -> Picture:
    """Return the picture in a file's bytes, upright.

    Args:
        data: The whole file.
        channels: 3 for RGB, 1 for grey (ITU-R 601-2 luma of the RGB picture).
        most: Pixels that it may have.

    Raises:
        BrokenPicture: When it cannot be decoded in full, is not of a known format, has more pixels than `most`, or
            its values have no defined 8-bit form.
    """
    _check_channels(channels)
    with _decoder_errors():
        picture = open_picture(data, most)
    return _decoded(picture, channels)


def decode_small(data: bytes, channels: int = 3) -> Picture | None:
    """Return the picture as `decode` does where it is small (`SMALL`), else None after a look at its header."""
    _check_channels(channels)
    with _decoder_errors():
        picture = open_picture(data)
    return _decoded(picture, channels) if picture.width * picture.height <= SMALL else None


def read_picture(path: Path, channels: int = 3) -> Picture:
    """Return the picture in a file, upright; see `decode`.

    Raises:
        BrokenPicture: When it cannot be read or decoded.
    """
    return decode(read_bytes(path), channels)


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
        BrokenPicture: When it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise BrokenPicture(f"the file cannot be read: {error.strerror or error}") from error


def decode_crop(
    data: bytes, channels: int, choose_box: BoxChooser, size: tuple[int, int], interpolation: str
) -> Picture:
    """Return a part of a picture, resized (antialiased) to rows and columns `size`: the training view of one picture.

    Large JPEGs are decoded at a fraction of their size, see `DRAFT_MARGIN`; their pixels then differ slightly from
    those of `decode`.

    Args:
        data: The whole file.
        channels: 3 for RGB, 1 for grey.
        choose_box: Called once with height and width of the upright picture; returns top, left, height and width of
            the part to keep, in pixels.
        size: Rows and columns of the result.
        interpolation: `bilinear` or `bicubic`.

    Raises:
        BrokenPicture: As `decode`.
    """
    _check_channels(channels)
    with _decoder_errors():
        picture = open_picture(data)
    width, height = picture.size
    if width * height <= SMALL:
        return crop_picture(_decoded(picture, channels), choose_box, size, interpolation)
    with _decoder_errors():
        # Only of a JPEG are size and orientation settled before decoding: PNG may carry EXIF at its end.
        pixels = None if isinstance(picture, JpegImageFile) else _flatten(picture)
    view = _View(choose_box, width, height, orientation_of(picture), size)
    if pixels is not None:
        return view.upright(_to_array(view.of_image(pixels, interpolation), channels))
    scale = view.scale
    if channels == 3 and picture.mode == "RGB":
        array = _decode_quickly(data, width, height, scale)
        if array is not None:
            return view.upright(view.of_array(array, interpolation, scale))
    with _decoder_errors():
        if scale > 1:
            picture.draft(None, (width // scale, height // scale))
        pixels = _flatten(picture)
    return view.upright(_to_array(view.of_image(pixels, interpolation, scale), channels))


def crop_picture(picture: Picture, choose_box: BoxChooser, size: tuple[int, int], interpolation: str) -> Resized:
    """Return a part of a decoded picture of 1 or 3 channels, resized as `decode_crop` does."""
    height, width, _ = picture.shape
    return _View(choose_box, width, height, 1, size).of_array(picture, interpolation)


class _View:
    """The part of a picture that is wanted: where it lies in the stored picture, and what size it is to become."""

    def __init__(
        self, choose_box: BoxChooser, width: int, height: int, orientation: int, size: tuple[int, int]
    ) -> None:
        across = lies_across(orientation)
        box = choose_box(width, height) if across else choose_box(height, width)
        left, top, right, bottom = stored_edges(box, width, height, orientation)
        # A box may reach beyond the picture by a rounding error, which resizers refuse.
        self._edges = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
        self._target = size if across else (size[1], size[0])  # columns and rows before the turn
        self._orientation = orientation

    @property
    def scale(self) -> int:
        """1, 2, 4 or 8: by how much a JPEG may shrink while decoding."""
        left, top, right, bottom = self._edges
        spare = min((right - left) / self._target[0], (bottom - top) / self._target[1]) / DRAFT_MARGIN
        return next((scale for scale in (8, 4, 2) if spare >= scale), 1)

    def of_image(self, pixels: Image.Image, interpolation: str, scale: int = 1) -> Image.Image:
        """Return the part of a picture decoded at `scale`, resized by Pillow."""
        left, top, right, bottom = (edge / scale for edge in self._edges)
        return self._resize(pixels, (left, top, min(right, pixels.width), min(bottom, pixels.height)), interpolation)

    def of_array(self, pixels: Picture, interpolation: str, scale: int = 1) -> Resized:
        """Return the part of a picture decoded at `scale`, resized.

        Where it ends on whole pixels it is cut out and resized by torch, whose vectorised kernel computes as Pillow's
        does, at a multiple of its speed, but knows of no fractions. Unlike Pillow's it does not look beyond the part's
        edges: as torchvision, which crops first.
        """
        height, width, channels = pixels.shape
        left, top, right, bottom = (float(edge / scale) for edge in self._edges)
        columns, rows = self._target
        if all(edge.is_integer() for edge in (left, top, right, bottom)):
            part = np.require(pixels[int(top) : int(bottom), int(left) : int(right)], requirements=["C", "W"])
            # The batch axis comes first: made after the turn it hides from torch that channels lie together, and the
            # result would have to be turned twice more.
            image = torch.from_numpy(part)[None].permute(0, 3, 1, 2)
            image = F.interpolate(image, size=(rows, columns), mode=interpolation, antialias=True)
            return image[0].permute(1, 2, 0).numpy()
        # Only what the filter reaches is handed to Pillow, which copies it.
        reach_x = math.ceil(REACH * max(1.0, (right - left) / columns)) + 1
        reach_y = math.ceil(REACH * max(1.0, (bottom - top) / rows)) + 1
        x, y = max(0, int(left) - reach_x), max(0, int(top) - reach_y)
        part = pixels[y : math.ceil(bottom) + reach_y, x : math.ceil(right) + reach_x]
        image = Image.fromarray(part[:, :, 0] if channels == 1 else part)
        edges = left - x, top - y, min(right, width) - x, min(bottom, height) - y
        return _to_array(self._resize(image, edges, interpolation), channels)

    def upright(self, pixels: Picture) -> Resized:
        """Return the resized part as a person sees it."""
        return np.ascontiguousarray(upright(pixels, self._orientation))

    def _resize(self, pixels: Image.Image, edges: Edges, interpolation: str) -> Image.Image:
        # The gap lets Pillow average whole pixels first where a side shrinks more than fourfold: faster, above 45 dB.
        return pixels.resize(self._target, RESAMPLE[interpolation], box=edges, reducing_gap=2.0)


def _decode_quickly(data: bytes, width: int, height: int, scale: int) -> Picture | None:
    """Return the pixels of a JPEG of 8 bits and three components as stored; None where anything is the matter.

    libjpeg-turbo writes straight into the array. Pillow, which sets it up alike, makes the same pixels of the same
    file, and has the last word wherever it so much as warns: so one judge decides what is broken, and why.
    """
    rows, columns = -(-height // scale), -(-width // scale)
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns)
    except Exception:  # of whatever kind: Pillow tells what is the matter
        return None
    return pixels if pixels.shape == (rows, columns, 3) else None


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise UserError(f"pictures are read with 1 (grey) or 3 (RGB) channels, not {channels}.")


@contextmanager
def _decoder_errors() -> Iterator[None]:
    # Decoders raise far more than OSError: SyntaxError, RuntimeError, ValueError, struct.error ... have been seen.
    try:
        yield
    except BrokenPicture:
        raise
    except Exception as error:
        raise BrokenPicture(f"the decoder gave up ({type(error).__name__}: {error})") from error


def open_picture(data: bytes, most: int = MAX_PIXELS) -> ImageFile:
    """Return the picture with its header read and checked, its pixels, at most this many, not yet decoded."""
    if not data:
        raise BrokenPicture("the file is empty")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        plugin = WebPImageFile
    else:
        plugin = next((plugin for signature, plugin in PLUGINS.items() if data.startswith(signature)), None)
    if plugin is None:
        raise BrokenPicture(
            f"not a JPEG, PNG, WebP, GIF, BMP or TIFF file (it starts with {data[:12]!r}); convert it to one of them"
        )
    picture = plugin(BytesIO(data))
    width, height = picture.size
    if isinstance(picture, TiffImageFile):  # a small picture may declare one huge tile
        width, height = max(width, picture.tag_v2.get(TILE_WIDTH, 0)), max(height, picture.tag_v2.get(TILE_LENGTH, 0))
    if width * height > most:
        raise BrokenPicture(f"{width} x {height} pixels are more than the {most:,} that are read; make it smaller")
    return picture


def _flatten(picture: ImageFile) -> Image.Image:
    """Decode, and return the pixels as mode `L` or `RGB`, as stored (not yet upright)."""
    top = _grey_maximum(picture)
    layout = raw_layout(picture)
    picture.load()
    transparent = picture.info.get("transparency")
    if top is not None:
        return _scale_grey(picture, top, transparent)
    if picture.mode in ("L", "RGB") and transparent is None:
        return picture
    if isinstance(transparent, tuple) and layout.startswith("RGB;16"):
        raise BrokenPicture("16-bit RGB with a transparent colour, which Pillow cannot match; save an alpha channel")
    if isinstance(transparent, int) and layout in ("L;2", "L;4"):
        # Pillow stretches 2 and 4 bits to 8, but leaves the transparent value as the file has it.
        picture.info["transparency"] = transparent * (85 if layout == "L;2" else 17)
    if picture.mode == "La":
        return _over_white(picture.convert("LA"))
    if picture.has_transparency_data:
        return _over_white(picture)
    return picture.convert("L" if picture.mode == "1" else "RGB")


def raw_layout(picture: ImageFile) -> str:
    """Return Pillow's name for how the file lays out its values, such as `L;4` or `I;16B`; empty when not known."""
    args = picture.tile[0].args if picture.tile else ""
    return str(args[0] if isinstance(args, tuple) and args else args or "")


def _grey_maximum(picture: ImageFile) -> int | None:
    """Return the value of white where grey has more than 8 bits, else None; refuse modes without a defined white."""
    layout = raw_layout(picture)
    if isinstance(picture, TiffImageFile) and any(kind != 1 for kind in picture.tag_v2.get(SAMPLE_FORMAT, (1,))):
        raise BrokenPicture(
            f"TIFF of signed or floating-point numbers (mode {picture.mode}), whose black and white are not defined; "
            "save it as 8-bit or 16-bit unsigned"
        )
    if picture.mode.startswith("I;16") or (picture.mode == "I" and layout.startswith("I;16")):
        return 4095 if layout == "I;12" else 65535
    if picture.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise BrokenPicture(f"pictures of mode {picture.mode} have no defined 8-bit form; save it as 8-bit RGB or grey")
    return None


def _scale_grey(picture: ImageFile, top: int, transparent: int | None) -> Image.Image:
    values = np.asarray(picture).astype(np.uint32)
    grey = ((values * 255 + top // 2) // top).astype(np.uint8)
    # Photometric interpretation 0 means that 0 is white. Pillow honours it up to 8 bits only.
    if isinstance(picture, TiffImageFile) and picture.tag_v2.get(PHOTOMETRIC, 0) == 0:
        grey = 255 - grey
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _over_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    canvas = Image.new("RGB", picture.size, "white")
    canvas.paste(picture, mask=picture)
    return canvas


def _decoded(picture: ImageFile, channels: int) -> Picture:
    """Return a whole picture, upright."""
    with _decoder_errors():
        pixels = _flatten(picture)
    return np.ascontiguousarray(upright(_to_array(pixels, channels), orientation_of(picture)))


def orientation_of(picture: ImageFile) -> int:
    """Return the EXIF orientation, 1 to 8; 1 where there is none or EXIF is damaged."""
    return exif_orientation(picture.info.get("exif", b""))


def _to_array(pixels: Image.Image, channels: int) -> Picture:
    array = np.array(pixels.convert("L" if channels == 1 else "RGB"))
    return array[:, :, None] if channels == 1 else array
