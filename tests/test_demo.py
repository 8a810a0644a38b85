"""The demo's story: the same model twice, from weights and from scratch, beside a classifier of pixels."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitrail import demo
from vitrail.checkpoints import load_model
from vitrail.cli import main
from vitrail.config.run import RunConfig
from vitrail.data import ArraySource, open_data
from vitrail.errors import UserError
from vitrail.metrics import Evaluation
from vitrail.presets import PRESETS, preset, tiny
from vitrail.weights import MINI


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The demo, five updates long."""
    chosen = preset("demo")
    small = tiny(chosen.config)
    config = replace(small, model=replace(chosen.config.model, image_size=(16, 16)))
    monkeypatch.setitem(PRESETS, "demo", replace(chosen, config=config))
    return config


def test_the_demo_tells_of_all_three(short: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [each["name"] for each in told["results"]]
    assert names == ["fine-tuned", "the same model from scratch", "logistic regression on pixels"]
    assert all(0 <= each["top1"] <= 1 for each in told["results"])
    stored = json.loads((tmp_path / "demo" / "evaluation.json").read_text())
    assert [each["top1"] for each in stored["others"]] == [each["top1"] for each in told["results"][1:]]
    page = Path(told["report"]).read_text(encoding="utf-8")
    assert "trained for as many updates on the same 680 pictures" in page
    tuned, fresh = (load_model(tmp_path / "demo" / place / "best") for place in (".", "from-scratch"))
    assert tuned.config == fresh.config
    assert tuned.preprocessing.mean == load_model(MINI).preprocessing.mean


def test_on_a_terminal_it_prints_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    labels = ("ant", "bee")
    logits = np.eye(2, dtype=np.float32)[np.arange(40) // 20]
    logits[0] = 0.0, 2.0
    names = [f"photo {i}" for i in range(40)]
    evaluation = Evaluation(logits, np.arange(40) // 20, labels, names, [])
    others = [{"name": "one rival", "top1": 0.5}, {"name": "another [rival]", "top1": 0.25}]
    result = demo.DemoResult(tmp_path, evaluation, others, 61.4)
    monkeypatch.setattr(demo, "run_demo", lambda out, **_: result)
    assert main(["demo"]) == 0
    said = capsys.readouterr().out
    assert said.count("photo ") == 10
    rows = [line.split() for line in said.splitlines()]
    assert any("fine-tuned" in row and "97.5%" in row for row in rows)
    assert any("rival" in row and "50.0%" in row for row in rows)
    assert "another [rival]" in said and "Took 61 s." in said and "report.html" in said


def test_from_scratch_is_the_same_run_but_for_its_weights() -> None:
    tuned = replace(preset("demo").config, out="demo")
    scratch = demo.from_scratch(tuned)
    assert scratch.init is None and tuned.init == MINI
    assert scratch.out == str(Path("demo") / "from-scratch")
    same = ("data", "seed", "model", "input", "augment", "recipe", "loop")
    assert [getattr(scratch, name) for name in same] == [getattr(tuned, name) for name in same]


def test_the_pixel_baseline_learns_what_pixels_tell() -> None:
    rng = np.random.default_rng(0)

    def source(count: int) -> ArraySource:
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, 40, 40, 3), dtype=np.uint8)
        images[labels == 1, :, :20] += 60
        return ArraySource(images, labels, ("dark", "bright"))

    assert demo.pixel_baseline(source(40), source(20)) == 1.0
    assert demo.pixel_baseline(source(40).with_channels(1), source(20).with_channels(1)) == 1.0


def test_the_pixel_baseline_needs_pictures_in_memory(photos: Path) -> None:
    data = open_data(photos)
    assert data.val is not None
    with pytest.raises(UserError, match="pictures of one size in memory"):
        demo.pixel_baseline(data.train, data.val)
