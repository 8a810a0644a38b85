"""Presets: named runs. One file per paper or purpose; each records what was published and what we measured."""

from vitrail.errors import UserError, did_you_mean
from vitrail.presets.base import Preset
from vitrail.presets.starters import STARTERS

__all__ = ["PRESETS", "Preset", "preset"]

PRESETS: dict[str, Preset] = {**STARTERS}


def preset(name: str) -> Preset:
    """Return a preset by name.

    Raises:
        UserError: When there is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset named {name!r}.{did_you_mean(name, PRESETS)} `vitrail train` lists them.")
    return PRESETS[name]
