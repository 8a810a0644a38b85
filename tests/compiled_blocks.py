"""Compiles blocks in a process of its own and prints what it finds; `test_step.py` says what that should be.

python compiled_blocks.py PHOTOS FOLDER
"""

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from families import TINY
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from updates import CPU, StopAt, after_updates, learner_of, micro_batches, recomputed

from vitrail import training
from vitrail.config.recipes import SupervisedConfig
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, RunConfig
from vitrail.errors import Interrupted
from vitrail.models.blocks import compile_blocks
from vitrail.training import placing, run_training
from vitrail.training.folder import RunFolder
from vitrail.training.speed import try_block

COMPILED = ("vit-moe", "coatnet")
"""Families with blocks of two kinds each: dense and sparse, convolution and attention."""
graphs: list[bool] = []
"""For each graph that was compiled, whether it was for training."""


def counting(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A compiler that changes nothing."""
    graphs.append(torch.is_grad_enabled())
    return graph.forward


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest difference of weights after updates."""
    pairs = zip(ours["state"]["models"]["model"].values(), theirs["state"]["models"]["model"].values(), strict=True)
    return max(float((one.double() - other.double()).abs().max()) for one, other in pairs)


def families() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in COMPILED:
        torch._dynamo.reset()
        config = TINY[name]
        plain, compiled = (learner_of(SupervisedConfig(), config) for _ in range(2))
        compile_blocks(compiled.model, backend=counting)
        before = len(graphs)
        states = after_updates(plain, config, updates=1), after_updates(compiled, config, updates=1)
        found[name] = {
            "graphs": len(graphs) > before,
            "names": list(plain.model.state_dict()) == list(compiled.model.state_dict()),
            "largest difference": distance(*states),
        }
    return found


def recomputing() -> dict[str, Any]:
    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        counting(graph, inputs)
        return lookup_backend("aot_eager")(graph, inputs)

    config, before = replace(TINY["wide-resnet"], drop_path=0.5), len(graphs)
    learner = recomputed(learner_of(SupervisedConfig(), config))
    compile_blocks(learner.model, backend=compiler)
    plain = after_updates(learner_of(SupervisedConfig(), config), config, updates=1)
    return {
        "largest difference": distance(after_updates(learner, config, updates=1), plain),
        "graphs": len(graphs) > before,
    }


def whole_run(photos: Path, folder: Path) -> dict[str, Any]:
    placing.compile_blocks = lambda model: compile_blocks(model, backend=counting)
    training.require_compiler = lambda device: None
    graphs.clear()
    plain, compiled = (
        RunConfig(
            data=str(photos),
            out=str(folder / wish),
            model=replace(TINY["vit"], dropout=0.1),
            input=InputConfig(workers=0, val_fraction=0.2),
            augment=AugmentConfig(mixup=0.2),
            loop=LoopConfig(batch_size=8, steps=6, eval_every=2, log_every=1, compile=wish),
        )
        for wish in ("off", "on")
    )
    run_training(plain)
    try:
        run_training(compiled, [StopAt()])
    except Interrupted:
        stopped = len(graphs)
    torch._dynamo.reset()
    run_training(replace(compiled, resume=True))
    document = RunFolder(folder / "on", writes=False).stored()
    files = ("metrics.jsonl", "last/model.safetensors", "best/model.safetensors")
    return {
        "resolved": document and document["resolved"]["loop"]["compile"],
        "same bytes": all(
            (folder / "on" / name).read_bytes() == (folder / "off" / name).read_bytes() for name in files
        ),
        "graphs": len(graphs),
        "graphs when stopped": stopped,
        "all for training": all(graphs),
    }


def one_block(family: str, **changes: Any) -> dict[str, Any]:
    config = replace(TINY[family], **changes)
    learner = learner_of(SupervisedConfig(), config)
    return asdict(try_block(learner, micro_batches(config), CPU, "fp32", backend="eager"))


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"families": families(), "recomputed": recomputing()}
    model = learner_of(SupervisedConfig()).model
    compile_blocks(model, backend="eager")
    found["copy is compiled"] = any(block._compiled_call_impl is not None for block in copy.deepcopy(model).blocks())
    found["run"] = whole_run(Path(sys.argv[1]), Path(sys.argv[2]))
    found["four alike"] = one_block("vit", depth=4, drop_path=0.0)
    found["all different"] = one_block("efficientnet", drop_path=0.1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
