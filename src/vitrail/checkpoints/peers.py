"""Processes that agree on each step of what they write or read together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from vitrail.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """The processes that write or read a folder together, as one of them sees it."""

    number: int
    count: int
    exchange: Callable[[Any], list[Any]]
    """Returns every process's value, by number. All must ask."""

    @property
    def first(self) -> bool:
        """Whether this is the process that does what only one may do."""
        return self.number == 0

    def agree(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` returns in every process, by number. All must ask.

        Raises:
            Exception: In all processes, where `work` fails in any: the error of the first that failed.
        """
        try:
            outcome = work()
        except (UserError, OSError) as error:
            outcome = error
        except Exception as error:  # of any kind, so perhaps of one that cannot be sent
            if self.count == 1:
                raise
            outcome = RuntimeError(f"{type(error).__name__}: {error}")
        outcomes = self.exchange(outcome)
        for other in outcomes:
            if isinstance(other, Exception):
                raise other
        return outcomes


ALONE = Peers(0, 1, lambda value: [value])
