"""Nothing is lost or half-written: crashes, faults and damage at every step of writing a folder."""

import errno
import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import every_fault, failing_with, strike_at
from scale import SCALE

from vitrail.checkpoints import storage
from vitrail.checkpoints.storage import (
    DamagedError,
    publish,
    recover,
    remove,
    replace_file,
    require_space,
    standing,
    verify,
    write_file,
)
from vitrail.errors import UserError

# The module is loaded by its path, because a child that imports torch takes seconds to start.
LOAD = f"""
import importlib.util, itertools, os, pathlib, shutil, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(storage.__file__).parents[2])!r}]
spec = importlib.util.spec_from_file_location("storage", {storage.__file__!r})
storage = importlib.util.module_from_spec(spec)
sys.modules["storage"] = storage
spec.loader.exec_module(storage)
folder = pathlib.Path(sys.argv[1]) / "model"

def write(text):
    def fill(place):
        (place / "a.txt").write_text(text)
        (place / "inner").mkdir()
        (place / "inner" / "b.txt").write_text(text)
    return fill
"""

CRASHES = """
from faults import strike_at

for number in itertools.count(1):
    shutil.rmtree(folder.parent, ignore_errors=True)
    if sys.argv[2] == "replace":
        storage.publish(folder, write("old"))
    child = os.fork()
    if child == 0:
        with strike_at(number, lambda: os._exit(9)):
            storage.publish(folder, write("new"))
        os._exit(0)
    crashed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    readable = storage.standing(folder)
    found = "nothing"
    if readable.exists():
        storage.verify(readable)
        found = (readable / "a.txt").read_text()
        assert (readable / "inner" / "b.txt").read_text() == found
    assert found in (["old", "new"] if sys.argv[2] == "replace" else ["nothing", "new"]), (number, found)
    storage.recover(folder)
    left = [path.name for path in folder.parent.iterdir()] if folder.parent.exists() else []
    assert left == ([] if found == "nothing" else ["model"]), (number, left)
    if found != "nothing":
        storage.verify(folder)
        assert (folder / "a.txt").read_text() in (found, "new")
    if not crashed:
        assert found == "new"
        print(number - 1)
        break
"""

ENDLESS = """
for number in itertools.count(1):
    storage.publish(folder, write(f"{number} " * 50_000))
    print(number, flush=True)
"""


def fill(text: str):
    def write(place: Path) -> None:
        (place / "a.txt").write_text(text)
        (place / "b.txt").write_text(text)

    return write


def text_of(folder: Path) -> str:
    """Return the text that both files hold, once the folder has proved whole."""
    verify(folder)
    first = (folder / "a.txt").read_text()
    assert (folder / "b.txt").read_text() == first
    return first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("case", ["first", "replace"])
def test_a_crash_at_any_operation_leaves_the_old_folder_or_the_new_one(tmp_path: Path, case: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD + CRASHES, str(tmp_path / "runs"), case], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15  # so many operations were crashed at


def test_a_kill_at_a_random_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    moments = random.Random(0)
    for _ in range(8 * SCALE):
        child = subprocess.Popen(
            [sys.executable, "-c", LOAD + ENDLESS, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        child.kill()
        told = child.stdout.read().split()
        child.wait()
        child.stdout.close()
        recover(tmp_path / "model")
        verify(tmp_path / "model")
        first = (tmp_path / "model" / "a.txt").read_text()
        assert (tmp_path / "model" / "inner" / "b.txt").read_text() == first
        assert int(first.split()[0]) >= int(told[-1] if told else 1)  # what was reported as saved is there
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_any_failing_operation_leaves_the_last_good_folder(tmp_path: Path, code: int, caplog) -> None:
    folder = tmp_path / "model"
    publish(folder, fill("old"))

    def check(claimed: bool) -> None:
        assert text_of(folder) in (["new"] if claimed else ["old", "new"])
        recover(folder)
        assert text_of(folder) in (["new"] if claimed else ["old", "new"])
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        publish(folder, fill("old"))

    with caplog.at_level(logging.CRITICAL):
        assert every_fault(code, lambda: publish(folder, fill("new")), check) > 20


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_failing_operation_leaves_a_single_file_whole(tmp_path: Path, code: int) -> None:
    path = tmp_path / "metrics.json"
    write_file(path, b"old")

    def check(claimed: bool) -> None:
        assert path.read_bytes() in ([b"new"] if claimed else [b"old", b"new"])
        write_file(path, b"old")

    assert every_fault(code, lambda: write_file(path, b"new"), check) >= 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_a_full_disk_is_told_with_place_need_and_cure(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    publish(folder, fill("old"))
    told = ""
    for number in itertools.count(1):
        with strike_at(number, failing_with(errno.ENOSPC)), pytest.raises(UserError) as error:
            publish(folder, fill("x" * 1000), size=2000)
        told = str(error.value)
        if "disk is full" in told:
            break
    assert str(folder) in told and "2,000 bytes" in told and "MB are free" in told
    assert text_of(folder) == "old"


def test_a_folder_half_removed_never_comes_back(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "model"

    def check(claimed: bool) -> None:
        if folder.exists():
            shutil.rmtree(folder)  # by its owner, who has no more use for it
        recover(folder)
        if folder.exists():
            text_of(folder)
        publish(folder, fill("old"))

    publish(folder, fill("old"))
    with caplog.at_level(logging.CRITICAL):
        every_fault(errno.EIO, lambda: publish(folder, fill("new")), check)


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"disk is full: .*model needs .* MB .* are free"):
        publish(tmp_path / "model", fill("x"), size=10**18)
    with pytest.raises(UserError, match="disk is full"):
        require_space(tmp_path / "not" / "yet" / "there", 10**18)
    require_space(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "empty", "flipped"])
def test_every_kind_of_damage_is_found_and_named(tmp_path: Path, name: str, harm: str) -> None:
    folder = tmp_path / "model"
    publish(folder, fill("some text to damage"))
    path = folder / name
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "flipped":
        where = data.index(b"sha256") + 12 if name == "manifest.json" else 7
        data[where] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes({"truncated": data[:-3], "longer": data + b"x", "empty": b""}[harm])
    with pytest.raises(DamagedError) as told:
        verify(folder)
    assert name in str(told.value)


def test_every_flipped_bit_of_a_file_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    publish(folder, fill("text"))
    for bit in range(32):
        data = bytearray(b"text")
        data[bit // 8] ^= 1 << bit % 8
        (folder / "a.txt").write_bytes(data)
        with pytest.raises(DamagedError, match=r"a\.txt has changed"):
            verify(folder)


def test_an_empty_folder_and_a_manifest_of_other_shape_are_damaged(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match=r"manifest\.json is missing"):
        verify(tmp_path)
    for text in ("[]", "{}", '{"files": []}', '{"files": {"a": 1}}', "[" * 100_000, '{"files": {"../a": {"size": 1}}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DamagedError, match=r"manifest\.json is damaged"):
            verify(tmp_path)


def test_a_manifest_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("../secret", str(tmp_path / "secret")):
        digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        listed = f'{{"files": {{"{name}": {{"size": 0, "sha256": "{digest}"}}}}}}'
        (folder / "manifest.json").write_text(listed.replace("\\", "\\\\"))
        with pytest.raises(DamagedError, match="is missing"):
            verify(folder)


def test_only_the_files_asked_for_are_verified(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    publish(folder, fill("text"))
    (folder / "b.txt").write_text("edited")
    verify(folder, ["a.txt"])
    with pytest.raises(DamagedError, match=r"does not list c\.txt"):
        verify(folder, ["c.txt"])


def test_a_users_own_files_in_the_folder_survive_its_replacement(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    publish(folder, fill("old"))
    (folder / "notes.md").write_text("mine")
    (folder / "export").mkdir()
    (folder / "export" / "model.onnx").write_text("mine too")
    publish(folder, fill("new"))
    assert text_of(folder) == "new"
    assert (folder / "notes.md").read_text() == "mine"
    assert (folder / "export" / "model.onnx").read_text() == "mine too"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_or_file_of_someone_else_is_never_replaced(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(UserError, match="photos holds files that vitrail did not write"):
        publish(photos, fill("new"))
    with pytest.raises(UserError, match="is a file"):
        publish(photos / "cat.jpg", fill("new"))
    with pytest.raises(UserError, match=r"cat\.jpg"):
        write_file(photos / "cat.jpg" / "x.json", b"")
    with pytest.raises(UserError, match="photos"):
        write_file(photos, b"")
    assert (photos / "cat.jpg").read_bytes() == b"cat"
    assert [path.name for path in photos.iterdir()] == ["cat.jpg"]
    empty = tmp_path / "empty"
    empty.mkdir()
    publish(empty, fill("new"))
    assert text_of(empty) == "new"


def test_an_exception_of_the_writer_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def broken(place: Path) -> None:
        (place / "a.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "model", broken)
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "file", lambda file: 1 // 0)
    assert list(tmp_path.iterdir()) == []


def test_between_the_two_renames_the_old_folder_can_still_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    publish(folder, fill("old"))
    os.rename(folder, tmp_path / ".model.vitrail-old")
    assert text_of(standing(folder)) == "old"
    # A new folder that is not whole gives way to the old one; a whole one takes its place.
    (tmp_path / ".model.vitrail-new").mkdir()
    (tmp_path / ".model.vitrail-new" / "a.txt").write_text("half")
    recover(folder)
    assert text_of(folder) == "old"
    os.rename(folder, tmp_path / ".model.vitrail-old")
    publish(tmp_path / "other", fill("new"))
    os.rename(tmp_path / "other", tmp_path / ".model.vitrail-new")
    recover(folder)
    assert text_of(folder) == "new"
    assert standing(folder) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    publish(tmp_path / "disk" / "model", fill("old"))
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "model")
    publish(tmp_path / "latest", fill("new"))
    assert (tmp_path / "latest").is_symlink()
    assert text_of(tmp_path / "disk" / "model") == "new"


def test_a_removed_folder_is_gone_with_all_traces(tmp_path: Path) -> None:
    publish(tmp_path / "model", fill("old"))
    remove(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_folders_are_not_synced_where_the_system_cannot(tmp_path: Path, monkeypatch) -> None:
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    publish(tmp_path / "model", fill("text"))
    assert text_of(tmp_path / "model") == "text"
