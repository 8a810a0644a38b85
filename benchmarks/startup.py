"""How long a person waits for help and for a first answer, each in a fresh process, beside `import torch`.

python benchmarks/startup.py
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from machine import write_result

from vitrail.benchmark.limits import photo

IMPORT = ["-c", "import vitrail"]
COMMANDS: dict[str, tuple[Sequence[str], float | None]] = {
    "python -c 'import vitrail'": (IMPORT, 0.3),
    "vitrail --help": (["-m", "vitrail", "--help"], 1.0),
    "vitrail train --help": (["-m", "vitrail", "train", "--help"], 1.0),
    "vitrail train demo --help": (["-m", "vitrail", "train", "demo", "--help"], 1.0),
    "vitrail predict vitrail-mini photo.jpg": (["-m", "vitrail", "predict", "vitrail-mini", "photo.jpg"], 8.0),
    "python -c 'import torch'": (["-c", "import torch"], None),
}
"""What is started, and in how many seconds it should be done."""
CACHES = Path("/proc/sys/vm/drop_caches")


def seconds(arguments: Sequence[str], folder: str) -> tuple[float, float | None]:
    """Return the median wall time of seven runs, and that of one whose files the system had to read from disk.

    None where the system lets nobody but its owner forget files.
    """
    first = once(arguments, folder) if forget() else None
    times = [once(arguments, folder) for _ in range(8)]
    return median(times[1:]), first


def once(arguments: Sequence[str], folder: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True, cwd=folder)
    return time.perf_counter() - began


def forget() -> bool:
    """Let the system forget what it holds of files, and return whether it did."""
    try:
        CACHES.write_text("3")
    except OSError:
        return False
    return True


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "photo.jpg").write_bytes(photo())
        for name, (arguments, goal) in COMMANDS.items():
            again, first = seconds(arguments, folder)
            reached = "" if goal is None else f"{goal:g}: {'reached' if again <= goal else 'missed'}"
            cold = "" if first is None else f"{first:.2f}"
            rows.append(f"| `{name}` | {again:.2f} | {cold} | {reached} |")
    head = "| command | seconds | files not in memory | at most |\n|---|---|---|---|\n"
    print(write_result("startup", "python benchmarks/startup.py", head + "\n".join(rows)))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
