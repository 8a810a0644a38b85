"""The training stream: an endless, resumable sequence of batches.

Position p of the stream is place p mod n of epoch p div n, in an order drawn from (seed, epoch). Batches run across
the ends of epochs. So the whole state is one number, no picture is lost or repeated in an epoch, and neither the number
of threads nor of processes changes what is seen.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data.augment import augmented_view, training_boxes
from vitrail.data.base import Batch, Picture, Source
from vitrail.data.random import sample_keys
from vitrail.data.view import view_pixels
from vitrail.errors import BrokenPicture, UserError

log = logging.getLogger("vitrail")
PREFETCH = 3  # batches decoded ahead: hides a slow picture without holding much memory


class Place(NamedTuple):
    """What stands at a position of the stream."""

    epoch: int
    picture: int
    """Index in the source."""
    showing: int
    """Number of its own within the epoch: balanced, a rare picture comes often, and is to look different each time."""


class Order:
    """Which picture stands at which position, as a function of (seed, epoch) alone."""

    def __init__(self, source: Source, *, seed: int, balanced: bool) -> None:
        self._seed = seed
        self._length = len(source)
        self._by_class = None
        if balanced:
            if source.multi_label:
                raise UserError("--input.balanced needs one label per picture; use --recipe.class-weights auto.")
            self._by_class = [np.flatnonzero(source.targets == c) for c in range(len(source.classes))]
            self._by_class = [members for members in self._by_class if len(members)]
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, position: int) -> Place:
        """Return epoch and picture at a position."""
        epoch, place = divmod(position, self._length)
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = self._draw(epoch)
        showing = int(self._epochs[epoch][place])
        return Place(epoch, showing % self._length, showing)

    def _draw(self, epoch: int) -> np.ndarray:
        """Return the epoch's showings in order: the index, raised by the number of pictures at each repetition."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, epoch]))
        if self._by_class is None:
            return rng.permutation(self._length)
        # Balanced: classes in turn, each walking through a fresh permutation of its pictures.
        rounds = -(-self._length // len(self._by_class))
        columns = []
        for members in self._by_class:
            repeats = -(-rounds // len(members))
            columns.append(
                np.concatenate([rng.permutation(members) + turn * self._length for turn in range(repeats)])[:rounds]
            )
        return rng.permutation(np.stack(columns, axis=1).reshape(-1)[: self._length])


class Stream(Iterator[list[Batch]]):
    """Endless iterator over one process's micro-batches, with a position that can be saved and restored."""

    def __init__(
        self,
        source: Source,
        *,
        preprocessing: Preprocessing,
        augment: AugmentConfig,
        batch_size: int,
        seed: int = 0,
        accumulation: int = 1,
        workers: int = 2,
        balanced: bool = False,
        max_broken: float = 0.01,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Prepare to read from position 0.

        Args:
            source: The training pictures.
            preprocessing: Size and filter of the model's input.
            augment: Decides whether the random crop is taken while decoding, and at what size.
            batch_size: Pictures per update over all processes; a multiple of `world * accumulation`.
            seed: Of the order and of every picture's augmentation.
            accumulation: Micro-batches per update.
            workers: Decoding threads; 0 decodes when asked.
            balanced: Draw every class equally often.
            max_broken: Share of the source that may be unreadable.
            rank: Number of this process.
            world: Number of processes; each takes its contiguous part of every micro-batch.

        Raises:
            UserError: When sizes do not divide.
        """
        if batch_size % (world * accumulation):
            raise UserError(
                f"--loop.batch-size {batch_size} is not a multiple of {world} processes x {accumulation} micro-batches."
            )
        self.source = source
        self.broken: dict[int, str] = {}
        self._preprocessing, self._augment = augmented_view(augment, preprocessing), augment
        self._seed, self._max_broken = seed, max_broken
        self._order = Order(source, seed=seed, balanced=balanced)
        self._targets = torch.from_numpy(np.ascontiguousarray(source.targets))
        self._batch_size = batch_size
        # Rank r of W takes the r-th part of every micro-batch, so that W processes see what one process sees.
        part = self.part_size = batch_size // accumulation // world
        self._slices = [slice((m * world + rank) * part, (m * world + rank + 1) * part) for m in range(accumulation)]
        self._position = 0
        pixels = source.pixels()
        self._pixels = None if pixels is None else torch.from_numpy(pixels).permute(0, 3, 1, 2)
        threaded = workers > 0 and pixels is None
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if threaded else None
        self._ahead: deque[list[list[tuple[Place, Future[Picture]]]]] = deque()

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of the next update. Broken pictures are left out.

        Raises:
            UserError: When more than `max_broken` of the pictures cannot be read.
        """
        if self._pixels is not None:
            batches = [self._gather(places) for places in self._places(self._position)]
        elif self._pool is None:
            batches = [self._stack([(p, self._load(p)) for p in places]) for places in self._places(self._position)]
        else:
            self._read_ahead(self._pool)
            batches = [self._stack(part) for part in self._ahead.popleft()]
        self._position += self._batch_size
        return batches

    @property
    def epoch(self) -> float:
        """Passes over the source completed so far."""
        return self._position / len(self.source)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the broken pictures met so far."""
        return {"position": self._position, "broken": [[index, reason] for index, reason in self.broken.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self._position = state["position"]
        self.broken = {index: reason for index, reason in state["broken"]}
        self._drop_ahead()

    def close(self) -> None:
        """Stop the decoding threads."""
        self._drop_ahead()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _places(self, position: int) -> list[list[Place]]:
        """Return the pictures of this process's micro-batches of the update that starts at `position`."""
        return [[self._order.at(position + i) for i in range(part.start, part.stop)] for part in self._slices]

    def _keys(self, places: Sequence[Place]) -> Int[Tensor, " b"]:
        keys = torch.empty(len(places), dtype=torch.int64)
        for epoch in {place.epoch for place in places}:
            rows = [row for row, place in enumerate(places) if place.epoch == epoch]
            keys[rows] = sample_keys(self._seed, epoch, torch.tensor([places[row].showing for row in rows]))
        return keys

    def _gather(self, places: Sequence[Place]) -> Batch:
        """Take a batch out of memory; augmentation crops it."""
        assert self._pixels is not None
        index = torch.tensor([place.picture for place in places])
        return Batch(self._pixels[index], self._targets[index], self._keys(places), cropped=False)

    def _read_ahead(self, pool: ThreadPoolExecutor) -> None:
        while len(self._ahead) < PREFETCH:
            parts = self._places(self._position + len(self._ahead) * self._batch_size)
            self._ahead.append([[(place, pool.submit(self._decode, place)) for place in part] for part in parts])

    def _drop_ahead(self) -> None:
        for _, future in (item for parts in self._ahead for part in parts for item in part):
            future.cancel()
        self._ahead.clear()

    def _decode(self, place: Place) -> Picture:
        """Return one picture at the size at which it is augmented, randomly cropped if augmentation says so."""
        size, augment = self._preprocessing.image_size, self._augment
        if augment.crop not in ("resized", "random"):
            return view_pixels(self.source.load(place.picture), self._preprocessing)

        def choose_box(height: int, width: int) -> tuple[float, float, float, float]:
            sizes = torch.tensor([height]), torch.tensor([width])
            box = training_boxes(self._keys([place]), *sizes, augment, self._preprocessing)
            top, left, rows, columns = box[0].tolist()
            return top, left, rows, columns

        return self.source.load_crop(place.picture, choose_box, size, self._preprocessing.interpolation)

    def _load(self, place: Place) -> Future[Picture]:
        """Decode here and now, in the shape of a thread's answer."""
        future: Future[Picture] = Future()
        try:
            future.set_result(self._decode(place))
        except BrokenPicture as reason:
            future.set_exception(reason)
        return future

    def _stack(self, loaded: Sequence[tuple[Place, Future[Picture]]]) -> Batch:
        places: list[Place] = []
        pictures: list[Picture] = []
        for place, future in loaded:
            try:
                pictures.append(future.result())
                places.append(place)
            except BrokenPicture as reason:
                self._note_broken(place.picture, str(reason))
        if not pictures:
            raise UserError(f"none of {len(loaded)} pictures in a row can be read; `vitrail check` lists them.")
        index = torch.tensor([place.picture for place in places])
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        return Batch(images, self._targets[index], self._keys(places), cropped=True)

    def _note_broken(self, index: int, reason: str) -> None:
        if index in self.broken:
            return
        self.broken[index] = reason
        log.warning("skipped %s: %s", self.source.name(index), reason)
        if len(self.broken) > self._max_broken * len(self.source):
            raise UserError(
                f"{len(self.broken)} of {len(self.source)} training pictures cannot be read, the last "
                f"{self.source.name(index)}: {reason}. Mend or remove them (`vitrail check` lists all), "
                "or raise --input.max-broken."
            )
