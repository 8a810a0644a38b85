"""Timing on noisy machines: what is compared takes turns, A B A B, so that both meet the same noise."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Work = Callable[[], int]
"""Does some work and returns how many items of it, pictures or operations, it did."""


@dataclass(frozen=True)
class Timing:
    """What the turns of one piece of work took."""

    seconds: tuple[float, ...]
    """Per item, one value for each turn, in order."""

    @property
    def rate(self) -> float:
        """Items per second, the median over turns."""
        return 1 / median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles of the rate, as a share of its median."""
        low, _, high = quantiles([1 / s for s in self.seconds], n=4, method="inclusive")
        return (high - low) / self.rate

    def times(self, other: "Timing") -> float:
        """Return how many times as fast as `other` this is: the median over turns, each beside its neighbour."""
        return median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))


def take_turns(
    works: Mapping[str, Work], *, turns: int = 7, seconds: float = 1.0, device: torch.device | None = None
) -> dict[str, Timing]:
    """Return the timings of several pieces of work that take turns.

    Each is done once before, untimed: what is compiled, allocated or read once is not part of any turn.

    Args:
        works: What to time, by name.
        turns: Of each; 2 or more.
        seconds: Least length of a turn; work that takes longer is done once in it.
        device: A GPU is waited for at both ends of a turn.
    """
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            wait_for(device)
            began, done = time.perf_counter(), 0
            while True:
                done += work()
                if time.perf_counter() - began >= seconds:
                    break
            wait_for(device)
            taken[name].append((time.perf_counter() - began) / done)
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def wait_for(device: torch.device | None) -> None:
    """Wait until a GPU has done all that it was asked for."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
