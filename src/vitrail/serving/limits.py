"""What a request may ask for, and the words for one that asks for more."""

from dataclasses import dataclass

HEAD_SECONDS = 10.0
"""In which the head of a request must arrive; and after an answer, what is left of the body that it did not need."""
HELD_BYTES = 256_000_000
"""Bodies of all requests together that are held in memory, each counted once, from its first byte to its answer.

Beside this there is a second copy of a body for the moment in which it is put together, or a form is taken apart; and
of each job that the worker has, what lies in the pipe and the worker's own copy.
"""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is granted; more is refused."""

    body_bytes: int = 20_000_000
    """Of a request."""
    pixels: int = 25_000_000
    """Width x height of a picture, as its header declares them; it is refused before a pixel is decoded."""
    pictures: int = 32
    """In a request."""
    queue: int = 128
    """Pictures of all requests together that may wait."""
    body_seconds: float = 30.0
    """In which a request's body must arrive."""
    seconds: float = 30.0
    """From the last byte of a request to its answer; and for the computation of one batch."""


class Refusal(Exception):
    """A request that is not answered as it asked."""

    def __init__(self, status: int, detail: str, *, retry_after: int | None = None, close: bool = False) -> None:
        """Note the answer.

        Args:
            status: Of HTTP.
            detail: What is the matter, and what the client can do about it.
            retry_after: Seconds after which to ask again.
            close: Whether the connection ends with the answer, because the rest of the request is not read.
        """
        super().__init__(detail)
        self.status, self.detail, self.retry_after, self.close = status, detail, retry_after, close
