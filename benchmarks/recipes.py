"""What recipes bring on real pictures: runs that differ in one thing, several seeds, one look at the test pictures.

    python benchmarks/recipes.py CIFAR-100-BINARY WORK [EXPERIMENT[=EPOCHS] ...] [--photos FOLDER] [--threads 2]
        [--seeds 3] [--cifar10 CIFAR-10-BINARY] [--precision bf16]

Every run has its own folder in WORK, its result a line of WORK/rows.jsonl: killed and started again, it goes on where
it was. A finished experiment goes into `results/recipes.json`, from which the page `results/recipes.md` is written.
EPOCHS takes the place of an experiment's own budget. `--plan` measures how long what is left would take, and runs
nothing; `--tiny` rehearses everything in a few steps, with all it writes in WORK/tiny.
"""

import argparse
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from experiments import CIFAR, CIFAR10, EXPERIMENTS, PER_CLASS, PHOTOS, SMALL, Arm, Experiment, Places
from machine import describe, table
from scipy.stats import t as student

from vitrail.checkpoints import load_model
from vitrail.checkpoints.storage import replace_file, write_file
from vitrail.config.codec import from_json, to_json
from vitrail.config.run import RunConfig
from vitrail.data import read_cifar
from vitrail.errors import Interrupted, UserError
from vitrail.parallel import pick_device, pick_precision
from vitrail.presets.tiny import tiny
from vitrail.training import run_training
from vitrail.training.folder import RunFolder
from vitrail.training.setup import assemble, build_model, open_run_data, resolve_length, seconds_per_step

RESULTS = Path(__file__).parent / "results"

HEAD = """# recipes

What recipes bring on real pictures, written by `benchmarks/recipes.py` from [recipes.json](recipes.json).

Settings are those of the presets and papers that are named; nothing was chosen by test pictures, which each run is
asked once, at its end, with its last weights, or their average where it keeps one. No test-time augmentation. Figures
are means over seeds with their standard deviation. A difference is the mean over seeds, both sides of a pair having the
same seed, with its 95 % interval (Student's t). It helps or hurts where the interval leaves 0 out. No effect means none
that so few seeds could show: one smaller than the interval may be there.
"""

NEEDS = {
    "finetune": (PHOTOS, "--photos FOLDER, with parts train, validation and test"),
    "few-labels": (CIFAR10, "--cifar10 CIFAR-10-BINARY"),
}
"""What an experiment needs beyond CIFAR-100."""
Row = dict[str, Any]


class Runner:
    """Makes each run once: what WORK knows already is not run again."""

    def __init__(self, places: Places, work: Path, *, tiny: bool, precision: str = "auto") -> None:
        self.places, self.work, self.tiny, self.precision = dict(places), work, tiny, precision
        self._file = work / "rows.jsonl"
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        self._rows = {(row["experiment"], row["arm"], row["seed"]): row for row in map(json.loads, lines)}

    def config(self, arm: Arm, seed: int) -> RunConfig:
        """Return an arm's run, with names in place of the paths to data and weights."""
        config = arm.config(seed)
        if config.loop.precision == "auto":
            config = replace(config, loop=replace(config.loop, precision=self.precision))
        return tiny(config) if self.tiny else config

    def known(self, name: str, arm_name: str, arm: Arm, seed: int) -> Row | None:
        """Return the row of a finished run, if it had the settings of now."""
        row = self._rows.get((name, arm_name, seed))
        same = row is not None and from_json(RunConfig, row["settings"], str(self._file)) == self.config(arm, seed)
        return row if same else None

    def row(self, name: str, experiment: Experiment, arm_name: str, seed: int) -> Row:
        """Return the row of a run, which is begun, gone on with, or known already."""
        arm = experiment.arms[arm_name]
        start = self.row(name, experiment, arm.start, seed) if arm.start else None
        if (row := self.known(name, arm_name, arm, seed)) is not None:
            return row
        folder = self._folder(name, arm_name, seed)
        config = self.config(arm, seed)
        path = {"data": str(self.places[arm.data]), "out": str(folder), "resume": True}
        if start is not None:
            path["init"] = str(self._folder(name, str(arm.start), seed) / "last")
        row = {"experiment": name, "arm": arm_name, "seed": seed, **self._made(arm, replace(config, **path))}
        row |= {"machine": describe(), "settings": to_json(config)}
        self._keep(row, experiment)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"{name}, {arm_name}, seed {seed}: {told(row)}, {row['seconds']:.0f} s", flush=True)
        return row

    def _made(self, arm: Arm, config: RunConfig) -> Row:
        """Make a run, and measure what came out."""
        if not arm.trained:
            torch.manual_seed(config.seed)
            model = build_model(config, open_run_data(config))
            return {"figures": arm.measure(model, arm.data, self.places), "seconds": 0.0, "steps": 0}
        folder = RunFolder(Path(str(config.out)), writes=True)
        if (stored := folder.stored()) and from_json(RunConfig, stored["requested"], str(folder.path)) != config:
            print(f"{folder.path}: the settings have changed; it starts over", flush=True)
            shutil.rmtree(folder.path)
            stored = None
        began = time.monotonic()
        result = run_training(config)
        seconds = time.monotonic() - began
        if stored:  # nobody knows how long the first part took, apart from its updates
            seconds = sum(row["seconds"] for row in folder.rows("timing.jsonl"))
        loop = (folder.stored() or {})["resolved"]["loop"]
        return {
            "figures": arm.measure(load_model(folder.last), arm.data, self.places),
            "seconds": round(seconds, 1),
            "resumed": stored is not None,
            "steps": result.step,
            "pictures": result.step * loop["batch_size"],
            "precision": loop["precision"],
        }

    def _keep(self, row: Row, experiment: Experiment) -> None:
        """Put a row into the file, in place of an older one, and of those of runs that started from its weights."""
        key = row["experiment"], row["arm"], row["seed"]
        stale = [name for name, arm in experiment.arms.items() if arm.start == row["arm"]]
        for name in stale:
            self._rows.pop((row["experiment"], name, row["seed"]), None)
            shutil.rmtree(self._folder(row["experiment"], name, row["seed"]), ignore_errors=True)
        self._rows.pop(key, None)
        self._rows[key] = row
        write_file(self._file, "".join(json.dumps(each) + "\n" for each in self._rows.values()).encode())

    def _folder(self, name: str, arm_name: str, seed: int) -> Path:
        return self.work / name / f"{arm_name.replace(', ', '-').replace(' ', '-')}-{seed}"

    def minutes(self, arm: Arm) -> tuple[int, float]:
        """Return the updates of a run, and its minutes by the time of a few."""
        config = replace(self.config(arm, 0), data=str(self.places[arm.data]))
        if arm.start:  # other weights take no other time
            config = replace(config, init=None)
        device = pick_device()
        parts = assemble(config, open_run_data(config), device, pick_precision(config.loop.precision, device))
        steps = resolve_length(config, parts).loop.steps or 0
        seconds = steps * seconds_per_step(config, parts, 0.05 if self.tiny else 2.0)
        parts.stream.close()
        return steps, seconds / 60


def prepare(cifar: Path, photos: Path | None, work: Path) -> Places:
    """Return where all data lies; the first pictures of every class of CIFAR-100 are written into WORK.

    The next picture of each class is that file's validation part: there must be one, and it is not trained on.
    """
    places = {CIFAR: cifar.resolve(), SMALL: work / f"{SMALL}.npz"}
    if photos is not None:
        places[PHOTOS] = photos.resolve()
    if not places[SMALL].exists():
        train = read_cifar(cifar).train
        order = np.argsort(train.targets, kind="stable")
        places_of = np.split(order, np.cumsum(train.class_counts())[:-1])
        few = [members[: PER_CLASS + 1] for members in places_of if len(members) > 1]
        parts = {"train": np.sort(np.concatenate([f[:-1] for f in few])), "val": np.sort([f[-1] for f in few])}
        arrays = {f"x_{part}": train.pixels()[chosen] for part, chosen in parts.items()}
        arrays |= {f"y_{part}": train.targets[chosen] for part, chosen in parts.items()}
        replace_file(places[SMALL], lambda file: np.savez(file, classes=np.array(train.classes), **arrays))
    return places


def told(row: Row) -> str:
    """Return a row's figures in words."""
    return ", ".join(f"{figure} {value:.2%}" for figure, value in row["figures"].items())


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation of shares, in per cent."""
    return f"{mean(values):.2%}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def compared(ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, str, str]:
    """Return the mean difference of pairs in points, its 95 % interval, and what that says."""
    apart = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    if len(apart) < 2:
        return f"{mean(apart):+.2f}", "", "one seed says nothing"
    half = float(student.ppf(0.975, len(apart) - 1)) * stdev(apart) / len(apart) ** 0.5
    low, high = mean(apart) - half, mean(apart) + half
    verdict = "helps" if low > 0 else "hurts" if high < 0 else "no effect"
    return f"{mean(apart):+.2f}", f"{low:+.2f} to {high:+.2f}", verdict


def command(text: str, threads: int, seeds: int | None, precision: str) -> str:
    """Return what makes an experiment again."""
    place = NEEDS.get(text.partition("=")[0], ("", ""))[1].partition(",")[0]
    flags = f" {place}" * bool(place) + f" --threads {threads}" + (f" --seeds {seeds}" if seeds else "")
    flags += f" --precision {precision}" if precision != "auto" else ""
    return f"python benchmarks/recipes.py CIFAR-100-BINARY WORK {text}{flags}"


def document(experiment: Experiment, rows: Sequence[Row], command: str) -> dict[str, Any]:
    """Return all that the page says of an experiment, as JSON."""
    return {
        "question": experiment.question,
        "note": experiment.note,
        "command": command,
        "arms": {name: arm.described() for name, arm in experiment.arms.items()},
        "pairs": [list(pair) for pair in experiment.pairs],
        "rows": [{key: value for key, value in row.items() if key != "settings"} for row in rows],
    }


def section(name: str, found: dict[str, Any]) -> str:
    """Return an experiment's part of the page."""
    rows: dict[str, list[Row]] = {arm: [r for r in found["rows"] if r["arm"] == arm] for arm in found["arms"]}

    def by_seed(arm: str, figure: str) -> list[float]:
        return [row["figures"][figure] for row in rows[arm]]

    verdicts, results = [], []
    for arm, other in found["pairs"]:
        for figure in rows[arm][0]["figures"]:
            difference, interval, verdict = compared(by_seed(arm, figure), by_seed(other, figure))
            verdicts.append((f"{arm} over {other}", figure, difference, interval, f"**{verdict}**"))
    for arm, runs in rows.items():
        seconds = ", ".join(f"{run['seconds']:.0f}" for run in runs) if runs[0]["steps"] else ""
        for figure in runs[0]["figures"]:
            values = by_seed(arm, figure)
            each = ", ".join(f"{value:.2%}" for value in values)
            results.append((arm, figure, f"**{spread(values)}**", each, f"{runs[0]['steps']:,}", seconds))
    text = [f"## {name}: {found['question']}", textwrap.fill(found["note"], 120, break_on_hyphens=False)]
    if verdicts:
        text.append(table(("", "of test pictures", "difference, points", "95 % interval", "verdict"), verdicts))
    text.append(table(("", "of test pictures", "mean", "by seed", "updates", "seconds, by seed"), results))
    text.append("\n".join(f"- {arm}: {settings}" for arm, settings in found["arms"].items()))
    if resumed := sum(bool(row.get("resumed")) for row in found["rows"]):
        text.append(
            f"Of {len(found['rows'])} runs {resumed} were interrupted; their seconds are those of updates alone."
        )
    precisions = sorted({row["precision"] for row in found["rows"] if "precision" in row})
    machines = sorted({row["machine"] for row in found["rows"]})
    text.append(f"Command: `{found['command']}`\n\nMachine: {'; '.join(machines)}; {', '.join(precisions)}")
    return "\n\n".join(text)


def publish(folder: Path, name: str, found: dict[str, Any]) -> Path:
    """Put an experiment among the results and write the page of all that are there."""
    file = folder / "recipes.json"
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    stored[name] = found
    stored = {key: stored[key] for key in EXPERIMENTS if key in stored}
    write_file(file, (json.dumps(stored, indent=1) + "\n").encode())
    page = "\n\n".join([HEAD.strip(), *(section(key, value) for key, value in stored.items())])
    write_file(folder / "recipes.md", (page + "\n").encode())
    return folder / "recipes.md"


def chosen(names: Sequence[str], places: Places, *, seeds: int | None = None) -> dict[str, Experiment]:
    """Return the experiments asked for, in their order, all by default, under what a command calls them.

    Args:
        names: As `sam` or `sam=10`.
        places: Where data lies.
        seeds: Number of seeds in place of the experiments' own.

    Raises:
        UserError: For an unknown name, a budget that is no number, or photos that are missing.
    """
    found: dict[str, Experiment] = {}
    lacking = {name for name, (place, _) in NEEDS.items() if place not in places}
    for text in names or [name for name in EXPERIMENTS if name not in lacking]:
        name, _, budget = text.partition("=")
        if name not in EXPERIMENTS:
            raise UserError(f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}.")
        if name in lacking:
            raise UserError(f"{name} needs {NEEDS[name][1]}.")
        try:
            experiment = EXPERIMENTS[name](float(budget)) if budget else EXPERIMENTS[name]()
        except ValueError as problem:
            raise UserError(f"{text}: the budget is a number of epochs.") from problem
        found[text] = replace(experiment, seeds=range(seeds)) if seeds else experiment
    return found


def show_plan(runner: Runner, wanted: dict[str, Experiment]) -> None:
    """Measure and print what is left to do."""
    total = 0.0
    for text, experiment in wanted.items():
        name = text.partition("=")[0]
        for arm_name, arm in experiment.arms.items():
            left = sum(runner.known(name, arm_name, arm, seed) is None for seed in experiment.seeds)
            if arm.trained and left:
                steps, minutes = runner.minutes(arm)
                total += left * minutes
                print(f"{text}, {arm_name}: {left} runs of {steps:,} updates, {minutes:.1f} minutes each", flush=True)
    print(f"together {total:.0f} minutes, and a little for measuring")


def run(runner: Runner, text: str, experiment: Experiment, command: str, results: Path) -> None:
    """Make the runs of an experiment that are missing, seed by seed, and write its part of the page."""
    name = text.partition("=")[0]
    runs = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    rows = [runner.row(name, experiment, arm, seed) for arm, seed in runs]
    print(publish(results, name, document(experiment, rows, command)), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="CIFAR-100's official binary files")
    parser.add_argument("work", type=Path, help="folder of runs, rows and data made from the former")
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT[=EPOCHS]", help=", ".join(EXPERIMENTS))
    parser.add_argument("--photos", type=Path, help="the clothing photos, for finetune")
    parser.add_argument("--cifar10", type=Path, help="CIFAR-10's official binary files, for few-labels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="auto", help="bf16 is faster on CPUs that compute in it (AMX)")
    parser.add_argument("--seeds", type=int, help="number of seeds, in place of the experiments' own")
    parser.add_argument("--plan", action="store_true", help="measure how long what is left would take; run nothing")
    parser.add_argument("--tiny", action="store_true", help="rehearse everything in a few steps, in WORK/tiny")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    work = (asked.work / "tiny" if asked.tiny else asked.work).resolve()
    failed = 0
    try:
        places = prepare(asked.data, asked.photos, work)
        if asked.cifar10 is not None:
            places |= {CIFAR10: asked.cifar10.resolve()}
        runner = Runner(places, work, tiny=asked.tiny, precision=asked.precision)
        wanted = chosen(asked.experiments, places, seeds=asked.seeds)
        if asked.plan:
            show_plan(runner, wanted)
            return 0
        for text, experiment in wanted.items():
            try:
                repeated = command(text, asked.threads, asked.seeds, asked.precision)
                run(runner, text, experiment, repeated, work if asked.tiny else RESULTS)
            except UserError as problem:  # the others need not wait for this one to be mended
                print(f"{text}: {problem}", file=sys.stderr, flush=True)
                failed = 2
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
