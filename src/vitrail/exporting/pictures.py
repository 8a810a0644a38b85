"""The pictures that an exported file is checked by: real ones, and odd ones made of them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vitrail.data import FileSource, Picture, Source, read_parts
from vitrail.data.decode import decode, read_bytes
from vitrail.errors import BrokenPicture, UserError

PLAIN, ODD = 44, 4
"""Pictures as they are, and pictures of each odd kind: 64 in all."""
SIZES = ((2, 3), (3, 211), (641, 97), (53, 59))
"""Columns and rows of pictures of odd sizes."""
ORIENTATIONS = (6, 3, 8, 5)
"""Of EXIF."""


class Sample(NamedTuple):
    """A picture in a file."""

    kind: str
    path: Path
    pixels: Picture
    """What `decode` reads there."""


def parity_pictures(data: str | Path, channels: int, folder: Path) -> list[Sample]:
    """Return pictures to compare answers by.

    Args:
        data: As `read_parts` takes it; its last part is taken, test before validation before training.
        channels: That the model takes.
        folder: Where pictures are written that are in no file yet.

    Raises:
        UserError: When the data cannot be read, or holds no picture that can.
    """
    _, source = read_parts(data, channels, labelled=False).for_evaluation()
    plain = [_in_file(source, index, folder) for index in _spread(len(source), PLAIN)]
    samples = [Sample("as they are", path, picture) for path in plain if (picture := _read(path, channels)) is not None]
    if not samples:
        raise UserError(f"{data}: none of {len(plain)} pictures can be read; name others with --data.")
    for number, (kind, write) in enumerate(_ODD.items()):
        for turn in range(ODD):
            basis = Image.fromarray(samples[(number * ODD + turn) % len(plain) % len(samples)].pixels.squeeze())
            path = write(basis.convert("RGB"), turn, folder / f"{kind.replace(' ', '-')}-{turn}")
            samples.append(Sample(kind, path, decode(read_bytes(path), channels)))
    return samples


def calibration_pictures(data: str | Path, channels: int, count: int) -> list[Picture]:
    """Return pictures to set the scales of 8-bit numbers by, of the training part where there is one.

    Raises:
        UserError: When the data cannot be read, or holds no picture that can.
    """
    parts = read_parts(data, channels, labelled=False)
    pictures: list[Picture] = []
    for index in _spread(len(parts.train), count):
        try:
            pictures.append(parts.train.load(index))
        except BrokenPicture:
            continue
    if not pictures:
        raise UserError(f"{data}: none of {count} pictures can be read; name others with --data.")
    return pictures


def _spread(length: int, count: int) -> list[int]:
    """Return up to `count` places, evenly spread over all: data often lies in the order of its classes."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def _in_file(source: Source, index: int, folder: Path) -> Path:
    """Return the file of a picture, written now where the source has no files."""
    if isinstance(source, FileSource):
        return source.paths[index]
    path = folder / f"picture-{index}.png"
    Image.fromarray(source.load(index).squeeze()).save(path)
    return path


def _read(path: Path, channels: int) -> Picture | None:
    try:
        return decode(read_bytes(path), channels)
    except BrokenPicture:
        return None


def _odd_size(picture: Image.Image, turn: int, path: Path) -> Path:
    return _save(picture.resize(SIZES[turn]), path)


def _grey(picture: Image.Image, _: int, path: Path) -> Path:
    return _save(picture.convert("L"), path)


def _sixteen_bits(picture: Image.Image, turn: int, path: Path) -> Path:
    high = np.asarray(picture.convert("L")).astype(np.uint16)
    low = np.random.default_rng(turn).integers(0, 256, high.shape, dtype=np.uint16)
    return _save(Image.fromarray(high * 256 + low), path)


def _turned(picture: Image.Image, turn: int, path: Path) -> Path:
    path = path.with_suffix(".jpg")
    exif = Image.Exif()
    exif[0x0112] = ORIENTATIONS[turn]
    picture.save(path, exif=exif)
    return path


def _transparent(picture: Image.Image, _: int, path: Path) -> Path:
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return _save(picture, path)


def _save(picture: Image.Image, path: Path) -> Path:
    path = path.with_suffix(".png")
    picture.save(path)
    return path


_ODD: dict[str, Callable[[Image.Image, int, Path], Path]] = {
    "odd sizes": _odd_size,
    "grey": _grey,
    "16-bit grey": _sixteen_bits,
    "turned by EXIF": _turned,
    "transparent": _transparent,
}
