"""What every result names: date, machine, versions."""

import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

import vitrail


def describe() -> str:
    """Return one line: the day, processor and cores, system, Python, torch and vitrail."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    threads = torch.get_num_threads()
    return (
        f"{date.today()}, {processor}, {threads} threads, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, vitrail {vitrail.__version__}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def write_result(name: str, command: str, body: str) -> Path:
    """Write `results/NAME.md` with the command that repeats it, and return its path."""
    path = Path(__file__).parent / "results" / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# {name}\n\nCommand: `{command}`\n\nMachine: {describe()}\n\n{body.strip()}\n", encoding="utf-8")
    return path
