"""What the verbs print with, and arguments that several of them take."""

import json
from typing import Annotated

import tyro
from rich.console import Console as RichConsole
from rich.table import Table
from tyro.conf import Positional

from vitrail.errors import UserError

Model = Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
Data = Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]


class Console(RichConsole):
    """A console whose reader may go away: `main` ends the program then, not Rich."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def two_columns(rows: dict[str, str]) -> Table:
    """Return rows of a name and a text."""
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def print_json(value: object) -> int:
    """Print a JSON document and return the exit code for success."""
    print(json.dumps(value, indent=1))
    return 0


def require_workers(workers: int) -> None:
    """Raise UserError for a negative number of threads."""
    if workers < 0:
        raise UserError(f"--workers must not be negative, not {workers}.")
