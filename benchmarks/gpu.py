"""What a GPU does with Vitrail, in calls of at most 8 minutes that go on where the last one stopped.

    python benchmarks/gpu.py WORK [STAGE ...] [--cifar100 BINARY] [--cifar10 BINARY] [--minutes 8] [--seeds 5]

Stages: limits, training, inference, augmentation, loader, compile, speedruns. What is known stands in WORK/gpu.json,
written after every measurement; the table comes last, and from WORK it goes to `results/gpu.md` with `--publish`. It
needs torch, numpy and what `gpu-needs.txt` beside it lists. `--tiny` rehearses all of it in seconds, on a CPU too.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe as machine
from machine import write_result

from vitrail.benchmark.limits import square_product
from vitrail.benchmark.timing import Work, take_turns
from vitrail.benchmark.works import answering, loading, training
from vitrail.checkpoints import load_model
from vitrail.checkpoints.storage import write_file
from vitrail.config.model import ModelConfig, model_config
from vitrail.config.preprocessing import Preprocessing
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.errors import Interrupted, UserError
from vitrail.evaluation import evaluate
from vitrail.models import build
from vitrail.parallel import Precision, pick_device, pick_precision
from vitrail.presets import preset
from vitrail.presets.tiny import tiny, tiny_model
from vitrail.training import run_training
from vitrail.training.folder import RunFolder
from vitrail.zoo import describe

STAGES = ("limits", "training", "inference", "augmentation", "loader", "compile", "speedruns")
TRAINED = {
    "vit-ti16": 1024, "vit-s16": 512, "vit-b16": 256, "vit-l16": 128, "vit-h14": 64, "vit-gigantic14": 16,
    "coatnet-2": 128, "efficientnet-b0": 512, "vmoe-b16-every2": 128,
}  # fmt: skip
"""Pictures at a time in training; halved until they fit."""
ANSWERED = {"vit-s16": 512, "vit-b16": 256, "vit-l16": 256, "efficientnet-b0": 512}
GOALS = {
    **{f"training/{name}": goal for name, goal in
       {"vit-ti16": 0.30, "vit-s16": 0.48, "vit-b16": 0.62, "vit-l16": 0.70, "vit-h14": 0.72}.items()},
    "inference/vit-b16": 0.68, "inference/vit-l16": 0.78, "augmentation/augreg-224": 200_000, "loader/jpeg": 0.90,
    "inference/vit-b16, one": 0.40, "speedruns/cifar100-speedrun": 0.829, "speedruns/cifar10-speedrun": 0.965,
}  # fmt: skip
"""What a measurement should reach in its `figure`; the one of a single picture is milliseconds, at most."""
SPEEDRUNS = {"cifar100-speedrun": "cifar100", "cifar10-speedrun": "cifar10"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how all is measured."""

    work: Path
    device: torch.device
    precision: Precision
    tiny: bool
    data: dict[str, Path]

    def config(self, name: str) -> ModelConfig:
        """Return a model's configuration, for rehearsals that of a tiny member of its family."""
        return tiny_model(model_config(name)) if self.tiny else model_config(name)

    def turns(self, works: dict[str, Work]) -> dict[str, Any]:
        """Return timings of pieces of work that take turns."""
        return take_turns(works, turns=2 if self.tiny else 5, seconds=0.0 if self.tiny else 0.5, device=self.device)

    def product(self) -> Work:
        """Return a large matrix product in the precision of all."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]
        return square_product(self.device, 256 if self.tiny else 8192, dtype)


def limits(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the rates that nothing exceeds."""

    def copies() -> Row:
        size = 2**20 if bench.tiny else 2**31
        there = torch.empty(size, dtype=torch.uint8, device=bench.device)
        here = torch.empty(size // 8, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
        source = torch.zeros_like(there)
        works: dict[str, Work] = {
            "product": bench.product(),
            "copy": lambda: (there.copy_(source), 2 * size)[1],
            "to the device": lambda: (there[: size // 8].copy_(here, non_blocking=True), size // 8)[1],
        }
        rates = {name: timing.rate for name, timing in bench.turns(works).items()}
        return {"figure": rates["product"], "copy": rates["copy"], "to_device": rates["to the device"]}

    yield bench.precision, copies


def trained(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield updates of each model as it is, and with its blocks compiled."""
    for name, size in TRAINED.items():
        for compiled in (False, True):
            yield (
                f"{name}{', compiled' if compiled else ''}",
                lambda name=name, size=size, c=compiled: fitting(
                    bench,
                    name,
                    size,
                    lambda config, n: training(config, n, bench.device, bench.precision, compiled=c),
                    3,
                ),
            )


def answered(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield answers of each model, as it is and compiled, many at a time and one."""
    for name, size in ANSWERED.items():
        for compiled in (False, True):

            def works(config: ModelConfig, n: int, compiled: bool = compiled) -> Work:
                return answering(build(config), n, bench.device, bench.precision, compiled=compiled)

            title = f"{name}{', compiled' if compiled else ''}"
            yield title, lambda name=name, size=size, works=works: fitting(bench, name, size, works, 1)
            yield f"{title}, one", lambda name=name, works=works: one(bench, name, works)


def fitting(bench: Bench, name: str, size: int, make: Callable[[ModelConfig, int], Work], passes: int) -> Row:
    """Measure work beside matrix products, with the most pictures up to `size` that fit into memory."""
    config, side = bench.config(name), None
    while True:
        try:
            work = make(config, 2 if bench.tiny else size)
            timings = bench.turns({"product": bench.product(), "work": work})
            break
        except torch.cuda.OutOfMemoryError:
            work = None
            torch.cuda.empty_cache()
            if size == 1:
                return {"figure": 0.0, "note": "out of memory with one picture"}
            size //= 2
    side = "x".join(map(str, dict.fromkeys(model_config(name).image_size)))
    operations = passes * 2e9 * describe(name)["gmacs"][side]
    rate, limit = timings["work"].rate, timings["product"].rate
    return {"figure": operations * rate / limit, "pictures_per_second": rate, "batch": size, "limit": limit}


def one(bench: Bench, name: str, make: Callable[[ModelConfig, int], Work]) -> Row:
    """Measure the milliseconds of one answer."""
    timing = bench.turns({"work": make(bench.config(name), 1)})["work"]
    return {"figure": 1000 / timing.rate}


def augmented(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the recipe of AugReg on the device, from stored bytes to normalised pictures."""
    recipe = preset("vit-b16-imagenet-medium1").config.augment
    for side, size in ((224, 256), (32, 2048)):

        def measure(side: int = side, size: int = size) -> Row:
            count = 8 if bench.tiny else size
            images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=bench.device)
            keys = torch.arange(count, device=bench.device)
            batch = Batch(images, torch.zeros_like(keys), keys, cropped=True)
            augment = Augment(recipe, Preprocessing(image_size=(side, side)))
            timings = bench.turns({"work": lambda: (augment(batch, classes=1000), count)[1]})
            return {"figure": timings["work"].rate, "batch": count}

        yield f"augreg-{side}", measure


def loaded(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield training from JPEG files beside training from memory."""

    def measure() -> Row:
        config, size = bench.config("vit-s16"), 4 if bench.tiny else 256
        with tempfile.TemporaryDirectory() as folder:
            load, close = loading(config, size, Path(folder), os.cpu_count() or 1)
            update = training(config, size, bench.device, bench.precision)
            try:
                timings = bench.turns({"memory": update, "loading": load, "both": lambda: (load(), update())[1]})
            finally:
                close()
        rates = {name: timing.rate for name, timing in timings.items()}
        return {"figure": rates["both"] / rates["memory"], **rates}

    yield "jpeg", measure


def compiled(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the seconds until the first update with compiled blocks is done."""
    for name in ("vit-b16", "efficientnet-b0"):

        def measure(name: str = name) -> Row:
            began = time.perf_counter()
            training(bench.config(name), 2 if bench.tiny else 64, bench.device, bench.precision, compiled=True)()
            return {"figure": time.perf_counter() - began}

        yield name, measure


def raced(bench: Bench, seeds: int, deadline: float) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the speedruns whose data is there; each stops at the deadline and goes on in the next call."""
    for name, needs in SPEEDRUNS.items():
        for seed in range(seeds if needs in bench.data else 0):

            def measure(name: str = name, needs: str = needs, seed: int = seed) -> Row:
                config = replace(preset(name).config, seed=seed)
                config = tiny(config) if bench.tiny else config
                out = bench.work / f"{name}-{seed}"
                with stopped_at(deadline):
                    run_training(replace(config, data=str(bench.data[needs]), out=str(out), resume=True))
                folder = RunFolder(out, writes=False)
                found = evaluate(load_model(folder.last), bench.data[needs], split="test", device=bench.device)
                right = float((found.logits.argmax(axis=1) == found.targets).mean())
                return {"figure": right, "seconds": sum(row["seconds"] for row in folder.rows("timing.jsonl"))}

            yield f"{name}, seed {seed}", measure


@contextmanager
def stopped_at(deadline: float) -> Iterator[None]:
    """Let training be asked to stop, as by the system, when the time is up."""
    timer = threading.Timer(max(1.0, deadline - time.monotonic()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def table(rows: dict[str, Row]) -> str:
    """Return what is known as a table, the means of seeds beside their goals."""
    told: dict[str, list[Row]] = {}
    for name, row in rows.items():
        told.setdefault(name.partition(", seed")[0], []).append(row)
    lines = ["| measured | figure | goal | more |", "|---|---|---|---|"]
    for name, each in told.items():
        figure, goal = float(np.mean([row["figure"] for row in each])), GOALS.get(name.replace(", compiled", ""))
        small = name.endswith("one")
        reached = "" if goal is None else f"{goal:,g}: {'reached' if (figure <= goal) == small else 'missed'}"
        more = ", ".join(f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
                         for key, value in each[0].items() if key != "figure")  # fmt: skip
        lines.append(f"| {name} | {figure:,.4g} | {reached} | {more} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="what is known, and the runs")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--cifar100", type=Path, help="official binary files, for the speedrun")
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--seeds", type=int, default=5, help="of the speedruns")
    parser.add_argument("--publish", action="store_true", help="write results/gpu.md")
    parser.add_argument("--tiny", action="store_true", help="rehearse everything in a few steps")
    asked = parser.parse_args(arguments)
    if unknown := [stage for stage in asked.stages if stage not in STAGES]:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(STAGES)}.")
    deadline = time.monotonic() + 60 * asked.minutes
    device = pick_device()
    data = {name: getattr(asked, name).resolve() for name in ("cifar100", "cifar10") if getattr(asked, name)}
    bench = Bench(asked.work.resolve(), device, pick_precision("auto", device), asked.tiny, data)
    bench.work.mkdir(parents=True, exist_ok=True)
    # A rehearsal compiles nothing, which would take minutes: it runs what would be compiled as it is.
    with torch.compiler.set_stance("force_eager" if asked.tiny else "default"):
        rows, complete = measure_all(bench, asked.stages or STAGES, asked.seeds, deadline)
    if asked.publish:
        print(write_result("gpu", "python benchmarks/gpu.py WORK --publish", table(rows)))
    print(table(rows))
    print("all is measured" if complete else "there is more to do: the same command goes on")
    return 0 if complete else 3


def measure_all(bench: Bench, stages: Sequence[str], seeds: int, deadline: float) -> tuple[dict[str, Row], bool]:
    """Measure what is not known yet until the deadline; return all that is known, and whether nothing is left."""
    file = bench.work / "gpu.json"
    known: dict[str, Row] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    makers: dict[str, Iterator[tuple[str, Callable[[], Row]]]] = {
        "limits": limits(bench),
        "training": trained(bench),
        "inference": answered(bench),
        "augmentation": augmented(bench),
        "loader": loaded(bench),
        "compile": compiled(bench),
        "speedruns": raced(bench, seeds, deadline),
    }
    for stage in stages:
        for title, measure in makers[stage]:
            name = f"{stage}/{title}"
            if name in known:
                continue
            if time.monotonic() >= deadline:
                return known, False
            print(name, flush=True)
            try:
                known[name] = measure() | {"machine": machine()}
            except Interrupted:
                return known, False
            except UserError as problem:  # the others need not wait for this one to be mended
                print(f"{name}: {problem}", file=sys.stderr, flush=True)
                continue
            write_file(file, (json.dumps(known, indent=1) + "\n").encode())
    return known, True


if __name__ == "__main__":
    raise SystemExit(main())
