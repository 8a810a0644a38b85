"""What moments in 8 bits and updates in the backward pass save, and what they cost.

python benchmarks/memory.py

Measured on ViT-S/16: the peak of the resident set and the time of an update. Calculated on models without memory: what
ViT-G/14 and V-MoE-15B hold on one GPU.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import table, write_result
from torch import nn

from vitrail.benchmark.timing import Work, take_turns
from vitrail.config.model import model_config
from vitrail.config.run import AugmentConfig, ModelConfig, OptimConfig, RunConfig
from vitrail.data.base import Batch
from vitrail.models import build
from vitrail.optim import build_optimizer
from vitrail.presets import PRESETS
from vitrail.recipes import build_learner

GIB = 2**30
GPU = 139
"""GiB of the GPU to fit on."""
PICTURES = 2
"""In a measured update: few, so that weights, not activations, are what memory holds."""
UPDATES = 4
NAMES = ("adamw", "adafactor")
VARIANTS: dict[str, OptimConfig] = {
    ", ".join([name, *(["8 bits"] if bits == "8bit" else []), *(["in backward"] if early else [])]): OptimConfig(
        name=name, lr=1e-5, clip_norm=0.0, moments=bits, in_backward=early
    )
    for name in ("adamw", "adafactor")
    for early in (False, True)
    for bits in ("full", "8bit")
}
REHEARSED = ["adamw", "adamw, 8 bits, in backward"]
LARGE = {"ViT-G/14": "vit-gigantic14-jft3b", "V-MoE-15B": "vmoe-15b-jft3b"}


def updating(model: ModelConfig, optim: OptimConfig) -> Work:
    """Return an update of a fresh model by our learner, as training makes it."""
    torch.manual_seed(0)
    run = RunConfig(model=model, optim=optim, augment=AugmentConfig(crop="none", flip=0.0))
    counts = np.ones(model.num_classes, np.int64)
    learner = build_learner(run, build(model), class_counts=counts, device=torch.device("cpu"), precision="fp32")
    images = torch.zeros(PICTURES, model.channels, *model.image_size, dtype=torch.uint8)
    batch = Batch(images, torch.arange(PICTURES), torch.arange(PICTURES), cropped=True)

    def work() -> int:
        learner.step([batch])
        return 1

    return work


def resident(what: str) -> int:
    """Return the present (`VmRSS`) or largest (`VmHWM`) resident set of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))


def measure_peak(model: ModelConfig, variant: str) -> None:
    """Print by how many bytes the resident set grows at most; in a process of its own."""
    before = resident("VmRSS")
    work = updating(model, VARIANTS[variant])
    for _ in range(UPDATES):
        work()
    print(json.dumps(resident("VmHWM") - before))


def peak(variant: str, *, tiny: bool) -> int:
    """Return the peak of a variant. What is freed goes back to the system at once, as it would to other tensors."""
    command = [sys.executable, __file__, "--peak-of", variant, *(["--tiny"] if tiny else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(json.loads(answer.stdout.splitlines()[-1]))


def held(model: nn.Module, optim: OptimConfig) -> dict[str, float]:
    """Return the GiB that training holds besides activations, of a model without memory.

    With updates in the backward pass the largest gradient stands for all. Mixed precision keeps a copy of the weights
    in bf16 until the pass has ended.
    """
    optimizer = build_optimizer(model, replace(optim, in_backward=False))  # pyright: ignore[reportArgumentType]
    sizes = [parameter.numel() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    states = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    )
    counted = {
        "weights": 4 * sum(sizes),
        "in bf16": 2 * sum(sizes),
        "gradients": 4 * (max(sizes) if optim.in_backward else sum(sizes)),
        "moments": states,
    }
    return {name: count / GIB for name, count in counted.items()}


def measured(model: ModelConfig, *, tiny: bool) -> str:
    """Return the table of peaks and times."""
    variants = REHEARSED if tiny else list(VARIANTS)
    peaks = {variant: peak(variant, tiny=tiny) for variant in variants}
    works = {variant: updating(model, VARIANTS[variant]) for variant in variants}
    times = take_turns(works, turns=2 if tiny else 7, seconds=0.0)
    rows = [["optimizer", "peak, MiB", "less than adamw, MiB", "update, ms", "times adamw's"]]
    for variant in variants:
        rows.append(
            [
                variant,
                f"{peaks[variant] / 2**20:.0f}",
                f"{(peaks['adamw'] - peaks[variant]) / 2**20:.0f}",
                f"{1e3 / times[variant].rate:.0f} ± {times[variant].spread:.0%}",
                f"{times['adamw'].times(times[variant]):.2f}",
            ]
        )
    return table(rows[0], rows[1:])


def calculated(name: str, model: nn.Module, variants: Sequence[str]) -> str:
    """Return the table of what a large model holds."""
    rows = [["optimizer", "weights", "in bf16", "gradients", "moments", "sum, GiB", f"left of {GPU} GiB"]]
    for variant in variants:
        parts = held(model, VARIANTS[variant])
        left = GPU - sum(parts.values())
        rows.append(
            [
                variant,
                *(f"{part:.1f}" for part in parts.values()),
                f"{sum(parts.values()):.1f}",
                f"{left:.1f}" if left > 0 else "does not fit",
            ]
        )
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"## {name}, {count / 1e6:,.1f} million parameters\n\n{table(rows[0], rows[1:])}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="rehearse in seconds; nothing is written")
    parser.add_argument("--peak-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    model = model_config("vit-s16")
    if options.tiny:
        model = replace(model, image_size=(32, 32), depth=2, num_classes=10)
    if options.peak_of:
        measure_peak(model, options.peak_of)
        return 0
    parts = [f"## ViT-S/16, {PICTURES} pictures, fp32, on the CPU\n\n{measured(model, tiny=options.tiny)}"]
    for name, preset in list(LARGE.items())[: 1 if options.tiny else None]:
        with torch.device("meta"):
            large = build(PRESETS[preset].config.model)
        parts.append(calculated(name, large, REHEARSED if options.tiny else list(VARIANTS)))
    body = "\n\n".join(parts)
    print(body)
    if not options.tiny:
        write_result("memory", "python benchmarks/memory.py", body)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
