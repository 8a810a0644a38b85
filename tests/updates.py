"""A tiny learner of every recipe, and updates of it that are always the same."""

import copy
import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from families import TINY

from vitrail.config.distillation import DistillationConfig
from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import ModelConfig
from vitrail.config.recipes import SamConfig, SupervisedConfig
from vitrail.config.run import AugmentConfig, LoopConfig, OptimConfig, RecipeConfig, RunConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.data.base import Batch
from vitrail.data.class_tree import cifar100_tree
from vitrail.models import ImageModel, build
from vitrail.models.blocks import recompute_blocks
from vitrail.recipes import Learner, build_learner
from vitrail.training import Callback

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-2, ema=0.9)
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
RECIPES: dict[str, RecipeConfig] = {
    "supervised": SupervisedConfig(label_smoothing=0.1),
    "sam": SamConfig(),
    "asam, all at once": SamConfig(variant="asam", rho=1.0, accumulation="full"),
    "gsam": SamConfig(variant="gsam", rho_min=0.01),
    "semantic": SemanticConfig(),
    "distillation": DistillationConfig(teacher="beside it"),
    "hard distillation": DistillationConfig(teacher="beside it", kind="hard"),
    "masked pixels": MaskedConfig(**DECODER),
    "masked colours": MaskedConfig(objective="colour"),
    "meta pseudo labels": MetaPseudoLabelsConfig(uda_steps=0, student_wait=0, finetune_steps=0),
    "released meta pseudo labels": MetaPseudoLabelsConfig(feedback="released", uda_steps=0, student_wait=0),
}


def learner_of(recipe: RecipeConfig, config: ModelConfig = TINY["vit"], optim: OptimConfig = OPTIM) -> Learner:
    torch.manual_seed(0)
    model = build(config)
    if isinstance(recipe, SemanticConfig):
        model.labels = cifar100_tree().names[: config.num_classes]
    run = RunConfig(
        model=config,
        recipe=recipe,
        augment=AugmentConfig(crop="none", flip=0.5),
        optim=optim,
        loop=LoopConfig(batch_size=8),
    )
    teacher = copy.deepcopy(model) if isinstance(recipe, DistillationConfig) else None
    counts = np.ones(config.num_classes, np.int64)
    learner = build_learner(run, model, class_counts=counts, device=CPU, precision="fp32", teacher=teacher)
    learner.schedule(0, 100)
    return learner


def micro_batches(config: ModelConfig = TINY["vit"], count: int = 2, size: int = 4, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Batch:
        shape = (size, config.channels, *config.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        keys = torch.randint(0, 2**62, (size,), generator=generator)
        return Batch(images, torch.arange(size) % config.num_classes, keys, cropped=True)

    return [replace(draw(), unlabelled=draw()) for _ in range(count)]


def after_updates(learner: Learner, config: ModelConfig, updates: int = 2, batches: int = 2) -> dict[str, Any]:
    torch.manual_seed(5)
    rows = [learner.step(micro_batches(config, batches)) for _ in range(updates)]
    return {"rows": rows, "state": learner.state_dict(), "random": torch.get_rng_state()}


def recomputed(learner: Learner, share: float = 1.0) -> Learner:
    for model in learner.models.values():
        if isinstance(model, ImageModel):
            recompute_blocks(model, share)
    return learner


class StopAt(Callback):
    """Stop the run after an update, as a signal would."""

    def metrics(self, row: dict) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
