"""What a recipe is at run time: models, optimizers, and one update from micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, _foreach_mul_, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.optim import Optimizer

from vitrail.config.run import OptimConfig
from vitrail.data.base import Batch
from vitrail.models.base import ImageModel
from vitrail.optim import AveragedWeights, head_steps, learning_rate, let_learn, set_learning_rate
from vitrail.parallel import mean_statistics
from vitrail.sharding import local, spread, spread_moments, total_norm

Place = Callable[[ImageModel, nn.Module, torch.device], None]
"""Puts a model that is to learn onto a device, before its optimizer is built: the model, what is called in training,
which is the model or holds it, and the device."""


def move(model: ImageModel, root: nn.Module, device: torch.device) -> None:
    """Put a model onto a device as it is: see `training.placing.place` for what else a run may ask for."""
    root.to(device)


class Learner(ABC):
    """A recipe at run time. The loop knows nothing else of it, so a new recipe never needs a second loop."""

    models: nn.ModuleDict
    """`"model"` is the one shipped; a recipe may hold others, as a teacher."""
    optimizers: dict[str, Optimizer]
    average: AveragedWeights | None
    """Averaged weights of the shipped model, when the run keeps them."""
    scaler: torch.amp.GradScaler
    """Loss scaling for fp16; passes everything through in other precisions."""
    optim: OptimConfig
    _head_alone = False

    @abstractmethod
    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Make one update of the weights and return scalars for the log, on the device, without synchronising."""

    @property
    def model(self) -> ImageModel:
        """The model that is evaluated and shipped, with its present weights."""
        return self.models["model"]  # pyright: ignore[reportReturnType]

    def share_statistics(self) -> None:
        """Give all processes the mean of their running statistics; what is evaluated and shipped is one model then."""
        buffers = dict(self.model.named_buffers())
        mean_statistics(buffers.values())
        if self.average is not None:
            mean_statistics(value for name, value in self.average.average.items() if name in buffers)

    def shipped_weights(self) -> AbstractContextManager[None]:
        """Return the context in which `model` holds the weights to evaluate and ship: the average, if there is one."""
        return self.average.applied(self.model) if self.average else nullcontext()

    @property
    def shipped_part(self) -> tuple[str, ...]:
        """Where in `state_dict` the weights to ship are: keys, the last one the beginning of the weights' own names."""
        return ("average", "average", "") if self.average else ("models", "model", "")

    @property
    def judge(self) -> Callable[[Tensor], Tensor] | None:
        """What validation asks of a batch of views: a loss per picture, [b 1]. None: to classify them, by their labels.

        A learner without a classifier is judged by the mean of these losses, the lowest being the best.
        """
        return None

    def schedule(self, step: int, total: int) -> float:
        """Set and return the learning rate of update `step` of `total`, and say what learns in it.

        Both follow from `step` alone, so a run that goes on from a checkpoint needs to know no more.
        """
        alone = step < head_steps(self.optim, total)
        if alone != self._head_alone:
            self._head_alone = alone
            self.let_learn(head_only=alone)
        rate = learning_rate(self.optim, step, total)
        set_learning_rate(self.optimizers.values(), rate)
        return rate

    def clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Clip the gradient of these parameters to `optim.clip_norm`, where that is on, and return the norm it had."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:  # updates happened in the backward pass
            return torch.zeros(())
        parts = [local(gradient) for gradient in gradients]
        norm = total_norm(parts, like=gradients[0])
        if self.optim.clip_norm:
            _foreach_mul_(parts, (self.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def let_learn(self, *, head_only: bool) -> None:
        """Say what learns from here on.

        A learner with replicas (`parallel.replicate`) makes new ones here: in every update, DistributedDataParallel
        waits for the gradients that were asked for when it was made.
        """
        let_learn(self.model, head_only=head_only)

    def state_dict(self) -> dict[str, Any]:
        """Return everything the next step depends on, besides the data and the random generators.

        Where weights are spread over processes, so are they and their moments here.
        """
        return {
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "average": self.average.state_dict() if self.average else None,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state, of whole tensors or such as are on the disk yet, however weights are spread here."""
        for name, model in self.models.items():
            model.load_state_dict(spread(state["models"][name], like=model.state_dict()))
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(spread_moments(state["optimizers"][name], optimizer))
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
