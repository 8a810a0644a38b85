"""A step of training, rehearsed: the real learner works on tensors that have shapes and take no memory.

What a step takes, computes and moves is then known whatever the recipe, the optimizer and the settings are, of any
model in seconds. A GPU is imitated on tensors of the CPU, which every machine has: see `imitation`.
"""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrail.config.distillation import DistillationConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import ModelConfig
from vitrail.config.recipes import SupervisedConfig
from vitrail.config.run import AugmentConfig, RunConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.layers import moe
from vitrail.models import ImageModel, build
from vitrail.models.blocks import recompute_blocks
from vitrail.parallel import Precision, autocast
from vitrail.planner.gpus import Gpu
from vitrail.planner.imitation import imitating, replaced
from vitrail.planner.recorder import Kind, Operation, Recorder
from vitrail.recipes import Learner, build_learner, meta_pseudo_labels
from vitrail.training.setup import models_of

CPU = torch.device("cpu")
PASSING = (Kind.ACTIVATIONS, Kind.BACKWARD, Kind.UPDATE)
"""Kinds of memory that serve a step alone."""
LATE = 0.79
"""Share of the run after which the step is: all learns, and no recipe is in its last phase."""


@dataclass(frozen=True)
class Rehearsal:
    """What a step did. Pieces of memory are numbered in the order in which they were taken."""

    sizes: Float[np.ndarray, " pieces"]
    """Bytes of each piece."""
    kinds: Int[np.ndarray, " pieces"]
    experts: Bool[np.ndarray, " pieces"]
    """Whether a piece belongs to the weights of a mixture's experts."""
    before: Int[np.ndarray, " held"]
    """Pieces held when the step begins."""
    events: Int[np.ndarray, " events"]
    """Pieces taken, and given back (their complements), in order."""
    phases: Int[np.ndarray, " events"]
    operations: list[Operation]


class Marker:
    """Says what memory holds: once for weights, and after every step for what the step may have put in its place."""

    def __init__(self, recorder: Recorder, learner: Learner, models: Sequence[ImageModel]) -> None:
        self._recorder, self._learner = recorder, learner
        modules = [*learner.models.values(), *models]  # a teacher may be none of the learner's
        layers = chain.from_iterable(module.modules() for module in modules)
        self._weights = {id(weight): weight for module in modules for weight in module.parameters()}
        self._experts = {id(p) for layer in layers if isinstance(layer, moe.Experts) for p in layer.parameters()}
        for tensor in chain(self._weights.values(), chain.from_iterable(module.buffers() for module in modules)):
            self._mark(tensor, Kind.WEIGHTS, tensor)
        if learner.average is not None:
            for name, tensor in learner.average.average.items():
                recorder.mark(tensor, Kind.AVERAGE, expert=".experts." in name)

    def optimizers(self) -> None:
        for optimizer in self._learner.optimizers.values():
            for weight, state in optimizer.state.items():
                for tensor in state.values():
                    if isinstance(tensor, Tensor):
                        self._mark(tensor, Kind.OPTIMIZER, weight)

    def backward(self, loss: Tensor) -> None:
        """Go back from a loss, and mark the gradients that come of it."""
        with self._recorder.in_backward():
            torch.autograd.backward(loss)
        for weight in self._weights.values():
            if weight.grad is not None:
                self._mark(weight.grad, Kind.GRADIENT, weight)

    def _mark(self, tensor: Tensor, kind: Kind, weight: Tensor) -> None:
        self._recorder.mark(tensor, kind, expert=id(weight) in self._experts)


def rehearse(
    config: RunConfig, pictures: Sequence[int], *, precision: Precision, gpu: Gpu | None = None
) -> list[Rehearsal]:
    """Return what steps would do, after others.

    Args:
        config: The run; `loop.accumulation` micro-batches make a step.
        pictures: Labelled pictures in a micro-batch of each step.
        precision: Of matrix products.
        gpu: What to imitate; None for the CPU as it is.
    """
    config = simplified(config)
    taught = isinstance(config.recipe, DistillationConfig | MetaPseudoLabelsConfig)
    with _without_memory(config.model, precision, gpu, models=2 if taught else 1) as (recorder, models):
        with replaced(meta_pseudo_labels, "build", lambda _: models[1]):
            learner = practised_learner(config, models[0], models[-1], precision)
        marker = Marker(recorder, learner, models)
        marker.optimizers()
        with replaced(Tensor, "backward", lambda loss: marker.backward(loss)), recorder.watching_modules():
            return [_step(recorder, marker, learner, config, count) for count in pictures]


def answer(model: ModelConfig, pictures: int, *, precision: Precision, gpu: Gpu) -> list[Operation]:
    """Return the operations of a model's answer to so many pictures."""
    lent = _without_memory(model, precision, gpu, models=1)
    with lent as (recorder, (built,)), torch.no_grad(), autocast(precision, CPU):
        built.eval()
        images = torch.empty(pictures, model.channels, *model.image_size)
        recorder.operations.clear()
        built(images)
        return recorder.operations[:]


@contextmanager
def _without_memory(
    config: ModelConfig, precision: Precision, gpu: Gpu | None, *, models: int
) -> Iterator[tuple[Recorder, list[ImageModel]]]:
    """Lend models whose tensors take no memory, as all take none that are made meanwhile, and what records them.

    Models cannot be made meanwhile: they look at numbers.
    """
    recorder = Recorder()
    with torch.device("meta"):
        built = [build(config) for _ in range(models)]
    with ExitStack() as stack:
        stack.enter_context(_no_cached_tensors())
        # Asked to move to the one device there is: torch does not know how to move tensors of this kind.
        stack.enter_context(replaced(nn.Module, "to", lambda module, *args, **kwargs: module))
        for imitated in imitating(gpu, precision) if gpu is not None else ():
            stack.enter_context(imitated)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(recorder)
        stack.enter_context(_frees_at_once())
        yield recorder, [model.to_empty(device="cpu") for model in built]


def _step(recorder: Recorder, marker: Marker, learner: Learner, config: RunConfig, pictures: int) -> Rehearsal:
    for optimizer in learner.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    batches = [noise(config, pictures) for _ in range(config.loop.accumulation)]
    begins, done = len(recorder.events), len(recorder.operations)
    learner.step(batches)
    marker.optimizers()
    events, operations = recorder.events[begins:], recorder.operations[done:]
    taken = [number for _, number in recorder.events[:begins]]
    held = {number for number in taken if number >= 0} - {~number for number in taken if number < 0}
    # What the step before has left to this one, such as a teacher's last answer, is small, and no part of a first step.
    left = {~number for _, number in events if ~number in held and recorder.kinds[~number] in PASSING}
    events = [(phase, number) for phase, number in events if ~number not in left]
    return Rehearsal(
        sizes=np.array(recorder.sizes, np.float64),
        kinds=np.array(recorder.kinds, np.int64),
        experts=np.isin(np.arange(len(recorder.sizes)), list(recorder.experts)),
        before=np.array(sorted(held - left), np.int64),
        events=np.array([number for _, number in events], np.int64),
        phases=np.array([phase for phase, _ in events], np.int64),
        operations=operations,
    )


def simplified(config: RunConfig) -> RunConfig:
    """Return the run without what concerns data, and without classes that only data tells of."""
    recipe = config.recipe
    if isinstance(recipe, SemanticConfig):  # the rows of superclasses are known with the labels only
        recipe = SupervisedConfig(loss="softmax")
    loop = replace(config.loop, patience=None)
    plain = AugmentConfig(crop="none", flip=0.0)
    return replace(config, recipe=recipe, augment=plain, loop=loop, find_lr=False, init=None)


def practised_learner(config: RunConfig, model: ImageModel, teacher: ImageModel, precision: Precision) -> Learner:
    """Return a run's learner as it is late in the run; its optimizers remember a step.

    Args:
        config: The run, simplified.
        model: To learn.
        teacher: For recipes that name one.
        precision: Of matrix products.
    """
    counts, named = np.ones(config.model.num_classes, np.int64), isinstance(config.recipe, DistillationConfig)
    learner = build_learner(
        config, model, class_counts=counts, device=CPU, precision=precision, teacher=teacher if named else None
    )
    learner.scaler = torch.amp.GradScaler("cpu", enabled=False)  # fp16's asks for numbers
    for each in models_of(learner):
        recompute_blocks(each, config.loop.activation_checkpointing)
    for optimizer in learner.optimizers.values():
        for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    learner.schedule(round(LATE * 1000), 1000)
    Augment(config.augment, learner.model.preprocessing)(noise(config, 1), classes=1)  # fills caches, as a step does
    return learner


def noise(config: RunConfig, pictures: int) -> Batch:
    """Return a batch of so many labelled pictures that show nothing, with as many others as the recipe asks for."""

    def of(count: int) -> Batch:
        images = torch.empty(count, config.model.channels, *config.model.image_size, dtype=torch.uint8)
        return Batch(images, torch.zeros(count, dtype=torch.int64), torch.arange(count), cropped=True)

    batch = of(pictures)
    if isinstance(config.recipe, MetaPseudoLabelsConfig):
        batch = replace(batch, unlabelled=of(config.recipe.unlabelled_ratio * pictures))
    return batch


@contextmanager
def _frees_at_once() -> Iterator[None]:
    """Let memory go when the last reference does, and not when Python happens to look for cycles."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextmanager
def _no_cached_tensors() -> Iterator[None]:
    """Keep tensors without numbers out of the caches of functions."""

    def clear() -> None:
        for name, module in list(sys.modules.items()):
            for value in vars(module).values() if name.startswith("vitrail.") else ():
                if callable(clears := getattr(value, "cache_clear", None)):
                    clears()

    clear()
    try:
        yield
    finally:
        clear()
