"""100,000 small pictures answered on Ray, a worker killed twice: their rows counted, and timed beside one process.

    python benchmarks/ray_prediction.py [--pictures 100000]

Pictures are PNG files of 32 pixels, one in 10,000 of them empty; the model is vitrail-mini. Both ways read the files,
find the fastest engine, and write Parquet. `--tiny` rehearses it with 600 pictures, and writes no result.
"""

import argparse
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread

import numpy as np
from machine import table, write_result
from PIL import Image
from pyarrow import parquet

from vitrail import distributed_prediction
from vitrail.checkpoints import load_model
from vitrail.distributed_prediction import predict_distributed
from vitrail.models import ImageModel
from vitrail.prediction import predict, write_predictions

KILLS, ONE_BROKEN_IN = 2, 10_000
APART = 1e-4
"""By which a probability may differ: engines round otherwise."""


def write_pictures(folder: Path, count: int) -> None:
    """Write so many pictures: eight by eight random colours, enlarged."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(exist_ok=True)
        if number % ONE_BROKEN_IN == ONE_BROKEN_IN // 2:
            path.touch()
            continue
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture.resize((32, 32), Image.Resampling.BICUBIC).save(path, compress_level=1)


def kill_workers(out: Path, done: Event, killed: list[int]) -> None:
    """Kill a process that answers parts, once when there is one, and once when there are three."""
    while not done.wait(0.05) and len(killed) < KILLS:
        if sum(1 for _ in out.glob("part-*.parquet")) < 2 * len(killed) + 1:
            continue
        for process in Path("/proc").glob("[0-9]*"):
            try:
                working = (process / "cmdline").read_bytes().startswith(b"ray::MapWorker")
            except OSError:  # it has just ended
                continue
            if working:
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(int(process.name))
                break


def answered(model: ImageModel, pictures: Path, out: Path, *, kill: bool) -> tuple[float, int]:
    """Return the seconds that Ray takes, and how many workers were killed meanwhile."""
    done, killed = Event(), list[int]()
    killer = Thread(target=kill_workers, args=(out, done, killed))
    if kill:
        killer.start()
    began = time.perf_counter()
    predict_distributed(model, [pictures], out)
    seconds = time.perf_counter() - began
    done.set()
    if kill:
        killer.join()
    return seconds, len(killed)


def compared(out: Path, plain: Path) -> dict[str, int]:
    """Return what rows of both ways have in common, counted."""
    ours, theirs = parquet.read_table(out).to_pandas(), parquet.read_table(plain).to_pandas()
    both = ours.merge(theirs, on="name", suffixes=("", "_plain"))
    near = (both["probability_1"] - both["probability_1_plain"]).abs() < APART
    return {
        "rows": len(ours),
        "names": ours["name"].nunique(),
        "with a problem": int(ours["problem"].notna().sum()),
        "as one process has them": int((near | (both["problem"].notna() & both["problem_plain"].notna())).sum()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    count = 600 if asked.tiny else asked.pictures
    if asked.tiny:
        distributed_prediction.FEWEST = 64
    model = load_model("vitrail-mini")
    with tempfile.TemporaryDirectory() as root:
        pictures = Path(root) / "pictures"
        pictures.mkdir()
        write_pictures(pictures, count)
        began = time.perf_counter()
        plain = Path(root) / "plain.parquet"
        write_predictions(predict(model, [pictures]), plain)
        alone = time.perf_counter() - began
        calm, _ = answered(model, pictures, Path(root) / "calm", kill=False)
        out = Path(root) / "killed"
        disturbed, killed = answered(model, pictures, out, kill=True)
        found = compared(out, plain)
    times = [("one process", alone), ("Ray", calm), (f"Ray, {killed} workers killed", disturbed)]
    rows = [[way, f"{s:.1f}", f"{count / s:,.0f}", f"{alone / s:.2f}"] for way, s in times]
    page = (
        f"{count:,} pictures, {killed} workers killed (`kill -9`): "
        + ", ".join(f"{number:,} {what}" for what, number in found.items())
        + ".\n\n"
        + table(["way", "seconds", "pictures a second", "of one process"], rows)
        + "\n\nSeconds are those of the whole call. Ray's begin with starting a cluster on this machine."
    )
    print(page)
    if not asked.tiny:
        write_result("ray-prediction", "python benchmarks/ray_prediction.py", page)
    whole = found["rows"] == found["names"] == found["as one process has them"] == count and killed == KILLS
    return 0 if whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
