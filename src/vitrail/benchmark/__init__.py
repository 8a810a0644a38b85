"""How fast this machine trains, answers and loads, beside what it can do at most; in numbers and in words."""

import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitrail.benchmark.limits import Limits, measure_limits
from vitrail.benchmark.timing import Timing, Work, take_turns
from vitrail.benchmark.works import answering, loading, timm_maker, training, training_of
from vitrail.config.model import ALIASES, model_config
from vitrail.models import build
from vitrail.parallel import Precision, pick_device, pick_precision
from vitrail.zoo import describe

__all__ = ["Speed", "benchmark"]

BATCH = {"cpu": 8, "cuda": 128, "mps": 32}
ENOUGH = 2.0
"""Times as fast as training that loading should be, so that the model never waits."""


@dataclass(frozen=True)
class Speed:
    """What a short benchmark found. Rates are pictures per second."""

    model: str
    device: str
    threads: int
    """That torch computes with, and that pictures are decoded with."""
    batch_size: int
    precision: Precision
    operations: dict[str, float]
    """Floating-point operations per picture, by what is done."""
    limits: Limits
    rates: dict[str, Timing]
    """Of `training`, `answers`, `one at a time`, `loading`."""
    peers: dict[str, Timing]
    """Of timm, where it is installed, by the same names."""

    def share(self, name: str) -> float | None:
        """Return which share of the machine's matrix products a rate is; None for loading."""
        if name not in self.operations:
            return None
        limit = self.limits.matmul.get(self.precision, self.limits.matmul["fp32"])
        return self.rates[name].rate * self.operations[name] / limit.rate

    def words(self) -> list[str]:
        """Return what the numbers mean, a sentence each."""
        training, loading = self.rates["training"].rate, self.rates["loading"].rate
        share = self.share("training") or 0.0
        told = [f"Training {self.model} reaches {share:.0%} of what matrix products reach here."]
        if loading < training:
            told.append(
                f"Loading limits training from JPEGs: the model would take {training / loading:.1f} times the pictures "
                "that are decoded. More cores help, or pictures stored smaller."
            )
        elif loading < ENOUGH * training:
            told.append(
                f"Loading is {loading / training:.1f} times as fast as training, both alone: on shared cores training "
                "from JPEGs may wait for pictures."
            )
        else:
            told.append(f"The model is the limit: loading is {loading / training:.1f} times as fast as training.")
        bf16, fp32 = self.limits.matmul.get("bf16"), self.limits.matmul["fp32"]
        if self.precision == "fp32" and bf16 is not None and bf16.times(fp32) > 2:
            told.append(
                f"Matrix products in bf16 are {bf16.times(fp32):.1f} times as fast as in fp32: try "
                "--loop.precision bf16 in training, --precision bf16 here."
            )
        for name, theirs in self.peers.items():
            told.append(f"timm beside it: {self.rates[name].times(theirs):.2f} times timm's rate in {name}.")
        if (noise := max(timing.spread for timing in self.rates.values())) > 0.1:
            told.append(f"The machine is noisy: the middle half of the turns lies {noise:.0%} apart.")
        return told

    def to_json(self) -> dict[str, Any]:
        """Return plain values; rates are per second."""

        def plain(timing: Timing) -> dict[str, Any]:
            return {"rate": timing.rate, "spread": timing.spread, "turns": [1 / s for s in timing.seconds]}

        return {
            "model": self.model,
            "device": self.device,
            "threads": self.threads,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "torch": torch.__version__,
            "limits": {
                "matmul": {name: plain(timing) for name, timing in self.limits.matmul.items()},
                "copy": plain(self.limits.copy),
                "decode": plain(self.limits.decode),
            },
            "pictures_per_second": {
                name: plain(timing) | {"share_of_matmul": self.share(name)} for name, timing in self.rates.items()
            },
            "peers": {"timm": {name: plain(timing) for name, timing in self.peers.items()}} if self.peers else {},
            "words": self.words(),
        }


def benchmark(
    name: str = "vit-s16",
    *,
    batch_size: int | None = None,
    precision: str = "auto",
    turns: int = 5,
    seconds: float = 0.5,
    tell: Callable[[str], None] = lambda _: None,
) -> Speed:
    """Return how fast a model is on this machine, with fresh weights, in about a minute.

    Args:
        name: A model name or leaderboard alias.
        batch_size: Pictures at a time; by default 8 on a CPU and 128 on a GPU.
        precision: As `--loop.precision`: auto, fp32, bf16, fp16.
        turns: Of every measurement; all take turns.
        seconds: Least length of a turn.
        tell: Called with what is measured next.

    Raises:
        UserError: When there is no such model, or the device cannot compute in the precision.
    """
    device = pick_device()
    picked = pick_precision(precision, device)
    config = model_config(name)
    size = batch_size or BATCH[device.type]
    workers = torch.get_num_threads()
    side = "x".join(map(str, dict.fromkeys(config.image_size)))
    forward = 2e9 * describe(name)["gmacs"][side]
    operations = {"training": 3 * forward, "answers": forward, "one at a time": forward}
    tell("limits of the machine")
    limits = measure_limits(device, turns=turns, seconds=seconds / 2)
    with tempfile.TemporaryDirectory() as folder:
        load, close = loading(config, size, Path(folder), workers)
        model = build(config)
        works: dict[str, Work] = {
            "training": training(config, size, device, picked),
            "answers": answering(model, size, device, picked),
            "one at a time": answering(model, 1, device, picked),
            "loading": load,
        }
        if (make := timm_maker(ALIASES.get(name, name))) is not None:
            theirs = make()
            works |= {
                "timm training": training_of(make(), size, device, picked),
                "timm answers": answering(theirs, size, device, picked),
                "timm one at a time": answering(theirs, 1, device, picked),
            }
        tell(f"{name}: training, answers, loading" + (", and timm" if len(works) > 4 else ""))
        try:
            timings = take_turns(works, turns=turns, seconds=seconds, device=device)
        finally:
            close()
    ours = {key: timing for key, timing in timings.items() if not key.startswith("timm ")}
    peers = {key.removeprefix("timm "): timing for key, timing in timings.items() if key.startswith("timm ")}
    return Speed(name, _told(device), workers, size, picked, operations, limits, rates=ours, peers=peers)


def _told(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
