"""Pictures that lie in memory at one size, and the files they come in: CIFAR binaries, IDX (MNIST), `.npz`."""

import copy
import gzip
import hashlib
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped, UInt8

from vitrail.data.base import BoxChooser, Picture, Source, Splits
from vitrail.data.decode import crop_picture, read_picture
from vitrail.errors import BrokenPicture, UserError
from vitrail.npz import read_npz as read_arrays

MAX_ARRAY_BYTES = 8 * 2**30
"""Largest array that a file may declare: a compressed file of zeros claims a thousand times its own size."""

CIFAR_SIDE = 32
CIFAR_FOLDERS = ("cifar-10-batches-bin", "cifar-100-binary")


class ArraySource(Source):
    """Pictures in one array. Names count through it: `train.bin#17`."""

    images: UInt8[np.ndarray, "n h w c"]
    """All pictures, 1 or 3 channels."""

    def __init__(
        self,
        images: Shaped[np.ndarray, "..."],
        targets: Shaped[np.ndarray, "..."],
        classes: Sequence[str],
        prefix: str = "picture",
    ) -> None:
        """Check and hold the arrays.

        Args:
            images: uint8, n h w c or n h w (grey).
            targets: One class index per picture, or 0/1 rows when a picture may carry several labels.
            classes: Names in the order of the labels.
            prefix: What names begin with: the file.

        Raises:
            UserError: When types, sizes or labels do not fit together.
        """
        self.images = _checked_images(images, prefix)
        self.classes = tuple(classes)
        self.targets = _checked_targets(targets, len(self.images), self.classes, prefix)
        self._prefix = prefix

    def load(self, index: int) -> Picture:
        return self.images[index]

    def load_crop(self, index: int, choose_box: BoxChooser, size: tuple[int, int], interpolation: str) -> Picture:
        return crop_picture(self.images[index], choose_box, size, interpolation)

    def pixels(self) -> UInt8[np.ndarray, "n h w c"]:
        return self.images

    def name(self, index: int) -> str:
        return f"{self._prefix}#{index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.images.shape, self.targets.shape, self.classes)).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.targets).data)
        return digest.hexdigest()

    def with_channels(self, channels: int) -> "ArraySource":
        """Return the same pictures as grey (1) or RGB (3), by Pillow's formula."""
        if channels == self.images.shape[3]:
            return self
        other = copy.copy(self)
        if channels == 3:
            other.images = np.repeat(self.images, 3, axis=3)
        else:  # ITU-R 601-2 luma in 16-bit fixed point
            red, green, blue = (self.images[..., i : i + 1].astype(np.uint32) for i in range(3))
            other.images = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)
        return other


def find_cifar(folder: Path) -> Path | None:
    """Return where CIFAR's official binaries lie, in the folder or one below; None when there are none.

    Raises:
        UserError: When both sets are there.
    """
    found = [
        place
        for place in (folder, *(folder / name for name in CIFAR_FOLDERS))
        if (place / "train.bin").exists() or any(place.glob("data_batch_*.bin"))
    ]
    if len(found) > 1:
        raise UserError(f"{folder} holds more than one CIFAR set; name one: {' or '.join(map(str, found))}.")
    return found[0] if found else None


def read_cifar(folder: Path) -> Splits:
    """Return CIFAR-10 or CIFAR-100 (fine labels) from its official binary files.

    Args:
        folder: Holds the files, or one of the folders `cifar-10-batches-bin` and `cifar-100-binary`.

    Raises:
        UserError: When a file is missing, cut short, or has labels without a name.
    """
    place = find_cifar(folder)
    if place is None:
        raise UserError(f"no CIFAR binaries in {folder}: neither data_batch_1.bin nor train.bin.")
    if (place / "train.bin").exists():
        classes = _read_names(place / "fine_label_names.txt")
        parts = [(["train.bin"], "train.bin"), (["test.bin"], "test.bin")]
        label_bytes = 2  # coarse, then fine
    else:
        classes = _read_names(place / "batches.meta.txt")
        parts = [([f"data_batch_{i}.bin" for i in range(1, 6)], "data_batch"), (["test_batch.bin"], "test_batch.bin")]
        label_bytes = 1
    train, test = (
        ArraySource(
            *_read_records([place / file for file in files], label_bytes), classes, f"{place.resolve().name}/{name}"
        )
        for files, name in parts
    )
    return Splits(train=train, test=test)


def find_idx(folder: Path) -> bool:
    """Return whether a folder holds pictures in MNIST's format."""
    return _idx_path(folder, "train-images-idx3-ubyte") is not None


def read_idx(folder: Path) -> Splits:
    """Return pictures from MNIST's four files, `train-images-idx3-ubyte` and so on, packed (.gz) or not.

    Class names are the lines of a `classes.txt` beside them, else "0" to "9". Without `t10k-` files there is no test
    part.

    Raises:
        UserError: When a file is missing, damaged, or has labels without a name.
    """
    names = folder / "classes.txt"
    classes = _read_names(names) if names.exists() else tuple("0123456789")
    train = _read_idx_part(folder, "train", classes)
    if train is None:
        raise UserError(f"no train-images-idx3-ubyte[.gz] in {folder}.")
    return Splits(train=train, test=_read_idx_part(folder, "t10k", classes))


def read_sheets(folder: Path) -> Splits:
    """Return pictures from `train.jpg` and `test.jpg`: sheets of square pictures side by side, a row per class.

    Class names are the lines of `classes.txt`.

    Raises:
        UserError: When a file is missing or damaged, or its rows are not the classes.
    """
    classes = _read_names(folder / "classes.txt")
    train, test = (_read_sheet(folder / f"{part}.jpg", classes, f"{folder.name}/{part}") for part in ("train", "test"))
    return Splits(train=train, test=test)


def read_npz(path: Path) -> Splits:
    """Return pictures from arrays x_train, y_train and, where present, x_val, y_val, x_test, y_test and classes.

    Pictures are uint8, n h w c or n h w; labels whole numbers; classes their names, else "0", "1" and so on.

    Raises:
        UserError: When the file is damaged, holds Python objects, declares more than `MAX_ARRAY_BYTES`, or its arrays
            are not of that kind.
    """
    arrays = read_arrays(path, limit=MAX_ARRAY_BYTES, advice="keep so many pictures as files in folders.")
    parts = [part for part in ("train", "val", "test") if f"x_{part}" in arrays or f"y_{part}" in arrays]
    for key in {"x_train", "y_train", *(f"{axis}_{part}" for axis in "xy" for part in parts)} - set(arrays):
        raise UserError(
            f"{path} has no array {key}; it holds {', '.join(sorted(arrays)) or 'none'}. Needed are x_train and "
            "y_train, possible are x_val and y_val, x_test and y_test, classes."
        )
    labels = {part: arrays[f"y_{part}"] for part in parts}
    if "classes" in arrays:
        classes = tuple(str(name) for name in arrays["classes"].reshape(-1))
    else:
        largest = max((int(y.max(initial=-1)) for y in labels.values() if _whole(y)), default=-1)
        classes = tuple(str(label) for label in range(largest + 1))
    sources = {
        part: ArraySource(
            arrays[f"x_{part}"],
            y[:, 0] if _whole(y) and y.ndim == 2 and y.shape[1] == 1 else y,  # Keras gives labels as a column
            classes,
            f"{path.name}:x_{part}",
        )
        for part, y in labels.items()
    }
    return Splits(train=sources["train"], val=sources.get("val"), test=sources.get("test"))


def _checked_images(images: np.ndarray, prefix: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise UserError(
            f"{prefix}: pictures are {images.dtype}, not uint8 levels from 0 to 255; "
            "where they lie in [0, 1], save (x * 255).round().astype('uint8')."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UserError(
            f"{prefix}: pictures have shape {images.shape}, not (number, height, width, 1 or 3 channels); "
            "channels come last, as after x.transpose(0, 2, 3, 1)."
        )
    return images


def _checked_targets(targets: np.ndarray, length: int, classes: tuple[str, ...], prefix: str) -> np.ndarray:
    if len(targets) != length:
        raise UserError(f"{prefix}: {length:,} pictures, but {len(targets):,} labels.")
    if targets.ndim == 2 and targets.dtype == np.float32 and targets.shape[1] == len(classes):
        return targets
    if targets.ndim != 1 or not _whole(targets):
        raise UserError(
            f"{prefix}: labels are {targets.dtype} of shape {targets.shape}; give one whole number per picture."
        )
    outside = np.flatnonzero((targets < 0) | (targets >= len(classes)))
    if len(outside):
        raise UserError(
            f"{prefix}#{outside[0]} has label {targets[outside[0]]}, but there are {len(classes)} class names "
            f"(labels 0 to {len(classes) - 1}); {len(outside):,} labels are outside."
        )
    return targets.astype(np.int64)


def _whole(values: np.ndarray) -> bool:
    return np.issubdtype(values.dtype, np.integer)


def _read_names(path: Path) -> tuple[str, ...]:
    """Return the lines of a file of class names."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; it names the classes, one a line.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    return tuple(line.strip() for line in lines if line.strip())


def _read_records(paths: Sequence[Path], label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pictures and labels of CIFAR files: records of label bytes and three planes of 32 x 32."""
    size = label_bytes + 3 * CIFAR_SIDE**2
    parts = []
    for path in paths:
        try:
            data = np.fromfile(path, dtype=np.uint8)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing; unpack the official archive again.") from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from error
        records = max(1, -(-data.size // size))
        if data.size != records * size:
            raise UserError(
                f"{path} has {data.size:,} bytes, expected {records * size:,} ({records:,} pictures of {size:,}); "
                "it is cut short, fetch it again."
            )
        parts.append(data.reshape(records, size))
    data = np.concatenate(parts)
    planes = data[:, label_bytes:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), data[:, label_bytes - 1]


def _read_sheet(path: Path, classes: tuple[str, ...], prefix: str) -> ArraySource:
    try:
        sheet = read_picture(path)
    except BrokenPicture as reason:
        raise UserError(f"{path} is damaged: {reason}; install vitrail again.") from reason
    height, width, channels = sheet.shape
    side, rest = divmod(height, len(classes))
    if rest or width % side:
        raise UserError(f"{path} has {width} x {height} pixels: no rows of squares for {len(classes)} classes.")
    tiles = sheet.reshape(len(classes), side, width // side, side, channels).swapaxes(1, 2)
    labels = np.repeat(np.arange(len(classes)), width // side)
    return ArraySource(tiles.reshape(-1, side, side, channels), labels, classes, prefix)


def _idx_path(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _read_idx_part(folder: Path, part: str, classes: tuple[str, ...]) -> ArraySource | None:
    names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    paths = [_idx_path(folder, name) for name in names]
    if paths == [None, None]:
        return None
    for name, path in zip(names, paths, strict=True):
        if path is None:
            raise UserError(f"no {name}[.gz] in {folder}, but its counterpart is there.")
    images, labels = (_read_idx_file(path, axes) for path, axes in zip(paths, (3, 1), strict=True) if path)
    return ArraySource(images, labels, classes, f"{folder.resolve().name}/{names[0]}")


def _read_idx_file(path: Path, axes: int) -> np.ndarray:
    """Return the array of an IDX file: two zeros, type (8: bytes), number of axes, big-endian sizes, values."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * axes)
            if len(head) < 4 + 4 * axes or head[:4] != bytes([0, 0, 8, axes]):
                raise UserError(f"{path} is not an IDX file of bytes with {axes} axes; fetch it again.")
            shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, len(head), 4))
            expected = math.prod(shape)
            if expected > MAX_ARRAY_BYTES:
                raise UserError(f"{path} declares {expected:,} bytes, more than the {MAX_ARRAY_BYTES:,} that are read.")
            data = bytearray(file.read(expected + 1))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or cannot be read ({error}); fetch it again.") from error
    if len(data) != expected:
        found = f"{len(data):,} bytes" if len(data) < expected else "more"
        raise UserError(f"{path} holds {found} after its header, expected {expected:,}; fetch it again.")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
