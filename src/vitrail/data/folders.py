"""Pictures that lie as files: one folder per class, or a CSV manifest."""

import csv
import hashlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from vitrail.data.base import BoxChooser, Picture, Source, Splits
from vitrail.data.decode import crop_picture, decode_crop, read_bytes, read_picture
from vitrail.data.pack import Pack, open_pack
from vitrail.errors import UserError, did_you_mean

log = logging.getLogger("vitrail")

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Name of a folder or of a manifest's `split` cell, in lower case -> part."""
UNLABELLED = ("pictures",)
"""The one class of pictures whose labels do not matter."""

PATH_COLUMNS = ("path", "file", "filename", "image")
LABEL_COLUMNS = ("label", "class")
LITTER = frozenset({"__macosx", "thumbs.db", "desktop.ini", "@eadir"})  # what systems leave behind, beside dot files
SHOWN = 3  # offenders that a message names


class FileSource(Source):
    """Pictures in files, decoded when asked for, or from a pack once there is one. Names are paths."""

    paths: tuple[Path, ...]
    """Where each picture lies."""

    def __init__(
        self,
        paths: Sequence[Path],
        targets: Int[np.ndarray, " n"] | Float[np.ndarray, "n classes"],
        classes: Sequence[str],
        *,
        root: Path | None = None,
        channels: int = 3,
    ) -> None:
        """Hold the paths.

        Args:
            paths: One per picture.
            targets: Class indices, or 0/1 rows.
            classes: Names in the order of the labels.
            root: Folder that the fingerprint leaves out of the paths, so that data may move.
            channels: 3 for RGB, 1 for grey.
        """
        self.paths = tuple(paths)
        self.targets = targets
        self.classes = tuple(classes)
        self._root = root
        self._channels = channels
        self._pack: Pack | None = None
        self._packed = False

    def pack(self, workers: int) -> None:
        """Keep small pictures decoded in a file where that is of use and has a place: see `pack.open_pack`."""
        if not self._packed:  # training and validation may be parts of this source, and both ask
            self._pack, self._packed = open_pack(self.paths, self._channels, workers=workers), True

    def load(self, index: int) -> Picture:
        packed = None if self._pack is None else self._pack.get(index)
        return read_picture(self.paths[index], self._channels) if packed is None else packed

    def load_crop(self, index: int, choose_box: BoxChooser, size: tuple[int, int], interpolation: str) -> Picture:
        packed = None if self._pack is None else self._pack.get(index)
        if packed is not None:
            return crop_picture(packed, choose_box, size, interpolation)
        return decode_crop(read_bytes(self.paths[index]), self._channels, choose_box, size, interpolation)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def fingerprint(self) -> str:
        """Return a hash of the classes and of every picture's path, size in bytes and label; contents are not read."""
        rows = []
        for path, target in zip(self.paths, self.targets, strict=True):
            inside = self._root is not None and path.is_relative_to(self._root)
            place = path.relative_to(self._root) if inside and self._root else path
            try:
                size = path.stat().st_size
            except OSError:  # loading it will say why
                size = -1
            rows.append((place.as_posix(), size, target.tolist()))
        # A name that is not Unicode holds lone surrogates, which cannot be encoded; `ascii` escapes them.
        return hashlib.sha256(ascii((self.classes, sorted(rows))).encode()).hexdigest()


def read_folder(root: Path, channels: int = 3) -> Splits:
    """Return pictures from `root/CLASS/**/picture`, or from `root/PART/CLASS/**/picture`.

    Parts are train (training), val (valid, validation) and test (testing, eval, evaluation), in any letter case.
    Classes are the training part's folders that have pictures, sorted by name. Hidden and other files are left out.

    Args:
        root: The folder.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: When there are no pictures, fewer than two classes, a class that training lacks, or no way to tell
            what is meant.
    """
    folders = _subfolders(root)
    parts = _part_folders(root, folders) or {"train": root}
    found = {part: _find_classes(folder, {_identity(root)}) for part, folder in parts.items()}
    classes = tuple(sorted(found["train"]))
    if len(classes) < 2:
        raise _too_few_classes(parts["train"], classes)
    sources: dict[str, FileSource] = {}
    for part, pictures in found.items():
        require_known(pictures, found["train"], str(parts[part]))
        if not pictures:
            log.warning("%s has no pictures in class folders; it is left out.", parts[part])
            continue
        paths = [path for name in sorted(pictures) for path in pictures[name]]
        targets = [label for label, name in enumerate(classes) for _ in pictures.get(name, ())]
        sources[part] = FileSource(paths, np.array(targets, dtype=np.int64), classes, root=root, channels=channels)
    return Splits(train=sources["train"], val=sources.get("val"), test=sources.get("test"))


def read_unlabelled(root: Path, channels: int = 3) -> Splits:
    """Return all pictures below `root`, or below `root/PART` where there is a training part, as of one class.

    How they lie in folders does not matter. Parts are named as for `read_folder`.

    Args:
        root: The folder.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: When there are no pictures, or two folders for one part.
    """
    folders = _subfolders(root)
    named = [folder for folder in folders if folder.name.lower() in PART_NAMES]
    with_training = any(PART_NAMES[folder.name.lower()] == "train" for folder in named)
    parts = _one_each(root, named) if with_training else {"train": root}
    if with_training and (others := {folder.name for folder in folders} - {folder.name for folder in named}):
        log.warning("%s: left out %s, which are not parts of the data.", root, ", ".join(sorted(others)))
    sources: dict[str, FileSource] = {}
    for part, folder in parts.items():
        left_out: Counter[str] = Counter()
        paths = _find_pictures(folder, set(), left_out)
        _tell_left_out(folder, left_out)
        if paths:
            labels = np.zeros(len(paths), dtype=np.int64)
            sources[part] = FileSource(paths, labels, UNLABELLED, root=root, channels=channels)
    if "train" not in sources:
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        raise UserError(f"no pictures below {parts['train']}; they must have one of the suffixes {suffixes}.")
    return Splits(train=sources["train"], val=sources.get("val"), test=sources.get("test"))


def read_manifest(path: Path, channels: int = 3) -> Splits:
    """Return pictures from a CSV file (UTF-8) with the columns `path`, `label` and, if wanted, `split`.

    `path` (or file, filename, image) is relative to the CSV. Instead of `label` (or class), a column `labels` may hold
    any number of class names, separated by semicolons. `split` holds the names of parts that `read_folder` knows;
    without it all pictures are for training. Classes are sorted by name.

    Args:
        path: The CSV file.
        channels: 3 for RGB, 1 for grey.

    Raises:
        UserError: When columns, labels or files are missing, or another part has a class that training lacks.
    """
    rows, multi_label = _read_rows(path)
    missing = [row for row in rows if not (path.parent / row.file).is_file()]
    if missing:
        first = ", ".join(f"line {row.line}: {row.file}" for row in missing[:SHOWN])
        raise UserError(f"{path}: {len(missing):,} of {len(rows):,} files do not exist ({first}).")
    classes = tuple(sorted({name for row in rows if row.part == "train" for name in row.labels}))
    number = {name: label for label, name in enumerate(classes)}
    sources: dict[str, FileSource] = {}
    for part in {row.part: None for row in rows}:
        members = [row for row in rows if row.part == part]
        for row in members:
            require_known(row.labels, number, f"{path}, line {row.line}")
        if multi_label:
            targets = np.zeros((len(members), len(classes)), dtype=np.float32)
            for target, row in zip(targets, members, strict=True):
                target[[number[name] for name in row.labels]] = 1.0
        else:
            targets = np.array([number[row.labels[0]] for row in members], dtype=np.int64)
        files = [path.parent / row.file for row in members]
        sources[part] = FileSource(files, targets, classes, root=path.parent, channels=channels)
    if "train" not in sources:
        raise UserError(f"{path} has no row for training; write train into the column split.")
    return Splits(train=sources["train"], val=sources.get("val"), test=sources.get("test"))


def require_known(names: Iterable[str], classes: Collection[str], where: str) -> None:
    """Raise UserError when one of the class names is not among the classes of the training part."""
    for name in names:
        if name not in classes:
            raise UserError(
                f"{where}: no training picture is of class {name!r}.{did_you_mean(name, classes)} "
                "Rename it, or add pictures of it to the training part."
            )


def _too_few_classes(root: Path, classes: tuple[str, ...]) -> UserError:
    if classes:
        below = root / classes[0]
        return UserError(
            f"{root} has pictures of one class only, {classes[0]!r}; a classifier needs two. "
            f"If the classes are folders inside it, name {below}."
        )
    files = [Path(entry.name) for entry in _entries(root) if not _is(entry.is_dir)]
    if any(file.suffix.lower() in PICTURE_SUFFIXES for file in files):
        return UserError(
            f"{root} has pictures, but no class folders: put each class into a folder of its own, "
            f"{root / 'CLASS' / 'picture.jpg'}, or name a CSV with the columns path and label."
        )
    return UserError(
        f"no pictures in folders of {root}; expected is CLASS/picture with one of the suffixes "
        f"{' '.join(sorted(PICTURE_SUFFIXES))}."
    )


def _part_folders(root: Path, folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folders of the parts; empty when the folders are classes."""
    named = [(PART_NAMES[folder.name.lower()], folder) for folder in folders if folder.name.lower() in PART_NAMES]
    others = {folder.name for folder in folders if folder.name.lower() not in PART_NAMES}
    if not any(part == "train" and _subfolders(folder) for part, folder in named):
        inside = {below.name for _, folder in named for below in _subfolders(folder)}
        if not named or (others and not inside & others):
            return {}  # a class may be called `train` or `test`
        raise UserError(
            f"{root} has {', '.join(folder.name for _, folder in named)}, but no training part with class folders; "
            f"training pictures belong into {root / 'train' / 'CLASS'}."
        )
    parts = _one_each(root, [folder for _, folder in named])
    if others:
        log.warning("%s: left out %s, which are not parts of the data.", root, ", ".join(sorted(others)))
    return parts


def _one_each(root: Path, named: Sequence[Path]) -> dict[str, Path]:
    """Return the folder of each part."""
    parts: dict[str, Path] = {}
    for folder in named:
        part = PART_NAMES[folder.name.lower()]
        if part in parts:
            raise UserError(f"{root} has two folders for one part: {parts[part].name} and {folder.name}; remove one.")
        parts[part] = folder
    return parts


def _find_classes(root: Path, above: set[tuple[int, int]]) -> dict[str, list[Path]]:
    """Return the pictures of each class folder; folders without any are dropped with a warning.

    Args:
        root: Folder of class folders.
        above: Folders that a link must not lead back to.
    """
    pictures: dict[str, list[Path]] = {}
    left_out: Counter[str] = Counter()
    for entry in _entries(root):
        if not _is(entry.is_dir):
            left_out[f"{_suffix(entry) or 'no suffix'} outside class folders"] += 1
            continue
        found = _find_pictures(Path(entry.path), above | {_identity(root)}, left_out)
        if not found:
            log.warning("%s has no pictures; the class is left out.", entry.path)
            continue
        # macOS writes accents as characters of their own; without this, one name from two systems is two classes.
        pictures.setdefault(unicodedata.normalize("NFC", entry.name), []).extend(found)
    _tell_left_out(root, left_out)
    return pictures


def _tell_left_out(root: Path, left_out: Counter[str]) -> None:
    if left_out:
        log.warning("%s: left out %s.", root, ", ".join(f"{n:,} x {what}" for what, n in left_out.most_common()))


def _find_pictures(root: Path, seen: set[tuple[int, int]], left_out: Counter[str]) -> list[Path]:
    """Return the pictures below a folder, sorted; every folder is entered once, so that links cannot loop."""
    found: list[Path] = []
    stack = [root]
    while stack:
        folder = stack.pop()
        identity = _identity(folder)
        if identity in seen:
            continue
        seen.add(identity)
        for entry in _entries(folder):
            if _is(entry.is_dir):
                stack.append(Path(entry.path))
            elif _suffix(entry) not in PICTURE_SUFFIXES:
                left_out[_suffix(entry) or "no suffix"] += 1
            elif not _is(entry.is_file):  # a link to nothing, a pipe
                left_out["not a file"] += 1
            else:
                found.append(Path(entry.path))
    return sorted(found)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a person would call the content of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [e for e in entries if not e.name.startswith(".") and e.name.lower() not in LITTER]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}.") from error
    return sorted(visible, key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in _entries(folder) if _is(entry.is_dir)]


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a link to itself
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class _Row:
    line: int
    file: str
    labels: tuple[str, ...]
    part: str


def _read_rows(path: Path) -> tuple[list[_Row], bool]:
    """Return a manifest's rows, and whether they may carry several labels."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [cell.strip().lower() for cell in next(reader, [])]
            rows = [(reader.line_num, dict(zip(header, cells, strict=False))) for cells in reader if any(cells)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as CSV UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}.") from error
    multi_label = "labels" in header
    file_column = next((name for name in PATH_COLUMNS if name in header), None)
    label_column = "labels" if multi_label else next((name for name in LABEL_COLUMNS if name in header), None)
    if file_column is None or label_column is None:
        raise UserError(
            f"{path} needs the columns path and label (or labels), separated by commas; "
            f"its first line has {', '.join(header) or 'nothing'}."
        )
    if not rows:
        raise UserError(f"{path} has a header, but no pictures.")
    return [_parse_row(path, line, cells, file_column, label_column) for line, cells in rows], multi_label


def _parse_row(path: Path, line: int, cells: dict[str, str], file_column: str, label_column: str) -> _Row:
    file, label = cells.get(file_column, "").strip(), cells.get(label_column, "").strip()
    if not file:
        raise UserError(f"{path}, line {line}: the column {file_column} is empty.")
    names = label.split(";") if label_column == "labels" else [label]
    labels = tuple(unicodedata.normalize("NFC", name.strip()) for name in names if name.strip())
    if not labels and label_column != "labels":
        raise UserError(f"{path}, line {line}: the column {label_column} is empty.")
    split = cells.get("split", "train").strip()
    if split.lower() not in PART_NAMES:
        raise UserError(
            f"{path}, line {line}: split {split!r} is not train, val or test.{did_you_mean(split, PART_NAMES)}"
        )
    return _Row(line, file, labels, PART_NAMES[split.lower()])
