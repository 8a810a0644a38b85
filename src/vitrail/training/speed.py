"""What makes a run faster, measured before it in trials that are thrown away: compiled blocks, bf16 on a CPU.

Whether blocks are compiled is found on one of them, told in one line, and kept in the run's settings. bf16 changes what
is computed, so on a CPU it is advice.

An update is not captured as a CUDA graph: a graph repeats the Python numbers that it was captured with, and here the
learning rate, the decay of averaged weights, what learns and the sizes of batches are such numbers.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from vitrail.config.run import RunConfig
from vitrail.data.base import Batch
from vitrail.errors import UserError
from vitrail.models.base import ImageModel
from vitrail.models.blocks import compile_blocks
from vitrail.parallel import Precision, alone, autocast, cpu_computes_in_bf16, gather_objects, world_size
from vitrail.recipes import Learner
from vitrail.training.placing import spreads
from vitrail.training.setup import Parts, models_of, seconds_per_step, trial, updates

log = logging.getLogger("vitrail")

LEAST_SECONDS = 600.0
"""Of a run in which compiling may pay: it takes up to minutes, as a trial of one block takes up to half a minute."""
MARGIN = 2.0
"""Times what it takes that compiling must bring over the run: both are estimates."""
REPEATS = 10

LEAST_UPDATES = 400
"""Of a run in which bf16 is tried: the four updates that it takes are a hundredth of it then."""
LEAST_ADVISED = 300.0
"""Seconds of a run for which advice is worth a line."""
WORTH_SAYING = 1.2
"""Times as fast that bf16 must be."""


@dataclass(frozen=True)
class Trial:
    """What one block tells of all."""

    eager: float
    """Seconds of its forward and backward pass as it is."""
    compiled: float
    """The same, compiled."""
    compiling: float
    """Seconds that it took to compile it."""
    kinds: int
    """Blocks that differ in settings or in what they read: each is compiled apart."""
    share: float
    """Its forward pass, as a share of that of all blocks."""

    @property
    def gain(self) -> float:
        """Seconds of an update that compiling all blocks saves."""
        return (self.eager - self.compiled) / self.share

    @property
    def cost(self) -> float:
        """Seconds that it takes to compile all blocks."""
        return self.kinds * self.compiling


@dataclass
class Kind:
    """Blocks that are compiled as one: alike in their settings and in what they read."""

    block: nn.Module
    """The first of them."""
    inputs: tuple[Any, ...]
    """What it read first."""
    seconds: float = 0.0
    """Of the forward passes of all of them in an update."""
    visits: int = 0
    """How many passes these were."""


def settle_compiling(config: RunConfig, parts: Parts) -> tuple[RunConfig, dict[str, Any]]:
    """Return the settings with `loop.compile` on or off, and what was measured.

    Where it was to be found, the learner's blocks are compiled here; where it was asked for, they are already. All
    processes must call it; they come to the same result. On CPUs `auto` is off: see `benchmarks/training_step.py`. So
    it is where weights are spread over processes, none of which could try a block alone.
    """
    if config.loop.compile != "auto":
        return config, {}
    tries = parts.device.type == "cuda" and not spreads(config)
    found = _tried(config, parts) if tries else {}
    pays = found.get("pays", False)
    if pays:
        for model in models_of(parts.learner):
            compile_blocks(model)
    settled = replace(config, loop=replace(config.loop, compile="on" if pays else "off"))
    return settled, {"compile": found} if found else {}


def _tried(config: RunConfig, parts: Parts) -> dict[str, Any]:
    """Return what the first process found, and whether compiling pays by it."""
    seconds = seconds_per_step(config, parts, trial_seconds=2.0)
    if config.minutes is None:
        steps = updates(config.loop, len(parts.data.train))
    else:
        steps = round(60 * config.minutes / seconds)
    if steps * seconds < LEAST_SECONDS:
        log.info("not compiling: in a run of about %.0f s it would not pay", steps * seconds)
        return {"pays": False, "run_seconds": steps * seconds}
    found: Trial | str
    try:
        with alone(), trial(config, parts) as (learner, stream):
            learner.schedule(steps - 1, steps)  # all learns
            found = try_block(learner, next(stream), parts.device, parts.precision)
    except Exception as problem:  # a compiler that fails may raise anything
        found = f"{type(problem).__name__}: {problem}".splitlines()[0]
    found = cast(Trial | str, gather_objects(found)[0])
    if isinstance(found, str):
        log.info("not compiling: it fails here (%s)", found)
        return {"pays": False, "failed": found}
    pays = steps * found.gain > MARGIN * found.cost
    log.info(
        "%s: one block became %.2f times as fast; of the run's %.0f min, all %d kinds would save %.1f, and take %.1f",
        "compiling blocks" if pays else "not compiling",
        found.eager / found.compiled,
        steps * seconds / 60,
        found.kinds,
        steps * found.gain / 60,
        found.cost / 60,
    )
    return {"pays": pays, "run_seconds": steps * seconds, **asdict(found)}


def try_block(
    learner: Learner, batches: Sequence[Batch], device: torch.device, precision: Precision, backend: str = "inductor"
) -> Trial:
    """Compile one block of the kind on which the model spends most, and return what that brings.

    Args:
        learner: Of a trial; makes an update, and one of its blocks stays compiled.
        batches: What the update is made from.
        device: Where the learner computes.
        precision: Of the matrix products.
        backend: Of `torch.compile`.
    """
    with _visited(learner.model, device) as kinds:
        learner.step(batches)
    most = max(kinds, key=lambda kind: kind.seconds)

    def there_and_back() -> None:
        inputs = tree_map_only(Tensor, _leaf, most.inputs)
        with autocast(precision, device):
            outputs = [x for x in tree_leaves(most.block(*inputs)) if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])

    eager = _median_seconds(there_and_back, device)
    most.block.compile(backend=backend)
    compiling = _seconds(there_and_back, device)
    compiled = _median_seconds(there_and_back, device)
    share = most.seconds / most.visits / sum(kind.seconds for kind in kinds)
    return Trial(eager, compiled, compiling, len(kinds), share)


@contextmanager
def _visited(model: ImageModel, device: torch.device) -> Iterator[Collection[Kind]]:
    """Note what blocks read and how long their forward passes take, waiting for the device around each."""
    kinds: dict[tuple[Any, ...], Kind] = {}
    entered: list[tuple[Kind, float]] = []

    def enter(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        shapes = (tuple(x.shape) if isinstance(x, Tensor) else x for x in tree_leaves(inputs))
        # Inputs are kept of each kind alone: those of all blocks and micro-batches would not fit beside the update.
        kind = kinds.setdefault((str(block), *shapes), Kind(block, tree_map_only(Tensor, Tensor.detach, inputs)))
        _wait(device)
        entered.append((kind, time.perf_counter()))

    def leave(block: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        _wait(device)
        kind, began = entered.pop()
        kind.seconds += time.perf_counter() - began
        kind.visits += 1

    hooks = [block.register_forward_pre_hook(enter) for block in model.blocks()]
    hooks += [block.register_forward_hook(leave) for block in model.blocks()]
    try:
        yield kinds.values()
    finally:
        for hook in hooks:
            hook.remove()


def _leaf(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values that asks for a gradient, as inner blocks read them."""
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    for _ in range(2):
        work()
    return median(_seconds(work, device) for _ in range(REPEATS))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def require_compiler(device: torch.device) -> None:
    """Try torch.compile on a line of code.

    Raises:
        UserError: When it has no compiler to work with.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as problem:  # of many types, by what is missing
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise UserError(
            f"torch.compile does not work here ({reason}). Leave out --loop.compile on, or install what is missing."
        ) from problem


def advise_bf16(config: RunConfig, parts: Parts) -> None:
    """Say that a long run would train faster in bf16, where that is so: on a CPU that computes in it, by two updates.

    `auto` stays fp32 there, as every CPU can do that: a run may have to go on elsewhere.

    Args:
        config: The run with its number of updates, in fp32.
        parts: Its parts; they stay as they are.
    """
    steps = config.loop.steps or 0
    if parts.device.type != "cpu" or world_size() > 1 or steps < LEAST_UPDATES or not cpu_computes_in_bf16():
        return
    fp32 = _second_update(config, parts)
    if fp32 * steps < LEAST_ADVISED:
        return
    times = fp32 / _second_update(config, replace(parts, precision="bf16"))
    if times > WORTH_SAYING:
        log.info("this CPU computes in bf16: with --loop.precision bf16 an update is %.1f times as fast", times)


def _second_update(config: RunConfig, parts: Parts) -> float:
    """Return the seconds of a second update; the first one chooses kernels and takes memory."""
    with trial(config, parts) as (learner, stream):
        learner.schedule(0, 1)
        batches = next(stream)
        learner.step(batches)
        return _seconds(lambda: learner.step(batches), parts.device)
