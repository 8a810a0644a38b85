"""What a preset is."""

from dataclasses import dataclass

from vitrail.config.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named run."""

    purpose: str
    """One line: for whom, and what it does."""
    config: RunConfig
    """The settings; every field is a flag of `vitrail train`."""
    measured: str = ""
    """What we measured with it, on what machine; empty when we have not."""
    needs_init: bool = False
    """Whether it makes sense only with pretrained weights (`--init`)."""
