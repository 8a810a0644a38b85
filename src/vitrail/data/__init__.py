"""Pictures and labels, from whatever they lie in: `open_data` is the door."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vitrail.data.arrays import ArraySource, find_cifar, find_idx, read_cifar, read_idx, read_npz, read_sheets
from vitrail.data.base import Batch, BoxChooser, Picture, Source, Splits, Subset
from vitrail.data.decode import crop_picture, decode, decode_crop, read_bytes, read_picture
from vitrail.data.folders import (
    PICTURE_SUFFIXES,
    UNLABELLED,
    FileSource,
    read_folder,
    read_manifest,
    read_unlabelled,
    require_known,
)
from vitrail.errors import UserError

__all__ = [
    "PICTURE_SUFFIXES",
    "ArraySource",
    "Batch",
    "BoxChooser",
    "FileSource",
    "Picture",
    "Source",
    "Splits",
    "Subset",
    "crop_picture",
    "decode",
    "decode_crop",
    "open_data",
    "read_bytes",
    "read_cifar",
    "read_folder",
    "read_idx",
    "read_manifest",
    "read_npz",
    "read_parts",
    "read_picture",
    "without_labels",
]

log = logging.getLogger("vitrail")

EMBEDDED = "clothing"
"""Stands for the data set that comes with Vitrail; a folder of this name is `./clothing`."""


def open_data(
    path: str | Path,
    *,
    channels: int = 3,
    val: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    labelled: bool = True,
) -> Splits:
    """Return the parts of a data set, always with one for validation.

    Args:
        path: Folder of pictures (`read_folder`), CSV manifest, CIFAR or IDX folder, `.npz` of arrays, or
            `clothing` for the 1,000 embedded colour photos.
        channels: 3 for RGB, 1 for grey; pictures are converted.
        val: Other data to validate on. Its labels are matched by class name.
        val_fraction: Share of the training pictures set aside, class by class, when there is no other validation
            part. A class of two or more pictures has at least one on each side.
        seed: Of that draw. It does not depend on the order in which the file system lists files.
        labelled: Whether labels matter. If not, all pictures are of one class, `pictures`, and a folder need not have
            class folders.

    Raises:
        UserError: When nothing that can be read is there, it has fewer than two classes, or `val` has other classes.
    """
    data = read_parts(path, channels, labelled=labelled)
    if labelled and len(data.train.classes) < 2:
        raise UserError(f"{path} has {len(data.train.classes)} class; a classifier needs two.")
    if val is not None:
        return Splits(train=data.train, val=_separate_val(val, data.train, channels, labelled), test=data.test)
    if data.val is not None:
        return data
    train, val_part = _set_aside(data.train, val_fraction, seed, str(path))
    return Splits(train=train, val=val_part, test=data.test)


def read_parts(path: str | Path, channels: int = 3, *, labelled: bool = True) -> Splits:
    """Return the parts of a data set as they lie, none set aside. For evaluating and checking; see `open_data`.

    Raises:
        UserError: When nothing that can be read is there.
    """
    data = _read(path, channels, read_folder if labelled else read_unlabelled)
    if labelled:
        return data
    return Splits(
        train=without_labels(data.train),
        val=None if data.val is None else without_labels(data.val),
        test=None if data.test is None else without_labels(data.test),
    )


def _read(path: str | Path, channels: int, read_pictures: Callable[[Path, int], Splits]) -> Splits:
    if channels not in (1, 3):
        raise UserError(f"pictures are read with 1 (grey) or 3 (RGB) channels, not {channels}.")
    if str(path) == EMBEDDED:
        return _with_channels(read_sheets(Path(__file__).parent / "clothing"), channels)
    path = Path(path)
    if path.is_dir():
        if find_cifar(path) is not None:
            return _with_channels(read_cifar(path), channels)
        if find_idx(path):
            return _with_channels(read_idx(path), channels)
        if any((path / name).exists() for name in ("cifar-10-batches-py", "data_batch_1", "cifar-100-python")):
            raise UserError(
                f"{path} holds CIFAR as Python pickles, which are never read because they can run code; "
                "fetch the binary version."
            )
        return read_pictures(path, channels)
    if not path.exists():
        raise UserError(f"no such data: {path}. Name a folder of pictures, a .csv, an .npz, or {EMBEDDED}.")
    if path.suffix.lower() == ".csv":
        return read_manifest(path, channels)
    if path.suffix.lower() == ".npz":
        return _with_channels(read_npz(path), channels)
    raise UserError(f"{path} is neither a folder nor a .csv or .npz file; unpack archives first.")


def _with_channels(data: Splits, channels: int) -> Splits:
    def convert(source: Source | None) -> Source | None:
        return source.with_channels(channels) if isinstance(source, ArraySource) else source

    return Splits(train=convert(data.train) or data.train, val=convert(data.val), test=convert(data.test))


def without_labels(source: Source) -> Source:
    """Return the same pictures, all of one class, `pictures`, whatever their labels were."""
    source = copy.copy(source)
    source.targets, source.classes = np.zeros(len(source), dtype=np.int64), UNLABELLED
    return source


def _separate_val(path: str, train: Source, channels: int, labelled: bool) -> Source:
    """Return the validation part of other data, its labels renumbered to the training part's classes."""
    data = read_parts(path, channels, labelled=labelled)
    if data.val is None and data.test is not None:
        raise UserError(f"{path} has the parts train and test, but none for validation; name one of its folders.")
    source = copy.copy(data.val or data.train)
    if source.multi_label != train.multi_label:
        raise UserError(f"{path} and the training data must both have one label per picture, or both several.")
    if source.classes == train.classes:
        return source
    number = {name: label for label, name in enumerate(train.classes)}
    require_known(source.classes, number, path)
    log.info("%s: labels are matched by class name; its classes differ from the training data's in order.", path)
    places = np.array([number[name] for name in source.classes])
    if source.multi_label:
        targets = np.zeros((len(source), len(train.classes)), dtype=np.float32)
        targets[:, places] = source.targets
        source.targets = targets
    else:
        source.targets = places[source.targets]
    source.classes = train.classes
    return source


def _set_aside(source: Source, fraction: float, seed: int, path: str) -> tuple[Source, Source]:
    """Split off a validation part: the same share of every class, drawn by seed."""
    if not 0 < fraction < 1:
        raise UserError(f"the share of pictures to validate on must lie between 0 and 1, not {fraction}.")
    # Uniform numbers and sorting instead of `permutation`, whose result NumPy may change from release to release.
    order = np.argsort(np.random.Generator(np.random.PCG64(seed % 2**64)).random(len(source)), kind="stable")
    if source.multi_label:
        groups = [order]
    else:
        groups = [order[source.targets[order] == label] for label in range(len(source.classes))]
    chosen = [group[: min(max(round(len(group) * fraction), 1), len(group) - 1)] for group in groups if len(group)]
    aside = np.sort(np.concatenate(chosen))
    if not len(aside):
        raise UserError(f"{path} has too few pictures to set any aside for validation; name some with --input.val.")
    rest = np.setdiff1d(np.arange(len(source)), aside)
    return Subset(source, rest), Subset(source, aside)
