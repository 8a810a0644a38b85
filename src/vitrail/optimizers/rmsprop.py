"""RMSProp as TensorFlow has it, with which EfficientNets train (`tf.train.RMSPropOptimizer`).

It differs from `torch.optim.RMSprop` in three ways that decide whether a recipe of the one works in the other: the mean
square begins at 1, epsilon is added below the root, and the momentum holds steps, each with the learning rate of its
time.
"""

from typing import Any

import torch
from torch import Tensor, _foreach_add, _foreach_add_, _foreach_addcmul_, _foreach_mul_, _foreach_rsqrt_  # pyright: ignore[reportPrivateImportUsage]
from torch.optim.optimizer import ParamsT

from vitrail.optimizers.base import ClosureOptimizer
from vitrail.sharding import local

DECAY, EPS = 0.9, 1e-3
"""Of the mean square; tensorflow/tpu models/official/efficientnet/utils.py `build_optimizer`."""


class RMSProp(ClosureOptimizer):
    """RMSProp with momentum, and weight decay in the gradient (L2), as EfficientNet's code has it in the loss.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        weight_decay: Times the weights, added to their gradient.
        momentum: Share of the last step that is taken again.
    """

    def __init__(self, params: ParamsT, lr: float, *, weight_decay: float = 0.0, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def _step(self) -> None:
        for group in self.param_groups:
            parameters: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._descend(group, parameters)

    def _descend(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["square_avg"] = torch.ones_like(parameter)
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        weights = [local(parameter) for parameter in parameters]
        if group["weight_decay"]:
            gradients = _foreach_add(gradients, weights, alpha=group["weight_decay"])
        squares = [local(self.state[parameter]["square_avg"]) for parameter in parameters]
        steps = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        _foreach_mul_(squares, DECAY)
        _foreach_addcmul_(squares, gradients, gradients, 1 - DECAY)
        scales = _foreach_add(squares, EPS)
        _foreach_rsqrt_(scales)
        _foreach_mul_(steps, group["momentum"])
        _foreach_addcmul_(steps, gradients, scales, group["lr"])
        _foreach_add_(weights, steps, alpha=-1.0)
