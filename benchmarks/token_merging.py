"""What merging tokens (ToMe) brings and costs: speed by tokens merged per block, and accuracy on CIFAR-100.

python benchmarks/token_merging.py [accuracy speed] --cifar100 BINARY [--turns 5] [--tiny]

Off the shelf, as the paper has it: the weights were trained without merging. `vitrail-mini`, which comes with Vitrail,
answers the 10,000 test pictures of CIFAR-100; ViT-S/16 at 224 has fresh weights, so that its speed alone counts. The
limit of what can be gained is the arithmetic that is left. What is measured goes into `results/token-merging.json`,
from which the page is written: accuracy and speed can be measured one by one.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import read_parts, write_parts, write_result
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitrail import load_model
from vitrail.benchmark.timing import Work, take_turns
from vitrail.config.model import model_config
from vitrail.config.vit import ViTConfig
from vitrail.engines import missing_packages
from vitrail.engines.start import Engine, eager, start
from vitrail.evaluation import evaluate
from vitrail.models import ImageModel, build

PARTS = ("accuracy", "speed")
MERGED = {"vitrail-mini": (0, 2, 4, 6, 8, 10), "vit-s16": (0, 4, 8, 13, 16)}
"""Tokens that every block merges: 13 is what the paper takes for ViT-B and ViT-S at 224."""
ENGINES = ("eager", "openvino")
Row = dict[str, Any]


def model_of(name: str, count: int, *, tiny: bool) -> ImageModel:
    """Return a model that merges so many tokens in every block; of ViT-S/16 one block for a rehearsal."""
    if name == "vitrail-mini":
        return load_model(name, merge_tokens=count).eval()
    torch.manual_seed(0)
    config = model_config(name)
    assert isinstance(config, ViTConfig)
    return build(replace(config, merge_tokens=count, depth=1 if tiny else config.depth)).eval()


def accuracy(data: Path, *, tiny: bool) -> list[Row]:
    rows = []
    for count in MERGED["vitrail-mini"][:: 4 if tiny else 1]:
        metrics = evaluate(model_of("vitrail-mini", count, tiny=tiny), data, split="test").metrics()
        rows.append({"merged": count, "top1": metrics["top1"], "nll": metrics["nll"]})
    return rows


def speed(name: str, turns: int, *, tiny: bool) -> list[Row]:
    """Measure batches of 8 pictures of 224 px, 64 of `vitrail-mini`'s 32."""
    models = {count: model_of(name, count, tiny=tiny) for count in MERGED[name]}
    first = models[0]
    images = torch.randn(8 if name == "vit-s16" else 64, first.config.channels, *first.config.image_size)
    works = {
        f"{label}/{count}": asked(eager(model) if label == "eager" else start(label, model, images), images)
        for label in ENGINES
        if not missing_packages(label)
        for count, model in models.items()
    }
    timings = take_turns(works, turns=turns, seconds=0.0 if tiny else 0.5)
    arithmetic = {count: operations(model, images[:1]) for count, model in models.items()}
    return [
        {
            "merged": count,
            "left": arithmetic[count] / arithmetic[0],
            **{
                label: {
                    "rate": timings[f"{label}/{count}"].rate,
                    "times": timings[f"{label}/{count}"].times(timings[f"{label}/0"]),
                }
                for label in ENGINES
                if f"{label}/0" in timings
            },
        }
        for count in models
    ]


def asked(engine: Engine, images: Tensor) -> Work:
    def work() -> int:
        return len(engine(images))

    return work


@torch.no_grad()
def operations(model: ImageModel, images: Tensor) -> int:
    """Return the floating-point operations of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def page(known: dict[str, Any]) -> str:
    lines = [str(__doc__).split("\n\n")[2], ""]
    if rows := known.get("accuracy"):
        whole = rows[0]["top1"]
        lines += [
            "## vitrail-mini on CIFAR-100: 49 tokens, 4 blocks, the 10,000 test pictures",
            "",
            "| merged per block | tokens at the end | top-1 | points lost | NLL |",
            "|---|---|---|---|---|",
            *(
                f"| {row['merged']} | {49 - 4 * row['merged']} | {row['top1']:.2%} | {100 * (whole - row['top1']):.2f} "
                f"| {row['nll']:.3f} |"
                for row in rows
            ),
            "",
        ]
    for name, what in {"vitrail-mini": "64 pictures of 32 px", "vit-s16": "8 pictures of 224 px, 197 tokens"}.items():
        if rows := known.get(f"speed/{name}"):
            lines += [
                f"## Speed of {name}, {what} at a time, fp32",
                "",
                "| merged per block | arithmetic left | at most | eager, pictures/s | times | OpenVINO | times |",
                "|---|---|---|---|---|---|---|",
                *(
                    f"| {row['merged']} | {row['left']:.0%} | {1 / row['left']:.2f} | {cells(row, 'eager')} | "
                    f"{cells(row, 'openvino')} |"
                    for row in rows
                ),
                "",
            ]
    return "\n".join(lines)


def cells(row: Row, label: str) -> str:
    return f"{row[label]['rate']:.1f} | {row[label]['times']:.2f}" if label in row else "- | -"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--cifar100", type=Path, help="folder of CIFAR-100's binary files, for accuracy")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="rehearse in seconds; nothing is kept")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if "accuracy" in given.parts and given.cifar100 is None:
        parser.error("accuracy needs --cifar100 BINARY")
    known = read_parts("token-merging", tiny=given.tiny)
    if "accuracy" in given.parts:
        known["accuracy"] = accuracy(given.cifar100, tiny=given.tiny)
    if "speed" in given.parts:
        known |= {f"speed/{name}": speed(name, 2 if given.tiny else given.turns, tiny=given.tiny) for name in MERGED}
    print(page(known))
    if not given.tiny:
        write_parts("token-merging", known)
        write_result("token-merging", "python benchmarks/token_merging.py --cifar100 CIFAR-100-BINARY", page(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
