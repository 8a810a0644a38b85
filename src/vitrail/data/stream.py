"""The training stream: an endless, resumable sequence of batches.

Position p of the stream is place p mod n of epoch p div n, in an order drawn from (seed, epoch). Batches run across
the ends of epochs. So the whole state is one number, no picture is lost or repeated in an epoch, and neither the number
of threads nor of processes changes what is seen.

Batches are made ahead of the training thread: one thread lays out the next ones, and decoding threads fill them. All
that is left to it is to take the next, whose broken pictures it then counts, so that the count belongs to the position.
"""

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data.augment import augmented_view
from vitrail.data.base import Batch, Picture, Source
from vitrail.data.boxes import BoxDraws
from vitrail.data.parts import in_large_pages
from vitrail.data.random import sample_keys
from vitrail.data.view import check_channels, view_pixels
from vitrail.errors import BrokenPicture, UserError

log = logging.getLogger("vitrail")
AHEAD = 3  # updates ready or in the making: hides a slow picture without holding much memory


class Place(NamedTuple):
    """What stands at a position of the stream."""

    epoch: int
    picture: int
    """Index in the source."""
    showing: int
    """Number of its own within the epoch: balanced, a rare picture comes often, and is to look different each time."""


class Reading(NamedTuple):
    """A micro-batch whose pictures are being read."""

    batch: Batch
    """Its rows are filled as pictures arrive."""
    tasks: list[Future[None]]
    """Done when all have arrived."""
    places: Sequence[Place]
    """What stands in each row."""
    broken: dict[int, str]
    """Row and reason of each picture that cannot be read."""


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
        pinned: bool = False,
    ) -> None:
        """Prepare to read from position 0.

        Args:
            source: The training pictures.
            preprocessing: Size and filter of the model's input.
            augment: Decides whether the random crop is taken while decoding, and at what size.
            batch_size: Pictures per update over all processes; a multiple of `world * accumulation`.
            seed: Of the order and of every picture's augmentation.
            accumulation: Micro-batches per update.
            workers: Decoding threads; 0 reads when asked.
            balanced: Draw every class equally often.
            max_broken: Share of the source that may be unreadable.
            rank: Number of this process.
            world: Number of processes; each takes its contiguous part of every micro-batch.
            pinned: Put pictures into memory that a GPU can copy from by itself.

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
        self._seed, self._max_broken, self._pinned = seed, max_broken, pinned
        self._order = Order(source, seed=seed, balanced=balanced)
        self._targets = torch.from_numpy(np.ascontiguousarray(source.targets))
        self._batch_size = batch_size
        # Rank r of W takes the r-th part of every micro-batch, so that W processes see what one process sees.
        part = self.part_size = batch_size // accumulation // world
        self._slices = [slice((m * world + rank) * part, (m * world + rank + 1) * part) for m in range(accumulation)]
        self._position = 0
        pixels = source.pixels()
        self._pixels = None if pixels is None else np.ascontiguousarray(pixels)
        self._workers = workers
        # Pictures in memory are gathered sooner than two threads can hand the interpreter to and fro, unless a GPU
        # augments them meanwhile.
        ahead = workers > 0 and (pinned or self._pixels is None)
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="batch") if ahead else None
        threaded = workers > 0 and self._pixels is None
        self._decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode") if threaded else None
        self._ahead: deque[Future[list[Reading]]] = deque()
        self._dropped = threading.Event()  # set, it tells threads that what they read is no longer wanted

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of the next update. Broken pictures are left out.

        Raises:
            UserError: When more than `max_broken` of the pictures cannot be read.
        """
        if self._maker is None:
            update = self._begin(self._position, self._dropped)
        else:
            self._read_ahead(self._maker)
            update = self._ahead[0].result()
        batches = [self._finished(reading) for reading in update]
        self._position += self._batch_size
        if self._maker is not None:
            self._ahead.popleft()
            self._read_ahead(self._maker)
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
        """Stop the threads."""
        self._drop_ahead()
        for pool in (self._maker, self._decoders):
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _read_ahead(self, maker: ThreadPoolExecutor) -> None:
        while len(self._ahead) < AHEAD:
            position = self._position + len(self._ahead) * self._batch_size
            self._ahead.append(maker.submit(self._begin, position, self._dropped))

    def _drop_ahead(self) -> None:
        self._dropped.set()
        self._dropped = threading.Event()
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _begin(self, position: int, dropped: threading.Event) -> list[Reading]:
        """Begin to read this process's micro-batches of the update that starts at `position`."""
        parts = [[self._order.at(position + i) for i in range(part.start, part.stop)] for part in self._slices]
        return [self._gather(places) if self._pixels is not None else self._read(places, dropped) for places in parts]

    def _keys(self, places: Sequence[Place]) -> Int[Tensor, " b"]:
        keys = torch.empty(len(places), dtype=torch.int64)
        for epoch in {place.epoch for place in places}:
            rows = [row for row, place in enumerate(places) if place.epoch == epoch]
            keys[rows] = sample_keys(self._seed, epoch, torch.tensor([places[row].showing for row in rows]))
        return keys

    def _gather(self, places: Sequence[Place]) -> Reading:
        """Take a batch out of memory; augmentation crops it."""
        assert self._pixels is not None
        index = np.array([place.picture for place in places])
        images = self._empty(len(places), *self._pixels.shape[1:])
        np.take(self._pixels, index, axis=0, out=images.numpy(), mode="clip")  # other modes copy once more
        return Reading(self._batch(images, places, self._keys(places), cropped=False), [], places, {})

    def _read(self, places: Sequence[Place], dropped: threading.Event) -> Reading:
        """Begin to decode a batch from files; without threads, do it."""
        images = self._empty(len(places), *self._preprocessing.image_size, self._preprocessing.channels)
        keys = self._keys(places)
        boxes = BoxDraws(keys, self._augment, self._preprocessing)
        pixels, waiting = images.numpy(), deque(range(len(places)))
        broken: dict[int, str] = {}

        def work() -> None:
            while not dropped.is_set():
                try:
                    row = waiting.popleft()
                except IndexError:
                    return
                try:
                    picture = self._decode(places[row].picture, boxes, row)
                except BrokenPicture as reason:
                    broken[row] = str(reason)
                    continue
                check_channels(picture.shape[2], self._preprocessing)
                pixels[row] = picture

        tasks = []
        if self._decoders is None:
            work()
        else:
            # A task a thread, not a picture: handing over a task costs as much as a small picture.
            tasks = [self._decoders.submit(work) for _ in range(min(self._workers, len(places)))]
        return Reading(self._batch(images, places, keys, cropped=True), tasks, places, broken)

    def _empty(self, *shape: int) -> Tensor:
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return in_large_pages(torch.empty(shape, dtype=torch.uint8))

    def _batch(self, images: Tensor, places: Sequence[Place], keys: Tensor, *, cropped: bool) -> Batch:
        targets = self._targets[torch.tensor([place.picture for place in places])]
        if self._pinned:
            targets, keys = targets.pin_memory(), keys.pin_memory()
        return Batch(images.permute(0, 3, 1, 2), targets, keys, cropped=cropped)

    def _decode(self, index: int, boxes: BoxDraws, row: int) -> Picture:
        """Return one picture at the size at which it is augmented, randomly cropped if augmentation says so."""
        if self._augment.crop not in ("resized", "random"):
            return view_pixels(self.source.load(index), self._preprocessing)
        size, interpolation = self._preprocessing.image_size, self._preprocessing.interpolation
        return self.source.load_crop(index, partial(boxes.box, row), size, interpolation)

    def _finished(self, reading: Reading) -> Batch:
        """Wait for the last picture, note what was broken, and return the rest."""
        for task in reading.tasks:
            task.result()
        batch, broken = reading.batch, reading.broken
        if not broken:
            return batch
        for row in sorted(broken):
            self._note_broken(reading.places[row].picture, broken[row])
        whole = [row for row in range(len(batch)) if row not in broken]
        if not whole:
            raise UserError(f"none of {len(batch)} pictures in a row can be read; `vitrail check` lists them.")
        return Batch(batch.images[whole], batch.targets[whole], batch.keys[whole], cropped=True)

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
