"""Memory through a step, as a function of the pictures in a micro-batch.

Every piece of memory either has nothing to do with the pictures or grows with their number. So two rehearsals tell of
all numbers: between any two events, memory is a straight line over the pictures, and the peak is the highest of them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vitrail.planner.recorder import Kind, Phase
from vitrail.planner.rehearsal import Rehearsal

Groups = Float[np.ndarray, "kinds 2"]
"""A number for each kind of memory: of all weights but the experts', and of the experts."""


@dataclass(frozen=True)
class Timeline:
    """Memory whenever some is about to be given back in a step, in bytes: `fixed + pictures * growing`."""

    fixed: Float[np.ndarray, "tops kinds 2"]
    growing: Float[np.ndarray, "tops kinds 2"]
    phases: Int[np.ndarray, " tops"]
    largest: Float[np.ndarray, " 2"]
    """Bytes of the largest weight's gradient: of the experts' or of the others, the other one being 0."""

    @classmethod
    def of(cls, few: Rehearsal, more: Rehearsal, pictures: tuple[int, int]) -> "Timeline":
        """Return the line through two rehearsals of the same step, of so many pictures each."""
        same = len(few.events) == len(more.events) and ((few.events < 0) == (more.events < 0)).all()
        assert same, "a step takes another course with more pictures"
        # In what order memory is given back is left to chance where much is at once (autocast's copies of weights).
        taken = few.events >= 0
        tops = taken & ~np.append(taken[1:], False)
        low, high = _held(few)[tops], _held(more)[tops]
        growing = (high - low) / (pictures[1] - pictures[0])
        pieces = np.array([np.max(few.sizes * _gradients(few, experts=e), initial=0.0) for e in (False, True)])
        return cls(
            low - pictures[0] * growing, growing, few.phases[tops], np.where(pieces == pieces.max(), pieces, 0.0)
        )

    def accumulating(self, *, apart: bool) -> "Timeline":
        """Return the same for a micro-batch that is not the first: the gradient of those before it is there.

        Args:
            apart: Whether a micro-batch has a gradient of its own, added to the others' when it is complete (SAM).
        """
        fixed, passes = self.fixed.copy(), self.phases != Phase.UPDATE
        if apart:
            fixed[passes, Kind.GRADIENT] += self.gradient
        else:
            fixed[passes, Kind.GRADIENT] = self.gradient
            fixed[self.phases == Phase.BACKWARD, Kind.GRADIENT] += self.largest  # on its way into the sum
        return replace(self, fixed=fixed)

    @property
    def gradient(self) -> Float[np.ndarray, " 2"]:
        """Bytes of the whole gradient: of all weights but the experts', and of the experts."""
        return self.fixed[:, Kind.GRADIENT].max(axis=0)

    def peak(self, pictures: int, shares: Groups, added: Float[np.ndarray, " phases"]) -> tuple[Groups, float]:
        """Return what is held when it is most, and what is added to it then.

        Args:
            pictures: Of a micro-batch.
            shares: Part of each group that is held here; the rest is elsewhere.
            added: More bytes, by phase.
        """
        held = (self.fixed + pictures * self.growing) * shares
        more = added[self.phases]
        most = int((held.sum(axis=(1, 2)) + more).argmax())
        return held[most], float(more[most])

    def most(self, kind: Kind) -> tuple[float, float]:
        """Return bytes of a kind when it is most, fixed and per picture."""
        fixed, growing = self.fixed[:, kind].sum(axis=1), self.growing[:, kind].sum(axis=1)
        most = int((fixed + 1000 * growing).argmax())
        return float(fixed[most]), float(growing[most])


def _gradients(rehearsal: Rehearsal, *, experts: bool) -> Bool[np.ndarray, " pieces"]:
    return (rehearsal.kinds == Kind.GRADIENT) & (rehearsal.experts == experts)


def _held(rehearsal: Rehearsal) -> Float[np.ndarray, "events kinds 2"]:
    """Return bytes by kind after every event."""
    pieces = np.where(rehearsal.events < 0, ~rehearsal.events, rehearsal.events)
    changes = np.zeros((len(pieces), len(Kind), 2))
    at: Any = (rehearsal.kinds, rehearsal.experts.astype(np.int64))
    kinds, experts = (index[pieces] for index in at)
    changes[np.arange(len(pieces)), kinds, experts] = np.where(rehearsal.events < 0, -1, 1) * rehearsal.sizes[pieces]
    before = np.zeros((len(Kind), 2))
    held = rehearsal.before
    np.add.at(before, (at[0][held], at[1][held]), rehearsal.sizes[held])
    return before + changes.cumsum(axis=0)
