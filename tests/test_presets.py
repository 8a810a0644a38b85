"""Fine-tuning starts from weights; the command line puts another model, or other weights, in as it was told to."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.checkpoints import load_model, save_model
from vitrail.checkpoints.packages import packaged_weights
from vitrail.cli import main
from vitrail.config.model import model_config
from vitrail.config.run import RunConfig
from vitrail.models import build, create_model
from vitrail.presets import PRESETS, preset, tiny
from vitrail.training import run_training


@pytest.fixture
def pictures(tmp_path: Path):
    def write(channels: int, size: tuple[int, int]) -> Path:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, size=(12, *size, channels), dtype=np.uint8)
        labels = np.arange(12) % 3
        np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3])
        return tmp_path / "data.npz"

    return write


def test_fine_tuning_takes_grey_pictures(pictures, tmp_path: Path) -> None:
    config = tiny(preset("finetune").config)
    config = replace(config, data=str(pictures(1, (32, 32))), out=str(tmp_path / "run"))
    save_model(build(config.model), tmp_path / "weights")
    grey = replace(config.model, channels=1, image_size=(32, 32))
    run_training(replace(config, init=str(tmp_path / "weights"), model=grey))
    model = load_model(tmp_path / "run" / "best")
    assert model.config.channels == model.preprocessing.channels == 1
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.skipif(packaged_weights("efficientnet-lite0") is None, reason="the weights are not installed")
@pytest.mark.parametrize("train", ["all", "head"])
def test_fine_tuning_starts_from_the_weights_of_the_package(train, pictures, tmp_path: Path) -> None:
    config = preset("finetune").config
    config = replace(
        config,
        data=str(pictures(3, (32, 32))),
        out=str(tmp_path / "run"),
        model=replace(config.model, image_size=(32, 32)),
        loop=replace(config.loop, batch_size=4, steps=1),
        optim=replace(config.optim, train=train),
    )
    run_training(config)
    model, source = load_model(tmp_path / "run" / "last"), load_model("efficientnet-lite0")
    assert model.preprocessing.mean == source.preprocessing.mean
    assert model.labels == ("0", "1", "2")
    same = torch.equal(model.last.conv.weight, source.last.conv.weight)
    assert same == (train == "head")
    torch.testing.assert_close(model.last.conv.weight, source.last.conv.weight, rtol=0.1, atol=0.01)


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> RunConfig:
    """The settings that `vitrail train` would start a run with."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("vitrail.cli.training._train", lambda config, json: configs.append(config) or 0)
    assert main(["train", *arguments, "--out", "run"]) == 0
    return configs[0]


@pytest.mark.parametrize("flag", [["--model", "cvt-13"], ["--model=cvt-13"], ["--model", "cvt-21", "--model=cvt-13"]])
def test_a_model_takes_the_place_of_the_presets_and_flags_refine_it(monkeypatch, flag: list[str]) -> None:
    config = started(monkeypatch, "photos", *flag, "--model.image-size", "32", "64")
    assert config.model == model_config("cvt-13", image_size=(32, 64))
    assert replace(config, model=preset("photos").config.model, out=None) == preset("photos").config


def test_a_model_reads_the_pictures_that_its_preset_reads(monkeypatch) -> None:
    photos = preset("photos")
    grey = replace(photos, config=replace(photos.config, model=replace(photos.config.model, channels=1)))
    monkeypatch.setitem(PRESETS, "grey", grey)
    assert started(monkeypatch, "grey", "--model", "ViT-B/16").model == model_config("vit-b16", channels=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["photos", "--model", "cvt-31"], "Did you mean"),
        (["photos", "--model"], "--model needs a value"),
        (["photos", "--model", "--data", "x"], "--model needs a value"),
        (["photos", "--model", "cvt-13", "--init", "x.npz"], "Leave --model out"),
        (["finetune", "--model", "cvt-13"], "Leave --model out"),
        (["finetune", "--init", "None"], "--init"),
        (["finetune", "--init", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_models_that_cannot_be_meant_are_refused(capsys, arguments: list[str], told: str) -> None:
    assert main(["train", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_other_weights_than_the_presets_own_come_with_their_picture_size(monkeypatch, tmp_path: Path) -> None:
    vit = create_model("vit-ti16", image_size=64, depth=1, dropout=0.3, num_classes=2)
    save_model(vit, tmp_path / "vit")
    own = preset("finetune").config
    assert started(monkeypatch, "finetune").model == own.model
    assert started(monkeypatch, "finetune", "--init", "efficientnet-lite0").model == own.model
    assert started(monkeypatch, "finetune", "--init", str(tmp_path / "vit")).model == vit.config
    given = started(monkeypatch, "finetune", f"--init={tmp_path / 'vit'}", "--model.image-size", "32", "48")
    assert given.model == replace(vit.config, image_size=(32, 48))
    larger = create_model("efficientnet-b0", image_size=64, widths=(8,) * 7, depths=(1,) * 7, num_classes=2)
    save_model(larger, tmp_path / "larger")
    given = started(monkeypatch, "finetune", "--init", str(tmp_path / "larger"))
    assert given.model == replace(larger.config, frozen_norm=own.model.frozen_norm)
    # A preset that names no weights has chosen its picture size for any.
    photos = preset("photos").config
    assert started(monkeypatch, "photos", "--init", str(tmp_path / "vit")).model == photos.model
