"""Optimizers, schedules and averages against the formulas they cite."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import TINY

from vitrail.config.run import OptimConfig
from vitrail.errors import UserError
from vitrail.models import build, create_model
from vitrail.models.base import WithLoss
from vitrail.optim import (
    AveragedWeights,
    build_optimizer,
    learning_rate,
    parameter_groups,
    prepare,
    set_learning_rate,
)
from vitrail.recipes.supervised import inverse_frequency


def tiny(**overrides: object):
    return create_model(
        "vit-ti16", image_size=32, patch_size=8, width=16, depth=3, mlp_dim=32, heads=2, num_classes=4, **overrides
    )


def efficientnet(**overrides: object):
    return create_model(
        "efficientnet-lite0",
        image_size=32,
        widths=(8,) * 7,
        depths=(2,) * 7,
        stem_width=8,
        head_width=16,
        num_classes=4,
        **overrides,
    )


def test_rsqrt_with_cooldown_equals_the_official_values() -> None:
    """big_vision's schedule with 10k warm-up, timescale 10k, 50k cooldown, 1M steps, as its code computes it."""
    config = OptimConfig(lr=1.0, schedule="rsqrt", warmup_steps=10_000, cooldown_steps=50_000)
    expected = {10_000: 1.0, 20_000: 0.70711, 500_000: 0.14142, 975_000: 0.05064}
    for step, value in expected.items():
        assert learning_rate(config, step, 1_000_000) == pytest.approx(value, abs=1e-5)
    assert learning_rate(config, 999_999, 1_000_000) < 1e-5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "constant"])
def test_warm_up_rises_to_the_peak_and_the_rate_never_exceeds_it(schedule) -> None:
    config = OptimConfig(lr=0.5, schedule=schedule, warmup_steps=10, cooldown_steps=5)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == pytest.approx(0.5)
    assert max(rates) == pytest.approx(0.5)
    assert rates[:10] == sorted(rates[:10])


def test_cosine_and_linear_end_near_zero_and_cross_the_middle_at_half() -> None:
    for schedule in ("cosine", "linear"):
        config = OptimConfig(lr=1.0, schedule=schedule)
        assert learning_rate(config, 50, 100) == pytest.approx(0.5)
        assert learning_rate(config, 99, 100) < 0.02


def test_warm_up_takes_at_most_a_fifth_of_a_short_run() -> None:
    config = OptimConfig(lr=1.0, schedule="linear", warmup_steps=100)
    rates = [learning_rate(config, step, 10) for step in range(10)]
    assert rates[1] == 1.0
    assert rates[-1] < 0.2


def test_constant_stays_until_the_cooldown() -> None:
    config = OptimConfig(lr=1.0, schedule="constant", cooldown_steps=10)
    assert [learning_rate(config, step, 100) for step in (0, 50, 90, 95)] == [1.0, 1.0, 1.0, 0.5]


def test_only_kernels_decay() -> None:
    model = tiny()
    decayed = {
        id(p) for group in parameter_groups(model, OptimConfig()) if group["weight_decay"] for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        kernel = name.endswith("weight") and "norm" not in name
        assert (id(parameter) in decayed) == kernel, name


def test_layer_decay_scales_every_layer_by_its_distance_from_the_head() -> None:
    model = tiny()
    config = OptimConfig(lr=1.0, layer_decay=0.5)
    optimizer = build_optimizer(model, config)
    set_learning_rate([optimizer], 1.0)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert rates["head.weight"] == 1.0
    assert rates["encoder.2.mlp.up.weight"] == 0.5
    assert rates["encoder.0.mlp.up.bias"] == 0.125
    assert rates["patch_embed.weight"] == rates["positions"] == rates["class_token"] == 0.0625


def test_sgd_makes_the_step_of_its_formula() -> None:
    model = tiny()
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=0.0))
    set_learning_rate([optimizer], 0.1)
    weight, before, velocity = model.head.weight, model.head.weight.detach().clone(), 0.0
    for gradient in (1.0, 2.0):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        velocity = 0.9 * velocity + gradient
        before -= 0.1 * velocity
    torch.testing.assert_close(weight.detach(), before)


def test_the_average_follows_its_formula_and_is_lent_without_a_trace() -> None:
    model = tiny()
    average = AveragedWeights(model, decay=0.9)
    expected = model.head.bias.detach().clone()
    for n in range(1, 31):
        with torch.no_grad():
            model.head.bias.add_(1.0)
        average.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.head.bias.detach()
    present = model.head.bias.detach().clone()
    with average.applied(model):
        torch.testing.assert_close(model.head.bias.detach(), expected)
    assert torch.equal(model.head.bias, present)
    assert math.isclose(average.average["head.bias"][0].item(), expected[0].item(), rel_tol=1e-6)


def test_balancing_weights_leave_the_scale_of_the_loss_as_it_is() -> None:
    counts = np.array([900, 90, 10, 0])
    weights = inverse_frequency(counts)
    assert (weights * counts).sum() / counts.sum() == pytest.approx(1.0)
    np.testing.assert_allclose((weights * counts)[:3], counts.sum() / 3, rtol=1e-6)
    assert weights[3] == 1.0  # a class without pictures must not outweigh the others


@pytest.mark.parametrize("make", [tiny, efficientnet])
def test_only_the_head_is_optimised_where_only_the_head_learns(make) -> None:
    model, config = make(), OptimConfig(train="head", lr=1.0, layer_decay=0.5)
    prepare(model, config)
    groups = parameter_groups(model, config)
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.head.parameters()}
    assert all(group["lr_scale"] == 1.0 for group in groups)
    assert not any(module.training for module in model.modules())
    assert not model.features(torch.randn(2, 3, 32, 32)).requires_grad


@pytest.mark.parametrize("make", [tiny, efficientnet])
def test_all_learns_and_is_in_training_mode_where_all_is_to_learn(make) -> None:
    model = make().eval().requires_grad_(False)  # as weights come from a file, after a run of the head alone
    prepare(model, OptimConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_frozen_statistics_stay_frozen_while_all_else_trains() -> None:
    model = efficientnet(frozen_norm=True).eval()
    prepare(model, OptimConfig())
    assert model.dropout.training
    assert not any(layer.training for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d))


def test_a_model_without_a_head_cannot_train_its_head() -> None:
    with pytest.raises(UserError, match="no head"):
        prepare(create_model("vit-ti16", num_classes=0, depth=1), OptimConfig(train="head"))


def test_nesterov_looks_ahead_by_the_momentum() -> None:
    model = create_model("vit-ti16", num_classes=2, depth=1, width=16, mlp_dim=16, heads=2, image_size=16)
    optimizer = build_optimizer(model, OptimConfig(name="sgd", nesterov=True, lr=0.1, weight_decay=0.0))
    assert model.head is not None
    before = model.head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # the velocity is the gradient, and the step gradient + 0.9 velocity
    torch.testing.assert_close(model.head.weight, before - 0.1 * 1.9)


def test_the_head_may_have_a_decay_of_its_own() -> None:
    model = create_model("vit-ti16", num_classes=2, depth=1)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.03, head_decay=3.0))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        kernel = parameter.ndim > 1 and name.endswith(".weight")
        assert decays[id(parameter)] == (3.0 if name == "head.weight" else 0.03 if kernel else 0.0), name


@pytest.mark.parametrize("name", ["muon", "adafactor"])
@pytest.mark.parametrize("family", TINY)
def test_every_family_learns_by_every_optimizer(name: str, family: str) -> None:
    torch.manual_seed(0)
    model = build(replace(TINY[family], num_classes=2)).train()
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.01))
    images, labels, losses = torch.randn(4, 3, *model.config.image_size), torch.tensor([0, 1, 0, 1]), []
    for _ in range(8):
        answer = model(images)
        logits = answer.logits if isinstance(answer, WithLoss) else answer
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw() -> None:
    model = build(TINY["cvt"])
    groups = parameter_groups(model, OptimConfig(name="muon"))
    matrices = {id(p) for group in groups if group["matrices"] for p in group["params"]}
    taken = {name for name, parameter in model.named_parameters() if id(parameter) in matrices}
    assert "stages.0.encoder.0.mlp.up.weight" in taken
    assert not taken & {"head.weight", model.input_kernel, "stages.2.class_token", "norm.weight"}
    depthwise = [name for name, p in model.named_parameters() if p.ndim == 4 and p.shape[1] == 1]
    assert depthwise and not taken & set(depthwise)
