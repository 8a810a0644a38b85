"""What one picture says of itself: its hashes, its size, how its file is made. Pixels are dropped at once."""

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vitrail.data import FileSource, Source, Subset, decode, read_bytes

# The same functions that `decode` goes by, so that a finding is true of what training sees.
from vitrail.data.decode import open_picture, orientation_of, raw_layout
from vitrail.errors import BrokenPicture

Trait = Literal["cmyk", "16-bit", "palette", "transparent", "grey", "turned"]

WINDOW = 1024  # pictures handed to the threads at a time
PATIENCE = 10.0  # seconds between two lines of progress

FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    ".png": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
}
"""Suffix -> what it promises."""

log = logging.getLogger("vitrail")


@dataclass(frozen=True, slots=True)
class Scan:
    """What is kept of one picture."""

    part: str
    name: str
    labels: tuple[int, ...]
    problem: str | None = None
    """Why it cannot be read; then all below is empty."""
    empty: bool = False
    """Whether its file has no bytes at all."""
    file_hash: bytes | None = None
    """sha256 of the file's bytes; None for pictures in arrays."""
    pixel_hash: bytes = b""
    """sha256 of shape and pixels."""
    size: tuple[int, int] = (0, 0)
    """Height and width, upright."""
    traits: tuple[Trait, ...] = ()
    format: str | None = None
    """What the file holds; None for pictures in arrays."""


def scan(parts: Mapping[str, Source], channels: int, workers: int) -> Iterator[Scan]:
    """Yield what every picture of every part says of itself, in order, decoding in `workers` threads."""
    total, done, told = sum(map(len, parts.values())), 0, time.monotonic()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for part, source in parts.items():

            def look(index: int, part: str = part, source: Source = source) -> Scan:
                return scan_picture(source, index, part, channels)

            for start in range(0, len(source), WINDOW):
                yield from pool.map(look, range(start, min(start + WINDOW, len(source))))
                done = min(done + WINDOW, total)
                if time.monotonic() - told > PATIENCE:
                    told = time.monotonic()
                    log.info("checked %s of %s pictures", f"{done:,}", f"{total:,}")


def scan_picture(source: Source, index: int, part: str, channels: int) -> Scan:
    """Return what one picture says of itself; a broken one says why."""
    name, labels = source.name(index), _labels(source, index)
    path, data = _path(source, index), None
    try:
        if path is None:
            pixels, file_hash, traits, form = source.load(index), None, (), None
        else:
            data = read_bytes(path)
            pixels, file_hash = decode(data, channels), hashlib.sha256(data).digest()
            traits, form = _inspect(data)
    except BrokenPicture as reason:
        return Scan(part, name, labels, problem=str(reason), empty=data == b"")
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return Scan(
        part,
        name,
        labels,
        file_hash=file_hash,
        pixel_hash=digest.digest(),
        size=pixels.shape[:2],
        traits=traits,
        format=form,
    )


def _labels(source: Source, index: int) -> tuple[int, ...]:
    target = source.targets[index]
    return tuple(map(int, np.flatnonzero(target))) if source.multi_label else (int(target),)


def _path(source: Source, index: int) -> Path | None:
    while isinstance(source, Subset):
        source, index = source.source, int(source.indices[index])
    return source.paths[index] if isinstance(source, FileSource) else None


def _inspect(data: bytes) -> tuple[tuple[Trait, ...], str | None]:
    """Return how the file of a readable picture is made, and its format."""
    picture = open_picture(data)
    layout, mode = raw_layout(picture), picture.mode
    if picture.format == "PNG" and b"eXIf" in data:
        picture.load()  # the turn may be written behind the pixels
    found: dict[Trait, bool] = {
        "cmyk": mode == "CMYK",
        "16-bit": mode.startswith("I") or "16" in layout,
        "palette": mode in ("P", "PA"),
        "transparent": picture.has_transparency_data,
        "grey": mode in ("1", "L", "LA", "La") or mode.startswith("I"),
        "turned": orientation_of(picture) > 1,
    }
    return tuple(trait for trait, has in found.items() if has), picture.format
