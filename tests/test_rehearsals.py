"""Every benchmark is rehearsed small, so that it runs when it is wanted."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.insert(0, str(BENCHMARKS))


def slow(*values: str) -> Any:
    """Return a case of the second tier: some seconds, or processes of its own."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("experts", "| tiny, 8 pictures | training | fp32 |"),
        ("checkpoints", "| until training goes on |"),
        ("label_errors", "| clothes ("),
        ("pointing", "ViT, class token | "),
        slow("memory", "| adamw, 8 bits, in backward |"),
        slow("planner", "| vit-ti16 | Supervised | adamw | fp32 |"),
        slow("export_parity", "| vit | "),
        slow("ray_prediction", "600 rows, 600 names, 0 with a problem, 600 as one process has them"),
    ],
)
def test_a_benchmark_is_rehearsed_and_writes_no_result(name: str, told: str, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    importlib.import_module(name).main(["--tiny"])
    assert told in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
