"""The verbs on a folder of photos as it comes: train, evaluate, predict, then `check` with faults planted.

    python benchmarks/clothing.py FOLDER

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
    with tempfile.TemporaryDirectory() as scratch:
        run, planted = Path(scratch) / "run", Path(scratch) / "planted"
        began = time.monotonic()
        _, trained = vitrail("train", "photos", "--data", data, "--out", run)
        seconds = time.monotonic() - began
        _, measured = vitrail("evaluate", run / "best", data)
        hat = sorted((data / "test" / "hat").iterdir())[0]
        _, answers = vitrail("predict", run / "best", hat)
        clean_code, _ = vitrail("check", data)
        shutil.copytree(data, planted)
        names = plant(planted)
        code, report = vitrail("check", planted)
    assert trained["metrics"]["top1"] == measured["top1"], "training and evaluation disagree"
    found = {
        kind: name in json.dumps([f for f in report["findings"] if f["kind"] == kind]) for kind, name in names.items()
    }
    best = ", ".join(f"{row['label']} {row['probability']:.1%}" for row in answers[0]["labels"][:3])
    body = (
        f"`vitrail train photos` from scratch: {seconds:.0f} s, top-1 {measured['top1']:.2%} on "
        f"{measured['pictures']} test pictures (macro-F1 {measured['macro_f1']:.2%}, ECE {measured['ece']:.2%}).\n"
        f"`vitrail evaluate` gives the same figure. `vitrail predict` on one hat: {best}.\n\n"
        f"`vitrail check` exits with {clean_code}\non the data as it comes, "
        f"with {code} on a copy with planted faults. Found:\n\n"
        + "\n".join(f"- {kind}: {'yes' if ok else 'NO'}" for kind, ok in found.items())
    )
    print(body)
    print(write_result("clothing", "python benchmarks/clothing.py FOLDER", body))
    if not all(found.values()):
        raise SystemExit("a planted fault was not found")


if __name__ == "__main__":
    main()
