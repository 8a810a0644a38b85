"""Layouts: how a run is spread over GPUs; what each of them holds and sends by formula.

With N GPUs, n of them in a machine, P weights, of which E belong to experts, b bytes of a block's weight as it is
gathered (2 in bf16, but 4 where something reads it in fp32) and 4 of any other, a GPU sends in an update of one
micro-batch:

| layout | sends |
|---|---|
| one GPU | nothing |
| DDP | 2 (N-1)/N 4P: the gradient's mean over all (ring all-reduce) |
| FSDP | (N-1)/N (2 bP + 4P): weights gathered for either pass, the gradient's mean scattered |
| hybrid | (n-1)/n (2 bP + 4P) in a machine, 2 (N/n-1)/(N/n) 4P/n between machines, with the last micro-batch |
| experts | FSDP's for P - E; in every mixture 4 (e-1)/e b d k tokens: to experts and back, in either pass; and where |
|  | there are N/e copies of the experts, 2 (N/e-1)/(N/e) 4E/e: their gradient's mean |
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vitrail.config.model import ModelConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.planner.constants import constant
from vitrail.planner.gpus import Gpu
from vitrail.planner.memory import Groups
from vitrail.planner.recorder import Kind, Phase

BUCKET = 25 * 2**20
"""Bytes that DDP exchanges at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What layouts ask of a run."""

    dense: float
    """Weights that learn, of all models, but the experts'."""
    experts: float
    """Weights of experts that learn."""
    blocks: int
    block: float
    """Weights of the largest unit that is gathered at a time: a block, without its experts."""
    block_experts: float
    """Weights of the experts of a block."""
    rest: float
    """Weights outside of blocks; they stay gathered between the passes."""
    wide: int
    """Bytes of a block's weight as it is gathered: 2 in half precision, else 4, as of all outside of blocks."""
    forwards: float
    """Forward passes of the models that learn, in an update."""
    backwards: float
    at_once: bool
    """Whether the recipe exchanges its gradient in one piece, after its passes, and not while they run."""
    dispatched: float
    """Bytes that a picture's tokens are on their way to the experts of a mixture, each token to several."""
    mixtures: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """What a GPU sends to others in an update."""

    what: str
    sent: float
    """Bytes."""
    seconds: float
    """At the rate of the links between those who take part, where nothing else has to be waited for."""
    hides: float
    """Share of the passes that go on meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A run spread over `gpus`: weights over `shards` of them, the experts' over `spread`."""

    name: str
    gpus: int
    gpu: Gpu
    shards: int = 1
    spread: int = 1

    @property
    def flags(self) -> str:
        """What tells `vitrail train` to spread a run so."""
        if self.shards == 1 or self.spread > 1:
            return ""
        return f"--loop.sharding {'full' if self.shards == self.gpus else 'hybrid'}"

    def held(self) -> Groups:
        """Return the part of each kind of memory that a GPU holds; what it gathers is in `added`."""
        shares = np.ones((len(Kind), 2))
        experts = self.spread if self.spread > 1 else self.shards
        for kind in (Kind.WEIGHTS, Kind.AVERAGE, Kind.OPTIMIZER, Kind.GRADIENT, Kind.UPDATE):
            shares[kind] = 1 / self.shards, 1 / experts
        if self.spread > 1:
            shares[Kind.UPDATE] = 1 / self.spread  # that of the largest weights
        if self.shards > 1:  # gathered in half precision at once
            shares[Kind.COPIES] = 0.0, 1 / self.spread if self.spread > 1 else 0.0
        return shares

    def added(self, work: Workload, pictures: int) -> np.ndarray:
        """Return bytes held beside, by phase: what is gathered, and what is on its way.

        FSDP gathers a block while another computes, and copies it into place; backward, a block's gradient is there in
        full, and one more is on its way in fp32.
        """
        added, whole = np.zeros(len(Phase)), work.dense + work.experts
        if self.shards > 1:
            unit = work.block + (work.block_experts if self.spread == 1 else 0.0)
            added[Phase.FORWARD] = 4 * work.rest + work.wide * 3 * unit
            added[Phase.BACKWARD] = 4 * work.rest + work.wide * 4 * unit + 2 * 4 * unit
        elif self.gpus > 1 and work.at_once:
            added[Phase.UPDATE] = 3 * 4 * whole  # the gradient in one piece, its sum, and their mean
        elif self.gpus > 1:
            added[:] = 4 * whole  # DDP's buckets
        if self.spread > 1:
            added[[Phase.FORWARD, Phase.BACKWARD]] += 2 * pictures * work.dispatched
        return added

    def exchanges(self, work: Workload, pictures: int, micro_batches: int) -> Iterator[Exchange]:
        """Yield what a GPU sends in an update."""
        gathers, scatters = micro_batches * (work.forwards + work.backwards), micro_batches * work.backwards
        if self.shards > 1:
            size = work.dense + (work.experts if self.spread == 1 else 0.0)
            part = (self.shards - 1) / self.shards
            weights = gathers * part * (work.wide * (size - work.rest) + 4 * work.rest)
            gradient = scatters * part * 4 * size
            yield self._ring("weights gathered", weights, gathers * work.blocks, self.shards, hides=1.0)
            yield self._ring("gradient scattered", gradient, scatters * work.blocks, self.shards, hides=1.0)
            # With the last micro-batch; but SAM needs the mean of every pass.
            means = scatters if work.backwards > 1 else 1.0
            yield from self._mean(
                "gradient averaged between machines", means * 4 * size / self.shards, self.gpus // self.shards
            )
        elif self.gpus > 1:
            sent = 2 * (self.gpus - 1) / self.gpus * 4 * (work.dense + work.experts)
            if work.at_once:
                yield self._ring("gradient averaged", sent, 1.0, self.gpus, hides=0.0)
            else:  # with the last micro-batch's backward pass
                yield self._ring("gradient averaged", sent, sent / BUCKET, self.gpus, hides=2 / 3 / micro_batches)
        if self.spread > 1:
            yield self._tokens(work, pictures, micro_batches)
            yield from self._mean(
                "experts' gradient averaged", 4 * work.experts / self.spread, self.gpus // self.spread
            )

    def _tokens(self, work: Workload, pictures: int, micro_batches: int) -> Exchange:
        """Each expert gets an even part; each GPU has its part of the network for what leaves the machine."""
        e, n = self.spread, self.gpu.per_machine
        messages = 2 * (work.forwards + work.backwards) * micro_batches * work.mixtures
        all_tokens = messages * pictures * work.dispatched
        leaving = max(0.0, (e - n) / e * all_tokens)
        sent = (e - 1) / e * all_tokens
        seconds = max(_seconds(sent - leaving, self.gpu.link), _seconds(leaving * n, self.gpu.network))
        return Exchange("tokens to experts and back", sent, seconds + messages * constant("message"), 0.0)

    def _ring(self, what: str, sent: float, messages: float, members: int, *, hides: float) -> Exchange:
        """Rings pass through all GPUs of a machine, and leave it through all of its network."""
        seconds = _seconds(sent, self.gpu.link)
        if members > self.gpu.per_machine:
            seconds = max(seconds, _seconds(sent, self.gpu.network))
        return Exchange(what, sent, seconds + max(1.0, messages) * constant("message"), hides)

    def _mean(self, what: str, size: float, copies: int) -> Iterator[Exchange]:
        """Copies of a part of the gradient lie in different machines, whose GPUs share the network."""
        if copies > 1:
            sent = 2 * (copies - 1) / copies * size
            crosses = self.gpus > self.gpu.per_machine
            at = _seconds(sent * self.gpu.per_machine, self.gpu.network) if crosses else _seconds(sent, self.gpu.link)
            yield Exchange(what, sent, at + constant("message"), 1.0)


def _seconds(sent: float, rate: float) -> float:
    return sent / (constant("links") * 1e9 * rate)


def layouts(gpu: Gpu, gpus: int, model: ModelConfig) -> Iterator[Layout]:
    """Yield the ways to spread a run over GPUs, the plainest first."""
    if gpus == 1:
        yield Layout(name="one GPU", gpus=1, gpu=gpu)
        return
    yield Layout(name="DDP", gpus=gpus, gpu=gpu)
    yield Layout(name="FSDP", gpus=gpus, gpu=gpu, shards=gpus)
    if gpus > gpu.per_machine and gpus % gpu.per_machine == 0:
        yield Layout(name="hybrid", gpus=gpus, gpu=gpu, shards=gpu.per_machine)
    if isinstance(model, ViTMoEConfig):
        whole = math.gcd(gpus, model.experts)
        for spread in sorted({math.gcd(gpu.per_machine, whole), whole}):
            if spread > 1:
                yield Layout(name=f"experts over {spread}", gpus=gpus, gpu=gpu, shards=gpus, spread=spread)
