"""What optimizers of our own share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class ClosureOptimizer(Optimizer, ABC):
    """An optimizer whose update, after a closure where one is given, is `_step`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Make one update; the host never waits for the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @abstractmethod
    def _step(self) -> None:
        """Make one update by the gradients that are there."""


class CountingOptimizer(ClosureOptimizer, ABC):
    """An optimizer that counts the updates of each group, and keeps its state as it is.

    Args:
        params: Parameters or groups.
        defaults: Settings of groups that do not say otherwise.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "step": 0})

    def _step(self) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:  # others learn later: moments and the count that corrects them begin together
                group["step"] += 1
                self._update(group, parameters)

    @abstractmethod
    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Make the group's update of those of its parameters that have a gradient."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state, each tensor in its own type: torch would give all of them that of the weights."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        present = chain.from_iterable(group["params"] for group in self.param_groups)
        parameters = dict(zip(saved, present, strict=True))
        for number, moments in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter] = {name: moment.to(parameter.device) for name, moment in moments.items()}
