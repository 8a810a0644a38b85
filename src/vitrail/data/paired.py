"""The training stream of pictures with and without labels: two streams that advance together."""

from dataclasses import replace
from typing import Any

from vitrail.data.base import Batch, Source
from vitrail.data.stream import Stream

OTHER = 2**62
"""The bit of the seed that the pictures without labels have the other way round: so the two streams draw apart."""


class PairedStream(Stream):
    """A stream of labelled pictures, whose batches carry others without labels in `Batch.unlabelled`.

    Epochs are those of the labelled pictures. Each kind has its own order and its own broken pictures; positions move
    on together, update by update.
    """

    def __init__(self, source: Source, unlabelled: Source, *, ratio: int, batch_size: int, **settings: Any) -> None:
        """Prepare to read both from position 0.

        Args:
            source: The labelled pictures.
            unlabelled: The others.
            ratio: Pictures without labels per labelled one, in every micro-batch.
            batch_size: Labelled pictures per update over all processes.
            settings: As for `Stream`; `balanced` concerns the labelled pictures.

        Raises:
            UserError: When sizes do not divide.
        """
        super().__init__(source, batch_size=batch_size, **settings)
        others = settings | {"seed": settings.get("seed", 0) ^ OTHER, "balanced": False}
        self._others = Stream(unlabelled, batch_size=ratio * batch_size, **others)

    def __next__(self) -> list[Batch]:
        """Return the micro-batches of the next update. Broken pictures are left out.

        Raises:
            UserError: When more than `max_broken` of either kind cannot be read.
        """
        pairs = zip(super().__next__(), next(self._others), strict=True)
        return [replace(batch, unlabelled=others) for batch, others in pairs]

    def state_dict(self) -> dict[str, Any]:
        """Return the positions and the broken pictures met so far."""
        return super().state_dict() | {"unlabelled": self._others.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        super().load_state_dict(state)
        self._others.load_state_dict(state["unlabelled"])

    def close(self) -> None:
        """Stop the decoding threads."""
        super().close()
        self._others.close()
