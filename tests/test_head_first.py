"""Head first, then all of it, in one run: what learns when, at which rate, and exactly so after a stop."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from torch import Tensor, nn

import vitrail.training.setup as parts_module
from vitrail.checkpoints import load_model
from vitrail.config.codec import to_json
from vitrail.config.distillation import DistillationConfig
from vitrail.config.masked import MaskedConfig
from vitrail.config.recipes import SamConfig
from vitrail.config.run import AugmentConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.data.base import Batch
from vitrail.errors import Interrupted, UserError
from vitrail.models import build, create_model
from vitrail.optim import head_steps, learning_rate, prepare
from vitrail.recipes import Learner, build_learner
from vitrail.training import Callback, run_training

CPU = torch.device("cpu")
HEAD = {"head.weight", "head.bias"}
CONFIG = replace(TINY["efficientnet"], dropout=0.3)
LABELS = ("oak", "pine", "carp", "ray", "manta")
TREE = {"tree": ["oak", "pine"], "fish": ["carp", "ray", "manta"]}
RECIPES = {
    "supervised": SupervisedConfig(),
    "sam": SamConfig(rho=0.05, l2_penalty=1e-3),
    "distillation": DistillationConfig(),
    "semantic": SemanticConfig(),
}


def make(name: str, folder: Path, optim: OptimConfig, model_config=CONFIG, precision: str = "fp32") -> Learner:
    """A learner of each kind, on a model with BatchNorm and dropout."""
    torch.manual_seed(0)
    model, teacher, recipe = build(model_config), None, RECIPES[name]
    model.labels = LABELS
    nn.init.normal_(model.head.weight, std=0.1)  # one of zeros sends no gradient into the body at first
    if name == "distillation":
        teacher = build(model_config)
        teacher.labels = LABELS
    if name == "semantic":
        (folder / "tree.json").write_text(json.dumps(TREE))
        recipe = replace(recipe, tree=str(folder / "tree.json"))
    config = RunConfig(model=model_config, recipe=recipe, optim=optim, augment=AugmentConfig(crop="none"))
    return build_learner(
        config, model, class_counts=np.ones(5, np.int64), device=CPU, precision=precision, teacher=teacher
    )


def batches(seed: int, *sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            torch.randint(0, 256, (size, 3, 32, 32), generator=generator, dtype=torch.uint8),
            torch.randint(0, 5, (size,), generator=generator),
            torch.randint(0, 2**62, (size,), generator=generator),
            cropped=True,
        )
        for size in sizes
    ]


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


# The schedule


def test_the_rate_stays_at_its_peak_for_the_head_and_then_is_that_of_a_run_of_its_own() -> None:
    optim = OptimConfig(lr=0.5, warmup_steps=4, head_first=0.2)
    rates = [learning_rate(optim, step, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([0.125, 0.25, 0.375] + [0.5] * 17)
    assert rates[20:] == [learning_rate(replace(optim, head_first=0.0), step, 80) for step in range(80)]


def test_the_head_warms_up_for_at_most_a_fifth_of_its_updates() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=1000, head_first=0.5)
    rates = [learning_rate(optim, step, 40) for step in range(20)]
    assert rates == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 17)


@pytest.mark.parametrize(("share", "total", "steps"), [(0.0, 10, 0), (0.25, 10, 2), (0.9, 1, 0), (0.99, 10, 9)])
def test_a_share_becomes_whole_updates_and_leaves_one_for_all_else(share: float, total: int, steps: int) -> None:
    assert head_steps(OptimConfig(head_first=share), total) == steps


def test_a_run_of_the_head_alone_has_one_phase() -> None:
    optim = OptimConfig(train="head", head_first=0.5, warmup_steps=2)
    assert head_steps(optim, 100) == 0
    assert learning_rate(optim, 60, 100) == learning_rate(replace(optim, head_first=0.0), 60, 100)


def test_a_share_that_is_none_is_refused() -> None:
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="head-first"):
            OptimConfig(head_first=share)
    with pytest.raises(UserError, match=r"--optim\.head-first: this model has no head"):
        prepare(create_model("vit-ti16", num_classes=0, depth=1), OptimConfig(head_first=0.1))


# What learns


@pytest.mark.parametrize("name", RECIPES)
def test_the_body_waits_bit_for_bit_and_then_learns(name: str, tmp_path: Path) -> None:
    """Its statistics and its decay too; and the average follows both."""
    learner = make(name, tmp_path, OptimConfig(lr=1e-2, weight_decay=0.3, head_first=0.5, ema=0.5))
    start = weights(learner)
    for step in range(2):
        learner.schedule(step, 4)
        assert not any(module.training for module in learner.model.modules())
        learner.step(batches(step, 4, 4))
    assert changed(start, weights(learner)) == HEAD
    assert learner.average is not None
    assert changed(start, learner.average.average) == HEAD
    for step in (2, 3):
        learner.schedule(step, 4)
        assert learner.model.training
        learner.step(batches(step, 4, 4))
    assert changed(start, weights(learner)) == start.keys()
    assert changed(start, learner.average.average) == start.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_no_gradient_is_computed_behind_the_head(name: str, tmp_path: Path) -> None:
    learner = make(name, tmp_path, OptimConfig(head_first=0.5))
    learner.schedule(0, 4)
    learner.step(batches(0, 4))
    assert {n for n, p in learner.model.named_parameters() if p.grad is not None} == HEAD
    learner.schedule(2, 4)
    learner.step(batches(0, 4))
    assert all(p.grad is not None for p in learner.model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adafactor", "adam", "rmsprop"])
def test_the_body_begins_as_in_a_run_of_its_own(optimizer: str, tmp_path: Path) -> None:
    """Its optimizer has no memory of the updates that were the head's: the same step as from these weights afresh."""
    optim = OptimConfig(name=optimizer, lr=1e-2, weight_decay=0.1, clip_norm=0.0)
    late = make("supervised", tmp_path, replace(optim, head_first=0.5))
    for step in range(3):
        late.schedule(step, 6)
        late.step(batches(step, 4))
    fresh = make("supervised", tmp_path, optim)
    fresh.model.load_state_dict(late.model.state_dict())
    for learner, step in ((late, 3), (fresh, 0)):
        torch.manual_seed(7)
        learner.schedule(step, step + 3)
        learner.step(batches(9, 4))
    ours, theirs = weights(late), weights(fresh)
    assert changed(ours, theirs) <= HEAD


def test_frozen_statistics_stay_frozen_when_all_learns(tmp_path: Path) -> None:
    learner = make("supervised", tmp_path, OptimConfig(head_first=0.5), replace(CONFIG, frozen_norm=True))
    before = {name: buffer.clone() for name, buffer in learner.model.named_buffers()}
    for step in range(4):
        learner.schedule(step, 4)
        learner.step(batches(step, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in learner.model.named_buffers())


def test_scaling_for_fp16_survives_the_border(tmp_path: Path, monkeypatch) -> None:
    """The scaler sees another set of gradients from one update to the next; nothing overflows, so fp32's steps come."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=256.0))
    ends = []
    for precision in ("fp32", "fp16"):
        learner = make("supervised", tmp_path, OptimConfig(name="sgd", head_first=0.5), precision=precision)
        for step in range(4):
            torch.manual_seed(step)
            learner.schedule(step, 4)
            assert learner.step(batches(step, 4))["gradient_norm"].isfinite()
        ends.append(weights(learner))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-2, atol=1e-2)


def test_masked_pre_training_has_no_head_to_go_first() -> None:
    config = RunConfig(model=TINY["vit"], recipe=MaskedConfig(), optim=OptimConfig(head_first=0.1))
    with pytest.raises(UserError, match=r"--optim\.head-first"):
        build_learner(config, build(TINY["vit"]), class_counts=np.ones(5, np.int64), device=CPU, precision="fp32")


# Whole runs


class StopAt(Callback):
    """Ask the run to stop after an update."""

    def __init__(self, step: int) -> None:
        self.step_to_stop = step

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step_to_stop and "val" not in row:
            os.kill(os.getpid(), 15)


FILES = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")


@pytest.fixture(scope="module")
def straight() -> dict[str, dict[str, bytes]]:
    """What runs leave that were never stopped, by recipe; filled by the first test that needs one."""
    return {}


@pytest.mark.parametrize(("name", "stop"), [("supervised", 2), ("supervised", 4), ("supervised", 5), ("sam", 4)])
def test_a_run_stopped_in_the_head_at_the_border_or_after_goes_on_bit_for_bit(
    tiny_run, straight, name: str, stop: int
) -> None:
    settings = {"model": replace(CONFIG, image_size=(16, 16)), "recipe": RECIPES[name], "optim__head_first": 0.5}
    settings |= {"optim__ema": 0.9, "loop__steps": 8, "loop__eval_every": 8, "loop__save_every": 8}
    if name not in straight:
        config = tiny_run("straight", **settings)
        run_training(config)
        straight[name] = {file: (Path(config.out) / file).read_bytes() for file in FILES}
    config = tiny_run("stopped", **settings)
    with pytest.raises(Interrupted):
        run_training(config, [StopAt(stop)])
    run_training(replace(config, resume=True))
    for file in FILES:
        assert (Path(config.out) / file).read_bytes() == straight[name][file], file


def test_minutes_count_the_cheap_updates_as_cheap(tiny_run, monkeypatch) -> None:
    """A fourth of the run at 1 s per update, the rest at 3 s: 2.5 s on average."""
    monkeypatch.setattr(parts_module, "_measured", lambda learner, *_: 3.0 if learner.model.training else 1.0)
    config = tiny_run(minutes=50.0, optim__head_first=0.25, input__val_fraction=0.2)
    parts = parts_module.assemble(config, parts_module.open_run_data(config), CPU, "fp32")
    seconds = parts_module.seconds_per_step(config, parts)
    evaluations = 11 * 12 / 8 * 2.5 / 3
    assert seconds == pytest.approx(2.5 / (1 - evaluations / 3000), rel=1e-6)
    parts.stream.close()


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
def test_two_processes_equal_one_across_the_border(tiny_run, tmp_path: Path) -> None:
    """Replicas wait for the gradients of what learns, before and after. SAM without a radius is supervised learning."""
    settings = {"model__dropout": 0.0, "augment__mixup": 0.0, "model__qkv_bias": False, "optim__head_first": 0.5}
    settings |= {"optim__ema": 0.9, "loop__accumulation": 2}
    script, ends = tmp_path / "run.py", []
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start, recipe in (
        ("one", [sys.executable], SupervisedConfig()),
        ("two", launcher, SupervisedConfig()),
        ("two-sam", launcher, SamConfig(rho=0.0)),
    ):
        config = tiny_run(name, recipe=recipe, **settings)
        (tmp_path / f"{name}.json").write_text(json.dumps(to_json(config)))
        command = [*start, str(script), str(tmp_path / f"{name}.json")]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=180)
        ends.append(load_model(Path(str(config.out)) / "last").state_dict())
    for together in ends[1:]:
        for name, tensor in ends[0].items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-5)
