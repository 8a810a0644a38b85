"""Foreign weight names as data: which array there is which tensor here, and how it lies, both ways.

A family of foreign names is a list of `Row`s and a `NameTable` that reads the configuration off the arrays. Reading
undoes writing, bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import EinopsError, rearrange
from torch import Tensor

from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.errors import UserError
from vitrail.layers.embedding import PositionResize
from vitrail.models.base import ImageModel

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hints:
    """What a person says of weights because their arrays cannot."""

    image_size: tuple[int, int] | None = None
    """Height and width in pixels that position tables are made for."""
    heads: int | tuple[int, ...] | None = None
    """Attention heads, of each stage where a family has several."""


NO_HINTS = Hints()


class NameTable(ABC):
    """One convention of foreign names for one family."""

    name: str
    """Of the convention; tables of several families may share one."""
    family: type[ModelConfig]
    """The family whose models it can write."""
    position_resize: PositionResize = "official"
    """How the foreign code resizes positions to another picture size."""

    @abstractmethod
    def claims(self, arrays: Arrays) -> bool:
        """Return whether arrays are under these names."""

    @abstractmethod
    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        """Return the configuration and state dict that foreign arrays stand for.

        Args:
            arrays: By foreign name. They may share memory with the result.
            hints: What the arrays cannot tell.
            source: What to call the arrays in errors.

        Raises:
            UserError: When arrays are missing, left over, or of the wrong shape.
        """

    @abstractmethod
    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        """Return a model's weights under the foreign names.

        Raises:
            UserError: When the foreign code has no such model.
        """

    @abstractmethod
    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Return how the foreign code prepares pictures for evaluation, which no array tells."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one or more foreign arrays lie in one tensor of ours."""

    read: Callable[[Sequence[np.ndarray]], np.ndarray]
    """From theirs to ours."""
    write: Callable[[np.ndarray, int, int], Sequence[np.ndarray]]
    """From ours to theirs, told the number of arrays and of heads."""


SAME = Layout(lambda theirs: theirs[0], lambda ours, parts, heads: [ours])
CONV = Layout(
    lambda theirs: rearrange(theirs[0], "h w i o -> o i h w"),
    lambda ours, parts, heads: [rearrange(ours, "o i h w -> h w i o")],
)
DENSE = Layout(
    lambda theirs: rearrange(theirs[0], "i o -> o i"),
    lambda ours, parts, heads: [rearrange(ours, "o i -> i o")],
)
TO_HEADS = Layout(
    lambda theirs: np.concatenate([rearrange(part, "d heads dh -> (heads dh) d") for part in theirs]),
    lambda ours, parts, heads: [
        rearrange(part, "(heads dh) d -> d heads dh", heads=heads) for part in np.split(ours, parts)
    ],
)
HEADS_BIAS = Layout(
    lambda theirs: np.concatenate([rearrange(part, "heads dh -> (heads dh)") for part in theirs]),
    lambda ours, parts, heads: [
        rearrange(part, "(heads dh) -> heads dh", heads=heads) for part in np.split(ours, parts)
    ],
)
FROM_HEADS = Layout(
    lambda theirs: rearrange(theirs[0], "heads dh d -> d (heads dh)"),
    lambda ours, parts, heads: [rearrange(ours, "d (heads dh) -> heads dh d", heads=heads)],
)


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of ours and the arrays it is made of. `{}` in names stands for the number of the block."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME


def read_rows(rows: Iterable[Row], depth: int, arrays: Arrays, source: str) -> dict[str, Tensor]:
    """Return our state dict from foreign arrays, every one of which must find its row."""
    state: dict[str, Tensor] = {}
    left = dict(arrays)
    for row in _per_block(rows, depth):
        if missing := [name for name in row.theirs if name not in left]:
            raise UserError(f"{source} lacks the array {missing[0]!r}; it is incomplete, or not a model vitrail knows.")
        theirs = [_as_weights(name, left.pop(name), source) for name in row.theirs]
        try:
            ours = row.layout.read(theirs)
        except (EinopsError, ValueError) as error:
            shapes = ", ".join(str(array.shape) for array in theirs)
            raise UserError(f"{source}: {', '.join(row.theirs)} cannot have the shape {shapes}.") from error
        # require makes a scalar an array of one number, which reshape undoes
        state[row.ours] = torch.from_numpy(np.require(ours, requirements=["C", "W"]).reshape(np.shape(ours)))
    if left:
        shown = ", ".join(list(left)[:8]) + (", ..." if len(left) > 8 else "")
        raise UserError(f"{source} holds {len(left)} arrays that this model has no place for: {shown}.")
    return state


def write_rows(rows: Iterable[Row], depth: int, heads: int, state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return foreign arrays from our state dict, in float32 as the foreign files are; counters stay whole numbers."""
    arrays: dict[str, np.ndarray] = {}
    for row in _per_block(rows, depth):
        tensor = state[row.ours].detach().cpu()
        ours = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, array in zip(row.theirs, row.layout.write(ours, len(row.theirs), heads), strict=True):
            arrays[name] = np.asarray(array, order="C")  # ascontiguousarray would give a counter an axis
    return arrays


def _per_block(rows: Iterable[Row], depth: int) -> Iterable[Row]:
    for row in rows:
        if "{}" in row.ours:
            for block in range(depth):
                yield Row(row.ours.format(block), tuple(name.format(block) for name in row.theirs), row.layout)
        else:
            yield row


def _as_weights(name: str, array: np.ndarray, source: str) -> np.ndarray:
    """Return an array in float32; BatchNorm's counters of batches stay whole numbers."""
    if array.dtype == np.dtype("V2"):
        # numpy has no bfloat16; JAX's arrays arrive as two raw bytes: the upper half of a float32.
        return (array.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind == "f" and array.dtype.itemsize <= 4:
        return array.astype(np.float32, copy=False)
    if array.dtype == np.int64 and array.ndim == 0:
        return array
    raise UserError(f"{source}: {name} has numbers of type {array.dtype}; weights are float32, float16 or bfloat16.")
