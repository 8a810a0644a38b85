"""JSON from someone else: look-ups that check what they find and name the file in errors."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vitrail.errors import UserError

T = TypeVar("T")

MAX_BYTES = 32_000_000
"""Of a file. The names of 21,841 classes take one."""
MAX_SIDE = 10_000
"""Of a picture, in pixels."""


@dataclass(frozen=True, slots=True)
class Document:
    """A JSON object from someone else. Look-ups give a default for what is missing or null, and check the rest."""

    path: Path
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Document":
        """Return the object that a file holds.

        Raises:
            UserError: When the file is missing, too large, or holds something else.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"{path} is larger than {MAX_BYTES:,} bytes: it is no configuration.")
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({str(error)[:200]}); the repository is damaged.") from error
        if not isinstance(data, dict):
            raise UserError(f"{path} holds a {type(data).__name__} instead of an object; the repository is damaged.")
        return cls(path, data)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """Return a value of one type. Whole numbers stand for floats too; `True` is no number."""
        value = self.data.get(key)
        if value is None:
            return default
        if kind is float:
            value = _real(value)
        if type(value) is not kind:
            raise self.wrong(key)
        return value

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Return finite numbers; one number stands for a list of one."""
        value = self.data.get(key)
        if value is None:
            return default
        items = value if isinstance(value, list) else [value]
        numbers = tuple(number for item in items if (number := _real(item)) is not None)
        if not items or len(numbers) < len(items):
            raise self.wrong(key)
        return numbers

    def part(self, key: str) -> "Document":
        """Return an object within this one, empty when it is missing."""
        return Document(self.path, self.get(key, dict, {}))

    def size(self, key: str, default: object = None) -> tuple[int, int]:
        """Return height and width: from one number, a list, or an object with both or with the shortest edge alone."""
        match self.data.get(key, default):
            case [height, width] | {"height": height, "width": width}:
                pass
            case {"shortest_edge": height, **others} if not any(others.values()):
                width = height
            case height:
                width = height
        if not all(type(side) is int and 1 <= side <= MAX_SIDE for side in (height, width)):
            raise self.wrong(key)
        return height, width

    def wrong(self, key: str) -> UserError:
        """Return the error that a value cannot be used."""
        shown = repr(self.data.get(key))
        return UserError(f"{self.path}: vitrail cannot use {key} = {shown[:80]}{'...' if len(shown) > 80 else ''}.")


def _real(value: object) -> float | None:
    """Return a finite number as a float, None for anything else. JSON's whole numbers know no bound; `True` is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
