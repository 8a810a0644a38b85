"""Make the Nth operation on files fail, or the process die at it. Needs neither torch nor vitrail."""

import builtins
import io
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COUNTED = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class Counter:
    """Counts operations and calls `strike` at number `at`."""

    def __init__(self, at: int, strike: Callable[[], None]) -> None:
        self.at, self.strike, self.count = at, strike, 0

    @property
    def fired(self) -> bool:
        return self.count >= self.at

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.strike()


class CountedFile:
    """A file whose writes and flushes count."""

    def __init__(self, file: Any, counter: Counter) -> None:
        self._file, self._counter = file, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._counter.tick()
        return self._file.write(data)

    def flush(self) -> None:
        self._counter.tick()
        self._file.flush()


@contextmanager
def strike_at(number: int, strike: Callable[[], None]) -> Iterator[Counter]:
    """Within the context, call `strike` in place of the operation `number` (from 1) on files and folders."""
    counter = Counter(number, strike)
    real_open = io.open
    real = {name: getattr(os, name) for name in COUNTED}

    def counted_open(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        counter.tick()
        file = real_open(path, mode, *args, **kwargs)
        return file if mode in ("r", "rb") else CountedFile(file, counter)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counter.tick()
            return function(*args, **kwargs)

        return call

    try:
        builtins.open = io.open = counted_open  # pyright: ignore[reportAttributeAccessIssue]
        for name, function in real.items():
            setattr(os, name, counted(function))
        yield counter
    finally:
        builtins.open = io.open = real_open
        for name, function in real.items():
            setattr(os, name, function)


def failing_with(code: int) -> Callable[[], None]:
    """Return what raises the OSError of an error number."""

    def strike() -> None:
        raise OSError(code, os.strerror(code))

    return strike


def every_fault(code: int, action: Callable[[], object], check: Callable[[bool], object]) -> int:
    """Run `action` with its first, second, ... operation failing; return how many there were.

    `check` runs after each, told whether the action has claimed success.
    """
    from vitrail.errors import UserError

    for number in itertools.count(1):
        claimed = False
        with strike_at(number, failing_with(code)) as counter:
            try:
                action()
                claimed = True
            except (OSError, UserError) as error:
                assert counter.fired, error
                assert str(error)
        check(claimed)
        if not counter.fired:
            return number - 1
    raise AssertionError
