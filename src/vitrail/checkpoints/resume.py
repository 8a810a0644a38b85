"""The state of a run on disk, without pickle: what `load_latest` gives back equals what `save_state` got, bit for bit.

A checkpoint `step-00001234` holds `state.json`, the tree of dicts, lists, tuples and plain values, and
`state.safetensors`, its tensors. In `state.json` a list is a list and a plain value itself; any object is one of
`{"dict": [[key, value], ...]}`, `{"tuple": [...]}`, `{"tensor": name}` and `{"float": hex}` (NaN and infinities).
"""

import json
import logging
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrail.checkpoints.storage import MANIFEST, DamagedError, leftover_of, publish, recover, remove, standing, verify
from vitrail.checkpoints.tensors import read_tensors, write_tensors
from vitrail.errors import UserError

FORMAT = 1
TREE = "state.json"
TENSORS = "state.safetensors"

_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger("vitrail")


def save_state(folder: Path, tree: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint, then remove old ones. For one process at a time.

    Args:
        folder: Where the checkpoints of the run lie.
        tree: Nested dicts, lists and tuples of tensors, numbers, strings and None; `tree["step"]` names it. Dicts may
            have any plain keys, as those of `optimizer.state_dict()`.
        keep: How many checkpoints stay, this one included. Those of later steps are left alone.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: When the disk is full or the folder cannot be written. Every older checkpoint still stands.
        TypeError: When the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "tree": _encoded(tree, "state", tensors)}, allow_nan=False).encode()
    path = folder / f"step-{tree['step']:08d}"
    _clean(folder, path)

    def write(place: Path) -> None:
        (place / TREE).write_bytes(text)
        write_tensors(place / TENSORS, tensors)

    publish(path, write, size=len(text) + sum(tensor.nbytes for tensor in tensors.values()))
    older = [other for number, other in _checkpoints(folder) if number < tree["step"]]
    for other in older[: max(len(older) - (keep - 1), 0)]:
        try:
            remove(other)
        except OSError as error:  # the new checkpoint stands, so the call has done its work
            _log.warning("The old checkpoint %s could not be removed: %s", other, error)
    return path


def load_latest(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Return the newest good checkpoint, with its tensors on the CPU, and its folder; None when there is none.

    A damaged one is passed over with a warning. Nothing is changed on disk: any number of processes may read.

    Raises:
        UserError: When there are checkpoints but all are damaged, or the newest comes from a newer vitrail.
    """
    damaged: UserError | None = None
    for number, path in reversed(_checkpoints(folder)):
        try:
            return _read(standing(path), number), path
        except DamagedError as error:
            _log.warning("The checkpoint %s is damaged and passed over: %s", path, error)
            damaged = damaged or error
    if damaged is not None:
        raise UserError(f"every checkpoint in {folder} is damaged, the newest as follows: {damaged}") from damaged
    return None


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return step and place of every checkpoint, oldest first, also where a crash has left it set aside."""
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


def _read(path: Path, number: int) -> dict[str, Any]:
    verify(path)
    document = json.loads((path / TREE).read_bytes())
    if document["format"] > FORMAT:
        raise UserError(
            f"{path} was written by a newer vitrail (format {document['format']}; this one reads up to {FORMAT}). "
            "Update it with pip install -U vitrail."
        )
    tree = _decoded(document["tree"], read_tensors(path / TENSORS))
    if tree["step"] != number:
        raise DamagedError(f"{path} holds step {tree['step']}, so it has been renamed.")
    return tree


def _encoded(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` for JSON and put its tensors into `tensors`."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
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


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        case "tuple":
            return tuple(_decoded(item, tensors) for item in content)
        case "dict":
            return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}
        case _:
            raise ValueError(f"unknown kind {kind!r} in a saved state")
