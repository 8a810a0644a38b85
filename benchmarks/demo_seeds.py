"""The demo's accuracy over three seeds, beside logistic regression on the same pictures.

python benchmarks/demo_seeds.py
"""

import tempfile
from pathlib import Path
from statistics import mean, stdev

from machine import write_result

from vitrail.demo import run_demo

SEEDS = (0, 1, 2)


def main() -> None:
    rows, accuracies = [], []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            result = run_demo(Path(folder) / "demo", seed=seed)
        metrics = result.evaluation.metrics()
        accuracies.append(metrics["top1"])
        rows.append(
            f"| {seed} | {metrics['top1']:.2%} | {metrics['ece']:.2%} | {result.baseline['top1']:.2%} | "
            f"{result.seconds:.0f} |"
        )
        print(rows[-1], flush=True)
    table = "| seed | ViT top-1 | ECE | logistic regression top-1 | seconds, start to report |\n|---|---|---|---|---|\n"
    summary = f"Mean of {len(SEEDS)} seeds: {mean(accuracies):.2%} (standard deviation {stdev(accuracies):.2%})."
    print(write_result("demo", "python benchmarks/demo_seeds.py", table + "\n".join(rows) + "\n\n" + summary))


if __name__ == "__main__":
    main()
