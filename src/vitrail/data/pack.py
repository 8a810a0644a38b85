"""A pack: the small pictures of a folder, decoded once and kept in a file that later epochs and runs map into memory.

The file is raw bytes: for every picture its offset, height and width (little-endian int64; offset -1 where it is not in
the pack), then the pixels, one picture after another. Its name is a hash of what it was made of: the pictures' paths,
sizes and times of change, channels, and the decoders' versions. So a folder that changed has another pack, and the old
one goes when room is needed. It is written beside its place and moved there when complete.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import simplejpeg
from jaxtyping import Int, UInt8

from vitrail.cache import cache_folder
from vitrail.data.base import Picture
from vitrail.data.decode import SMALL, decode_small, open_picture, read_bytes
from vitrail.errors import BrokenPicture

log = logging.getLogger("vitrail")

FORMAT = 1  # raised when other pixels, or another layout, are written
LEAST = 1000
"""Pictures below which nothing is packed: they are decoded as fast as anyone could wish."""
PROBED = 64  # pictures whose headers tell whether packing is worth while
LARGEST = 2 * 2**30
"""Bytes of one pack: 10,900 pictures of 256 x 256 pixels, 700,000 of 32 x 32."""
ROOM = 2 * LARGEST
"""Bytes of all packs together; those unused for longest make way."""
SHARE_OF_DISK = 0.1
"""Part of the free space that a pack may take."""
AT_ONCE = 1024  # pictures decoded before they are written: bounds the memory


class Pack:
    """Decoded pictures by their place in the folder's list. Safe to read from several threads."""

    def __init__(self, path: Path, count: int) -> None:
        """Map a pack of a folder of `count` pictures into memory.

        Raises:
            ValueError: When the file is not such a pack.
            OSError: When it is not there.
        """
        self.path = path
        index = np.fromfile(path, "<i8", 3 * count)
        if index.size != 3 * count:
            raise ValueError(f"{path} ends within its index")
        self._index: Int[np.ndarray, "n 3"] = index.reshape(count, 3)
        self._pixels: UInt8[np.ndarray, " bytes"] = np.memmap(path, np.uint8, "r", offset=index.nbytes)
        self._starts = self._index[:, 0].tolist()  # asked for every picture: a list answers at once
        areas = self._index[:, 1:].prod(axis=1)[self._index[:, 0] >= 0]
        if not len(areas) or self._pixels.size % areas.sum():
            raise ValueError(f"{path} is not as long as its index says")
        self._channels = self._pixels.size // int(areas.sum())

    def __len__(self) -> int:
        """Return how many pictures are in the pack."""
        return sum(start >= 0 for start in self._starts)

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._index.nbytes + self._pixels.size

    def get(self, place: int) -> Picture | None:
        """Return a picture, which nobody may write to; None where it is not in the pack."""
        start = self._starts[place]
        if start < 0:
            return None
        _, height, width = self._index[place].tolist()
        return self._pixels[start : start + height * width * self._channels].reshape(height, width, self._channels)


def open_pack(paths: Sequence[Path], channels: int, *, workers: int = 2) -> Pack | None:
    """Return the pack of these pictures, made now if there is none; None where one is of no use or has no place.

    Of use is a pack of `LEAST` pictures or more, most of them small (`decode.SMALL`). It has no place when it would be
    larger than `LARGEST` or than `SHARE_OF_DISK`, or cannot be written. Large and broken pictures are not in it.

    Args:
        paths: The pictures' files.
        channels: 3 for RGB, 1 for grey.
        workers: Decoding threads.
    """
    caches = cache_folder()
    if len(paths) < LEAST or caches is None:
        return None
    path = caches / "packs" / f"{_contents(paths, channels)}.pack"
    with suppress(OSError, ValueError):  # there is none, or it is damaged and will be written anew
        pack = Pack(path, len(paths))
        os.utime(path)  # used: one that is not makes way first
        _say("read from", pack)
        return pack
    expected = _expected_bytes(paths, channels)
    if expected is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = min(LARGEST, int(SHARE_OF_DISK * shutil.disk_usage(path.parent).free))
        if expected > room:
            log.info(
                "small pictures are decoded anew every time: kept decoded they would take %s, more than the %s that "
                "%s has for them",
                *(_size(expected), _size(room), path.parent),
            )
            return None
        _make_way(path.parent, ROOM - expected)
        if not _write(path, paths, channels, room, max(1, workers)):
            return None
        pack = Pack(path, len(paths))
    except (OSError, ValueError) as error:
        log.info("small pictures are decoded anew every time: they cannot be kept in %s (%s)", path.parent, error)
        return None
    _say("now kept in", pack)
    return pack


def _say(where: str, pack: Pack) -> None:
    log.info(
        "%s small pictures, decoded: %s %s, %s (--input.no-packed leaves it)",
        *(f"{len(pack):,}", where, pack.path, _size(pack.nbytes)),
    )


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _contents(paths: Sequence[Path], channels: int) -> str:
    """Return a hash of what a pack is made of."""
    rows = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:  # loading it will say why
            rows.append((str(path.absolute()), -1, -1))
        else:
            rows.append((str(path.absolute()), stat.st_size, stat.st_mtime_ns))
    versions = FORMAT, PIL.__version__, simplejpeg.__version__
    return hashlib.sha256(ascii((versions, channels, rows)).encode()).hexdigest()[:32]


def _expected_bytes(paths: Sequence[Path], channels: int) -> int | None:
    """Return how large the pack will be, to judge by some pictures; None where it is not worth while."""
    areas = []
    for place in np.linspace(0, len(paths) - 1, PROBED).round().astype(int):
        with suppress(Exception):  # whatever is the matter with it, it will not be in the pack
            width, height = open_picture(read_bytes(paths[place])).size
            areas.append(width * height)
    small = [area for area in areas if area <= SMALL]
    if 2 * len(small) < PROBED:
        return None
    return round(channels * sum(small) / PROBED * len(paths))


def _make_way(folder: Path, room: int) -> None:
    """Remove files that were unused for longest, until those that stay take no more than `room` bytes.

    Whoever has one of them mapped goes on with it, or (on Windows) it stays.
    """
    files = sorted(((file.stat(), file) for file in folder.iterdir()), key=lambda pair: -pair[0].st_mtime)
    for stat, file in files:
        room -= stat.st_size
        if room < 0:
            with suppress(OSError):
                file.unlink()


def _write(path: Path, paths: Sequence[Path], channels: int, room: int, workers: int) -> bool:
    """Write a pack of at most `room` bytes; return whether it fitted and has any picture."""
    handle, part = tempfile.mkstemp(suffix=".part", dir=path.parent)  # no one else's, in whatever container they are
    index = np.full((len(paths), 3), -1, "<i8")
    end = 0
    try:
        with open(handle, "wb") as file:
            file.seek(index.nbytes)
            for place, picture in enumerate(_decoded(paths, channels, workers)):
                if picture is None:
                    continue
                index[place] = end, *picture.shape[:2]
                end += file.write(picture.data)
                if end > room:
                    log.info("small pictures are decoded anew every time: decoded they take more than %s", _size(room))
                    return False
            file.seek(0)
            file.write(index.data)
            file.flush()
            os.fsync(file.fileno())
        if end:
            Path(part).replace(path)
        return end > 0
    finally:
        Path(part).unlink(missing_ok=True)


def _decoded(paths: Sequence[Path], channels: int, workers: int) -> Iterator[Picture | None]:
    """Yield the pictures in order, None for those that are not to be in the pack."""
    with ThreadPoolExecutor(workers, thread_name_prefix="pack") as pool:
        for start in range(0, len(paths), AT_ONCE):
            yield from pool.map(partial(_small_picture, channels=channels), paths[start : start + AT_ONCE])


def _small_picture(path: Path, channels: int) -> Picture | None:
    try:
        return decode_small(read_bytes(path), channels)
    except BrokenPicture:  # told when training meets it
        return None
