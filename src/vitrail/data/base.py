"""What data is to the rest of the library: pictures by index with labels, and batches of them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitrail.errors import UserError

Picture = UInt8[np.ndarray, "h w c"]
Resized = UInt8[np.ndarray, "rows columns c"]  # a picture at another size than one beside it
BoxChooser = Callable[[int, int], tuple[float, float, float, float]]


class Source(ABC):
    """Labelled pictures by index. Knows nothing of models, order or augmentation."""

    classes: tuple[str, ...]
    """Class names, in the order of the labels."""
    targets: Int[np.ndarray, " n"] | Float[np.ndarray, "n classes"]
    """Class indices (int64), or 0/1 rows (float32) when a picture may carry several labels."""

    @property
    def multi_label(self) -> bool:
        """Whether a picture may carry several labels."""
        return self.targets.ndim == 2

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> Picture:
        """Return one picture, upright, as uint8 rows x columns x channels, which nobody may write to.

        Safe to call from several threads.

        Raises:
            BrokenPicture: When it cannot be read, or its pixels would be silently wrong.
        """

    @abstractmethod
    def load_crop(self, index: int, choose_box: BoxChooser, size: tuple[int, int], interpolation: str) -> Picture:
        """Return a crop of one picture, resized to rows and columns `size`: what training decodes.

        `choose_box` gets the upright picture's height and width and returns top, left, height, width in pixels.
        Large JPEGs may be decoded at a reduced scale.

        Raises:
            BrokenPicture: As `load`.
        """

    def pixels(self) -> UInt8[np.ndarray, "n h w c"] | None:
        """Return all pictures as one array when they lie in memory at one size, else None."""
        return None

    def pack(self, workers: int) -> None:
        """Make ready to be read many times, with so many threads; where nothing is said of it, there is no need."""
        return

    @abstractmethod
    def name(self, index: int) -> str:
        """Return a name a person can find the picture by: its path, or `train.bin#17`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the pictures and labels, to tell whether two runs saw the same data."""

    def class_counts(self) -> Int[np.ndarray, " classes"]:
        """Return the number of pictures per class."""
        if self.multi_label:
            return self.targets.sum(axis=0).astype(np.int64)
        return np.bincount(self.targets, minlength=len(self.classes))


class Subset(Source):
    """Some pictures of another source, in the order given."""

    def __init__(self, source: Source, indices: Sequence[int] | Int[np.ndarray, " n"]) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.classes = source.classes
        self.targets = source.targets[self.indices]

    def load(self, index: int) -> Picture:
        return self.source.load(int(self.indices[index]))

    def load_crop(self, index: int, choose_box: BoxChooser, size: tuple[int, int], interpolation: str) -> Picture:
        return self.source.load_crop(int(self.indices[index]), choose_box, size, interpolation)

    def pixels(self) -> UInt8[np.ndarray, "n h w c"] | None:
        whole = self.source.pixels()
        return None if whole is None else whole[self.indices]

    def pack(self, workers: int) -> None:
        self.source.pack(workers)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        return f"{self.source.fingerprint()}[{len(self)} of {len(self.source)}: {chosen}]"


@dataclass(frozen=True)
class Splits:
    """The parts of a data set. `val` may have been set aside from `train`; `test` is untouched until the end."""

    train: Source
    val: Source | None = None
    test: Source | None = None
    unlabelled: Source | None = None
    """Pictures to learn from whose labels are not known, or not to be looked at."""

    def fingerprint(self) -> str:
        """Return a hash of all that is learned from, to tell whether two runs saw the same data."""
        labelled = self.train.fingerprint()
        return labelled if self.unlabelled is None else f"{labelled} + {self.unlabelled.fingerprint()}"

    def pack(self, workers: int) -> None:
        """Make ready what training reads many times, with so many threads."""
        for source in (self.train, self.val, self.unlabelled):
            if source is not None:
                source.pack(workers)

    def for_evaluation(self, split: str | None = None) -> tuple[str, Source]:
        """Return the name and pictures of one part: the one asked for, else test, else val, else train.

        Raises:
            UserError: When the data has no such part.
        """
        parts = {"test": self.test, "val": self.val, "train": self.train}
        for name in (split,) if split else parts:
            if (source := parts.get(name)) is not None:
                return name, source
        raise UserError(f"the data has no part {split!r}; it has {', '.join(k for k, v in parts.items() if v)}.")


@dataclass(frozen=True)
class Batch:
    """Pictures on their way to the model."""

    images: UInt8[Tensor, "b c h w"]
    """Pixels as stored; where pictures differ in size, their view at the size at which they are augmented."""
    targets: Int[Tensor, " b"] | Float[Tensor, "b classes"]
    """Class indices, or 0/1 rows."""
    keys: Int[Tensor, " b"]
    """One random key per picture, a function of (seed, epoch, index, how often it came before): for augmentation."""
    cropped: bool
    """Whether the view (the random resized crop, or that of evaluation) has been taken already, while decoding."""
    unlabelled: "Batch | None" = None
    """Pictures without labels to learn from in the same update; their targets say nothing."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on another device. A GPU copies from pinned memory while the CPU goes on."""
        # Copies back to the CPU must not run ahead of whoever reads them.
        waits = device.type != "cuda"
        moved = {name: getattr(self, name).to(device, non_blocking=not waits) for name in ("images", "targets", "keys")}
        return replace(self, **moved, unlabelled=self.unlabelled and self.unlabelled.to(device))
