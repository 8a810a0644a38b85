"""Templates of this package to pages that need nothing beside them."""

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined

from vitrail.checkpoints.storage import write_file


def write_page(path: Path, template: str, **values: object) -> None:
    """Fill in a template, with the style of all pages, and write it to a file, whole or not at all.

    Raises:
        UserError: When the file cannot be written.
    """
    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(template).render(style=_text("style.css"), **values)
    # A file name that is not valid UTF-8 carries half characters, which no file can hold.
    write_file(path, page.encode("utf-8", errors="replace"))


def _text(name: str) -> str:
    return (files("vitrail.report") / name).read_text(encoding="utf-8")
