"""The verbs about models themselves: `models`."""

from typing import Annotated

import tyro
from rich.table import Column, Table
from tyro.conf import Positional

import vitrail
from vitrail.cli.console import Console, print_json


def models(
    name: Positional[Annotated[str | None, tyro.conf.arg(metavar="[NAME]")]] = None, *, json: bool = False
) -> int:
    """List the published sizes, or show one.

    Args:
        name: A model name or leaderboard alias; all when left out.
        json: Print one JSON document on stdout.
    """
    from vitrail.zoo import describe

    rows = [describe(each) for each in ([name] if name else vitrail.list_models())]
    if json:
        return print_json(rows)
    heads = ("model", "parameters", "input", "patch", "width", "depth", "heads", "pool")
    table = Table(*(Column(head, overflow="fold") for head in heads), box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console().print(table)
    return 0
