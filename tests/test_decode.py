"""Decoding: every kind of picture equals a reference made by independent arithmetic, or is refused by name."""

import importlib
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import bombs, chunk, encode, hole, mutate, natural, picture, png, tiff, turned
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from scale import SCALE

from vitrail.data.decode import crop_picture, decode, decode_crop, read_picture
from vitrail.errors import BrokenPicture, UserError

decoding = importlib.import_module("vitrail.data.decode")  # its package has a function of this name
MUTANTS = 1000 * SCALE
H, W = 12, 20
RNG = np.random.default_rng(7)
GREY, ALPHA, INDEX = (RNG.integers(0, 256, (H, W), dtype=np.uint8) for _ in range(3))
COLOUR = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
INK = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (H, W), dtype=np.uint16)
PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
FADES = RNG.integers(0, 256, 256, dtype=np.uint8)
UPRIGHT = {  # EXIF orientation: how the stored picture is turned
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def whole(height: int, width: int) -> tuple[float, float, float, float]:
    """The box that keeps everything."""
    return 0.0, 0.0, float(height), float(width)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    colour, alpha = colour.astype(int), alpha.astype(int)[..., None]
    return (colour * alpha + 255 * (255 - alpha) + 127) // 255


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def luma(colour: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(colour.astype(int), -1, 0)
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) // 65536)[..., None]


def from_ink(ink: np.ndarray) -> np.ndarray:
    free = 255 - ink[..., 3:].astype(int)
    return free - (ink[..., :3] * free + 127) // 255


def from_ycbcr(values: np.ndarray) -> np.ndarray:
    y, cb, cr = np.moveaxis(values.astype(float), -1, 0)
    cb, cr = cb - 128, cr - 128
    colour = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=-1)
    return np.clip(np.round(colour), 0, 255)


def palette_picture() -> Image.Image:
    image = picture("P", INDEX)
    image.putpalette(PALETTE.tobytes())
    return image


FOUND: dict[
    str, tuple[Image.Image, Any, str, dict[str, Any]]
] = {  # mode: (picture, what it must decode to or why it is refused, formats that can hold it, options)
    "1": (picture("L", GREY).point(lambda v: 255 * (v > 99), "1"), rgb(255 * (GREY > 99)), "PNG GIF BMP TIFF WEBP", {}),
    "L": (picture("L", GREY), rgb(GREY), "PNG GIF BMP TIFF WEBP", {}),
    "LA": (picture("LA", np.stack([GREY, ALPHA], -1)), over_white(rgb(GREY), ALPHA), "PNG TIFF WEBP", {}),
    "P": (palette_picture(), PALETTE[INDEX], "PNG GIF BMP TIFF WEBP", {}),
    "P and alpha": (
        palette_picture(),
        over_white(PALETTE[INDEX], FADES[INDEX]),
        "PNG WEBP",
        {"transparency": FADES.tobytes()},
    ),
    "P and hole": (palette_picture(), over_white(PALETTE[INDEX], 255 * (INDEX != 9)), "PNG GIF", {"transparency": 9}),
    "RGB": (picture("RGB", COLOUR), COLOUR, "PNG BMP TIFF WEBP", {}),
    "RGBA": (
        picture("RGBA", np.dstack([COLOUR, ALPHA])),
        over_white(COLOUR, ALPHA),
        "PNG TIFF WEBP",
        {},
    ),
    "I;16": (picture("I;16", DEEP), rgb(np.round(DEEP / 257)), "PNG TIFF", {}),
    "I": (picture("I", DEEP.astype(np.int32)), "signed or floating", "TIFF", {}),
    "F": (picture("F", GREY.astype(np.float32)), "mode F", "TIFF", {}),
    "CMYK": (picture("CMYK", INK), from_ink(INK), "TIFF", {}),
    "YCbCr": (picture("YCbCr", COLOUR), from_ycbcr(COLOUR), "TIFF", {}),
    "LAB": (picture("LAB", COLOUR), "mode LAB", "TIFF", {}),
}


@pytest.mark.parametrize(("mode", "kind"), [(mode, kind) for mode in FOUND for kind in FOUND[mode][2].split()])
def test_every_colour_mode_equals_its_reference_or_is_refused_by_name(mode: str, kind: str) -> None:
    image, wanted, _, options = FOUND[mode]
    if mode == "P and alpha" and kind == "WEBP":  # Pillow takes WebP's transparency from the picture
        image = image.copy()
        image.info["transparency"] = options["transparency"]
        options = {}
    data = encode(image, kind, **options)
    if isinstance(wanted, str):
        with pytest.raises(BrokenPicture, match=wanted):
            decode(data)
        return
    colour = decode(data)
    assert colour.dtype == np.uint8 and colour.shape == (H, W, 3) and colour.flags.writeable
    assert np.abs(colour.astype(int) - wanted).max() <= (mode == "YCbCr")  # Pillow's fixed point
    assert np.array_equal(decode(data, channels=1), luma(colour))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpeg_equals_arithmetic_on_its_stored_values(mode: str) -> None:
    data = encode(FOUND[mode][0], "JPEG", quality=90)
    stored = np.asarray(Image.open(BytesIO(data)))
    wanted = rgb(stored) if mode == "L" else from_ink(stored) if mode == "CMYK" else stored
    assert np.array_equal(decode(data), wanted)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (png(8, 1, 1, 0, b"\0\x1b"), [0, 0, 0, 255, 255, 0, 255, 255]),
        (png(4, 1, 2, 0, b"\0\x1b"), [0, 85, 170, 255]),
        (png(4, 1, 2, 0, b"\0\x1b", hole(1)), [0, 255, 170, 255]),
        (png(4, 1, 4, 0, b"\0\x01\x23"), [0, 17, 34, 51]),
        (png(4, 1, 4, 0, b"\0\x01\x23", hole(2)), [0, 17, 255, 51]),
        (png(3, 1, 8, 0, b"\0\x01\x02\x03", hole(2)), [1, 255, 3]),
        (png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 0, 128, 129, 65535)), [0, 0, 1, 255]),
        (png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 0, 300, 301), hole(300)), [0, 255, 1]),
        (png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 25600, 65535, 25600, 0)), [100, 255]),
        (png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 25600, 25855, 25600)), [100]),
        (png(2, 1, 8, 2, b"\0\x01\x01\x01\x02\x02\x02", hole(2, 2, 2)), [1, 255]),
    ],
    ids=lambda value: "png" if isinstance(value, bytes) else str(value),
)
def test_png_of_every_depth_and_with_a_transparent_value(data: bytes, wanted: list[int]) -> None:
    assert decode(data, channels=1).ravel().tolist() == wanted


def test_a_transparent_colour_of_16_bits_is_refused_because_pillow_drops_the_lower_byte() -> None:
    with pytest.raises(BrokenPicture, match="16-bit RGB with a transparent colour"):
        decode(png(1, 1, 16, 2, b"\0" + bytes(6), hole(1, 2, 3)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_of_either_byte_order_and_either_white(order: str, packed: bool) -> None:
    values = np.array([0, 128, 129, 65535], dtype=order + "u2")
    assert decode(tiff(order, 16, values, packed=packed), 1).ravel().tolist() == [0, 0, 1, 255]
    if order == "<":  # the other is unknown to Pillow
        assert decode(tiff(order, 16, values, white=0, packed=packed), 1).ravel().tolist() == [255, 255, 254, 0]


def test_12_bit_tiff_is_scaled_from_12_bits() -> None:
    values = [0x000, 0x800, 0x801, 0xFFF]
    packed = np.frombuffer(bytes.fromhex("".join(f"{value:03x}" for value in values)), np.uint8)
    assert decode(tiff("<", 12, packed), 1).ravel().tolist() == [round(value * 255 / 4095) for value in values]


def test_a_tiff_whose_grey_is_multiplied_by_alpha_is_laid_over_white() -> None:
    grey, alpha = np.array([[0, 100, 0, 60]], np.uint8), np.array([[0, 255, 128, 128]], np.uint8)
    data = encode(picture("LA", np.stack([grey, alpha], -1)), "TIFF")
    plain, multiplied = (struct.pack("<HHII", 338, 3, 1, kind) for kind in (2, 1))
    assert plain in data
    assert np.abs(decode(data.replace(plain, multiplied), 1)[..., 0] - (grey + 255.0 - alpha)).max() <= 1


@pytest.mark.parametrize(("bits", "kind"), [(8, "i1"), (16, "<i2"), (32, "<i4")])
def test_signed_tiff_is_refused(bits: int, kind: str) -> None:
    with pytest.raises(BrokenPicture, match="black and white are not defined; save it as 8-bit or 16-bit"):
        decode(tiff("<", bits, np.zeros(4, kind), form=2))


def test_32_bit_whole_numbers_are_refused_by_name() -> None:
    with pytest.raises(BrokenPicture, match="mode I "):
        decode(tiff("<", 32, np.zeros(4, "<u4")))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_before_and_after_cropping(kind: str, orientation: int) -> None:
    image = picture("RGB", COLOUR)
    upright = UPRIGHT[orientation](decode(encode(image, kind)))
    data = turned(kind, orientation, image)
    assert np.array_equal(decode(data), upright)

    height, width = upright.shape[:2]
    box = (1.25, 2.5, height - 3.75, width - 4.0)
    asked = []
    crop = decode_crop(data, 3, lambda *size: asked.append(size) or box, (7, 5), "bilinear")
    assert asked == [(height, width)]
    # Turning after the resize instead of before swaps Pillow's two roundings.
    assert np.abs(crop.astype(int) - crop_picture(upright, lambda *_: box, (7, 5), "bilinear")).max() <= 1


def test_orientation_after_the_pixels_of_a_png_is_applied() -> None:
    exif = chunk(b"eXIf", b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0))
    data = encode(picture("RGB", COLOUR), "PNG")
    assert np.array_equal(decode(data[:-12] + exif + data[-12:]), np.rot90(COLOUR, -1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_unknown_orientation_leaves_a_picture_as_it_lies(orientation: int) -> None:
    image = picture("RGB", COLOUR)
    crop = decode_crop(turned("JPEG", orientation, image), 3, whole, (H, W), "bicubic")
    assert np.array_equal(crop, decode(encode(image, "JPEG")))


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"nonsense", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x09\x01"])
def test_damaged_exif_leaves_a_picture_as_it_lies(exif: bytes) -> None:
    data = encode(picture("RGB", COLOUR), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(exif)) + b"Exif\0\0" + exif
    assert np.array_equal(decode(data[:2] + segment + data[20:]), decode(data))  # in place of the JFIF segment


# Scale, share of the picture's sides, rows and columns of the result.
SCALED = ((8, 1.0, (30, 45)), (4, 0.7, (64, 48)), (2, 0.5, (64, 64)), (1, 0.3, (80, 80)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("short", [True, False])
def test_jpegs_decoded_at_a_fraction_keep_their_quality(
    orientation: int, interpolation: str, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    quickly, draft = decoding._decode_quickly, JpegImageFile.draft
    if short:
        monkeypatch.setattr(decoding, "_decode_quickly", lambda *args: asked.append(args[3]) or quickly(*args))
    else:
        monkeypatch.setattr(decoding, "_decode_quickly", lambda *args: None)
        monkeypatch.setattr(
            JpegImageFile, "draft", lambda self, *args: asked.append(1003 // args[1][0]) or draft(self, *args)
        )
    data = turned("JPEG", orientation, natural(757, 1003))  # sides that no scale divides
    upright = decode(data)
    height, width = upright.shape[:2]
    # The largest scale at which both sides of the crop keep the margin's multiple of the target's rows and columns.
    for scale, share, size in SCALED:
        box = (0.3 * (1 - share) * height, 0.8 * (1 - share) * width, share * height, share * width)
        fast = decode_crop(data, 3, lambda *_, box=box: box, size, interpolation)
        edges = (box[1], box[0], box[1] + box[3], box[0] + box[2])
        kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
        full = np.asarray(Image.fromarray(upright).resize(size[::-1], kind, box=edges))
        assert asked == ([scale] if short or scale > 1 else [])
        assert psnr(fast, full) > 40
        asked.clear()


JPEGS = {
    "4:2:0": {"quality": 90},
    "4:2:2": {"quality": 75, "subsampling": "4:2:2"},
    "4:4:4": {"quality": 95, "subsampling": "4:4:4"},
    "progressive": {"quality": 60, "progressive": True},
    "RGB": {"quality": 80, "keep_rgb": True},
    "with restarts": {"quality": 80, "restart_marker_blocks": 3},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("shape", [(300, 401), (257, 256)])
def test_a_jpeg_has_the_same_pixels_by_the_short_way(options: dict[str, Any], shape: tuple[int, int]) -> None:
    height, width = shape
    data = encode(natural(*shape), "JPEG", **options)
    assert np.array_equal(decoding._decode_quickly(data, width, height, 1), decode(data))
    for scale in (2, 4, 8):
        image = Image.open(BytesIO(data))
        image.draft(None, (width // scale, height // scale))
        assert np.array_equal(decoding._decode_quickly(data, width, height, scale), np.asarray(image))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_the_short_way_knows_how_a_jpeg_lies(orientation: int) -> None:
    data = turned("JPEG", orientation, natural(300, 401))
    upright = decode(data)

    def choose_box(height: int, width: int) -> tuple[float, float, float, float]:
        assert (height, width) == upright.shape[:2]
        return 31.0, 17.0, 200.0, 190.0

    crop = decode_crop(data, 3, choose_box, (90, 70), "bilinear")
    assert np.abs(crop.astype(int) - crop_picture(upright, choose_box, (90, 70), "bilinear")).max() <= 1


def with_segments(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with more segments, of marker and content, before its tables."""
    data = encode(natural(300, 401), "JPEG")
    more = [struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content for marker, content in segments]
    return data[:20] + b"".join(more) + data[20:]


ODD = {
    "grey": (encode(natural(300, 401).convert("L"), "JPEG"), False),
    "CMYK": (encode(natural(300, 401).convert("CMYK"), "JPEG"), False),
    "EXIF in two pieces": (with_segments((0xE1, b"Exif\0\0II*\0"), (0xE1, b"Exif\0\0II*\0")), False),
    "a JFIF segment that is too short": (with_segments((0xE0, b"JFIF\0")), True),
    "a colour profile that is too short": (with_segments((0xE2, b"ICC_PROFILE\0\1")), True),
    "Photoshop's blocks": (with_segments((0xED, b"Photoshop 3.0\0" + bytes(40))), False),
    "a marker between segments": (with_segments((0xF7, b"abc")), True),
    "junk between segments": (with_segments((0xFE, b"abc")).replace(b"abc", b"abc\0"), False),
    "junk after the picture": (with_segments() + bytes(1000), False),
}


@pytest.mark.parametrize(("data", "refused"), ODD.values(), ids=ODD)
def test_odd_jpegs_end_as_pillow_says(data: bytes, refused: bool) -> None:
    if refused:
        for read in (lambda: decode(data), lambda: decode_crop(data, 3, whole, (30, 40), "bilinear")):
            with pytest.raises(BrokenPicture):
                read()
        return
    crop = decode_crop(data, 3, whole, (30, 40), "bilinear")
    assert np.abs(crop.astype(int) - crop_picture(decode(data), whole, (30, 40), "bilinear")).mean() < 3


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_plain_jpeg_that_ends_early_is_broken(share: float) -> None:
    data = encode(natural(300, 401), "JPEG", quality=90)
    with pytest.raises(BrokenPicture, match="truncated"):
        decode_crop(data[: int(share * len(data))], 3, whole, (64, 64), "bicubic")


def test_mutated_jpegs_end_alike_by_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, image = np.random.default_rng(12), natural(270, 250)
    originals = [
        encode(image, "JPEG", quality=85),
        encode(image, "JPEG", quality=85, progressive=True),
        encode(image, "JPEG", quality=40, subsampling="4:2:2", comment=b"words"),
        turned("JPEG", 6, image),
    ]

    def attempt(data: bytes) -> np.ndarray | str:
        try:
            return decode_crop(data, 3, whole, (40, 40), "bilinear").astype(int)
        except BrokenPicture as reason:
            return str(reason)

    kinds = []
    for number in range(MUTANTS // 4):
        data = mutate(originals[number % len(originals)], rng)
        found = attempt(data)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "_decode_quickly", lambda *args: None)
            wanted = attempt(data)
        if isinstance(found, str) or isinstance(wanted, str):
            assert found == wanted, number
        else:
            assert np.abs(found - wanted).max() <= 2, number
        kinds.append(isinstance(found, str))
    assert 0.1 < np.mean(kinds) < 0.9


def test_a_box_that_overshoots_by_rounding_is_clipped() -> None:
    data = encode(picture("RGB", COLOUR), "PNG")
    crop = decode_crop(data, 3, lambda *_: (-1e-9, -1e-9, H + 2e-9, W + 2e-9), (H, W), "bicubic")
    assert np.array_equal(crop, COLOUR)


def test_a_crop_of_the_whole_at_its_own_size_is_the_picture() -> None:
    data = encode(picture("RGB", COLOUR), "JPEG")
    crop = decode_crop(data, 1, whole, (H, W), "bicubic")
    assert np.array_equal(crop, decode(data, 1))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_animations_and_pages_the_first_is_read(kind: str) -> None:
    frames = [picture("L", np.full((H, W), level, np.uint8)) for level in (10, 200, 90)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.array_equal(decode(data), np.full((H, W, 3), 10))


def test_a_phones_multi_picture_jpeg_is_read_as_its_first_picture() -> None:
    image = picture("RGB", COLOUR)
    data = encode(image, "MPO", save_all=True, append_images=[picture("L", GREY)])
    assert Image.open(BytesIO(data)).format == "MPO"
    assert np.array_equal(decode(data), decode(encode(image, "JPEG")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1)])
def test_extreme_shapes(kind: str, shape: tuple[int, int]) -> None:
    data = encode(picture("L", np.full(shape, 77, np.uint8)), kind)
    assert np.array_equal(decode(data, 1), np.full((*shape, 1), 77))
    crop = decode_crop(data, 3, whole, (4, 4), "bicubic")
    assert np.array_equal(crop, np.full((4, 4, 3), 77))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_pictures_are_broken(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    data = encode(picture("L", noise), kind)
    for length in (16, len(data) // 4, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(BrokenPicture):
            decode(data[:length])
        with pytest.raises(BrokenPicture):
            decode_crop(data[:length], 3, whole, (8, 8), "bilinear")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "not a JPEG, PNG, WebP, GIF, BMP or TIFF file .it starts with b'<!DOCTYPE ht"),
        (b"\0\0\0\x1cftypavif", "convert it to one of them"),
        (b"%PDF-1.7", "not a JPEG"),
        (b"\xff\xd8\xff", "the decoder gave up"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenPicture, match=reason):
        decode(data)


def test_other_numbers_of_channels_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match="channels, not 4"):
        decode(encode(picture("RGB", COLOUR), "PNG"), channels=4)


def test_a_missing_file_is_a_broken_picture(tmp_path: Path) -> None:
    with pytest.raises(BrokenPicture, match="cannot be read: No such file"):
        read_picture(tmp_path / "gone.png")


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_from_their_header(name: str) -> None:
    data = bombs()[name]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(BrokenPicture, match=r"more than the 100,000,000|too large|exceeds limit"):
            decode(data)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_large_pictures_below_the_cap_are_read_without_a_warning(kind: str) -> None:
    data = encode(Image.new("1", (9800, 9700), 1), kind)  # 95 million pixels; Pillow warns from 89 on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        crop = decode_crop(data, 1, lambda *_: (5000.0, 5000.0, 8.0, 8.0), (8, 8), "bilinear")
    assert np.array_equal(crop, np.full((8, 8, 1), 255))


def test_threads_decode_as_one_thread_does() -> None:
    pictures = [encode(image, kinds.split()[0], **options) for image, _, kinds, options in FOUND.values()]

    def attempt(data: bytes) -> str:
        try:
            return str(decode(data).tolist())
        except BrokenPicture as reason:
            return str(reason)

    alone = [attempt(data) for data in pictures]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, pictures * 8)) == alone * 8


def by_pillow(data: bytes) -> np.ndarray:
    """What Pillow itself makes of the same bytes, over white."""
    image = Image.open(BytesIO(data))
    image.load()
    if image.mode == "I;16":
        return rgb(np.round(np.asarray(image) / 257))
    if image.mode == "La":
        image = image.convert("LA")
    pixels = np.asarray(image.convert("RGBA"))
    return over_white(pixels[..., :3], pixels[..., 3])


def test_mutated_pictures_are_broken_or_decode_as_pillow_decodes_them() -> None:
    rng = np.random.default_rng(11)
    image = natural(40, 56)
    clear = image.copy()
    clear.putalpha(image.convert("L"))
    originals = [
        *(encode(image, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")),
        *(encode(image.quantize(64), kind) for kind in ("PNG", "GIF", "BMP", "TIFF")),
        *(encode(clear, kind) for kind in ("PNG", "WEBP", "TIFF")),
        encode(image, "JPEG", progressive=True),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image.convert("I;16"), "PNG"),
        *(encode(image, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")),
    ]
    broken = 0
    for number in range(MUTANTS):
        data = mutate(originals[number % len(originals)], rng)
        start = time.thread_time()
        try:
            found = decode(data)
        except BrokenPicture as reason:
            assert str(reason)
            broken += 1
            continue
        finally:
            # A damaged header may declare up to 100 million pixels, which take their time; nothing may hang.
            assert time.thread_time() - start < 4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.array_equal(found, by_pillow(data)), number
    assert MUTANTS * 0.2 < broken < MUTANTS * 0.9
