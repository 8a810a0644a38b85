"""Files and folders that are whole on disk or not there at all, whatever moment the machine stops at.

A folder is written beside its place, synced, listed with sizes and hashes in `manifest.json`, and renamed into place.
Where one stands already it is set aside first, and removed once the new one stands; `recover` mends a crash between
the two renames. One process at a time writes a given place, or several that agree on each step (`publish_together`);
any number may read.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vitrail.checkpoints.peers import Peers
from vitrail.errors import UserError

MANIFEST = "manifest.json"

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
_WRONG_PLACE = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG}

_Listed = dict[str, dict[str, object]]  # size and hash by name, as the manifest has them
_log = logging.getLogger("vitrail")


class DamagedError(UserError):
    """A stored file is missing, truncated or changed."""


class _Places(NamedTuple):
    """Where a folder or file lies while it is not in its place."""

    new: Path
    """Being written."""
    old: Path
    """Whole, and set aside for the new one."""
    gone: Path
    """Being removed."""


def publish(folder: Path, write: Callable[[Path], object], *, size: int = 0) -> None:
    """Write a folder that appears in its place complete, or not at all.

    Files in the folder that `write` does not bring, as a user's notes, stay.

    Args:
        folder: The place. What an earlier call wrote there is replaced.
        write: Fills the empty folder it is given.
        size: Bytes that it will write, as far as known; checked against the free space first.

    Raises:
        UserError: When the disk is full or the place cannot be written, or holds something that vitrail did not write.
            What stood there still stands.
        OSError: When the disk fails. What stood there still stands.
    """
    folder = _real(folder)
    at = _places(folder)
    try:
        with _explained(folder, at.new, size):
            _make_room(folder, at, size)
            write(at.new)
            _seal(at.new)
            _put_in_place(folder, at)
    except BaseException:
        shutil.rmtree(at.new, ignore_errors=True)  # the next `recover` removes what could not be removed now
        raise


def publish_together(folder: Path, write: Callable[[Path], Collection[str]], peers: Peers, *, size: int = 0) -> None:
    """Write a folder as `publish` does, by several processes. It stands once the files of all are on the disk.

    Args:
        folder: The place, the same for all, on a disk that they share.
        write: Writes this process's files into the folder it is given, and returns their names.
        peers: All processes; each must call this.
        size: Bytes that they will write together.

    Raises:
        UserError: In all processes, when any of them cannot write. What stood there still stands.
        OSError: In all processes, when the disk of any fails. What stood there still stands.
    """
    folder = _real(folder)
    at = _places(folder)

    def begin() -> None:
        if peers.first:
            with _explained(folder, at.new, size):
                _make_room(folder, at, size)

    def fill() -> _Listed:
        if not at.new.is_dir():
            raise UserError(
                f"{folder} cannot be written by all processes: not all find what the first one makes there. "
                "Choose a folder on a disk that all machines share."
            )
        with _explained(folder, at.new, size):
            return {name: _synced(at.new / name) for name in write(at.new)}

    def stand(listed: list[_Listed]) -> None:
        if peers.first:
            with _explained(folder, at.new, size):
                files = {name: entry for own in listed for name, entry in own.items()}
                for name, entry in files.items():
                    if (at.new / name).stat().st_size != entry["size"]:
                        raise DamagedError(f"{folder / name} is not what was written; is {folder.parent} one disk?")
                _write_manifest(at.new, files)
                _put_in_place(folder, at)

    try:
        peers.agree(begin)
        listed = peers.agree(fill)
        peers.agree(lambda: stand(listed))
    except BaseException:
        if peers.first:
            shutil.rmtree(at.new, ignore_errors=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write or replace one file, complete or not at all. Errors as those of `publish`."""
    replace_file(path, lambda file: file.write(data), size=len(data))


def replace_file(path: Path, write: Callable[[BinaryIO], object], *, size: int = 0) -> None:
    """Write or replace one file by what `write` puts into it. Errors as those of `publish`."""
    path = _real(path)
    new = _places(path).new
    try:
        with _explained(path, new, size):
            path.parent.mkdir(parents=True, exist_ok=True)
            require_space(path, size)
            with open(new, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            _sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):  # the first error matters; the next write replaces the leftover
            new.unlink(missing_ok=True)
        raise


def recover(folder: Path) -> None:
    """Mend what a crash has left of a `publish` into this folder, and remove leftovers. For the writer alone."""
    folder = _real(folder)
    at = _places(folder)
    if at.old.exists():
        if not folder.exists():
            # The crash came between the two renames. The new folder was sealed before the first.
            os.rename(at.new if _is_whole(at.new) else at.old, folder)
            _sync_folder(folder.parent)
        if at.old.exists():
            _discard(folder, at)
    for leftover in (at.new, at.gone):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a folder; it is out of its place at once, so that nobody finds half of it."""
    folder = _real(folder)
    gone = _places(folder).gone
    if gone.exists():
        shutil.rmtree(gone)
    os.rename(folder, gone)
    shutil.rmtree(gone)


def standing(folder: Path) -> Path:
    """Return where a folder can be read: its place, or aside in the instant between the two renames of `publish`."""
    old = _places(_real(folder)).old
    return old if old.is_dir() and not folder.exists() else folder


def leftover_of(path: Path) -> str | None:
    """Return the name of the folder or file that a leftover lies beside, or None when `path` is no leftover."""
    kinds = _Places._fields
    stem, _, kind = path.name.rpartition(".vitrail-")
    return stem[1:] if stem.startswith(".") and kind in kinds else None


def verify(folder: Path, names: Collection[str] | None = None) -> None:
    """Check files against the folder's manifest; files that it does not list are not looked at.

    Args:
        folder: What `publish` wrote.
        names: Only these files, as paths relative to the folder; all of them if None.

    Raises:
        DamagedError: A UserError that names the file that is missing, truncated or changed.
    """
    listed = read_manifest(folder)
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in listed if names is None else names:
        if name not in listed:
            raise DamagedError(f"{folder / MANIFEST} does not list {name}; write the folder again.")
        if name not in present:
            raise DamagedError(f"{folder / name} is missing; restore it from a copy, or write the folder again.")
        size, digest = listed[name]
        with open(present[name], "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DamagedError(f"{present[name]} has {found:,} bytes instead of {size:,}; restore it from a copy.")
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise DamagedError(
                    f"{present[name]} has changed since it was written: its sha256 is not that of {MANIFEST}. "
                    "Restore it from a copy."
                )


def require_space(folder: Path, size: int) -> None:
    """Raise a UserError when the disk that holds `folder` has fewer than `size` bytes free."""
    if size and _free(folder) < size:
        raise _full(folder, size)


def _real(path: Path) -> Path:
    # A link is followed, so that the temporary folder lies on the target's disk; "." gets its name.
    return Path(os.path.realpath(path))


def _places(path: Path) -> _Places:
    return _Places(*(path.with_name(f".{path.name}.vitrail-{kind}") for kind in _Places._fields))


def _make_room(folder: Path, at: _Places, size: int) -> None:
    """Make the empty folder to write into."""
    recover(folder)
    _refuse_to_replace_strangers(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_space(folder, size)
    at.new.mkdir()


def _refuse_to_replace_strangers(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds files that vitrail did not write; choose another place or move them away.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another place for the folder.")


def _seal(folder: Path) -> None:
    """Sync every file to the disk and list it in the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    _write_manifest(folder, {path.relative_to(folder).as_posix(): _synced(path) for path in files})


def _synced(path: Path) -> dict[str, object]:
    """Sync a file to the disk, and return what the manifest says of it."""
    with open(path, "rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def _write_manifest(folder: Path, listed: _Listed) -> None:
    with open(folder / MANIFEST, "wb") as file:
        file.write(json.dumps({"files": listed}, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)


def _put_in_place(folder: Path, at: _Places) -> None:
    if not folder.exists():
        os.rename(at.new, folder)
        _sync_folder(folder.parent)
        return
    os.rename(folder, at.old)
    try:
        os.rename(at.new, folder)
    except BaseException:
        if not folder.exists():
            os.rename(at.old, folder)
        raise
    _sync_folder(folder.parent)
    try:
        _discard(folder, at)
    except OSError as error:  # the new folder stands, so the call has done its work
        _log.warning("%s could not be removed now (%s); the next save there will.", at.old, error)


def _discard(folder: Path, at: _Places) -> None:
    """Remove the folder set aside, after moving what only it holds into the one that stands."""
    for path in list(at.old.iterdir()):
        if not (folder / path.name).exists():
            os.rename(path, folder / path.name)
    if at.gone.exists():
        shutil.rmtree(at.gone)
    os.rename(at.old, at.gone)
    shutil.rmtree(at.gone)


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedError:
        return False
    return True


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size in bytes and SHA-256 of the files of a folder that `publish` wrote, by name.

    Raises:
        DamagedError: When the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_bytes())["files"]
        return {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError as error:
        raise DamagedError(f"{path} is missing; without it nobody can tell whether the folder is complete.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}); restore it from a copy.") from error


def _sync_folder(folder: Path) -> None:
    """Sync a folder's list of names, where the system can: Windows and some network disks cannot."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _free(path: Path) -> int:
    path = _real(path)
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free


def _full(place: Path, needed: int) -> UserError:
    needed_mb, free_mb = -(-needed // 100_000) / 10, _free(place) // 100_000 / 10
    return UserError(
        f"the disk is full: {place} needs {needed_mb:,.1f} MB ({needed:,} bytes), {free_mb:,.1f} MB are free. "
        "What stood there still stands. Free some space or choose another place."
    )


@contextmanager
def _explained(place: Path, new: Path, size: int) -> Iterator[None]:
    """Turn errors of the operating system into ones that name the place, and the cure where there is one."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            written = [new, *new.rglob("*")]
            raise _full(place, max(size, sum(path.stat().st_size for path in written if path.is_file()))) from error
        if error.errno in _NOT_ALLOWED:
            raise UserError(f"{place} cannot be written: {reason}. Mend its permissions or choose another.") from error
        if error.errno in _WRONG_PLACE:
            raise UserError(f"{place} cannot be written: {error}. Choose another place.") from error
        raise OSError(error.errno, reason, str(error.filename or place)) from error
