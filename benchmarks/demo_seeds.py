"""The demo over three seeds: fine-tuned, from scratch, logistic regression, on the same 240 test pictures.

python benchmarks/demo_seeds.py
"""

import tempfile
from pathlib import Path
from statistics import mean, stdev

from machine import write_result

from vitrail.demo import FINE_TUNED, run_demo

SEEDS = (0, 1, 2)


def main() -> None:
    rows: list[str] = []
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            result = run_demo(Path(folder) / "demo", seed=seed)
        reached = {FINE_TUNED: result.evaluation.metrics()["top1"]}
        reached |= {other["name"]: other["top1"] for other in result.others}
        for name, top1 in reached.items():
            found.setdefault(name, []).append(top1)
        rows.append(f"| {seed} | {' | '.join(f'{top1:.1%}' for top1 in reached.values())} | {result.seconds:.0f} |")
        print(rows[-1], flush=True)
    head = f"| seed | {' | '.join(found)} | seconds, start to report |\n|{'---|' * (len(found) + 2)}\n"
    summary = ", ".join(f"{name} {mean(each):.1%} (deviation {stdev(each):.1%})" for name, each in found.items())
    ahead = mean(found[FINE_TUNED]) - max(mean(each) for name, each in found.items() if name != FINE_TUNED)
    summary = (
        f"Means of {len(SEEDS)} seeds: {summary}. Pre-training is worth {100 * ahead:.1f} points over the next best."
    )
    body = "Top-1 on the test pictures:\n\n" + head + "\n".join(rows) + "\n\n" + summary
    print(write_result("demo", "python benchmarks/demo_seeds.py", body))


if __name__ == "__main__":
    main()
