"""From settings to the parts of a run: data, model, length."""

import copy
import logging
import math
import time
from dataclasses import dataclass, replace

import torch

from vitrail.checkpoints import adapt, load_model
from vitrail.checkpoints.adapt import with_overrides
from vitrail.config.masked import MaskedConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import RunConfig
from vitrail.data import open_data
from vitrail.data.base import Splits
from vitrail.data.stream import Stream
from vitrail.errors import UserError
from vitrail.models import ImageModel, build
from vitrail.parallel import Precision, any_process, gather_objects, rank, world_size
from vitrail.recipes import Learner, build_learner

log = logging.getLogger("vitrail")

# Fewer pictures than this do not teach a large plain ViT from scratch what pretraining does (ViT paper, figure 4).
FROM_SCRATCH_PICTURES = 100_000
LARGE_MODEL_PARAMETERS = 5_000_000
# What a run says of a model whose weights it starts from: no tensor depends on it.
OF_THE_RUN = ("dropout", "drop_path", "frozen_norm")


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


def open_run_data(config: RunConfig) -> Splits:
    """Return the run's data, with a validation part set aside where it has none.

    Raises:
        UserError: When no data is named or it cannot be read.
    """
    if config.data is None:
        raise UserError("no data: name a folder of pictures, a CSV manifest or a CIFAR or IDX folder with --data.")
    return open_data(
        config.data,
        channels=config.model.channels,
        val=config.input.val,
        val_fraction=config.input.val_fraction,
        seed=config.seed,
        labelled=not isinstance(config.recipe, MaskedConfig),
    )


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
        warn_from_scratch(model, len(data.train))
    settings, pretrained = config.input, model.preprocessing
    model.preprocessing = Preprocessing(
        image_size=size,
        channels=config.model.channels,
        fit=settings.fit,
        crop_fraction=settings.crop_fraction,
        interpolation=settings.interpolation,
        # What the weights were trained with beats what the preset would have chosen.
        mean=pretrained.mean if config.init else settings.mean,
        std=pretrained.std if config.init else settings.std,
    )
    model.labels = classes
    model.multi_label = data.train.multi_label
    return model


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
    torch.manual_seed(config.seed)
    model = build_model(config, data)
    learner = _learner(config, model, data, device, precision)
    # Ranks share the initial weights but draw dropout apart.
    torch.manual_seed(config.seed + rank())
    return Parts(data, learner, open_stream(config, data, learner), device, precision, data.train.fingerprint())


def _learner(config: RunConfig, model: ImageModel, data: Splits, device: torch.device, precision: Precision) -> Learner:
    source = getattr(config.recipe, "teacher", None)
    teacher = load_model(source) if source is not None else None
    counts = data.train.class_counts()
    return build_learner(config, model, class_counts=counts, device=device, precision=precision, teacher=teacher)


def open_stream(config: RunConfig, data: Splits, learner: Learner) -> Stream:
    """Return the training stream of this process, at its start."""
    return Stream(
        data.train,
        preprocessing=learner.model.preprocessing,
        augment=config.augment,
        batch_size=config.loop.batch_size,
        seed=config.seed,
        accumulation=config.loop.accumulation,
        workers=config.input.workers,
        balanced=config.input.balanced,
        max_broken=config.input.max_broken,
        rank=rank(),
        world=world_size(),
    )


def resolve_length(config: RunConfig, parts: Parts) -> RunConfig:
    """Return the settings with the number of updates, and the intervals that follow from it, written in."""
    loop = config.loop
    if loop.batch_size > len(parts.data.train):
        raise UserError(
            f"--loop.batch-size {loop.batch_size} is larger than the {len(parts.data.train)} training pictures."
        )
    if config.minutes is not None:
        steps = max(1, round(60 * config.minutes / seconds_per_step(config, parts)))
    elif loop.steps is not None:
        steps = loop.steps
    else:
        assert loop.epochs is not None  # LoopConfig refuses to lack both
        steps = max(1, math.floor(loop.epochs * len(parts.data.train) / loop.batch_size))
    loop = replace(
        loop,
        steps=steps,
        eval_every=loop.eval_every or max(1, math.ceil(steps / 10)),
        save_every=loop.save_every or max(1, min(200, math.ceil(steps / 20))),
        log_every=loop.log_every or max(1, min(20, steps // 50)),
    )
    return replace(config, loop=loop)


def seconds_per_step(config: RunConfig, parts: Parts, trial_seconds: float = 5.0) -> float:
    """Measure one update on throwaway copies, with its share of the run's ten evaluations; the slowest process counts.

    The run itself is not touched: its weights, data position and random generators stay as they were.
    """
    generators = random_state()
    trial = _learner(config, copy.deepcopy(parts.learner.model), parts.data, parts.device, parts.precision)
    stream = open_stream(config, parts.data, trial)
    trial.schedule(0, 1)
    for _ in range(3):
        trial.step(next(stream))["loss"].item()
    began, steps = time.perf_counter(), 0
    # Asked of all: a process that left the loop a step early would leave the others waiting for its gradients.
    while steps < 50 and any_process(time.perf_counter() - began < trial_seconds, parts.device):
        trial.step(next(stream))["loss"].item()
        steps += 1
    step_seconds = (time.perf_counter() - began) / steps
    stream.close()
    restore_random_state(generators)
    # An evaluation costs about a third of training per picture: forward without backward.
    val = len(parts.data.val) if parts.data.val is not None else 0
    evaluation_seconds = 11 * val / config.loop.batch_size * step_seconds / 3
    budget = 60 * (config.minutes or 1.0)
    share = max(0.1, 1 - evaluation_seconds / budget)
    return max(float(s) for s in gather_objects(step_seconds / share))  # pyright: ignore[reportArgumentType]


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
