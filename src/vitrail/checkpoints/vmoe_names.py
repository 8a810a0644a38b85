"""Names of the official V-MoE weights: google-research/vmoe, as arrays or in the container that `partitioned` reads.

They are those of the Vision Transformer under other headings; a block with experts has `Moe` in place of `Mlp`.
"""

import re
from typing import final

import numpy as np
from torch import Tensor

from vitrail.checkpoints.names import NO_HINTS, Arrays, Hints, NameTable, Row, read_rows, write_rows
from vitrail.checkpoints.vit_names import DENSE, vit_rows
from vitrail.checkpoints.vit_shapes import Shapes, depth_of, positions_of
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.vit import grid_of
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.errors import UserError
from vitrail.models.base import ImageModel

BLOCK = "Encoder/encoderblock_{}"
POSITIONS = "Encoder/posembed_input/pos_embedding"
ROUTER = re.compile(r"Encoder/encoderblock_(\d+)/Moe/Router/dense/kernel")
HEADINGS = (
    (r"^pos_embedding$", POSITIONS),
    (r"MAPHead_0/(MultiHeadDotProductAttention|LayerNorm)_0/", r"MapHead/\1/"),
    (r"MAPHead_0/", "MapHead/"),
    (r"MultiHeadDotProductAttention_0/", "SelfAttention/"),
    (r"MlpBlock_0/", "Mlp/"),
    (r"Transformer/", "Encoder/"),
)
"""Patterns in names of the Vision Transformer and what vmoe writes for them, one after the other."""


def vmoe_rows(config: ViTMoEConfig) -> list[Row]:
    """Return the name table of a V-MoE."""
    experts = tuple(f"encoder.{block}.mlp." for block in config.moe_layers)
    plain = (row for row in vit_rows(config) if not row.ours.startswith(experts))
    rows = [Row(row.ours, tuple(map(_heading, row.theirs)), row.layout) for row in plain]
    for block in config.moe_layers:
        ours, theirs = f"encoder.{block}.mlp", f"{BLOCK.format(block)}/Moe"
        rows.append(Row(f"{ours}.router.dense.weight", (f"{theirs}/Router/dense/kernel",), DENSE))
        for layer, dense in (("up", "Dense_0"), ("down", "Dense_1")):
            rows.append(Row(f"{ours}.experts.{layer}.weight", (f"{theirs}/Mlp/{dense}/kernel",)))
            rows.append(Row(f"{ours}.experts.{layer}.bias", (f"{theirs}/Mlp/{dense}/bias",)))
    return rows


@final
class OfficialVMoE(NameTable):
    """Reads and writes the names of google-research/vmoe."""

    name = "vmoe"
    family: type[ModelConfig] = ViTMoEConfig

    def claims(self, arrays: Arrays) -> bool:
        return any(ROUTER.fullmatch(name) for name in arrays)

    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        config = _read_config(arrays, hints, source)
        return config, read_rows(vmoe_rows(config), arrays, source)

    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        config = model.config
        if not isinstance(config, ViTMoEConfig):
            raise UserError(f"the names 'vmoe' have no place for a {type(model).__name__} without experts.")
        lacking = {
            "a stem": config.stem is not None,
            "queries without a bias": not config.qkv_bias,
            "a class token without a position": config.pool == "token" and config.positions == "learned-patches",
        }
        if found := [what for what, there in lacking.items() if there]:
            raise UserError(f"the names 'vmoe' have no place for {found[0]}; the official code has no such model.")
        return write_rows(vmoe_rows(config), model.state_dict())

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Pre-trained models see the centre of a picture at 224 pixels, fine-tuned ones all of it (vmoe `configs/`)."""
        return Preprocessing(
            image_size=config.image_size,
            channels=config.channels,
            fit="crop" if config.image_size == (224, 224) else "squash",
            interpolation="bilinear",
        )


VMOE = OfficialVMoE()


def _heading(name: str) -> str:
    for pattern, heading in HEADINGS:
        name = re.sub(pattern, heading, name)
    return name


def _read_config(arrays: Arrays, hints: Hints, source: str) -> ViTMoEConfig:
    """Read the configuration off the arrays' names and shapes."""
    shapes = Shapes(arrays, source, "official V-MoE")
    patch_rows, patch_columns, channels, width = shapes.of("embedding/kernel", 4)
    patch = (patch_rows, patch_columns)
    _, heads, head_width = shapes.of(f"{BLOCK.format(0)}/SelfAttention/query/kernel", 3)
    if heads * head_width != width:
        raise UserError(
            f"{source}: {heads} heads of {head_width} do not make up the width {width}; vitrail needs that."
        )
    token = "cls" in arrays
    if POSITIONS in arrays:
        positions, image_size = positions_of(shapes, POSITIONS, patch, None, (1,) if token else (0,), hints)
    else:
        rows, columns = grid_of(hints.image_size or (224, 224), patch, None)
        positions, image_size = "sincos", (max(rows, 1) * patch[0], max(columns, 1) * patch[1])
    layers = tuple(sorted(int(match[1]) for name in arrays if (match := ROUTER.fullmatch(name))))
    moe = f"{BLOCK.format(layers[0])}/Moe"
    return ViTMoEConfig(
        image_size=image_size,
        patch_size=patch,
        channels=channels,
        num_classes=shapes.leading("head/bias", 1),
        width=width,
        depth=depth_of(arrays, f"{BLOCK}/"),
        mlp_dim=shapes.of(f"{moe}/Mlp/Dense_0/kernel", 3)[2],
        heads=heads,
        pool="map" if "MapHead/probe" in arrays else "token" if token else "gap",
        positions=positions,
        pre_logits=shapes.leading("pre_logits/bias", 1),
        moe_layers=layers,
        experts=shapes.of(f"{moe}/Router/dense/kernel", 2)[1],
        experts_per_token=min(2, shapes.of(f"{moe}/Router/dense/kernel", 2)[1]),
    )
