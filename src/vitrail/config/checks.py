"""Checks that every family's configuration makes of its numbers."""

from typing import Any

from vitrail.errors import UserError


def require_size(config: Any, *names: str) -> None:
    """Raise UserError unless each field is a height and a width of at least 1."""
    for name in names:
        value = getattr(config, name)
        if len(value) != 2 or min(value) < 1:
            raise UserError(f"{name} must be two positive numbers, height and width, not {value}.")


def require_rate(config: Any, *names: str) -> None:
    """Raise UserError unless each field lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"{name} must lie in [0, 1), not {getattr(config, name)}.")


def require_least(config: Any, **least: int) -> None:
    """Raise UserError unless each field, or each part of a tuple, is at least the number given for it."""
    for name, bound in least.items():
        value: int | tuple[int, ...] = getattr(config, name)
        if min(value if isinstance(value, tuple) else (value,), default=bound) < bound:
            raise UserError(f"{name} must be at least {bound}, not {value}.")
