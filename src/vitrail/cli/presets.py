"""What `vitrail train` tells of presets: the list of them, and one in whole sentences."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from vitrail.cli.console import Console, print_json
from vitrail.config.run import RECIPES
from vitrail.errors import UserError
from vitrail.presets import PAPERS, PRESETS, Preset
from vitrail.presets.base import Group
from vitrail.presets.describe import command, measured, sentence, told
from vitrail.presets.papers import Paper, papers

USAGE = (
    "vitrail train PRESET --data PATH [--out DIR] [--resume] [--init WEIGHTS]\n"
    "              [--model NAME] [--recipe NAME] [--minutes N] ..."
)
HEADINGS: dict[Group, str] = {
    "start": "To begin with: they run anywhere, from pictures alone or weights at hand",
    "scratch": "From scratch: a task learned from its own pictures alone",
    "fine-tune": "Fine-tuning: from pretrained weights (--init) to a task",
    "pre-train": "Pre-training: from many pictures, with or without labels, to weights",
    "semi-supervised": "Semi-supervised: from few labels and many pictures",
}
FLAGS = ("-h", "--help", "--list", "--json")
"""What `vitrail train` takes without a preset."""
WIDE = 120
"""Columns of a terminal from which a list has room for results and cost."""


def list_presets(arguments: Sequence[str]) -> int:
    """Print presets: ours and the published ones by paper, or with `--list` all, or those that words are found in.

    A word that is a paper's name stands for that paper alone.

    Raises:
        UserError: For a flag that is none, and for words that no preset has.
    """
    words = [word.lower() for word in arguments if not word.startswith("-")]
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("-")):
        if flag not in FLAGS:
            near = difflib.get_close_matches(flag, FLAGS, n=1, cutoff=0.8)  # --data is not a slip for --list
            cure = f"Did you mean {near[0]!r}?" if near else "`vitrail train --list` lists presets."
            raise UserError(f"{flag} needs a preset before it: vitrail train PRESET {flag} ... {cure}")
    named = {word for word in words if word in PAPERS}
    chosen = {
        name: each
        for paper in papers()
        for name, each in paper.presets.items()
        if (not named or paper.name in named)
        and all(word in _searched(paper, name) for word in words if word not in named)
    }
    if not chosen:
        raise UserError(f"no preset has {' and '.join(map(repr, words))} in it. `vitrail train --list` lists them all.")
    if "--json" in arguments:
        return print_json([{"name": name, **facts(each)} for name, each in chosen.items()])
    console = Console(highlight=False)
    if "--list" not in arguments:
        console.print(USAGE, "\n", sep="", markup=False)
    for group, heading in HEADINGS.items():
        ours = {name: each for name, each in chosen.items() if each.group == group}
        if not ours:
            continue
        console.print(Text(heading, style="bold"))
        if "--list" in arguments:
            console.print(_table(ours, console.width))
        else:
            _print_group(ours, console)
        console.print()
    if "--list" not in arguments:
        aliases = ", ".join(f"{each.alias!r}" for each in chosen.values() if each.alias)
        console.print(
            "`vitrail train --list` lists all with what they are for, `--list vit` those of that paper, "
            "`--list cifar100` those with that word in them, `--list cifar100 sam` both. `vitrail train PRESET --help` "
            "says where a preset is from, what it reached and costs, and lists its settings. Leaderboard names are "
            f"presets, too: {aliases}.",
            markup=False,
        )
    return 0


def facts(preset: Preset) -> dict[str, Any]:
    """Return what a preset says of itself, its settings aside."""
    return {field.name: getattr(preset, field.name) for field in fields(Preset) if field.name != "config"}


def show_preset(name: str) -> None:
    """Print what a preset is for, how to run it, where it is from, what it reached and costs."""
    chosen, console = PRESETS[name], Console(highlight=False)
    console.print(sentence(chosen.purpose), command(name, chosen), sep="\n\n", markup=False, end="\n\n")
    for heading, text in told(chosen).items():
        console.print(Text.assemble((f"{heading}: ", "bold"), text), end="\n\n")
    console.print(
        "--model NAME puts a model of `vitrail models` in place of the preset's, --recipe NAME another way to learn: "
        f"{', '.join(RECIPES)}.",
        markup=False,
        end="\n\n",
    )


def _print_group(presets: Mapping[str, Preset], console: Console) -> None:
    """Print our own presets in full, and of each paper that has others how to list them."""
    own = {name: each for name, each in presets.items() if each.group == "start" or not each.source}
    if own:
        console.print(_table(own, console.width))
    lines = _columns()
    for paper in papers():
        others = [name for name in paper.presets if name in presets and name not in own]
        if others:
            known = next((name for name in others if presets[name].alias), others[0])
            more = f"{len(others)} presets, such as " if len(others) > 1 else ""
            lines.add_row(f"--list {paper.name}", Text(f"{paper.title}: {more}{known}"))
    if lines.row_count:
        console.print(lines)


def _table(presets: Mapping[str, Preset], width: int) -> Table:
    """Return names and purposes, on a wide terminal with what was reached and what it costs."""
    wide = width >= WIDE
    table = _columns(*([Column(ratio=2)] if wide else []))
    for name, each in presets.items():
        table.add_row(*map(Text, (name, each.purpose, *([_result(each)] if wide else []))))
    return table


def _columns(*more: Column) -> Table:
    return Table(Column(no_wrap=True), Column(ratio=3), *more, box=None, show_header=False, padding=(0, 0, 0, 2))


def _result(preset: Preset) -> str:
    """Return in few words what was reached, by us rather than by the authors, and what it costs."""
    reached = measured(preset) or preset.published
    return "; ".join(text.partition(". ")[0].rstrip(".") for text in (reached, preset.cost) if text)


def _searched(paper: Paper, name: str) -> str:
    """Return the text that words of `--list` are looked for in."""
    each = paper.presets[name]
    return "\n".join((paper.name, name, each.group, each.purpose, each.source, each.alias or "")).lower()
