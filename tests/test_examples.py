"""The files for clusters run: here, on this machine, with two processes in place of many machines."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from vitrail.checkpoints import load_model
from vitrail.data import read_parts

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = "--model.image-size 32 32 --loop.batch-size 8 --loop.save-every 1 --input.workers 0"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    clothes = read_parts("clothing").train
    for i in range(0, len(clothes), 8):
        folder = tmp_path / "photos" / clothes.classes[clothes.targets[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(clothes.load(i)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment where Slurm's commands are stand-ins, and `torchrun` is that of this Python."""
    stand_ins = {
        "srun": 'exec "$@"',
        "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi',
        "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "PROCESSES": "2"}
    sky = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "2", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2"}
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"), "OMP_NUM_THREADS": "1"}
    return os.environ | slurm | sky | {"SKYPILOT_TASK_ID": "task"} | paths


def one_machine(script: str, photos: Path, run: Path) -> str:
    """Return a command for many machines and their disks, for this one."""
    changes = {
        r"--nnodes=2": "--nnodes=1",
        r"--nproc-per-node=gpu": "--nproc-per-node=2",
        r"vitrail-0\.vitrail|127\.0\.0\.1": "localhost",
        r"(/shared)?/photos": str(photos),
        r"(/shared/run|/runs/finetune)\b": str(run),
        r"train finetune": "train photos",
    }
    for pattern, value in changes.items():
        script = re.sub(pattern, value, script)
    assert "/shared" not in script and "/runs" not in script
    return f"{script.rstrip()} {TINY} --loop.steps 3"


@pytest.mark.slow
def test_the_slurm_script_saves_when_time_is_up_and_goes_on(
    photos: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    run, requeued = tmp_path / "run", tmp_path / "requeued"
    words = ["photos", "--data", str(photos), "--out", str(run), *TINY.split(), "--loop.steps"]
    script = ["bash", str(EXAMPLES / "slurm.sbatch"), *words]
    job = subprocess.Popen([*script, "150"], env=environment, stderr=subprocess.PIPE, text=True)
    while not list((run / "checkpoints").glob("step-0000000[1-9]")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=120)
    assert requeued.read_text() == "requeue 7\n"
    stopped = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????"))
    assert 0 < stopped < 150
    assert not (run / "last").exists()

    requeued.unlink()
    again = subprocess.run([*script, "150"], env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert load_model(run / "last").labels
    assert not requeued.exists()


@pytest.mark.slow
def test_the_kubernetes_job_trains(photos: Path, environment: dict[str, str], tmp_path: Path) -> None:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    (container,) = pod["containers"]
    nodes = f"--nnodes={job['spec']['completions']}"
    assert job["spec"]["parallelism"] == job["spec"]["completions"] and nodes in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    check_trains(shlex.join(container["command"]), photos, environment, tmp_path)


@pytest.mark.slow
def test_the_skypilot_task_trains(photos: Path, environment: dict[str, str], tmp_path: Path) -> None:
    task: dict[str, Any] = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    check_trains(task["run"], photos, environment, tmp_path)


def check_trains(script: str, photos: Path, environment: dict[str, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        ["bash", "-euc", one_machine(script, photos, run)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert load_model(run / "last").labels


def test_the_ray_cluster_is_one_that_ray_can_start() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    ray = pytest.importorskip("ray")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((EXAMPLES / "ray-cluster.yaml").read_text()), schema)
