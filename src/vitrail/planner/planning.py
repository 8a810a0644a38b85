"""From a name to a plan: rehearse, spread over GPUs, see what fits, how fast it is and what it costs."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.recipes import SamConfig
from vitrail.config.run import RunConfig, SupervisedConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.errors import UserError
from vitrail.layers.moe import Experts
from vitrail.models import ImageModel, build
from vitrail.parallel import Precision
from vitrail.planner.constants import constant
from vitrail.planner.gpus import GIB, Gpu, gpu_named
from vitrail.planner.layouts import Exchange, Layout, Workload, layouts
from vitrail.planner.memory import Timeline
from vitrail.planner.names import Run, named
from vitrail.planner.recorder import Kind
from vitrail.planner.rehearsal import answer, rehearse
from vitrail.planner.speed import Operations, exposed
from vitrail.training.placing import gathers_in_half

PICTURES = (16, 32)
"""In a micro-batch of the rehearsals: two groups of a mixture's tokens and more."""
PARTS: dict[str, tuple[Kind, ...]] = {
    "weights": (Kind.WEIGHTS,),
    "averaged weights": (Kind.AVERAGE,),
    "optimizer": (Kind.OPTIMIZER,),
    "gradient": (Kind.GRADIENT,),
    "half-precision copies": (Kind.COPIES,),
    "activations": (Kind.ACTIVATIONS,),
    "working room": (Kind.BACKWARD, Kind.UPDATE),
}
"""Of a GPU's memory, as a plan tells of it."""
EXCHANGED = "gathered, sent"
"""The part that comes on top where there are several GPUs."""
PLAIN, RECOMPUTED = "plain", "checkpointing"
"""Settings: the run's own, and with activation checkpointing: blocks are computed again in the backward pass."""
SAME = 0.03
"""By which two times differ that count as the same."""
MOST_GPUS = 1024
"""Up to which the fewest that hold a run are looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """Settings that trade time for memory."""

    name: str
    flags: str
    """Of `vitrail train`."""
    config: RunConfig


@dataclass(frozen=True)
class Step:
    """An update of a run with some settings, known for any number of pictures in a micro-batch."""

    variant: Variant
    timeline: Timeline
    operations: Operations


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A run with some settings, spread in some way."""

    layout: str
    settings: str
    flags: str
    """What tells `vitrail train` of all this, beside the preset."""
    available: bool
    """Whether it can be told: experts are not spread by it yet."""
    fits: bool
    micro_batch: int
    """Pictures at a time on each GPU; where nothing fits, one."""
    accumulation: int
    memory: dict[str, float]
    """Bytes of a GPU when it holds most, by what they are for."""
    exchanges: list[Exchange]
    """What a GPU sends in an update."""
    seconds: float
    """Of an update."""
    pictures_per_second: float
    utilisation: float
    """Share of the GPUs' peak that the model's own operations take, blocks that are computed again left out."""
    hours: float | None
    cost: float | None
    """Dollars for the run."""

    @property
    def total(self) -> float:
        """Bytes of a GPU when it holds most."""
        return sum(self.memory.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run takes, and how it can be done."""

    run: Run
    gpu: Gpu
    gpus: int
    price: float
    precision: str
    compiled: bool
    parameters: int
    expert_parameters: int
    inference_flops: float
    """Of a picture's answer."""
    training_flops: float
    """Of a labelled picture, all passes and models of the recipe."""
    activations: dict[str, float]
    """Bytes per picture kept for the backward pass, by settings."""
    room: float
    """Bytes of a GPU that a run can use."""
    fitting: list[Choice]
    """Best first."""
    others: list[Choice]
    """The least of every layout that does not fit."""
    fewest: int | None = None
    """The fewest GPUs that hold the run, where these do not."""


def plan(
    name: str,
    *,
    gpus: int = 1,
    gpu: str = "h100",
    batch_size: int | None = None,
    image_size: int | None = None,
    price: float | None = None,
) -> Plan:
    """Return what a run takes on GPUs, and the ways to do it. Nothing is allocated; it is all prediction.

    Args:
        name: A preset, or a model's name or leaderboard alias; a model is trained as `vitrail train` does by itself.
        gpus: In all machines together.
        gpu: Their name in `GPUS`.
        batch_size: Pictures per update, in place of the preset's.
        image_size: Height and width in pixels, in place of the preset's or the model's.
        price: Dollars for a GPU and hour, in place of the table's assumption.

    Raises:
        UserError: When there is no such model, preset or GPU, or a number is none.
    """
    if gpus < 1:
        raise UserError(f"--gpus must be at least 1, not {gpus}.")
    if price is not None and price < 0:
        raise UserError(f"--price must not be negative, not {price}.")
    device, run = gpu_named(gpu), named(name, batch_size=batch_size, image_size=image_size)
    planner = Planner(run, device)
    found = planner.plan(gpus, device.price if price is None else price)
    return found if found.fitting else replace(found, fewest=planner.fewest())


class Planner:
    """Plans of one run on one kind of GPU. Each variant of its settings is rehearsed once, when first asked for."""

    def __init__(self, run: Run, gpu: Gpu) -> None:
        self._run, self._gpu = run, gpu
        self._half = run.config.loop.precision != "fp32"
        self._compiled = run.config.loop.compile != "off"
        with torch.device("meta"):
            self._model = build(run.config.model)
        self._precision: Precision = "bf16" if self._half else "fp32"
        self._answer = answer(run.config.model, PICTURES[0], precision=self._precision, gpu=gpu)
        self._steps: dict[str, Step] = {}
        self._plain = self._step(Variant(name=PLAIN, flags="", config=run.config))
        self._work = _workload(run.config, self._model, self._plain.timeline, half=self._half)

    def on(self, gpu: Gpu) -> "Planner":
        """Return the same for another GPU that computes in the same way: nothing is rehearsed again."""
        alike = gpu.grouped_products == self._gpu.grouped_products
        assert alike or not isinstance(self._run.config.model, ViTMoEConfig)
        other = copy.copy(self)
        other._gpu = gpu
        return other

    def plan(self, gpus: int, price: float) -> Plan:
        """Return the plan for so many GPUs at a price per hour of each.

        Raises:
            UserError: When there are more of them than pictures in an update.
        """
        if self._run.config.loop.batch_size < gpus:
            raise UserError(
                f"--gpus {gpus}: an update of {self._run.name} has {self._run.config.loop.batch_size} pictures, and "
                "each GPU needs one at least. Take fewer, or a larger --batch-size."
            )
        fitting: list[Choice] = []
        others: list[Choice] = []
        for layout in layouts(self._gpu, gpus, self._run.config.model):
            tried: list[Choice] = []
            for variant in variants(self._run.config, gpus):
                if layout.shards > 1 and variant.config.optim.moments == "8bit":
                    continue  # training packs moments of whole weights only
                if variant.name in (PLAIN, RECOMPUTED) or not any(choice.fits for choice in tried):
                    tried.append(self._choice(layout, self._step(variant), price))
            fitting += (choice for choice in tried if choice.fits)
            if not any(choice.fits for choice in tried):
                others.append(min(tried, key=lambda choice: choice.total))
        return Plan(
            run=self._run,
            gpu=self._gpu,
            gpus=gpus,
            price=price,
            precision=self._precision,
            compiled=self._compiled,
            parameters=sum(p.numel() for p in self._model.parameters()),
            expert_parameters=_experts(self._model),
            inference_flops=sum(each.flops for each in self._answer) / PICTURES[0],
            training_flops=self._plain.operations.flops_per_picture,
            activations={name: step.timeline.most(Kind.ACTIVATIONS)[1] for name, step in self._steps.items()},
            room=self._room,
            # A prediction does not tell what differs by little; the plainer comes first.
            fitting=sorted(fitting, key=lambda choice: round(math.log(choice.seconds, 1 + SAME))),
            others=others,
        )

    def fewest(self) -> int | None:
        """Return the fewest GPUs, doubled again and again, that hold the run in some way."""
        counts = [2**power for power in range(MOST_GPUS.bit_length())]
        counts = [count for count in counts if count <= self._run.config.loop.batch_size]
        return next((count for count in counts if self.plan(count, 0.0).fitting), None)

    @property
    def _room(self) -> float:
        return GIB * (self._gpu.memory * (1 - constant("fragments")) - constant("reserve"))

    def _step(self, variant: Variant) -> Step:
        if variant.name not in self._steps:
            config = replace(variant.config, loop=replace(variant.config.loop, accumulation=1))
            few, more = rehearse(config, PICTURES, precision=self._precision, gpu=self._gpu)
            timeline = Timeline.of(few, more, PICTURES)
            operations = Operations.of(few.operations, more.operations, PICTURES)
            self._steps[variant.name] = Step(variant, timeline, operations)
        return self._steps[variant.name]

    def _choice(self, layout: Layout, step: Step, price: float) -> Choice:
        """Return the choice with the largest micro-batch that fits; with single pictures, where none does."""
        share = math.ceil(self._run.config.loop.batch_size / layout.gpus)
        counts = [count for count in range(1, share + 1) if share % count == 0]
        loop = self._run.config.loop
        if isinstance(self._run.config.recipe, SamConfig) and loop.accumulation > 1:
            # Part of the recipe: how many pictures are perturbed together, at most.
            counts = [max(1, share // (loop.batch_size // loop.accumulation))]
        if step.variant.config.optim.in_backward:
            counts = counts[:1]
        memories = ((count, self._memory(layout, step, share // count, count)) for count in counts)
        found = next((each for each in memories if sum(each[1].values()) <= self._room), None)
        count, memory = found or (counts[-1], self._memory(layout, step, share // counts[-1], counts[-1]))
        return self._timed(layout, step, count, memory, price, fits=found is not None)

    def _memory(self, layout: Layout, step: Step, pictures: int, micro_batches: int) -> dict[str, float]:
        timeline = step.timeline
        if micro_batches > 1:
            timeline = timeline.accumulating(apart=isinstance(self._run.config.recipe, SamConfig))
        held, added = timeline.peak(pictures, layout.held(), layout.added(self._work, pictures))
        memory = {name: float(held[list(kinds)].sum()) for name, kinds in PARTS.items()}
        return memory | ({EXCHANGED: added} if layout.gpus > 1 else {})

    def _timed(
        self, layout: Layout, step: Step, micro_batches: int, memory: dict[str, float], price: float, *, fits: bool
    ) -> Choice:
        config, gpu = self._run.config, self._gpu
        pictures = math.ceil(config.loop.batch_size / layout.gpus) // micro_batches
        learning = np.array([self._work.dense, self._work.experts])
        share = float(layout.held()[Kind.OPTIMIZER] @ learning / max(learning.sum(), 1))
        passes, update = step.operations.seconds(pictures, gpu, half=self._half, compiled=self._compiled, share=share)
        exchanges = list(layout.exchanges(self._work, pictures, micro_batches))
        seconds = micro_batches * passes + update + exposed(exchanges, micro_batches * passes)
        rate = config.loop.batch_size / seconds
        own = self._plain.operations.flops_per_picture
        hours = None if self._run.minutes is None else self._run.minutes / 60
        if self._run.steps is not None:
            hours = self._run.steps * seconds / 3600
        return Choice(
            layout=layout.name,
            settings=step.variant.name,
            flags=self._flags(layout, step.variant, micro_batches),
            available=layout.spread == 1,
            fits=fits,
            micro_batch=pictures,
            accumulation=micro_batches,
            memory=memory,
            exchanges=exchanges,
            seconds=seconds,
            pictures_per_second=rate,
            utilisation=own * rate / (layout.gpus * 1e12 * (gpu.half if self._half else gpu.single)),
            hours=hours,
            cost=None if hours is None else hours * layout.gpus * price,
        )

    def _flags(self, layout: Layout, variant: Variant, micro_batches: int) -> str:
        usual = micro_batches == self._run.accumulation
        accumulation = "" if usual else f"--loop.accumulation {micro_batches}"
        return " ".join(flags for flags in (self._run.flags, layout.flags, accumulation, variant.flags) if flags)


def variants(config: RunConfig, gpus: int) -> Iterator[Variant]:
    """Yield the settings that a run can have to fit, the fastest first."""
    yield Variant(name=PLAIN, flags="", config=config)
    again = replace(config, loop=replace(config.loop, activation_checkpointing=1.0))
    flags = "--loop.activation-checkpointing 1"
    yield Variant(name=RECOMPUTED, flags=flags, config=again)
    if config.optim.name not in ("adamw", "adafactor"):
        return
    small = replace(again, optim=replace(again.optim, moments="8bit"))
    name, flags = f"{RECOMPUTED}, moments in 8 bits", f"{flags} --optim.moments 8bit"
    yield Variant(name=name, flags=flags, config=small)
    if gpus == 1 and isinstance(config.recipe, SupervisedConfig):
        early = replace(small, optim=replace(small.optim, in_backward=True, clip_norm=0.0))
        name = f"{name}, updates in the backward pass, no clipping"
        yield Variant(name=name, flags=f"{flags} --optim.in-backward --optim.clip-norm 0", config=early)


def _workload(config: RunConfig, model: ImageModel, timeline: Timeline, *, half: bool) -> Workload:
    recipe, blocks = config.recipe, model.blocks()
    sizes = [sum(p.numel() for p in block.parameters()) - _experts(block) for block in blocks]
    dense, experts = (float(part) / 4 for part in timeline.gradient)
    forwards, backwards = {SamConfig: (2.0, 2.0), MetaPseudoLabelsConfig: (2.0, 1.0)}.get(type(recipe), (1.0, 1.0))
    mixtures, dispatched = 0, 0.0
    if isinstance(config.model, ViTMoEConfig):
        rows, columns = config.model.grid
        tokens = rows * columns + (config.model.pool == "token")
        mixtures = len(config.model.moe_layers)
        dispatched = float(tokens * config.model.experts_per_token * config.model.width * (2 if half else 4))
    return Workload(
        dense=dense,
        experts=experts,
        blocks=len(sizes),
        block=float(max(sizes, default=0)),
        block_experts=float(max(map(_experts, blocks), default=0)),
        rest=max(0.0, dense - sum(sizes)),
        wide=2 if half and gathers_in_half(config, model) else 4,
        forwards=forwards,
        backwards=backwards,
        at_once=isinstance(recipe, SamConfig | MetaPseudoLabelsConfig),
        dispatched=dispatched,
        mixtures=mixtures,
    )


def _experts(module: Any) -> int:
    """Return the weights of mixtures' experts in a module."""
    layers = (layer for layer in module.modules() if isinstance(layer, Experts))
    return sum(p.numel() for layer in layers for p in layer.parameters())
