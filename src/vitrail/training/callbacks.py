"""What watches a run: the terminal, TensorBoard, or anything of one's own that implements `Callback`."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vitrail.errors import UserError
from vitrail.metrics import judged_by


class Callback:
    """Told of a run's course, in the first process only. Override what is of interest; never change the run."""

    def start(self, folder: Path, step: int, steps: int) -> None:
        """The run begins, or goes on, at update `step` of `steps`."""

    def metrics(self, row: dict[str, Any]) -> None:
        """A line of `metrics.jsonl`: a training row, or an evaluation row with the key `val`."""

    def timing(self, row: dict[str, Any]) -> None:
        """A line of `timing.jsonl`: rate, share of time spent waiting for data, memory."""

    def finish(self) -> None:
        """The run ends, in whatever way."""


PLAIN_SECONDS = 15.0  # between two plain lines of progress, so that a log file stays readable


class TerminalProgress(Callback):
    """A bar with rate, waiting share and remaining time on a terminal; plain lines elsewhere. Writes to stderr."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._status: dict[str, str] = {}
        self._steps = 0
        self._printed = 0.0

    def start(self, folder: Path, step: int, steps: int) -> None:
        self._steps, self._status, self._printed = steps, {}, 0.0  # one bar may serve several runs
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=steps, completed=step, status="")

    def metrics(self, row: dict[str, Any]) -> None:
        if "val" in row:
            name = judged_by(row["val"])
            self._status["val"] = f"val {name} {row['val'][name]:.4f}"
            if self._bar is None:
                self._console.print(f"step {row['step']}/{self._steps}  {self._status['val']}", soft_wrap=True)
        else:
            self._status["loss"] = f"loss {row['loss']:.3f}"

    def timing(self, row: dict[str, Any]) -> None:
        self._status["rate"] = f"{row['pictures_per_second']:.0f} pictures/s, data wait {row['data_wait']:.0%}"
        status = "  ".join(self._status[key] for key in ("loss", "val", "rate") if key in self._status)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], status=status)
        elif time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            left = f"{row['seconds_left'] / 60:.1f} min left"
            self._console.print(f"step {row['step']}/{self._steps}  {status}  {left}", soft_wrap=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class TensorBoard(Callback):
    """Scalars for TensorBoard, under the run folder (`pip install vitrail[tensorboard]`)."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise UserError("--loop.tensorboard needs a package: pip install vitrail[tensorboard].") from missing
        self._writer_type = SummaryWriter
        self._writer: Any = None

    def start(self, folder: Path, step: int, steps: int) -> None:
        self._writer = self._writer_type(str(folder / "tensorboard"), purge_step=step)

    def metrics(self, row: dict[str, Any]) -> None:
        prefix = "val" if "val" in row else "train"
        self._add(prefix, row.get("val", row), row["step"])

    def timing(self, row: dict[str, Any]) -> None:
        self._add("timing", row, row["step"])

    def finish(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, prefix: str, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if name != "step" and isinstance(value, int | float):  # the clock is text
                self._writer.add_scalar(f"{prefix}/{name}", value, step)
