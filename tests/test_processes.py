"""Runs in processes of their own: several under torchrun, and one that is killed without warning."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import TINY

from vitrail.checkpoints import load_model
from vitrail.config.codec import to_json
from vitrail.config.run import RunConfig

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, torch
from vitrail.config.codec import from_json
from vitrail.config.run import RunConfig
from vitrail.errors import Interrupted
from vitrail.parallel import leave
from vitrail.training import run_training
torch.set_num_threads(1)
try:
    run_training(from_json(RunConfig, json.load(open(sys.argv[1]))))
except Interrupted as stop:
    leave(128 + stop.signal)
leave(0)
"""


# The first process finds the time for measuring spent after one update, the second after four.
CLOCKS_APART = """
import itertools, os, types
import vitrail.training.setup as setup
ticks = itertools.count(step=3 if os.environ["RANK"] == "0" else 1)
setup.time = types.SimpleNamespace(perf_counter=lambda: next(ticks))
"""


def write_script(folder: Path, config: RunConfig, *, first: str = "") -> list[str]:
    (folder / "run.py").write_text(first + SCRIPT)
    settings = folder / f"{Path(str(config.out)).name}.json"
    settings.write_text(json.dumps(to_json(config)))
    return [str(folder / "run.py"), str(settings)]


def torchrun(processes: int, script: list[str]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, *script]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one_at_the_same_global_batch(tiny_run, tmp_path: Path, accumulation: int) -> None:
    settings = {
        "model__dropout": 0.0,
        "augment__mixup": 0.0,
        "model__qkv_bias": False,  # a key's bias has no gradient but noise, which Adam blows up
        "optim__ema": 0.9,
        "loop__accumulation": accumulation,
        "loop__steps": 20,
        "loop__eval_every": 10,
    }
    one, two = tiny_run("one", **settings), tiny_run("two", **settings)
    subprocess.run([sys.executable, *write_script(tmp_path, one)], env=environment(), check=True, timeout=120)
    subprocess.run(torchrun(2, write_script(tmp_path, two)), env=environment(), check=True, timeout=180)
    alone, together = (load_model(Path(c.out) / "last").state_dict() for c in (one, two))
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-5)
    rows = [[json.loads(x) for x in (Path(c.out) / "metrics.jsonl").read_text().splitlines()] for c in (one, two)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        if "val" in a:
            assert b["val"]["top1"] == a["val"]["top1"]
        else:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_processes_agree_on_running_statistics_before_they_are_evaluated(tiny_run, tmp_path: Path) -> None:
    first = """
import os, torch
from pathlib import Path
from vitrail.training.loop import Loop
measure = Loop._measure
def noted(self, val):
    folder = Path(os.environ["NOTES"])
    torch.save(self.parts.learner.model.state_dict(), folder / f"{self.step}-{os.environ['RANK']}.pt")
    return measure(self, val)
Loop._measure = noted
"""
    config = tiny_run("agreed", model=TINY["efficientnet"], optim__ema=0.9, loop__steps=6, loop__eval_every=3)
    script = write_script(tmp_path, config, first=first)
    subprocess.run(torchrun(2, script), env=environment() | {"NOTES": str(tmp_path)}, check=True, timeout=120)
    for step in (3, 6):
        states = [torch.load(tmp_path / f"{step}-{rank}.pt") for rank in (0, 1)]
        for name, tensor in states[0].items():
            torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-7, msg=f"{name} after {step} updates")


def test_several_processes_stop_together_and_go_on(tiny_run, tmp_path: Path) -> None:
    settings = {"loop__steps": 400, "loop__eval_every": 400, "loop__save_every": 400, "model__dropout": 0.0}
    config = tiny_run("stopped", **settings)
    script = write_script(tmp_path, config)
    run = subprocess.Popen(torchrun(2, script), env=environment(), stderr=subprocess.PIPE, text=True)
    log = Path(str(config.out)) / "metrics.jsonl"
    wait_for_lines(log, 10, run)
    run.send_signal(signal.SIGTERM)  # torchrun passes it on to its processes
    run.communicate(timeout=60)
    steps = [int(c.name.removeprefix("step-")) for c in (Path(str(config.out)) / "checkpoints").iterdir()]
    assert 0 < max(steps) < 400
    script = write_script(tmp_path, replace(config, resume=True))
    subprocess.run(torchrun(2, script), env=environment(), check=True, timeout=120)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 401))
    assert rows[-1].keys() >= {"val"}


def test_processes_whose_clocks_differ_measure_one_length(tiny_run, tmp_path: Path) -> None:
    config = tiny_run("measured", minutes=0.1)
    script = write_script(tmp_path, config, first=CLOCKS_APART)
    subprocess.run(torchrun(2, script), env=environment(), check=True, timeout=120)
    assert (Path(str(config.out)) / "last" / "model.safetensors").is_file()


def test_a_run_killed_three_times_without_warning_ends_as_if_it_had_not_been(tiny_run, tmp_path: Path) -> None:
    settings = {"loop__steps": 150, "loop__eval_every": 30, "loop__save_every": 5, "optim__ema": 0.9}
    straight, killed = tiny_run("straight", **settings), tiny_run("killed", resume=True, **settings)
    subprocess.run([sys.executable, *write_script(tmp_path, straight)], env=environment(), check=True, timeout=120)
    rng, script = random.Random(0), write_script(tmp_path, killed)
    log = Path(str(killed.out)) / "metrics.jsonl"
    for kill in range(3):
        run = subprocess.Popen([sys.executable, *script], env=environment())
        wait_for_lines(log, 10 + 40 * kill + rng.randrange(20), run)
        run.kill()
        run.wait()
    subprocess.run([sys.executable, *script], env=environment(), check=True, timeout=120)
    for name in ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors"):
        assert (Path(str(killed.out)) / name).read_bytes() == (Path(str(straight.out)) / name).read_bytes(), name


def wait_for_lines(log: Path, count: int, run: subprocess.Popen) -> None:
    """Wait until a run has logged `count` lines."""
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert run.poll() is None, f"the run ended by itself with {run.returncode}"
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)
