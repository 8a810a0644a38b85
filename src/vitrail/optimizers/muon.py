"""Muon: momentum, orthogonalised by Newton-Schulz (Keller Jordan et al., 2024, kellerjordan.github.io/posts/muon).

Every hidden matrix moves by the nearest semi-orthogonal matrix to its momentum, so that all its directions learn, not
only the few that dominate the gradient. What is no hidden matrix is left to AdamW, in the same optimizer.

`torch.optim.Muon` takes matrices alone, one after the other, and always in bfloat16, which most CPUs only emulate.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW

from vitrail.optimizers.base import ClosureOptimizer
from vitrail.sharding import local, part_of, whole

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of x, x^3 and x^5: chosen to be steep at 0, they take singular values to about 0.7 to 1.2 instead of to 1."""
EPS = 1e-7
RMS = 0.2
"""Root mean square of an update at learning rate 1, which is about that of AdamW."""


class Matrices(NamedTuple):
    """The momentum of one parameter, as matrices that are not taller than wide."""

    parameter: Tensor
    wide: Float[Tensor, "n short long"]
    transposed: bool


class Muon(ClosureOptimizer):
    """Muon for hidden matrices, with Nesterov momentum and decoupled weight decay; AdamW for the rest.

    Updates are scaled by 0.2 sqrt(max(rows, columns)), to the size of AdamW's ("Muon is Scalable for LLM Training",
    Liu et al., 2025, arXiv 2502.16982, section 2.2; `match_rms_adamw` in torch): one learning rate and one weight decay
    serve both, and those that are good for AdamW serve here.

    Kernels of convolutions are seen as [out, in x height x width], parameters of three axes as a matrix each along the
    first: experts. A group says `matrices=False` when it is AdamW's, and `parts` when its matrices are several, one
    above the other: 3 for queries, keys and values in one.

    Of weights that are spread over processes, each gathers the momentum, one weight at a time, and keeps its part of
    the update that all find.

    Args:
        groups: Groups of parameters.
        lr: Learning rate.
        weight_decay: Decoupled decay, times the learning rate.
        momentum: Decay of Muon's momentum.
        ns_steps: Newton-Schulz iterations.
        betas: Decay of AdamW's moments.
        fused: Whether AdamW takes its fused kernel.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        fused: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "matrices": True,
            "parts": 1,
        }
        super().__init__(groups, defaults)
        rest = self._groups(matrices=False)  # AdamW writes its settings into them
        self._adamw = AdamW(rest, lr=lr, betas=betas, fused=fused) if rest else None

    def _groups(self, *, matrices: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["matrices"] == matrices]

    def _step(self) -> None:
        for group in self._groups(matrices=True):
            alike: dict[tuple[Any, ...], list[Matrices]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    one = self._momentum(group, parameter)
                    if local(parameter) is not parameter:
                        _descend(group, [one])
                    else:
                        alike[(*one.wide.shape[1:], one.wide.device)].append(one)
            for several in alike.values():
                _descend(group, several)
        if self._adamw is not None:  # groups and state are this optimizer's: `load_state_dict` puts others in place
            self._adamw.param_groups, self._adamw.state = self._groups(matrices=False), self.state
            self._adamw.step()

    def _momentum(self, group: dict[str, Any], parameter: Tensor) -> Matrices:
        """Take the gradient into the momentum, and return that, one gradient ahead (Nesterov)."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = whole(gradient.lerp(momentum, group["momentum"]))
        stacked = ahead if ahead.ndim == 3 else ahead.flatten(1).unflatten(0, (group["parts"], -1))
        transposed = stacked.shape[1] > stacked.shape[2]
        return Matrices(parameter, stacked.mT if transposed else stacked, transposed)


def _descend(group: dict[str, Any], several: list[Matrices]) -> None:
    """Step along matrices of one shape, which are orthogonalised together."""
    batch = torch.cat([one.wide for one in several])
    kind = batch.device.type
    fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    updates = orthogonalise(batch.bfloat16() if fast else batch, group["ns_steps"])
    rate = group["lr"] * RMS * math.sqrt(batch.shape[2])
    for one, update in zip(several, updates.split([len(one.wide) for one in several]), strict=True):
        weight, update = local(one.parameter), update.mT if one.transposed else update
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(part_of(update.reshape(one.parameter.shape), like=one.parameter), alpha=-rate)


def orthogonalise(matrices: Float[Tensor, "n short long"], steps: int) -> Float[Tensor, "n short long"]:
    """Return U V^T, about, of each matrix U S V^T, by Newton-Schulz iterations of fifth order. Zero stays zero."""
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
