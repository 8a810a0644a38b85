"""Small real data on disk, and a run small enough to be done in a moment."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from scale import SCALE

from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig
from vitrail.config.vit import ViTConfig

torch.set_num_threads(1)  # tiny tensors: more threads only cost

# A failure must be there the next time, too; only a campaign draws anew.
settings.register_profile("repeatable", derandomize=SCALE == 1)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 3 classes x 20 PNG pictures of different sizes; each class has its own colour and texture."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, colour in (("apple", (200, 40, 40)), ("leaf", (40, 180, 60)), ("sky", (60, 90, 220))):
        (root / label).mkdir()
        for i in range(20):
            height, width = rng.integers(18, 30, size=2)
            noise = rng.integers(-40, 40, size=(height, width, 3))
            Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(
                root / label / f"{i:02d}.png"
            )
    return root


@pytest.fixture
def tiny_run(photos: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run on `photos` with a ViT of a few thousand parameters; keywords replace fields of its parts."""

    def make(out: str | None = "run", **changes: object) -> RunConfig:
        config = RunConfig(
            data=str(photos),
            out=out and str(tmp_path / out),
            model=ViTConfig(
                image_size=(16, 16), patch_size=(8, 8), width=16, depth=2, mlp_dim=32, heads=2, dropout=0.1
            ),
            input=InputConfig(workers=0, val_fraction=0.2),
            augment=AugmentConfig(crop_area=(0.5, 1.0), policy="trivialaugment", mixup=0.2),
            optim=OptimConfig(lr=3e-3, warmup_steps=2),
            loop=LoopConfig(batch_size=8, steps=12, eval_every=6, save_every=4, log_every=1),
        )
        for name, value in changes.items():
            part, _, field = name.partition("__")
            new = replace(getattr(config, part), **{field: value}) if field else value
            config = replace(config, **{part: new})
        return config

    return make
