"""Predictions spread over a Ray cluster: one row per picture, whoever dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from PIL import Image

from vitrail import distributed_prediction
from vitrail.checkpoints import save_model
from vitrail.distributed_prediction import ABOUT, ATTEMPTS, predict_distributed, writing
from vitrail.errors import UserError
from vitrail.models import ImageModel, build
from vitrail.prediction import Prediction, predict

parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow  # starting a cluster takes seconds

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def model() -> ImageModel:
    torch.manual_seed(0)
    made = build(replace(TINY["vit"], num_classes=len(CLASSES)))
    torch.nn.init.normal_(made.get_submodule("head").weight)  # pyright: ignore
    made.labels = CLASSES
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (1200, 16, 16, 3), np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
    (folder / "0007.png").write_bytes(b"no picture")
    (folder / "0900.png").write_bytes(b"")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_prediction, "FEWEST", 64)


def rows(out: Path) -> list[dict[str, object]]:
    return [row for file in sorted(out.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]


def check_rows(out: Path, answers: list[Prediction]) -> None:
    """Check that a folder has the plain engine's answers, a row for each."""
    found = rows(out)
    assert [row["name"] for row in found] == [p.name for p in answers]
    assert [row["problem"] for row in found] == [p.problem or None for p in answers]
    assert sum(row["problem"] is not None for row in found) == 2
    for row, p in zip(found, answers, strict=True):
        for place, (label, share) in enumerate(p.labels, 1):
            assert row[f"label_{place}"] == label
            assert row[f"probability_{place}"] == pytest.approx(share, abs=1e-5)


def test_answers_are_those_of_one_process_and_are_not_made_twice(
    model: ImageModel, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = predict_distributed(model, [pictures], out, top=2, reject=0.5)
    answers = predict(model, [pictures], top=2, reject=0.5, engine="eager")
    assert (done.pictures, done.broken, done.found) == (1200, 2, 0)
    assert done.parts == len(list(out.glob("*.parquet"))) > 4
    check_rows(out, answers)
    assert [row["rejected"] for row in rows(out)] == [p.rejected for p in answers]

    first, second = sorted(out.glob("*.parquet"))[:2]
    second.unlink()
    before = first.stat().st_mtime_ns
    again = predict_distributed(model, [pictures], out, top=2, reject=0.5)
    assert again.found == done.parts - 1
    assert first.stat().st_mtime_ns == before
    check_rows(out, answers)

    with pytest.raises(UserError, match="another top"):
        predict_distributed(model, [pictures], out, top=1, reject=0.5)


def kill_a_worker() -> bool:
    """Kill a process that answers a part, if there is one now."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker") and b"Worker" in title:
            os.kill(int(process.name), signal.SIGKILL)
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_workers_and_then_all_may_be_killed(model: ImageModel, pictures: Path, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    out = tmp_path / "out"
    script = (
        "import sys\nfrom vitrail import distributed_prediction as d\nfrom vitrail.checkpoints import load_model\n"
        "d.FEWEST = 64\nprint(d.predict_distributed(load_model(sys.argv[1]), [sys.argv[2]], sys.argv[3], top=3))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model"), str(pictures), str(out)]

    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    kills = 0
    while running.poll() is None and kills < 2:
        if len(list(out.glob("*.parquet"))) > kills and kill_a_worker():
            kills += 1
        time.sleep(0.02)
    assert kills == 2
    running.kill()
    running.wait()

    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=240)
    check_rows(out, predict(model, [pictures], top=3, engine="eager"))
    assert not list(out.glob("*.tmp"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_part_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    part = tmp_path / "part-0000000128.parquet"
    for _ in range(ATTEMPTS):
        if (child := os.fork()) == 0:
            with writing(part):
                os._exit(1)
        os.waitpid(child, 0)
    with pytest.raises(UserError, match="number 128"), writing(part):
        pass
    assert not part.exists()


def test_a_part_stands_whole_or_not_at_all(tmp_path: Path) -> None:
    part = tmp_path / "part-0000000000.parquet"
    with pytest.raises(ZeroDivisionError), writing(part) as new:
        new.write_bytes(b"half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with writing(part) as new:
        new.write_bytes(b"whole")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"whole"]


def test_a_folder_with_something_else_is_left_alone(model: ImageModel, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no predictions"):
        predict_distributed(model, [pictures], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_notes_and_other_pictures_are_refused(model: ImageModel, pictures: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    shutil.copytree(pictures, some)
    out = tmp_path / "out"
    out.mkdir()
    (out / ABOUT).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        predict_distributed(model, [some], out)
    (out / ABOUT).write_text(json.dumps({"part": 64, "pictures": 3}))
    with pytest.raises(UserError, match="another"):
        predict_distributed(model, [some], out)
