"""The stream: what is seen is a function of (seed, epoch, index), whatever the number of threads and processes."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data import open_data
from vitrail.data.arrays import ArraySource
from vitrail.data.base import Batch, BoxChooser, Picture, Source, Subset
from vitrail.data.stream import Order, Stream
from vitrail.errors import UserError


def numbered(count: int = 50, classes: int = 5) -> ArraySource:
    """Pictures whose every pixel is their index."""
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 1)).copy()
    return ArraySource(images, np.arange(count) % classes, tuple("abcde"[:classes]), "numbered")


def stream_of(source: Source, **changes) -> Stream:
    settings = {
        "preprocessing": Preprocessing(image_size=(4, 4), channels=1, crop_fraction=1.0),
        "augment": AugmentConfig(crop="none"),
        "batch_size": 8,
        "workers": 0,
    }
    return Stream(source, **(settings | changes))


def seen(stream: Stream, updates: int) -> list[int]:
    """Indices that a stream of numbered pictures shows."""
    return [int(i) for _ in range(updates) for batch in next(stream) for i in batch.images[:, 0, 0, 0]]


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "targets", "keys"))


def test_every_epoch_shows_every_picture_once_though_batches_run_across_its_end() -> None:
    indices = seen(stream_of(numbered(50)), 25)  # 200 pictures: four epochs of 50 in batches of 8
    epochs = [indices[i : i + 50] for i in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_alone() -> None:
    assert seen(stream_of(numbered()), 10) == seen(stream_of(numbered()), 10)
    assert seen(stream_of(numbered(), seed=1), 10) != seen(stream_of(numbered()), 10)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_see_what_one_process_sees(world: int) -> None:
    one = stream_of(numbered())
    ranks = [stream_of(numbered(), rank=r, world=world) for r in range(world)]
    for _ in range(10):
        (whole,) = next(one)
        parts = [next(stream)[0] for stream in ranks]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.keys for part in parts]), whole.keys)


def test_micro_batches_together_are_the_batch() -> None:
    one, split = stream_of(numbered()), stream_of(numbered(), accumulation=4)
    for _ in range(5):
        (whole,) = next(one)
        assert torch.equal(torch.cat([part.images for part in next(split)]), whole.images)


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(photos: Path, crop, workers: int) -> None:
    source = open_data(photos).train
    settings = {"preprocessing": Preprocessing(image_size=(16, 16)), "augment": AugmentConfig(crop=crop), "seed": 3}
    alone, threaded = stream_of(source, **settings), stream_of(source, **settings, workers=workers)
    for _ in range(12):
        assert equal(next(alone)[0], next(threaded)[0])
    threaded.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_continues_where_it_stopped(photos: Path, workers: int) -> None:
    source = open_data(photos).train
    settings = {"preprocessing": Preprocessing(image_size=(16, 16)), "augment": AugmentConfig(), "workers": workers}
    first = stream_of(source, **settings)
    for _ in range(7):
        next(first)
    state = first.state_dict()
    rest = [next(first)[0] for _ in range(5)]
    second = stream_of(source, **settings)
    next(second)
    second.load_state_dict(state)
    assert all(equal(next(second)[0], batch) for batch in rest)
    first.close()
    second.close()


def test_balanced_sampling_draws_classes_equally_and_uses_every_picture() -> None:
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    targets = np.array([0] * 50 + [1] * 10)
    source = ArraySource(images, targets, ("many", "few"), "unequal")
    order = Order(source, seed=0, balanced=True)
    drawn = [order.at(i)[1] for i in range(600)]
    assert abs(np.mean(np.array(drawn) >= 50) - 0.5) < 0.01
    assert set(drawn) == set(range(60))


def test_balanced_sampling_never_shows_a_picture_in_the_same_way_twice() -> None:
    images = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
    source = ArraySource(images, np.array([0] * 55 + [1] * 5), ("many", "few"), "unequal")
    stream = stream_of(source, batch_size=60, balanced=True)
    keys = torch.cat([next(stream)[0].keys for _ in range(2)])
    assert len(keys.unique()) == len(keys)


def test_parts_of_one_source_have_fingerprints_of_their_own() -> None:
    source = numbered()
    parts = [Subset(source, chosen).fingerprint() for chosen in ([0, 1, 2], [0, 1, 3], [2, 1, 0])]
    assert len(set(parts)) == 3
    assert Subset(source, [0, 1, 2]).fingerprint() == parts[0]


def test_unequal_parts_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 3 processes"):
        stream_of(numbered(), world=3)


def broken_folder(tmp_path: Path, photos: Path, count: int) -> Source:
    """Thirty good pictures and `count` broken ones."""
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(15):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / label / f"{i}.png")
    for i in range(count):
        (tmp_path / "a" / f"broken{i}.png").write_bytes(b"not a picture")
    return open_data(tmp_path).train


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_named_counted_and_left_out(tmp_path: Path, photos: Path, workers: int, caplog) -> None:
    source = broken_folder(tmp_path, photos, 2)
    preprocessing = Preprocessing(image_size=(16, 16))
    stream = stream_of(source, preprocessing=preprocessing, max_broken=0.2, workers=workers, augment=AugmentConfig())
    broken = [i for i in range(len(source)) if Path(source.name(i)).name.startswith("broken")]
    sizes = [len(next(stream)[0]) for _ in range(4 * len(source) // 8)]
    assert sorted(stream.broken) == broken
    assert sum(sizes) < len(sizes) * 8
    assert all(source.name(i) in caplog.text for i in broken)
    assert stream.state_dict()["broken"] == [[i, reason] for i, reason in stream.broken.items()]
    stream.close()


def test_broken_pictures_count_when_their_batch_is_taken_not_when_it_is_read_ahead(
    tmp_path: Path, photos: Path
) -> None:
    source = broken_folder(tmp_path, photos, 3)
    settings = {"preprocessing": Preprocessing(image_size=(16, 16)), "max_broken": 0.2, "augment": AugmentConfig()}
    alone, ahead = stream_of(source, **settings), stream_of(source, **settings, workers=2)
    for _ in range(8):
        assert equal(next(alone)[0], next(ahead)[0])
        time.sleep(0.02)  # let it read on
        assert alone.state_dict() == ahead.state_dict()
    assert alone.broken
    ahead.close()


class Loose(Source):
    """Pictures made when asked for, by `make`, which a test gives."""

    classes = ("only", "other")

    def __init__(self, make, count: int = 64) -> None:
        self.make, self.targets = make, np.arange(count) % 2

    def load(self, index: int) -> Picture:
        return self.make(index)

    def load_crop(self, index: int, choose_box: BoxChooser, size: tuple[int, int], interpolation: str) -> Picture:
        choose_box(8, 8)
        return self.make(index)

    def name(self, index: int) -> str:
        return f"loose#{index}"

    def fingerprint(self) -> str:
        return "loose"


def grey(index: int) -> Picture:
    return np.full((4, 4, 1), index, np.uint8)


def test_the_training_thread_only_takes_what_is_ready() -> None:
    readers = set()

    def make(index: int) -> Picture:
        readers.add(threading.current_thread().name.split("_")[0])
        return grey(index)

    stream = stream_of(Loose(make), workers=2, augment=AugmentConfig())
    next(stream)
    time.sleep(0.3)
    began = time.perf_counter()
    next(stream)
    assert time.perf_counter() - began < 0.02
    assert readers == {"decode"}
    stream.close()


def test_pictures_are_read_in_turn_whatever_their_threads_do() -> None:
    def make(index: int) -> Picture:
        time.sleep(index % 5 / 1000)
        return grey(index)

    slow, alone = stream_of(Loose(make), workers=5), stream_of(Loose(grey))
    for _ in range(12):
        assert equal(next(slow)[0], next(alone)[0])
    slow.close()


def test_an_error_while_reading_reaches_the_training_thread() -> None:
    def fail(index: int) -> Picture:
        raise MemoryError("no room")

    for workers in (0, 2):
        stream = stream_of(Loose(fail), workers=workers, augment=AugmentConfig())
        with pytest.raises(MemoryError, match="no room"):
            next(stream)
        stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_other_channels_than_the_models_are_refused(workers: int) -> None:
    stream = stream_of(Loose(lambda index: np.zeros((4, 4, 3), np.uint8)), workers=workers, augment=AugmentConfig())
    with pytest.raises(UserError, match="the model takes grey"):
        next(stream)
    stream.close()


@pytest.mark.parametrize("leave", ["close", "load_state_dict"])
def test_what_is_no_longer_wanted_is_not_read(leave: str) -> None:
    read = []

    def make(index: int) -> Picture:
        read.append(index)
        time.sleep(0.01)
        return grey(index)

    stream = stream_of(Loose(make), workers=2, batch_size=32, augment=AugmentConfig())
    next(stream)
    state = stream.state_dict()
    if leave == "close":
        stream.close()
        known = len(read)
        time.sleep(0.1)
        assert len(read) == known < 32 + 16
    else:
        stream.load_state_dict(state)
        time.sleep(0.1)
        assert len(read) < 32 + 16
        expected = stream_of(Loose(grey), batch_size=32, augment=AugmentConfig())
        next(expected)
        assert equal(next(stream)[0], next(expected)[0])
        stream.close()


def test_too_many_broken_pictures_stop_the_run_and_name_one(tmp_path: Path, photos: Path) -> None:
    source = broken_folder(tmp_path, photos, 6)
    stream = stream_of(source, preprocessing=Preprocessing(image_size=(16, 16)), max_broken=0.01)
    with pytest.raises(UserError, match=r"broken\d\.png.*vitrail check"):
        for _ in range(20):
            next(stream)
