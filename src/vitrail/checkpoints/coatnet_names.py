"""Names of timm's CoAtNets `coatnet_0_224` to `coatnet_5_224` (timm/models/maxxvit.py), which are the paper's.

timm's trained CoAtNets (`_rw`, `rmlp`, `bn`) share most names, but are networks of their own, and no two alike: MBConv
expands from the input's width, has SiLU, an activation after its first norm and no biases, and squeezes before its last
norm; attention has the input's width; positions may come from a network, branches may be scaled; the head has no hidden
layer. Loading one is an error that says so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import final

import numpy as np
from torch import Tensor

from vitrail.checkpoints.names import (
    NO_HINTS,
    Arrays,
    Hints,
    Layout,
    NameTable,
    Row,
    batch_norm,
    layer,
    read_rows,
    write_rows,
)
from vitrail.checkpoints.vit_shapes import Shapes, depth_of
from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.errors import UserError
from vitrail.layers.embedding import PositionResize
from vitrail.models.base import ImageModel

TABLE = "attn.rel_pos.relative_position_bias_table"
MATRIX = Layout("o i 1 1", "o i")
"""timm's attention blocks have 1x1 convolutions where ours have matrices."""


def qkv_weight(heads: int) -> Layout:
    """Return how queries, keys and values lie in one array: head by head, the three of a head after one another."""
    return Layout("(heads three dh) i 1 1", "(three heads dh) i", {"heads": heads, "three": 3})


def qkv_bias(heads: int) -> Layout:
    """Return how their biases lie."""
    return Layout("(heads three dh)", "(three heads dh)", {"heads": heads, "three": 3})


def table(rows: int) -> Layout:
    """Return how a table of relative positions lies: flat, the head last."""
    return Layout("(rows columns) heads", "heads rows columns", {"rows": rows})


def coatnet_rows(config: CoAtNetConfig) -> Iterator[Row]:
    """Yield the name table of a CoAtNet."""
    yield from layer("stem.conv1", "stem.conv1", bias=False)
    yield from batch_norm("stem.norm", "stem.norm1")
    yield from layer("stem.conv2", "stem.conv2", bias=False)
    channels = config.widths[0]
    for stage, (width, depth) in enumerate(zip(config.widths[1:], config.depths, strict=True)):
        for block in range(depth):
            ours, theirs = f"stages.{stage}.{block}", f"stages.{stage}.blocks.{block}"
            if channels != width:
                yield from layer(f"{ours}.shortcut.project", f"{theirs}.shortcut.expand")
            if stage < 2:
                yield from _mbconv(ours, theirs)
            else:
                yield from _relative_block(ours, theirs, block == 0, width // config.head_dim, config.grids[stage - 2])
            channels = width
    yield from layer("norm", "head.norm")
    yield from layer("pre_logits", "head.pre_logits.fc")
    if config.num_classes:
        yield from layer("head", "head.fc")


def _mbconv(ours: str, theirs: str) -> Iterator[Row]:
    yield from batch_norm(f"{ours}.norm", f"{theirs}.pre_norm")
    yield from layer(f"{ours}.expand", f"{theirs}.conv1_1x1", bias=False)
    yield from batch_norm(f"{ours}.expand_norm", f"{theirs}.norm1")
    yield from layer(f"{ours}.depthwise", f"{theirs}.conv2_kxk", bias=False)
    yield from batch_norm(f"{ours}.depthwise_norm", f"{theirs}.norm2")
    yield from layer(f"{ours}.squeeze_excite.reduce", f"{theirs}.se.fc1")
    yield from layer(f"{ours}.squeeze_excite.expand", f"{theirs}.se.fc2")
    yield from layer(f"{ours}.project", f"{theirs}.conv3_1x1")


def _relative_block(ours: str, theirs: str, first: bool, heads: int, grid: tuple[int, int]) -> Iterator[Row]:
    yield from layer(f"{ours}.norm1", f"{theirs}.norm1.norm" if first else f"{theirs}.norm1")
    yield Row(f"{ours}.attention.qkv.weight", (f"{theirs}.attn.qkv.weight",), qkv_weight(heads))
    yield Row(f"{ours}.attention.qkv.bias", (f"{theirs}.attn.qkv.bias",), qkv_bias(heads))
    yield Row(f"{ours}.attention.table", (f"{theirs}.{TABLE}",), table(2 * grid[0] - 1))
    yield from layer(f"{ours}.attention.out", f"{theirs}.attn.proj", MATRIX)
    yield from layer(f"{ours}.norm2", f"{theirs}.norm2")
    yield from layer(f"{ours}.mlp.up", f"{theirs}.mlp.fc1", MATRIX)
    yield from layer(f"{ours}.mlp.down", f"{theirs}.mlp.fc2", MATRIX)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TimmCoAtNet(NameTable):
    """timm's state dicts of `MaxxVit` in the paper's layout."""

    name: str = "timm"
    family: type[ModelConfig] = CoAtNetConfig
    position_resize: PositionResize = "timm"

    def claims(self, arrays: Arrays) -> bool:
        return {"stem.conv1.weight", "stages.0.blocks.0.conv1_1x1.weight"} <= arrays.keys()

    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        if "norm.weight" in arrays:
            raise UserError(
                f"{source} is one of timm's own CoAtNets (_rw, rmlp, bn), which differ from the paper's in "
                "expansion, activations, attention width, biases and head; vitrail has the paper's only."
            )
        config = _read_config(Shapes(arrays, source, "timm CoAtNet"), hints)
        return config, read_rows(coatnet_rows(config), arrays, source)

    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        config = model.config
        assert isinstance(config, CoAtNetConfig)
        if config.mbconv_before_s3[0]:
            raise UserError("timm has no CoAtNet with MBConv blocks in S3, as CoAtNet-6 and 7 have.")
        return write_rows(coatnet_rows(config), model.state_dict())

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Return what timm's `default_cfgs` say: bicubic, values in [-1, 1]."""
        return Preprocessing(image_size=config.image_size, channels=config.channels, crop_fraction=0.95)


TIMM_COATNET = TimmCoAtNet()


def _read_config(shapes: Shapes, hints: Hints) -> CoAtNetConfig:
    """Read the configuration off names and shapes; what they do not tell is as in timm."""
    blocks = [f"stages.{stage}.blocks.0" for stage in range(4)]
    stem = shapes.of("stem.conv1.weight", 4)
    s1, s2 = (shapes.of(f"{block}.conv3_1x1.weight", 4)[0] for block in blocks[:2])
    s3, s4 = (shapes.of(f"{block}.attn.proj.weight", 4)[0] for block in blocks[2:])
    tables = [shapes.of(f"{block}.{TABLE}", 2) for block in blocks[2:]]
    head_dim = s3 // tables[0][1]
    if head_dim == 0 or (s3, s4) != (head_dim * tables[0][1], head_dim * tables[1][1]):
        raise UserError(
            f"{shapes.source}: {blocks[3]}.{TABLE} has the shape {tables[1]}, which with width {s4} is not of heads "
            f"as wide as those of {blocks[2]}; vitrail needs that."
        )
    depths = [depth_of(shapes.arrays, f"stages.{stage}.blocks.{{}}.") for stage in range(4)]
    return CoAtNetConfig(
        image_size=_image_size(shapes.source, tables[0][0], tables[1][0], hints),
        channels=stem[1],
        num_classes=shapes.leading("head.fc.weight", 2),
        widths=(stem[0], s1, s2, s3, s4),
        depths=(depths[0], depths[1], depths[2], depths[3]),
        head_dim=head_dim,
        downsample="avg",
        stride_in="depthwise",
        gelu="erf",
        batch_norm_eps=1e-5,
        norm_eps=1e-6,
    )


def _image_size(source: str, s3: int, s4: int, hints: Hints) -> tuple[int, int]:
    """Return the picture size for which S3 and S4 have tables of so many rows: a hint that fits, else a square."""
    side = 16 * ((isqrt(s3) + 1) // 2)
    for size in (hints.image_size, (side, side)):
        if size is not None and [
            (2 * rows - 1) * (2 * columns - 1) for rows, columns in CoAtNetConfig(image_size=size).grids
        ] == [s3, s4]:
            return size
    raise UserError(
        f"{source} has tables of {s3} and {s4} relative positions, which is no square picture; say which picture "
        "size they are for, as image_size=(height, width)."
    )
