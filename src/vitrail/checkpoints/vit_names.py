"""Names of the official Vision Transformer weights: google-research/vision_transformer and google-research/big_vision.

What came out over the years is brought to one form first, then one table reads it:

- blocks named `MultiHeadDotProductAttention_1`, `LayerNorm_2`, `MlpBlock_3` (published) or `_0`, `_1`, `_0` (now);
- blocks one by one, or stacked along a leading axis (big_vision, scan);
- the position table in one of three places, with or without a row for the class token, or none (sin-cos);
- attention pooling under `MAPHead_0`, or at the top level (early ViT-G);
- scales and biases of a hybrid's GroupNorm as vectors, or with three axes of one before (published);
- everything under `params/`, `params/img/` (image tower) or `opt/target/` (optimizer dump).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from vitrail.checkpoints.names import NO_HINTS, Arrays, Hints, Layout, NameTable, Row, read_rows, write_rows
from vitrail.checkpoints.vit_shapes import Shapes, depth_of, positions_of, stages_of
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import Fit, Preprocessing
from vitrail.config.vit import Pool, Positions, ResNetStem, ViTConfig
from vitrail.errors import UserError
from vitrail.models.base import ImageModel

BLOCK = "Transformer/encoderblock_{}"
ATTENTION = "MultiHeadDotProductAttention_0"
PUBLISHED = (
    (ATTENTION, "MultiHeadDotProductAttention_1"),
    ("LayerNorm_1", "LayerNorm_2"),
    ("MlpBlock_0", "MlpBlock_3"),
)
"""Names within a block, now and in the published files."""
POSITIONS = ("pos_embedding", "Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding")
"""Places of the position table; the first is the one that the table below knows."""
INLINED_POOL = ("probe", "MlpBlock_0/", f"{ATTENTION}/", "LayerNorm_0/")
GROUP_NORM = re.compile(r"(^|/)gn(_root|_proj|\d)/(scale|bias)$")
"""Names in a hybrid's ResNet that the published files give three axes of one."""
PREFIXES = (
    ("opt/target/", r"opt/state/.*|extra/.*"),
    ("params/img/", r"params/txt/.*|params/[tb]|opt/.*|extra/.*"),
    ("params/", r"opt/.*|extra/.*"),
)
"""Where weights lie in big_vision's files, and what else may lie beside them. The first prefix that occurs counts."""

CONV = Layout("h w i o", "o i h w")
DENSE = Layout("i o", "o i")


def to_heads(heads: int) -> Layout:
    """Return how the layers that lead to heads lie: their matrices, and their biases too."""
    return Layout("... heads dh", "(heads dh) ...", {"heads": heads})


def from_heads(heads: int) -> Layout:
    """Return how the matrix that leads back from heads lies."""
    return Layout("heads dh d", "d (heads dh)", {"heads": heads})


def _layer(ours: str, theirs: str, layout: Layout = DENSE) -> list[Row]:
    return [Row(f"{ours}.weight", (f"{theirs}/kernel",), layout), Row(f"{ours}.bias", (f"{theirs}/bias",))]


def _norm(ours: str, theirs: str) -> list[Row]:
    return [Row(f"{ours}.weight", (f"{theirs}/scale",)), Row(f"{ours}.bias", (f"{theirs}/bias",))]


def _projection(ours: str, theirs: str, parts: Sequence[str], heads: int, bias: bool = True) -> list[Row]:
    """Return rows for one layer of ours that leads to the heads of all parts (queries, keys, values)."""
    kinds = {"weight": "kernel", "bias": "bias"} if bias else {"weight": "kernel"}
    return [
        Row(f"{ours}.{here}", tuple(f"{theirs}/{part}/{there}" for part in parts), to_heads(heads))
        for here, there in kinds.items()
    ]


def _std_conv(ours: str, theirs: str, part: str, their_part: str) -> list[Row]:
    """Return rows for a convolution without bias and the GroupNorm after it."""
    conv = Row(f"{ours}conv{part}.weight", (f"{theirs}conv{their_part}/kernel",), CONV)
    return [conv, *_norm(f"{ours}norm{part}", f"{theirs}gn{their_part}")]


def stem_rows(stem: ResNetStem) -> list[Row]:
    """Return the name table of a hybrid's ResNet."""
    rows = _std_conv("stem.", "", "", "_root")
    for stage, units in enumerate(stem.blocks):
        for unit in range(units):
            ours, theirs = f"stem.stages.{stage}.{unit}.", f"block{stage + 1}/unit{unit + 1}/"
            for part in ("1", "2", "3", "_proj") if unit == 0 else ("1", "2", "3"):
                rows += _std_conv(ours, theirs, part, part)
    return rows


def vit_rows(config: ViTConfig) -> list[Row]:
    """Return the name table of a Vision Transformer, in the one form that all files are brought to."""
    heads = config.heads
    rows = stem_rows(config.stem) if isinstance(config.stem, ResNetStem) else []
    rows += _layer("patch_embed", "embedding", CONV)
    if config.pool == "token":
        rows.append(Row("class_token", ("cls",)))
    if config.positions != "sincos":
        rows.append(Row("positions", (POSITIONS[0],)))
    for block in range(config.depth):
        ours, theirs = f"encoder.{block}", BLOCK.format(block)
        attention, parts = f"{theirs}/{ATTENTION}", ("query", "key", "value")
        rows += [
            *_norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0"),
            *_projection(f"{ours}.attention.qkv", attention, parts, heads, bias=config.qkv_bias),
            *_layer(f"{ours}.attention.out", f"{attention}/out", from_heads(heads)),
            *_norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1"),
            *_layer(f"{ours}.mlp.up", f"{theirs}/MlpBlock_0/Dense_0"),
            *_layer(f"{ours}.mlp.down", f"{theirs}/MlpBlock_0/Dense_1"),
        ]
    rows += _norm("norm", "Transformer/encoder_norm")
    if config.pool == "map":
        ours, theirs, attention = "attention_pool", "MAPHead_0", f"MAPHead_0/{ATTENTION}"
        rows += [
            Row(f"{ours}.probe", (f"{theirs}/probe",)),
            *_projection(f"{ours}.query", attention, ["query"], heads),
            *_projection(f"{ours}.key_value", attention, ["key", "value"], heads),
            *_layer(f"{ours}.out", f"{attention}/out", from_heads(heads)),
            *_norm(f"{ours}.norm", f"{theirs}/LayerNorm_0"),
            *_layer(f"{ours}.mlp.up", f"{theirs}/MlpBlock_0/Dense_0"),
            *_layer(f"{ours}.mlp.down", f"{theirs}/MlpBlock_0/Dense_1"),
        ]
    if config.pre_logits:
        rows += _layer("pre_logits", "pre_logits")
    if config.num_classes:
        rows += _layer("head", "head")
    return rows


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class OfficialViT(NameTable):
    """Reads every official file; writes the variant that its fields say."""

    name: str
    family: type[ModelConfig] = ViTConfig
    prefix: str
    published: bool
    holds: frozenset[tuple[Pool, Positions]] | None
    """Pooling and positions that the code can load; None for all."""
    fit: Fit
    """What the code evaluates: `squash` (vision_transformer's fine-tuning) or `crop` (big_vision's `resize_small`)."""

    def claims(self, arrays: Arrays) -> bool:
        plain = _without_prefix(arrays)
        blocks = any(name.startswith("Transformer/encoderblock") for name in plain)
        return "embedding/kernel" in plain and blocks and official_table(arrays) is self

    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        plain = _one_form(arrays, source)
        config = _read_config(plain, hints, source)
        return config, read_rows(vit_rows(config), plain, source)

    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        config = model.config
        assert isinstance(config, ViTConfig)
        kind = (config.pool, config.positions)
        if self.holds is not None and kind not in self.holds:
            raise UserError(
                f"the names {self.name!r} have no place for pool {kind[0]!r} with positions {kind[1]!r}; "
                "use names='big-vision'."
            )
        if config.stem is not None and self.prefix:
            raise UserError(f"the names {self.name!r} have no place for a ResNet stem; use names='vit'.")
        arrays = write_rows(vit_rows(config), model.state_dict())
        return {self.prefix + self._written(name, config): array for name, array in arrays.items()}

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        return Preprocessing(
            image_size=config.image_size, channels=config.channels, fit=self.fit, interpolation="bilinear"
        )

    def _written(self, name: str, config: ViTConfig) -> str:
        if name == POSITIONS[0]:
            # big_vision's own table has no row for the class token; it reads one in the older place.
            return POSITIONS[1] if not self.prefix or config.positions == "learned" else POSITIONS[0]
        if self.published and name.startswith("Transformer/encoderblock_"):
            for now, then in PUBLISHED:
                name = name.replace(f"/{now}/", f"/{then}/")
        return name


_VISION_TRANSFORMER: frozenset[tuple[Pool, Positions]] = frozenset({("token", "learned"), ("gap", "learned-patches")})
VIT = OfficialViT(name="vit", prefix="", published=False, holds=_VISION_TRANSFORMER, fit="squash")
VIT_PUBLISHED = OfficialViT(name="vit-published", prefix="", published=True, holds=_VISION_TRANSFORMER, fit="squash")
BIG_VISION = OfficialViT(name="big-vision", prefix="params/", published=False, holds=None, fit="crop")


def official_table(arrays: Arrays) -> OfficialViT:
    """Return the variant of the official names that arrays are under."""
    if any(name.startswith(prefix) for name in arrays for prefix, _ in PREFIXES):
        return BIG_VISION
    return VIT_PUBLISHED if any(f"/{PUBLISHED[2][1]}/" in name for name in arrays) else VIT


def _one_form(arrays: Arrays, source: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file under the names that `vit_rows` knows."""
    plain: dict[str, np.ndarray] = {}
    for name, array in _without_prefix(arrays).items():
        if match := re.fullmatch(r"(Transformer/encoderblock)/(.+)", name):
            if array.ndim == 0:
                raise UserError(f"{source}: {name} has no axis for the blocks; it is not a model vitrail knows.")
            plain |= {f"{match[1]}_{block}/{match[2]}": part for block, part in enumerate(array)}
        elif GROUP_NORM.search(name) and array.shape[:-1] == (1, 1, 1):
            plain[name] = array[0, 0, 0]
        else:
            plain[name] = array
    renamed = {_renamed(name, inlined="probe" in plain): array for name, array in plain.items()}
    if len(renamed) < len(plain):
        raise UserError(f"{source} holds the same array under two of the official names; it is not clear which counts.")
    return renamed


def _without_prefix(arrays: Arrays) -> Mapping[str, np.ndarray]:
    for prefix, beside in PREFIXES:
        if any(name.startswith(prefix) for name in arrays):
            return {
                name.removeprefix(prefix): array
                for name, array in arrays.items()
                if name.startswith(prefix) or not re.fullmatch(beside, name)
            }
    return arrays


def _renamed(name: str, inlined: bool) -> str:
    if name in POSITIONS:
        return POSITIONS[0]
    if inlined and name.startswith(INLINED_POOL):
        return f"MAPHead_0/{name}"
    if name.startswith("Transformer/encoderblock_"):
        for now, then in PUBLISHED:
            name = name.replace(f"/{then}/", f"/{now}/")
    return name


def _read_config(arrays: Mapping[str, np.ndarray], hints: Hints, source: str) -> ViTConfig:
    """Read the configuration off the arrays' names and shapes."""
    shapes = Shapes(arrays, source, "official ViT")
    *patch, channels, width = shapes.of("embedding/kernel", 4)
    patch_size, stem = (patch[0], patch[1]), None
    if "conv_root/kernel" in arrays:
        *_, channels, root = shapes.of("conv_root/kernel", 4)
        stem = ResNetStem(blocks=stages_of(arrays, "block{}/unit{}/"), width=root)
    first = BLOCK.format(0)
    _, heads, head_width = shapes.of(f"{first}/{ATTENTION}/query/kernel", 3)
    if heads * head_width != width:
        raise UserError(
            f"{source}: {heads} heads of {head_width} do not make up the width {width}; vitrail needs that."
        )
    token, pooling = "cls" in arrays, "MAPHead_0/probe" in arrays
    if POSITIONS[0] in arrays:
        class_rows = (1, 0) if token else (0,)
        positions, image_size = positions_of(shapes, POSITIONS[0], patch_size, stem, class_rows, hints)
    else:
        positions, image_size = "sincos", hints.image_size or (max(224, patch[0]), max(224, patch[1]))
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        stem=stem,
        channels=channels,
        num_classes=shapes.leading("head/bias", 1),
        width=width,
        depth=depth_of(arrays, f"{BLOCK}/"),
        mlp_dim=shapes.of(f"{first}/MlpBlock_0/Dense_0/kernel", 2)[1],
        heads=heads,
        pool="map" if pooling else "token" if token else "gap",
        positions=positions,
        pre_logits=shapes.leading("pre_logits/bias", 1),
        qkv_bias=f"{first}/{ATTENTION}/query/bias" in arrays,
    )
