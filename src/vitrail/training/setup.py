"""From settings to the parts of a run: data, model, length."""

import copy
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.checkpoints import adapt, load_model
from vitrail.checkpoints.adapt import with_overrides
from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import LoopConfig, RunConfig
from vitrail.data import open_data
from vitrail.data.base import Source, Splits
from vitrail.data.few_labels import with_few_labels
from vitrail.data.paired import PairedStream
from vitrail.data.stream import Stream
from vitrail.data.view import evaluation_view
from vitrail.errors import BrokenPicture, UserError
from vitrail.models import ImageModel, build
from vitrail.optim import head_steps
from vitrail.parallel import Precision, any_process, gather_objects, local_rank, rank, world_size
from vitrail.recipes import Learner, build_learner
from vitrail.sharding import of_first_process
from vitrail.training.placing import place, spreads

log = logging.getLogger("vitrail")

# Fewer pictures than this do not teach a large plain ViT from scratch what pretraining does (ViT paper, figure 4).
FROM_SCRATCH_PICTURES = 100_000
LARGE_MODEL_PARAMETERS = 5_000_000
FIT_PICTURES = 512  # as many as a model may ask for before the first update
# What a run says of a model whose weights it starts from: no tensor depends on it.
OF_THE_RUN = ("dropout", "drop_path", "expert_dropout", "train_capacity_factor", "frozen_norm")
TRIAL_RUN = 1000  # updates of the run that a trial pretends to be of


@dataclass
class Parts:
    """What a run works with."""

    data: Splits
    learner: Learner
    stream: Stream
    device: torch.device
    precision: Precision
    fingerprint: str
    """Of the training pictures; hashed once, for every model folder and the check on resuming ask for it."""
    teacher: ImageModel | None = None
    """The model whose answers are learned from, where the recipe names one; read once, for trials learn from it too."""


def open_run_data(config: RunConfig) -> Splits:
    """Return the run's data, with a validation part set aside where it has none.

    Raises:
        UserError: When no data is named or it cannot be read.
    """
    if config.data is None:
        raise UserError("no data: name a folder of pictures, a CSV manifest or a CIFAR or IDX folder with --data.")
    data = open_data(
        config.data,
        channels=config.model.channels,
        val=config.input.val,
        val_fraction=config.input.val_fraction,
        seed=config.seed,
        labelled=not isinstance(config.recipe, MaskedConfig),
    )
    return with_few_labels(
        data,
        config.input,
        channels=config.model.channels,
        seed=config.seed,
        learns_unlabelled=isinstance(config.recipe, MetaPseudoLabelsConfig),
    )


def pack(config: RunConfig, data: Splits) -> None:
    """Keep small pictures decoded, if the settings allow it: each machine's first process writes what others find."""
    if not config.input.packed:
        return
    if local_rank() == 0:
        data.pack(config.input.workers)
    gather_objects(None)  # wait for the first
    data.pack(config.input.workers)


def build_model(config: RunConfig, data: Splits) -> ImageModel:
    """Return the model to train: fresh, or from `init` with head, positions and channels made to fit."""
    classes, size = data.train.classes, config.model.image_size
    if config.init is not None:
        model = load_model(config.init)
        old_classes = model.config.num_classes
        both = [name for name in OF_THE_RUN if hasattr(model.config, name) and hasattr(config.model, name)]
        model = with_overrides(model, {name: getattr(config.model, name) for name in both})
        model = adapt(model, image_size=size, num_classes=len(classes), channels=config.model.channels, labels=classes)
        log.info("starting from %s, with its model and normalisation", config.init)
        if old_classes != len(classes):
            log.info("new head: %d classes instead of %d", len(classes), old_classes)
    else:
        model = build(replace(config.model, num_classes=len(classes)))
        warn_from_scratch(model, len(data.train) + (len(data.unlabelled) if data.unlabelled is not None else 0))
    settings, pretrained = config.input, model.preprocessing
    model.preprocessing = Preprocessing(
        image_size=size,
        channels=config.model.channels,
        fit=settings.fit,
        crop_fraction=settings.crop_fraction,
        interpolation=settings.interpolation,
        # What the weights were trained with beats what the preset would have chosen.
        mean=pretrained.mean if config.init and not settings.renormalise else settings.mean,
        std=pretrained.std if config.init and not settings.renormalise else settings.std,
    )
    model.labels = classes
    model.multi_label = data.train.multi_label
    if config.init is None:
        model.fit_input(lambda: some_views(data.train, model.preprocessing))
    return model


def some_views(source: Source, preprocessing: Preprocessing) -> Float[Tensor, "b c h w"]:
    """Return some hundred pictures from all over a source as evaluation sees them; unreadable ones are passed over."""
    views: list[Tensor] = []
    tried = range(0, len(source), -(-len(source) // FIT_PICTURES))
    for index in tried:
        with suppress(BrokenPicture):
            views.append(evaluation_view(source.load(index), preprocessing))
    if not views:
        raise UserError(f"none of the {len(tried)} training pictures tried can be read; `vitrail check` names them.")
    return torch.stack(views)


def warn_from_scratch(model: ImageModel, pictures: int) -> None:
    """Say plainly that a large model will not learn from few pictures, and what to do instead."""
    parameters = sum(p.numel() for p in model.parameters())
    if parameters >= LARGE_MODEL_PARAMETERS and pictures < FROM_SCRATCH_PICTURES:
        log.warning(
            "training %.0f million parameters from scratch on %d pictures: expect poor results. Start from pretrained "
            "weights (preset `finetune`, or --init), or take a small preset such as `photos`.",
            parameters / 1e6,
            pictures,
        )


def assemble(config: RunConfig, data: Splits, device: torch.device, precision: Precision) -> Parts:
    """Return learner and stream of a run with resolved settings."""
    source = getattr(config.recipe, "teacher", None)
    teacher = load_model(source) if source is not None else None
    learner, stream = _begin(config, data, device, precision, teacher)
    return Parts(data, learner, stream, device, precision, data.fingerprint(), teacher)


def begin_again(config: RunConfig, parts: Parts) -> None:
    """Put learner and stream in place as `assemble` makes them, for settings that have changed since."""
    parts.stream.close()
    parts.learner, parts.stream = _begin(config, parts.data, parts.device, parts.precision, parts.teacher)


def _begin(
    config: RunConfig, data: Splits, device: torch.device, precision: Precision, teacher: ImageModel | None
) -> tuple[Learner, Stream]:
    learner = _learner(config, _initial(config, data), data, device, precision, teacher)
    # Ranks share the initial weights but draw dropout apart.
    torch.manual_seed(config.seed + rank())
    return learner, open_stream(config, data, learner)


def _learner(
    config: RunConfig,
    model: ImageModel,
    data: Splits,
    device: torch.device,
    precision: Precision,
    teacher: ImageModel | None,
) -> Learner:
    """Return a learner whose models compute as the settings of the loop say."""
    return build_learner(
        config,
        model,
        class_counts=data.train.class_counts(),
        device=device,
        precision=precision,
        teacher=teacher,
        place=partial(place, config, precision),
    )


def _initial(config: RunConfig, data: Splits) -> ImageModel:
    """Return the model before its first update. Where weights are to be spread, the first process has them at first."""
    torch.manual_seed(config.seed)
    if spreads(config):
        return of_first_process(lambda: build_model(config, data))
    return build_model(config, data)


def models_of(learner: Learner) -> list[ImageModel]:
    """Return all models that learn: the one that is shipped, and a teacher that learns beside it."""
    return [model for model in learner.models.values() if isinstance(model, ImageModel)]


@contextmanager
def trial(config: RunConfig, parts: Parts) -> Iterator[tuple[Learner, Stream]]:
    """Lend a learner of copies, and a stream of its own from the start, to be measured and thrown away.

    The run itself is not touched: its weights, data position and random generators stay as they were.
    """
    generators = random_state()
    # A model that is spread cannot be copied; how long an update takes does not depend on the weights.
    model = _initial(config, parts.data) if spreads(config) else copy.deepcopy(parts.learner.model)
    learner = _learner(config, model, parts.data, parts.device, parts.precision, parts.teacher)
    stream = open_stream(config, parts.data, learner)
    try:
        yield learner, stream
    finally:
        stream.close()
        restore_random_state(generators)


def open_stream(config: RunConfig, data: Splits, learner: Learner) -> Stream:
    """Return the training stream of this process, at its start."""
    settings: dict[str, Any] = {
        "preprocessing": learner.model.preprocessing,
        "augment": config.augment,
        "batch_size": config.loop.batch_size,
        "seed": config.seed,
        "accumulation": config.loop.accumulation,
        "workers": config.input.workers,
        "balanced": config.input.balanced,
        "max_broken": config.input.max_broken,
        "rank": rank(),
        "world": world_size(),
        "pinned": next(learner.model.parameters()).is_cuda,
    }
    if isinstance(config.recipe, MetaPseudoLabelsConfig) and data.unlabelled is not None:
        return PairedStream(data.train, data.unlabelled, ratio=config.recipe.unlabelled_ratio, **settings)
    return Stream(data.train, **settings)


def resolve_length(config: RunConfig, parts: Parts) -> RunConfig:
    """Return the settings with the number of updates, and the intervals that follow from it, written in."""
    loop = config.loop
    if loop.batch_size > len(parts.data.train):
        raise UserError(
            f"--loop.batch-size {loop.batch_size} is larger than the {len(parts.data.train)} training pictures."
        )
    if config.minutes is not None:
        steps = max(1, round(60 * config.minutes / seconds_per_step(config, parts)))
    else:
        steps = updates(loop, len(parts.data.train))
    loop = replace(
        loop,
        steps=steps,
        eval_every=loop.eval_every or max(1, math.ceil(steps / 10)),
        save_every=loop.save_every or max(1, min(200, math.ceil(steps / 20))),
        log_every=loop.log_every or max(1, min(20, steps // 50)),
    )
    return replace(config, loop=loop)


def updates(loop: LoopConfig, pictures: int) -> int:
    """Return the number of updates of a run that is not measured in minutes."""
    if loop.steps is not None:
        return loop.steps
    assert loop.epochs is not None  # LoopConfig refuses to lack both
    return max(1, math.floor(loop.epochs * pictures / loop.batch_size))


def seconds_per_step(config: RunConfig, parts: Parts, trial_seconds: float = 5.0) -> float:
    """Measure one update in a trial; the slowest process counts.

    In a run of so many minutes it is given its share of the run's ten evaluations.

    Where the head learns alone at first, that is measured for itself: it is cheaper than the rest.
    """
    alone = head_steps(config.optim, TRIAL_RUN)
    with trial(config, parts) as (learner, stream):
        learner.schedule(alone, TRIAL_RUN)
        step_seconds = _measured(learner, stream, parts.device, trial_seconds)
        if alone:
            learner.schedule(0, TRIAL_RUN)
            head_seconds = _measured(learner, stream, parts.device, trial_seconds)
            step_seconds += (head_seconds - step_seconds) * alone / TRIAL_RUN
    if config.minutes is not None:
        # An evaluation costs about a third of training per picture: forward without backward.
        val = len(parts.data.val) if parts.data.val is not None else 0
        evaluation_seconds = 11 * val / config.loop.batch_size * step_seconds / 3
        step_seconds /= max(0.1, 1 - evaluation_seconds / (60 * config.minutes))
    return max(float(s) for s in gather_objects(step_seconds))  # pyright: ignore[reportArgumentType]


def _measured(learner: Learner, stream: Stream, device: torch.device, trial_seconds: float) -> float:
    """Return the seconds of an update as the schedule has set it."""
    for _ in range(3):
        learner.step(next(stream))["loss"].item()
    began, steps = time.perf_counter(), 0
    # Asked of all: a process that left the loop a step early would leave the others waiting for its gradients.
    while steps < 50 and any_process(time.perf_counter() - began < trial_seconds, device):
        learner.step(next(stream))["loss"].item()
        steps += 1
    return (time.perf_counter() - began) / steps


def random_state() -> dict[str, torch.Tensor]:
    """Return the state of every random generator that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Put the random generators back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
