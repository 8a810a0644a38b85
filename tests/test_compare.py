"""Comparing runs: what is read from run folders, in what order it is shown, and what is said of a damaged one."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vitrail.checkpoints import save_model
from vitrail.compare import compare, print_comparison, write_page
from vitrail.config.codec import to_json
from vitrail.config.run import LoopConfig, OptimConfig, RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.models import build

TINY = ViTConfig(image_size=(8, 8), patch_size=(4, 4), channels=1, width=8, depth=1, mlp_dim=8, heads=2, pool="gap")
CONFIG = RunConfig(
    data="pictures", out="somewhere", model=TINY, loop=LoopConfig(steps=40, batch_size=10, eval_every=20, log_every=20)
)
# By hand: patches 4*4*8 + 8, positions 4*8, norms 3*16, attention 4*(8*8 + 8), feed-forward 2*(8*8 + 8), head 8*3 + 3.
TINY_PARAMETERS = 136 + 32 + 48 + 288 + 144 + 27


def write_run(
    folder: Path,
    config: RunConfig = CONFIG,
    *,
    top1: tuple[float, ...] = (0.5, 0.75),
    nll: tuple[float, ...] = (1.5, 1.0),
    fingerprint: str = "abc",
    finished: bool = True,
    evaluation: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    data = {"fingerprint": fingerprint, "classes": 3, "train": 100, "val": 10, "test": 20}
    document = {
        "format": 1,
        "requested": to_json(config),
        "resolved": to_json(config),
        "data": data,
        "environment": {"python": "3.11"},
    }
    (folder / "config.json").write_text(json.dumps(document))
    metrics, timing = [], []
    for i, (accuracy, loss) in enumerate(zip(top1, nll, strict=True), start=1):
        metrics.append({"step": 20 * i, "epoch": 2.0 * i, "lr": 0.1, "loss": 2.0 / i})
        metrics.append({"step": 20 * i, "val": {"top1": accuracy, "macro_f1": accuracy, "nll": loss}})
        timing.append({"step": 20 * i, "seconds": 2.0 * i, "pictures_per_second": 100.0 / i, "data_wait": 0.1})
    for name, rows in (("metrics.jsonl", metrics), ("timing.jsonl", timing)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        model = build(replace(config.model, num_classes=3))
        for name in ("best", "last"):
            save_model(model, folder / name)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps({"split": "test", "metrics": evaluation, "per_class": []}))
    return folder


def shown(comparison: Any, width: int = 160) -> str:
    console = Console(file=StringIO(), width=width)
    print_comparison(comparison, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_run_folder_says_everything_about_its_run(tmp_path: Path) -> None:
    final = {"top1": 0.7, "macro_f1": 0.69, "nll": 1.1}
    (run,) = compare([write_run(tmp_path / "a", top1=(0.8, 0.75), evaluation=final)]).runs
    assert (run.name, run.folder) == ("a", str(tmp_path / "a"))
    assert run.model == "ViT 4x4, width 8, depth 1, at 8 x 8 px"
    assert run.parameters == TINY_PARAMETERS
    assert (run.step, run.steps, run.finished) == (40, 40, True)
    assert (run.metric, run.val_step, run.val) == ("top1", 20, {"top1": 0.8, "macro_f1": 0.8, "nll": 1.5})
    assert (run.split, run.evaluation) == ("test", final)
    assert run.seconds == 6.0
    assert run.pictures_per_second == pytest.approx(400 / 6, abs=0.01)  # 40 updates of 10 pictures
    assert run.data == {"fingerprint": "abc", "classes": 3, "train": 100, "val": 10, "test": 20}
    assert run.loss == [(20, 2.0), (40, 1.0)]
    assert run.score == [(20, 0.8), (40, 0.75)]


def test_runs_are_ordered_by_accuracy_then_by_loss_and_those_without_validation_come_last(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "unvalidated", top1=(), nll=(), finished=False),
        write_run(tmp_path / "worst", top1=(0.5,), nll=(0.1,)),
        write_run(tmp_path / "unsure", top1=(0.75,), nll=(1.5,), evaluation={"top1": 0.99, "nll": 0.1}),
        write_run(tmp_path / "best", top1=(0.75,), nll=(1.0,)),
    ]
    assert [run.name for run in compare(runs).runs] == ["best", "unsure", "worst", "unvalidated"]


def test_settings_that_differ_are_named_and_those_that_do_not_are_left_out(tmp_path: Path) -> None:
    other = replace(
        CONFIG,
        out="elsewhere",
        init="weights.npz",
        optim=OptimConfig(lr=0.5, betas=(0.9, 0.95)),
        model=replace(TINY, heads=4),
    )
    comparison = compare([write_run(tmp_path / "a"), write_run(tmp_path / "b", other, top1=(0.1, 0.1))])
    assert comparison.differences == {
        "init": [None, "weights.npz"],
        "model.heads": [2, 4],
        "optim.lr": [1e-3, 0.5],
        "optim.betas": [[0.9, 0.999], [0.9, 0.95]],
    }
    text = shown(comparison)
    assert "optim.betas" in text and "0.9, 0.95" in text and "different data" not in text


def test_the_same_settings_are_said_to_be_the_same(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / "a"), write_run(tmp_path / "b", replace(CONFIG, out="elsewhere"))])
    assert comparison.differences == {}
    assert "All settings are the same." in shown(comparison)


def test_runs_on_different_data_are_warned_of(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / "a"), write_run(tmp_path / "b", fingerprint="other")])
    assert not comparison.same_data
    told = " ".join(shown(comparison).split())
    assert "these runs saw different data, so their results do not compare: a (100 pictures, hash abc); b (" in told
    write_page(comparison, tmp_path / "page.html")
    assert "these runs saw different data" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_run_that_is_still_going_can_be_compared(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", top1=(0.5,), nll=(1.0,), finished=False)
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"step": 40, "epo')  # the next line is being written at this moment
    (run,) = compare([folder]).runs
    assert (run.step, run.steps, run.finished, run.val_step) == (20, 40, False, 20)
    assert run.parameters == TINY_PARAMETERS
    begun = write_run(tmp_path / "b", finished=False)
    for name in ("metrics.jsonl", "timing.jsonl"):
        (begun / name).unlink()
    (run,) = compare([begun]).runs
    assert (run.step, run.val, run.seconds, run.pictures_per_second, run.loss) == (0, None, 0, None, [])
    text = shown(compare([folder, begun]))
    assert "20/40, not finished" in text and "0/40, not finished" in text


def test_a_run_from_other_weights_does_not_guess_its_model_before_it_is_saved(tmp_path: Path) -> None:
    (run,) = compare([write_run(tmp_path / "a", replace(CONFIG, init="weights.npz"), finished=False)]).runs
    assert run.parameters is None
    assert "parameters not known yet" in shown(compare([tmp_path / "a"]))


def test_a_run_that_lost_patience_is_said_to_have_stopped_early(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", top1=(0.5,), nll=(1.0,))
    assert "20/40, stopped early" in shown(compare([folder]))


def test_a_published_size_is_called_by_its_name(tmp_path: Path) -> None:
    model = ViTConfig(
        image_size=(384, 384), patch_size=(16, 16), width=192, depth=12, mlp_dim=768, heads=3, drop_path=0.1
    )
    (run,) = compare([write_run(tmp_path / "a", replace(CONFIG, model=model), finished=False)]).runs
    assert run.model == "vit-ti16 at 384 x 384 px"


def test_pictures_with_several_labels_are_judged_by_map(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text('{"step": 20, "val": {"mAP": 0.25, "nll": 0.5}}\n')
    (run,) = compare([folder]).runs
    assert (run.metric, run.score) == ("mAP", [(20, 0.25)])
    assert "mAP 25.0%" in shown(compare([folder]))


def test_folders_of_one_name_are_told_apart_and_one_folder_counts_once(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    comparison = compare([a, b, str(a)])
    assert sorted(run.name for run in comparison.runs) == [str(a), str(b)]


def test_the_page_needs_nothing_beside_it_and_escapes_what_it_shows(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    config = replace(CONFIG, init=evil)
    runs = [
        write_run(tmp_path / "x" / "<b>&amp;", config, finished=False, evaluation={"top1": 0.7, "nll": 1.1}),
        write_run(tmp_path / "plain", top1=(0.25, 0.3125)),
    ]
    write_page(compare(runs), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<bdi>&lt;b&gt;&amp;amp;</bdi>" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in page and "--panel" in page  # the report's own style
    body = page[page.index("<body") :]
    assert body.count('<polyline class="line s1"') == body.count('<polyline class="line s2"') == 2
    assert "top1 75.0%, nll 1.000, step 40" in page and "top1 70.0%, nll 1.100 (test)" in page and "31.2%" in page
    assert "<code>init</code>" in page and "optim.lr" not in page and "different data" not in page


def test_charts_show_as_many_runs_as_there_are_colours(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{i}", top1=(0.9 - 0.1 * i,), nll=(1.0,), finished=False) for i in range(8)]
    write_page(compare(runs), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('"line s6"') == 4 and "s7" not in page  # a line and its legend in two charts
    assert "The last 2 of the results are not drawn." in page
    assert all(f"<bdi>run{i}</bdi>" in page for i in range(8))


def test_the_comparison_is_plain_json(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path / "a", evaluation={"top1": 0.5, "nll": 1.0}), write_run(tmp_path / "b")])
    document = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert document["same_data"] is True and document["differences"] == {}
    assert [run["name"] for run in document["runs"]] == ["a", "b"]
    assert document["runs"][0]["loss"] == [[20, 2.0], [40, 1.0]]
    assert document["runs"][0]["settings"]["loop.batch_size"] == 10


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="name run folders"):
        compare([])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (".", None, "there is no folder .*a;"),
        ("config.json", None, "a is no run folder: it has no config.json"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", '{"format": 1}', "a is no run folder: its config.json has no settings"),
        ("config.json", '{"format": 1, "resolved": {}}', "config.json is damaged: what it says of the data"),
        ("config.json", '{"format": 99}', "written by a newer vitrail"),
        ("metrics.jsonl", None, "metrics.jsonl is missing, though the run is finished"),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2,\n', "metrics.jsonl, line 2 is damaged"),
        ("metrics.jsonl", '{"step": 1, "val": {"loss": 2.0}}\n', "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl, line 1 is damaged"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl, line 1 is damaged"),
        ("timing.jsonl", '{"seconds": "long"}\n', "timing.jsonl, line 1 is damaged"),
        ("timing.jsonl", None, "timing.jsonl is missing"),
        ("evaluation.json", '{"split": "test"}', "evaluation.json is damaged"),
        ("evaluation.json", "nothing", "evaluation.json is damaged"),
        ("best/config.json", "{}", "best/config.json was not written by vitrail"),
    ],
)
def test_a_damaged_run_folder_is_named_with_what_is_wrong(
    tmp_path: Path, file: str, content: str | bytes | None, message: str
) -> None:
    folder = write_run(tmp_path / "a")
    if content is not None:
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    elif file == ".":
        folder = folder.rename(tmp_path / "moved").with_name("a")
    else:
        (folder / file).unlink()
    with pytest.raises(UserError, match=message):
        compare([folder])


def test_unknown_settings_name_the_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    document = json.loads((folder / "config.json").read_text())
    document["resolved"]["optim"]["speed"] = 3
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"a/config\.json: optim has an unknown setting 'speed'"):
        compare([folder])
