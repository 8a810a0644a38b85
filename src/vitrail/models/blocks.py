"""What can be done to the blocks of any model in training: compile them, and compute their activations twice."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitrail.models.base import ImageModel

KINDS = 256
"""Different blocks of one class that may be compiled. EfficientNet-L2 has 88, each of its own rate of stochastic depth,
and recipes call them with and without gradients; torch's own limit is 8."""


def compile_blocks(model: ImageModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile a model block by block, in place: like blocks are compiled once, when the first of them is called.

    Names in the state dict stay as they are. Copies of the model are not compiled.
    """
    torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, KINDS)
    for block in model.blocks():
        block.compile(backend=backend)


def recompute_blocks(model: ImageModel, share: float) -> None:
    """Compute the activations of a share of the blocks, counted from the input, again in the backward pass.

    Activation checkpointing (Chen et al., 2016, arXiv 1604.06174): less memory for a second forward pass. The first
    blocks of convolutional families hold the largest maps.
    """
    blocks = model.blocks()
    for block in blocks[: round(share * len(blocks))]:
        recompute(block)


def recompute(module: nn.Module) -> None:
    """Let a module keep its inputs alone for the backward pass, which computes all else again: the same, bit for bit.

    In place, and only while gradients are computed. Dropout draws the same numbers again, and BatchNorm's statistics
    count a batch once. Names in the state dict stay as they are; a copy of the module does the same.
    """
    if not isinstance(module, Recomputing):  # as the copy of one is
        module.__class__ = _recomputing(type(module))


class Recomputing(nn.Module):
    """What the class of a module that recomputes has on top: around the call, which may be compiled, not within it.

    Within compiled code torch would leave the whole block uncompiled, and not say so.
    """

    def __call__(self, *inputs: Any) -> Any:
        return checkpoint(super().__call__, *inputs, use_reentrant=False, context_fn=partial(recompute_contexts, self))


@cache
def _recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of modules of a kind that recompute: one for all of them, as they are to be compiled as one."""
    return type(kind.__name__, (Recomputing, kind), {"__doc__": kind.__doc__})


def recompute_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts, for `torch.utils.checkpoint`, of a module's forward pass and of its second one."""
    return nullcontext(), _buffers_put_back(module)


@contextmanager
def _buffers_put_back(module: nn.Module) -> Iterator[None]:
    """Put buffers back when the context ends: BatchNorm's statistics count a batch once, however often it is computed.

    By their data: autograd, which has noted the buffers in the pass before, takes no notice. SAM's way, to turn
    tracking off, cannot serve: checkpointing refuses a second pass that keeps other tensors for the backward pass than
    the first, and BatchNorm keeps its statistics only where it tracks them.
    """
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)
