"""Supervised learning: cross-entropy (softmax or sigmoid) on labelled pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor, nn

from vitrail.config.recipes import LossConfig
from vitrail.config.run import OptimConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.losses import classification_loss
from vitrail.models.base import ImageModel, WithLoss
from vitrail.optim import AveragedWeights, build_optimizer, prepare
from vitrail.parallel import Precision, accumulating, autocast, replicate
from vitrail.recipes.base import Learner, Place, move


class SupervisedLearner(Learner):
    """One forward and backward pass per micro-batch, then one clipped update."""

    def __init__(
        self,
        model: ImageModel,
        recipe: LossConfig,
        optim: OptimConfig,
        *,
        augment: Augment,
        class_counts: np.ndarray,
        device: torch.device,
        precision: Precision,
        place: Place = move,
    ) -> None:
        prepare(model, optim)
        place(model, model, device)
        self.models = nn.ModuleDict({"model": model})
        self.optimizers = {"model": build_optimizer(model, optim)}
        self.average = AveragedWeights(model, optim.ema) if optim.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.optim = optim
        self._recipe, self._augment, self._device = recipe, augment, device
        self._precision: Precision = precision
        self._sigmoid = model.multi_label if recipe.loss == "auto" else recipe.loss == "sigmoid"
        self._class_weights = None
        if recipe.class_weights == "auto":
            self._class_weights = torch.from_numpy(inverse_frequency(class_counts)).to(device)
        self._replica: nn.Module = self._replicated()

    def let_learn(self, *, head_only: bool) -> None:
        super().let_learn(head_only=head_only)
        # The old replica goes first: its hooks on the weights would still wait for gradients that no longer come.
        self._replica = self.model
        self._replica = self._replicated()

    def _replicated(self) -> nn.Module:
        """Return the module to call in training, that averages gradients over processes if there are several."""
        return replicate(self.model, self._device)

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        optimizer = self.optimizers["model"]
        optimizer.zero_grad(set_to_none=True)
        pictures = sum(len(batch) for batch in micro_batches)
        loss = torch.zeros((), device=self._device)
        for i, batch in enumerate(micro_batches):
            images, targets = self._augment(batch.to(self._device), classes=self.model.config.num_classes)
            last = i == len(micro_batches) - 1
            with accumulating(self._replica, last=last), autocast(self._precision, self._device):
                part = self._loss(self._replica(images), targets, len(batch)) / pictures
                self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.unscale_(optimizer)
        norm = self.clip(self.model.parameters())
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        if self.optim.in_backward:
            return {"loss": loss}  # no gradient is left to be measured
        return {"loss": loss, "gradient_norm": norm}

    def _loss(self, answer: Tensor | WithLoss, targets: Tensor, pictures: int) -> Tensor:
        """Return the summed loss of the pictures, with a model's own loss added to each."""
        logits, own = answer if isinstance(answer, WithLoss) else (answer, None)
        loss = classification_loss(
            logits,
            targets,
            sigmoid=self._sigmoid,
            label_smoothing=self._recipe.label_smoothing,
            class_weights=self._class_weights,
        ).sum()
        return loss if own is None else loss + pictures * own


def inverse_frequency(class_counts: Int[np.ndarray, " classes"]) -> Float32[np.ndarray, " classes"]:
    """Return a weight per class, inverse to its number of pictures, of mean 1 over all pictures.

    So weights leave the scale of the loss, and with it the learning rate, as they are. Classes without pictures have
    weight 1.
    """
    some = class_counts > 0
    share = class_counts.sum() / some.sum()
    return np.where(some, share / np.maximum(class_counts, 1), 1.0).astype(np.float32)
