"""Every preset, made small by `tiny`, runs end to end through the real loop; and `tiny` makes every model small."""

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.checkpoints import load_model, save_model
from vitrail.config.codec import from_json, to_json
from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import FAMILIES, MODELS, ModelConfig
from vitrail.config.recipes import LossConfig
from vitrail.config.run import RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.config.wide_resnet import WideResNetConfig
from vitrail.models import build
from vitrail.presets import PRESETS, tiny
from vitrail.presets.papers import papers
from vitrail.presets.tiny import STEPS, tiny_model
from vitrail.training import run_training

# Of CIFAR-100, in two of its superclasses: what semantic softmax needs.
CLASSES = ("orchid", "poppy", "ray", "shark")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4 classes x 16 PNG pictures of 32 pixels."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for i in range(16):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ModelConfig], str]:
    """Saves fresh weights of a model that knows the classes, once; returns their folder."""
    root = tmp_path_factory.mktemp("weights")
    found: dict[ModelConfig, str] = {}

    def save(config: ModelConfig) -> str:
        config = replace(config, num_classes=len(CLASSES))
        if config not in found:
            model = build(config)
            model.labels = CLASSES
            save_model(model, root / str(len(found)))
            found[config] = str(root / str(len(found)))
        return found[config]

    return save


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug: what a run writes need not have reached the disk."""
    monkeypatch.setattr("os.fsync", lambda _: None)


def placed(config: RunConfig, pictures: Path, out: Path, saved: Callable[[ModelConfig], str]) -> RunConfig:
    """A run with what it names put in its place: pictures, with labels and without, weights, teacher, class tree."""
    config = replace(config, data=str(pictures), out=str(out))
    recipe = config.recipe
    if isinstance(recipe, MetaPseudoLabelsConfig) and config.input.labelled is None:
        config = replace(config, input=replace(config.input, unlabelled=str(pictures)))
    if config.input.val is not None:
        config = replace(config, input=replace(config.input, val=str(pictures)))
    names = {field.name for field in fields(recipe)}
    if "teacher" in names:
        recipe = replace(recipe, teacher=saved(tiny_model(ViTConfig(channels=config.model.channels))))
    if "tree" in names:
        recipe = replace(recipe, tree="cifar100")
    return replace(config, recipe=recipe)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_end_to_end(name: str, pictures: Path, saved, tmp_path: Path) -> None:
    chosen = PRESETS[name]
    config = placed(tiny(chosen.config), pictures, tmp_path / "run", saved)
    if chosen.needs_init or config.init is not None:
        config = replace(config, init=saved(config.model))
    result = run_training(config)

    assert result.step == STEPS
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))
    assert result.val is not None and all(math.isfinite(value) for value in result.val.values() if value is not None)
    assert any((tmp_path / "run" / "checkpoints").iterdir())
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())["resolved"]
    assert to_json(from_json(RunConfig, resolved)) == resolved
    model = load_model(tmp_path / "run" / "best")
    assert type(model.config) is type(config.model)
    outputs = 0 if isinstance(config.recipe, MaskedConfig) else len(CLASSES)
    assert model.config.num_classes == outputs
    answer = model.features(torch.zeros(2, model.config.channels, *model.config.image_size))
    assert answer.isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_the_way_to_json_and_back(name: str) -> None:
    config = PRESETS[name].config
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config


def test_presets_and_their_aliases_are_told_apart() -> None:
    aliases = [each.alias for each in PRESETS.values() if each.alias]
    assert len({*aliases, *PRESETS}) == len(aliases) + len(PRESETS)


def test_every_preset_is_of_one_paper() -> None:
    assert sorted(name for paper in papers() for name in paper.presets) == sorted(PRESETS)
    assert all(paper.title for paper in papers())


# What tiny keeps, and what it does not

SWITCHES = {
    "channels", "num_classes", "dropout", "drop_path", "head_bias", "gelu", "norm_eps", "pool", "positions",
    "qkv_bias", "downsample", "stride_in", "batch_norm_eps", "lite", "frozen_norm", "slope", "norm_momentum",
    "capacity_factor", "train_capacity_factor", "batch_priority", "noise_std", "importance_loss", "load_loss",
    "expert_dropout", "experts_per_token", "merge_tokens",
}  # fmt: skip
SIZES = {
    "image_size", "patch_size", "stem", "width", "depth", "mlp_dim", "heads", "pre_logits", "widths", "depths",
    "mlp_dims", "stem_width", "head_width", "head_dim", "mbconv_before_s3", "moe_layers", "experts", "group_size",
}  # fmt: skip


def test_every_setting_of_a_model_is_a_size_or_a_switch() -> None:
    settings = {field.name for family in FAMILIES for field in fields(family)}
    assert settings == SWITCHES | SIZES and not SWITCHES & SIZES


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_tiny_one_with_its_switches(name: str) -> None:
    config = replace(MODELS[name], num_classes=7, dropout=0.25, head_bias=-1.0)
    small = tiny_model(config)
    assert type(small) is type(config)
    for field in fields(config):
        if field.name in SWITCHES:
            assert getattr(small, field.name) == getattr(config, field.name), field.name
    with torch.device("meta"):
        assert sum(p.numel() for p in build(small).parameters()) < 200_000


def test_every_family_has_a_tiny_model() -> None:
    assert {type(tiny_model(config)) for config in [*MODELS.values(), WideResNetConfig()]} == set(FAMILIES)


@pytest.mark.parametrize("kind", [ViTConfig, ViTMoEConfig])
def test_tiny_keeps_what_is_on_and_adds_nothing(kind: type[ViTConfig]) -> None:
    assert tiny_model(kind(pre_logits=768)).pre_logits > 0
    assert tiny_model(kind()).pre_logits == 0
    assert tiny_model(kind()).stem is None


def test_every_phase_of_a_schedule_is_there_and_none_is_added() -> None:
    config = PRESETS["photos"].config
    optim = replace(config.optim, warmup_steps=10_000, cooldown_steps=50_000, schedule="rsqrt")
    recipe = MetaPseudoLabelsConfig()
    loop = replace(config.loop, batch_size=4096, accumulation=16, steps=10**6)
    small = tiny(replace(config, optim=optim, recipe=recipe, loop=loop, minutes=10.0))
    assert (small.optim.warmup_steps, small.optim.cooldown_steps) == (1, 1)
    assert min(small.recipe.uda_steps, small.recipe.student_wait, small.recipe.finetune_steps) == 1
    assert small.loop.accumulation > 1 and small.loop.batch_size % small.loop.accumulation == 0
    assert small.minutes is None
    plain = tiny(replace(config, optim=replace(optim, warmup_steps=0, cooldown_steps=0)))
    assert (plain.optim.warmup_steps, plain.optim.cooldown_steps, plain.loop.accumulation) == (0, 0, 1)
    assert plain.recipe == config.recipe and isinstance(plain.recipe, LossConfig)
