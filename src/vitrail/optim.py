"""Parameter groups, optimizers, schedules and averaged weights: one place for each."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from vitrail.config.run import OptimConfig
from vitrail.errors import UserError
from vitrail.models.base import ImageModel
from vitrail.optimizers import Adafactor, AdamW8bit, Muon, RMSProp
from vitrail.sharding import is_sharded, local, spread


def prepare(model: ImageModel, config: OptimConfig) -> None:
    """Put the model into the state to build its optimizer in: what learns at any time in the run asks for a gradient.

    Raises:
        UserError: When only the head is to learn and the model has none.
    """
    if (config.train == "head" or config.head_first) and model.config.num_classes == 0:
        setting = "--optim.train head" if config.train == "head" else "--optim.head-first"
        raise UserError(f"{setting}: this model has no head; give it classes with num_classes=.")
    let_learn(model, head_only=config.train == "head")


def let_learn(model: ImageModel, *, head_only: bool) -> None:
    """Say what learns, and with it in which mode the model answers.

    With `head_only` the body is frozen and the whole model stays in evaluation mode: BatchNorm keeps its statistics,
    and dropout, whose noise is there to regularise the body, is off. No gradient is computed behind the head, as
    nothing there asks for one.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not head_only or name.startswith("head."))
    model.train(not head_only)


def head_steps(config: OptimConfig, total: int) -> int:
    """Return how many updates at the start of `total` are the head's alone, all else learning later.

    Head first, then all of it: LP-FT (Kumar et al., 2022, arXiv 2202.10054). A random head would bend the features of
    a pretrained body before it can tell what they are good for.
    """
    return min(round(config.head_first * total), total - 1) if config.train == "all" else 0


def parameter_groups(model: ImageModel, config: OptimConfig) -> list[dict[str, Any]]:
    """Return the optimizer's groups: decayed matrices apart from the rest, one pair per layer with layer decay.

    Weight decay touches kernels only (big_vision: parameters named `kernel`), no bias, norm, class token, probe or
    position, unless `config.decay` is "all". Each group carries `lr_scale`, its factor on the schedule (BEiT, arXiv
    2106.08254, appendix). With `config.in_backward` each parameter is a group of its own.
    """
    top = len(model.blocks()) + 1
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kernel = parameter.ndim > 1 and name.endswith(".weight")
        decay = config.weight_decay
        if name.startswith("head.") and config.head_decay is not None:
            decay = config.head_decay
        distance = top - model.depth_of(name) if config.layer_decay < 1 else 0
        decays = kernel or config.decay == "all"
        settings: dict[str, Any] = {"weight_decay": decay if decays else 0.0, "lr_scale": config.layer_decay**distance}
        if config.head_first:
            settings["head"] = name.startswith("head.")  # groups that count their updates are not to mix both
        if config.name == "adafactor" and kernel:
            settings["shape"] = _heads_apart(model, name, parameter)
        if config.name == "muon":
            settings["matrices"] = kernel and _is_hidden_matrix(model, name, parameter)
            if settings["matrices"]:
                settings["parts"] = _parts(name)
        alike = (name if config.in_backward else None, *settings.items())
        groups.setdefault(alike, {"params": [], **settings})["params"].append(parameter)
    return list(groups.values())


def _is_hidden_matrix(model: ImageModel, name: str, kernel: Tensor) -> bool:
    """Return whether a kernel is between input and head, and mixes channels, as those of depthwise convolutions do not.

    Newton-Schulz makes directions of a matrix equal; an embedding or a classifier has none that should be.
    """
    return name != model.input_kernel and not name.startswith("head.") and 1 not in kernel.shape[:2]


def _parts(name: str) -> int:
    """Return how many matrices a kernel holds, one above the other."""
    return {"qkv": 3, "key_value": 2}.get(name.split(".")[-2], 1)


def _heads_apart(model: ImageModel, name: str, kernel: Tensor) -> tuple[int, ...] | None:
    """Return the shape in which an attention kernel has an axis of heads, as in big_vision; None for others."""
    path, _, layer = name.removesuffix(".weight").rpartition(".")
    heads = getattr(model.get_submodule(path), "heads", None)
    if heads is None or layer not in ("qkv", "key_value", "query", "out"):
        return None
    rows, columns = kernel.shape
    parts = _parts(name)
    return (rows, heads, columns // heads) if layer == "out" else (parts, heads, rows // parts // heads, columns)


def build_optimizer(model: ImageModel, config: OptimConfig) -> Optimizer:
    """Return the optimizer of a model's trainable parameters.

    Raises:
        UserError: When updates are to happen in the backward pass, and there are several processes; or when moments are
            to be held in 8 bits, and weights are spread over processes.
    """
    if config.moments == "8bit" and is_sharded(model):
        raise UserError(
            "--optim.moments 8bit packs moments of whole weights, which --loop.sharding spreads over processes: leave "
            "one of them out."
        )
    optimizer = _optimizer(model, config)
    if config.in_backward:
        update_in_backward(optimizer)
    return optimizer


def _optimizer(model: ImageModel, config: OptimConfig) -> Optimizer:
    groups = parameter_groups(model, config)
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    match config.name:
        case "sgd":
            return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
        case "adam":
            return Adam(groups, lr=config.lr, betas=config.betas, fused=fused)
        case "rmsprop":
            return RMSProp(groups, lr=config.lr, momentum=config.momentum)
        case "adamw":
            if config.moments == "8bit":
                return AdamW8bit(groups, lr=config.lr, betas=config.betas)
            return AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
        case "muon":
            return Muon(groups, lr=config.lr, momentum=config.momentum, betas=config.betas, fused=fused)
        case "adafactor":
            least = max(32, getattr(model.config, "experts", 0) + 1)
            eight_bits = config.moments == "8bit"
            return Adafactor(groups, lr=config.lr, min_dim_size_to_factor=least, eight_bits=eight_bits)


def update_in_backward(optimizer: Optimizer) -> None:
    """Update each parameter in the backward pass as soon as its gradient is there, and let go of the gradient.

    So never more gradients are held than the pass is working on (LOMO: Lv et al., 2023, arXiv 2306.09782, section 3.1).
    The weights become what `step` would make of them after the pass; called then, it finds no gradient left.

    Args:
        optimizer: Of groups of one parameter each.

    Raises:
        UserError: When there are several processes: their gradients are averaged only after the pass.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError("--optim.in-backward updates weights by this process's gradients alone: use one process.")

    def update(number: int, parameter: Tensor) -> None:
        groups = optimizer.param_groups
        optimizer.param_groups = groups[number : number + 1]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    for number, group in enumerate(optimizer.param_groups):
        (parameter,) = group["params"]
        parameter.register_post_accumulate_grad_hook(partial(update, number))


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Return the learning rate of update `step`, counted from 0, of `total`.

    Linear warm-up over at most a fifth of the run, then the schedule; `rsqrt` and `constant` end in a linear cooldown
    multiplied on top (big_vision `create_learning_rate_schedule`; Zhai et al., 2022, arXiv 2106.04560, section 3.5).

    While the head learns alone, its rate warms up in the same way, over at most a fifth of these updates, and stays at
    the peak: the head is to come close to its best, not to settle. All else then has a whole schedule for itself, with
    the warm-up that the body's optimizer needs as much as that of any run: its moments begin with it.
    """
    alone = head_steps(config, total)
    if step < alone:
        return config.lr * min(1.0, (step + 1) / max(1, min(config.warmup_steps, alone // 5)))
    step, total = step - alone, total - alone
    warmup = min(config.warmup_steps, total // 5)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress, floor = (step - warmup) / max(total - warmup, 1), min(config.min_lr, config.lr)
    match config.schedule:
        case "cosine":
            return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return floor + (config.lr - floor) * (1 - progress)
        case "exponential":  # counted from the start of the run (tensorflow/tpu efficientnet `build_learning_rate`)
            factor = config.decay_factor ** (step // config.decay_steps)
        case "rsqrt":
            factor = 1 / math.sqrt(1 + (step - warmup) / config.rsqrt_timescale)
        case "constant":
            factor = 1.0
    if config.schedule in ("rsqrt", "constant") and config.cooldown_steps:
        factor *= min(1.0, (total - step) / config.cooldown_steps)
    return config.lr * factor


def set_learning_rate(optimizers: Iterable[Optimizer], lr: float) -> None:
    """Set the rate of every group, scaled by the group's `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


class AveragedWeights:
    """Exponential moving average of a model's parameters (Polyak averaging).

    The decay warms up as (1 + n) / (10 + n), so that the random start is soon forgotten (TensorFlow's rule).
    Buffers of the state dict are averaged too, as EfficientNet's code does; whole numbers are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[Tensor] = []
        present: list[Tensor] = []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averaged.append(local(self.average[name]))
                present.append(local(tensor))
            else:
                self.average[name].copy_(tensor)
        torch._foreach_lerp_(averaged, present, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Lend the average to the model until the context ends."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        """Exchange values, one tensor after the other: FSDP gathers from the memory that it once gave to a weight."""
        for name, tensor in model.state_dict().items():
            present, average = local(tensor), local(self.average[name])
            kept = present.clone()
            present.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for name, tensor in spread(state["average"], like=self.average).items():
            local(self.average[name]).copy_(local(tensor))
