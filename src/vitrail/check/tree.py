"""What lies in a folder beside the pictures that are read: empty classes, pictures out of place, other files."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from vitrail.check.base import Finding, Item, tell
from vitrail.data import PICTURE_SUFFIXES, FileSource
from vitrail.data.folders import LITTER, PART_NAMES


def beside(root: Path, sources: Mapping[str, FileSource]) -> Iterator[Finding]:
    """Compare a folder with what was read of it.

    Args:
        root: The folder that `read_folder` read.
        sources: Its parts.
    """
    used = {path for source in sources.values() for path in source.paths}
    if empty := [
        folder for folder in _class_folders(root, sources["train"]) if folder not in _folders_above(root, used)
    ]:
        text = f"{tell(len(empty), 'class folder', 'class folders')} without a picture; fill or remove."
        yield Finding("empty-class", "warning", text, tuple(Item((str(folder),)) for folder in empty))
    stray: list[str] = []
    missing: list[str] = []
    others: dict[str, list[str]] = defaultdict(list)
    for path in _files(root):
        if path.suffix.lower() not in PICTURE_SUFFIXES:
            others[path.suffix.lower()].append(str(path))
        elif not path.is_file():
            missing.append(str(path))
        elif path not in used:
            stray.append(str(path))
    if stray:
        text = f"{tell(len(stray), 'picture', 'pictures')} outside the class folders, not read; move into a class."
        yield Finding("outside-classes", "warning", text, tuple(Item((name,)) for name in stray))
    if missing:
        text = f"{tell(len(missing), 'picture', 'pictures')} without a file behind the name; mend the link or remove."
        yield Finding("no-file", "warning", text, tuple(Item((name,)) for name in missing))
    if others:
        by_number = sorted(others.items(), key=lambda entry: (-len(entry[1]), entry[0]))
        items = tuple(Item(tuple(names), f"{suffix or 'no suffix'}: {len(names):,}") for suffix, names in by_number)
        text = (
            f"{tell(sum(map(len, others.values())), 'file', 'files')} ignored for the suffix; "
            "convert pictures among them to JPEG or PNG."
        )
        yield Finding("ignored", "note", text, items)


def _class_folders(root: Path, train: FileSource) -> list[Path]:
    """Return the folders that stand for classes, which lie in `root` or in the folders of its parts."""
    inside = (path.relative_to(root).parts[0] for path in train.paths)
    flat = all(
        unicodedata.normalize("NFC", first) == train.classes[label]
        for first, label in zip(inside, train.targets, strict=True)
    )
    if flat:
        return _visible_folders(root)
    parts = (folder for folder in _visible_folders(root) if folder.name.lower() in PART_NAMES)
    return [folder for part in parts for folder in _visible_folders(part)]


def _folders_above(root: Path, paths: set[Path]) -> set[Path]:
    folders: set[Path] = set()
    for path in paths:
        for folder in path.parents:
            if folder == root or folder in folders:
                break
            folders.add(folder)
    return folders


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and _is_visible(entry.name))


def _files(root: Path) -> Iterator[Path]:
    """Yield files that a person would see, links to folders not followed."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(filter(_is_visible, folders))
        yield from (Path(place, name) for name in sorted(names) if _is_visible(name))


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in LITTER
