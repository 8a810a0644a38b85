"""The state of a run on disk, without pickle: what `load_latest` gives back equals what `save_state` got, bit for bit.

A checkpoint `step-00001234` holds `state.json`, the tree of dicts, lists, tuples and plain values, and
`state.safetensors`, its tensors. In `state.json` a list is a list and a plain value itself; any object is one of
`{"dict": [[key, value], ...]}`, `{"tuple": [...]}`, `{"tensor": name}`, `{"parts": [name, shape]}` and `{"float": hex}`
(NaN and infinities).

Where weights are spread over processes, each writes its parts of tensors into a file of its own, as process 3 into
`part-00003.safetensors`, by the name `state.learner...weight@0,64`: the box of that tensor whose first entry is at
(0, 64). Any number of processes reads from these files the boxes that it needs. (torch.distributed.checkpoint does the
same with a pickle as its index.)
"""

import json
import logging
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail.checkpoints.peers import ALONE, Peers
from vitrail.checkpoints.storage import (
    MANIFEST,
    DamagedError,
    leftover_of,
    publish,
    publish_together,
    read_manifest,
    recover,
    remove,
    standing,
    verify,
)
from vitrail.checkpoints.tensors import TensorFile, write_tensors
from vitrail.errors import UserError
from vitrail.sharding import Stored, read

FORMAT = 1
PARTED = 2
"""Format of a checkpoint whose tensors are in parts; one without is written in the older format."""
TREE = "state.json"
TENSORS = "state.safetensors"

_STEP = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"part-\d{5,}\.safetensors")
_log = logging.getLogger("vitrail")


@dataclass(frozen=True)
class Part:
    """What a process has of a tensor that is spread over several."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    dtype: torch.dtype
    offset: tuple[int, ...]
    """Where in the whole tensor its first entry is."""
    values: Tensor | None
    """None where another process, which has the same part, writes it."""


class _Boxes(Stored):
    """A tensor in one or several files, as boxes that cover it."""

    def __init__(self) -> None:
        self.shape = ()
        self._boxes: list[tuple[TensorFile, str, tuple[int, ...]]] = []

    def add(self, file: TensorFile, name: str, offset: tuple[int, ...]) -> None:
        """Note a box of the tensor: its file, its name there, and where its first entry is."""
        self._boxes.append((file, name, offset))
        ends = [start + size for start, size in zip(offset, file.entries[name].shape, strict=True)]
        self.shape = tuple(map(max, self.shape, ends)) if self.shape else tuple(ends)

    def is_whole(self) -> bool:
        """Whether the boxes, which do not overlap, cover the tensor."""
        return sum(math.prod(file.entries[name].shape) for file, name, _ in self._boxes) == math.prod(self.shape)

    def read(self, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        wanted = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        file, name, _ = self._boxes[0]
        found = torch.empty(tuple(shape), dtype=file.entries[name].dtype)
        for file, name, start in self._boxes:
            sides = zip(wanted, start, file.entries[name].shape, strict=True)
            # What both have, counted from the first entry of the tensor.
            common = [slice(max(w.start, low), min(w.stop, low + size)) for w, low, size in sides]
            if any(side.start >= side.stop for side in common):
                continue
            inside = [slice(side.start - low, side.stop - low) for side, low in zip(common, start, strict=True)]
            values = file.read(name, inside[0] if inside else None)[(slice(None), *inside[1:])[: len(inside)]]
            if values.shape == found.shape:
                return values  # as it is, without a copy
            found[tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(common, wanted, strict=True))] = (
                values
            )
        return found


def save_state(folder: Path, tree: dict[str, Any], *, keep: int, peers: Peers = ALONE) -> Path:
    """Write a checkpoint, then remove old ones. For one process at a time, or for several that call it together.

    Args:
        folder: Where the checkpoints of the run lie.
        tree: Nested dicts, lists and tuples of tensors, numbers, strings and None; `tree["step"]` names it. Dicts may
            have any plain keys, as those of `optimizer.state_dict()`. Of several processes, each has its `Part` of
            tensors that are spread; all else is taken from the first, but must be of the same structure.
        keep: How many checkpoints stay, this one included. Those of later steps are left alone.
        peers: The processes that write it.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: When the disk is full or the folder cannot be written. Every older checkpoint still stands.
        TypeError: When the tree holds something else.
    """
    leaves: dict[str, Tensor | Part] = {}
    encoded = _encoded(tree, "state", leaves)
    parts = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Part)}
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    text = json.dumps({"format": PARTED if parts else FORMAT, "tree": encoded}, allow_nan=False).encode()
    size = len(text) + sum(tensor.nbytes for tensor in tensors.values())
    path = folder / f"step-{tree['step']:08d}"

    def write(place: Path) -> list[str]:
        (place / TREE).write_bytes(text)
        write_tensors(place / TENSORS, tensors)
        return [TREE, TENSORS]

    def write_own(place: Path) -> list[str]:
        own = f"part-{peers.number:05d}.safetensors"
        boxes = {
            f"{name}@{','.join(map(str, part.offset))}": part.values
            for name, part in parts.items()
            if part.values is not None
        }
        write_tensors(place / own, boxes)
        return [own, *(write(place) if peers.first else [])]

    peers.agree(lambda: _clean(folder, path) if peers.first else None)
    if parts:
        size += sum(math.prod(part.shape) * part.dtype.itemsize for part in parts.values())
        publish_together(path, write_own, peers, size=size)
    else:
        publish(path, write, size=size)
    if peers.first:
        _remove_older(folder, tree["step"], keep)
    return path


def load_latest(folder: Path, *, peers: Peers = ALONE, lazily: bool = False) -> tuple[dict[str, Any], Path] | None:
    """Return the newest good checkpoint, with its tensors on the CPU, and its folder; None when there is none.

    A damaged one is passed over with a warning, by all processes. Nothing is changed on disk: any number may read.

    Args:
        folder: Where the checkpoints of the run lie.
        peers: The processes that read it together: each verifies its share of the files, and all take the same one.
        lazily: Leave tensors on the disk, but for single numbers, as `sharding.Stored`.

    Raises:
        UserError: When there are checkpoints but all are damaged, or the newest comes from a newer vitrail.
    """
    damaged = None
    for number, path in reversed(peers.exchange(steps(folder) if peers.first else [])[0]):
        tree, problem = _opened(path, number, peers)
        if tree is not None:
            return (tree if lazily else read(tree)), path
        if peers.first:
            _log.warning("The checkpoint %s is damaged and passed over: %s", path, problem)
        damaged = damaged or problem
    if damaged is not None:
        raise UserError(f"every checkpoint in {folder} is damaged, the newest as follows: {damaged}")
    return None


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Return step and place of every checkpoint in a folder, oldest first, also one that a crash has left aside."""
    if not folder.is_dir():
        return []
    places = [path for path in folder.iterdir() if path.is_dir()]
    names = {leftover_of(path) if path.name.endswith(".vitrail-old") else path.name for path in places}
    return sorted((int(match[1]), folder / name) for name in names if name and (match := _STEP.fullmatch(name)))


def _clean(folder: Path, path: Path) -> None:
    """Mend what a crash has left, and make room for a checkpoint where a wreck without manifest lies."""
    if not folder.is_dir():
        return
    for name in {name for leftover in folder.iterdir() if (name := leftover_of(leftover)) and _STEP.fullmatch(name)}:
        recover(folder / name)
    if path.is_dir() and not (path / MANIFEST).is_file():
        remove(path)


def _remove_older(folder: Path, step: int, keep: int) -> None:
    older = [path for number, path in steps(folder) if number < step]
    for path in older[: max(len(older) - (keep - 1), 0)]:
        try:
            remove(path)
        except OSError as error:  # the new checkpoint stands, so the call has done its work
            _log.warning("The old checkpoint %s could not be removed: %s", path, error)


def _opened(path: Path, number: int, peers: Peers) -> tuple[dict[str, Any] | None, str]:
    """Return a checkpoint's tree, or None and what is damaged, alike in all processes."""
    place, found = standing(path), dict[str, Any]()

    def check_share() -> None:
        verify(place, sorted(read_manifest(place))[peers.number :: peers.count])

    def open_tree() -> None:
        found.update(read_tree(place))
        if found["step"] != number:
            raise DamagedError(f"{path} holds step {found['step']}, so it has been renamed.")

    for work in (check_share, open_tree):
        if problem := next(filter(None, peers.agree(partial(_damage, work))), ""):
            return None, problem
    return found, ""


def _damage(work: Callable[[], None]) -> str:
    """Return what work finds to be damaged, or nothing."""
    try:
        work()
    except DamagedError as error:
        return str(error)
    return ""


def read_tree(path: Path) -> dict[str, Any]:
    """Return the tree of a checkpoint that has been verified, its tensors on the disk yet, but for single numbers.

    Raises:
        UserError: When it comes from a newer vitrail.
        DamagedError: When a tensor is not there.
    """
    document = json.loads((path / TREE).read_bytes())
    if document["format"] > max(FORMAT, PARTED):
        raise UserError(
            f"{path} was written by a newer vitrail (format {document['format']}; this one reads up to "
            f"{max(FORMAT, PARTED)}). Update it with pip install -U vitrail."
        )
    tensors: dict[str, _Boxes] = {}
    files = [
        TensorFile(path / name) for name in sorted(read_manifest(path)) if name == TENSORS or _PART.fullmatch(name)
    ]
    for file in files:
        for name, entry in file.entries.items():
            whole, _, offset = name.rpartition("@") if file.path.name != TENSORS else (name, "", "")
            start = tuple(map(int, offset.split(","))) if offset else (0,) * len(entry.shape)
            tensors.setdefault(whole, _Boxes()).add(file, name, start)
    if damaged := [name for name, tensor in tensors.items() if not tensor.is_whole()]:
        raise DamagedError(f"{path} lacks parts of {damaged[0]}; write the folder again.")
    return _decoded(
        document["tree"], {name: tensor if tensor.shape else tensor.whole() for name, tensor in tensors.items()}
    )


def _encoded(value: Any, where: str, tensors: dict[str, Tensor | Part]) -> Any:
    """Return `value` for JSON and put its tensors, and parts of them, into `tensors`."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Part):  # by its place in the tree, which is the same in all processes
        tensors[where] = value
        return {"parts": [where, list(value.shape)]}
    if isinstance(value, Mapping):
        pairs = [
            [_encoded(key, where, tensors), _encoded(item, f"{where}.{key}", tensors)] for key, item in value.items()
        ]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [_encoded(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": struct.pack(">d", value).hex()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; a state holds tensors, numbers, strings and None.")


def _decoded(value: Any, tensors: Mapping[str, Tensor | Stored]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "parts":
            name, shape = content
            if name not in tensors or tuple(tensors[name].shape) != tuple(shape):
                raise DamagedError(f"the checkpoint lacks parts of {name}; write it again.")
            return tensors[name]
        case "float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        case "tuple":
            return tuple(_decoded(item, tensors) for item in content)
        case "dict":
            return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}
        case _:
            raise ValueError(f"unknown kind {kind!r} in a saved state")
