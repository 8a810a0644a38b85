"""What is timed: an update in training, answers, loading pictures; and the same of timm, where it is installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.benchmark.limits import photo
from vitrail.benchmark.timing import Work
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.recipes import SupervisedConfig
from vitrail.config.run import AugmentConfig, OptimConfig, RunConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.data.folders import FileSource
from vitrail.data.stream import Stream
from vitrail.models import ImageModel, build
from vitrail.models.blocks import compile_blocks
from vitrail.parallel import Precision, autocast
from vitrail.recipes import build_learner

TIMM: dict[str, str] = {
    "vit-ti16": "vit_tiny_patch16_224",
    "vit-s16": "vit_small_patch16_224",
    "vit-b16": "vit_base_patch16_224",
    "vit-l16": "vit_large_patch16_224",
    **{f"efficientnet-b{size}": f"tf_efficientnet_b{size}" for size in range(9)},
    **{f"coatnet-{size}": f"coatnet_{size}_224" for size in range(6)},
}
"""Our names, and timm's for the same network."""
OPTIM = OptimConfig(name="adamw", lr=1e-5)


def training(
    config: ModelConfig, batch_size: int, device: torch.device, precision: Precision, *, compiled: bool = False
) -> Work:
    """Return an update of a fresh model by our learner: forward, backward, clipping, AdamW. Pictures lie in memory."""
    augment = AugmentConfig(crop="none", flip=0.0)
    run = RunConfig(model=config, recipe=SupervisedConfig(), optim=OPTIM, augment=augment)
    counts = np.ones(config.num_classes, np.int64)
    learner = build_learner(run, build(config), class_counts=counts, device=device, precision=precision)
    learner.schedule(0, 1)
    if compiled:
        compile_blocks(learner.model)
    batch = _batch(config, batch_size).to(device)

    def work() -> int:
        learner.step([batch])
        return batch_size

    return work


def training_of(model: nn.Module, batch_size: int, device: torch.device, precision: Precision) -> Work:
    """Return the same update of a peer's model, by a loop as people write it."""
    model = model.train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, fused=True)
    images, targets = _pictures(model, batch_size, device), torch.zeros(batch_size, dtype=torch.int64, device=device)

    def work() -> int:
        optimizer.zero_grad(set_to_none=True)
        with autocast(precision, device):
            loss = F.cross_entropy(model(images).float(), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        optimizer.step()
        return batch_size

    return work


def answering(
    model: nn.Module, batch_size: int, device: torch.device, precision: Precision, *, compiled: bool = False
) -> Work:
    """Return the answers of a model, ours or a peer's, to pictures that lie in memory. Ours can be compiled."""
    model = model.eval().to(device)
    if compiled and isinstance(model, ImageModel):
        compile_blocks(model)
    images = _pictures(model, batch_size, device)

    @torch.inference_mode()
    def work() -> int:
        with autocast(precision, device):
            model(images)
        return batch_size

    return work


def timm_maker(name: str) -> Callable[[], nn.Module] | None:
    """Return what makes timm's model of the same network; None where timm is missing, broken, or has no such model."""
    if name not in TIMM or find_spec("timm") is None:
        return None
    try:
        timm = import_module("timm")
    except Exception:  # half-installed, as timm is beside another torchvision, it may raise anything
        return None
    return lambda: timm.create_model(TIMM[name])


def loading(config: ModelConfig, batch_size: int, folder: Path, workers: int) -> tuple[Work, Callable[[], None]]:
    """Return a batch from JPEG files, random crop and flip, normalised; and what ends its threads.

    Args:
        config: What size of picture the model takes.
        batch_size: Pictures at a time.
        folder: An empty folder; 64 pictures of 500 x 375 pixels are written into it.
        workers: Decoding threads.
    """
    data, paths = photo(), [folder / f"{number}.jpg" for number in range(64)]
    for path in paths:
        path.write_bytes(data)
    source = FileSource(paths, np.zeros(len(paths), np.int64), ("photo",), channels=config.channels)
    view, augment = Preprocessing(image_size=config.image_size, channels=config.channels), AugmentConfig()
    stream = Stream(source, preprocessing=view, augment=augment, batch_size=batch_size, workers=workers)
    prepare = Augment(augment, view)

    def work() -> int:
        for batch in next(stream):
            prepare(batch, classes=1)
        return batch_size

    return work, stream.close


def _batch(config: ModelConfig, batch_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.channels, *config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(images, torch.zeros(batch_size, dtype=torch.int64), torch.arange(batch_size), cropped=True)


def _pictures(model: nn.Module, batch_size: int, device: torch.device) -> Tensor:
    """Return noise of the size that a model takes."""
    if isinstance(model, ImageModel):
        channels, size = model.config.channels, model.config.image_size
    else:
        channels, *size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return torch.randn(batch_size, channels, *size, device=device)
