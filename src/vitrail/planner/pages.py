"""The page of plans for the two largest models, `docs/plans.md`: `python -m vitrail.planner.pages`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vitrail.planner.constants import CONSTANTS
from vitrail.planner.gpus import GPUS
from vitrail.planner.names import named
from vitrail.planner.planning import Plan, Planner
from vitrail.planner.words import assumptions, facts, reasons, table

FILE = Path("docs/plans.md")
RUNS = {"ViT-G/14": "vit-gigantic14-jft3b", "V-MoE-15B": "vmoe-15b-jft3b"}
KINDS, COUNTS = ("h100", "h200"), (8, 64, 512)
INTRODUCTION = """\
# Plans for ViT-G/14 and V-MoE-15B

What pre-training the two largest models of the leaderboard would take on 8, 64 and 512 GPUs, by `vitrail plan`, which
plans any other run, too. **All of it is predicted: nothing here has been measured on a GPU.** Parameters, operations
and memory are counted on the models and recipes themselves, and memory agrees with what the allocator does in real
steps on a CPU (`benchmarks/results/planner.md`); times follow from the assumptions below, and costs from prices that
are guesses. FSDP is torch's `fully_shard`, hybrid the same within each machine of 8, "experts over 8" spreads each
mixture's experts over 8 GPUs. Of every layout the page shows the faster of two settings: plain, and with
activation checkpointing.

This page is written by `python -m vitrail.planner.pages`.
"""


def page() -> str:
    """Return the text of the page."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield INTRODUCTION
    plans = {title: list(_plans(name)) for title, name in RUNS.items()}
    for title, each in plans.items():
        yield f"## {title}\n"
        yield "\n".join(f"- {heading.capitalize()}: {text}." for heading, text in facts(each[0]).items()) + "\n"
        for plan in each:
            yield f"### {title} on {plan.gpus} x {plan.gpu.title}\n"
            yield from _table(plan)
            yield ""
            yield from (f"{reason}\n" for reason in reasons(plan))
    yield "## Assumptions\n"
    told = dict.fromkeys(text for each in plans.values() for plan in each for text in assumptions(plan))
    yield from (f"- {text}" for text in told)
    yield "\n| constant | value | | known | why |\n|---|---|---|---|---|"
    for name, each in CONSTANTS.items():
        yield f"| {name} | {each.value:g} | {each.says} | {each.how} | {each.source} |"
    yield ""


def _plans(name: str) -> Iterator[Plan]:
    planner = Planner(named(name), GPUS[KINDS[0]])
    for kind in KINDS:
        for count in COUNTS:
            yield planner.on(GPUS[kind]).plan(count, GPUS[kind].price)


def _table(plan: Plan) -> Iterator[str]:
    """Yield the fastest choice of every layout."""
    best = {choice.layout: choice for choice in reversed(plan.fitting)}
    head, *rows = table(replace(plan, fitting=[choice for choice in plan.fitting if best[choice.layout] is choice]))
    yield f"| {' | '.join(head)} |"
    yield "|---|---|" + "---:|" * (len(head) - 2)
    yield from (f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(FILE)
