"""Checkpoints beside the training: the state is copied in the step, and written while the run goes on."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitrail.checkpoints.peers import ALONE, Peers
from vitrail.checkpoints.resume import Part
from vitrail.parallel import gather_objects, rank, world_size
from vitrail.sharding import box_of, is_part, local, writes_part
from vitrail.training.folder import RunFolder

log = logging.getLogger("vitrail")

A_SLOW_DISK = timedelta(days=1)
"""How long processes wait for each other's files. One that has died is noticed at once, by its connection."""


class Saver:
    """Writes the checkpoints of a run, one at a time, from copies of its state in this machine's memory.

    Where weights are spread over processes, each writes its own parts; else the first one writes all. The threads that
    write agree by a process group of their own: that of the training has its own order of exchanges.
    """

    def __init__(self, folder: RunFolder, *, together: bool) -> None:
        """Prepare to save.

        Args:
            folder: Of the run.
            together: Whether each process writes. All processes must say the same.
        """
        self._folder = folder
        self._together = together
        self._peers = _own_peers() if together else ALONE
        self._writes = together or rank() == 0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[object] | None = None
        self._pinned: dict[str, Tensor] = {}

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint is known not to have been written."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def save(self, state: dict[str, Any], keep: int) -> None:
        """Copy a state, and begin to write it once the checkpoint before stands. All processes must ask.

        Args:
            state: As `resume.save_state` takes it; tensors may be spread over processes.
            keep: How many checkpoints stay.

        Raises:
            UserError: In all processes, when the checkpoint before could not be written.
            OSError: In all processes, when the disk failed under it.
        """
        self.wait()
        if not self._writes:
            return
        copy = self._copied(state, "state")
        if self._pinned:
            torch.cuda.synchronize()
        self._pending = self._thread.submit(self._folder.checkpoint(copy, keep, self._peers))

    def wait(self) -> None:
        """Wait until the last checkpoint stands. All processes must ask. Errors as those of `save`."""
        pending, self._pending = self._pending, None
        error = pending.exception() if pending is not None else None
        for other in gather_objects(error):
            if isinstance(other, BaseException):
                raise other

    def close(self) -> None:
        """Let a checkpoint that is being written come to its end, good or bad; for runs that end in an error, too."""
        self._thread.shutdown()
        if self.failed:
            log.warning("The last checkpoint has not been written: %s", self._pending and self._pending.exception())

    def _copied(self, value: Any, where: str) -> Any:
        """Return a state in this machine's memory: all that this process is to write of it."""
        if isinstance(value, Tensor) and is_part(value):
            shape, offset = box_of(value)
            own = local(value) if writes_part(value, where) else None
            assert own is None or tuple(own.shape) == tuple(shape)
            copy = None if own is None else self._copy(own, where)
            return Part(tuple(value.shape), value.dtype, tuple(offset), copy)
        if isinstance(value, Tensor):
            return self._copy(value, where) if rank() == 0 else value
        if isinstance(value, Mapping):
            return {key: self._copied(item, f"{where}.{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(item, f"{where}[{i}]") for i, item in enumerate(value))
        return value

    def _copy(self, tensor: Tensor, where: str) -> Tensor:
        """Return a copy on the CPU; from a GPU into memory that is kept for it, as such memory is slow to get."""
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True)
        kept = self._pinned.get(where)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._pinned[where] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return kept.copy_(tensor, non_blocking=True)


def run_peers() -> Peers:
    """Return the processes of the run, which agree by the process group of the training."""
    return Peers(rank(), world_size(), gather_objects)


def _own_peers() -> Peers:
    """Return the processes of the run, which agree by a process group of their own."""
    group = dist.new_group(backend="gloo", timeout=A_SLOW_DISK)
    return Peers(dist.get_rank(), dist.get_world_size(), partial(_gathered, group))


def _gathered(group: Any, value: object) -> list[object]:
    values: list[object] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
