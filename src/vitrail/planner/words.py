"""A plan in words, in rows of a table, and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from vitrail.config.distillation import DistillationConfig
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.recipes import SamConfig
from vitrail.config.run import RECIPES
from vitrail.config.semantic import SemanticConfig
from vitrail.planner.constants import CONSTANTS
from vitrail.planner.gpus import GIB
from vitrail.planner.planning import PLAIN, RECOMPUTED, Choice, Plan

MILLION = 1e6
PREDICTED = "Predicted: none of these figures has been measured on a GPU"


def title(plan: Plan) -> str:
    """Return what is planned."""
    machines = -(-plan.gpus // plan.gpu.per_machine)
    where = f" in {machines} machines" if machines > 1 else ""
    return f"{plan.run.name} on {plan.gpus} x {plan.gpu.title}{where}"


def facts(plan: Plan) -> dict[str, str]:
    """Return what is known of the run itself, by heading."""
    config = plan.run.config
    recipe = next(name for name, kind in RECIPES.items() if type(config.recipe) is kind)
    averaged = ", averaged weights" if config.optim.ema else ""
    experts = f", {plan.expert_parameters:,} of them in experts" if plan.expert_parameters else ""
    kept, again = (_memory(plan.activations[name]) for name in (PLAIN, RECOMPUTED))
    return {
        "model": f"{plan.run.model} at {_pixels(config.model.image_size)} px, {plan.parameters:,} parameters{experts}",
        "recipe": f"{recipe}, {config.optim.name}{averaged}, {plan.precision}"
        f"{', compiled' if plan.compiled else ''}, {config.loop.batch_size:,} pictures an update, {_length(plan)}",
        "a picture": f"{plan.inference_flops / 1e9:,.4g} GFLOP to answer, {plan.training_flops / 1e9:,.4g} GFLOP to "
        f"learn from; {kept} of activations kept meanwhile, {again} with {RECOMPUTED}",
    }


def table(plan: Plan) -> list[list[str]]:
    """Return the choices that fit, best first, under a row of headings."""
    paid = ["time", "cost"] if plan.run.steps is not None or plan.run.minutes is not None else None
    head = ["layout", "settings", "GPU holds", "micro-batch", "update", "pictures/s", "of peak", "GPU sends"]
    head += paid or ["1M pictures", "cost"]
    return [head, *(_row(plan, choice) for choice in plan.fitting)]


def launch(plan: Plan) -> str:
    """Return what starts Vitrail on all GPUs of a plan, once on each machine."""
    machines, each = -(-plan.gpus // plan.gpu.per_machine), min(plan.gpus, plan.gpu.per_machine)
    if plan.gpus == 1:
        return "vitrail"
    nodes = f"--nnodes {machines} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if machines > 1 else ""
    return f"torchrun {nodes}--nproc-per-node {each} -m vitrail"


def reasons(plan: Plan) -> Iterator[str]:
    """Yield why other layouts do not fit."""
    for choice in plan.others:
        largest = sorted(choice.memory.items(), key=lambda part: -part[1])[:3]
        parts = ", ".join(f"{name} {_memory(size)}" for name, size in largest)
        yield (
            f"{choice.layout} does not fit: it takes {_memory(choice.total)} where there are {_memory(plan.room)}, "
            f"{choice.micro_batch:,} {'picture' if choice.micro_batch == 1 else 'pictures'} at a time, "
            f"{choice.settings}, of which {parts}."
        )
    if not plan.fitting:
        yield (
            f"On {plan.fewest} GPUs it fits: --gpus {plan.fewest}."
            if plan.fewest
            else "It fits on no number of these GPUs that has been looked at."
        )


def assumptions(plan: Plan) -> Iterator[str]:
    """Yield what a plan takes for granted."""
    gpu = plan.gpu
    yield (
        f"A GPU: {gpu.memory:g} GiB, of which {plan.room / GIB:.1f} for the run; {gpu.half:g} TFLOP/s in bf16; "
        f"{gpu.bandwidth:g} GB/s; {gpu.link:g} GB/s to others in its machine of {gpu.per_machine}; {gpu.network:g} "
        f"GB/s from machine to machine. {gpu.source}."
    )
    yield f"An hour of it costs ${plan.price:.2f}: an assumption; --price says otherwise."
    yield (
        "Memory is counted piece by piece while the recipe runs on tensors without memory, with the kernels of GPUs; "
        "blocks that are compiled keep less."
    )
    if plan.gpus > 1:
        yield (
            "DDP, FSDP, hybrid (FSDP in each machine, copies between them) and experts (spread over so many GPUs, FSDP "
            "for the rest) as torch does them: a block at a time, gathered in the precision of products, gradients "
            "exchanged in fp32, with FSDP after every micro-batch."
        )
    if not all(choice.available for choice in [*plan.fitting, *plan.others]):
        yield "Experts are spread in plans only: `vitrail train` has DDP, FSDP and hybrid."
    yield "Loading pictures, evaluation and checkpoints take no time; an update starts when the last one ends."
    yield from _of_the_recipe(plan)


def to_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as JSON; memory in bytes, times in seconds, unless they say otherwise."""
    config = plan.run.config
    return {
        "name": plan.run.name,
        "preset": plan.run.preset,
        "model": plan.run.model,
        "predicted": True,
        "image_size": list(config.model.image_size),
        "batch_size": config.loop.batch_size,
        "updates": plan.run.steps,
        "precision": plan.precision,
        "parameters": plan.parameters,
        "expert_parameters": plan.expert_parameters,
        "flops": {"inference": plan.inference_flops, "training": plan.training_flops},
        "activations_per_picture": plan.activations,
        "gpus": plan.gpus,
        "gpu": asdict(plan.gpu),
        "price": plan.price,
        "room": plan.room,
        "fits": [_choice(choice) for choice in plan.fitting],
        "does_not_fit": [_choice(choice) for choice in plan.others],
        "fewest_gpus": plan.gpus if plan.fitting else plan.fewest,
        "constants": {name: asdict(each) for name, each in CONSTANTS.items()},
        "assumptions": list(assumptions(plan)),
    }


def _choice(choice: Choice) -> dict[str, Any]:
    stored = {name: getattr(choice, name) for name in ("layout", "settings", "flags", "available")}
    stored |= {"micro_batch": choice.micro_batch, "accumulation": choice.accumulation}
    stored |= {"memory": {**choice.memory, "total": choice.total}}
    if not choice.fits:
        return stored
    return stored | {
        "exchanges": [asdict(each) for each in choice.exchanges],
        "seconds_per_update": choice.seconds,
        "pictures_per_second": choice.pictures_per_second,
        "utilisation": choice.utilisation,
        "hours": choice.hours,
        "cost": choice.cost,
    }


def _row(plan: Plan, choice: Choice) -> list[str]:
    hours, cost = choice.hours, choice.cost
    if hours is None or cost is None:
        hours = MILLION / choice.pictures_per_second / 3600
        cost = hours * plan.gpus * plan.price
    times = f" x {choice.accumulation}" if choice.accumulation > 1 else ""
    return [
        choice.layout,
        choice.settings,
        f"{choice.total / GIB:.1f} GiB",
        f"{choice.micro_batch:,}{times}",
        _duration(choice.seconds / 3600),
        f"{choice.pictures_per_second:,.0f}",
        f"{choice.utilisation:.0%}",
        f"{sum(each.sent for each in choice.exchanges) / 1e9:,.0f} GB" if choice.exchanges else "",
        _duration(hours),
        f"${cost:,.0f}" if cost >= 10 else f"${cost:.2f}",
    ]


def _of_the_recipe(plan: Plan) -> Iterator[str]:
    match plan.run.config.recipe:
        case SamConfig():
            yield "An update of SAM is two passes; they keep weights and a gradient beside."
        case MetaPseudoLabelsConfig(unlabelled_ratio=ratio):
            yield (
                f"Student and teacher both learn; a labelled picture brings {ratio} others, which the teacher sees in "
                "two views. With micro-batches the teacher computes its activations again, which saves memory and "
                "takes time that are not counted here."
            )
        case SemanticConfig():
            yield "The head's rows for superclasses, which the data tells of, are left out."
        case DistillationConfig():
            yield "The teacher is taken to be of the same size as the model."
        case _:
            pass


def _length(plan: Plan) -> str:
    run = plan.run
    if run.minutes is not None:
        return f"{run.minutes:g} minutes"
    if run.steps is None:
        return "of no set length"
    after = f" ({run.config.loop.epochs:g} epochs of {run.data})" if run.config.loop.steps is None else ""
    return f"{run.steps:,} updates{after}"


def _pixels(size: tuple[int, int]) -> str:
    return " x ".join(map(str, dict.fromkeys(size)))


def _memory(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _duration(hours: float) -> str:
    seconds = 3600 * hours
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:,.0f} days"
