"""A run folder: settings, metrics, timing and checkpoints of one run.

`config.json` holds the settings as asked for and as resolved; `metrics.jsonl` depends on the settings alone (no clock
in it), so a run that was killed and resumed leaves the same bytes; `timing.jsonl` holds the clock.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vitrail.checkpoints.peers import ALONE, Peers
from vitrail.checkpoints.resume import load_latest, save_state
from vitrail.checkpoints.storage import recover, write_file
from vitrail.config.codec import from_json, to_json
from vitrail.config.run import RunConfig
from vitrail.errors import UserError
from vitrail.parallel import gather_objects, launch, restarts

FORMAT = 1


class RunFolder:
    """The files of one run. Only the first process writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self._writes = writes

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """Model folder of the best validation."""
        return self.path / "best"

    @property
    def last(self) -> Path:
        """Model folder of the run's end."""
        return self.path / "last"

    def begin(self, requested: RunConfig, resolved: RunConfig, facts: Mapping[str, Any]) -> None:
        """Write `config.json`: the settings, and `facts` about data and machine."""
        if not self._writes:
            return
        settings = {"requested": to_json(requested), "resolved": to_json(resolved)}
        document = {"format": FORMAT, **settings, **facts, "launch": launch()}
        write_file(self.path / "config.json", (json.dumps(document, indent=1) + "\n").encode())

    def stored(self) -> dict[str, Any] | None:
        """Return `config.json`, or None when there is no run here yet.

        Raises:
            UserError: When the file is damaged or from a newer version.
        """
        file = self.path / "config.json"
        if not file.exists():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            newer = document["format"] > FORMAT
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{file} is damaged ({problem}); start a new run in another --out.") from problem
        if newer:
            raise UserError(f"{file} was written by a newer vitrail; update it with pip install -U vitrail.")
        return document

    def resume_config(self, asked: RunConfig) -> RunConfig | None:
        """Return the resolved settings of the run that lies here, or None when there is none.

        A run that torchrun has begun here goes on by itself when torchrun starts its processes again.

        Raises:
            UserError: When a run lies here and was not to be resumed, or was asked for with other settings.
        """
        document = self.stored()
        if document is None:
            return None
        if not (asked.resume or self._started_again(document)):
            raise UserError(f"{self.path} holds a run already. Add --resume to continue it, or choose another --out.")
        requested = from_json(RunConfig, document["requested"], "config.json")
        if differences := _differences(_comparable(requested), _comparable(asked)):
            raise UserError(
                f"{self.path} was begun with other settings: {'; '.join(differences)}. "
                "Resume with the settings it was begun with, or choose another --out."
            )
        resolved = from_json(RunConfig, document["resolved"], "config.json")
        return replace(
            resolved,
            input=replace(resolved.input, workers=asked.input.workers, packed=asked.input.packed),
            loop=replace(
                resolved.loop,
                activation_checkpointing=asked.loop.activation_checkpointing,
                sharding=asked.loop.sharding,
            ),
        )

    def _started_again(self, document: Mapping[str, Any]) -> bool:
        return restarts() > 0 and document.get("launch") == gather_objects(launch())[0]

    def load_state(self, peers: Peers = ALONE) -> dict[str, Any] | None:
        """Return the newest good checkpoint and cut the logs back to where it stood, or None without one.

        Args:
            peers: The processes that read it together. Each reads of the tensors, which are on the disk yet
                (`sharding.Stored`), what it needs.
        """
        if self._writes:
            recover(self.best)
            recover(self.last)
        found = load_latest(self.checkpoints, peers=peers, lazily=True)
        if found is None:
            if self._writes:
                for name in ("metrics.jsonl", "timing.jsonl"):
                    (self.path / name).unlink(missing_ok=True)
            return None
        state, _ = found
        if self._writes:
            for name, size in state["logs"].items():
                _truncate(self.path / name, size)
        return state

    def checkpoint(self, state: dict[str, Any], keep: int, peers: Peers = ALONE) -> Callable[[], object]:
        """Return what writes a checkpoint, to which the logs as they are now belong.

        The last good one stays until the new one stands. Arguments as those of `resume.save_state`.
        """
        logs = {name: _flushed_size(self.path / name) for name in ("metrics.jsonl", "timing.jsonl") if self._writes}
        return partial(save_state, self.checkpoints, state | {"logs": logs}, keep=keep, peers=peers)

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl` or `timing.jsonl`."""
        if self._writes:
            with (self.path / name).open("a", encoding="utf-8", newline="\n") as log:
                log.write(json.dumps(row) + "\n")

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Return the rows of a log."""
        file = self.path / name
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _comparable(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide the result, but for rounding.

    All but where it lies, and what only memory, threads and processes notice.
    """
    tree = to_json(replace(config, resume=False, out=None))
    tree["data"] = config.data and str(Path(config.data).resolve())
    del (
        tree["input"]["workers"],
        tree["input"]["packed"],
        tree["loop"]["activation_checkpointing"],
        tree["loop"]["sharding"],
    )
    return tree


def _differences(stored: Any, asked: Any, where: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        keys = sorted(stored.keys() | asked.keys())
        return [d for key in keys for d in _differences(stored.get(key), asked.get(key), f"{where}.{key}".lstrip("."))]
    return [] if stored == asked else [f"{where} was {stored}, now {asked}"]


def _truncate(file: Path, size: int) -> None:
    if file.exists() and file.stat().st_size > size:
        os.truncate(file, size)


def _flushed_size(file: Path) -> int:
    """Return a log's size once its bytes are on disk: a checkpoint must never know more than the log holds."""
    if not file.exists():
        return 0
    with file.open("rb+") as log:
        os.fsync(log.fileno())
        return log.seek(0, os.SEEK_END)
