"""Configurations: names, checks, and their way through JSON."""

import json

import pytest

from vitrail.config.codec import from_json, to_json
from vitrail.config.model import ALIASES, list_models, model_config
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.presets import PRESETS, preset


def test_every_listed_name_and_alias_has_a_configuration() -> None:
    for name in (*list_models(), *ALIASES):
        assert model_config(name).num_classes in (10, 1000, 11221)


def test_aliases_keep_small_g_and_large_g_apart() -> None:
    assert model_config("ViT-g/14").depth == 40
    assert model_config("ViT-G/14").depth == 48


def test_any_patch_size_has_a_name() -> None:
    assert model_config("vit-s7").patch_size == (7, 7)


def test_overrides_take_one_number_for_both_sides() -> None:
    config = model_config("vit-b16", image_size=384, num_classes=100, channels=1)
    assert (config.image_size, config.num_classes, config.channels) == ((384, 384), 100, 1)


@pytest.mark.parametrize("name", ["vit-x16", "ViT-b/16", "vit-b", "resnet50"])
def test_unknown_models_are_refused_with_the_way_to_the_list(name: str) -> None:
    with pytest.raises(UserError, match="vitrail models"):
        model_config(name)


def test_unknown_settings_are_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="num_classes"):
        model_config("vit-b16", num_clases=10)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ViTConfig(width=100, heads=3),
        lambda: ViTConfig(image_size=(8, 8), patch_size=(16, 16)),
        lambda: ViTConfig(width=66, heads=3, positions="sincos"),
        lambda: ViTConfig(image_size=(0, 224)),
        lambda: ViTConfig(dropout=1.0),
        lambda: ViTConfig(depth=0),
        lambda: ViTConfig(num_classes=-1),
        lambda: InputConfig(val_fraction=1.5),
        lambda: InputConfig(crop_fraction=0.0),
        lambda: InputConfig(max_broken=2.0),
        lambda: InputConfig(workers=-1),
        lambda: InputConfig(std=(0.0,)),
        lambda: AugmentConfig(crop_area=(0.9, 0.1)),
        lambda: AugmentConfig(crop_ratio=(0.0, 1.0)),
        lambda: AugmentConfig(flip=1.5),
        lambda: AugmentConfig(mixup=-0.1),
        lambda: SupervisedConfig(label_smoothing=1.0),
        lambda: OptimConfig(lr=0.0),
        lambda: OptimConfig(ema=1.0),
        lambda: OptimConfig(layer_decay=0.0),
        lambda: OptimConfig(weight_decay=-1.0),
        lambda: LoopConfig(batch_size=0),
        lambda: LoopConfig(batch_size=10, accumulation=3),
        lambda: LoopConfig(epochs=None),
        lambda: LoopConfig(epochs=-1.0),
        lambda: RunConfig(minutes=0.0),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(wrong) -> None:
    with pytest.raises(UserError):
        wrong()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name).config
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_missing_settings_take_their_default() -> None:
    document = to_json(RunConfig())
    del document["optim"]["ema"]
    assert from_json(RunConfig, document) == RunConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeed": 1}, "seeed"),
        ({"seed": "one"}, "seed must be of type int"),
        ({"seed": True}, "seed must be of type int"),
        ({"optim": {"type": "OptimConfig", "name": "lion"}}, "optim.name must be one of"),
        ({"optim": {"type": "LoopConfig"}}, "is a LoopConfig"),
        ({"optim": 3}, "optim must be an object"),
        ({"augment": {"crop_area": [0.1]}}, "must hold 2 values"),
        ({"augment": {"crop_area": 0.1}}, "must be a list"),
    ],
)
def test_damaged_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_json(RunConfig, to_json(RunConfig()) | change)


def test_unknown_presets_are_refused_with_a_hint() -> None:
    with pytest.raises(UserError, match="cifar100-vit"):
        preset("cifar-100-vit")


def test_whole_numbers_stand_for_floats() -> None:
    minutes = from_json(RunConfig, to_json(RunConfig()) | {"minutes": 2}).minutes
    assert isinstance(minutes, float)
    assert minutes == 2.0
