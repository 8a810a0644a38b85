"""Which presets come from which paper: each file of this package, with its title and its presets."""

import pkgutil
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import vitrail.presets
from vitrail.presets import PRESETS, Preset


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
    """Return the papers in the order in which `PRESETS` has their first presets."""
    places = {id(each): place for place, each in enumerate(PRESETS.values())}
    found: list[Paper] = []
    for info in pkgutil.iter_modules(vitrail.presets.__path__):
        module = import_module(f"vitrail.presets.{info.name}")
        presets = _presets_of(vars(module))
        if presets:
            title = re.split(r": | \(|\.(?: |$)", (module.__doc__ or "").partition("\n")[0])[0]
            found.append(Paper(name=info.name.replace("_", "-"), title=title, presets=presets))
    return sorted(found, key=lambda paper: min(places[id(each)] for each in paper.presets.values()))


def _presets_of(names: dict[str, Any]) -> dict[str, Preset]:
    """Return the presets in a file's dictionary of them, that of `PRESETS` itself aside."""
    presets: dict[str, Preset] = {}
    for value in names.values():
        if isinstance(value, dict) and value is not PRESETS:
            entries = cast(dict[Any, Any], value)
            presets |= {key: each for key, each in entries.items() if each is PRESETS.get(key, entries)}
    return presets
