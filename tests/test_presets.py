"""Every preset builds, learns for two steps on pictures of its own kind, and leaves a usable model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.checkpoints import load_model, save_model
from vitrail.config.run import RunConfig
from vitrail.models import build
from vitrail.presets import PRESETS, preset
from vitrail.training import run_training


def shrunk(config: RunConfig, data: Path, out: Path) -> RunConfig:
    """A preset at two steps of two pictures; sizes of its model stay."""
    return replace(
        config,
        data=str(data),
        out=str(out),
        loop=replace(config.loop, batch_size=2, steps=2),
        model=replace(config.model, depth=1),
        input=replace(config.input, val_fraction=0.3),
    )


@pytest.fixture
def pictures(tmp_path: Path):
    def write(channels: int, size: tuple[int, int]) -> Path:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, size=(12, *size, channels), dtype=np.uint8)
        labels = np.arange(12) % 3
        np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3])
        return tmp_path / "data.npz"

    return write


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run(name: str, pictures, tmp_path: Path) -> None:
    chosen = preset(name)
    config = shrunk(
        chosen.config, pictures(chosen.config.model.channels, chosen.config.model.image_size), tmp_path / "run"
    )
    if chosen.needs_init:
        save_model(build(config.model), tmp_path / "weights")
        config = replace(config, init=str(tmp_path / "weights"))
    run_training(config)
    model = load_model(tmp_path / "run" / "best")
    size = chosen.config.model.image_size
    assert torch.isfinite(model(torch.zeros(1, config.model.channels, *size))).all()
