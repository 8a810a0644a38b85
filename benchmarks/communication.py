"""What processes send to each other in an update, counted, against the planner's formula.

python benchmarks/communication.py

Processes on this machine, over gloo; bytes are counted where collectives are called, not timed. Of n processes, each
sends (n-1)/n of what is gathered or scattered among them, and twice that of what is summed (as rings do).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from machine import table, write_result
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.recipes import SamConfig, SupervisedConfig
from vitrail.config.run import AugmentConfig, LoopConfig, OptimConfig, RecipeConfig, RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.base import Batch
from vitrail.models import build
from vitrail.parallel import leave, processes, rank, world_size
from vitrail.planner.gpus import GPUS
from vitrail.planner.layouts import Layout, Workload
from vitrail.recipes import Learner, build_learner
from vitrail.sharding import of_first_process
from vitrail.training.placing import place, spreads

CPU = torch.device("cpu")
PICTURES = 2
"""Of each process in a micro-batch: what is sent does not depend on it."""
MODEL = ViTConfig(image_size=(64, 64), patch_size=(16, 16), num_classes=100, width=192, depth=12, mlp_dim=768, heads=3)
TINY = replace(MODEL, width=32, depth=2, mlp_dim=64, heads=2)
RECIPES: dict[str, tuple[RecipeConfig, int]] = {
    "supervised": (SupervisedConfig(), 1),
    "supervised, 4 micro-batches": (SupervisedConfig(), 4),
    "SAM": (SamConfig(), 1),
    "Meta Pseudo Labels": (MetaPseudoLabelsConfig(uda_steps=0, student_wait=0, finetune_steps=0), 1),
}
LAYOUTS: dict[str, Literal["none", "full", "hybrid"]] = {"DDP": "none", "FSDP": "full", "hybrid": "hybrid"}
PASSES = {SamConfig: (2.0, 2.0), MetaPseudoLabelsConfig: (2.0, 1.0)}
"""Forward and backward passes of all weights that learn; of Meta Pseudo Labels, teacher's and student's on average."""


class Counting(TorchDispatchMode):
    """Adds up what this process sends, by collective."""

    RINGS: ClassVar[dict[str, float]] = {"_allgather_base_": 1.0, "_reduce_scatter_base_": 1.0, "allreduce_": 2.0}
    """Times that all of it passes through a process, but for that process's own share."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            # Of what is gathered or scattered, the larger side is all of it.
            size = max(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            self.sent[name] += self.RINGS[name] * (group.size() - 1) / group.size() * size
        return func(*args, **kwargs or {})


def learner_of(run: RunConfig) -> Learner:
    torch.manual_seed(0)
    model = of_first_process(partial(build, run.model)) if spreads(run) else build(run.model)
    parts: dict[str, Any] = {"class_counts": np.ones(run.model.num_classes, np.int64), "device": CPU}
    learner = build_learner(run, model, **parts, precision="fp32", place=partial(place, run, "fp32"))
    learner.schedule(0, 100)
    return learner


def batch_of(model: ViTConfig) -> Batch:
    images = torch.zeros(PICTURES, model.channels, *model.image_size, dtype=torch.uint8)
    batch = Batch(images, torch.arange(PICTURES), torch.arange(PICTURES), cropped=True)
    return replace(batch, unlabelled=batch)


def counted(run: RunConfig) -> dict[str, float]:
    """Return bytes that a process sends in an update, by collective."""
    learner, batches = learner_of(run), [batch_of(run.model)] * run.loop.accumulation  # pyright: ignore[reportArgumentType]
    for _ in range(2):  # DDP finds its buckets and tells all of them, FSDP finds its order
        learner.step(batches)
    with Counting() as counting:
        learner.step(batches)
    return dict(counting.sent)


def predicted(run: RunConfig, layout: Layout) -> float:
    """Return bytes that a GPU sends in an update, by the planner's formula."""
    with torch.device("meta"):
        model = build(run.model)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
    models = 2 if isinstance(run.recipe, MetaPseudoLabelsConfig) else 1
    dense = float(models * sum(p.numel() for p in model.parameters()))
    forwards, backwards = PASSES.get(type(run.recipe), (1.0, 1.0))
    work = Workload(
        dense=dense,
        experts=0.0,
        blocks=len(blocks),
        block=float(max(blocks)),
        block_experts=0.0,
        rest=dense - models * sum(blocks),
        wide=4,
        forwards=forwards,
        backwards=backwards,
        at_once=not isinstance(run.recipe, SupervisedConfig),
        dispatched=0.0,
        mixtures=0,
    )
    return sum(exchange.sent for exchange in layout.exchanges(work, PICTURES, run.loop.accumulation))


def work(result: str, *, tiny: bool) -> None:
    """Count in a process that torchrun started."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with processes():
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # machines of two, as far as layouts can tell
        for name, (recipe, micro_batches) in RECIPES.items():
            for layout, sharding in LAYOUTS.items():
                shards = {"none": 1, "full": world_size(), "hybrid": 2}[sharding]
                if sharding == "hybrid" and world_size() == 2:
                    continue
                run = RunConfig(
                    model=TINY if tiny else MODEL,
                    recipe=recipe,
                    augment=AugmentConfig(crop="none", flip=0.0),
                    optim=OptimConfig(ema=0.9),
                    loop=LoopConfig(
                        batch_size=PICTURES * micro_batches * world_size(),
                        accumulation=micro_batches,
                        sharding=sharding,
                    ),
                )
                by_formula = predicted(run, Layout(name=layout, gpus=world_size(), gpu=GPUS["h100"], shards=shards))
                rows.append({"recipe": name, "layout": layout, "formula": by_formula, "sent": counted(run)})
        if rank() == 0:
            Path(result).write_text(json.dumps(rows))
    leave(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count in 2 and 4 processes, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="rehearse with a tiny model; writes nothing")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work, tiny=options.tiny)
    rows: list[list[str]] = []
    for count in (2,) if options.tiny else (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "found.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            script = [__file__, "--work", str(found), *(["--tiny"] if options.tiny else [])]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *launcher, *script], env=environment, check=True)
            rows += (row_of(count, each) for each in json.loads(found.read_text()))
    head = ["processes", "recipe", "layout", "gathered", "scattered", "summed", "in all", "formula", "ratio"]
    body = (
        f"MB that a process sends in an update of a ViT (width {MODEL.width}, depth {MODEL.depth}), in fp32. In\n"
        "`hybrid`, machines have two processes. What is above the formula: parts of axes that cannot be cut evenly\n"
        "are filled up, and norms are summed.\n\n" + table(head, rows)
    )
    if options.tiny:
        print(body)
    else:
        print(write_result("communication", "python benchmarks/communication.py", body))


def row_of(count: int, found: dict[str, Any]) -> list[str]:
    sent = [found["sent"].get(name, 0.0) for name in Counting.RINGS]
    shown = [f"{size / 1e6:.3f}" for size in (*sent, sum(sent), found["formula"])]
    return [str(count), found["recipe"], found["layout"], *shown, f"{sum(sent) / found['formula']:.3f}"]


if __name__ == "__main__":
    main()
