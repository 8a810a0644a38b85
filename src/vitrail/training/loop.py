"""The training loop: one for every recipe."""

import logging
import math
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vitrail.checkpoints import save_model
from vitrail.checkpoints.folder import model_document
from vitrail.config.codec import to_json
from vitrail.config.run import RunConfig
from vitrail.data.base import Source
from vitrail.errors import Interrupted, UserError
from vitrail.evaluation import ask, predict_logits
from vitrail.metrics import mean_loss, score
from vitrail.parallel import any_process, gather_objects, mean_over_processes, rank, world_size
from vitrail.sharding import gathered, is_sharded, local, read
from vitrail.training.callbacks import Callback
from vitrail.training.folder import RunFolder
from vitrail.training.saving import Saver
from vitrail.training.setup import Parts, random_state, restore_random_state
from vitrail.training.signals import StopRequest

log = logging.getLogger("vitrail")


class Loop:
    """Runs a learner to its last update: schedule, step, log, evaluate, save, stop when asked.

    What a checkpoint holds is the state right after update `step`, before or after the evaluation that is due there
    (`evaluated` tells which), so a run can be stopped at any point and go on bit for bit.
    """

    def __init__(
        self, config: RunConfig, parts: Parts, folder: RunFolder, stop: StopRequest, callbacks: Sequence[Callback]
    ) -> None:
        assert config.loop.steps is not None  # resolved at the start of the run
        self.config, self.parts, self.folder, self.stop = config, parts, folder, stop
        self.saver = Saver(folder, together=is_sharded(parts.learner.models))
        self.callbacks = callbacks if rank() == 0 else ()
        self.steps = config.loop.steps
        self.step = 0
        self.evaluated = -1
        self.best: dict[str, Any] | None = None
        self.since_best = 0
        self.window: dict[str, Tensor] = {}  # sums since the last row, on the device
        self.window_steps = 0
        self.window_end: dict[str, float] = {}  # epoch and learning rate of its last update
        self.timed_steps = 0  # as `window_steps`, of this process alone: a run that goes on has no clock of before
        self.data_seconds = self.step_seconds = 0.0

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: After saving, when a signal asked to stop.
            UserError: When the loss is no longer a number, the data fails, or a checkpoint cannot be written.
        """
        for callback in self.callbacks:
            callback.start(self.folder.path, self.step, self.steps)
        try:
            self._run()
        except Interrupted:
            self.save(wait=True)  # here, where the model holds its own weights again, not the average
            raise
        finally:
            self.parts.stream.close()
            self.saver.close()
            for callback in self.callbacks:
                callback.finish()

    def _run(self) -> None:
        loop = self.config.loop
        if self.step == 0:
            self.save(wait=True)  # proves disk and permissions before any work is at stake
        while True:
            ends = self.step == self.steps
            if (self.step % loop.eval_every == 0 or ends) and 0 < self.step != self.evaluated:
                self.evaluate()
            if ends or self._out_of_patience():
                self.save(wait=True)
                return
            if self.step and self.step % loop.save_every == 0:
                self.save()
            self._leave_if_asked()
            self.update()

    def update(self) -> None:
        """Make one update and note what it cost."""
        began = time.perf_counter()
        batches = next(self.parts.stream)
        loaded = time.perf_counter()
        rate = self.parts.learner.schedule(self.step, self.steps)
        row = self.parts.learner.step(batches)
        stepped = time.perf_counter()
        if self.window and row.keys() != self.window.keys():
            self._log()  # from here on the recipe tells of something else, as in fine-tuning: no mean has both
        for name, value in row.items():
            self.window[name] = value + self.window.get(name, 0.0)
        self.window_end = {"epoch": round(self.parts.stream.epoch, 6), "lr": rate}
        self.step += 1
        self.window_steps += 1
        self.timed_steps += 1
        self.data_seconds += loaded - began
        self.step_seconds += stepped - began
        if self.step % self.config.loop.log_every == 0 or self.step == self.steps:
            self._log()

    def _log(self) -> None:
        began = time.perf_counter()
        totals = torch.stack(list(self.window.values()))  # one transfer, and one exchange, for all
        means = dict(zip(self.window, mean_over_processes(totals / self.window_steps).tolist(), strict=True))
        self.step_seconds += time.perf_counter() - began  # a GPU may have been behind until here
        if not math.isfinite(means["loss"]):
            raise self._diverged(f"the loss is {means['loss']}")
        # fp16 skips an update whose gradient overflows: its norm is infinite, which JSON has no word for.
        known = {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
        row = {"step": self.step, **self.window_end, **known}
        self.folder.append("metrics.jsonl", row)
        for callback in self.callbacks:
            callback.metrics(row)
        if self.timed_steps:
            self._log_timing()
        self.window, self.window_steps, self.timed_steps = {}, 0, 0
        self.data_seconds = self.step_seconds = 0.0

    def _log_timing(self) -> None:
        pictures = self.timed_steps * self.config.loop.batch_size
        timing = {
            "step": self.step,
            "seconds": round(self.step_seconds, 3),
            "pictures_per_second": round(pictures / self.step_seconds, 2),
            "data_wait": round(self.data_seconds / self.step_seconds, 4),
            "seconds_left": round(self.step_seconds / self.timed_steps * (self.steps - self.step), 1),
            "clock": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        if self.parts.device.type == "cuda":
            timing["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.folder.append("timing.jsonl", timing)
        for callback in self.callbacks:
            callback.timing(timing)

    def evaluate(self) -> None:
        """Measure the shipped weights on the validation part, and keep them when they are the best so far."""
        learner, val = self.parts.learner, self.parts.data.val
        if val is None:
            self.evaluated = self.step
            return
        learner.share_statistics()
        with learner.shipped_weights():
            metrics = self._measure(val)
            row = {"step": self.step, "val": metrics}
            if self.best is None or score(metrics) > score(self.best["val"]):
                self.best, self.since_best = row, 0
                self._save_model("best", metrics)
            else:
                self.since_best += 1
        self.folder.append("metrics.jsonl", row)
        self.evaluated = self.step
        for callback in self.callbacks:
            callback.metrics(row)

    def _measure(self, val: Source) -> dict[str, float]:
        """Return the metrics of the model's answers, or the mean loss where the learner has no classifier."""
        learner, config = self.parts.learner, self.config.input
        options: dict[str, Any] = {
            "batch_size": self.parts.stream.part_size,
            "workers": config.workers,
            "device": self.parts.device,
            # Weights that are gathered in half precision can answer in no other.
            "precision": self.parts.precision if is_sharded(learner.model) else "fp32",
            "max_broken": config.max_broken,
            "stop": self._leave_if_asked,
        }
        # Blocks are compiled for training alone: evaluation mode and its batches would be compiled each anew.
        compiled = self.config.loop.compile == "on"
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            if learner.judge is None:
                return predict_logits(learner.model, val, **options).metrics()
            return mean_loss(ask(learner.model, val, answer=learner.judge, **options).rows)

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint of the state as it is now, while the run goes on.

        Args:
            wait: Return only once the checkpoint stands.

        Raises:
            UserError: When loss or weights are no longer numbers, or a checkpoint, this one or the one before, cannot
                be written; the last one that could stands.
        """
        loss = [self.window["loss"]] if self.window else []
        if any_process(not _finite([*loss, *self.parts.learner.models.parameters()]), self.parts.device):
            raise self._diverged("loss or weights are not finite")
        states = gather_objects(random_state())
        self.saver.save(
            {
                "step": self.step,
                "evaluated": self.evaluated,
                "best": self.best,
                "since_best": self.since_best,
                "window": self.window,
                "window_steps": self.window_steps,
                "window_end": self.window_end,
                "learner": self.parts.learner.state_dict(),
                "stream": self.parts.stream.state_dict(),
                "random": states,
                "shipped": {"part": self.parts.learner.shipped_part, "document": self._document()},
            },
            keep=self.config.loop.keep,
        )
        if wait:
            self.saver.wait()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, whose tensors may be on the disk yet."""
        self.step, self.evaluated = state["step"], state["evaluated"]
        self.best, self.since_best = state["best"], state["since_best"]
        self.window = {name: total.to(self.parts.device) for name, total in state["window"].items()}
        self.window_steps = state["window_steps"]
        self.window_end = state.get("window_end", {})  # older checkpoints have none
        self.parts.learner.load_state_dict(state["learner"])
        self.parts.stream.load_state_dict(read(state["stream"]))
        # With another number of processes there is no state to put back; only dropout then differs.
        if rank() < len(state["random"]):
            restore_random_state(read(state["random"][rank()]))

    def finish(self) -> None:
        """Write the model folder `last`, and `best` where there was nothing to validate on."""
        self.parts.learner.share_statistics()
        with self.parts.learner.shipped_weights():
            metrics = self.best["val"] if self.best and self.best["step"] == self.step else {}
            self._save_model("last", metrics)
            if self.best is None:
                self._save_model("best", metrics)

    def _save_model(self, name: str, metrics: dict[str, Any]) -> None:
        model = self.parts.learner.model
        weights = gathered(model.state_dict())
        if rank() == 0:
            save_model(
                model,
                self.folder.path / name,
                metrics=metrics,
                weights=weights,
                **self._origin(),
            )

    def _document(self) -> dict[str, Any]:
        """Return what makes a model folder of the weights in a checkpoint."""
        return model_document(self.parts.learner.model, **self._origin())

    def _origin(self) -> dict[str, Any]:
        """Return what a model folder says of where its weights come from."""
        data = {"fingerprint": self.parts.fingerprint, "train": len(self.parts.data.train)}
        return {"recipe": to_json(self.config), "data": data}

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what} at step {self.step}. The last checkpoint in {self.folder.checkpoints} is "
            "sound; start again with a lower --optim.lr, longer --optim.warmup-steps or --optim.clip-norm 1."
        )

    def _out_of_patience(self) -> bool:
        patience = self.config.loop.patience
        if patience is None or self.since_best < patience:
            return False
        log.info("no better evaluation in the last %d: stopping early at step %d", patience, self.step)
        return True

    def _leave_if_asked(self) -> None:
        # Asking every process costs a round trip, so on GPUs they agree on every eighth update only.
        if world_size() > 1 and self.parts.device.type == "cuda" and self.step % 8:
            return
        if any_process(bool(self.stop) or self.saver.failed, self.parts.device):
            self.saver.wait()  # tells all of an error in any
            number = self.stop.signal or signal.SIGTERM  # another process may have got the signal
            raise Interrupted(f"stopped at step {self.step} of {self.steps}; saved in {self.folder.path}", number)


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors hold numbers only; the device is asked once."""
    return bool(torch.stack([local(tensor).isfinite().all() for tensor in tensors]).all())
