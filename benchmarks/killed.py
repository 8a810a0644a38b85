"""A real run, killed with SIGKILL at three random moments and resumed, against one that was left alone.

    python benchmarks/killed.py PRESET DATA [--seed 0] [--straight FOLDER] [any setting of the preset]

Both runs must leave the same bytes. `--straight` names a finished run of the same preset and machine to compare with.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import write_result

FILES = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")
KILLS = 3


def steps_done(folder: Path) -> int:
    """Last update in a run's metrics, 0 before the first line."""
    log = folder / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("preset")
    parser.add_argument("data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--straight", type=Path)
    asked, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        straight, killed = asked.straight or Path(scratch) / "straight", Path(scratch) / "killed"
        train = [sys.executable, "-m", "vitrail", "train", asked.preset, "--data", asked.data, *settings]
        if asked.straight is None:
            subprocess.run([*train, "--out", str(straight)], check=True)
        total = json.loads((straight / "config.json").read_text())["resolved"]["loop"]["steps"]
        moments = sorted(random.Random(asked.seed).sample(range(1, total), KILLS))
        for moment in moments:
            run = subprocess.Popen([*train, "--out", str(killed), "--resume"])
            while steps_done(killed) < moment:
                time.sleep(0.05)
                if run.poll() is not None:
                    raise SystemExit(f"the run ended by itself before step {moment}")
            run.kill()
            run.wait()
            print(f"killed after step {steps_done(killed)}", flush=True)
        subprocess.run([*train, "--out", str(killed), "--resume"], check=True)
        same = {name: (killed / name).read_bytes() == (straight / name).read_bytes() for name in FILES}
        result = json.loads((straight / "evaluation.json").read_text())
        rows = [json.loads(line) for line in (straight / "timing.jsonl").read_text().splitlines()]
    seconds = sum(row["seconds"] for row in rows)
    body = (
        f"{total} updates, {seconds:.0f} s of training. "
        f"{result['split']}: top-1 {result['metrics']['top1']:.2%}, top-5 {result['metrics']['top5']:.2%}.\n\n"
        f"Killed with SIGKILL after updates {', '.join(map(str, moments))} and resumed each time. "
        "Same bytes as the run that was left alone:\n\n"
        + "\n".join(f"- `{name}`: {'yes' if ok else 'NO'}" for name, ok in same.items())
    )
    print(body)
    command = " ".join(["python benchmarks/killed.py", asked.preset, "DATA", "--seed", str(asked.seed), *settings])
    print(write_result(f"killed-{asked.preset}", command, body))
    if not all(same.values()):
        raise SystemExit("the resumed run differs")


if __name__ == "__main__":
    main()
