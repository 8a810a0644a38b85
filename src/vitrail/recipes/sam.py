"""Sharpness-aware minimization: SAM (arXiv 2010.01412), ASAM (arXiv 2102.11600) and GSAM (arXiv 2203.08065).

An update asks for the gradient twice: at the weights w (the clean pass), and at w + e, where the loss is worst within
the radius rho (the perturbed pass). The optimizer then steps from w by the second:

    | variant | e, with g the clean gradient        | gradient to descend by, with h the perturbed one    |
    |---------|-------------------------------------|-----------------------------------------------------|
    | SAM     | rho g / |g|                         | h                                                   |
    | ASAM    | rho T^2 g / |T g|, T = |w| + eta    | h                                                   |
    | GSAM    | as SAM, rho linear in learning rate | h - alpha (part of g that is orthogonal to h)       |
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config.recipes import SamConfig
from vitrail.config.run import OptimConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.models.base import ImageModel
from vitrail.parallel import Precision, accumulating, autocast, average_over_processes
from vitrail.recipes.base import Place, move
from vitrail.recipes.supervised import SupervisedLearner
from vitrail.sharding import as_part, is_sharded, local, over_parts, total_norm

Gradient = dict[str, Tensor]
"""By name of the weight, in fp32, this process's part of it; weights that the loss does not depend on are left out."""


class Part(NamedTuple):
    """A micro-batch, augmented once for both passes."""

    images: Float[Tensor, "b c h w"]
    targets: Float[Tensor, "b classes"]


@final
class SamLearner(SupervisedLearner):
    """Two passes over the same pictures with the same random numbers, then one clipped update.

    Processes speak to each other once in an update, about the gradient to descend by; each perturbs by its own
    (m-sharpness). Both passes therefore run on the bare model, not on its replica, which would exchange gradients as
    they come and could not tell GSAM's two apart. Where they share one set of weights (`sharding`), either gradient is
    the mean over all, and they perturb together.
    """

    def __init__(
        self,
        model: ImageModel,
        recipe: SamConfig,
        optim: OptimConfig,
        *,
        augment: Augment,
        class_counts: np.ndarray,
        device: torch.device,
        precision: Precision,
        place: Place = move,
    ) -> None:
        super().__init__(
            model,
            recipe,
            optim,
            augment=augment,
            class_counts=class_counts,
            device=device,
            precision=precision,
            place=place,
        )
        self._sam = recipe
        self._rho = recipe.rho
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def _replicated(self) -> nn.Module:
        return self.model  # without DistributedDataParallel and its copy of the gradient

    def schedule(self, step: int, total: int) -> float:
        """Set and return the learning rate of update `step` of `total`; the radius of GSAM goes along."""
        rate = super().schedule(step, total)
        if self._sam.rho_min is not None:
            self._rho = self._sam.rho_min + (self._sam.rho - self._sam.rho_min) * rate / self.optim.lr
        return rate

    def step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Make one update; `sharpness` is how much larger the loss is at the perturbed weights than at the weights."""
        optimizer = self.optimizers["model"]
        optimizer.zero_grad(set_to_none=True)
        pictures = sum(len(batch) for batch in micro_batches)
        losses = torch.zeros(2, device=self._device)
        gradient: Gradient = {}
        for parts in self._groups(micro_batches):
            clean_and_perturbed, one = self._descent(parts, pictures)
            losses += clean_and_perturbed
            for name, g in one.items():
                gradient[name] = gradient[name].add_(g) if name in gradient else g
        self._synchronise(gradient)
        for name, g in gradient.items():
            self._weights[name].grad = as_part(g, like=self._weights[name])
        self.scaler.unscale_(optimizer)
        norm = self.clip(self.model.parameters())
        self.scaler.step(optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model)
        return {"loss": losses[0], "gradient_norm": norm, "sharpness": losses[1] - losses[0]}

    def _groups(self, micro_batches: Sequence[Batch]) -> Iterator[list[Part]]:
        """Yield what is perturbed together."""
        classes = self.model.config.num_classes
        parts = (Part(*self._augment(batch.to(self._device), classes=classes)) for batch in micro_batches)
        if self._sam.accumulation == "full":
            yield list(parts)
        else:
            yield from ([part] for part in parts)

    def _descent(self, parts: Sequence[Part], pictures: int) -> tuple[Tensor, Gradient]:
        """Return clean and perturbed loss of pictures that are perturbed together, and the gradient to descend by."""
        with _replayed(self._device):
            loss, clean = self._pass(parts, pictures)
        # Asking makes the host wait for the device, so only fp16 asks, where it happens. The scaler finds what is not
        # finite in the gradient, skips the update in all processes, and lowers its scale.
        if self.scaler.is_enabled() and not self._norm(clean.values()).isfinite():
            return torch.stack([loss, loss]), clean
        kept = self._ascend(clean)
        if self._sam.variant != "gsam":
            clean.clear()  # makes room for the second pass
        try:
            with _statistics_kept(self.model):
                worst, perturbed = self._pass(parts, pictures)
        finally:
            self._restore(kept)
        if self._sam.variant == "gsam":
            self._take_orthogonal_part(perturbed, clean)
        return torch.stack([loss, worst]), perturbed

    def _pass(self, parts: Sequence[Part], pictures: int) -> tuple[Tensor, Gradient]:
        """Return the parts' share of the mean loss over `pictures`, and its gradient, times the scale of fp16.

        The loss comes without the penalty, as everywhere in the logs; the gradient with it.
        """
        total = torch.zeros((), device=self._device)
        for i, (images, targets) in enumerate(parts):
            last = i == len(parts) - 1
            with accumulating(self.model, last=last), autocast(self._precision, self._device):
                loss = self._loss(self.model(images), targets, len(images)) / pictures
                # Not torch.autograd.grad: it may answer one tensor for several weights, and in another memory format.
                self.scaler.scale(loss).backward()
            total += loss.detach()
        gradient: Gradient = {}
        for name, weight in self._weights.items():
            if weight.grad is not None:
                gradient[name], weight.grad = local(weight.grad), None
        if self._sam.l2_penalty:
            self._add_penalty(gradient, sum(len(part.images) for part in parts) / pictures)
        return total, gradient

    @torch.no_grad()
    def _add_penalty(self, gradient: Gradient, share: float) -> None:
        """Add the gradient of a share of the L2 penalty of all weights that learn (google-research/sam).

        Half the squared norm has the weights themselves for a gradient.
        """
        factor = self.scaler.scale(torch.full((), share * self._sam.l2_penalty, device=self._device))
        for name, weight in self._weights.items():
            if weight.requires_grad:  # others learn later
                part = local(weight) * factor
                gradient[name] = gradient[name].add_(part) if name in gradient else part

    def _norm(self, parts: Iterable[Tensor]) -> Tensor:
        """Return the norm of gradients together, over all processes that hold parts of them."""
        return total_norm(list(parts), like=next(iter(self._weights.values())))

    @torch.no_grad()
    def _ascend(self, gradient: Gradient) -> Gradient:
        """Perturb the weights, and return copies of what they were.

        The step has length rho whatever the scale of the gradient, so fp16's may stay in; where the gradient is 0,
        there is none.
        """
        # ASAM as in the authors' code: size counts for kernels and scales; biases, tokens, positions move as in SAM.
        asam = self._sam.variant == "asam"
        weights = {name: local(self._weights[name]) for name in gradient}
        size = {name: weights[name].abs() + self._sam.eta for name in gradient if asam and "weight" in name}
        relative = {name: size[name] * g if name in size else g for name, g in gradient.items()}
        norm = self._norm(relative.values())
        factor = torch.where(norm > 0, self._rho / norm, 0)
        kept: Gradient = {}
        for name, g in relative.items():
            kept[name] = weights[name].clone()
            weights[name].addcmul_(size[name] * g if name in size else g, factor)
        return kept

    @torch.no_grad()
    def _restore(self, kept: Gradient) -> None:
        """Copy the weights back. To subtract what was added would round, and differently in each process."""
        for name, weight in kept.items():
            local(self._weights[name]).copy_(weight)

    def _synchronise(self, gradient: Gradient) -> None:
        """Average over processes, in place and in one exchange: the gradient, and the statistics of BatchNorm.

        Statistics as in google-research/sam, which averages them before it evaluates. Weights that are spread have come
        by the mean in the passes.
        """
        statistics = [s for norm in _tracking(self.model) for s in (norm.running_mean, norm.running_var)]
        gradients = [] if is_sharded(self.model) else gradient.values()
        average_over_processes([*gradients, *(s for s in statistics if s is not None)])

    @torch.no_grad()
    def _take_orthogonal_part(self, perturbed: Gradient, clean: Gradient) -> None:
        """Take `alpha` times the part of the clean gradient that is orthogonal to the perturbed one off the latter.

        In place; GSAM's algorithm 1, big_vision `gsam.py` with `minimize_fp`.
        """
        square = self._norm(perturbed.values()).square()
        product = torch.stack([(clean[name] * p).sum() for name, p in perturbed.items() if name in clean]).sum()
        product = over_parts(product, like=next(iter(self._weights.values())))
        along = torch.where(square > 0, product / square, 0)
        for name, p in perturbed.items():
            if name in clean:
                p.sub_(self._sam.alpha * (clean[name] - along * p))


@contextmanager
def _replayed(device: torch.device) -> Iterator[None]:
    """Put the random generators back when the context ends: what comes next draws the same dropout and drop-path."""
    own = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    if own is not None:
        torch.mps.set_rng_state(own)


def _tracking(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers whose statistics follow the batches; frozen ones do not."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))
    return [layer for layer in layers if layer.training and layer.track_running_stats]


@contextmanager
def _statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's statistics and counters as they are; it normalises by the batch as before.

    Momentum 0 would not do: the counter of batches, by which a cumulative average weighs, would go on.
    """
    layers = _tracking(model)
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
