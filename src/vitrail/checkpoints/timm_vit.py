"""Names of timm's Vision Transformers and hybrids (`timm.models.vision_transformer`, `vision_transformer_hybrid`).

DeiT's, DINO's and MIIL's ImageNet-21K-P weights are under the same names. Not told by arrays: the number of heads (see
`heads_of`) and GELU's flavour, which is the exact one in timm, for weights from the JAX code too.
"""

from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from vitrail.checkpoints.names import NO_HINTS, Arrays, Hints, NameTable, Row, layer, read_rows, write_rows
from vitrail.checkpoints.vit_shapes import Shapes, depth_of, heads_of, positions_of, stages_of
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.vit import ResNetStem, ViTConfig
from vitrail.errors import UserError
from vitrail.layers.embedding import PositionResize
from vitrail.models.base import ImageModel

BACKBONE = "patch_embed.backbone"
PRE_LOGITS = "pre_logits.fc"
"""The tanh layer before the head in weights of timm before 0.5; timm has none today."""


def stem_rows(stem: ResNetStem) -> list[Row]:
    """Return the name table of a hybrid's stem."""
    root = f"{BACKBONE}.stem" if stem.blocks else BACKBONE
    rows = [*layer("stem.conv", f"{root}.conv", bias=False), *layer("stem.norm", f"{root}.norm")]
    for stage, units in enumerate(stem.blocks):
        for unit in range(units):
            ours, theirs = f"stem.stages.{stage}.{unit}", f"{BACKBONE}.stages.{stage}.blocks.{unit}"
            parts = {"1": ("conv1", "norm1"), "2": ("conv2", "norm2"), "3": ("conv3", "norm3")}
            if unit == 0:
                parts["_proj"] = ("downsample.conv", "downsample.norm")
            for part, (conv, norm) in parts.items():
                rows += layer(f"{ours}.conv{part}", f"{theirs}.{conv}", bias=False)
                rows += layer(f"{ours}.norm{part}", f"{theirs}.{norm}")
    return rows


def timm_rows(config: ViTConfig) -> list[Row]:
    """Return the name table of a Vision Transformer."""
    rows = stem_rows(config.stem) if isinstance(config.stem, ResNetStem) else []
    rows += layer("patch_embed", "patch_embed.proj")
    if config.pool == "token":
        rows.append(Row("class_token", ("cls_token",)))
    rows.append(Row("positions", ("pos_embed",)))
    for block in range(config.depth):
        ours, theirs = f"encoder.{block}", f"blocks.{block}"
        rows += [
            *layer(f"{ours}.norm1", f"{theirs}.norm1"),
            *layer(f"{ours}.attention.qkv", f"{theirs}.attn.qkv", bias=config.qkv_bias),
            *layer(f"{ours}.attention.out", f"{theirs}.attn.proj"),
            *layer(f"{ours}.norm2", f"{theirs}.norm2"),
            *layer(f"{ours}.mlp.up", f"{theirs}.mlp.fc1"),
            *layer(f"{ours}.mlp.down", f"{theirs}.mlp.fc2"),
        ]
    rows += layer("norm", "norm")
    if config.pool == "map":
        rows += [
            Row("attention_pool.probe", ("attn_pool.latent",)),
            *layer("attention_pool.query", "attn_pool.q"),
            *layer("attention_pool.key_value", "attn_pool.kv"),
            *layer("attention_pool.out", "attn_pool.proj"),
            *layer("attention_pool.norm", "attn_pool.norm"),
            *layer("attention_pool.mlp.up", "attn_pool.mlp.fc1"),
            *layer("attention_pool.mlp.down", "attn_pool.mlp.fc2"),
        ]
    if config.pre_logits:
        rows += layer("pre_logits", PRE_LOGITS)
    if config.num_classes:
        rows += layer("head", "head")
    return rows


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class TimmViT(NameTable):
    """timm's state dicts of `VisionTransformer`."""

    name: str = "timm"
    family: type[ModelConfig] = ViTConfig
    position_resize: PositionResize = "timm"

    def claims(self, arrays: Arrays) -> bool:
        return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"} <= arrays.keys()

    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        if "fc_norm.weight" in arrays:
            raise UserError(
                f"{source} averages tokens before the last norm (fc_norm), as timm does with global_pool='avg'; "
                "vitrail's models average after it, which is another function, so these weights cannot be used."
            )
        config = _read_config(Shapes(arrays, source, "timm ViT"), hints)
        return config, read_rows(timm_rows(config), arrays, source)

    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        config = model.config
        assert isinstance(config, ViTConfig)
        if config.positions == "sincos":
            raise UserError("timm's ViT has learned positions only, and this model has sin-cos positions.")
        if config.pre_logits:
            raise UserError("timm's ViT has no layer like pre_logits; give the model a fresh head with num_classes=.")
        return write_rows(timm_rows(config), model.state_dict())

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Return what timm's `default_cfgs` say: of MIIL's weights, the ones without qkv biases, values in [0, 1]."""
        size, channels = config.image_size, config.channels
        if isinstance(config, ViTConfig) and not config.qkv_bias:
            zero, one = (0.0,) * 3, (1.0,) * 3
            return Preprocessing(image_size=size, channels=channels, interpolation="bilinear", mean=zero, std=one)
        return Preprocessing(image_size=size, channels=channels, crop_fraction=0.9 if max(size) <= 224 else 1.0)


TIMM_VIT = TimmViT()


def _read_config(shapes: Shapes, hints: Hints) -> ViTConfig:
    arrays = shapes.arrays
    width, entering, *patch = shapes.of("patch_embed.proj.weight", 4)
    patch_size = patch[0], patch[1]
    stem, channels = _read_stem(shapes) or (None, entering)
    token, pooling = "cls_token" in arrays, "attn_pool.latent" in arrays
    depth = depth_of(arrays, "blocks.{}.")
    mlp_dim = shapes.of("blocks.0.mlp.fc1.weight", 2)[0]
    shapes.of("pos_embed", 3)
    positions, image_size = positions_of(shapes, "pos_embed", patch_size, stem, (1, 0) if token else (0,), hints)
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        stem=stem,
        channels=channels,
        num_classes=shapes.leading("head.weight", 2),
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        heads=heads_of(width, depth, mlp_dim, hints, shapes.source),
        pool="map" if pooling else "token" if token else "gap",
        positions=positions,
        pre_logits=shapes.leading(f"{PRE_LOGITS}.weight", 2),
        qkv_bias="blocks.0.attn.qkv.bias" in arrays,
        gelu="erf",
    )


def _read_stem(shapes: Shapes) -> tuple[ResNetStem, int] | None:
    """Return the stem of a hybrid and the channels of a picture; None when there is no stem."""
    if not any(name.startswith(f"{BACKBONE}.") for name in shapes.arrays):
        return None
    blocks = stages_of(shapes.arrays, BACKBONE + ".stages.{}.blocks.{}.")
    root = f"{BACKBONE}.stem.conv.weight" if blocks else f"{BACKBONE}.conv.weight"
    width, channels, *_ = shapes.of(root, 4)
    return ResNetStem(blocks=blocks, width=width), channels
