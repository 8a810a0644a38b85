"""How near the planner's peak of memory is to the allocator's, in real steps on a CPU.

    python benchmarks/planner.py

Both run the recipe itself. The planner's run is a rehearsal on tensors without memory, of other numbers of pictures
than the measured ones, from which it finds the peak of any number. The measured run is a real step after another one.
Its truth are the events of torch's CPU allocator (`torch.profiler`, `profile_memory`): every piece of memory taken and
given back, inside of kernels too. What operators return, which is all that the planner can see, is a part of that.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from machine import write_result
from torch.profiler import ProfilerActivity, profile, record_function

from vitrail.config.masked import MaskedConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.model import model_config
from vitrail.config.recipes import SamConfig
from vitrail.config.run import LoopConfig, ModelConfig, OptimConfig, RecipeConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.models import build
from vitrail.parallel import Precision
from vitrail.planner.memory import Timeline
from vitrail.planner.planning import PICTURES
from vitrail.planner.recorder import Kind, Phase
from vitrail.planner.rehearsal import noise, practised_learner, rehearse, simplified

TARGET = 0.05
MIB = 2**20


class Case(NamedTuple):
    """A step."""

    model: str | ModelConfig
    pictures: int
    """In a micro-batch."""
    optim: OptimConfig = OptimConfig()
    recipe: RecipeConfig = SupervisedConfig()
    precision: Precision = "fp32"
    recomputed: float = 0.0
    accumulation: int = 1

    @property
    def config(self) -> RunConfig:
        model = model_config(self.model) if isinstance(self.model, str) else self.model
        loop = LoopConfig(
            batch_size=self.pictures * self.accumulation,
            accumulation=self.accumulation,
            activation_checkpointing=self.recomputed,
        )
        return RunConfig(model=model, optim=self.optim, recipe=self.recipe, loop=loop)

    @property
    def words(self) -> str:
        """What a reader of the table has to know."""
        name = self.model if isinstance(self.model, str) else "ViT of width 192, depth 6, attention pooling"
        settings = [self.optim.name + (" in 8 bits" if self.optim.moments == "8bit" else "")]
        settings += ["averaged weights"] if self.optim.ema else []
        settings += ["blocks computed again"] if self.recomputed else []
        settings += [f"{self.accumulation} micro-batches"] if self.accumulation > 1 else []
        recipe = type(self.recipe).__name__.removesuffix("Config")
        return f"{name} | {recipe} | {', '.join(settings)} | {self.precision} | {self.pictures}"


POOLED = ViTConfig(image_size=(160, 160), width=192, depth=6, mlp_dim=768, heads=3, pool="map", num_classes=1000)
CASES = (
    Case("vit-ti16", 8),
    Case("vit-ti16", 24, recomputed=1.0),
    Case("vit-ti16", 12, precision="bf16"),
    Case("vit-s32", 6, OptimConfig(moments="8bit", ema=0.999)),
    Case("vit-s32", 3, OptimConfig(name="muon"), accumulation=2),
    Case(POOLED, 12, OptimConfig(name="adafactor"), accumulation=3),
    Case("vmoe-s32-last2", 8, OptimConfig(name="adafactor"), precision="bf16"),
    Case("cvt-13", 3, OptimConfig(name="sgd", ema=0.999)),
    Case("coatnet-0", 4, recomputed=0.5),
    Case("efficientnet-b0", 6, OptimConfig(name="rmsprop", ema=0.999)),
    Case("efficientnet-lite0", 8, OptimConfig(name="sgd"), recomputed=1.0),
    Case("wide-resnet-28-2", 40, OptimConfig(name="sgd"), SamConfig()),
    Case("wide-resnet-28-2", 6, OptimConfig(name="sgd", nesterov=True, ema=0.99), MetaPseudoLabelsConfig()),
    Case("vit-ti16", 20, recipe=MaskedConfig(decoder_width=128, decoder_depth=2, decoder_heads=4), accumulation=2),
)


def predicted(case: Case) -> int:
    """Return the peak as a plan finds it, in bytes."""
    few, more = rehearse(with_one_micro_batch(case.config), PICTURES, precision=case.precision)
    timeline = Timeline.of(few, more, PICTURES)
    if case.accumulation > 1:
        timeline = timeline.accumulating(apart=isinstance(case.recipe, SamConfig))
    held, _ = timeline.peak(case.pictures, np.ones((len(Kind), 2)), np.zeros(len(Phase)))
    return round(held.sum())


def with_one_micro_batch(config: RunConfig) -> RunConfig:
    return replace(config, loop=replace(config.loop, accumulation=1))


def measured(case: Case) -> int:
    """Return the peak of the allocator in a real step, in bytes."""
    config = simplified(case.config)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = build(config.model)
        learner = practised_learner(config, model, model, case.precision)
        learner.step([noise(config, case.pictures) for _ in range(case.accumulation)])
        gc.collect()
        with record_function("the step"):
            learner.step([noise(config, case.pictures) for _ in range(case.accumulation)])
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begins = next(event.start_ns() for event in events if event.name() == "the step")
    held = peak = 0
    for event in events:
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, held if event.start_ns() >= begins else 0)
    return peak


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="one small case; nothing is written")
    tiny = parser.parse_args(arguments).tiny
    rows = ["| model | recipe | optimizer, settings | precision | pictures | predicted, MiB | measured, MiB | off |"]
    rows.append("|---|---|---|---|---:|---:|---:|---:|")
    worst, seconds = 0.0, 0.0
    for case in CASES[:1] if tiny else CASES:
        began = time.perf_counter()
        plan = predicted(case)
        seconds = max(seconds, time.perf_counter() - began)
        truth = measured(case)
        off = plan / truth - 1
        worst = max(worst, abs(off))
        rows.append(f"| {case.words} | {plan / MIB:.1f} | {truth / MIB:.1f} | {off:+.2%} |")
        print(rows[-1], flush=True)
    verdict = "reached" if worst <= TARGET else "missed"
    rows.insert(
        0,
        f"Peak of memory in an update: predicted by rehearsals of {PICTURES[0]} and {PICTURES[1]} pictures without "
        "memory, and measured in a real update by the events of torch's CPU allocator.\n",
    )
    rows.append(
        f"\nThe largest difference is {worst:.2%}; within {TARGET:.0%} on all: {verdict}. A rehearsal took "
        f"{seconds:.0f} s at most. What is left are buffers inside of kernels, such as those in which oneDNN's "
        "convolutions reorder what they read."
    )
    body = "\n".join(rows)
    print(body)
    if not tiny:
        write_result("planner", "python benchmarks/planner.py", body)
    return 0 if worst <= TARGET else 1


if __name__ == "__main__":
    raise SystemExit(main())
