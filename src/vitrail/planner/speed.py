"""How long a step takes: each operator by what bounds it, then what is exchanged and cannot hide.

An operator takes as long as its products at the rate that such products reach, or as what it moves at the rate of the
memory, whichever is longer. So it follows from the model that a ViT-G is bounded by products and an EfficientNet by
memory.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vitrail.planner.constants import constant
from vitrail.planner.gpus import Gpu
from vitrail.planner.layouts import Exchange
from vitrail.planner.recorder import Operation, Phase, Work


@dataclass(frozen=True)
class Operations:
    """All operators of a step: `[0] + pictures * [1]` floating-point operations and bytes moved."""

    phases: Int[np.ndarray, " n"]
    works: Int[np.ndarray, " n"]
    flops: Float[np.ndarray, "2 n"]
    moved: Float[np.ndarray, "2 n"]

    @classmethod
    def of(cls, few: list[Operation], more: list[Operation], pictures: tuple[int, int]) -> "Operations":
        """Return the lines through the operators of two rehearsals of the same step, of so many pictures each."""

        def line(low: list[float], high: list[float]) -> Float[np.ndarray, "2 n"]:
            growing = (np.array(high) - np.array(low)) / (pictures[1] - pictures[0])
            return np.stack([np.array(low) - pictures[0] * growing, growing])

        return cls(
            phases=np.array([each.phase for each in few]),
            works=np.array([each.work for each in few]),
            flops=line([each.flops for each in few], [each.flops for each in more]),
            moved=line([each.moved for each in few], [each.moved for each in more]),
        )

    @property
    def flops_per_picture(self) -> float:
        """Floating-point operations that one more picture takes."""
        return float(self.flops[1].sum())

    def seconds(self, pictures: int, gpu: Gpu, *, half: bool, compiled: bool, share: float) -> tuple[float, ...]:
        """Return the seconds of the passes over a micro-batch, and of the update of a `share` of the weights."""
        peak = 1e12 * (gpu.half if half else gpu.single)
        reached = {
            Work.PRODUCT: constant("products"),
            Work.CONVOLUTION: constant("convolutions"),
            Work.ATTENTION: constant("attention"),
            Work.MEMORY: 1.0,
        }
        rates = peak * np.array([reached[Work(work)] for work in sorted(reached)])
        flops, moved = (line[0] + pictures * line[1] for line in (self.flops, self.moved))
        moved = moved / (constant("bandwidth") * 1e9 * gpu.bandwidth)
        if compiled:
            moved = np.where(self.works == Work.MEMORY, constant("fused") * moved, moved)
        each = np.maximum(flops / rates[self.works], moved)
        passes = self.phases != Phase.UPDATE
        launching = constant("launch") * (constant("fused") if compiled else 1.0)
        return tuple(
            max(float(each[part].sum()) * of_it, launching * int(part.sum()))
            for part, of_it in ((passes, 1.0), (~passes, share))
        )


def exposed(exchanges: list[Exchange], passes: float) -> float:
    """Return the seconds of exchanges that passes of so many seconds cannot hide."""
    hiding = [each for each in exchanges if each.hides]
    room = constant("overlap") * passes * max((each.hides for each in hiding), default=0.0)
    late = max(0.0, sum(each.seconds for each in hiding) - room)
    return late + sum(each.seconds for each in exchanges if not each.hides)
