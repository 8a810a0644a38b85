"""The tests of faults and generated inputs with many more cases than `make test` runs, and the notebooks: an hour.

    python benchmarks/campaign.py [--scale 20]

20,000 mutated pictures, 160 kills while a model folder is written, and every other test of storage, resuming and
processes. The code of each notebook of the documentation runs in a folder of its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import write_result

TESTS = (
    "test_decode.py",
    "test_storage.py",
    "test_resume.py",
    "test_tensors.py",
    "test_processes.py",
    "test_training.py",
)


ROOT = Path(__file__).parent.parent


def run_notebook(path: Path) -> bool:
    """Return whether the code of a notebook runs from top to bottom, as one script."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", type=int, default=20)
    scale = parser.parse_args().scale
    rows = []
    for name in TESTS:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", f"tests/{name}"],
            cwd=ROOT,
            env=os.environ | {"VITRAIL_CAMPAIGN": str(scale)},
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout[-2000:], flush=True)
        # pytest -q ends in a line such as "12 passed in 3.4s"
        count = re.search(r"(\d+ (?:passed|failed).*) in ", done.stdout)
        outcome = count[1] if count else "all passed" if done.returncode == 0 else "FAILED"
        rows.append(f"| `{name}` | {outcome} | {time.monotonic() - began:.0f} |")
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        began = time.monotonic()
        outcome = "ran" if run_notebook(path) else "FAILED"
        rows.append(f"| `{path.relative_to(ROOT)}` | {outcome} | {time.monotonic() - began:.0f} |")
    body = f"{1000 * scale:,} mutated pictures, {8 * scale} kills of a process that writes a model folder.\n\n"
    body += "| tests and notebooks | outcome | seconds |\n|---|---|---|\n" + "\n".join(rows)
    print(write_result("campaign", f"python benchmarks/campaign.py --scale {scale}", body))


if __name__ == "__main__":
    main()
