"""Weights inside the package: half as large, found by name, whole when they are loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitrail import weights, zoo
from vitrail.checkpoints import load_model, save_model
from vitrail.checkpoints.tensors import read_header, read_tensors
from vitrail.cli import main
from vitrail.config.efficientnet import EFFICIENTNETS
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel, build
from vitrail.presets import preset

CONFIG = ViTConfig(image_size=(16, 16), patch_size=(8, 8), num_classes=3, width=16, depth=1, mlp_dim=32, heads=2)


@pytest.fixture
def model() -> ImageModel:
    torch.manual_seed(0)
    model = build(CONFIG).eval()
    for tensor in model.parameters():
        torch.nn.init.normal_(tensor)
    model.labels = ("ant", "bee", "cat")
    return model


@pytest.fixture
def folder(model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model `own` as one that comes with Vitrail."""
    save_model(model, tmp_path / "own", half=True)
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    return tmp_path / "own"


def test_half_precision_is_half_as_large_and_loads_as_single(model: ImageModel, folder: Path) -> None:
    assert {entry.dtype for entry in read_header(folder / "model.safetensors").values()} == {torch.float16}
    loaded = load_model(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
        assert loaded.state_dict()[name].dtype == torch.float32


def test_counters_of_batch_norm_stay_whole(tmp_path: Path) -> None:
    config = replace(
        EFFICIENTNETS["efficientnet-b0"], image_size=(32, 32), stem_width=8, widths=(8,) * 7, depths=(1,) * 7
    )
    model = build(config)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(70_001)
    save_model(model, tmp_path / "model", half=True)
    stored = read_tensors(tmp_path / "model" / "model.safetensors")
    counters = [tensor for name, tensor in stored.items() if name.endswith("num_batches_tracked")]
    assert counters and all(tensor == 70_001 for tensor in counters)
    assert load_model(tmp_path / "model").last.norm.num_batches_tracked == 70_001


def test_numbers_that_16_bits_cannot_hold_are_refused(model: ImageModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.head.weight[1, 2] = 70_000.0
    with pytest.raises(UserError, match=r"head\.weight holds numbers beyond 65,504"):
        save_model(model, tmp_path / "model", half=True)
    assert not (tmp_path / "model").exists()


def test_a_name_finds_the_weights_and_keywords_change_them(model: ImageModel, folder: Path) -> None:
    loaded = load_model("own")
    assert loaded.labels == ("ant", "bee", "cat") and not loaded.training
    assert torch.equal(loaded.head.weight, model.head.weight.half().float())
    assert load_model("own", image_size=32, num_classes=5).head.weight.shape == (5, 16)
    assert weights.config_at_hand("own") == loaded.config


def test_a_folder_of_that_name_comes_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    other = build(replace(CONFIG, num_classes=7))
    save_model(other, "own")
    assert load_model("own").config.num_classes == 7


def test_errors_name_the_weights_at_hand(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no file or folder owm; .*the models own, efficientnet-lite0"):
        load_model("owm")
    with pytest.raises(UserError, match="the weights of other are missing; install vitrail again"):
        weights.config_at_hand("other")
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"own is damaged .*install vitrail again"):
        weights.config_at_hand("own")


def test_damaged_weights_are_refused(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model("own")


def test_models_lists_them_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)[0]
    assert (first["model"], first["classes"], first["source"]) == ("own", 3, "comes with its weights")
    assert first["parameters"] == sum(p.numel() for p in load_model("own").parameters())
    shutil.rmtree(folder)
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["model"] != "own"


@pytest.mark.parametrize("name", weights.weights_at_hand())
def test_weights_that_come_with_vitrail_are_whole(name: str) -> None:
    folder, model = weights.weights_at_hand()[name], load_model(name)
    assert (folder / "model.safetensors").stat().st_size <= 4_000_000
    assert len(model.labels) == model.config.num_classes
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    counted, told = zoo.count(name), zoo.describe(name)
    assert {key: told[key] for key in counted} == counted, "python -m vitrail.zoo counts them again"
    text = (folder / "config.json").read_text(encoding="utf-8")
    recipe = json.loads(text)["recipe"] or {}
    assert recipe.get("data") is recipe.get("out") is None, "paths of the machine that made them mean nothing here"


def test_the_preset_that_made_the_weights_still_makes_such_a_model() -> None:
    assert preset(weights.MINI).config.model == weights.config_at_hand(weights.MINI)
