"""Meta Pseudo Labels: the feedback is the gradient that mathematics gives, and the run around it is exact."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from torch import Tensor, nn
from torch.nn import functional as F
from toys import PixelModel

import vitrail.training.setup as parts_module
from vitrail import data as data_module
from vitrail import parallel
from vitrail.config.codec import from_json, to_json
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig, InputConfig, OptimConfig, RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.data import policies
from vitrail.data.arrays import ArraySource
from vitrail.data.augment import Augment
from vitrail.data.base import Batch, Source, Splits
from vitrail.data.few_labels import draw_labelled, with_few_labels
from vitrail.data.paired import PairedStream
from vitrail.errors import Interrupted, UserError
from vitrail.models import build
from vitrail.models.base import ImageModel
from vitrail.presets import preset
from vitrail.recipes import meta_pseudo_labels
from vitrail.recipes.meta_pseudo_labels import MetaPseudoLabelsLearner, sample_labels
from vitrail.training import Callback, run_training
from vitrail.training.setup import assemble, open_run_data, seconds_per_step

SGD = OptimConfig(name="sgd", lr=0.05, momentum=0.0, weight_decay=0.0, clip_norm=0.0)
STILL = AugmentConfig(crop="none", flip=0.0)
CPU = torch.device("cpu")
SHORT = MetaPseudoLabelsConfig(unlabelled_ratio=2, uda_steps=0, student_wait=0, finetune_steps=0)


class Toy(PixelModel):
    """A softmax regression on a picture's three numbers: convex, smooth, and small enough to differentiate twice."""

    def __init__(self) -> None:
        super().__init__(ViTConfig(image_size=(1, 3), patch_size=(1, 1), channels=1, num_classes=3))
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1)[:, :, None] * self.weight).sum(dim=1)  # no matrix product: fp32 under autocast, too


def learner_of(
    student: ImageModel,
    teacher: ImageModel | None = None,
    recipe: MetaPseudoLabelsConfig = SHORT,
    optim: OptimConfig = SGD,
    augment: AugmentConfig = STILL,
    precision: str = "fp32",
) -> MetaPseudoLabelsLearner:
    return MetaPseudoLabelsLearner(
        student,
        recipe,
        optim,
        augment=Augment(augment, student.preprocessing),
        device=CPU,
        precision=precision,
        teacher=teacher,
    )


def toy_learner(recipe: MetaPseudoLabelsConfig = SHORT, optim: OptimConfig = SGD, seed: int = 0, **more):
    torch.manual_seed(seed)
    return learner_of(Toy(), Toy(), recipe, optim, **more)


def toy_batch(labelled: int = 4, unlabelled: int = 3, seed: int = 0) -> Batch:
    return batches_of((1, 1, 3), 3, (labelled, unlabelled), seed=seed)[0]


def batches_of(shape: tuple[int, ...], classes: int, *sizes: tuple[int, int], seed: int = 0) -> list[Batch]:
    """Micro-batches of so many random pictures with and without labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> Batch:
        return Batch(
            torch.randint(0, 256, (size, *shape), generator=generator, dtype=torch.uint8),
            torch.randint(0, classes, (size,), generator=generator),
            torch.randint(0, 2**62, (size,), generator=generator),
            cropped=True,
        )

    return [replace(draw(labelled), unlabelled=draw(unlabelled)) for labelled, unlabelled in sizes]


def tiny_batches(family: str, *sizes: tuple[int, int], seed: int = 0) -> list[Batch]:
    config = TINY[family]
    return batches_of((config.channels, *config.image_size), config.num_classes, *sizes, seed=seed)


def inputs(batch: Batch) -> Tensor:
    """The numbers that the model gets for these pictures."""
    return ((batch.images.double() / 255 - 0.5) / 0.5).flatten(1)


def gradient_of(optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """Return what gives the gradient that the optimizer has stepped by, as its parameters hold it still."""
    return lambda: torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]).double()


def tensors_of(state: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of a state dict, by path."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{where}/{key}")
    elif isinstance(state, list | tuple):
        yield from tensors_of(dict(enumerate(state)), where)
    else:
        yield where, state


def assert_close_state(a: MetaPseudoLabelsLearner, b: MetaPseudoLabelsLearner, **tolerance: float) -> None:
    ours, theirs = dict(tensors_of(a.state_dict())), dict(tensors_of(b.state_dict()))
    assert ours.keys() == theirs.keys()
    for where, value in ours.items():
        if isinstance(value, Tensor) and value.is_floating_point() and tolerance:
            torch.testing.assert_close(value, theirs[where], **tolerance, msg=lambda told, where=where: where + told)
        else:
            same = torch.equal(value, theirs[where]) if isinstance(value, Tensor) else value == theirs[where]
            assert same, where


# --- the feedback ---


@pytest.mark.parametrize("baseline", [0.0, 0.03])
def test_feedback_is_in_expectation_the_meta_gradient_by_double_backpropagation(monkeypatch, baseline: float) -> None:
    """Over all 27 draws of three pictures' labels, each weighed by its probability: no noise is left."""
    recipe, optim = replace(SHORT, uda_weight=0.0, labels="sampled"), replace(SGD, lr=0.01)
    batch = toy_batch(labelled=6, unlabelled=3)
    torch.manual_seed(1)
    student, teacher = Toy(), Toy()
    begin = [{k: v.clone() for k, v in model.state_dict().items()} for model in (student, teacher)]
    u, x, y = inputs(batch.unlabelled), inputs(batch), batch.targets

    def taught(feedback: str, labels: Tensor) -> Tensor:
        monkeypatch.setattr(meta_pseudo_labels, "sample_labels", lambda logits, keys: labels)
        for model, state in zip((student, teacher), begin, strict=True):
            model.load_state_dict(state)
        learner = learner_of(student, teacher, replace(recipe, feedback=feedback), optim)
        learner._baseline.fill_(baseline)
        learner.step([batch])
        return gradient_of(learner.optimizers["teacher"])()

    weights = begin[1]["weight"].double().requires_grad_()
    probabilities = (u @ weights).softmax(dim=1)
    estimate = torch.zeros(9, dtype=torch.float64)
    supervised = taught("none", torch.zeros(3, dtype=torch.int64))
    for draw in itertools.product(range(3), repeat=3):
        chance = probabilities[torch.arange(3), torch.tensor(draw)].prod().detach()
        estimate += chance * (taught("meta", torch.tensor(draw)) - supervised)
    # The true one: differentiate the loss after the student's step, in expectation over labels, by the teacher.
    expected = torch.zeros((), dtype=torch.float64)
    for draw in itertools.product(range(3), repeat=3):
        s = begin[0]["weight"].double().requires_grad_()
        labels = torch.tensor(draw)
        (g,) = torch.autograd.grad(F.cross_entropy(u @ s, labels), s)
        after = F.cross_entropy(x @ (s - optim.lr * g), y).detach()
        expected = expected + probabilities[torch.arange(3), labels].prod() * after
    (true,) = torch.autograd.grad(expected, weights)
    assert F.cosine_similarity(estimate, true.flatten(), dim=0) > 0.999
    assert estimate.norm() / true.norm() == pytest.approx(1, abs=0.01)
    # And the author's shortcut for soft labels: through the one step itself.
    weights.grad = None
    s = begin[0]["weight"].double().requires_grad_()
    step = F.cross_entropy(u @ s, (u @ weights).softmax(dim=1))
    (g,) = torch.autograd.grad(step, s, create_graph=True)
    (through,) = torch.autograd.grad(F.cross_entropy(x @ (s - optim.lr * g), y), weights)
    assert F.cosine_similarity(estimate, through.flatten(), dim=0) > 0.99


def test_labels_drawn_at_random_give_that_gradient_in_the_mean() -> None:
    recipe, optim = replace(SHORT, uda_weight=0.0, labels="sampled"), replace(SGD, lr=0.5)
    batch = toy_batch(labelled=30, unlabelled=2)
    generator = torch.Generator().manual_seed(5)
    learner = toy_learner(recipe, optim)
    begin = {name: value.clone() for name, value in learner.models.state_dict().items()}
    gradients = []
    for _ in range(300):
        learner.models.load_state_dict(begin)
        keys = torch.randint(0, 2**62, (2,), generator=generator)
        learner.step([replace(batch, unlabelled=replace(batch.unlabelled, keys=keys))])
        gradients.append(gradient_of(learner.optimizers["teacher"])())
    x, u = inputs(batch), inputs(batch.unlabelled)
    weights, s = begin["teacher.weight"].double().requires_grad_(), begin["model.weight"].double().requires_grad_()
    smoothing = recipe.label_smoothing
    (supervised,) = torch.autograd.grad(F.cross_entropy(x @ weights, batch.targets, label_smoothing=smoothing), weights)
    (g,) = torch.autograd.grad(F.cross_entropy(u @ s, (u @ weights).softmax(dim=1)), s, create_graph=True)
    (true,) = torch.autograd.grad(F.cross_entropy(x @ (s - optim.lr * g), batch.targets), weights)
    estimate = torch.stack(gradients).mean(dim=0) - supervised.flatten()
    assert F.cosine_similarity(estimate, true.flatten(), dim=0) > 0.99


def test_what_helped_is_the_product_of_both_gradients_as_the_step_shrinks() -> None:
    batch, errors = toy_batch(labelled=5, unlabelled=4), []
    for lr in (0.4, 0.2, 0.1):
        learner = toy_learner(optim=replace(SGD, lr=lr), seed=3)
        s, t = learner.model.weight.detach().double().requires_grad_(), learner.teacher.weight.detach().double()
        u, x = inputs(batch.unlabelled), inputs(batch)
        (of_others,) = torch.autograd.grad(F.cross_entropy(u @ s, (u @ t).argmax(dim=1)), s)
        (of_labels,) = torch.autograd.grad(F.cross_entropy(x @ s, batch.targets), s)
        helped = learner.step([batch])["feedback"].item()
        product = (of_others * of_labels).sum().item()
        errors.append(abs(helped / lr - product))
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.25)
    assert errors[2] == pytest.approx(errors[1] / 2, rel=0.25)
    assert errors[2] < 0.1 * abs(product)


def test_the_student_learns_the_teachers_labels_and_no_others() -> None:
    batch = toy_batch()
    learner = toy_learner()
    s, t = learner.model.weight.detach().double().requires_grad_(), learner.teacher.weight.detach().double()
    u = inputs(batch.unlabelled)
    loss = F.cross_entropy(u @ s, (u @ t).argmax(dim=1))
    (g,) = torch.autograd.grad(loss, s)
    row = learner.step([batch])
    torch.testing.assert_close(learner.model.weight.detach().double(), s.detach() - SGD.lr * g, rtol=1e-5, atol=1e-6)
    assert row["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    agreed = ((u @ s).argmax(dim=1) == (u @ t).argmax(dim=1)).double().mean().item()
    assert row["agreement"].item() == pytest.approx(agreed)


def test_the_teacher_without_feedback_is_uda() -> None:
    """Supervised with smoothing, and consistency where sharpened probabilities pass the threshold."""
    recipe = replace(SHORT, feedback="none", uda_weight=3.0, uda_temperature=0.5, uda_threshold=0.7)
    batch, augment = toy_batch(labelled=5, unlabelled=40), replace(STILL, flip=0.5)
    learner = toy_learner(recipe, augment=augment)
    views = learner._views(batch)
    t = learner.teacher.weight.detach().double().requires_grad_()
    weak, strong = (images.double().flatten(1) @ t for images in (views.weak, views.strong))
    wanted = (weak.detach() / 0.5).softmax(dim=1)
    sure = wanted.amax(dim=1) >= 0.7
    uda = (F.cross_entropy(strong, wanted, reduction="none") * sure).mean()
    supervised = F.cross_entropy(views.labelled.double().flatten(1) @ t, batch.targets, label_smoothing=0.15)
    (g,) = torch.autograd.grad(supervised + 3.0 * uda, t)
    row = learner.step([batch])
    torch.testing.assert_close(gradient_of(learner.optimizers["teacher"])(), g.flatten(), rtol=1e-4, atol=1e-5)
    assert 0 < sure.double().mean() < 1
    assert row["sure"].item() == pytest.approx(sure.double().mean().item())
    assert row["teacher_uda"].item() == pytest.approx(uda.item(), rel=1e-4)
    assert row["teacher_supervised"].item() == pytest.approx(supervised.item(), rel=1e-4)


def test_the_released_feedback_has_no_gradient_and_the_other_sign() -> None:
    steps = {}
    for feedback in ("released", "none", "meta"):
        learner = toy_learner(replace(SHORT, feedback=feedback))
        learner._baseline.fill_(-50.0)  # whatever the factor
        row = learner.step([toy_batch()])
        steps[feedback] = gradient_of(learner.optimizers["teacher"])(), row
    none, released = steps["none"][0], steps["released"][0]
    torch.testing.assert_close(released, none, rtol=0.0, atol=1e-5)
    assert (steps["meta"][0] - none).norm() > 1, "the factor was too small to show in a gradient"
    row = steps["released"][1]
    assert row["baseline"].item() == pytest.approx(-50 * 0.99 - 0.01 * row["feedback"].item(), rel=1e-6)


def test_the_released_student_learns_soft_smoothed_labels() -> None:
    batch, learner = toy_batch(), toy_learner(replace(SHORT, feedback="released", label_smoothing=0.3))
    s, t = learner.model.weight.detach().double(), learner.teacher.weight.detach().double()
    u = inputs(batch.unlabelled)
    expected = F.cross_entropy(u @ s, (u @ t).softmax(dim=1), label_smoothing=0.3)
    assert learner.step([batch])["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_baseline_averages_what_helped() -> None:
    learner, baseline = toy_learner(optim=replace(SGD, lr=1.0)), 0.0
    for step in range(5):
        row = learner.step([toy_batch(seed=step)])
        baseline = 0.99 * baseline + 0.01 * row["feedback"].item()
        assert row["baseline"].item() == pytest.approx(baseline, rel=1e-5)
    assert baseline != 0


def test_labels_are_drawn_from_their_probabilities_by_key() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).repeat(40_000, 1)
    keys = torch.randint(0, 2**62, (40_000,), generator=torch.Generator().manual_seed(0))
    labels = sample_labels(logits, keys)
    shares = torch.bincount(labels, minlength=4) / len(labels)
    torch.testing.assert_close(shares, logits[0].softmax(dim=0), rtol=0.0, atol=0.01)
    torch.testing.assert_close(sample_labels(logits[5:9], keys[5:9]), labels[5:9])


# --- noise in what is compared ---


def test_without_a_step_nothing_has_helped_whatever_dropout_and_batch_norm_do() -> None:
    """BatchNorm's statistics move with every batch, dropout draws anew: neither may look like help."""
    config = replace(TINY["efficientnet"], dropout=0.5, drop_path=0.3)
    torch.manual_seed(0)
    learner = learner_of(build(config), optim=replace(SGD, momentum=0.9))
    for group in learner.optimizers["model"].param_groups:
        group["lr"] = 0.0
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    for step in range(2):
        row = learner.step(tiny_batches("efficientnet", (4, 8), seed=step))
        assert row["feedback"].item() == 0.0
    moved = {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)
    assert all(layer.training for layer in learner.model.modules()), "training goes on in training mode"


@pytest.mark.parametrize("family", ["efficientnet", "vit", "vit-moe"])
def test_micro_batches_forget_no_statistics_and_draw_the_same_dropout(family: str) -> None:
    """Activations computed again must be those of before, and count once."""
    learners, rows = [], []
    for keep in (False, True):
        torch.manual_seed(0)
        learner = learner_of(build(replace(TINY[family], dropout=0.4, drop_path=0.3)))
        ask = learner._ask_teacher
        if keep:
            learner._ask_teacher = lambda views, keep, ask=ask: ask(views, keep=True)
        rows += [learner.step(tiny_batches(family, (3, 4), (2, 5), seed=step)) for step in range(2)]
        learners.append(learner)
    assert_close_state(*learners)
    assert all(torch.equal(rows[1][name], rows[3][name]) for name in rows[1])
    for model in learners[0].models.values():
        assert all(m.num_batches_tracked == 4 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_micro_batches_are_one_batch() -> None:
    recipe = replace(SHORT, labels="sampled")
    whole, split = tiny_batches("vit", (4, 8)), []
    for part in (slice(0, 2), slice(2, 4)):
        (one,) = whole
        others = replace(
            one.unlabelled,
            **{
                name: getattr(one.unlabelled, name)[2 * part.start : 2 * part.stop]
                for name in ("images", "targets", "keys")
            },
        )
        split.append(Batch(one.images[part], one.targets[part], one.keys[part], cropped=True, unlabelled=others))
    learners = []
    for batches in (whole, split):
        torch.manual_seed(0)
        learners.append(learner_of(build(TINY["vit"]), recipe=recipe))
        for _ in range(2):
            learners[-1].step(batches)
    assert_close_state(*learners, rtol=1e-4, atol=1e-5)


# --- views ---


def test_the_strong_view_is_the_weak_one_gone_further_and_both_follow_from_the_key() -> None:
    config = TINY["vit"]
    (batch,) = tiny_batches("vit", (2, 6))
    batch = replace(batch, cropped=False, unlabelled=replace(batch.unlabelled, cropped=False))
    mild = AugmentConfig(crop="padded", flip=0.0, pad=0)
    strong = replace(mild, policy="randaugment", cutout=12)
    torch.manual_seed(0)
    model = build(config)
    views = learner_of(model, augment=mild)._views(batch)
    assert torch.equal(views.weak, views.strong)
    learner = learner_of(model, augment=strong)
    views, again = learner._views(batch), learner._views(batch)
    assert torch.equal(views.strong, again.strong)
    assert torch.equal(views.weak, learner_of(model, augment=mild)._views(batch).weak), "a weak view knows no policy"
    assert all(not torch.equal(a, b) for a, b in zip(views.weak, views.strong, strict=True))
    moved = learner_of(model, augment=replace(mild, pad=4))._views(batch)
    assert not torch.equal(moved.weak, moved.strong), "the strong view moves a second time"


def test_cifars_randaugment_has_the_released_strengths_and_chances() -> None:
    level = {name: policies.cifar_randaugment_argument(name, 16.0, (32, 32)) for name in policies.CIFAR_RANDAUGMENT}
    told = {"TranslateX": 6.4, "TranslateY": 6.4, "Cutout": 6.0, "Solarize": 153.0, "Posterize": 6.0, "Rotate": 48.0}
    assert {name: level[name] for name in told} == pytest.approx(told)
    assert level["Color"] == pytest.approx(2.98)
    assert len(level) == 15
    config = AugmentConfig(policy="randaugment-cifar", operations=2, magnitude=16.0)
    keys = torch.randint(0, 2**62, (20_000,), generator=torch.Generator().manual_seed(0))
    numbers, _ = policies.plan_policy(keys, config, (32, 32))
    acts = numbers != policies.OPERATIONS.index("Identity")
    assert acts.float().mean().item() == pytest.approx(0.5, abs=0.01)
    both = acts.all(dim=1).float().mean().item()
    assert both == pytest.approx(0.25 + 0.6**2 / 12, abs=0.01), "a picture's two operations share one chance"
    assert numbers.unique().numel() == 16


# --- schedule, waiting, fine-tuning ---


def test_both_rates_wait_warm_up_and_end_as_they_should() -> None:
    recipe = MetaPseudoLabelsConfig(
        student_wait=10, finetune_steps=20, finetune_lr=1e-3, teacher_lr_ratio=1.5, uda_steps=8, uda_weight=4.0
    )
    learner = toy_learner(recipe, replace(SGD, lr=0.1, schedule="cosine", warmup_steps=5))
    student, teacher, ramp = [], [], []
    for step in range(120):
        student.append(learner.schedule(step, 120))
        assert learner.optimizers["model"].param_groups[0]["lr"] == pytest.approx(student[-1])
        teacher.append(learner.optimizers["teacher"].param_groups[0]["lr"])
        ramp.append(learner._uda_weight)
    assert student[:10] == [0.0] * 10
    assert student[10:15] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert student[57] == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 42 / 85)))
    assert student[100:] == [1e-3] * 20
    assert teacher[:5] == pytest.approx([0.03, 0.06, 0.09, 0.12, 0.15])
    assert teacher[52] == pytest.approx(0.15 * 0.5 * (1 + math.cos(math.pi * 47 / 95)))
    assert ramp[:9] == pytest.approx([0.5 * step for step in range(9)])
    assert learner.schedule(9, 40) > 0, "a short run waits a fifth of its length at most"


def test_a_waiting_student_does_not_learn_but_its_teacher_does() -> None:
    learner = toy_learner(replace(SHORT, student_wait=2), replace(SGD, momentum=0.9, weight_decay=0.1, warmup_steps=1))
    start = [model.weight.detach().clone() for model in (learner.model, learner.teacher)]
    for step in range(2):
        learner.schedule(step, 20)
        row = learner.step([toy_batch(seed=step)])
        assert row["feedback"].item() == 0.0
    assert torch.equal(learner.model.weight, start[0])
    assert not torch.equal(learner.teacher.weight, start[1])
    learner.schedule(2, 20)
    learner.step([toy_batch(seed=2)])
    assert not torch.equal(learner.model.weight, start[0])


def test_in_the_end_the_averaged_student_learns_from_labels_alone() -> None:
    recipe = replace(SHORT, finetune_steps=2, finetune_lr=0.1)
    learner = toy_learner(recipe, replace(SGD, momentum=0.9, ema=0.9))
    for step in range(8):
        learner.schedule(step, 10)
        learner.step([toy_batch(seed=step)])
    average, taught = learner.average.average["weight"].clone().double(), learner.teacher.weight.detach().clone()
    assert not torch.equal(average, learner.model.weight.double())
    batch = toy_batch(seed=9)
    momentum = 0.0
    for step in (8, 9):
        learner.schedule(step, 10)
        row = learner.step([replace(batch, unlabelled=None)])
        loss = F.cross_entropy(inputs(batch) @ average.requires_grad_(), batch.targets)
        (g,) = torch.autograd.grad(loss, average)
        momentum = 0.9 * momentum + g
        average = average.detach() - 0.1 * momentum
        assert row["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(learner.model.weight.detach().double(), average, rtol=1e-5, atol=1e-6)
    assert torch.equal(learner.teacher.weight, taught)
    with learner.shipped_weights():
        torch.testing.assert_close(learner.model.weight.detach().double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adafactor", "adam", "rmsprop"])
def test_fine_tuning_begins_as_in_a_run_of_its_own(optimizer: str) -> None:
    """The student's optimizer has no memory of pseudo labels, not even of how many updates there were."""
    optim = OptimConfig(name=optimizer, lr=1e-2, weight_decay=0.1, momentum=0.9, clip_norm=0.0)
    recipe = replace(SHORT, finetune_steps=2, finetune_lr=1e-2)
    torch.manual_seed(0)
    config = TINY["vit"]
    late = learner_of(build(config), recipe=recipe, optim=optim)
    for step in range(8):
        late.schedule(step, 10)
        late.step(tiny_batches("vit", (2, 4), seed=step))
    fresh = learner_of(build(config), recipe=recipe, optim=optim)
    fresh.model.load_state_dict(late.model.state_dict())
    batches = tiny_batches("vit", (4, 4), seed=9)
    for learner in (late, fresh):
        torch.manual_seed(7)
        learner.schedule(8, 10)
        learner.step(batches)
    ours, theirs = late.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_gradient_is_clipped() -> None:
    learner = toy_learner(optim=replace(SGD, clip_norm=1e-3))
    start = [model.weight.detach().clone() for model in (learner.model, learner.teacher)]
    row = learner.step([toy_batch()])
    assert min(row["gradient_norm"].item(), row["teacher_gradient_norm"].item()) > 1e-3
    for model, before in zip((learner.model, learner.teacher), start, strict=True):
        assert (model.weight - before).norm().item() == pytest.approx(SGD.lr * 1e-3, rel=1e-2)


def test_loss_scaling_changes_nothing() -> None:
    learners = [toy_learner(precision=precision) for precision in ("fp32", "fp16")]
    for learner in learners:
        for step in range(3):
            row = learner.step([toy_batch(seed=step)])
    assert row["feedback"].item() != 0
    for first, second in zip(*(learner.models.parameters() for learner in learners), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_an_overflow_of_either_gradient_skips_its_update_and_lowers_the_scale(monkeypatch) -> None:
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**127))
    learner = toy_learner(replace(SHORT, uda_weight=100.0), precision="fp16")
    start = [model.weight.detach().clone() for model in (learner.model, learner.teacher)]
    row = learner.step([toy_batch()])
    assert torch.equal(learner.teacher.weight, start[1])
    assert math.isfinite(row["loss"].item())
    assert learner.scaler.get_scale() == 2.0**126


def test_the_teacher_begins_elsewhere_than_its_student() -> None:
    torch.manual_seed(0)
    learner = learner_of(build(TINY["vit"]))
    assert not torch.equal(learner.model.patch_embed.weight, learner.teacher.patch_embed.weight)
    assert learner.models["model"] is learner.model


def test_a_fresh_teacher_whitens_as_its_student() -> None:
    torch.manual_seed(0)
    model = build(TINY["convolutional hybrid"])
    model.fit_input(lambda: torch.randn(64, 3, *model.config.image_size))
    learner = learner_of(model)
    assert torch.equal(learner.teacher.stem.whitening, learner.model.stem.whitening)
    assert not torch.equal(learner.teacher.patch_embed.weight, learner.model.patch_embed.weight)


# --- settings ---


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"unlabelled_ratio": 0}, "unlabelled_ratio"),
        ({"uda_weight": math.inf}, r"--recipe\.uda-weight"),
        ({"uda_temperature": 0.0}, r"--recipe\.uda-temperature"),
        ({"uda_threshold": 1.1}, r"--recipe\.uda-threshold"),
        ({"label_smoothing": 1.0}, r"--recipe\.label-smoothing"),
        ({"teacher_lr_ratio": 0.0}, r"--recipe\.teacher-lr-ratio"),
        ({"student_wait": -1}, "student_wait"),
        ({"finetune_lr": math.nan}, r"--recipe\.finetune-lr"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        MetaPseudoLabelsConfig(**wrong)


@pytest.mark.parametrize("labelled", [0.0, -1.0, 2.5])
def test_a_number_of_labels_is_a_share_or_whole(labelled: float) -> None:
    with pytest.raises(UserError, match=r"--input\.labelled"):
        InputConfig(labelled=labelled)


def test_settings_survive_json() -> None:
    config = RunConfig(
        recipe=MetaPseudoLabelsConfig(feedback="released", labels="sampled"), input=InputConfig(labelled=4000.0)
    )
    assert from_json(RunConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"augment": replace(STILL, mixup=0.2)}, r"--augment\.mixup 0"),
        ({"augment": replace(STILL, crop="padded", size=(16, 16))}, r"--augment\.size"),
        ({"optim": replace(SGD, train="head")}, r"--optim\.train head"),
    ],
)
def test_what_does_not_go_with_it_is_refused(change: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        learner_of(build(TINY["vit"]), **change)


def test_several_labels_per_picture_are_refused() -> None:
    model = build(TINY["vit"])
    model.multi_label = True
    with pytest.raises(UserError, match="one label"):
        learner_of(model)


# --- few labels ---


def numbered(counts: Sequence[int] = (30, 30, 30)) -> ArraySource:
    """Pictures whose every pixel is their index."""
    targets = np.repeat(np.arange(len(counts)), counts)
    images = np.broadcast_to(np.arange(len(targets), dtype=np.uint8)[:, None, None, None], (len(targets), 4, 4, 1))
    return ArraySource(images.copy(), targets, tuple("abcde"[: len(counts)]), "numbered")


def indices(source: Source) -> set[int]:
    return {int(source.load(i)[0, 0, 0]) for i in range(len(source))}


def split_of(source: Source, labelled: float | None, seed: int = 0, **settings) -> Splits:
    config = InputConfig(labelled=labelled, **settings)
    return with_few_labels(Splits(train=source), config, channels=1, seed=seed, learns_unlabelled=True)


@pytest.mark.parametrize(
    ("labelled", "counts"),
    [(12.0, [4, 4, 4]), (13.0, [5, 4, 4]), (0.1, [3, 6, 1]), (0.5, [15, 30, 4])],
)
def test_labels_are_kept_class_by_class(labelled: float, counts: list[int]) -> None:
    source = numbered((30, 60, 8))
    data = split_of(source, labelled)
    assert data.train.class_counts().tolist() == counts
    assert indices(data.train) | indices(data.unlabelled) == set(range(98))
    assert len(data.train) + len(data.unlabelled) == 98
    for place, index in enumerate(data.train.indices):
        assert data.train.targets[place] == source.targets[index]


def test_labels_that_are_not_kept_cannot_be_seen() -> None:
    data = split_of(numbered(), 9.0)
    assert data.unlabelled.targets.tolist() == [0] * 81
    assert len(data.unlabelled.classes) == 1


def test_the_draw_is_the_seeds() -> None:
    draws = [draw_labelled(numbered(), 9.0, seed).tolist() for seed in (0, 0, 1, 2**62 + 1, 2**62 + 2)]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize(
    ("labelled", "told"),
    [
        (100.0, r"--input\.labelled 100 is more than the 90 training pictures"),
        (2.0, r"--input\.labelled 2 leaves classes without a label; 3 is the least"),
    ],
)
def test_labels_that_are_not_there_are_refused(labelled: float, told: str) -> None:
    with pytest.raises(UserError, match=told):
        split_of(numbered(), labelled)


def test_a_class_with_too_few_pictures_is_named() -> None:
    with pytest.raises(UserError, match=r"asks for 10 labelled pictures of each class, but 'b' has 5; lower it"):
        split_of(numbered((30, 5, 30)), 30.0)


def test_several_labels_cannot_be_drawn_by_class() -> None:
    source = ArraySource(np.zeros((6, 4, 4, 1), np.uint8), np.ones((6, 2), np.float32), ("a", "b"), "many")
    with pytest.raises(UserError, match=r"--input\.labelled .* several labels"):
        split_of(source, 2.0)


def test_pictures_without_labels_must_come_from_somewhere() -> None:
    for labelled in (None, 90.0):
        with pytest.raises(UserError, match=r"--input\.unlabelled.*--input\.labelled"):
            split_of(numbered(), labelled)


def test_other_recipes_take_few_labels_but_no_unlabelled_pictures() -> None:
    data = Splits(train=numbered())
    options = {"channels": 1, "seed": 0, "learns_unlabelled": False}
    few = with_few_labels(data, InputConfig(labelled=9.0), **options)
    assert few.train.class_counts().tolist() == [3, 3, 3]
    assert few.unlabelled is None
    with pytest.raises(UserError, match=r"--input\.unlabelled.*Meta Pseudo Labels"):
        with_few_labels(data, InputConfig(unlabelled="x"), **options)


def test_pictures_without_labels_may_lie_elsewhere(photos: Path) -> None:
    data = split_of(numbered(), None, unlabelled=str(photos))
    assert len(data.train) == 90
    assert len(data.unlabelled) == 60


# --- the stream ---


def paired(source: Source, others: Source, **changes) -> PairedStream:
    settings = {
        "preprocessing": Preprocessing(image_size=(4, 4), channels=1, crop_fraction=1.0),
        "augment": AugmentConfig(crop="none"),
        "batch_size": 4,
        "workers": 0,
    }
    return PairedStream(source, others, ratio=3, **(settings | changes))


def seen(batch: Batch) -> list[int]:
    return batch.images[:, 0, 0, 0].tolist()


def test_both_kinds_come_together_each_in_its_own_order() -> None:
    data = split_of(numbered(), 12.0)
    stream = paired(data.train, data.unlabelled)
    labelled, others, keys = [], [], []
    for _ in range(13):
        (batch,) = next(stream)
        labelled += seen(batch)
        others += seen(batch.unlabelled)
        keys += [*batch.keys.tolist(), *batch.unlabelled.keys.tolist()]
    assert len(labelled) == 52
    assert len(others) == 156
    assert sorted(labelled[:12]) == sorted(indices(data.train))
    assert sorted(others[:78]) == sorted(indices(data.unlabelled))
    assert labelled[:12] != labelled[12:24]
    assert len(set(keys)) == len(keys), "no two pictures draw the same numbers"
    assert stream.epoch == pytest.approx(52 / 12)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_and_micro_batches_together_see_what_one_sees(accumulation: int) -> None:
    data = split_of(numbered(), 12.0)
    one = paired(data.train, data.unlabelled)
    parts = [paired(data.train, data.unlabelled, accumulation=accumulation, rank=r, world=2) for r in (0, 1)]
    for _ in range(5):
        (whole,) = next(one)
        micro = zip(*(next(stream) for stream in parts), strict=True)  # rank by rank within each micro-batch
        batches = [batch for ranks in micro for batch in ranks]
        assert len(batches) == 2 * accumulation
        assert torch.equal(torch.cat([batch.images for batch in batches]), whole.images)
        assert torch.equal(torch.cat([batch.unlabelled.images for batch in batches]), whole.unlabelled.images)
        assert torch.equal(torch.cat([batch.unlabelled.keys for batch in batches]), whole.unlabelled.keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_of_both_continues_where_it_stopped(photos: Path, workers: int) -> None:
    source = open_run_data(RunConfig(data=str(photos))).train
    data = split_of(source, 12.0)
    settings = {"preprocessing": Preprocessing(image_size=(16, 16)), "augment": AugmentConfig(), "workers": workers}
    first, second = (paired(data.train, data.unlabelled, **settings) for _ in range(2))
    for _ in range(5):
        next(first)
    state = first.state_dict()
    next(second)
    second.load_state_dict(state)
    for _ in range(5):
        (a,), (b,) = next(first), next(second)
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "targets", "keys"))
        assert torch.equal(a.unlabelled.images, b.unlabelled.images)
        assert torch.equal(a.unlabelled.keys, b.unlabelled.keys)
    first.close()
    second.close()


# --- whole runs ---

FILES = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")
RECIPE = MetaPseudoLabelsConfig(
    unlabelled_ratio=2, uda_steps=2, uda_threshold=0.4, student_wait=2, finetune_steps=2, labels="sampled"
)


def mpl_run(tiny_run, out: str, **changes) -> RunConfig:
    settings = {
        "recipe": RECIPE,
        "input__labelled": 12.0,
        "augment__mixup": 0.0,
        "loop__batch_size": 4,
        "loop__steps": 10,
        "loop__eval_every": 4,
        "optim__ema": 0.9,
    }
    return tiny_run(out, **(settings | changes))


class StopAt(Callback):
    """Send this process a signal after a training step."""

    def __init__(self, step: int) -> None:
        self.step_to_stop = step

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step_to_stop and "val" not in row:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("family", "accumulation"), [("vit", 1), ("efficientnet", 2)])
def test_a_stopped_run_goes_on_bit_for_bit(tiny_run, family: str, accumulation: int) -> None:
    """From the middle of what the teacher teaches, and from the middle of fine-tuning."""
    model = replace(TINY[family], image_size=(16, 16), dropout=0.1)
    changes = {"model": model, "loop__accumulation": accumulation}
    straight, stopped = (mpl_run(tiny_run, name, **changes) for name in ("straight", "stopped"))
    run_training(straight)
    for step in (5, 9):
        with pytest.raises(Interrupted):
            run_training(replace(stopped, resume=step > 5), [StopAt(step)])
    run_training(replace(stopped, resume=True))
    for name in FILES:
        assert (Path(stopped.out) / name).read_bytes() == (Path(straight.out) / name).read_bytes(), name
    rows = (Path(straight.out) / "metrics.jsonl").read_text()
    assert all(f'"{name}"' in rows for name in ("feedback", "baseline", "sure", "agreement", "teacher_uda"))


def test_the_split_leaves_validation_alone_and_takes_part_in_the_fingerprint(tiny_run) -> None:
    config = mpl_run(tiny_run, "run")
    data = open_run_data(config)
    names = [{source.name(i) for i in range(len(source))} for source in (data.train, data.val, data.unlabelled)]
    assert [len(part) for part in names] == [12, 12, 36]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    other = open_run_data(replace(config, input=replace(config.input, labelled=15.0)))
    assert data.fingerprint() != other.fingerprint()


def test_the_time_of_an_update_is_measured_with_teacher_and_without_a_trace(tiny_run) -> None:
    config = mpl_run(tiny_run, "run", recipe=replace(RECIPE, finetune_steps=0))
    parts = assemble(config, open_run_data(config), CPU, "fp32")
    before = {where: value.clone() for where, value in parts.learner.models.state_dict().items()}
    state = torch.get_rng_state()
    assert 0 < seconds_per_step(config, parts, trial_seconds=0.05) < 5
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[where]) for where, value in parts.learner.models.state_dict().items())
    assert parts.stream.epoch == 0
    parts.stream.close()


def test_a_learning_rate_cannot_be_found_by_pseudo_labels(tiny_run) -> None:
    config = mpl_run(tiny_run, "run", find_lr=True)
    with pytest.raises(UserError, match="--find-lr"):
        assemble(config, open_run_data(config), CPU, "fp32")


def test_patience_does_not_go_with_a_student_that_waits(tiny_run) -> None:
    config = mpl_run(tiny_run, "run", loop__patience=3)
    with pytest.raises(UserError, match=r"--loop\.patience"):
        assemble(config, open_run_data(config), CPU, "fp32")


class StopAfterEvaluation(StopAt):
    """Send this process a signal after the evaluation at a step."""

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step_to_stop and "val" in row:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_row_of_the_log_has_updates_of_one_kind_whether_stopped_there_or_not(tiny_run) -> None:
    """Fine-tuning begins at step 8, in the middle of a window, and tells less than what was before it."""
    straight, often, stopped = (
        mpl_run(tiny_run, name, loop__log_every=each) for name, each in (("straight", 3), ("often", 1), ("stopped", 3))
    )
    run_training(straight)
    run_training(often)
    with pytest.raises(Interrupted):
        run_training(stopped, [StopAfterEvaluation(8)])
    run_training(replace(stopped, resume=True))
    texts = [(Path(config.out) / "metrics.jsonl").read_text() for config in (straight, often, stopped)]
    assert texts[0] == texts[2]
    rows, single = ([row for row in map(json.loads, text.splitlines()) if "val" not in row] for text in texts[:2])
    assert [row["step"] for row in rows] == [3, 6, 8, 9, 10]
    each = {row["step"]: row for row in single}
    begin = 0
    for row in rows:
        window, begin = [each[step] for step in range(begin + 1, row["step"] + 1)], row["step"]
        assert row.keys() == window[-1].keys()
        assert (row["lr"], row["epoch"]) == (window[-1]["lr"], window[-1]["epoch"])
        for name in row.keys() - {"step", "lr", "epoch"}:
            assert row[name] == pytest.approx(sum(one[name] for one in window) / len(window), rel=1e-4, abs=1e-6), name


def test_from_weights_at_hand_both_start_alike(tiny_run) -> None:
    first = mpl_run(tiny_run, "first", loop__steps=1)
    run_training(first)
    second = mpl_run(tiny_run, "second", init=str(Path(first.out) / "last"))
    parts = assemble(second, open_run_data(second), CPU, "fp32")
    student, teacher = (parts.learner.models[name].state_dict() for name in ("model", "teacher"))
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    parts.stream.close()


def test_pictures_without_labels_count_when_a_model_is_judged_too_large(tiny_run, monkeypatch, caplog) -> None:
    """12 labelled and 36 without labels: a threshold between tells whether both are counted."""
    monkeypatch.setattr(parts_module, "LARGE_MODEL_PARAMETERS", 1)
    for enough, warned in ((48, False), (49, True)):
        monkeypatch.setattr(parts_module, "FROM_SCRATCH_PICTURES", enough)
        caplog.clear()
        config = mpl_run(tiny_run, "run")
        parts_module.build_model(config, open_run_data(config))
        assert ("from scratch on 48 pictures" in caplog.text) == warned


def test_tensors_of_several_kinds_are_averaged_in_one_exchange(monkeypatch) -> None:
    """The other process has 2 more than this one everywhere."""
    exchanged = []
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda total: exchanged.append(total.mul_(2).add_(2)))
    tensors = [
        torch.arange(4.0),
        torch.tensor(1.5, dtype=torch.float64),
        torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.tensor([2.0, 4.0], dtype=torch.bfloat16),
    ]
    before = [tensor.clone() for tensor in tensors]
    parallel.average_over_processes(tensors)
    assert len(exchanged) == 1
    for tensor, old in zip(tensors, before, strict=True):
        assert tensor.dtype == old.dtype and tensor.stride() == old.stride()
        torch.testing.assert_close(tensor, old + 1)
    counter = torch.tensor(3)
    parallel.mean_statistics([counter])
    assert len(exchanged) == 1 and counter == 3


# Each process steps on its own pictures and writes what came of it.
TOGETHER = """
import sys, torch
from test_meta_pseudo_labels import CASES, learner_at_work
from vitrail.parallel import leave, processes, rank
torch.set_num_threads(1)
with processes():
    done = [learner_at_work(*case, slice(2 * rank(), 2 * rank() + 2)) for case in CASES]
    torch.save([(learner.models.state_dict(), row) for learner, row in done], f"{sys.argv[1]}/{rank()}.pt")
leave(0)
"""
CASES = [("vit", "meta"), ("vit", "released"), ("efficientnet", "meta")]


def learner_at_work(family: str, feedback: str, share: slice) -> tuple[MetaPseudoLabelsLearner, dict[str, float]]:
    """A learner after three updates from a share of four micro-batches each, and the last row of its log."""
    torch.manual_seed(0)
    config = (
        replace(TINY[family], dropout=0.0, drop_path=0.0)
        if family == "vit"
        else replace(TINY[family], dropout=0.0, drop_path=0.0, frozen_norm=True)
    )
    recipe = replace(SHORT, feedback=feedback, uda_threshold=0.2, finetune_steps=1)
    learner = learner_of(build(config), recipe=recipe, optim=replace(SGD, momentum=0.9, ema=0.9, lr=0.1))
    learner._baseline.fill_(0.1)  # a feedback that shows
    for step in range(5):
        learner.schedule(step, 5)
        row = learner.step(tiny_batches(family, *[(2, 4)] * 4, seed=step)[share])
    return learner, {name: value.item() for name, value in row.items()}


@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([*launcher, str(tmp_path / "together.py"), str(tmp_path)], env=environment, check=True, timeout=120)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case, (first, row), (second, _) in zip(CASES, *both, strict=True):
        alone, expected = learner_at_work(*case, slice(None))
        whole = alone.models.state_dict()
        for name, tensor in first.items():
            assert torch.equal(tensor, second[name]), f"processes differ in {name}"
            torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)
        assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)


# --- presets ---


def test_presets_have_the_released_rates_and_batches() -> None:
    small, large = (preset(name).config for name in ("wrn28-2-cifar10-4000-mpl", "efficientnet-b0-imagenet10-mpl"))
    for config, rates, pictures in ((small, (0.05, 0.05), (128, 896)), (large, (0.4, 0.6), (1024, 15_360))):
        assert (config.optim.lr, config.optim.lr * config.recipe.teacher_lr_ratio) == pytest.approx(rates)
        assert (config.loop.batch_size, config.loop.batch_size * config.recipe.unlabelled_ratio) == pictures
    assert preset("Meta Pseudo Labels (EfficientNet-L2)").config.model.image_size == (512, 512)


def test_cifar_10_is_split_as_in_the_paper() -> None:
    settings = preset("wrn28-2-cifar10-4000-mpl").config.input
    source = ArraySource(np.zeros((50_000, 1, 1, 1), np.uint8), np.arange(50_000) % 10, tuple("abcdefghij"), "cifar")
    train, val = data_module._set_aside(source, settings.val_fraction, 0, "cifar")
    options = {"channels": 1, "seed": 0, "learns_unlabelled": True}
    data = with_few_labels(Splits(train=train, val=val), settings, **options)
    assert data.train.class_counts().tolist() == [400] * 10
    assert [len(part) for part in (data.val, data.unlabelled)] == [5_000, 41_000]
