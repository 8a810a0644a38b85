"""Reading a Vision Transformer's settings off the names and shapes of its arrays, whatever the convention of names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

from vitrail.checkpoints.names import Arrays, Hints
from vitrail.config.vit import VIT_SIZES, Positions, ResNetStem, grid_of
from vitrail.errors import UserError

_SIGLIP = ((1152, 27, 4304, 16), (1536, 40, 6144, 16))  # timm's so400m and giantopt
_HEADS = {(width, depth, mlp_dim): heads for width, depth, mlp_dim, heads in (*VIT_SIZES.values(), *_SIGLIP)}


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes of named arrays, with errors that name the file and the array."""

    arrays: Arrays
    source: str
    """What to call the arrays in errors."""
    kind: str
    """What the names are thought to be, for errors: "official ViT"."""

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of an array that must be there, with as many axes and nothing empty."""
        if name not in self.arrays:
            raise UserError(
                f"{self.source} has no array {name!r}: it is not one of the {self.kind} files that vitrail knows."
            )
        shape = self.arrays[name].shape
        if len(shape) != axes or 0 in shape:
            raise UserError(f"{self.source}: {name} cannot have the shape {shape}.")
        return shape

    def leading(self, name: str, axes: int) -> int:
        """Return the first side of an array, 0 when there is no such array."""
        return self.of(name, axes)[0] if name in self.arrays else 0


def depth_of(names: Iterable[str], block: str) -> int:
    """Return how many blocks names speak of; `block` is how theirs begin, with the number as `{}`: "blocks.{}."."""
    return len(_numbers(names, block))


def stages_of(names: Iterable[str], block: str) -> tuple[int, ...]:
    """Return the number of blocks in each stage; `block` is how their names begin, the stage's number before theirs."""
    stages = [stage for stage, _ in _numbers(names, block)]
    return tuple(stages.count(stage) for stage in sorted(set(stages)))


def _numbers(names: Iterable[str], begin: str) -> set[tuple[int, ...]]:
    """Return the numbers that names have in the places of `{}`."""
    pattern = re.compile(r"(\d{1,9})".join(map(re.escape, begin.split("{}"))))
    return {tuple(map(int, match.groups())) for name in names if (match := pattern.match(name))}


def heads_of(width: int, depth: int, mlp_dim: int, hints: Hints, source: str) -> int:
    """Return the number of attention heads, which torch's merged matrices do not show.

    It is the one that was said, that of the published size, or one per 64 of the width.

    Raises:
        UserError: When it must be said.
    """
    said = hints.heads if isinstance(hints.heads, int) else None
    heads = said or _HEADS.get((width, depth, mlp_dim)) or (0 if width % 64 else width // 64)
    if not heads:
        raise UserError(
            f"{source} does not tell the number of its attention heads (the width {width} is not a multiple of 64); "
            "say it as heads=."
        )
    return heads


def positions_of(
    shapes: Shapes,
    name: str,
    patch: tuple[int, int],
    stem: ResNetStem | None,
    class_rows: tuple[int, ...],
    hints: Hints,
) -> tuple[Positions, tuple[int, int]]:
    """Return the kind of a position table and the picture size it is for.

    Its grid is square, or that of the picture size that was said.

    Args:
        shapes: Of the file.
        name: Of the table.
        patch: Height and width of a patch.
        stem: What comes before the patches.
        class_rows: Numbers of rows that may stand for the class token, 0 or 1, the likelier first.
        hints: With the picture size of a table that is not square.

    Raises:
        UserError: When neither fits.
    """
    table = shapes.arrays[name]
    rows = table.shape[1] if table.ndim == 3 else 0
    grids: list[tuple[int, int, int]] = []
    for row in class_rows:
        side = isqrt(max(rows - row, 0))
        grids.append((side, side, row))
        if hints.image_size is not None:
            grids.append((*grid_of(hints.image_size, patch, stem), row))
    stride = 1 if stem is None else stem.stride
    for height, width, row in grids:
        if height * width + row == rows and height * width > 0:
            return "learned" if row else "learned-patches", (height * patch[0] * stride, width * patch[1] * stride)
    raise UserError(
        f"{shapes.source} has positions of the shape {table.shape}, which is not a square grid; "
        "say which picture size they are for, as image_size=(height, width)."
    )
