"""Training: `run_training(config)` runs a `RunConfig` to its end and returns what it made."""

import logging
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vitrail.config.run import RunConfig
from vitrail.errors import UserError
from vitrail.parallel import matrix_products, memory_kept, pick_precision, processes, rank, world_size
from vitrail.training.callbacks import Callback, TensorBoard
from vitrail.training.finding import find_settings, is_out_of_memory
from vitrail.training.folder import RunFolder
from vitrail.training.loop import Loop
from vitrail.training.saving import run_peers
from vitrail.training.setup import Parts, assemble, open_run_data, pack, resolve_length
from vitrail.training.signals import StopRequest, stop_on_signals
from vitrail.training.speed import advise_bf16, require_compiler, settle_compiling

__all__ = ["Callback", "RunResult", "run_training"]

log = logging.getLogger("vitrail")


@dataclass(frozen=True)
class RunResult:
    """What a finished run left."""

    folder: Path
    """The run folder; `best/` and `last/` in it are model folders."""
    step: int
    """Updates made."""
    val: dict[str, Any] | None
    """Metrics of the best validation, None without a validation part."""


def run_training(config: RunConfig, callbacks: Sequence[Callback] = ()) -> RunResult:
    """Train, or go on with, the run that `config` describes. Under torchrun, call it in every process.

    The folder `config.out` receives settings, logs, checkpoints, and the model folders `best/` and `last/`.

    Args:
        config: The run; `data` and `out` must be set.
        callbacks: Told of the run's course in the first process.

    Raises:
        UserError: For a mistake in settings or data, a full disk, a loss that is not a number, or too little memory.
        Interrupted: When SIGTERM or SIGINT stopped the run; its state is saved.
    """
    with processes() as device, stop_on_signals() as stop, _memory_advice():
        # 1. Whose run is it: a new one, or one to go on with in its own settings.
        if config.out is None:
            raise UserError("no folder for the run: name one with --out.")
        folder = RunFolder(Path(config.out), writes=rank() == 0)
        begun = folder.resume_config(config)
        # 2. Data, then the model that fits it, then learner and stream.
        wanted = begun or config
        if wanted.loop.compile == "on":
            require_compiler(device)
        precision = pick_precision(wanted.loop.precision, device)
        data = open_run_data(wanted)
        pack(wanted, data)
        parts = assemble(wanted, data, device, precision)
        # 3. Measured and derived settings are found once and kept.
        resolved, measurements = (begun, {}) if begun else _settle(config, parts, stop)
        if resolved.loop.tensorboard:
            callbacks = [*callbacks, TensorBoard()]
        if begun is None:
            folder.begin(config, resolved, _facts(parts) | measurements)
        # 4. The newest good checkpoint, if any.
        loop = Loop(resolved, parts, folder, stop, callbacks)
        state = folder.load_state(run_peers())
        if state is not None:
            _check_same_data(folder, parts)
            loop.restore(state)
            log.info("going on from step %d of %d", loop.step, loop.steps)
        # 5. Work.
        with memory_kept(device), matrix_products(precision, device):
            loop.run()
        loop.finish()
        return RunResult(folder.path, loop.step, loop.best["val"] if loop.best else None)


def _settle(config: RunConfig, parts: Parts, stop: StopRequest) -> tuple[RunConfig, dict[str, Any]]:
    """Return a new run's settings with all that is measured or derived, and the measurements for `config.json`."""
    measurements: dict[str, Any] = {}
    if config.find_lr or config.find_batch_size:
        settings = find_settings(config, parts, stop)
        config, measurements["found"] = settings.config, settings.measurements
    config, measured = settle_compiling(config, parts)
    resolved = resolve_length(config, parts)
    model = parts.learner.model.config  # classes come from the data, sizes may come from `init`
    resolved = replace(resolved, model=model, loop=replace(resolved.loop, precision=parts.precision))
    if config.loop.precision == "auto":
        advise_bf16(resolved, parts)
    return resolved, measurements | measured


def _facts(parts: Parts) -> dict[str, Any]:
    """Return what a reader of the run will want to know about data and machine."""
    data = parts.data
    return {
        "data": {
            "fingerprint": parts.fingerprint,
            "classes": len(data.train.classes),
            "train": len(data.train),
            "unlabelled": len(data.unlabelled) if data.unlabelled is not None else 0,
            "val": len(data.val) if data.val is not None else 0,
            "test": len(data.test) if data.test is not None else 0,
        },
        "environment": {
            "vitrail": version("vitrail"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "device": torch.cuda.get_device_name()
            if parts.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads",
            "processes": world_size(),
            "command": " ".join(sys.argv),
        },
    }


def _check_same_data(folder: RunFolder, parts: Parts) -> None:
    document = folder.stored()
    stored = document["data"]["fingerprint"] if document else None
    if stored != parts.fingerprint:
        raise UserError(
            f"the training pictures have changed since {folder.path} was begun, so it cannot go on exactly. "
            "Bring the old pictures back, or begin a new run in another --out."
        )


class _memory_advice:
    """Turn running out of memory into advice."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, problem: BaseException | None, trace: object) -> None:
        if is_out_of_memory(problem):
            raise UserError(
                "out of memory. Halve --loop.batch-size, or keep it and double --loop.accumulation; "
                "--loop.activation-checkpointing 1, a smaller model or --model.image-size helps too."
            ) from problem
