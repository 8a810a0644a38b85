"""Started by torchrun: updates of every recipe in several layouts, each beside the same updates in one process.

`python -m torch.distributed.run --nproc-per-node N tests/sharded_updates.py RESULT` writes what differed as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from families import TINY
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_leaves
from updates import CPU, RECIPES, micro_batches

from vitrail.config.distillation import DistillationConfig
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import ModelConfig
from vitrail.config.recipes import SamConfig
from vitrail.config.run import AugmentConfig, LoopConfig, OptimConfig, RunConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.data.base import Batch
from vitrail.data.class_tree import cifar100_tree
from vitrail.models import build
from vitrail.models.blocks import compile_blocks
from vitrail.parallel import Precision, alone, autocast, leave, processes, rank, world_size
from vitrail.recipes import Learner, build_learner
from vitrail.sharding import gathered, local, of_first_process
from vitrail.training import placing
from vitrail.training.folder import RunFolder
from vitrail.training.saving import Saver, run_peers

STEPS, MICRO_BATCHES, SIZE = 20, 2, 8
# Wide enough for Adafactor to tell rows from columns; a key's bias has no gradient but noise, which Adam blows up.
VIT = replace(TINY["vit"], width=32, mlp_dim=48, qkv_bias=False)
OPTIM = OptimConfig(lr=1e-3, ema=0.9, clip_norm=0.1)  # so that every gradient is clipped
AT_LENGTH = "supervised", "sam", "meta pseudo labels"
"""Recipes whose processes speak to each other in ways of their own. The others, with a few updates each."""
LAYOUTS = {"ddp": "none", "full": "full", "hybrid": "hybrid"}


def learner_of(run: RunConfig, precision: Precision = "fp32") -> Learner:
    torch.manual_seed(0)
    model = of_first_process(partial(build, run.model)) if placing.spreads(run) else build(run.model)
    if isinstance(run.recipe, SemanticConfig):
        model.labels = cifar100_tree().names[: run.model.num_classes]
    teacher = None
    if isinstance(run.recipe, DistillationConfig):
        torch.manual_seed(1)
        teacher = build(run.model)
    place = partial(placing.place, run, precision)
    counts = np.ones(run.model.num_classes, np.int64)
    parts: dict[str, Any] = {"class_counts": counts, "device": CPU, "precision": precision}
    learner = build_learner(run, model, **parts, teacher=teacher, place=place)
    learner.schedule(0, 100)
    return learner


def batches_of(config: ModelConfig, step: int) -> list[Batch]:
    """Return the micro-batches of an update, over all processes."""
    return micro_batches(config, MICRO_BATCHES, SIZE, seed=step)


def part_of(batch: Batch, number: int, parts: int) -> Batch:
    rows = slice(number, None, parts)
    taken = {name: getattr(batch, name)[rows] for name in ("images", "targets", "keys")}
    unlabelled = batch.unlabelled and part_of(batch.unlabelled, number, parts)
    return replace(batch, **taken, unlabelled=unlabelled)


def trained(run: RunConfig, apart: int = 1, precision: Precision = "fp32", steps: int = STEPS) -> Learner:
    """Return a learner after its updates; in one process, micro-batches are cut into `apart` further ones."""
    learner = learner_of(run, precision)
    for step in range(steps):
        batches = batches_of(run.model, step)
        if world_size() > 1:
            batches = [part_of(batch, rank(), world_size()) for batch in batches]
        else:
            batches = [part_of(batch, number, apart) for batch in batches for number in range(apart)]
        learner.step(batches)
    return learner


def weights_of(learner: Learner, precision: Precision = "fp32") -> dict[str, Tensor]:
    """Return the weights of all models, their average, and what would be shipped with an answer of it; all whole."""
    with learner.shipped_weights(), torch.no_grad():
        state = gathered({f"shipped.{name}": tensor for name, tensor in learner.model.state_dict().items()})
        shipped = {name: tensor if tensor is None else tensor.clone() for name, tensor in state.items()}
        learner.models.eval()
        images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
        with autocast(precision, CPU):
            shipped["answer"] = (learner.judge or learner.model)(images)
        learner.models.train()
    state = learner.state_dict()
    found = {f"{model}.{name}": tensor for model, part in state["models"].items() for name, tensor in part.items()}
    average = state["average"]["average"] if state["average"] else {}
    return shipped | gathered(found | {f"average.{name}": tensor for name, tensor in average.items()})


def gap(one: dict[str, Tensor], many: dict[str, Tensor]) -> float:
    """Return the largest difference, by weights of at most 1."""
    assert one.keys() == many.keys()
    return max(
        float(((one[name] - many[name]).abs() / one[name].abs().clamp(min=1)).max())
        for name in one
        if one[name].is_floating_point()
    )


def compared(
    run: RunConfig,
    layouts: Iterable[str],
    apart_in_ddp: int = 1,
    precision: Precision = "fp32",
    steps: int = STEPS,
) -> dict[str, float]:
    """Return by layout how far updates lead from those of one process."""
    gaps: dict[str, float] = {}
    with alone():
        ones = {apart: weights_of(trained(run, apart, precision, steps), precision) for apart in {1, apart_in_ddp}}
    for layout in layouts:
        spread = replace(run, loop=replace(run.loop, sharding=LAYOUTS[layout]))
        many = weights_of(trained(spread, 1, precision, steps), precision)
        if rank() == 0:
            gaps[layout] = gap(ones[apart_in_ddp if layout == "ddp" else 1], many)
    return gaps


def run_of(name: str) -> RunConfig:
    recipe = RECIPES[name]
    if isinstance(recipe, DistillationConfig):
        recipe = replace(recipe, kind="soft")
    loop = LoopConfig(batch_size=SIZE * MICRO_BATCHES, accumulation=MICRO_BATCHES)
    return RunConfig(model=VIT, recipe=recipe, augment=AugmentConfig(crop="none", flip=0.5), optim=OPTIM, loop=loop)


def recipes(layouts: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in RECIPES if world_size() == 2 else AT_LENGTH:
        if name in ("hard distillation", "released meta pseudo labels"):
            continue  # differ from others in what is computed of answers
        run = run_of(name)
        # Processes that hold all weights perturb them each by its own gradient, as micro-batches do in one process.
        apart = world_size() if isinstance(run.recipe, SamConfig) else 1
        at_length = name in AT_LENGTH
        gaps = compared(run, layouts if at_length else layouts[1:], apart, steps=STEPS if at_length else 5)
        found |= {f"{name}, {layout}": far for layout, far in gaps.items()}
    return found


def optimizers() -> dict[str, float]:
    found: dict[str, float] = {}
    for name in ("adam", "sgd", "muon", "adafactor", "rmsprop"):
        run = replace(run_of("supervised"), optim=replace(OPTIM, name=name, ema=0.0))
        found[name] = compared(run, ["full"], steps=6).get("full", 0.0)
    return found


def others() -> dict[str, float]:
    found: dict[str, float] = {}
    supervised = run_of("supervised")
    frozen = TINY["efficientnet"]
    assert isinstance(frozen, EfficientNetConfig)
    frozen = replace(frozen, frozen_norm=True, dropout=0.0, drop_path=0.0)
    found["frozen norms"] = compared(replace(supervised, model=frozen), ["full"], steps=3).get("full", 0.0)
    again = replace(supervised, loop=replace(supervised.loop, activation_checkpointing=1.0, compile="on"))
    placing.compile_blocks = partial(compile_blocks, backend="eager")
    found["compiled, computed again"] = compared(again, ["full"], steps=3).get("full", 0.0)
    for precision in ("bf16", "fp16"):
        found[precision] = compared(supervised, ["full"], steps=3, precision=precision).get("full", 0.0)
    found["head first"] = in_phases(replace(supervised, optim=replace(OPTIM, head_first=0.5)))
    student = MetaPseudoLabelsConfig(uda_steps=0, student_wait=0, finetune_steps=2)
    found["student fine-tuned"] = in_phases(replace(supervised, recipe=student))
    return found


def in_phases(run: RunConfig, steps: int = 10) -> float:
    """Return how far a whole run of several processes ends from that of one."""

    def ended(run: RunConfig) -> dict[str, Tensor]:
        learner = learner_of(run)
        for step in range(steps):
            learner.schedule(step, steps)
            learner.step([part_of(batch, rank(), world_size()) for batch in batches_of(run.model, step)])
        return weights_of(learner)

    with alone():
        one = ended(run)
    many = ended(replace(run, loop=replace(run.loop, sharding="full")))
    return gap(one, many) if rank() == 0 else 0.0


def states(layout: str, place: Path) -> dict[str, float]:
    """Return 1 for each state that is the same, bit for bit, after it was written and taken over elsewhere."""
    found: dict[str, float] = {}
    names = ("adamw", "sgd", "muon", "adafactor", "rmsprop")
    runs = {name: replace(run_of("supervised"), optim=replace(OPTIM, name=name)) for name in names}
    runs |= {name: run_of(name) for name in ("sam", "meta pseudo labels")}
    for name, run in runs.items():
        spread = replace(run, loop=replace(run.loop, sharding=layout))
        if name == "adamw":
            with alone():
                initial = weights_of(learner_of(run))
            found["initial weights"] = same(initial, weights_of(learner_of(spread)))
        learner = trained(spread, steps=2)
        folder = RunFolder(place / f"{name}, {layout}", writes=rank() == 0)
        saver = Saver(folder, together=True)
        saver.save({"step": 2, "learner": learner.state_dict()}, keep=1)
        saver.wait()
        saver.close()
        before = gathered(learner.state_dict())
        many = learner_of(spread)
        many.load_state_dict((folder.load_state(run_peers()) or {})["learner"])
        found[f"{name}, read by all"] = same(before, gathered(many.state_dict()))
        with alone():
            one = learner_of(run)
            one.load_state_dict((folder.load_state() or {})["learner"])
            found[f"{name}, read by one"] = same(before, one.state_dict())
    return found


def same(a: Any, b: Any) -> float:
    if rank() != 0:
        return 1.0
    leaves = [tree_flatten_with_path(tree)[0] for tree in (a, b)]
    return float(
        len(leaves[0]) == len(leaves[1])
        and all(
            path == other_path and (torch.equal(x, y) if isinstance(x, Tensor) else x == y)
            for (path, x), (other_path, y) in zip(*leaves, strict=True)
        )
    )


def held(layout: str) -> float:
    """Return the largest share of what there is to hold that a process holds, between updates."""
    run = run_of("supervised")
    learner = trained(replace(run, loop=replace(run.loop, sharding=layout)), steps=1)
    tensors = [x for x in tree_leaves(learner.state_dict()) if isinstance(x, Tensor) and x.ndim]
    own = sum(local(x).numel() for x in tensors)
    share = torch.tensor(own / sum(x.numel() for x in tensors))
    dist.all_reduce(share, op=dist.ReduceOp.MAX)
    return float(share)


def main(result: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    with processes():
        layouts = ["ddp", "full"]
        if world_size() > 2:
            os.environ["LOCAL_WORLD_SIZE"] = "2"  # two machines, as far as layouts can tell
            layouts = ["ddp", "full", "hybrid"]
        works: dict[str, Callable[[], dict[str, float]]] = {
            "recipes": partial(recipes, layouts),
            "states": partial(states, layouts[-1], Path(result).parent),
            "held": lambda: {layout: held(layout) for layout in layouts[1:]},
        }
        if world_size() == 2:
            works |= {"optimizers": optimizers, "others": others}
        for name, work in works.items():
            began = time.perf_counter()
            found[name] = work()
            if rank() == 0:
                print(name, f"{time.perf_counter() - began:.1f} s", found[name], flush=True)
        if rank() == 0:
            Path(result).write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main(sys.argv[1])
