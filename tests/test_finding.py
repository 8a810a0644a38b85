"""Learning rate and batch size found when asked: near what is known to be good, once, and without a trace."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import PixelModel

from vitrail.config.codec import to_json
from vitrail.config.run import AugmentConfig, LoopConfig, OptimConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.errors import Interrupted, UserError
from vitrail.models.base import WithLoss
from vitrail.parallel import alone, rank, world_size
from vitrail.recipes.supervised import SupervisedLearner
from vitrail.training import Callback, finding, run_training
from vitrail.training.finding import (
    find_settings,
    is_out_of_memory,
    measure_batch_sizes,
    pick_batch_size,
    pick_learning_rate,
    sweep,
)
from vitrail.training.setup import Parts, assemble, open_run_data
from vitrail.training.signals import StopRequest

CPU = torch.device("cpu")
RATES = np.geomspace(finding.LOWEST, finding.HIGHEST, finding.STEPS)


class Bowl(PixelModel):
    """Half the curvature times the squared distance of 20 weights from where each picture wants them."""

    def __init__(self, curvature: float) -> None:
        super().__init__(ViTConfig(image_size=(1, 1), patch_size=(1, 1), channels=1, num_classes=2))
        self.curvature = curvature
        self.weight = nn.Parameter(torch.full((20,), 10.0))

    def forward(self, images: Tensor) -> WithLoss:
        wanted = images.flatten(1)  # in [-1, 1]
        own = 0.5 * self.curvature * (self.weight - wanted).square().sum(dim=1).mean()
        return WithLoss(torch.zeros(len(images), 2), own)


def bowl_learner(curvature: float, **optim: object) -> SupervisedLearner:
    model = Bowl(curvature)
    settings = {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": 0.0, "warmup_steps": 50}
    return SupervisedLearner(
        model,
        SupervisedConfig(),
        OptimConfig(**settings | optim),
        augment=Augment(AugmentConfig(crop="none", flip=0.0), model.preprocessing),
        class_counts=np.ones(2, np.int64),
        device=CPU,
        precision="fp32",
    )


def noise(pictures: int = 4) -> Iterator[list[Batch]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        images = torch.randint(0, 256, (pictures, 1, 1, 1), generator=generator, dtype=torch.uint8)
        yield [Batch(images, torch.zeros(pictures, dtype=torch.int64), torch.arange(pictures), cropped=True)]


@pytest.fixture
def fast(monkeypatch) -> None:
    monkeypatch.setattr(finding, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(finding, "STEPS", 25)
    monkeypatch.setattr(finding, "UPDATES_PER_EPOCH", 1)


# The learning rate


@pytest.mark.parametrize("curvature", [0.3, 1.0, 100.0, 3000.0])
def test_the_rate_of_a_bowl_is_found_within_a_factor(curvature: float) -> None:
    """Gradient descent converges below 2 / curvature, fastest at 1 / curvature; noise asks for less."""
    lr = pick_learning_rate(sweep(bowl_learner(curvature), noise(), StopRequest(), CPU))
    assert lr is not None
    assert 0.1 / curvature <= lr <= 1.0 / curvature


def test_rates_rise_from_lowest_to_highest_whatever_the_schedule_of_the_run_is() -> None:
    learner = bowl_learner(1e-4, schedule="cosine", lr=0.5, min_lr=0.1, head_first=0.0)
    curve = sweep(learner, noise(), StopRequest(), CPU)
    np.testing.assert_allclose([lr for lr, _ in curve], RATES, rtol=1e-9)
    assert learner.optimizers["model"].param_groups[0]["lr"] == pytest.approx(finding.HIGHEST)


def test_it_ends_where_the_loss_explodes() -> None:
    curve = sweep(bowl_learner(1000.0), noise(), StopRequest(), CPU)
    assert 30 < len(curve) < finding.STEPS
    assert all(math.isfinite(loss) for _, loss in curve)


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_outliers_do_not_move_what_is_picked_far(seed: int) -> None:
    rng = np.random.default_rng(seed)
    position = np.log10(RATES)
    losses = 2.3 - 0.8 / (1 + np.exp(-3 * (position + 3))) + np.maximum(0, position + 1.5) ** 2
    losses = losses + rng.normal(scale=0.05, size=len(losses))
    losses[rng.integers(0, 100, size=5)] = 0.1
    lr = pick_learning_rate(list(zip(RATES.tolist(), losses.tolist(), strict=True)))
    assert lr is not None
    assert 10**-1.5 / 3 / 3 < lr < 10**-1.5 / 3 * 3


@pytest.mark.parametrize("seed", range(5))
def test_where_nothing_is_learned_nothing_is_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat = (2.3 + rng.normal(scale=0.2, size=100)).tolist()
    assert pick_learning_rate(list(zip(RATES.tolist(), flat, strict=True))) is None
    assert pick_learning_rate([(1e-6, 2.3), (2e-6, 1.0)]) is None


def test_all_learns_in_the_test_where_the_head_goes_first(tiny_run, fast) -> None:
    config = tiny_run(optim__head_first=0.5)
    with parts_of(config) as parts:
        before = parts.learner.model.positions.clone()
        sweep(parts.learner, parts.stream, StopRequest(), CPU)
        assert parts.learner.model.training
        assert not torch.equal(parts.learner.model.positions, before)


# The batch size


def test_the_largest_or_the_smallest_that_is_fast_is_picked() -> None:
    rates = {8: 50.0, 16: 96.0, 32: 100.0, 64: 99.0, 128: 80.0}
    assert pick_batch_size(rates, prefer_large=True) == 64
    assert pick_batch_size(rates, prefer_large=False) == 16


def test_a_cpu_stops_when_more_pictures_bring_no_speed(tiny_run, fast, monkeypatch) -> None:
    rates = {1: 1.0, 2: 1.9, 4: 2.5, 8: 2.55, 16: 2.5, 32: 9.0}
    asked: list[int] = []

    def rate(config, parts) -> float:
        asked.append(config.loop.batch_size)
        return rates[config.loop.batch_size]

    monkeypatch.setattr(finding, "_rate", rate)
    monkeypatch.setattr(finding, "SMALLEST", 1)
    with parts_of(tiny_run()) as parts:
        found = measure_batch_sizes(tiny_run(), parts, StopRequest())
    assert asked == [1, 2, 4, 8, 16]
    assert pick_batch_size(found, prefer_large=False) == 4


def test_sizes_that_do_not_fit_are_left_out(tiny_run, fast, monkeypatch) -> None:
    step = SupervisedLearner.step

    def limited(learner, micro_batches):
        if max(len(batch) for batch in micro_batches) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(learner, micro_batches)

    monkeypatch.setattr(SupervisedLearner, "step", limited)
    with parts_of(tiny_run()) as parts:
        assert list(measure_batch_sizes(tiny_run(), parts, StopRequest())) == [8]
        split = tiny_run(loop__accumulation=2)
        assert list(measure_batch_sizes(split, parts, StopRequest())) == [8, 16]
        monkeypatch.setattr(finding, "SMALLEST", 16)
        with pytest.raises(UserError, match=r"batch of 16\. Raise --loop\.accumulation"):
            measure_batch_sizes(tiny_run(), parts, StopRequest())


def test_a_mistake_is_no_lack_of_memory(tiny_run, fast, monkeypatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(SupervisedLearner, "step", failing)
    with parts_of(tiny_run()) as parts, pytest.raises(RuntimeError, match="shapes"):
        measure_batch_sizes(tiny_run(), parts, StopRequest())


def test_lack_of_memory_is_known_by_its_words() -> None:
    for problem in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ):
        assert is_out_of_memory(problem)
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    assert not is_out_of_memory(None)


@pytest.mark.parametrize(("pictures", "accumulation", "sizes"), [(48, 1, [8]), (3, 1, [2]), (700, 3, [12, 24])])
def test_epochs_keep_updates_and_batches_fit_the_data(pictures, accumulation, sizes, monkeypatch, tiny_run) -> None:
    monkeypatch.setattr(finding, "_rate", lambda config, parts: float(config.loop.batch_size))
    parts = Parts.__new__(Parts)
    parts.data, parts.device = type("Data", (), {"train": range(pictures)})(), CPU
    config = replace(tiny_run(), loop=LoopConfig(batch_size=12, accumulation=accumulation))
    assert list(measure_batch_sizes(config, parts, StopRequest())) == sizes


def test_alone_a_process_is_the_only_one(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert rank() == 3
    with alone():
        assert (rank(), world_size()) == (0, 1)
    assert rank() == 3


# Whole runs


class parts_of:
    """The parts of a run, closed at the end."""

    def __init__(self, config) -> None:
        self.config = config

    def __enter__(self) -> Parts:
        self.parts = assemble(self.config, open_run_data(self.config), CPU, "fp32")
        return self.parts

    def __exit__(self, *_: object) -> None:
        self.parts.stream.close()


class StopAt(Callback):
    """Ask the run to stop after an update."""

    def __init__(self, step: int) -> None:
        self.step_to_stop = step

    def metrics(self, row: dict) -> None:
        if row["step"] == self.step_to_stop and "val" not in row:
            os.kill(os.getpid(), signal.SIGTERM)


FILES = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")


def test_measuring_touches_nothing_of_the_run(tiny_run, fast) -> None:
    config = tiny_run(find_lr=True, find_batch_size=True, augment__policy="none")
    with parts_of(config) as parts:
        learner, stream, weights = parts.learner, parts.stream, parts.learner.state_dict()
        weights = {name: tensor.clone() for name, tensor in weights["models"]["model"].items()}
        generator = torch.get_rng_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finding, "begin_again", lambda config, parts: None)
            find_settings(config, parts, StopRequest())
        assert parts.learner is learner
        assert parts.stream is stream
        assert torch.equal(torch.get_rng_state(), generator)
        assert stream.state_dict()["position"] == 0
        assert all(torch.equal(tensor, weights[name]) for name, tensor in learner.model.state_dict().items())
        assert not learner.optimizers["model"].state_dict()["state"]


def test_a_run_with_what_was_found_is_the_run_with_it_said_and_resumes_with_it(tiny_run, fast, monkeypatch) -> None:
    """Measured once: a run that goes on does not measure again."""
    settings = {"augment__policy": "none", "loop__steps": 8}
    asked = tiny_run("asked", find_lr=True, find_batch_size=True, **settings)
    with pytest.raises(Interrupted):
        run_training(asked, [StopAt(5)])
    document = json.loads((Path(asked.out) / "config.json").read_text())
    resolved, found = document["resolved"], document["found"]
    assert document["requested"]["find_lr"] and not resolved["find_lr"] and not resolved["find_batch_size"]
    assert resolved["optim"]["lr"] == pick_learning_rate([tuple(point) for point in found["losses"]])
    assert resolved["optim"]["lr"] != asked.optim.lr
    assert str(resolved["loop"]["batch_size"]) in found["pictures_per_second"]
    monkeypatch.setattr("vitrail.training.find_settings", lambda *_: pytest.fail("measured again"))
    run_training(replace(asked, resume=True))
    lr, batch_size = resolved["optim"]["lr"], resolved["loop"]["batch_size"]
    said = tiny_run("said", optim__lr=lr, loop__batch_size=batch_size, **settings)
    run_training(said)
    for file in FILES:
        assert (Path(asked.out) / file).read_bytes() == (Path(said.out) / file).read_bytes(), file
    with pytest.raises(UserError, match="find_lr was True, now False"):
        run_training(replace(asked, find_lr=False, resume=True))


def test_where_no_rate_helps_the_one_asked_for_stays_and_this_is_said(tiny_run, fast, monkeypatch, caplog) -> None:
    monkeypatch.setattr(finding, "pick_learning_rate", lambda curve: None)
    config = tiny_run(find_lr=True, loop__steps=1)
    run_training(config)
    assert json.loads((Path(config.out) / "config.json").read_text())["resolved"]["optim"]["lr"] == config.optim.lr
    assert "found no learning rate" in caplog.text


def test_a_larger_batch_leaves_the_rate_and_says_how_they_belong(tiny_run, fast, monkeypatch, caplog) -> None:
    monkeypatch.setattr(finding, "_rate", lambda config, parts: float(config.loop.batch_size))
    with caplog.at_level("INFO", "vitrail"), parts_of(tiny_run(find_batch_size=True)) as parts:
        found = find_settings(tiny_run(find_batch_size=True), parts, StopRequest())
        assert next(parts.stream)[0].images.shape[0] == 32
    assert found.config.loop.batch_size == 32
    assert found.config.optim == tiny_run().optim
    assert "--optim.lr 0.003 was chosen for batches of 8" in caplog.text
    assert "SGD would take 0.012 now, AdamW 0.006" in caplog.text


@pytest.mark.parametrize("wish", ["find_lr", "find_batch_size"])
def test_a_signal_ends_the_measuring_before_the_run_has_begun(tiny_run, fast, wish: str) -> None:
    config, stop = tiny_run(**{wish: True}), StopRequest()
    stop.signal = signal.SIGTERM
    with parts_of(config) as parts, pytest.raises(Interrupted, match="has not begun") as caught:
        find_settings(config, parts, stop)
    assert caught.value.signal == signal.SIGTERM


SCRIPT = """
import itertools, json, os, sys, types, torch
from vitrail.config.codec import from_json
from vitrail.config.run import RunConfig
from vitrail.parallel import leave
from vitrail.recipes.supervised import SupervisedLearner
from vitrail.training import finding, run_training
torch.set_num_threads(1)
finding.UPDATES_PER_EPOCH, finding.STEPS = 1, 25
second = os.environ["RANK"] == "1"
ticks = itertools.count(step=3 if second else 1)
finding.time = types.SimpleNamespace(perf_counter=lambda: next(ticks))
step = SupervisedLearner.step
def limited(learner, micro_batches):
    if second and len(micro_batches[0]) > 8:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return step(learner, micro_batches)
SupervisedLearner.step = limited
run_training(from_json(RunConfig, json.load(open(sys.argv[1]))))
leave(0)
"""


@pytest.mark.slow
def test_processes_agree_though_one_is_slower_and_has_less_memory(tiny_run, tmp_path: Path) -> None:
    config = tiny_run(find_lr=True, find_batch_size=True, loop__steps=4)
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "run.json").write_text(json.dumps(to_json(config)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(tmp_path / "run.py"), str(tmp_path / "run.json")]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    document = json.loads((Path(str(config.out)) / "config.json").read_text())
    assert document["resolved"]["loop"]["batch_size"] in (8, 16)  # at most 8 in each of two
    assert max(map(int, document["found"]["pictures_per_second"])) == 16
    assert (Path(str(config.out)) / "last" / "model.safetensors").is_file()
