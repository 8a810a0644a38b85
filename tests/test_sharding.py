"""Weights spread over processes: the same updates and the same run, whatever the layout."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import TINY
from test_processes import environment, torchrun, write_script

from vitrail.checkpoints import load_model
from vitrail.config.run import LoopConfig, OptimConfig, RunConfig
from vitrail.errors import UserError
from vitrail.models import build
from vitrail.optim import build_optimizer
from vitrail.parallel import processes
from vitrail.planner.gpus import GPUS
from vitrail.planner.layouts import layouts
from vitrail.sharding import of_first_process, shard
from vitrail.training import run_training
from vitrail.training.placing import place

CPU = torch.device("cpu")
CLOSE = 1e-5
"""What rounding in another order leads to in 20 updates."""
Found = dict[str, dict[str, float]]


def found_by(processes: int, folder: Path) -> Found:
    """Return what `sharded_updates.py` finds."""
    result = folder / "found.json"
    script = [str(Path(__file__).with_name("sharded_updates.py")), str(result)]
    subprocess.run(torchrun(processes, script), env=environment(), check=True, timeout=300)
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return found_by(4, tmp_path_factory.mktemp("four"))


def check_updates(found: dict[str, float], layouts: list[str]) -> None:
    """Check that micro-batches, clipping, averages and every recipe lead to where one process gets."""
    for recipe in ("supervised", "sam", "meta pseudo labels"):
        assert {f"{recipe}, {layout}" for layout in layouts} <= found.keys()
    assert {case: far for case, far in found.items() if not far <= CLOSE} == {}


@pytest.mark.slow
def test_two_processes_learn_what_one_does(by_two: Found) -> None:
    check_updates(by_two["recipes"], ["ddp", "full"])


@pytest.mark.slow
def test_optimizers_step_as_with_whole_weights(by_two: Found) -> None:
    assert len(by_two["optimizers"]) == 5
    assert {case: far for case, far in by_two["optimizers"].items() if not far <= CLOSE} == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["frozen norms", "compiled, computed again", "head first", "student fine-tuned"])
def test_layouts_are_the_same_beside_other_settings(by_two: Found, case: str) -> None:
    assert by_two["others"][case] <= CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_as_close_as_it_can_tell(by_two: Found, precision: str) -> None:
    assert 0 < by_two["others"][precision] < 0.01  # three updates of at most 0.001 each, in either direction


@pytest.mark.slow
def test_a_state_goes_from_two_processes_to_one_and_to_two(by_two: Found) -> None:
    assert len(by_two["states"]) == 15
    assert {case for case, same in by_two["states"].items() if not same} == set()


@pytest.mark.slow
def test_a_process_holds_its_part_alone(by_two: Found) -> None:
    assert by_two["held"]["full"] < 0.55  # axes of odd length are not cut in half


@pytest.mark.slow
def test_four_processes_learn_what_one_does(by_four: Found) -> None:
    check_updates(by_four["recipes"], ["ddp", "full", "hybrid"])


@pytest.mark.slow
def test_a_state_goes_from_four_processes_in_two_machines_to_one_and_to_four(by_four: Found) -> None:
    assert {case for case, same in by_four["states"].items() if not same} == set()


@pytest.mark.slow
def test_four_processes_hold_their_parts_alone(by_four: Found) -> None:
    assert by_four["held"]["full"] < 0.3
    assert 0.5 <= by_four["held"]["hybrid"] < 0.55


@pytest.mark.slow
def test_a_sharded_run_is_the_run_of_one_process_and_goes_on_in_one(
    tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    settings = {"model__dropout": 0.0, "model__qkv_bias": False, "optim__ema": 0.9, "loop__sharding": "full"}
    # 13 pictures to validate on leave one of two processes without any in the last round
    settings |= {"input__val_fraction": 0.22, "loop__keep": 5, "augment__mixup": 0.0}
    one, two = tiny_run("one", **settings), tiny_run("two", **settings)
    run_training(one)
    subprocess.run(torchrun(2, write_script(tmp_path, two)), env=environment(), check=True, timeout=180)
    check_same_run(one, two)
    again = tiny_run("again", resume=True, **settings)
    shutil.copytree(str(two.out), str(again.out))
    for late in ("step-00000012", "step-00000008"):
        shutil.rmtree(Path(str(again.out)) / "checkpoints" / late)
    run_training(again)
    check_same_run(one, again)


def check_same_run(one: RunConfig, other: RunConfig) -> None:
    for name in ("last", "best"):
        alone, together = (load_model(Path(str(c.out)) / name).state_dict() for c in (one, other))
        for tensor in alone:
            torch.testing.assert_close(together[tensor], alone[tensor], rtol=1e-5, atol=1e-5)
    logs = ((Path(str(c.out)) / "metrics.jsonl").read_text().splitlines() for c in (one, other))
    for a, b in zip(*(map(json.loads, log) for log in logs), strict=True):
        if "val" in a:
            assert b["val"]["top1"] == a["val"]["top1"]
        else:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_one_process_needs_no_other(tiny_run: Callable[..., RunConfig]) -> None:
    plain, sharded = tiny_run("plain", loop__steps=2), tiny_run("sharded", loop__steps=2, loop__sharding="hybrid")
    states = [load_model(run_training(config).folder / "last").state_dict() for config in (plain, sharded)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.fixture
def lonely_group(monkeypatch: pytest.MonkeyPatch):
    """A job of one process."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with processes():
        yield


def test_batch_norm_without_a_gpu_is_refused(lonely_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitrail.training.placing.world_size", lambda: 2)
    run = RunConfig(model=TINY["efficientnet"], loop=LoopConfig(sharding="full"))
    model = build(run.model).train()
    with pytest.raises(UserError, match=r"BatchNorm.*--model\.frozen-norm"):
        place(run, "fp32", model, model, CPU)


def test_moments_in_8_bits_are_refused(lonely_group: None) -> None:
    model = build(TINY["vit"])
    shard(model, model.blocks(), "full", CPU)
    with pytest.raises(UserError, match=r"--optim\.moments 8bit.*--loop\.sharding"):
        build_optimizer(model, OptimConfig(moments="8bit"))


def test_machines_of_different_sizes_are_refused(lonely_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of one process in all
    model = build(TINY["vit"])
    with pytest.raises(UserError, match=r"--loop\.sharding hybrid needs equally many"):
        shard(model, model.blocks(), "hybrid", CPU)


def test_a_model_comes_from_the_first_process_as_it_was(lonely_group: None) -> None:
    model = build(TINY["vit"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard(model, model.blocks(), "full", CPU)
    after = model.state_dict()
    assert all(torch.equal(after[name].full_tensor(), tensor) for name, tensor in before.items())


def test_the_planner_says_how_to_spread() -> None:
    flags = {each.name: each.flags for each in layouts(GPUS["h100"], 16, TINY["vit"])}
    assert flags == {"DDP": "", "FSDP": "--loop.sharding full", "hybrid": "--loop.sharding hybrid"}


def test_a_mistake_of_the_first_process_is_raised(lonely_group: None) -> None:
    def make() -> torch.nn.Module:
        raise UserError("no such weights")

    with pytest.raises(UserError, match="no such weights"):
        of_first_process(make)
