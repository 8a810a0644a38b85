"""The pages of `docs/recipes`, written from the presets: `python -m vitrail.presets.pages`."""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from vitrail.presets import PRESETS, Preset
from vitrail.presets.describe import command, measured, model_name, sentence, settings, told
from vitrail.presets.papers import Paper, papers

FOLDER = Path("docs/recipes")
INDEX = """\
# Recipes

Every preset of `vitrail train`: whose recipe it is, what its authors reached with it, what we measured. Published
figures are their authors'; an empty cell under "measured here" means that we have not run it at size. Every preset is
made small and run end to end in the tests (`tests/test_all_presets.py`). "As published" means that we know of nothing
that differs; otherwise the link says what does. `vitrail train PRESET --help` tells the same, and every setting is a
flag there. Words in capitals are yours to fill in.

This page and those it links to are written by `python -m vitrail.presets.pages`.
"""


def pages() -> dict[str, str]:
    """Return the text of every page by the name of its file."""
    found = papers()
    return {"README.md": "\n".join(_index(found))} | {f"{each.name}.md": "\n".join(_page(each)) for each in found}


def write(folder: Path = FOLDER) -> None:
    """Write the pages into a folder and remove others from it."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for file in folder.glob("*.md"):
        if file.name not in wanted:
            file.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


def _index(found: list[Paper]) -> Iterator[str]:
    yield INDEX
    for paper in found:
        yield f"## [{paper.title}]({paper.name}.md)\n"
        yield "| recipe | system | published | runs here | measured here | command |"
        yield "|---|---|---|---|---|---|"
        for name, each in paper.presets.items():
            link = f"{paper.name}.md#{name}"
            cells = [f"[{name}]({link})", _system(each), each.published, _here(each, link), measured(each)]
            yield f"| {' | '.join(map(_cell, cells))} | `{command(name, each)}` |"
        yield ""


def _page(paper: Paper) -> Iterator[str]:
    yield f"# {paper.title}\n"
    yield "Written from `src/vitrail/presets/" + paper.name.replace("-", "_") + ".py`. [All recipes](README.md)\n"
    for name, preset in paper.presets.items():
        yield f"## {name}\n"
        yield f"{sentence(preset.purpose)}\n"
        if facts := told(preset):
            yield "\n".join(f"- {heading}: {text}" for heading, text in facts.items()) + "\n"
        yield f"```sh\n{command(name, preset)}\n```\n"
        yield "Its settings; all others are the defaults:\n"
        for section, flags in groupby(settings(preset.config), key=_section):
            yield f"- {section}: " + ", ".join(_setting(flag, value) for flag, value in flags)
        yield ""


def _section(setting: tuple[str, str]) -> str:
    """Return which part of a run a setting is of."""
    return re.split(r"[. ]", setting[0].removeprefix("--"))[0]


def _setting(flag: str, value: str) -> str:
    """Return a flag as it is typed, and in words what no one flag sets."""
    return f"`{f'{flag} {value}'.rstrip()}`" if flag.startswith("--") else f"{flag}: {value}"


def _system(preset: Preset) -> str:
    return preset.alias or model_name(preset.config.model) or type(preset.config.model).__name__.removesuffix("Config")


def _here(preset: Preset, link: str) -> str:
    """Return how near to its source a preset is."""
    if preset.departs:
        return f"[with differences]({link})"
    if preset.published:
        return "as published"
    return "after its source" if preset.source else "ours"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").rstrip(".")


if __name__ == "__main__":
    write()
    print(f"{FOLDER}: {len(PRESETS)} presets")
