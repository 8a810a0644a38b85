"""Trees of classes: which class is a kind of which. From JSON, nested folders, MIIL's file, or CIFAR-100's own."""

import json
import os
import unicodedata
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from vitrail.data.folders import LITTER, PICTURE_SUFFIXES
from vitrail.errors import UserError, did_you_mean

Parents = dict[str, str | None]
"""The parent of every class, None for roots."""

MAX_TREE_BYTES = 100_000_000
"""Largest file read; that of ImageNet-21K's 11,221 classes has about a hundredth of this."""


@dataclass(frozen=True)
class ClassTree(Sequence[tuple[int, ...]]):
    """Classes by number, each with its way to the root: `tree[7]` is `(7, 5, 2, 0)`, itself first.

    The sequence is what `vitrail.losses.SemanticSoftmaxLoss` takes, and `class_tree_list` of ImageNet-21K-P.
    """

    names: tuple[str, ...]
    """Name of each class."""
    chains: tuple[tuple[int, ...], ...]
    """Per class the numbers of itself, its parent, and so on to the root."""

    def __len__(self) -> int:
        return len(self.chains)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[int, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
        return self.chains[index]

    @classmethod
    def from_parents(cls, parents: Mapping[str, str | None], source: str = "the class tree") -> "ClassTree":
        """Return the tree in which every class lies below its parent.

        Args:
            parents: The parent of every class, by name. A parent that is no key itself is a root.
            source: Where they are from, for messages.

        Raises:
            UserError: When a class is its own ancestor, or there is none.
        """
        names = list(dict.fromkeys([*parents, *(name for name in parents.values() if name is not None)]))
        if not names:
            raise UserError(f"{source} has no classes.")
        number = {name: i for i, name in enumerate(names)}
        chains: list[tuple[int, ...]] = []
        for name in names:
            chain = [name]
            while (parent := parents.get(chain[-1])) is not None:
                if parent in chain:
                    raise UserError(f"{source} goes round in a circle: {' < '.join([*chain, parent])}.")
                chain.append(parent)
            chains.append(tuple(number[link] for link in chain))
        return cls(tuple(names), tuple(chains))

    def for_classes(self, classes: Sequence[str], *, ancestors: bool = True) -> "ClassTree":
        """Return the tree of these classes: they come first, in this order, then what lies above them.

        So a model with an output per class has them where its labels are, and outputs for mere superclasses follow.

        Args:
            classes: Names, each a class of the tree.
            ancestors: Keep the superclasses that are not among the classes; else a class's parent is the nearest
                above it that is.

        Raises:
            UserError: When the tree lacks one of the classes, or two have one name.
        """
        known = {name: i for i, name in enumerate(self.names)}
        for name in classes:
            if name not in known:
                raise UserError(
                    f"the class tree has no class {name!r}.{did_you_mean(name, known)} Every class of the data needs a "
                    "place in the tree that --recipe.tree names."
                )
        wanted = [known[name] for name in classes]
        if len(set(wanted)) < len(wanted):
            raise UserError("two classes of the data have one name, so their place in the class tree is unclear.")
        if ancestors:
            wanted = list(dict.fromkeys([*wanted, *sorted({link for i in wanted for link in self.chains[i]})]))
        number = {old: new for new, old in enumerate(wanted)}
        return ClassTree(
            tuple(self.names[i] for i in wanted),
            tuple(tuple(number[link] for link in self.chains[i] if link in number) for i in wanted),
        )


def read_class_tree(tree: str | Path) -> ClassTree:
    """Return a class tree by its name or from where it lies.

    Args:
        tree: One of

            - `cifar100`: its 100 classes below their 20 superclasses;
            - a `.json` file, either of each class's parent, `{"oak": "tree", "pine": "tree", "tree": null}`, or of
              what lies in each group, `{"tree": ["oak", "pine"], "fish": {"ray": ["manta", "skate"]}}`;
            - a folder in which class folders lie in folders of their superclasses, `tree/oak/1.jpg`;
            - a `.pth` file of ImageNet-21K-P (`imagenet21k_miil_tree.pth`), whose classes are WordNet ids.

    Raises:
        UserError: When there is no such tree, or it cannot be read.
    """
    if str(tree) == "cifar100":
        return cifar100_tree()
    path = Path(tree)
    if path.is_dir():
        return ClassTree.from_parents(_folder_parents(path), str(path))
    suffix = path.suffix.lower()
    if suffix not in (".json", ".pth", ".pt"):
        raise UserError(f"no class tree {tree}: name cifar100, a .json, a folder of folders, or a .pth of MIIL.")
    try:
        if path.stat().st_size > MAX_TREE_BYTES:
            raise UserError(f"{path} is too large for a class tree: more than {MAX_TREE_BYTES:,} bytes.")
        if suffix == ".json":
            return ClassTree.from_parents(_json_parents(path), str(path))
        return _read_miil(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error


def cifar100_tree() -> ClassTree:
    """Return CIFAR-100's classes below their superclasses (Krizhevsky, 2009, and the data's two label bytes)."""
    return ClassTree.from_parents(
        {fine: coarse for coarse, classes in CIFAR100_SUPERCLASSES.items() for fine in classes.split()}
    )


def _json_parents(path: Path) -> Parents:
    """Return the parents that a JSON file describes, in either of its two forms."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a class tree in JSON ({error}).") from error
    parents: Parents = {}
    by_parent = isinstance(document, dict) and any(isinstance(value, str) for value in document.values())
    for name, parent in _named(document, path) if by_parent else _grouped(document, None, path):
        name, parent = (text and unicodedata.normalize("NFC", text) for text in (name, parent))
        assert name is not None
        if name in parents:
            raise UserError(f"{path}: the class {name!r} is there twice; every class has one place.")
        parents[name] = parent
    return parents


def _named(document: dict[str, Any], path: Path) -> Iterator[tuple[str, str | None]]:
    for name, parent in document.items():
        if parent is not None and not isinstance(parent, str):
            raise UserError(f"{path}: the parent of {name!r} must be the name of a class, or null, not {parent!r}.")
        yield name, parent


def _grouped(group: Any, parent: str | None, path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the classes of nested groups with their parents, outer ones first."""
    if isinstance(group, str):
        yield group, parent
    elif isinstance(group, list):
        for item in group:
            yield from _grouped(item, parent, path)
    elif isinstance(group, dict):
        for name, below in group.items():
            yield name, parent
            yield from _grouped(below, name, path)
    elif group is not None:  # null is an empty group
        raise UserError(f"{path}: {group!r} is neither the name of a class nor a group of classes.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; the standard parser would keep the last of equal names and say nothing."""
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("two equal names in one object")
    return document


def _folder_parents(root: Path) -> Parents:
    """Return the folders that hold pictures, and those around them, each with the folder it lies in."""
    parents: Parents = {}
    places: dict[str, Path] = {}
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name.lower() not in LITTER)
        place = Path(folder)
        if place == root or not any(os.path.splitext(file)[1].lower() in PICTURE_SUFFIXES for file in files):
            continue
        while place != root:
            name = unicodedata.normalize("NFC", place.name)
            if places.setdefault(name, place) != place:
                raise UserError(
                    f"{places[name]} and {place} have one name; classes in a tree need their own. "
                    "Where they are parts of the data, as train and val, name one part."
                )
            parents[name] = None if place.parent == root else unicodedata.normalize("NFC", place.parent.name)
            place = place.parent
    return parents


def _read_miil(path: Path) -> ClassTree:
    """Return the tree of ImageNet-21K-P's file, read without running what a pickle may say to run.

    It is a dict: `class_list` are the WordNet ids in the order of the outputs, `class_description` what they stand
    for, `class_tree_list` the chains.
    """
    multiarray = np._core.multiarray  # pyright: ignore[reportAttributeAccessIssue]
    harmless: list[Any] = [np.ndarray, np.dtype, np.dtypes.StrDType, np.dtypes.Int64DType, np.dtypes.ObjectDType]
    for function in (multiarray._reconstruct, multiarray.scalar):
        harmless += [function, (function, f"numpy.core.multiarray.{function.__name__}")]  # the latter before NumPy 2
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:  # torch never compresses
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path} would unpack to more than its size; it is not read.")
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # torch's remarks on old formats
            document = torch.load(path, map_location="cpu", weights_only=True)
        chains = tuple(tuple(int(link) for link in chain) for chain in document["class_tree_list"])
        names = tuple(str(name) for name in document.get("class_list", document["class_description"]))
    except (UserError, OSError):
        raise
    except Exception as error:  # torch's readers raise a dozen types on damaged files
        raise UserError(f"{path} is damaged, or not the class tree of ImageNet-21K-P; fetch it again.") from error
    if len(names) != len(chains) or any(not 0 <= link < len(chains) for chain in chains for link in chain):
        raise UserError(f"{path} is damaged: {len(names):,} names do not fit {len(chains):,} places in the tree.")
    return ClassTree(names, chains)


CIFAR100_SUPERCLASSES = {
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}
"""Superclass -> its classes, as the coarse and fine label bytes of the official files have them."""
