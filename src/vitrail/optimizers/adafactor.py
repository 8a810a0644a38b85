"""Adafactor as ViT-G trains with it ("Scaling Vision Transformers", Zhai et al., 2022, arXiv 2106.04560, section 3.4).

It needs 2 bytes per weight where AdamW needs 8: the second moment of a matrix is that of its rows times that of its
columns (Shazeer and Stern, 2018, arXiv 1804.04235), and the first moment is held in bfloat16, or in 8 bits. Updates are
not clipped, and do not grow with the weights. Numerically that of google-research/big_vision, `optax.py`
`scale_by_adafactor`, but for the 8 bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, _foreach_add_, _foreach_div, _foreach_lerp_, _foreach_mul, _foreach_mul_, _foreach_sqrt  # pyright: ignore[reportPrivateImportUsage]
from torch.optim.optimizer import ParamsT

from vitrail.optimizers.base import CountingOptimizer
from vitrail.optimizers.eight_bits import LEAST, in_blocks, out_of_blocks, pack, unpack
from vitrail.sharding import as_part, local, part_of, whole

EPS = 1e-30
"""Added to the squared gradient."""
DECAY_EXPONENT, DECAY_CAP = -0.8, 0.999
"""Of the second moment: its decay rises as 1 - t^-0.8, and stays at the cap."""
MOMENTUM = 0.8984375
"""0.9 as bfloat16 has it: the official code multiplies the stored moment by 0.9 in its own type."""
SHARE = 0.1
"""Of the new update in the first moment, which does not make up for its start at 0."""


class Adafactor(CountingOptimizer):
    """Adafactor in big_vision's variant, with the decoupled weight decay of AdamW.

    big_vision writes its decay times the peak learning rate; here it is a factor of its own, as everywhere: what its
    configuration calls `wd = 0.03 * lr` is `weight_decay=0.03`.

    A group may say `shape`, in which to see its parameters where that is not their own. Of two largest axes that are
    large enough, rows and columns are told apart; along the others, each matrix has moments of its own. So attention
    heads, which the official code keeps on an axis, want one here: [3 heads dh d] for queries, keys and values in one.

    Of weights that are spread over processes, gradients with rows and columns are gathered, one at a time.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Decoupled decay, times the learning rate.
        min_dim_size_to_factor: Size from which on the two largest axes are factored. The official code for mixtures
            sets it above the number of experts (google-research/vmoe), whose axis is never to be one of the two.
        eight_bits: Whether to hold the first moment in 8 bits, where there are enough (`eight_bits.LEAST`).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        weight_decay: float = 0.0,
        min_dim_size_to_factor: int = 32,
        eight_bits: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "shape": None,
        }
        super().__init__(params, defaults)
        self._eight_bits = eight_bits

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        decay = min(DECAY_CAP, 1 - group["step"] ** DECAY_EXPONENT)
        whole: list[Tensor] = []
        for parameter in parameters:
            axes = factored_axes(group["shape"] or parameter.shape, group["min_dim_size_to_factor"])
            if axes is None:
                whole.append(parameter)
            else:  # one by one, for the room that the updates of large matrices take
                self._descend(group, [parameter], [self._factored(group, parameter, axes, decay)])
        if whole:
            self._descend(group, whole, self._elementwise(whole, decay))

    def _factored(self, group: dict[str, Any], parameter: Tensor, axes: tuple[int, int], decay: float) -> Tensor:
        """Return the gradient over the root of its second moment, which is row times column over their mean."""
        rows, columns = axes
        state = self.state[parameter]
        assert parameter.grad is not None
        gradient = whole(parameter.grad)
        seen = gradient.reshape(group["shape"] or gradient.shape)
        square = seen.square().add_(EPS)
        row, column = square.mean(columns, keepdim=True), square.mean(rows, keepdim=True)
        if "exp_avg_sq_row" not in state:
            state["exp_avg_sq_row"], state["exp_avg_sq_col"] = torch.zeros_like(row), torch.zeros_like(column)
        row = state["exp_avg_sq_row"].lerp_(row, 1 - decay)
        column = state["exp_avg_sq_col"].lerp_(column, 1 - decay)
        scale = (row / row.mean(rows, keepdim=True)).rsqrt_()
        return part_of((seen * scale).mul_(column.rsqrt()).reshape(gradient.shape), like=parameter)

    def _elementwise(self, parameters: list[Tensor], decay: float) -> list[Tensor]:
        """Return the gradients over the roots of their second moments, for vectors and what else is small."""
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "exp_avg_sq" not in self.state[parameter]:
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        moments = [local(self.state[parameter]["exp_avg_sq"]) for parameter in parameters]
        squares = _foreach_mul(gradients, gradients)
        _foreach_add_(squares, EPS)
        _foreach_lerp_(moments, squares, 1 - decay)
        return list(_foreach_div(gradients, _foreach_sqrt(moments)))

    def _descend(self, group: dict[str, Any], parameters: list[Tensor], updates: list[Tensor]) -> None:
        """Average the updates over time, then take the step."""
        steps = [self._momentum(parameter) for parameter in parameters]
        _foreach_mul_(steps, MOMENTUM)
        _foreach_add_(steps, updates, alpha=SHARE)
        for parameter, step in zip(parameters, steps, strict=True):
            self._hold(parameter, step)
        weights = [local(parameter) for parameter in parameters]
        _foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        _foreach_add_(weights, steps, alpha=-group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Return the first moment in float32; of a weight that is spread, that of this process's part."""
        state = self.state[parameter]
        if "exp_avg" not in state:
            return torch.zeros_like(local(parameter))
        if "exp_avg_scale" in state:
            moment = unpack(state["exp_avg"], state["exp_avg_scale"], signed=True)
            return out_of_blocks(moment, parameter.shape)
        return local(state["exp_avg"]).float()

    def _hold(self, parameter: Tensor, moment: Tensor) -> None:
        """Keep the first moment until the next update."""
        state = self.state[parameter]
        if self._eight_bits and moment.numel() >= LEAST:
            state["exp_avg"], state["exp_avg_scale"] = pack(in_blocks(moment), signed=True)
        else:
            state["exp_avg"] = as_part(moment.bfloat16(), like=parameter)


def factored_axes(shape: Sequence[int], least: int) -> tuple[int, int] | None:
    """Return the second largest axis and the largest, when both have at least `least` entries."""
    order = sorted(range(len(shape)), key=shape.__getitem__)
    return (order[-2], order[-1]) if len(order) > 1 and shape[order[-2]] >= least else None
