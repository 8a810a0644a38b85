"""What holds for a model of any family: it trains, resumes, is saved, adapted, and shows what it looks at."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import TINY
from torch import nn

from vitrail.checkpoints import adapt, load_model, save_model
from vitrail.config.codec import from_json, to_json
from vitrail.config.model import FAMILIES, ModelConfig
from vitrail.config.run import OptimConfig, RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.errors import Interrupted, UserError
from vitrail.explaining import patch_filters, patch_rollout
from vitrail.models import ImageModel, build
from vitrail.optim import parameter_groups
from vitrail.prediction import predict
from vitrail.training import Callback, run_training

FAMILY = pytest.mark.parametrize("family", TINY)


class StopAt(Callback):
    """Stop the run after an update, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def randomised(family: str) -> ImageModel:
    model = build(TINY[family])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    return model.eval()


def pictures(config: ModelConfig, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, config.channels, *config.image_size, generator=generator)


def test_every_family_is_here() -> None:
    assert {type(config) for config in TINY.values()} == set(FAMILIES)


@FAMILY
def test_a_stopped_run_of_any_family_goes_on_bit_for_bit(family: str, tiny_run: Callable[..., RunConfig]) -> None:
    settings = {"model": replace(TINY[family], drop_path=0.1), "loop__steps": 6, "optim__ema": 0.9}
    straight, stopped = tiny_run("straight", **settings), tiny_run("stopped", **settings)
    run_training(straight)
    with pytest.raises(Interrupted):
        run_training(stopped, [StopAt(3)])
    run_training(replace(stopped, resume=True))
    for name in ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors"):
        assert (Path(str(stopped.out)) / name).read_bytes() == (Path(str(straight.out)) / name).read_bytes(), name
    model = load_model(Path(str(straight.out)) / "best")
    assert type(model.config) is type(TINY[family])
    assert model.labels == ("apple", "leaf", "sky")


@FAMILY
def test_a_model_folder_keeps_every_bit(family: str, tmp_path: Path) -> None:
    model = randomised(family)
    save_model(model, tmp_path / "model")
    back = load_model(tmp_path / "model")
    assert back.config == model.config == from_json(type(model.config), to_json(model.config))
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@FAMILY
def test_kernels_decay_and_nothing_else_does(family: str) -> None:
    model = build(TINY[family])
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kernel = name == "weight" and not isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.GroupNorm)
            assert (id(parameter) in decayed) == kernel, (module, name)


@torch.no_grad()
@FAMILY
def test_the_answer_to_a_picture_does_not_depend_on_its_neighbours(family: str) -> None:
    model = randomised(family)
    images = pictures(model.config, 5)
    together = model(images)
    assert together.shape == (5, 5)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@FAMILY
def test_features_are_what_the_head_classifies_and_the_map_is_in_its_place(family: str) -> None:
    model = randomised(family)
    images = pictures(model.config)
    features = model.features(images)
    torch.testing.assert_close(model.head(features), model(images))  # pyright: ignore[reportCallIssue]
    grid = model.feature_map(images)
    assert grid.shape[0] == 2 and grid.ndim == 4 and grid.shape[2] == grid.shape[3]
    wide = torch.cat([images, images], dim=3)
    # Filters without padding take a pixel off a picture, not off each of its halves.
    assert model.feature_map(wide).shape[3] in (2 * grid.shape[3], 2 * grid.shape[3] + 1)


@torch.no_grad()
@FAMILY
def test_attention_is_shown_or_refused_by_name(family: str) -> None:
    model = randomised(family)
    if family in ("efficientnet", "wide-resnet"):
        with pytest.raises(UserError, match=f"{type(model).__name__} has no attention"):
            model.attention(pictures(model.config))
        return
    maps = list(model.attention(pictures(model.config)))
    assert maps
    for weights in maps:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]), rtol=0, atol=1e-5)


@FAMILY
def test_depth_grows_from_the_input_to_the_head(family: str) -> None:
    model = build(TINY[family])
    depths = [model.depth_of(name) for name, _ in model.named_parameters()]
    top = len(model.blocks()) + 1
    assert set(depths) == set(range(top + 1))
    assert model.depth_of(model.input_kernel) == 0
    assert model.depth_of("head.weight") == top
    assert model.input_kernel in model.state_dict()


@torch.no_grad()
@FAMILY
def test_a_model_is_adapted_to_another_task(family: str) -> None:
    images = pictures(TINY[family])
    fresh = adapt(randomised(family), num_classes=3)
    assert fresh.config == replace(TINY[family], num_classes=3)
    assert not fresh(images).any()  # a head of zeros
    larger = adapt(randomised(family), image_size=(96, 64))
    assert larger.config.image_size == larger.preprocessing.image_size == (96, 64)
    assert torch.isfinite(larger(torch.randn(1, 3, 96, 64))).all()


@torch.no_grad()
@FAMILY
def test_grey_pictures_get_the_same_answer_in_one_channel(family: str) -> None:
    coloured = randomised(family)
    grey_images = pictures(TINY[family]).mean(dim=1, keepdim=True)
    expected = coloured(grey_images.expand(-1, 3, -1, -1))
    if not coloured.input_kernel_sums:
        with pytest.raises(UserError, match="standardises its first filters"):
            adapt(coloured, channels=1)
        return
    grey = adapt(coloured, channels=1)
    assert grey.config == replace(TINY[family], channels=1)
    torch.testing.assert_close(grey(grey_images), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "hybrid", "vit-moe"])
def test_what_a_transformer_looks_at_lies_on_its_grid(family: str) -> None:
    model = randomised(family)
    relevance = patch_rollout(model, pictures(model.config))
    assert relevance.shape[1:] == model.feature_map(pictures(model.config)).shape[2:]
    torch.testing.assert_close(relevance.sum(dim=(1, 2)), torch.ones(2))
    assert patch_filters(model, 4).shape[1] == 3


@FAMILY
def test_weights_made_for_other_settings_are_refused_unless_no_tensor_changes(family: str, tmp_path: Path) -> None:
    save_model(randomised(family), tmp_path / "model")
    assert load_model(tmp_path / "model", drop_path=0.2).config.drop_path == 0.2
    with pytest.raises(UserError, match="cannot be given"):
        load_model(tmp_path / "model", depht=3)
    longer = "depth" if isinstance(TINY[family], ViTConfig) else "depths"
    value = getattr(TINY[family], longer)
    changed = {longer: value + 1 if isinstance(value, int) else (*value[:-1], value[-1] + 1)}
    with pytest.raises(UserError, match="does not fit the weights"):
        load_model(tmp_path / "model", **changed)


@FAMILY
def test_predictions_name_the_classes(family: str, photos: Path) -> None:
    model = randomised(family)
    model.labels = ("a", "b", "c", "d", "e")
    (prediction,) = predict(model, [photos / "apple" / "00.png"], top=5)
    assert sum(share for _, share in prediction.labels) == pytest.approx(1, abs=1e-5)
