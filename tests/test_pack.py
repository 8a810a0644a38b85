"""Packs: the same bits with and without, made once, made anew when the folder changes, and never too large."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encode, natural, turned
from PIL import Image

from vitrail import train
from vitrail.cache import cache_folder
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig, InputConfig
from vitrail.data import FileSource, Subset, open_data, pack
from vitrail.data.decode import read_picture
from vitrail.data.pack import Pack, open_pack
from vitrail.data.stream import Stream
from vitrail.engines import known
from vitrail.errors import BrokenPicture

KINDS = ("JPEG", "PNG", "WEBP")


@pytest.fixture(autouse=True)
def packs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packs lie in a folder of the test's, and a handful of pictures is enough for one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(pack, "LEAST", 4)
    return tmp_path / "cache" / "vitrail" / "packs"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Small pictures of several formats, some turned; a large one and a broken one."""
    (tmp_path / "pictures").mkdir()
    paths = [tmp_path / "pictures" / f"{number}.{KINDS[number % 3].lower()}" for number in range(9)]
    for number, path in enumerate(paths):
        image, kind = natural(40 + 7 * number, 90 - 5 * number), KINDS[number % 3]
        path.write_bytes(turned(kind, 6, image) if number > 5 else encode(image, kind))
    paths += [tmp_path / "pictures" / name for name in ("large.jpeg", "broken.png")]
    paths[-2].write_bytes(encode(natural(300, 400), "JPEG"))
    paths[-1].write_bytes(paths[1].read_bytes()[:500])
    return paths


SMALL_ONES = 9


def pack_of(files: Sequence[Path], channels: int = 3) -> Pack:
    made = open_pack(files, channels)
    assert made is not None
    return made


def source_of(files: list[Path], *, packed: bool, channels: int = 3) -> FileSource:
    source = FileSource(files, np.zeros(len(files), np.int64), ("only",), channels=channels)
    if packed:
        source.pack(2)
        assert source._pack is not None
    return source


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_packed_picture_and_its_crops_are_those_of_the_file(files, interpolation: str, channels: int) -> None:
    packed, anew = (source_of(files, packed=packed, channels=channels) for packed in (True, False))
    assert packed._pack is not None and len(packed._pack) == SMALL_ONES
    boxes = [
        lambda h, w: (0.0, 0.0, float(h), float(w)),
        lambda h, w: (3.0, 5.0, h // 2.0, w // 2.0),
        lambda h, w: (1.25, 2.5, h / 2.1, w / 1.7),
    ]
    for index in range(len(files) - 1):
        assert np.array_equal(packed.load(index), anew.load(index))
        for choose_box in boxes:
            crops = [source.load_crop(index, choose_box, (24, 30), interpolation) for source in (packed, anew)]
            assert np.array_equal(crops[0], crops[1])
    with pytest.raises(BrokenPicture):
        packed.load(len(files) - 1)


@pytest.mark.parametrize("crop", ["resized", "random", "padded"])
def test_batches_are_the_same_with_and_without(files, crop) -> None:
    view, augment = Preprocessing(image_size=(24, 24)), AugmentConfig(crop=crop)
    settings = {"preprocessing": view, "augment": augment, "batch_size": 5, "max_broken": 0.2}
    streams = [
        Stream(source_of(files, packed=packed), workers=workers, **settings)
        for packed, workers in ((True, 2), (False, 0))
    ]
    for _ in range(6):
        (packed,), (anew,) = (next(stream) for stream in streams)
        assert torch.equal(packed.images, anew.images)
    for stream in streams:
        stream.close()


def test_files_are_not_read_again(files) -> None:
    expected = [read_picture(path) for path in files[:SMALL_ONES]]
    source = source_of(files, packed=True)
    for index, path in enumerate(files[:SMALL_ONES]):
        path.unlink()
        assert np.array_equal(source.load(index), expected[index])


def test_a_second_run_finds_the_pack_and_decodes_nothing(files, packs: Path, monkeypatch, caplog) -> None:
    with caplog.at_level(logging.INFO, "vitrail"):
        first = pack_of(files)
        monkeypatch.setattr(pack, "_write", None)
        second = pack_of(files)
    assert second.path == first.path and first.path.read_bytes() == second.path.read_bytes()
    assert [path.name for path in packs.iterdir()] == [first.path.name]  # and nothing half-written
    for line, verb in zip(caplog.messages, ("now kept in", "read from"), strict=True):
        assert verb in line and str(first.path) in line and "MiB" in line and "--input.no-packed" in line


def _other_pixels(path: Path) -> None:
    Image.new("RGB", (20, 20), (1, 2, 3)).save(path)


def _same_size_later(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("change", [_other_pixels, _same_size_later, Path.unlink])
def test_a_folder_that_changed_is_packed_anew(files, change) -> None:
    before = pack_of(files)
    change(files[1])
    after = pack_of(files)
    assert after.path != before.path
    picture = after.get(1)
    assert (picture is None) == (change is Path.unlink)
    assert picture is None or np.array_equal(picture, read_picture(files[1]))


@pytest.mark.parametrize("fewer", [slice(1, None), slice(None, -1)])
def test_another_list_of_pictures_has_a_pack_of_its_own(files, fewer: slice) -> None:
    assert len({pack_of(files).path, pack_of(files[fewer]).path, pack_of(files, 1).path}) == 3


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-1], lambda data: b""])
def test_a_damaged_pack_is_written_anew(files, damage) -> None:
    path = pack_of(files).path
    data = path.read_bytes()
    path.write_bytes(damage(data))
    assert pack_of(files).path.read_bytes() == data


def test_a_pack_that_is_interrupted_leaves_nothing(files, packs: Path, monkeypatch) -> None:
    def interrupt(data: bytes, channels: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "decode_small", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_pack(files, 3)
    assert list(packs.iterdir()) == []


def test_few_pictures_are_not_packed(files, packs: Path) -> None:
    assert open_pack(files[:3], 3) is None
    assert not packs.exists()


def test_mostly_large_pictures_are_not_packed(files, packs: Path) -> None:
    assert open_pack([*files, *[files[-2]] * 12], 3) is None
    assert not packs.exists()


@pytest.mark.parametrize("expected", [True, False])
def test_a_pack_that_is_too_large_is_not_written_and_the_run_says_so(
    files, packs: Path, monkeypatch, caplog, expected: bool
) -> None:
    monkeypatch.setattr(pack, "LARGEST", 50_000)
    if not expected:  # found out while writing only
        monkeypatch.setattr(pack, "_expected_bytes", lambda *_: 1000)
    with caplog.at_level(logging.INFO, "vitrail"):
        assert open_pack(files, 3) is None
    assert "decoded anew every time" in caplog.text
    assert list(packs.iterdir()) == []


def test_a_disk_that_is_nearly_full_gets_no_pack(files, packs: Path, monkeypatch, caplog) -> None:
    usage = pack.shutil.disk_usage("/")._replace(free=500_000)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda path: usage)
    with caplog.at_level(logging.INFO, "vitrail"):
        assert open_pack(files, 3) is None
    assert list(packs.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_named_and_training_goes_on(files, packs: Path, caplog) -> None:
    packs.parent.parent.write_bytes(b"not a folder")
    with caplog.at_level(logging.INFO, "vitrail"):
        assert open_pack(files, 3) is None
    assert str(packs) in caplog.text


def test_packs_unused_for_longest_make_way(files, packs: Path, monkeypatch) -> None:
    kept = [pack_of(files[start:]) for start in range(3)]
    paths = [each.path for each in kept]
    for age, path in zip((30, 10, 20), paths, strict=True):
        os.utime(path, (1e9 - age, 1e9 - age))
    pack_of(files)  # used, so no longer the oldest
    monkeypatch.setattr(pack, "ROOM", sum(path.stat().st_size for path in paths) + 10_000)
    new = pack_of(files[3:])
    assert set(packs.iterdir()) == {paths[0], paths[1], new.path}
    picture = kept[2].get(0)  # who has it mapped goes on with it
    assert picture is not None and np.array_equal(picture, read_picture(files[2]))


def test_training_packs_unless_told_not_to(tiny_run, packs: Path, tmp_path: Path) -> None:
    for packed in (False, True):
        train(tiny_run(f"run-{packed}", input=InputConfig(workers=0, packed=packed), loop__steps=2))
        assert packs.exists() == packed
    rows = [(tmp_path / f"run-{packed}" / "metrics.jsonl").read_text() for packed in (False, True)]
    assert rows[0] == rows[1]


def test_parts_of_one_folder_share_a_pack(photos: Path, packs: Path) -> None:
    data = open_data(photos)
    data.pack(2)
    (path,) = packs.iterdir()
    assert data.val is not None
    for part in (data.train, data.val):
        assert isinstance(part, Subset) and isinstance(part.source, FileSource) and part.source._pack is not None
        assert part.source._pack.path == path


def test_without_a_user_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() is None
    assert pack.open_pack([Path("a.jpg")] * pack.LEAST, 3) is None
    known.remember("key", {"onnx": known.Finding(2.0, 1.0)})
    assert known.recall("key") == {}
