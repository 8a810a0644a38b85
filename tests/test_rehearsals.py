"""Every benchmark is rehearsed small, so that it runs when it is wanted."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
sys.path.insert(0, str(BENCHMARKS))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("experts", "| tiny, 8 pictures | training | fp32 |"),
        pytest.param("memory", "| adamw, 8 bits, in backward |", marks=pytest.mark.slow),  # in processes of its own
        ("pointing", "ViT, class token | "),
    ],
)
def test_a_benchmark_is_rehearsed_and_writes_no_result(name: str, told: str, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    importlib.import_module(name).main(["--tiny"])
    assert told in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
