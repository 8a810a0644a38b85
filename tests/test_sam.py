"""SAM, ASAM and GSAM: the steps that mathematics gives, and nothing else of the run disturbed."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import PixelModel

from vitrail.config.codec import from_json, to_json
from vitrail.config.model import ModelConfig
from vitrail.config.recipes import SamConfig
from vitrail.config.run import AugmentConfig, OptimConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.errors import Interrupted, UserError
from vitrail.models import build
from vitrail.models.base import ImageModel, WithLoss
from vitrail.recipes.base import Learner
from vitrail.recipes.sam import SamLearner
from vitrail.recipes.supervised import SupervisedLearner
from vitrail.training import Callback, run_training

VARIANTS = ("sam", "asam", "gsam")
CURVATURE = np.array([1.0, 4.0, 0.25])
BIAS_CURVATURE = 3.0
SGD = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0)


class Quadratic(PixelModel):
    """A loss whose every gradient is known: half the curvature times the squared distance to a picture's three pixels.

    The bias has a bowl of its own around 1; nothing depends on `idle`.
    """

    def __init__(self) -> None:
        super().__init__(ViTConfig(image_size=(1, 3), patch_size=(1, 1), channels=1, num_classes=2))
        self.weight = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(1))
        self.idle = nn.Parameter(torch.zeros(2))
        self.draws: list[Tensor] = []
        self.calls = 0

    def forward(self, images: Tensor) -> WithLoss:
        self.calls += 1
        self.draws.append(torch.rand(4))
        bowl = (torch.tensor(CURVATURE, dtype=torch.float32) * (self.weight - images.flatten(1)).square()).sum(dim=1)
        own = 0.5 * bowl.mean() + 0.5 * BIAS_CURVATURE * (self.bias - 1).square().sum()
        return WithLoss(torch.zeros(len(images), 2), own)


class ByHand:
    """The same steps on vectors of four numbers, three weights and the bias, in float64."""

    def __init__(self, recipe: SamConfig, rho: float | None = None) -> None:
        self.recipe, self.rho = recipe, recipe.rho if rho is None else rho

    @staticmethod
    def loss(w: np.ndarray, x: np.ndarray) -> float:
        return 0.5 * (CURVATURE * (w[:3] - x) ** 2).sum(1).mean() + 0.5 * BIAS_CURVATURE * (w[3] - 1) ** 2

    def gradient(self, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        of_loss = np.append(CURVATURE * (w[:3] - x.mean(axis=0)), BIAS_CURVATURE * (w[3] - 1))
        return of_loss + self.recipe.l2_penalty * w

    def perturbation(self, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        g, t = self.gradient(w, x), np.ones(4)
        if self.recipe.variant == "asam":
            t[:3] = np.abs(w[:3]) + self.recipe.eta
        norm = np.linalg.norm(t * g)
        return self.rho * t**2 * g / norm if norm else 0 * g

    def descent(self, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        g, h = self.gradient(w, x), self.gradient(w + self.perturbation(w, x), x)
        if self.recipe.variant == "gsam":
            h = h - self.recipe.alpha * (g - (g @ h) / (h @ h) * h)
        return h

    def sharpness(self, w: np.ndarray, x: np.ndarray) -> float:
        return self.loss(w + self.perturbation(w, x), x) - self.loss(w, x)


def learner_of(
    model: ImageModel,
    recipe: SamConfig | SupervisedConfig,
    optim: OptimConfig = SGD,
    *,
    augment: AugmentConfig | None = None,
    precision: str = "fp32",
) -> Learner:
    learner = SamLearner if isinstance(recipe, SamConfig) else SupervisedLearner
    return learner(
        model,
        recipe,
        optim,
        augment=Augment(augment or AugmentConfig(crop="none", flip=0.0), model.preprocessing),
        class_counts=np.full(model.config.num_classes, 10),
        device=torch.device("cpu"),
        precision=precision,
    )


def batch_of(levels: np.ndarray) -> Batch:
    images = torch.from_numpy(levels.astype(np.uint8)).view(-1, 1, 1, 3)
    return Batch(images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)), cropped=True)


def pixels(*levels: np.ndarray) -> np.ndarray:
    """The numbers that the model gets for these levels."""
    return (np.concatenate(levels) / 255 - 0.5) / 0.5


def random_levels(rng: np.random.Generator, pictures: int) -> np.ndarray:
    return rng.integers(0, 256, size=(pictures, 3))


def quadratic_at(w: np.ndarray) -> Quadratic:
    model = Quadratic()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w[:3]))
        model.bias.copy_(torch.from_numpy(w[3:]))
    return model


def weights_of(model: ImageModel) -> np.ndarray:
    return torch.cat([model.weight, model.bias]).detach().double().numpy()


def random_batches(config: ModelConfig, *sizes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape, classes = (config.channels, *config.image_size), config.num_classes
    return [
        Batch(
            torch.randint(0, 256, (size, *shape), generator=generator, dtype=torch.uint8),
            torch.randint(0, classes, (size,), generator=generator),
            torch.randint(0, 2**62, (size,), generator=generator),
            cropped=True,
        )
        for size in sizes
    ]


def tensors_of(state: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of a state dict, by path."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{where}/{key}")
    elif isinstance(state, list | tuple):
        yield from tensors_of(dict(enumerate(state)), where)
    else:
        yield where, state


def assert_same_state(a: Learner, b: Learner) -> None:
    ours, theirs = dict(tensors_of(a.state_dict())), dict(tensors_of(b.state_dict()))
    assert ours.keys() == theirs.keys()
    for where, value in ours.items():
        same = torch.equal(value, theirs[where]) if isinstance(value, Tensor) else value == theirs[where]
        assert same, where


@settings(deadline=None, max_examples=30)
@given(
    variant=st.sampled_from(VARIANTS),
    w=st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4),
    rho=st.floats(0, 2),
    eta=st.floats(0.001, 1),
    alpha=st.floats(0, 2),
    l2_penalty=st.sampled_from([0.0, 0.3]),
    pictures=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_a_step_is_the_one_derived_by_hand(variant, w, rho, eta, alpha, l2_penalty, pictures, seed) -> None:
    recipe = SamConfig(variant=variant, rho=rho, eta=eta, alpha=alpha, l2_penalty=l2_penalty)
    start, levels = np.array(w), random_levels(np.random.default_rng(seed), pictures)
    hand, x = ByHand(recipe), pixels(levels)
    model = quadratic_at(start)
    row = learner_of(model, recipe).step([batch_of(levels)])
    descent = hand.descent(start, x)
    np.testing.assert_allclose(weights_of(model), start - SGD.lr * descent, rtol=1e-4, atol=1e-5)
    assert row["loss"].item() == pytest.approx(hand.loss(start, x) + math.log(2), rel=1e-5)
    assert row["sharpness"].item() == pytest.approx(hand.sharpness(start, x), rel=1e-3, abs=2e-5)
    assert row["gradient_norm"].item() == pytest.approx(np.linalg.norm(descent), rel=1e-4, abs=1e-5)


def test_the_radius_of_gsam_is_linear_in_the_learning_rate() -> None:
    recipe = SamConfig(variant="gsam", rho=0.8, rho_min=0.2, alpha=0.5)
    optim = replace(SGD, schedule="cosine", warmup_steps=2)
    levels, start = random_levels(np.random.default_rng(3), 4), np.array([1.0, -2.0, 0.5, 3.0])
    for step, share in ((0, 0.5), (2, 1.0), (6, 0.5), (9, 0.5 * (1 + math.cos(math.pi * 7 / 8)))):
        model = quadratic_at(start)
        learner = learner_of(model, recipe, optim)
        rate = learner.schedule(step, 10)
        assert rate == pytest.approx(SGD.lr * share)
        learner.step([batch_of(levels)])
        hand = ByHand(recipe, rho=0.2 + 0.6 * share)
        np.testing.assert_allclose(weights_of(model), start - rate * hand.descent(start, pixels(levels)), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_are_perturbed_apart_or_together_as_the_formulas_say(variant: str) -> None:
    rng = np.random.default_rng(0)
    start, levels = np.array([1.0, -2.0, 0.5, 3.0]), [random_levels(rng, 3), random_levels(rng, 5)]
    results = {}
    for accumulation in ("micro", "full"):
        recipe = SamConfig(variant=variant, rho=0.7, accumulation=accumulation, l2_penalty=0.1)
        hand, model = ByHand(recipe), quadratic_at(start)
        row = learner_of(model, recipe).step([batch_of(part) for part in levels])
        together = [np.concatenate(levels)] if accumulation == "full" else levels
        descent = sum(len(part) / 8 * hand.descent(start, pixels(part)) for part in together)
        sharpness = sum(len(part) / 8 * hand.sharpness(start, pixels(part)) for part in together)
        results[accumulation] = weights_of(model)
        np.testing.assert_allclose(results[accumulation], start - SGD.lr * descent, atol=1e-5)
        assert row["sharpness"].item() == pytest.approx(sharpness, rel=1e-3)
    assert np.abs(results["micro"] - results["full"]).max() > 1e-3


def test_gsam_with_alpha_0_and_one_radius_is_sam() -> None:
    learners = []
    for recipe in (SamConfig(rho=0.3), SamConfig(variant="gsam", rho=0.3, rho_min=0.3, alpha=0.0)):
        torch.manual_seed(0)
        learners.append(learner_of(build(replace(TINY["vit"], dropout=0.2)), recipe))
        for step in range(3):
            learners[-1].schedule(step, 3)
            learners[-1].step(random_batches(TINY["vit"], 4, 4, seed=step))
    assert_same_state(*learners)


@pytest.mark.parametrize(
    ("family", "accumulation"),
    [("vit", "micro"), ("vit", "full"), ("vit-moe", "micro"), ("efficientnet", "full"), ("cvt", "micro")],
)
def test_without_a_radius_it_is_supervised_learning_bit_for_bit(family: str, accumulation: str) -> None:
    """Weights, statistics, optimizer, average, random numbers; with dropout, a model's own loss, BatchNorm."""
    config = replace(TINY[family], dropout=0.2, drop_path=0.2)
    augment = AugmentConfig(crop="none", mixup=0.4, policy="trivialaugment")
    optim = OptimConfig(lr=1e-3, ema=0.9)
    learners, ends = [], []
    labels = {"label_smoothing": 0.1, "class_weights": "auto"}
    for recipe in (SupervisedConfig(**labels), SamConfig(rho=0.0, accumulation=accumulation, **labels)):
        torch.manual_seed(0)
        learner = learner_of(build(config), recipe, optim, augment=augment)
        rows = [learner.step(random_batches(config, 4, 2, seed=step)) for step in range(2)]
        learners.append(learner)
        ends.append((torch.rand(1).item(), [(row["loss"].item(), row["gradient_norm"].item()) for row in rows]))
    assert ends[0] == ends[1]
    assert rows[-1]["sharpness"].item() == 0.0
    assert_same_state(*learners)


@pytest.mark.parametrize("accumulation", ["micro", "full"])
def test_both_passes_draw_the_same_random_numbers_and_the_next_others(accumulation: str) -> None:
    model = Quadratic()
    learner = learner_of(model, SamConfig(accumulation=accumulation))
    batch = batch_of(random_levels(np.random.default_rng(0), 2))
    learner.step([batch, batch])
    first, second, third, fourth = model.draws
    pairs = {"micro": ((first, second), (third, fourth)), "full": ((first, third), (second, fourth))}[accumulation]
    assert all(torch.equal(*pair) for pair in pairs)
    assert not torch.equal(pairs[0][0], pairs[1][0])
    learner.step([batch])
    assert all(not torch.equal(model.draws[4], draw) for draw in model.draws[:4])


@pytest.mark.parametrize("accumulation", ["micro", "full"])
def test_statistics_of_batch_norm_are_those_of_the_clean_pass(accumulation: str) -> None:
    config, learners = TINY["efficientnet"], []
    for recipe in (SupervisedConfig(), SamConfig(rho=5.0, accumulation=accumulation)):
        torch.manual_seed(0)
        learners.append(learner_of(build(config), recipe))
        row = learners[-1].step(random_batches(config, 4, 4))
    assert abs(row["sharpness"].item()) > 1e-3, "the perturbation was too small for the passes to differ"
    plain, sharp = (dict(learner.model.named_buffers()) for learner in learners)
    assert any(name.endswith("num_batches_tracked") for name in plain)
    for name, buffer in plain.items():
        assert torch.equal(sharp[name], buffer), name
    norms = [layer for layer in learners[1].model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(layer.track_running_stats for layer in norms)


def test_frozen_statistics_stay_and_their_scales_learn() -> None:
    config = replace(TINY["efficientnet"], frozen_norm=True)
    torch.manual_seed(0)
    learner = learner_of(build(config), SamConfig())
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    learner.step(random_batches(config, 4))
    after = learner.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name, _ in learner.model.named_buffers())
    assert not torch.equal(after["stem.norm.weight"], before["stem.norm.weight"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_come_back_bit_for_bit(variant: str) -> None:
    torch.manual_seed(0)
    learner = learner_of(build(TINY["vit"]), SamConfig(variant=variant, rho=5.0))
    for group in learner.optimizers["model"].param_groups:
        group["lr"] = 0.0
    before = {name: weight.clone() for name, weight in learner.model.named_parameters()}
    row = learner.step(random_batches(TINY["vit"], 4, 4))
    assert abs(row["sharpness"].item()) > 1e-3
    assert all(torch.equal(weight, before[name]) for name, weight in learner.model.named_parameters())


def test_an_error_in_the_second_pass_leaves_weights_and_statistics_as_they_were(monkeypatch) -> None:
    torch.manual_seed(0)
    model = build(TINY["efficientnet"])
    learner = learner_of(model, SamConfig(rho=5.0))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    clean, passes = model.forward, iter([True, False])

    def failing(images: Tensor) -> Tensor:
        if next(passes):
            return clean(images)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        learner.step(random_batches(TINY["efficientnet"], 4))
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(layer.track_running_stats for layer in model.modules() if isinstance(layer, nn.BatchNorm2d))


@pytest.mark.parametrize("variant", VARIANTS)
def test_at_the_bottom_there_is_no_ascent(variant: str) -> None:
    levels = np.full((2, 3), 255)
    start = np.ones(4)
    model = quadratic_at(start)
    row = learner_of(model, SamConfig(variant=variant)).step([batch_of(levels)])
    np.testing.assert_array_equal(weights_of(model), start)
    assert row["sharpness"].item() == row["gradient_norm"].item() == 0.0


def test_weights_that_nothing_depends_on_are_left_alone() -> None:
    model = quadratic_at(np.zeros(4))
    nn.init.constant_(model.idle, 7.0)
    learner = learner_of(model, SamConfig(), replace(SGD, weight_decay=0.5))
    learner.step([batch_of(random_levels(np.random.default_rng(0), 2))])
    assert torch.equal(model.idle, torch.full((2,), 7.0))
    assert model.idle.grad is None


def test_a_frozen_body_is_neither_perturbed_nor_changed() -> None:
    torch.manual_seed(0)
    model = build(TINY["vit"])
    learner = learner_of(model, SamConfig(rho=0.5), replace(SGD, train="head"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    copies = learner._ascend({name: torch.ones_like(w) for name, w in learner._weights.items()})
    assert copies.keys() == {"head.weight", "head.bias"}
    learner._restore(copies)
    learner.step(random_batches(TINY["vit"], 4))
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_the_gradient_is_clipped_after_the_second_pass() -> None:
    recipe, start = SamConfig(rho=1.0), np.array([3.0, -3.0, 2.0, -1.0])
    levels = random_levels(np.random.default_rng(0), 3)
    model = quadratic_at(start)
    row = learner_of(model, recipe, replace(SGD, clip_norm=0.5)).step([batch_of(levels)])
    descent = ByHand(recipe).descent(start, pixels(levels))
    length = np.linalg.norm(descent)
    assert row["gradient_norm"].item() == pytest.approx(length, rel=1e-5)
    np.testing.assert_allclose(weights_of(model), start - SGD.lr * 0.5 * descent / length, atol=1e-5)


def test_decay_in_the_optimizer_does_not_bend_the_perturbation() -> None:
    model = build(TINY["vit"])
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    seen = []
    for decay in (0.0, 0.5):
        model.load_state_dict(start)
        learner = learner_of(model, SamConfig(rho=0.5), replace(SGD, weight_decay=decay))
        seen.append({name: value.item() for name, value in learner.step(random_batches(TINY["vit"], 4)).items()})
    assert seen[0] == seen[1]


# --- fp16 ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_scaling_changes_nothing(variant: str) -> None:
    start, levels = np.array([1.0, -2.0, 0.5, 3.0]), random_levels(np.random.default_rng(0), 4)
    recipe = SamConfig(variant=variant, rho=0.7, l2_penalty=0.1)
    results = []
    for precision in ("fp32", "fp16"):
        model = quadratic_at(start)
        learner = learner_of(model, recipe, precision=precision)
        row = learner.step([batch_of(levels), batch_of(levels[:2])])
        results.append((weights_of(model), row["gradient_norm"].item(), row["sharpness"].item()))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-6)
    assert results[1][1:] == pytest.approx(results[0][1:], rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_overflow_of_the_clean_pass_skips_the_update_and_lowers_the_scale(variant: str, monkeypatch) -> None:
    """And an update at a scale that fits is made as if nothing had been."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**126))
    start, levels = np.array([1.0, -2.0, 0.5, 5.0]), random_levels(np.random.default_rng(0), 4)
    recipe = SamConfig(variant=variant, rho=1e-3)
    model = quadratic_at(start)
    learner = learner_of(model, recipe, replace(SGD, momentum=0.9), precision="fp16")
    row = learner.step([batch_of(levels)])
    assert model.calls == 1, "there is nothing to perturb by"
    assert not math.isfinite(row["gradient_norm"].item())
    assert math.isfinite(row["loss"].item())
    assert row["sharpness"].item() == 0.0
    assert learner.scaler.get_scale() == 2.0**125
    np.testing.assert_array_equal(weights_of(model), start)
    learner.scaler.update(2.0**16)  # straight to where it would come to rest
    learner.step([batch_of(levels)])
    np.testing.assert_allclose(
        weights_of(model), start - SGD.lr * ByHand(recipe).descent(start, pixels(levels)), atol=1e-5
    )


def test_an_overflow_of_the_perturbed_pass_skips_the_update_too(monkeypatch) -> None:
    start, levels = np.array([0.5, -0.5, 0.5, 1.0]), random_levels(np.random.default_rng(0), 4)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
    model = quadratic_at(start)
    learner = learner_of(model, SamConfig(rho=1e30), precision="fp16")
    row = learner.step([batch_of(levels)])
    assert model.calls == 2
    assert not math.isfinite(row["gradient_norm"].item())
    assert learner.scaler.get_scale() == 2.0**59
    np.testing.assert_array_equal(weights_of(model), start)


# --- settings ---


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rho": -0.1}, r"--recipe\.rho must"),
        ({"rho": math.nan}, r"--recipe\.rho must"),
        ({"alpha": math.inf}, r"--recipe\.alpha"),
        ({"eta": 0.0}, r"--recipe\.eta"),
        ({"l2_penalty": -1.0}, r"--recipe\.l2-penalty"),
        ({"rho_min": 0.01}, r"--recipe\.rho-min needs --recipe\.variant gsam"),
        ({"variant": "gsam", "rho": 0.1, "rho_min": 0.2}, r"--recipe\.rho-min must lie between 0 and rho"),
        ({"label_smoothing": 1.0}, r"--recipe\.label-smoothing"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        SamConfig(**wrong)


def test_settings_survive_json() -> None:
    config = SamConfig(variant="gsam", rho=0.6, rho_min=0.1, accumulation="full", label_smoothing=0.1)
    assert from_json(SamConfig, to_json(config)) == config


# --- whole runs ---

FILES = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")


class StopAt(Callback):
    """Send this process a signal after a training step."""

    def __init__(self, step: int) -> None:
        self.step_to_stop = step

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step_to_stop and "val" not in row:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("family", "variant", "accumulation"), [("vit", "sam", "micro"), ("efficientnet", "gsam", "full")]
)
def test_a_stopped_run_goes_on_bit_for_bit(tiny_run, family: str, variant: str, accumulation: str) -> None:
    changes = {
        "recipe": SamConfig(variant=variant, rho=0.1, accumulation=accumulation),
        "model": replace(TINY[family], image_size=(16, 16), dropout=0.1, drop_path=0.1),
        "optim__ema": 0.9,
        "loop__accumulation": 2,
        "loop__steps": 7,
        "loop__eval_every": 7,
    }
    straight, stopped = tiny_run("straight", **changes), tiny_run("stopped", **changes)
    run_training(straight)
    with pytest.raises(Interrupted):
        run_training(stopped, [StopAt(5)])
    run_training(replace(stopped, resume=True))
    for name in FILES:
        assert (Path(stopped.out) / name).read_bytes() == (Path(straight.out) / name).read_bytes(), name
    assert '"sharpness"' in (Path(straight.out) / "metrics.jsonl").read_text()


# Each process steps on its own pictures and writes what came of it.
TOGETHER = """
import sys, torch
from test_sam import CASES, learner_at_work
from vitrail.parallel import leave, processes, rank
torch.set_num_threads(1)
with processes():
    done = [learner_at_work(*case, slice(2 * rank(), 2 * rank() + 2)) for case in CASES]
    torch.save([(learner.model.state_dict(), norm) for learner, norm in done], f"{sys.argv[1]}/{rank()}.pt")
leave(0)
"""
CASES = [("vit", "sam"), ("vit", "asam"), ("vit", "gsam"), ("cvt", "sam")]


def learner_at_work(family: str, variant: str, share: slice) -> tuple[Learner, float]:
    """A learner after two updates from a share of four micro-batches each, and the last gradient's norm."""
    torch.manual_seed(0)
    learner = learner_of(build(TINY[family]), SamConfig(variant=variant, rho=0.5, l2_penalty=0.01))
    for step in range(2):
        row = learner.step(random_batches(TINY[family], 3, 3, 3, 3, seed=step)[share])
    return learner, row["gradient_norm"].item()


@pytest.mark.slow
def test_two_processes_perturb_apart_as_one_does_its_micro_batches(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([*launcher, str(tmp_path / "together.py"), str(tmp_path)], env=environment, check=True, timeout=120)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case, (first, norm), (second, _) in zip(CASES, *both, strict=True):
        alone, expected = learner_at_work(*case, slice(None))
        assert norm == pytest.approx(expected, rel=1e-4)
        parameters = dict(alone.model.named_parameters())
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"processes differ in {name}"
            if name in parameters:
                torch.testing.assert_close(tensor, parameters[name].detach(), rtol=1e-4, atol=1e-5)
