"""Distillation: the losses of the papers, a teacher that sees what the student sees, and runs that go on exactly."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import vitrail.training.setup as parts_module
from vitrail.checkpoints import load_model, save_model
from vitrail.config.codec import from_json, to_json
from vitrail.config.distillation import DistillationConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig, OptimConfig, RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.errors import Interrupted, UserError
from vitrail.losses import hard_distance, soft_distance
from vitrail.models import build
from vitrail.models.base import ImageModel, WithLoss
from vitrail.presets import preset
from vitrail.recipes.distillation import DistillationLearner
from vitrail.recipes.teacher import Teacher
from vitrail.training import Callback, run_training

CPU = torch.device("cpu")
LABELS = ("apple", "leaf", "sky")
STUDENT = ViTConfig(image_size=(16, 16), patch_size=(8, 8), width=16, depth=1, mlp_dim=16, heads=2, num_classes=3)
SGD = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0)


def model_of(
    config: ViTConfig = STUDENT, labels: tuple[str, ...] = LABELS, seed: int = 0, **view: object
) -> ImageModel:
    torch.manual_seed(seed)
    model = build(replace(config, num_classes=len(labels)))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    model.labels = labels
    model.preprocessing = replace(model.preprocessing, **view)
    return model


def make(
    student: ImageModel | None = None,
    teacher: ImageModel | None = None,
    *,
    augment: AugmentConfig | None = None,
    optim: OptimConfig = SGD,
    precision: str = "fp32",
    **recipe: object,
) -> DistillationLearner:
    student = student or model_of()
    return DistillationLearner(
        student,
        DistillationConfig(**recipe),
        optim,
        augment=Augment(augment or AugmentConfig(crop="none", flip=0.0), student.preprocessing),
        class_counts=np.ones(3, np.int64),
        device=CPU,
        precision=precision,
        teacher=model_of(seed=1) if teacher is None else teacher,
    )


def batches(*sizes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8),
            torch.randint(0, 3, (size,), generator=generator),
            torch.randint(0, 2**62, (size,), generator=generator),
            cropped=True,
        )
        for size in sizes
    ]


# The losses


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(2, 9), st.floats(0.5, 20.0))
def test_the_soft_distance_is_the_papers(seed: int, pictures: int, classes: int, temperature: float) -> None:
    """Cross-entropy of softened probabilities less what the teacher's alone has, in float64, times T squared."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.normal(scale=4, size=(2, pictures, classes))

    def softened(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits / temperature)
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = softened(theirs), softened(ours)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1)
    found = soft_distance(torch.tensor(ours).float(), torch.tensor(theirs).float(), temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4 * temperature)


def test_at_high_temperature_it_matches_logits() -> None:
    """The paper's limit (section 2.1): gradient (z - v) / N for centred logits, whatever the temperature is."""
    ours = torch.tensor([[1.0, -2.0, 1.0]], requires_grad=True)
    theirs = torch.tensor([[0.5, 0.5, -1.0]])
    (gradient,) = torch.autograd.grad(soft_distance(ours, theirs, 200.0).sum(), ours)
    torch.testing.assert_close(gradient, (ours.detach() - theirs) / 3, rtol=0.02, atol=0.01)


def test_the_hard_distance_takes_the_teachers_likeliest_class_for_the_label() -> None:
    ours, theirs = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(hard_distance(ours, theirs), F.cross_entropy(ours, theirs.argmax(1), reduction="none"))


def test_no_gradient_reaches_the_teacher() -> None:
    ours, theirs = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    soft_distance(ours, theirs, 2.0).sum().backward()
    assert theirs.grad is None


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_loss_is_both_parts_by_their_shares(kind: str) -> None:
    """With label smoothing, which is the labels' alone, and pictures mixed, which the teacher sees mixed."""
    augment = AugmentConfig(crop="none", flip=0.0, mixup=1.0)
    student, teacher = model_of(), model_of(seed=1)
    (batch,) = batches(6)
    images, targets = Augment(augment, student.preprocessing)(batch, classes=3)
    with torch.no_grad():
        logits, wanted = student.eval()(images), teacher.eval()(images)
        smoothed = 0.9 * targets + 0.1 / 3
        labelled = -(smoothed * logits.log_softmax(1)).sum(1).mean()
        soft = 9 * F.kl_div((logits / 3).log_softmax(1), (wanted / 3).softmax(1), reduction="batchmean")
        taught = soft if kind == "soft" else F.cross_entropy(logits, wanted.argmax(1))
    assert ((targets > 0) & (targets < 1)).any(), "nothing was mixed"
    share = 0.3 if kind == "soft" else 0.5
    learner = make(student, teacher, augment=augment, kind=kind, temperature=3.0, alpha=0.3, label_smoothing=0.1)
    row = learner.step([batch])
    torch.testing.assert_close(row["distance"], taught, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(row["loss"], share * labelled + (1 - share) * taught, rtol=1e-4, atol=1e-6)


def test_a_models_own_loss_counts_in_full() -> None:
    """Whatever the shares of labels and teacher are."""
    config, losses = replace(TINY["vit-moe"], image_size=(16, 16), num_classes=3), []
    for alpha in (0.0, 1.0):
        torch.manual_seed(0)
        student = build(config)
        student.labels = LABELS
        learner = make(student, model_of(), alpha=alpha)
        torch.manual_seed(5)
        row = learner.step(batches(8))
        losses.append((row["loss"], row["distance"]))
    torch.manual_seed(5)
    (batch,) = batches(8)
    torch.manual_seed(0)
    again = build(config).train()
    torch.manual_seed(5)
    answer = again(batch.images / 127.5 - 1)
    assert isinstance(answer, WithLoss)
    assert answer.loss > 1e-4
    torch.testing.assert_close(losses[0][0] - losses[0][1], answer.loss.detach(), rtol=1e-3, atol=1e-6)
    labelled = F.cross_entropy(answer.logits, batch.targets)
    torch.testing.assert_close(losses[1][0], (labelled + answer.loss).detach(), rtol=1e-4, atol=1e-6)


# The teacher


def test_the_teacher_reads_the_same_picture_at_its_own_size_and_in_its_own_colours() -> None:
    student = model_of(mean=(0.3,), std=(0.2,))
    big = replace(STUDENT, image_size=(32, 24))
    teacher = model_of(big, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), interpolation="bilinear")
    levels = torch.rand(2, 3, 16, 16) * 255
    view = Teacher(teacher, student, CPU).view((levels / 255 - 0.3) / 0.2)
    expected = F.interpolate(levels, (32, 24), mode="bilinear", align_corners=False) / 255
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(view, (expected - mean.view(3, 1, 1)) / std.view(3, 1, 1), rtol=1e-3, atol=1e-3)


def test_half_precision_does_not_blur_the_teachers_pictures() -> None:
    student, teacher = model_of(), model_of(replace(STUDENT, image_size=(24, 24)))
    taught, images = Teacher(teacher, student, CPU), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        view = taught.view(images)
    assert torch.equal(view, taught.view(images))


def test_classes_are_found_by_name() -> None:
    student = model_of()
    teacher = model_of(labels=("sky", "stone", "apple", "leaf"), seed=2)
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(Teacher(teacher, student, CPU)(images), teacher(images)[:, [2, 3, 0]].detach())


def test_the_teacher_stays_as_it_is() -> None:
    config = replace(TINY["efficientnet"], image_size=(16, 16), num_classes=3)
    torch.manual_seed(0)
    teacher = build(config).train()
    teacher.labels = LABELS
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    learner = make(teacher=teacher, optim=replace(SGD, ema=0.5))
    learner.step(batches(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    state = learner.state_dict()
    assert set(state["models"]) == {"model"}
    assert not learner.model._forward_pre_hooks


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (model_of(labels=("apple", "leaf", "cloud")), r"'sky' is missing \(1 of the data's 3"),
        (model_of(labels=("apple", "leaf", "sky", "sky")), "'sky' is there more than once"),
        (model_of(replace(STUDENT, channels=1), channels=1), r"--model\.channels"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher: ImageModel, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(teacher=teacher)


def test_a_teacher_without_names_or_of_several_labels_is_refused() -> None:
    nameless, several = model_of(), model_of()
    nameless.labels = ()
    several.multi_label = True
    with pytest.raises(UserError, match="no names"):
        make(teacher=nameless)
    with pytest.raises(UserError, match="one label per picture"):
        make(teacher=several)


def test_what_is_out_of_range_is_refused() -> None:
    for recipe in ({"temperature": 0.0}, {"alpha": 1.1}, {"label_smoothing": 1.0}):
        with pytest.raises(UserError, match=next(iter(recipe)).replace("_", "-")):
            DistillationConfig(**recipe)


def test_the_preset_without_a_teacher_says_what_to_name(tiny_run) -> None:
    recipe = preset("distil").config.recipe
    assert isinstance(recipe, DistillationConfig)
    with pytest.raises(UserError, match=r"--recipe\.teacher"):
        run_training(tiny_run(recipe=recipe))


# Updates


def test_accumulation_changes_neither_step_nor_what_is_logged() -> None:
    whole, parts = make(), make()
    (batch,) = batches(8)
    chunks = [
        Batch(images, targets, keys, cropped=True)
        for images, targets, keys in zip(
            batch.images.chunk(4), batch.targets.chunk(4), batch.keys.chunk(4), strict=True
        )
    ]
    rows = [whole.step([batch]), parts.step(chunks)]
    for name in ("loss", "distance"):
        torch.testing.assert_close(rows[0][name], rows[1][name])
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_student_comes_to_answer_as_its_teacher_does() -> None:
    learner = make(optim=OptimConfig(lr=3e-3), temperature=2.0, alpha=0.0)
    distances = [float(learner.step(batches(16))["distance"]) for _ in range(80)]
    assert distances[-1] < 0.2 * distances[0]


def test_fp16_scales_both_parts_alike() -> None:
    rows = [make(precision=precision).step(batches(8)) for precision in ("fp32", "fp16")]
    torch.testing.assert_close(rows[1]["loss"], rows[0]["loss"], rtol=2e-2, atol=1e-2)


def test_settings_go_to_json_and_back() -> None:
    config = RunConfig(recipe=DistillationConfig(teacher="runs/big/best", kind="hard", alpha=0.4))
    assert from_json(RunConfig, to_json(config), "x") == config


# Whole runs


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    teacher = model_of(replace(STUDENT, image_size=(24, 24), width=24), ("leaf", "sky", "apple"), seed=3)
    teacher.preprocessing = Preprocessing(image_size=(24, 24), mean=(0.4,), std=(0.3,))
    save_model(teacher, tmp_path / "teacher")
    return tmp_path / "teacher"


class StopAt(Callback):
    """Ask the run to stop after an update."""

    def __init__(self, step: int) -> None:
        self.step_to_stop = step

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step_to_stop and "val" not in row:
            os.kill(os.getpid(), 15)


def test_a_stopped_run_goes_on_bit_for_bit_and_only_with_its_teacher(tiny_run, teacher_folder: Path) -> None:
    recipe = DistillationConfig(teacher=str(teacher_folder))
    straight, stopped = (
        tiny_run(name, recipe=recipe, optim__ema=0.9, loop__accumulation=2) for name in ("straight", "stopped")
    )
    run_training(straight)
    with pytest.raises(Interrupted):
        run_training(stopped, [StopAt(5)])
    kept = load_model(teacher_folder)
    changed = load_model(teacher_folder)
    with torch.no_grad():
        changed.head.bias.add_(0.1)
    save_model(changed, teacher_folder)
    with pytest.raises(UserError, match="teacher's weights have changed"):
        run_training(replace(stopped, resume=True))
    save_model(kept, teacher_folder)
    run_training(replace(stopped, resume=True))
    for file in ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors"):
        assert (Path(stopped.out) / file).read_bytes() == (Path(straight.out) / file).read_bytes(), file
    state = load_model(Path(straight.out) / "last").state_dict()
    assert state.keys() == build(replace(straight.model, num_classes=3)).state_dict().keys()


def test_measuring_the_length_reads_the_teacher_once(tiny_run, teacher_folder: Path, monkeypatch) -> None:
    sources: list[object] = []
    load = parts_module.load_model
    monkeypatch.setattr(parts_module, "load_model", lambda source: sources.append(source) or load(source))
    monkeypatch.setattr("vitrail.training.setup.seconds_per_step.__defaults__", (0.05,))
    run_training(tiny_run(recipe=DistillationConfig(teacher=str(teacher_folder)), minutes=0.002, loop__eval_every=0))
    assert sources == [str(teacher_folder)]


SCRIPT = """
import json, sys, torch
from vitrail.config.codec import from_json
from vitrail.config.run import RunConfig
from vitrail.parallel import leave
from vitrail.training import run_training
torch.set_num_threads(1)
run_training(from_json(RunConfig, json.load(open(sys.argv[1]))))
leave(0)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tiny_run, teacher_folder: Path, tmp_path: Path) -> None:
    settings = {"model__dropout": 0.0, "augment__mixup": 0.0, "model__qkv_bias": False, "loop__accumulation": 2}
    settings |= {"recipe": DistillationConfig(teacher=str(teacher_folder))}
    (tmp_path / "run.py").write_text(SCRIPT)
    states: list[dict[str, Tensor]] = []
    for name, start in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        config = tiny_run(name, **settings)
        (tmp_path / f"{name}.json").write_text(json.dumps(to_json(config)))
        command = [*start, str(tmp_path / "run.py"), str(tmp_path / f"{name}.json")]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=120)
        states.append(load_model(Path(str(config.out)) / "last").state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-5, atol=1e-5)
