"""Checkpoints that several processes write together, beside the training: whole or not at all, read by any number."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_processes import environment, torchrun, wait_for_lines, write_script
from test_sharding import check_same_run
from updates import RECIPES

from vitrail.checkpoints import convert, load_model
from vitrail.checkpoints.peers import Peers
from vitrail.checkpoints.resume import Part, load_latest, save_state
from vitrail.config.run import RunConfig
from vitrail.errors import UserError
from vitrail.sharding import Stored
from vitrail.training import run_training
from vitrail.training.folder import RunFolder
from vitrail.training.saving import Saver

SHARDED: dict[str, Any] = {"loop__sharding": "full", "model__dropout": 0.0, "augment__mixup": 0.0, "optim__ema": 0.9}
SHARDED |= {"model__qkv_bias": False}  # a key's bias has no gradient but noise, which Adam blows up


def together(count: int, work: Callable[[Peers], Any]) -> list[Any]:
    """Return what `work` returns, or raises, in each of so many threads that stand for processes."""
    barrier, values, found = threading.Barrier(count), [None] * count, [None] * count

    def exchange(number: int, value: Any) -> list[Any]:
        values[number] = value
        barrier.wait(10)
        every = list(values)
        barrier.wait(10)
        return every

    def run(number: int) -> None:
        try:
            found[number] = work(Peers(number, count, lambda value: exchange(number, value)))
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def values(step: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(step).normal(size=(7, 5)), dtype=torch.float32)


def tree_of(number: int, step: int) -> dict[str, Any]:
    """Return the state at a step as one of three processes has it: four rows, three, and none."""
    rows = (slice(0, 4), slice(4, 7), slice(7, 7))[number]
    part = Part((7, 5), torch.float32, (rows.start, 0), values(step)[rows])
    copied = Part((2,), torch.int64, (0,), torch.tensor([step, 2]) if number == 1 else None)
    return {"step": step, "weights": [part], "copied": copied, "own": torch.arange(3) if number == 0 else torch.ones(3)}


def save(folder: Path, step: int, keep: int = 2) -> list[Any]:
    return together(3, lambda peers: save_state(folder, tree_of(peers.number, step), keep=keep, peers=peers))


def check_state(state: dict[str, Any], step: int) -> None:
    assert state["step"] == step
    assert torch.equal(state["weights"][0], values(step))
    assert state["copied"].tolist() == [step, 2]
    assert state["own"].tolist() == [0, 1, 2]  # the first process's


def test_parts_of_three_processes_are_read_by_one_and_by_two(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        assert save(tmp_path, step) == [tmp_path / f"step-{step:08d}"] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    loaded = load_latest(tmp_path)
    assert loaded is not None
    check_state(loaded[0], 30)
    for state, _ in together(2, lambda peers: load_latest(tmp_path, peers=peers)):
        check_state(state, 30)


@settings(deadline=None, max_examples=30)
@given(box=st.tuples(*[st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in (7, 5)]))
def test_any_box_of_a_stored_tensor_is_read(box: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("box")
    save(folder, 1)
    loaded = load_latest(folder, lazily=True)
    assert loaded is not None
    stored = loaded[0]["weights"][0]
    assert isinstance(stored, Stored)
    offset, shape = [low for low, _ in box], [high - low for low, high in box]
    found = stored.read(offset, shape)
    assert torch.equal(found, values(1)[tuple(slice(low, high) for low, high in box)])


@pytest.mark.parametrize("harm", ["missing", "short", "flipped"])
def test_a_damaged_part_is_passed_over_by_all(harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    part = tmp_path / "step-00000020" / "part-00001.safetensors"
    data = bytearray(part.read_bytes())
    if harm == "missing":
        part.unlink()
    else:
        data[-1] ^= 1
        part.write_bytes(data[:-1] if harm == "short" else data)
    with caplog.at_level(logging.WARNING):
        for state, path in together(2, lambda peers: load_latest(tmp_path, peers=peers)):
            check_state(state, 10)
            assert path.name == "step-00000010"
    assert caplog.text.count("is damaged and passed over") == 1
    assert "part-00001" in caplog.text


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_where_one_cannot_write_none_does(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)
    from vitrail.checkpoints import resume

    write = resume.write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path.name == f"part-{failing:05d}.safetensors":
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(resume, "write_tensors", full)
    for error in save(tmp_path, 20):
        assert isinstance(error, UserError) and "disk" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    monkeypatch.undo()
    save(tmp_path, 20)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    check_state(loaded[0], 20)


def test_a_checkpoint_holds_the_state_of_its_step_and_the_next_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitrail.training import folder as module

    started, go = threading.Event(), threading.Event()
    write = module.save_state

    def slowly(*given: Any, **named: Any) -> Path:
        started.set()
        assert go.wait(10)
        return write(*given, **named)

    monkeypatch.setattr(module, "save_state", slowly)
    saver = Saver(RunFolder(tmp_path, writes=True), together=False)
    weights = torch.zeros(3)
    saver.save({"step": 1, "weights": weights}, keep=3)
    assert started.wait(10)
    weights += 1  # training goes on
    assert not (tmp_path / "checkpoints").exists()
    threading.Timer(0.2, go.set).start()
    saver.save({"step": 2, "weights": weights}, keep=3)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*1")] == ["step-00000001"]
    saver.wait()
    saver.close()
    loaded = load_latest(tmp_path / "checkpoints")
    assert loaded is not None and loaded[0]["weights"].tolist() == [1, 1, 1]
    shutil.rmtree(loaded[1])
    loaded = load_latest(tmp_path / "checkpoints")
    assert loaded is not None and loaded[0]["weights"].tolist() == [0, 0, 0]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_its_next_step(
    tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitrail.training import folder as module

    write = module.save_state

    def full(folder: Path, tree: dict[str, Any], **named: Any) -> Path:
        if tree["step"] == 4:
            raise UserError("the disk is full")
        return write(folder, tree, **named)

    monkeypatch.setattr(module, "save_state", full)
    config = tiny_run("full", loop__steps=400, loop__eval_every=400)
    with pytest.raises(UserError, match="the disk is full"):
        run_training(config)
    steps = [int(path.name[5:]) for path in (Path(str(config.out)) / "checkpoints").iterdir()]
    assert max(steps) == 0


# From a checkpoint to a model


@pytest.mark.parametrize("name", ["supervised", "masked pixels", "meta pseudo labels", "distillation"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_checkpoint_becomes_the_model_that_its_run_ships(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, name: str, ema: float
) -> None:
    recipe = RECIPES[name]
    if name == "distillation":
        run_training(tiny_run("teacher", loop__steps=1))
        recipe = replace(recipe, teacher=str(tmp_path / "teacher" / "last"))
    changes: dict[str, Any] = {"recipe": recipe, "optim__ema": ema, "augment__mixup": 0.0, "loop__steps": 6}
    if name == "meta pseudo labels":
        changes |= {"input__labelled": 24.0, "recipe": replace(recipe, finetune_steps=1)}
    config = tiny_run("run", **changes)
    run_training(config)
    made = tmp_path / "made"
    convert(tmp_path / "run" / "checkpoints", made)
    shipped, found = load_model(tmp_path / "run" / "last"), load_model(made)
    assert found.labels == shipped.labels and found.preprocessing == shipped.preprocessing
    assert found.config == shipped.config
    for weight, tensor in shipped.state_dict().items():
        assert torch.equal(found.state_dict()[weight], tensor), weight
    told = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "run" / "last", made)]
    assert told[0]["recipe"] == told[1]["recipe"] and told[0]["data"] == told[1]["data"]


def test_a_step_of_a_run_becomes_a_model(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(tiny_run("run", loop__keep=9))
    facts = convert(tmp_path / "run" / "checkpoints" / "step-00000004", tmp_path / "made")
    assert facts["step"] == 4
    assert load_model(tmp_path / "made").labels


def test_a_checkpoint_of_an_older_vitrail_says_what_to_do(tmp_path: Path) -> None:
    save_state(tmp_path / "checkpoints", {"step": 3, "learner": {}}, keep=1)
    with pytest.raises(UserError, match=r"older vitrail.*--resume"):
        load_model(tmp_path / "checkpoints")


def test_a_run_without_a_model_yet_names_its_checkpoints(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    run_training(tiny_run("run"))
    for name in ("best", "last"):
        shutil.rmtree(tmp_path / "run" / name)
    with pytest.raises(UserError, match=r"run/checkpoints"):
        load_model(tmp_path / "run")


# Runs under torchrun


def processes_of(run: subprocess.Popen[str]) -> list[int]:
    """Return the processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def torchrun_again(count: int, script: list[str]) -> list[str]:
    launcher = torchrun(count, script)
    return [*launcher[:3], "--max-restarts", "1", *launcher[3:]]


def check_same_weights(one: RunConfig, other: RunConfig) -> None:
    for name in ("last", "best"):
        alone, again = (load_model(Path(str(c.out)) / name).state_dict() for c in (one, other))
        for weight, tensor in alone.items():
            assert torch.equal(again[weight], tensor), weight


@pytest.mark.slow
def test_four_processes_save_and_one_two_and_four_go_on(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    changes = SHARDED | {"loop__steps": 28, "loop__save_every": 8, "loop__eval_every": 14, "loop__keep": 9}
    four = tiny_run("four", **changes)
    subprocess.run(torchrun(4, write_script(tmp_path, four)), env=environment(), check=True, timeout=240)
    for count, sharding in ((1, "none"), (2, "full"), (2, "none"), (4, "hybrid")):
        again = tiny_run(f"{count}-{sharding}", **changes | {"loop__sharding": sharding}, resume=True)
        shutil.copytree(str(four.out), str(again.out))
        for late in ("step-00000028", "step-00000024", "step-00000016"):
            shutil.rmtree(Path(str(again.out)) / "checkpoints" / late)
        script = write_script(tmp_path, again)
        command = [sys.executable, *script] if count == 1 else torchrun(count, script)
        subprocess.run(command, env=environment(), check=True, timeout=240)
        check_same_run(four, again)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_run_goes_on_by_itself_when_a_process_is_killed(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, sharding: str
) -> None:
    changes = SHARDED | {"loop__sharding": sharding, "loop__steps": 60, "loop__save_every": 5, "loop__eval_every": 30}
    straight, killed = tiny_run("straight", **changes), tiny_run("killed", **changes)
    subprocess.run(torchrun(2, write_script(tmp_path, straight)), env=environment(), check=True, timeout=240)
    run = subprocess.Popen(torchrun_again(2, write_script(tmp_path, killed)), env=environment(), text=True)
    wait_for_lines(Path(str(killed.out)) / "metrics.jsonl", 17, run)
    os.kill(processes_of(run)[1], signal.SIGKILL)
    assert run.wait(timeout=240) == 0
    check_same_weights(straight, killed)


@pytest.mark.slow
def test_a_sharded_run_that_is_stopped_and_killed_at_any_moment_ends_as_if_it_had_not_been(
    tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    changes = SHARDED | {"loop__steps": 120, "loop__save_every": 1, "loop__eval_every": 60, "loop__keep": 2}
    straight, killed = tiny_run("straight", **changes), tiny_run("killed", **changes, resume=True)
    subprocess.run(torchrun(2, write_script(tmp_path, straight)), env=environment(), check=True, timeout=240)
    rng, script = random.Random(0), write_script(tmp_path, killed)
    log = Path(str(killed.out)) / "metrics.jsonl"
    for round, how in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)):
        run = subprocess.Popen(torchrun(2, script), env=environment(), stderr=subprocess.DEVNULL, text=True)
        wait_for_lines(log, 5 + 30 * round, run)
        time.sleep(rng.uniform(0, 0.3))
        if how == signal.SIGKILL:
            for process in processes_of(run):
                os.kill(process, signal.SIGKILL)
        else:
            run.send_signal(how)
        run.wait(timeout=120)
    subprocess.run(torchrun(2, script), env=environment(), check=True, timeout=240)
    check_same_weights(straight, killed)
    assert log.read_bytes() == (Path(str(straight.out)) / "metrics.jsonl").read_bytes()
    assert not [path for path in (Path(str(killed.out)) / "checkpoints").iterdir() if path.name.startswith(".")]
