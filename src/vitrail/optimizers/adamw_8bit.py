"""AdamW whose moments take 2 bytes per weight in place of 8 (Dettmers et al., 2022, arXiv 2110.02861)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from vitrail.optimizers.base import CountingOptimizer
from vitrail.optimizers.eight_bits import BLOCK, LEAST, in_blocks, out_of_blocks, pack, unpack

EPS = 1e-8


class AdamW8bit(CountingOptimizer):
    """AdamW that holds its moments in 8 bits between updates, and computes with them in float32.

    Of the second moment it holds the root: that is what weights are divided by, and its levels lie closer than the
    roots of levels of its square, the more so far below the largest gradient of a block.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of both moments.
        weight_decay: Decoupled decay, times the learning rate.
    """

    def __init__(
        self, params: ParamsT, lr: float, *, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            weights, gradients, state = _parts(parameter), _parts(parameter.grad), self.state[parameter]
            if not state:
                shape = (len(weights), -(-weights[0].numel() // BLOCK))
                state |= _zeros(parameter.device, shape, eight_bits=weights[0].numel() >= LEAST)
            for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                _descend(group, weight, gradient, {name: moments[i] for name, moments in state.items()})


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return what is updated at a time: experts one after the other, for the room that their update takes."""
    return [tensor[i] for i in range(len(tensor))] if tensor.ndim == 3 else [tensor]


def _zeros(device: torch.device, shape: tuple[int, int], *, eight_bits: bool) -> dict[str, Tensor]:
    """Return the moments of parts and their blocks at the start: codes and their scales, or the numbers themselves."""
    state: dict[str, Tensor] = {}
    for name in ("exp_avg", "root"):
        state[name] = torch.zeros(*shape, BLOCK, device=device, dtype=torch.uint8 if eight_bits else torch.float32)
        if eight_bits:
            state[f"{name}_scale"] = torch.zeros(*shape, 1, device=device)
    return state


def _descend(group: dict[str, Any], weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    """Take the gradient into both moments, then the step, from moments that are not rounded yet."""
    (first, second), lr, blocks = group["betas"], group["lr"], in_blocks(gradient).float()
    mean = _held(state, "exp_avg").lerp_(blocks, 1 - first)
    root = _held(state, "root").square_().lerp_(blocks.square(), 1 - second).sqrt_()
    divisor = (root / math.sqrt(1 - second ** group["step"])).add_(EPS)
    weight.mul_(1 - lr * group["weight_decay"])
    weight.sub_(out_of_blocks(mean / divisor, weight.shape), alpha=lr / (1 - first ** group["step"]))
    _hold(state, "exp_avg", mean)
    _hold(state, "root", root)


def _held(state: dict[str, Tensor], name: str) -> Float[Tensor, "blocks 256"]:
    if f"{name}_scale" not in state:
        return state[name]
    return unpack(state[name], state[f"{name}_scale"], signed=name == "exp_avg")


def _hold(state: dict[str, Tensor], name: str, moment: Float[Tensor, "blocks 256"]) -> None:
    if f"{name}_scale" in state:
        codes, scale = pack(moment, signed=name == "exp_avg")
        state[name].copy_(codes)
        state[f"{name}_scale"].copy_(scale)
