"""What the published runs of SAM rest on holds in their presets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.checkpoints import load_model, save_model
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vitrail.config.recipes import SamConfig
from vitrail.config.run import RunConfig
from vitrail.data import open_data
from vitrail.models import build
from vitrail.presets import preset, tiny
from vitrail.presets.sam import CIFAR100_MEAN, SAM_PRESETS
from vitrail.recipes import build_learner
from vitrail.recipes.sam import SamLearner
from vitrail.training import run_training
from vitrail.training.setup import build_model

L2 = preset("EffNet-L2 (SAM)").config


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Pictures of CIFAR's size."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, size=(40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    return tmp_path / "data.npz"


def small_l2(cifar: Path) -> RunConfig:
    """The preset with a tiny model, still for pictures larger than those that are augmented, from weights at hand."""
    config = tiny(L2)
    model = build(replace(config.model, image_size=(48, 48), frozen_norm=False))
    model.preprocessing = replace(model.preprocessing, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 1.0)
    save_model(model, cifar.parent / "weights")
    return replace(
        config,
        data=str(cifar),
        init=str(cifar.parent / "weights"),
        out=str(cifar.parent / "run"),
        model=replace(config.model, image_size=(48, 48)),
        input=replace(config.input, val_fraction=0.2),
    )


def test_the_leaderboards_l2_is_built_at_its_size_and_keeps_its_statistics() -> None:
    with torch.device("meta"):
        model = build(L2.model).train()
    assert sum(parameter.numel() for parameter in model.parameters()) == 475_354_808
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)
    assert model.training and any(layer.training for layer in model.modules() if isinstance(layer, nn.Dropout))


def test_l2_learns_by_sam_from_small_pictures_made_large_and_leaves_statistics_alone(cifar: Path) -> None:
    config = small_l2(cifar)
    run_training(config)
    before, after = load_model(str(config.init)), load_model(Path(str(config.out)) / "last")
    for name, tensor in before.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(after.state_dict()[name], tensor), name
    assert not torch.equal(after.state_dict()["last.norm.weight"], before.state_dict()["last.norm.weight"])
    assert after.preprocessing.image_size == (48, 48) and after.preprocessing.fit == "squash"


def test_l2_is_normalised_by_the_statistics_of_cifar_whatever_its_weights_were_trained_with(cifar: Path) -> None:
    config = small_l2(cifar)
    data = open_data(str(cifar))
    assert build_model(config, data).preprocessing.mean == CIFAR100_MEAN
    plain = replace(config, input=replace(config.input, renormalise=False))
    assert build_model(plain, data).preprocessing.mean == IMAGENET_MEAN


@pytest.mark.parametrize("name", SAM_PRESETS)
def test_the_learner_penalises_the_weights_once(name: str) -> None:
    config = tiny(SAM_PRESETS[name].config)
    learner = build_learner(
        config,
        build(config.model),
        class_counts=np.ones(config.model.num_classes, dtype=np.int64),
        device=torch.device("cpu"),
        precision="fp32",
    )
    decays = {group["weight_decay"] for group in learner.optimizers["model"].param_groups}
    assert isinstance(learner, SamLearner) == isinstance(config.recipe, SamConfig)
    penalty = getattr(config.recipe, "l2_penalty", 0.0)
    assert (penalty > 0) != (max(decays) > 0)


@pytest.mark.parametrize(
    ("name", "together"),
    [
        ("efficientnet-l2-cifar100", 4),
        ("wide-resnet-28-10-cifar100-sam", 32),
        ("wide-resnet-28-10-cifar100-asam", 128),
        ("vit-b16-imagenet-sam", 32),
    ],
)
def test_as_many_pictures_are_perturbed_together_as_on_the_authors_accelerators(name: str, together: int) -> None:
    loop, recipe = SAM_PRESETS[name].config.loop, SAM_PRESETS[name].config.recipe
    assert isinstance(recipe, SamConfig) and recipe.accumulation == "micro"
    assert loop.batch_size == together * loop.accumulation


def test_sam_and_what_it_is_compared_with_differ_in_nothing_else() -> None:
    sam, plain = (SAM_PRESETS[f"wide-resnet-28-10-cifar100{suffix}"].config for suffix in ("-sam", ""))
    assert isinstance(sam.recipe, SamConfig)
    assert sam.recipe.l2_penalty == plain.optim.weight_decay and plain.optim.decay == "all"
    assert plain == replace(
        sam,
        recipe=plain.recipe,
        optim=replace(sam.optim, weight_decay=plain.optim.weight_decay, decay="all"),
        loop=replace(sam.loop, accumulation=1),
    )
