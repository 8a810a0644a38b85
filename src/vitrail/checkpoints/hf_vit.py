"""Names of Hugging Face's Vision Transformer (`transformers`, `ViTModel` and `ViTForImageClassification`).

The files on the hub have the names that are written here. Since transformers 5 the modules are called otherwise
(`layers.0.attention.q_proj`), and it translates on reading and saving; both are read. A classifier stands on the class
token. Without one there may be a pooler, which is `pre_logits`. Not told by arrays: heads, GELU (exact), epsilon 1e-12.
"""

import re
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from vitrail.checkpoints.names import NO_HINTS, Arrays, Hints, NameTable, Row, layer, read_rows, write_rows
from vitrail.checkpoints.vit_shapes import Shapes, depth_of, heads_of, positions_of
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.layers.embedding import PositionResize
from vitrail.models.base import ImageModel

PREFIX = "vit."
"""Of everything but the classifier, in `ViTForImageClassification`."""
PATCH = "embeddings.patch_embeddings.projection"
POSITIONS = "embeddings.position_embeddings"
LAYER = "encoder.layer.{}"
NEW = (
    (r"layers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
"""The modules' names today, as patterns, and the files' names."""


def hf_rows(config: ViTConfig) -> list[Row]:
    """Return the name table of a Vision Transformer, without the prefix."""
    rows = [*layer("patch_embed", PATCH), Row("class_token", ("embeddings.cls_token",)), Row("positions", (POSITIONS,))]
    for block in range(config.depth):
        ours, theirs = f"encoder.{block}", LAYER.format(block)
        rows += layer(f"{ours}.norm1", f"{theirs}.layernorm_before")
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = tuple(f"{theirs}.attention.attention.{part}.{kind}" for part in ("query", "key", "value"))
            rows.append(Row(f"{ours}.attention.qkv.{kind}", parts))
        rows += [
            *layer(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
            *layer(f"{ours}.norm2", f"{theirs}.layernorm_after"),
            *layer(f"{ours}.mlp.up", f"{theirs}.intermediate.dense"),
            *layer(f"{ours}.mlp.down", f"{theirs}.output.dense"),
        ]
    rows += layer("norm", "layernorm")
    if config.pre_logits:
        rows += layer("pre_logits", "pooler.dense")
    if config.num_classes:
        rows += layer("head", "classifier")
    return rows


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceViT(NameTable):
    """State dicts of `ViTForImageClassification`, or of `ViTModel` when there is no classifier."""

    name: str = "hf"
    family: type[ModelConfig] = ViTConfig
    position_resize: PositionResize = "hf"

    def claims(self, arrays: Arrays) -> bool:
        plain = _one_form(arrays)
        return {f"{PATCH}.weight", f"{LAYER.format(0)}.layernorm_before.weight"} <= plain.keys()

    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        plain = _one_form(arrays)
        if len(plain) < len(arrays):
            raise UserError(f"{source} holds the same array under two names; it is not clear which counts.")
        if "classifier.weight" in plain:
            # ViTForImageClassification never asks the pooler that a file from pre-training may still hold.
            plain = {name: array for name, array in plain.items() if not name.startswith("pooler.")}
        config = _read_config(Shapes(plain, source, "Hugging Face ViT"), hints)
        return config, read_rows(hf_rows(config), plain, source)

    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        config = model.config
        assert isinstance(config, ViTConfig)
        if (config.pool, config.positions, config.stem) != ("token", "learned", None):
            raise UserError(
                "Hugging Face's ViT has patches of the picture, a class token and learned positions with a row for it; "
                f"not pool {config.pool!r} with positions {config.positions!r}"
                f"{'' if config.stem is None else ' and a ResNet stem'}."
            )
        if config.pre_logits and config.num_classes:
            raise UserError(
                "Hugging Face's ViT has pre_logits (its pooler) or a classifier, not both; leave the head out with "
                "num_classes=0, or give the model a fresh one."
            )
        arrays = write_rows(hf_rows(config), model.state_dict())
        prefix = PREFIX if config.num_classes else ""
        return {name if name.startswith("classifier.") else prefix + name: array for name, array in arrays.items()}

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Return what `ViTImageProcessor` does by default."""
        return Preprocessing(
            image_size=config.image_size, channels=config.channels, fit="squash", interpolation="bilinear"
        )


HF_VIT = HuggingFaceViT()


def _one_form(arrays: Arrays) -> Arrays:
    """Return arrays under the files' names, without the prefix."""
    return {_renamed(name.removeprefix(PREFIX)): array for name, array in arrays.items()}


def _renamed(name: str) -> str:
    if re.match(NEW[0][0], name):
        for now, then in NEW:
            name = re.sub(now, then, name, count=1)
    return name


def _read_config(shapes: Shapes, hints: Hints) -> ViTConfig:
    width, channels, *patch = shapes.of(f"{PATCH}.weight", 4)
    patch_size = patch[0], patch[1]
    depth = depth_of(shapes.arrays, f"{LAYER}.")
    first = LAYER.format(0)
    mlp_dim = shapes.of(f"{first}.intermediate.dense.weight", 2)[0]
    shapes.of(POSITIONS, 3)
    _, image_size = positions_of(shapes, POSITIONS, patch_size, None, (1,), hints)
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        channels=channels,
        num_classes=shapes.leading("classifier.weight", 2),
        width=width,
        depth=depth,
        mlp_dim=mlp_dim,
        heads=heads_of(width, depth, mlp_dim, hints, shapes.source),
        pre_logits=shapes.leading("pooler.dense.weight", 2),
        qkv_bias=f"{first}.attention.attention.query.bias" in shapes.arrays,
        gelu="erf",
        norm_eps=1e-12,
    )
