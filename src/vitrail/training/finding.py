"""Learning rate and batch size, measured when asked for: once, before the run, on copies that are thrown away.

What was found stands in the run's `config.json`, as settings and with the measurements behind them, so a run that is
resumed goes on with it.
"""

import gc
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch

from vitrail.config.run import RunConfig
from vitrail.data.base import Batch
from vitrail.errors import Interrupted, UserError
from vitrail.parallel import alone, any_process, gather_objects, mean_over_processes, world_size
from vitrail.recipes import Learner
from vitrail.training.placing import spreads
from vitrail.training.setup import Parts, begin_again, trial
from vitrail.training.signals import StopRequest

log = logging.getLogger("vitrail")

LOWEST, HIGHEST, STEPS = 1e-6, 10.0, 100
"""The learning rates that are tried: so many, in equal ratios."""
SMOOTHED = 7
"""Neighbouring losses of which the median counts: single batches differ by more than one step brings."""
DIVERGED = 2.0
"""The test ends where the loss is this many times that of the start."""
LEAST_FALL, NOISE = 0.02, 2.0
"""By how much the loss must have fallen for the test to mean anything: a share of what it was at the start, and a
multiple of the usual difference between neighbours."""
BELOW = 3.0
"""The rate at which the loss stops falling, over the rate that is taken."""

SMALLEST = 8
"""Pictures of the smallest batch that is tried."""
UPDATES_PER_EPOCH = 16
"""Batches are not made so large that an epoch has fewer updates."""
NO_SLOWER = 0.95
"""Share of the best rate that counts as equal to it: repeated measurements differ by as much."""
TRIAL_SECONDS = 1.0
MEMORY_SHARE = 0.9
"""Of a GPU: the replicas of several processes, and an evaluation, need some more."""


Curve = list[tuple[float, float]]
"""Learning rates, rising, each with the loss of the batch that it was tried on."""


@dataclass(frozen=True)
class Found:
    """What was measured before a run."""

    config: RunConfig
    """The run with what was found in place of what was asked for."""
    measurements: dict[str, Any]
    """For `config.json`: the losses by learning rate, the pictures per second by batch size."""


def find_settings(config: RunConfig, parts: Parts, stop: StopRequest) -> Found:
    """Measure what `find_batch_size` and `find_lr` ask for, in this order, and begin again with what was found.

    All processes must call it; they come to the same result.

    Args:
        config: The run, not yet begun.
        parts: Its parts; learner and stream are replaced by new ones of the settings found.
        stop: Whether to leave.

    Raises:
        Interrupted: When a signal asked to stop.
        UserError: When not even the smallest batch fits into memory.
    """
    if config.find_batch_size and spreads(config):
        raise UserError(
            "--find-batch-size tries sizes in each process alone, which with --loop.sharding holds but a part of the "
            "model: leave one of them out."
        )
    settled = replace(config, find_lr=False, find_batch_size=False)
    measurements: dict[str, Any] = {}
    if config.find_batch_size:
        rates = measure_batch_sizes(settled, parts, stop)
        size = pick_batch_size(rates, prefer_large=parts.device.type == "cuda")
        measurements["pictures_per_second"] = {str(batch): round(rate, 2) for batch, rate in rates.items()}
        _tell_batch_size(settled, size, rates, len(parts.data.train))
        settled = replace(settled, loop=replace(settled.loop, batch_size=size))
    if config.find_lr:
        measurements["losses"] = curve = _swept(settled, parts, stop)
        lr = cast(float | None, gather_objects(pick_learning_rate(curve))[0])
        _tell_learning_rate(settled, lr)
        settled = replace(settled, optim=replace(settled.optim, lr=lr or settled.optim.lr))
    begin_again(settled, parts)
    return Found(settled, measurements)


def _swept(config: RunConfig, parts: Parts, stop: StopRequest) -> Curve:
    with trial(_eager(config), parts) as (learner, stream):
        return sweep(learner, stream, stop, parts.device)


def sweep(learner: Learner, stream: Iterator[Sequence[Batch]], stop: StopRequest, device: torch.device) -> Curve:
    """Return the loss before each of 100 updates whose learning rate rises from 1e-6 to 10 in equal ratios.

    The learning rate range test (Smith, 2015, arXiv 1506.01186, section 3.3), rising by a factor as in Gugger's and
    fastai's: what is good may lie anywhere in seven orders of magnitude. All learns, as in the longest part of the run;
    the other settings of the optimizer are the run's. It ends early where the loss explodes.

    Args:
        learner: Is trained, and of no use afterwards.
        stream: What it is trained on.
        stop: Whether to leave.
        device: Where the learner computes.

    Raises:
        Interrupted: When a signal asked to stop.
    """
    flat = replace(learner.optim, schedule="constant", warmup_steps=0, cooldown_steps=0, min_lr=0.0, head_first=0.0)
    curve: Curve = []
    for i in range(STEPS):
        _leave_if_asked(stop, device)
        lr = LOWEST * (HIGHEST / LOWEST) ** (i / (STEPS - 1))
        learner.optim = replace(flat, lr=lr)
        learner.schedule(0, STEPS)
        loss = float(mean_over_processes(learner.step(next(stream))["loss"]))
        if not math.isfinite(loss):
            break
        curve.append((lr, loss))
        losses = [loss for _, loss in curve]
        if len(curve) > SMOOTHED and median(losses[-SMOOTHED:]) > DIVERGED * median(losses[:SMOOTHED]):
            break
    return curve


def pick_learning_rate(curve: Sequence[tuple[float, float]]) -> float | None:
    """Return a third of the rate at which the loss is lowest, or None where it hardly fell at all.

    Where the loss is lowest, steps begin to overshoot. fastai's "minimum / 10" is for runs whose rate stays up; ours
    warm up and descend (six epochs of a small ViT on 10,000 pictures of Fashion-MNIST, one seed: 72, 80, 81 and 80 %
    right at a tenth, a quarter, a half and all of it). The loss is smoothed by a running median, centred, so that it
    does not trail behind the rate. Two digits, for more is not known.
    """
    losses = [loss for _, loss in curve]
    if len(losses) < SMOOTHED:
        return None
    half, start = SMOOTHED // 2, median(losses[:SMOOTHED])
    smooth = [median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    noise = median(abs(after - before) for before, after in pairwise(losses))
    if start - min(smooth) < max(LEAST_FALL * start, NOISE * noise):
        return None
    lowest, _ = curve[smooth.index(min(smooth))]
    return float(f"{lowest / BELOW:.1e}")


def measure_batch_sizes(config: RunConfig, parts: Parts, stop: StopRequest) -> dict[int, float]:
    """Return pictures per second by batch size, over all processes; sizes that do not fit into memory are missing.

    Each process measures by itself: if one of them runs out of memory, the others would wait for it. Sizes are powers
    of two per process and micro-batch, up to an epoch of 16 updates.

    Raises:
        Interrupted: When a signal asked to stop.
        UserError: When not even the smallest batch fits into the memory of all.
    """
    unit, pictures = config.loop.accumulation * world_size(), len(parts.data.train)
    most = max(1, max(pictures // UPDATES_PER_EPOCH, min(SMALLEST, pictures)) // unit)
    last = most.bit_length() - 1
    first = min((-(-SMALLEST // unit) - 1).bit_length(), last)
    sizes = [2**k for k in range(first, last + 1)]
    with alone():
        rates = _rates_alone(config, parts, sizes, stop)
    everyone = cast(list[dict[int, float]], gather_objects(rates))
    _leave_if_asked(stop, parts.device)
    common = {size: min(rates[size] for rates in everyone) for size in sizes if all(size in r for r in everyone)}
    if not common:
        raise UserError(
            f"out of memory with a batch of {sizes[0] * unit}. Raise --loop.accumulation; "
            "--loop.activation-checkpointing 1, a smaller model or --model.image-size helps too."
        )
    return {size * unit: rate * world_size() for size, rate in common.items()}


def pick_batch_size(rates: Mapping[int, float], *, prefer_large: bool) -> int:
    """Return the largest batch, or the smallest, that is as fast per picture as any; 5 % are no difference."""
    enough = NO_SLOWER * max(rates.values())
    return (max if prefer_large else min)(size for size, rate in rates.items() if rate >= enough)


def _rates_alone(config: RunConfig, parts: Parts, sizes: Sequence[int], stop: StopRequest) -> dict[int, float]:
    """Return pictures per second by size of a micro-batch, up to where more is slower or does not fit."""
    rates: dict[int, float] = {}
    for size in sizes:
        if stop:
            break
        loop = replace(config.loop, batch_size=size * config.loop.accumulation)
        rate = _rate(replace(config, loop=loop), parts)
        if parts.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # the run tells its own
        if rate is None:
            break
        rates[size] = rate
        found = list(rates.values())
        # A GPU goes on for as long as it is no slower, a CPU for as long as it gets faster.
        if parts.device.type == "cuda":
            if rate < NO_SLOWER * max(found):
                break
        elif len(found) > 2 and NO_SLOWER * max(found[-2:]) < max(found[:-2]):
            break
    return rates


def _rate(config: RunConfig, parts: Parts) -> float | None:
    """Return pictures per second of one batch, learned from again and again, or None when it does not fit."""
    try:
        with trial(_eager(config), parts) as (learner, stream):
            learner.schedule(0, 1)
            batches = next(stream)
            stream.close()
            for _ in range(2):  # memory for the optimizer, kernels chosen
                learner.step(batches)["loss"].item()
            seconds: list[float] = []
            while len(seconds) < 3 or (sum(seconds) < TRIAL_SECONDS and len(seconds) < 20):
                began = time.perf_counter()
                learner.step(batches)["loss"].item()
                seconds.append(time.perf_counter() - began)
            if parts.device.type == "cuda":
                total = torch.cuda.get_device_properties(parts.device).total_memory
                if torch.cuda.max_memory_reserved() > MEMORY_SHARE * total:
                    return None
    except (RuntimeError, MemoryError) as problem:
        if not is_out_of_memory(problem):
            raise
        return None
    return config.loop.batch_size / median(seconds)


def _eager(config: RunConfig) -> RunConfig:
    """Return a run that does not compile: every size of batch would be compiled anew."""
    return replace(config, loop=replace(config.loop, compile="off"))


def is_out_of_memory(problem: BaseException | None) -> bool:
    """Return whether something failed for lack of memory.

    torch has no type of its own for a full CPU, and other words for it on Windows than elsewhere; libraries of the GPU
    say it in their own.
    """
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    said = isinstance(problem, RuntimeError) and any(part in str(problem) for part in words)
    return said or isinstance(problem, torch.OutOfMemoryError | MemoryError)


def _leave_if_asked(stop: StopRequest, device: torch.device) -> None:
    if any_process(bool(stop), device):
        raise Interrupted("stopped while settings were measured; the run has not begun", stop.signal or signal.SIGTERM)


def _tell_batch_size(config: RunConfig, size: int, rates: Mapping[int, float], pictures: int) -> None:
    before, lr = config.loop.batch_size, config.optim.lr
    measured = ", ".join(f"{batch}: {rate:.0f}" for batch, rate in rates.items())
    log.info("found --loop.batch-size %d (pictures per second by batch size: %s)", size, measured)
    if size != before:
        log.info(
            "an epoch is %d updates now. --optim.lr %g was chosen for batches of %d: by the usual rules, SGD would "
            "take %.2g now, AdamW %.2g. It stays as it is, but --find-lr measures it.",
            pictures // size,
            lr,
            before,
            lr * size / before,  # Goyal et al., 2017, arXiv 1706.02677
            lr * math.sqrt(size / before),  # Malladi et al., 2022, arXiv 2205.10287
        )


def _tell_learning_rate(config: RunConfig, lr: float | None) -> None:
    if lr is None:
        log.warning(
            "found no learning rate: between %g and %g the loss hardly falls. --optim.lr %g stays as it is.",
            LOWEST,
            HIGHEST,
            config.optim.lr,
        )
    else:
        log.info("found --optim.lr %g: the loss was lowest at %g (the curve is in config.json)", lr, lr * BELOW)
