"""Names of CvT weights: the official `.pth` files (microsoft/CvT) and Hugging Face's `CvtForImageClassification`.

Both hold the same arrays, as they lie here, under other names. Hugging Face's code runs them with another GELU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from torch import Tensor

from vitrail.checkpoints.names import NO_HINTS, Arrays, Hints, NameTable, Row, batch_norm, layer, read_rows, write_rows
from vitrail.checkpoints.vit_shapes import Shapes, depth_of
from vitrail.config.cvt import HEAD_DIM, CvTConfig
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vitrail.config.vit import Gelu
from vitrail.errors import UserError
from vitrail.models.base import ImageModel

SQUASHED_FROM = 384
"""From this side on both codes squash the whole picture to size; below it they cut out its centre."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class CvTNames(NameTable):
    """One convention, as data."""

    name: str
    family: type[ModelConfig] = CvTConfig
    gelu: Gelu
    """The flavour that the code computes with."""
    mark: str
    """How names begin that no other model has."""
    stage: str
    """What stands before the names of a stage, with its number as `{}`."""
    block: str
    """The same within a stage, for a block."""
    in_stage: Mapping[str, str]
    """Modules of a stage, ours and theirs."""
    conv: str
    """The convolution of a convolutional projection, with the letter or word for query, key or value as `{}`."""
    norm: str
    """The norm after it."""
    linear: str
    """The matrix after that."""
    projected: tuple[str, str, str]
    """Those letters or words."""
    in_block: Mapping[str, str]
    """Modules of a block beside the projections."""
    outside: Mapping[str, str]
    """Modules outside the stages."""

    def claims(self, arrays: Arrays) -> bool:
        return any(name.startswith(self.mark) for name in arrays)

    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        config = self._config(arrays, hints, source)
        return config, read_rows(self._rows(config), arrays, source)

    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        assert isinstance(model.config, CvTConfig)
        return write_rows(self._rows(model.config), model.state_dict())

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Return the official evaluation (`TEST` in the yaml files), which Hugging Face's image processor repeats."""
        return Preprocessing(
            image_size=config.image_size,
            channels=config.channels,
            fit="squash" if min(config.image_size) >= SQUASHED_FROM else "crop",
            crop_fraction=0.875,
            interpolation="bicubic",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    def _config(self, arrays: Arrays, hints: Hints, source: str) -> CvTConfig:
        """Read the configuration off names and shapes; a hole in the numbers of blocks shows as a missing array."""
        shapes = Shapes(arrays, source, "CvT")
        stages = [self.stage.format(stage) for stage in range(depth_of(arrays, f"{self.stage}."))]
        kernels = [shapes.of(f"{stage}.{self.in_stage['patch_embed.conv']}.weight", 4) for stage in stages]
        widths = tuple(kernel[0] for kernel in kernels)
        up = f"{self.block.format(0)}.{self.in_block['mlp.up']}.weight"
        return CvTConfig(
            image_size=hints.image_size or (224, 224),
            channels=kernels[0][1],
            num_classes=shapes.leading(f"{self.outside['head']}.weight", 2),
            widths=widths,
            depths=tuple(depth_of(arrays, f"{stage}.{self.block}.") for stage in stages),
            heads=_heads(widths, hints, source),
            mlp_dims=tuple(shapes.of(f"{stage}.{up}", 2)[0] for stage in stages),
            gelu=self.gelu,
        )

    def _rows(self, config: CvTConfig) -> Iterator[Row]:
        """Yield the name table of a configuration."""
        for i, depth in enumerate(config.depths):
            ours, theirs = f"stages.{i}", self.stage.format(i)
            for module, name in self.in_stage.items():
                yield from layer(f"{ours}.{module}", f"{theirs}.{name}")
            for j in range(depth):
                yield from self._block_rows(f"{ours}.encoder.{j}", f"{theirs}.{self.block.format(j)}")
        last = len(config.depths) - 1
        yield Row(f"stages.{last}.class_token", (f"{self.stage.format(last)}.cls_token",))
        for module, name in self.outside.items():
            if module != "head" or config.num_classes:
                yield from layer(module, name)

    def _block_rows(self, ours: str, theirs: str) -> Iterator[Row]:
        for part, word in zip(("query", "key", "value"), self.projected, strict=True):
            projection = f"{ours}.attention.{part}"
            yield from layer(f"{projection}.conv", f"{theirs}.{self.conv.format(word)}", bias=False)
            yield from batch_norm(f"{projection}.norm", f"{theirs}.{self.norm.format(word)}")
            yield from layer(f"{projection}.linear", f"{theirs}.{self.linear.format(word)}")
        for module, name in self.in_block.items():
            yield from layer(f"{ours}.{module}", f"{theirs}.{name}")


def _heads(widths: tuple[int, ...], hints: Hints, source: str) -> tuple[int, ...]:
    """Return the heads of each stage: those that were said, or one per 64 of the width."""
    if isinstance(hints.heads, tuple):
        return hints.heads
    for width in widths:
        if width % HEAD_DIM:
            raise UserError(
                f"{source} does not tell the number of its attention heads (the width {width} is not a multiple of "
                f"{HEAD_DIM}); say it for each of the {len(widths)} stages, as heads=(1, 3, 6)."
            )
    return tuple(width // HEAD_DIM for width in widths)


CVT = CvTNames(
    name="cvt",
    gelu="quick",
    mark="stage0.blocks.0.attn.conv_proj_",
    stage="stage{}",
    block="blocks.{}",
    in_stage={"patch_embed.conv": "patch_embed.proj", "patch_embed.norm": "patch_embed.norm"},
    conv="attn.conv_proj_{}.conv",
    norm="attn.conv_proj_{}.bn",
    linear="attn.proj_{}",
    projected=("q", "k", "v"),
    in_block={
        "norm1": "norm1",
        "attention.out": "attn.proj",
        "norm2": "norm2",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    },
    outside={"norm": "norm", "head": "head"},
)

_EMBEDDINGS = "embedding.convolution_embeddings"
_PROJECTION = "attention.attention.convolution_projection_{}.convolution_projection"
HF_CVT = CvTNames(
    name="hf",
    gelu="erf",
    mark="cvt.encoder.stages.",
    stage="cvt.encoder.stages.{}",
    block="layers.{}",
    in_stage={"patch_embed.conv": f"{_EMBEDDINGS}.projection", "patch_embed.norm": f"{_EMBEDDINGS}.normalization"},
    conv=f"{_PROJECTION}.convolution",
    norm=f"{_PROJECTION}.normalization",
    linear="attention.attention.projection_{}",
    projected=("query", "key", "value"),
    in_block={
        "norm1": "layernorm_before",
        "attention.out": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.up": "intermediate.dense",
        "mlp.down": "output.dense",
    },
    outside={"norm": "layernorm", "head": "classifier"},
)
