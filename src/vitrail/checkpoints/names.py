"""Foreign weight names as data: which array there is which tensor here, and how it lies, both ways.

A family of foreign names is a list of `Row`s and a `NameTable` that reads the configuration off the arrays. Reading
undoes writing, bit for bit.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
    """How foreign arrays lie in one tensor of ours: each rearranged, and several one below the other."""

    theirs: str
    """Axes of a foreign array, as einops writes them."""
    ours: str
    """The same axes, as they lie in our tensor."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Of the axes that shapes do not tell."""

    def read(self, theirs: Sequence[np.ndarray]) -> np.ndarray:
        """Return our tensor's numbers from the foreign arrays."""
        parts = [rearrange(part, f"{self.theirs} -> {self.ours}", **self.sizes) for part in theirs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def write(self, ours: np.ndarray, parts: int) -> list[np.ndarray]:
        """Return so many foreign arrays from our tensor's numbers."""
        split = [ours] if parts == 1 else np.split(ours, parts)
        return [rearrange(part, f"{self.ours} -> {self.theirs}", **self.sizes) for part in split]


SAME = Layout("...", "...")


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of ours and the arrays it is made of."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = SAME
    counter: bool = False
    """Whether it counts batches: nothing depends on it, and files from before torch counted lack it. Then it is 0."""


def layer(ours: str, theirs: str, layout: Layout = SAME, bias: bool = True) -> list[Row]:
    """Return rows for the weight, which lies as `layout` says, and the bias of a torch layer."""
    weight = Row(f"{ours}.weight", (f"{theirs}.weight",), layout)
    return [weight, Row(f"{ours}.bias", (f"{theirs}.bias",))] if bias else [weight]


def batch_norm(ours: str, theirs: str) -> list[Row]:
    """Return rows for a torch BatchNorm."""
    rows = layer(ours, theirs)
    for part in ("running_mean", "running_var", "num_batches_tracked"):
        rows.append(Row(f"{ours}.{part}", (f"{theirs}.{part}",), counter=part == "num_batches_tracked"))
    return rows


def read_rows(rows: Iterable[Row], arrays: Arrays, source: str) -> dict[str, Tensor]:
    """Return our state dict from foreign arrays, every one of which must find its row."""
    state: dict[str, Tensor] = {}
    left = dict(arrays)
    for row in rows:
        if missing := [name for name in row.theirs if name not in left]:
            if row.counter:
                state[row.ours] = torch.tensor(0)
                continue
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


def write_rows(rows: Iterable[Row], state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return foreign arrays from our state dict, in float32 as the foreign files are; counters stay whole numbers."""
    arrays: dict[str, np.ndarray] = {}
    for row in rows:
        tensor = state[row.ours].detach().cpu()
        ours = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, array in zip(row.theirs, row.layout.write(ours, len(row.theirs)), strict=True):
            arrays[name] = np.asarray(array, order="C")  # ascontiguousarray would give a counter an axis
    return arrays


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
