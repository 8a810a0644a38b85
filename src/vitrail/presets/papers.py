"""Which presets come from which paper: each file of this package, with its title and its presets."""

import re
from dataclasses import dataclass
from importlib import import_module

from vitrail.presets import PAPERS, Preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """A file of presets: a paper's, or of one purpose."""

    name: str
    """Of the file, with hyphens."""
    title: str
    """First line of the file's docstring, up to a colon, a bracket or the end of its sentence."""
    presets: dict[str, Preset]
    """By name."""


def papers() -> list[Paper]:
    """Return the papers of `PAPERS`, in its order."""
    return [Paper(name=name, title=_title(name), presets=presets) for name, presets in PAPERS.items()]


def _title(name: str) -> str:
    module = import_module(f"vitrail.presets.{name.replace('-', '_')}")
    return re.split(r": | \(|\.(?: |$)", (module.__doc__ or "").partition("\n")[0])[0]
