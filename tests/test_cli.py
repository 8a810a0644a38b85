"""The command line as a person meets it: what it prints, what it answers to mistakes, how it exits."""

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.checkpoints import save_model
from vitrail.cli import main
from vitrail.models import create_model

TINY = [
    "--model.image-size", "16", "16", "--model.patch-size", "8", "8", "--model.width", "16", "--model.depth", "1",
    "--model.mlp-dim", "16", "--model.heads", "2", "--loop.steps", "4",
    "--loop.batch-size", "8", "--input.workers", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on `photos`."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "photos", "--data", str(photos), "--out", str(folder), *TINY]) == 0
    return folder


def test_version_and_help_answer(capsys) -> None:
    assert main(["--version"]) == 0
    assert main([]) == 0
    assert "vitrail 0." in (said := capsys.readouterr().out)
    assert all(verb in said for verb in ("demo", "train", "evaluate", "predict", "models", "check", "compare"))


def test_a_run_leaves_a_report_an_evaluation_and_models(run: Path) -> None:
    for name in ("report.html", "evaluation.json", "config.json", "metrics.jsonl", "timing.jsonl", "best", "last"):
        assert (run / name).exists(), name


def test_train_prints_one_json_document(photos: Path, tmp_path: Path, capsys) -> None:
    assert main(["train", "photos", "--data", str(photos), "--out", str(tmp_path / "run"), *TINY, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["step"] == 4
    assert 0 <= answer["metrics"]["top1"] <= 1


def test_resuming_a_finished_run_repeats_its_answer(run: Path, photos: Path, capsys) -> None:
    arguments = ["train", "photos", "--data", str(photos), "--out", str(run), *TINY, "--resume", "--json"]
    before = (run / "metrics.jsonl").read_bytes()
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    assert (run / "metrics.jsonl").read_bytes() == before


def test_evaluate_prints_figures_and_json(run: Path, photos: Path, capsys) -> None:
    assert main(["evaluate", str(run / "best"), str(photos), "--split", "train", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in answer["per_class"]} == {"apple", "leaf", "sky"}
    assert main(["evaluate", str(run / "best"), str(photos)]) == 0
    assert "top1" in capsys.readouterr().out


def test_predict_answers_for_every_picture_and_names_broken_ones(
    run: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    pictures = [str(photos / "sky" / "00.png"), str(tmp_path / "bad.jpg"), str(photos / "leaf")]
    assert main(["predict", str(run / "best"), *pictures, "--json", "--top", "2"]) == 3
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 22
    assert rows[0]["name"].endswith("00.png") and len(rows[0]["labels"]) == 2
    assert rows[1]["problem"] and not rows[1]["labels"]
    assert main(["predict", str(run / "best"), str(tmp_path / "bad.jpg"), "--json"]) == 3


def test_answers_below_a_threshold_are_marked_and_stay(run: Path, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"nothing")
    arguments = ["predict", str(run / "best"), str(photos), str(tmp_path / "bad.jpg"), "--top", "1"]
    main([*arguments, "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert not any("rejected" in row for row in plain)
    shares = sorted({row["labels"][0]["probability"] for row in plain if row["labels"]})
    below = (shares[0] + shares[1]) / 2
    main([*arguments, "--json", "--reject", str(below)])
    rows = json.loads(capsys.readouterr().out)
    assert [row["labels"] for row in rows] == [row["labels"] for row in plain]
    for row in rows:
        assert row.get("rejected") == (row["labels"][0]["probability"] < below if row["labels"] else None)
    assert sum(row.get("rejected", False) for row in rows) >= 1
    main([*arguments, "--reject", "1"])
    assert "rejected: " in capsys.readouterr().out
    main([*arguments, "--reject", str(below), "--out", str(tmp_path / "a.csv")])
    with open(tmp_path / "a.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["rejected"] for row in table] == [str(row.get("rejected", "")).lower() for row in rows]
    assert list(table[0]) == ["name", "label_1", "probability_1", "rejected", "problem"]
    for wrong in ("0", "1.5", "nan"):
        assert main([*arguments, "--reject", wrong]) == 2
        assert "rejected below a probability" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_predict_writes_files(run: Path, photos: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"answers.{suffix}"
    assert main(["predict", str(run / "best"), str(photos / "sky"), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 20 + (suffix == "csv")


def test_fine_tuning_starts_from_official_weights(photos: Path, tmp_path: Path, capsys) -> None:
    weights = Path(__file__).parent / "golden" / "vit_token.weights.npz"
    arguments = ["--data", str(photos), "--init", str(weights), "--out", str(tmp_path / "run"), "--loop.steps", "2"]
    assert main(["train", "finetune", *arguments, "--model.image-size", "48", "48", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def test_several_processes_must_be_given_one_folder(photos: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "photos", "--data", str(photos)]) == 2
    assert "--out" in capsys.readouterr().err


def test_models_lists_the_zoo_with_exact_counts(capsys) -> None:
    assert main(["models", "ViT-H/14", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["parameters"] == 632_045_800


def test_check_finds_nothing_in_good_pictures(photos: Path, capsys) -> None:
    assert main(["check", str(photos), "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_compare_shows_runs(run: Path, tmp_path: Path, capsys) -> None:
    assert main(["compare", str(run), str(run), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_several_labels_go_from_a_manifest_to_a_prediction(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    rows = ["path,labels"]
    for i in range(40):
        red, blue = i % 2, i // 2 % 2
        pixels = rng.integers(0, 60, size=(20, 20, 3), dtype=np.uint8)
        pixels[..., 0] += np.uint8(150 * red)
        pixels[..., 2] += np.uint8(150 * blue)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{';'.join(['red'] * red + ['blue'] * blue)}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    arguments = ["--data", str(tmp_path / "list.csv"), "--out", str(tmp_path / "run"), *TINY, "--loop.steps", "150"]
    assert main(["train", "photos", *arguments, "--augment.policy", "none", "--optim.lr", "0.01", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["metrics"]["mAP"] > 0.9
    assert main(["predict", str(tmp_path / "run" / "best"), str(tmp_path / "3.png"), "--json"]) == 0
    shares = {row["label"]: row["probability"] for row in json.loads(capsys.readouterr().out)[0]["labels"]}
    assert shares["red"] > 0.5 and shares["blue"] > 0.5  # independent, so they may both be likely
    assert "average precision" in (tmp_path / "run" / "report.html").read_text()


class Scene:
    """Folders and files that mistakes are made with."""

    def __init__(self, root: Path, photos: Path, run: Path) -> None:
        self.root, self.photos, self.run = root, photos, run
        self.out = root / "out"
        picture = photos / "sky" / "00.png"
        self.one_class = self._copy("one/sky", picture)
        self.loose = self._copy("loose", picture)
        self.empty = root / "empty"
        self.empty.mkdir()
        self.manifest = root / "list.csv"
        self.text = root / "notes.npz"
        self.text.write_text("not an archive")
        self.pickle = root / "weights.pth"
        self.pickle.write_bytes(b"\x80\x04.")
        self.file = root / "file"
        self.file.write_text("")

    def _copy(self, folder: str, picture: Path) -> Path:
        (self.root / folder).mkdir(parents=True)
        (self.root / folder / "a.png").write_bytes(picture.read_bytes())
        return self.root / folder.split("/")[0]

    def train(self, *arguments: object) -> list[str]:
        return ["train", "photos", "--out", str(self.out), *TINY, *map(str, arguments)]

    def csv(self, text: str) -> list[str]:
        self.manifest.write_text(text)
        return self.train("--data", self.manifest)

    def broken_majority(self) -> list[str]:
        for label in ("x", "y"):
            (self.root / "broken" / label).mkdir(parents=True)
            for i in range(20):
                (self.root / "broken" / label / f"{i}.png").write_bytes(b"broken")
        return self.train("--data", self.root / "broken")

    def cifar(self) -> list[str]:
        (self.root / "cifar-100-binary").mkdir()
        for name in ("train.bin", "test.bin"):
            (self.root / "cifar-100-binary" / name).write_bytes(b"\0" * 4000)
        for kind, count in (("fine", 100), ("coarse", 20)):
            names = "\n".join(f"{kind}{i}" for i in range(count))
            (self.root / "cifar-100-binary" / f"{kind}_label_names.txt").write_text(names)
        return self.train("--data", self.root)

    def other_shape(self) -> list[str]:
        save_model(create_model("vit-ti16", image_size=32, width=16, depth=1, mlp_dim=16, heads=2), self.root / "m")
        config = self.root / "m" / "config.json"
        config.write_text(config.read_text().replace('"width": 16', '"width": 32'))
        return ["predict", str(self.root / "m"), str(self.photos)]

    def damaged_config(self) -> list[str]:
        self.out.mkdir()
        (self.out / "config.json").write_text("{")
        return self.train("--data", self.photos, "--resume")

    def unknown_classes(self) -> list[str]:
        for label in ("sky", "sea"):
            (self.root / "other" / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 20)).save(self.root / "other" / label / f"{i}.png")
        return ["evaluate", str(self.run / "best"), str(self.root / "other")]


MISTAKES: dict[str, tuple[Callable[[Scene], list[str]], str]] = {
    "unknown verb": (lambda s: ["trian"], "Did you mean 'train'"),
    "unknown preset": (lambda s: ["train", "fotos"], "Did you mean 'photos'"),
    "unknown model": (lambda s: ["models", "vit-q16"], "vitrail models"),
    "no data named": (lambda s: s.train(), "--data"),
    "missing folder": (lambda s: s.train("--data", s.root / "nowhere"), "nowhere"),
    "no pictures": (lambda s: s.train("--data", s.empty), "empty"),
    "pictures without class folders": (lambda s: s.train("--data", s.loose), "loose"),
    "one class": (lambda s: s.train("--data", s.one_class), "class"),
    "csv without a label column": (lambda s: s.csv("path,colour\na.png,red\n"), "label"),
    "csv with a missing file": (lambda s: s.csv("path,label\nnope.png,a\nnope2.png,b\n"), "nope.png"),
    "truncated CIFAR": (lambda s: s.cifar(), "train.bin"),
    "unreadable pictures": (lambda s: s.broken_majority(), "cannot be read"),
    "weights needed": (lambda s: ["train", "finetune", "--init", "None", "--data", str(s.photos)], "--init"),
    "missing weights": (lambda s: s.train("--data", s.photos, "--init", s.root / "no.npz"), "no.npz"),
    "weights that are none": (lambda s: s.train("--data", s.photos, "--init", s.text), "notes.npz"),
    "pickled weights": (lambda s: s.train("--data", s.photos, "--init", s.pickle), "weights.pth"),
    "weights of another shape": (lambda s: s.other_shape(), "class_token"),
    "a run is there already": (lambda s: ["train", "photos", "--data", str(s.photos), "--out", str(s.run)], "--resume"),
    "damaged settings": (lambda s: s.damaged_config(), "config.json"),
    "out is a file": (lambda s: [*s.train("--data", s.photos), "--out", str(s.file)], "file"),
    "setting out of range": (lambda s: s.train("--data", s.photos, "--optim.ema", "2"), "--optim.ema"),
    "setting that is no number": (lambda s: s.train("--data", s.photos, "--optim.lr", "nan"), "--optim.lr"),
    "endless run": (lambda s: s.train("--data", s.photos, "--minutes", "inf"), "--minutes"),
    "seed too large": (lambda s: s.train("--data", s.photos, "--seed", 2**64), "--seed"),
    "batch too large": (lambda s: s.train("--data", s.photos, "--loop.batch-size", "4096"), "--loop.batch-size"),
    "missing model": (lambda s: ["predict", str(s.root / "nomodel"), str(s.photos)], "nomodel"),
    "a name has no weights": (lambda s: ["predict", "vit-b16", str(s.photos)], "weights"),
    "missing picture": (lambda s: ["predict", str(s.run / "best"), "gone.jpg"], "gone.jpg"),
    "no picture named": (lambda s: ["predict", str(s.run / "best")], "no pictures"),
    "no answer wanted": (lambda s: ["predict", str(s.run / "best"), str(s.photos), "--top", "0"], "--top"),
    "fewer threads than none": (
        lambda s: ["predict", str(s.run / "best"), str(s.photos), "--workers", "-1"],
        "--workers",
    ),
    "fewer threads for the check": (lambda s: ["check", str(s.photos), "--workers", "-1"], "--workers"),
    "unknown suffix": (lambda s: ["predict", str(s.run / "best"), str(s.photos), "--out", "a.xls"], ".csv"),
    "unknown classes": (lambda s: s.unknown_classes(), "sea"),
    "no such part": (lambda s: ["evaluate", str(s.run / "best"), str(s.photos), "--split", "tset"], "tset"),
    "page of another suffix": (lambda s: ["compare", str(s.run), "--out", str(s.root / "a.pdf")], ".html"),
    "compare no run": (lambda s: ["compare", str(s.empty)], "empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_a_line_or_two_that_name_the_cure(mistake, tmp_path, photos, run, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    make, expected = MISTAKES[mistake]
    arguments = make(Scene(tmp_path, photos, run))
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    message = [line for line in said.err.splitlines() if line.startswith("vitrail: ")]
    assert expected in said.err
    assert len(message) == 1 and len(message[0]) < 600
    assert "Traceback" not in said.err
    assert not said.out


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path, run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for label in ("[bold]sky", "]"):
        for i in range(8):
            file = tmp_path / "data" / label / f"[/x] {i}.png"  # a folder "[" with files "x] 0.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (30 * i, 0, 0)).save(file)
    out = str(tmp_path / "run")
    assert main(["train", "photos", "--data", str(tmp_path / "data"), "--out", out, *TINY]) == 0
    picture = tmp_path / "data" / "[bold]sky" / "[/x] 0.png"
    capsys.readouterr()
    assert main(["predict", f"{out}/best", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "[/x] 0.png" in said and "[bold]sky " in said
    assert main(["evaluate", f"{out}/best", str(tmp_path / "data")]) == 0
    assert "[bold]sky" in capsys.readouterr().out


def test_a_narrow_terminal_cuts_no_picture_name_and_no_count(photos: Path, run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    said = capsys.readouterr().out
    assert "1,882,797,416" in said and "vit-gigantic14" in said
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["predict", str(run / "best"), str(photos / "sky" / "00.png")]) == 0
    assert "…" not in capsys.readouterr().out


def test_resuming_without_out_goes_on_with_the_last_run(photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "photos", "--data", str(photos), *TINY, "--json"]
    for folder, extra in (("photos", []), ("photos-2", ["--seed", "1"]), ("photos-2", ["--seed", "1", "--resume"])):
        capsys.readouterr()
        assert main([*arguments, *extra]) == 0
        assert json.loads(capsys.readouterr().out)["folder"] == str(Path("runs") / folder)


@pytest.mark.parametrize("verb", [["models"], ["models", "--json"]])
def test_output_that_nobody_takes_is_no_bug(verb: list[str]) -> None:
    command = [sys.executable, "-m", "vitrail", *verb]
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_to_a_full_disk_is_a_mistake_to_mend() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "vitrail", "models"]
        failed = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("vitrail: ") and len(failed.stderr.splitlines()) == 1


def test_a_full_disk_names_the_folder_and_keeps_the_last_good_checkpoint(photos, tmp_path, monkeypatch, capsys) -> None:
    sync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "run"
    assert main(["train", "photos", "--data", str(photos), "--out", str(out), *TINY, "--loop.save-every", "1"]) == 2
    assert str(out) in capsys.readouterr().err
    monkeypatch.undo()
    assert (
        main(["train", "photos", "--data", str(photos), "--out", str(out), *TINY, "--loop.save-every", "1", "--resume"])
        == 0
    )


def test_running_out_of_memory_says_what_to_change(photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("vitrail.recipes.supervised.SupervisedLearner.step", exhausted)
    assert main(["train", "photos", "--data", str(photos), "--out", str(tmp_path / "run"), *TINY]) == 2
    assert "--loop.accumulation" in capsys.readouterr().err


def test_an_unknown_flag_is_refused_by_name(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "photos", "--optim.lrr", "1"])
    assert ended.value.code == 2
    assert "optim.lrr" in capsys.readouterr().err
