"""What a preset is."""

from dataclasses import dataclass
from typing import Literal

from vitrail.config.run import RunConfig

Group = Literal["start", "pre-train", "fine-tune", "scratch", "semi-supervised"]
"""Where `vitrail train --help` lists a preset: to begin with; from labelled or unlabelled pictures to weights to start
from; from such weights to a task; a task from nothing; few labels and many pictures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named run."""

    purpose: str
    """One line: for whom, and what it does."""
    config: RunConfig
    """The settings; every field is a flag of `vitrail train`."""
    group: Group
    """Where the list of presets shows it."""
    source: str = ""
    """Paper (with arXiv number), section or table, and the file of the official code that decided a detail."""
    published: str = ""
    """What its authors reached with it, on what; empty for our own."""
    cost: str = ""
    """What a run takes: the authors' hardware and time, or ours."""
    departs: str = ""
    """Where it cannot or does not follow its source, and why; empty when it follows in all."""
    measured: str = ""
    """What we measured with it, on what machine; empty when we have not."""
    alias: str | None = None
    """The leaderboard's name of the system, which `vitrail train` takes for this preset, too."""
    needs_init: bool = False
    """Whether it makes sense only with pretrained weights (`--init`)."""
