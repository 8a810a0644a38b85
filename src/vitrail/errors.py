"""The one exception for mistakes that a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's, told in a line or two that name the file and the cure.

    The command line prints it without a traceback and exits with status 2.
    """


class BrokenPicture(Exception):
    """One picture that cannot be decoded, or whose pixels would be silently wrong.

    Raised with the reason alone; the caller knows the picture's name.
    """


class Interrupted(Exception):
    """The run was asked to stop (SIGTERM, SIGINT) and has saved its state."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x' or 'y'?"`` for the known words nearest to ``word``, or an empty string."""
    near = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
