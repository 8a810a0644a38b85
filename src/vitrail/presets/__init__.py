"""Presets: named runs. One file per paper or purpose; each records what was published and what we measured."""

from vitrail.errors import UserError, did_you_mean
from vitrail.presets.augreg import AUGREG_PRESETS
from vitrail.presets.base import Preset
from vitrail.presets.big_vision import BIG_VISION_PRESETS
from vitrail.presets.coatnet import COATNET_PRESETS
from vitrail.presets.cvt import CVT_PRESETS
from vitrail.presets.efficientnet import EFFICIENTNET_PRESETS
from vitrail.presets.imagenet21k import IMAGENET21K_PRESETS
from vitrail.presets.mae import MAE_PRESETS
from vitrail.presets.meta_pseudo_labels import MPL_PRESETS
from vitrail.presets.plain_vit import PLAIN_VIT_PRESETS
from vitrail.presets.sam import SAM_PRESETS
from vitrail.presets.small import SMALL_PRESETS
from vitrail.presets.speedruns import SPEEDRUNS
from vitrail.presets.starters import STARTERS
from vitrail.presets.tiny import tiny
from vitrail.presets.vit import VIT_PRESETS
from vitrail.presets.vit_g import VIT_G_PRESETS
from vitrail.presets.vmoe import VMOE_PRESETS

__all__ = ["PAPERS", "PRESETS", "Preset", "preset", "preset_name", "tiny"]

PAPERS: dict[str, dict[str, Preset]] = {
    "starters": STARTERS,
    "small": SMALL_PRESETS,
    "speedruns": SPEEDRUNS,
    "sam": SAM_PRESETS,
    "meta-pseudo-labels": MPL_PRESETS,
    "vit": VIT_PRESETS,
    "augreg": AUGREG_PRESETS,
    "plain-vit": PLAIN_VIT_PRESETS,
    "big-vision": BIG_VISION_PRESETS,
    "vit-g": VIT_G_PRESETS,
    "vmoe": VMOE_PRESETS,
    "cvt": CVT_PRESETS,
    "coatnet": COATNET_PRESETS,
    "efficientnet": EFFICIENTNET_PRESETS,
    "imagenet21k": IMAGENET21K_PRESETS,
    "mae": MAE_PRESETS,
}
"""The presets of each file of this package, in the order of lists; a file's name, with hyphens."""
PRESETS: dict[str, Preset] = {name: each for presets in PAPERS.values() for name, each in presets.items()}


def preset(name: str) -> Preset:
    """Return a preset by name, or by the leaderboard's name of its system (`Preset.alias`).

    Raises:
        UserError: When there is none of that name.
    """
    return PRESETS[preset_name(name)]


def preset_name(name: str) -> str:
    """Return a preset's own name for it or for the leaderboard's name of its system.

    Raises:
        UserError: When there is none of that name.
    """
    names = {each.alias: key for key, each in PRESETS.items() if each.alias} | {key: key for key in PRESETS}
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(f"there is no preset named {name!r}.{hint} `vitrail train --list` lists them all.")
    return names[name]
