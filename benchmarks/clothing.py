"""The verbs on a folder of photos as it comes: train three ways, evaluate, predict, then `check` with faults planted.

    python benchmarks/clothing.py FOLDER [scratch] [head] [full]

FOLDER holds train, validation and test parts of clothing photos (the CC0 clothing data set, shorter side 144 px).
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import write_result

RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scratch": ("a small ViT from scratch", ("photos",)),
    "head": ("EfficientNet-Lite0, the head alone", ("finetune", "--optim.train", "head")),
    "full": ("EfficientNet-Lite0, all of it", ("finetune",)),
}
"""What is trained, the one that the other verbs are shown with last."""


def vitrail(*arguments: object) -> tuple[int, object]:
    """Run a verb with --json; return its exit code and answer."""
    command = [sys.executable, "-m", "vitrail", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return done.returncode, json.loads(done.stdout)


def plant(folder: Path) -> dict[str, str]:
    """Put a broken, an empty and a duplicated picture and one under two labels into the training part."""
    shirts = sorted((folder / "train" / "shirt").iterdir())
    (folder / "train" / "shirt" / "broken.jpg").write_bytes(shirts[0].read_bytes()[:2000])
    (folder / "train" / "shirt" / "empty.jpg").write_bytes(b"")
    shutil.copy(shirts[1], folder / "train" / "shirt" / "duplicate.jpg")
    shutil.copy(shirts[2], folder / "train" / "hat" / "two-labels.jpg")
    return {
        "broken": "broken.jpg",
        "empty-file": "empty.jpg",
        "duplicate": "duplicate.jpg",
        "conflict": "two-labels.jpg",
    }


def main() -> None:
    data = Path(sys.argv[1])
    rows = ["| run | command | seconds | top-1 | macro-F1 | ECE |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        best, planted = Path(scratch) / "run" / "best", Path(scratch) / "planted"
        for name, preset in (RUNS[chosen] for chosen in sys.argv[2:] or RUNS):
            shutil.rmtree(best.parent, ignore_errors=True)
            began = time.monotonic()
            _, trained = vitrail("train", *preset, "--data", data, "--out", best.parent)
            seconds, score = time.monotonic() - began, trained["metrics"]
            rows.append(
                f"| {name} | `vitrail train {' '.join(preset)}` | {seconds:.0f} | {score['top1']:.2%} "
                f"| {score['macro_f1']:.2%} | {score['ece']:.2%} |"
            )
            print(rows[-1], flush=True)
        _, measured = vitrail("evaluate", best, data)
        hat = sorted((data / "test" / "hat").iterdir())[0]
        _, answers = vitrail("predict", best, hat)
        clean_code, _ = vitrail("check", data)
        shutil.copytree(data, planted)
        names = plant(planted)
        code, report = vitrail("check", planted)
    assert trained["metrics"]["top1"] == measured["top1"], "training and evaluation disagree"
    found = {
        kind: name in json.dumps([f for f in report["findings"] if f["kind"] == kind]) for kind, name in names.items()
    }
    likeliest = ", ".join(f"{row['label']} {row['probability']:.1%}" for row in answers[0]["labels"][:3])
    body = (
        f"The whole command, its report included; figures on the {measured['pictures']} test pictures:\n\n"
        + "\n".join(rows)
        + f"\n\n`vitrail evaluate` gives the last figure again. `vitrail predict` on one hat: {likeliest}.\n\n"
        f"`vitrail check` exits with {clean_code}\non the data as it comes, "
        f"with {code} on a copy with planted faults. Found:\n\n"
        + "\n".join(f"- {kind}: {'yes' if ok else 'NO'}" for kind, ok in found.items())
    )
    print(body)
    print(write_result("clothing", " ".join(["python benchmarks/clothing.py FOLDER", *sys.argv[2:]]), body))
    if not all(found.values()):
        raise SystemExit("a planted fault was not found")


if __name__ == "__main__":
    main()
