"""The verb that looks ahead: `plan`."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Column, Table
from tyro.conf import Positional

from vitrail.cli.console import Console, print_json

MORE = "What fractions of their peaks GPUs reach, and more of the kind: docs/plans.md lists all, --json brings them."


def plan(
    model: Positional[Annotated[str, tyro.conf.arg(metavar="MODEL|PRESET")]],
    *,
    gpus: int = 1,
    gpu: str = "h100",
    batch_size: int | None = None,
    image_size: int | None = None,
    price: float | None = None,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Say what training takes on GPUs before any is used: memory, time and cost, by layout, as predicted.

    Args:
        model: A preset of `vitrail train`, or a model name or leaderboard alias, trained as without a preset.
        gpus: GPUs in all machines together.
        gpu: h100, h200, b200, a100-80, a100-40, l4 or rtx-4090.
        batch_size: Pictures per update over all GPUs, in place of the preset's.
        image_size: Height and width in pixels, in place of the preset's or the model's.
        price: Dollars for an hour of one GPU, in place of what the table of GPUs assumes.
        out: Write a picture of what a GPU holds in each layout: FILE.svg.
        json: Print one JSON document on stdout.
    """
    from vitrail.errors import UserError
    from vitrail.planner import plan as planned
    from vitrail.planner import words

    if out is not None and out.suffix != ".svg":
        raise UserError(f"--out {out} must end in .svg: the picture is written as SVG.")
    found = planned(model, gpus=gpus, gpu=gpu, batch_size=batch_size, image_size=image_size, price=price)
    if out is not None:
        from vitrail.planner.picture import picture

        out.write_text(picture(found), encoding="utf-8")
    if json:
        return print_json(words.to_json(found))
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 120)  # a file has no width, and a narrow terminal breaks lines itself
    console.print(words.title(found), f"{words.PREDICTED}.", "", sep="\n", markup=False)
    for heading, text in words.facts(found).items():
        console.print(f"{heading}: {text}", markup=False)
    if found.fitting:
        (layout, settings, *head), *rows = words.table(found)
        right = [Column(name, justify="right", no_wrap=True) for name in head]
        shown = Table(
            Column(layout, no_wrap=True), Column(settings, no_wrap=True), *right, box=None, padding=(0, 2, 0, 0)
        )
        for row in rows:
            shown.add_row(*row)
        console.print("\nWhat fits, best first:", markup=False)
        console.print(shown)
    console.print(*("", *words.reasons(found)), sep="\n", markup=False)
    best = next((choice for choice in found.fitting if choice.available), None)
    if best is not None and found.run.preset:
        console.print(f"To train so ({best.layout}, {best.settings}):", markup=False)
        console.print(f"{words.launch(found)} train {model} {best.flags}".rstrip(), markup=False)
    console.print("\nAssumed:", *words.assumptions(found), MORE, sep="\n- ", markup=False)
    if out is not None:
        console.print(f"\n{out}: what a GPU holds in each layout", markup=False)
    return 0
