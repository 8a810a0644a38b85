"""One update of the weights, beside timm's and transformers' models at their best settings. Minutes a model.

.venv-peers/bin/python benchmarks/training_step.py [MODEL ...] [--parts loop fp32 bf16 compiled] [--turns 7] [--tiny]

Pictures and labels lie in memory; forward, cross-entropy, backward, clipping, fused AdamW; no dropout. Contestants take
turns, and memory is kept between updates (`vitrail.parallel.memory_kept`), for all of them. Whole models of the peers
are compiled, ours block by block; the first update compiles and is not counted. What is measured goes into
`results/training-step.json`, from which the page is written: models and parts can be measured one by one.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe as machine
from machine import read_parts, write_parts, write_result
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import peers.conftest  # noqa: F401  defines what timm's import of torchvision needs
import timm
import transformers

from vitrail.benchmark.limits import square_product
from vitrail.benchmark.timing import Work, take_turns
from vitrail.benchmark.works import TIMM, training_of
from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.model import ModelConfig, model_config
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig
from vitrail.data.arrays import ArraySource
from vitrail.data.base import Splits
from vitrail.models import build
from vitrail.models.blocks import compile_blocks
from vitrail.parallel import Precision, memory_kept
from vitrail.training.folder import RunFolder
from vitrail.training.loop import Loop
from vitrail.training.setup import assemble
from vitrail.training.signals import StopRequest
from vitrail.zoo import describe

PARTS = ("loop", "fp32", "bf16", "compiled")
"""The loop's own cost; all contestants by precision; those that are compiled, which takes minutes."""
MODELS = ("vit-s16", "efficientnet-b0", "coatnet-0")
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOISE, OVERHEAD = 0.03, 0.02
"""Shares: of a rate, within which "at least as fast" is reached; of an update, that the loop may take."""
CLASSES = 1000
Row = dict[str, Any]
Maker = Callable[[], nn.Module]


class Logits(nn.Module):
    """A model of transformers that answers with a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def as_peers(name: str) -> ModelConfig:
    """Return a model as the peers compute it, without dropout: the same operations on tensors of the same shapes."""
    config = replace(model_config(name), dropout=0.0, drop_path=0.0)
    if isinstance(config, CoAtNetConfig):
        return replace(config, gelu="erf", downsample="avg", stride_in="depthwise")
    return config if isinstance(config, EfficientNetConfig) else replace(config, gelu="erf")


def of_transformers(name: str) -> Maker | None:
    """Return what makes the model of transformers, if it has one; ViT with its fused attention."""
    match name:
        case "vit-s16":
            sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
            settings = transformers.ViTConfig(**sizes, num_labels=CLASSES)
            return lambda: Logits(transformers.ViTForImageClassification(settings))
        case "efficientnet-b0":
            scale = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280}
            rates = {"dropout_rate": 0.0, "drop_connect_rate": 0.0}
            settings = transformers.EfficientNetConfig(**scale, **rates, num_labels=CLASSES)
            return lambda: Logits(transformers.EfficientNetForImageClassification(settings))
    return None


def compiled_in_blocks(config: ModelConfig) -> nn.Module:
    model = build(config)
    compile_blocks(model)
    return model


def contestants(name: str, size: int, part: str) -> Iterator[tuple[str, Work]]:
    """Yield updates by name: ours first. Slow settings of the peers' convolutions, channels first, are timm's alone."""
    precision: Precision = "bf16" if part == "bf16" else "fp32"
    convolutional = name != "vit-s16"

    def update(model: nn.Module) -> Work:
        return training_of(model, size, CPU, precision)

    yield "vitrail", update(build(as_peers(name)))
    if part == "compiled":
        yield "vitrail, compiled", update(compiled_in_blocks(as_peers(name)))
    for peer, make in {"timm": lambda: timm.create_model(TIMM[name]), "transformers": of_transformers(name)}.items():
        if make is None or (part == "compiled" and peer != "timm"):
            continue
        if not convolutional or (part == "fp32" and peer == "timm"):
            yield peer, update(make())
        if convolutional:
            yield f"{peer}, channels last", update(make().to(memory_format=torch.channels_last))
        if part == "compiled":
            last = make().to(memory_format=torch.channels_last) if convolutional else make()
            last.compile()
            yield "timm, compiled" + (", channels last" if convolutional else ""), update(last)


def measured(name: str, part: str, size: int, turns: int) -> Row:
    """Measure one part; contestants take turns with the matrix product of the machine."""
    torch.manual_seed(0)
    if part == "loop":
        return overhead(name, size, turns)
    works: dict[str, Work] = {"matrix product": square_product(CPU, 2048, DTYPES.get(part, torch.float32))}
    works |= contestants(name, size, part)
    first: dict[str, float] = {}
    for label, work in works.items():
        began = time.perf_counter()
        work()
        first[label] = time.perf_counter() - began
    timings = take_turns(works, turns=turns, seconds=0.0)
    limit = timings.pop("matrix product")
    operations = 3 * 2e9 * describe(name)["gmacs"]["224"]
    ours = {label: timing for label, timing in timings.items() if label.startswith("vitrail")}
    best = max((label for label in timings if label not in ours), key=lambda label: timings[label].rate)
    rows = {
        label: {
            "rate": timing.rate,
            "spread": timing.spread,
            "first": first[label],
            "times_best": timing.times(timings[best]),
            "share": operations * timing.rate / limit.rate,
        }
        for label, timing in timings.items()
    }
    return {"batch": size, "limit": limit.rate, "best": best, "rows": rows}


@contextmanager
def looping(name: str, size: int) -> Iterator[tuple[Work, Work]]:
    """Lend an update by the training loop, its pictures from an array, and the bare one of the same model.

    Of the very same: twins differ by 10 % and more, by where their tensors come to lie.
    """
    rng = np.random.default_rng(0)
    config = as_peers(name)
    pictures = rng.integers(0, 256, (2 * size, *config.image_size, 3), dtype=np.uint8)
    source = ArraySource(pictures, np.arange(2 * size), [str(number) for number in range(CLASSES)])
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(
            out=folder,
            model=config,
            input=InputConfig(fit="pad"),
            augment=AugmentConfig(crop="none", flip=0.0),
            optim=OptimConfig(lr=1e-5),
            loop=LoopConfig(batch_size=size, steps=10_000, log_every=1, eval_every=10_000, save_every=10_000),
        )
        parts = assemble(run, Splits(source), CPU, "fp32")
        loop = Loop(run, parts, RunFolder(Path(folder), writes=True), StopRequest(), ())
        bare = training_of(parts.learner.model, size, CPU, "fp32")

        def update() -> int:
            loop._leave_if_asked()
            loop.update()
            return size

        yield update, bare
        parts.stream.close()


def overhead(name: str, size: int, turns: int) -> Row:
    """Measure how much longer an update by the loop takes than a bare one."""
    with looping(name, size) as (update, bare):
        timings = take_turns({"loop": update, "bare": bare}, turns=turns, seconds=0.0)
    share = timings["bare"].times(timings["loop"]) - 1
    return {"loop": timings["loop"].rate, "bare": timings["bare"].rate, "overhead": share, "batch": size}


def page(known: dict[str, Any]) -> str:
    """Return what is known, in tables, each ratio beside its target."""
    lines = ["\n\n".join(__doc__.split("\n\n")[2:]), ""]
    for name, parts in known.items():
        lines += [f"## {name}", ""]
        for part in (part for part in PARTS[1:] if part in parts):
            lines += [*table(part, parts[part]), ""]
        if (row := parts.get("loop")) is not None:
            told = "reached" if row["overhead"] <= OVERHEAD else "missed"
            lines += [
                f"Our loop, with stream, learner and log: {row['loop']:.2f} pictures/s, the bare update "
                f"{row['bare']:.2f}: {row['overhead']:+.1%} of it (at most {OVERHEAD:.0%}: {told}). {row['machine']}",
                "",
            ]
    return "\n".join(lines)


def table(part: str, row: Row) -> list[str]:
    rows = row["rows"]
    ours = max((r["times_best"], label) for label, r in rows.items() if label.startswith("vitrail"))
    target = f" (at least 1: {'reached' if ours[0] >= 1 - NOISE else 'missed'})" if part != "bf16" else ""
    return [
        f"{part}, batches of {row['batch']}: {ours[1]} is **{ours[0]:.2f}** times as fast as the best peer, "
        f"{row['best']}{target}. Matrix products: {row['limit'] / 1e9:.0f} GFLOP/s. {row['machine']}",
        "",
        "| contestant | pictures/s | spread | times the best peer | of matrix products | first update, s |",
        "|---|---|---|---|---|---|",
        *(
            f"| {label} | {r['rate']:.2f} | {r['spread']:.0%} | {r['times_best']:.2f} | {r['share']:.0%} | "
            f"{r['first']:.1f} |"
            for label, r in sorted(rows.items(), key=lambda item: -item[1]["rate"])
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=", ".join(MODELS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="pictures per update")
    parser.add_argument("--tiny", action="store_true", help="rehearse with two pictures; nothing is kept")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))  # the peers' tests take one
    if asked.tiny:
        asked.models, asked.parts, asked.turns, asked.batch = ["efficientnet-b0"], PARTS[:3], 2, 2
    known = read_parts("training-step", tiny=asked.tiny)
    for name in asked.models:
        for part in asked.parts:
            with memory_kept(CPU):  # as our loop computes; the peers gain as much by it
                row = measured(name, part, asked.batch, asked.turns)
            known.setdefault(name, {})[part] = row | {"machine": machine()}
            if asked.tiny:
                continue
            known = {key: known[key] for key in MODELS if key in known}
            write_parts("training-step", known)
            write_result("training-step", ".venv-peers/bin/python benchmarks/training_step.py", page(known))
        print(page({name: known[name]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
