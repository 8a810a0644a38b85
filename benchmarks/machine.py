"""What every result names: date, machine, versions."""

import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import vitrail

RESULTS = Path(__file__).parent / "results"


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
    path = RESULTS / f"{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# {name}\n\nCommand: `{command}`\n\nMachine: {describe()}\n\n{body.strip()}\n", encoding="utf-8")
    return path


def read_parts(name: str, *, tiny: bool) -> dict[str, Any]:
    """Return what is known of a benchmark that is measured part by part; nothing where it is rehearsed."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() and not tiny else {}


def write_parts(name: str, parts: dict[str, Any]) -> None:
    """Write `results/NAME.json`, from which its page is made."""
    (RESULTS / f"{name}.json").write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
