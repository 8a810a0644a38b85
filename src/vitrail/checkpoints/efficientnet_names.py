"""Names of EfficientNet weights: timm's `tf_efficientnet_*`, and lukemelas/EfficientNet-PyTorch (with its Lite fork).

timm numbers stages and blocks, and names a block's convolutions by their place: what is `conv_pw` where the block
expands is `conv_dw` where it does not. EfficientNet-PyTorch numbers blocks through; stages show in their shapes. (It
leaves out the shortcut of a stage's first block; at no published size would there be one.)

Kernels, strides and expansions are those of EfficientNet-B0, so arrays of a relative under the same names (MobileNetV2)
do not fit. timm's own `efficientnet_*` do fit, but were trained with symmetric padding and another epsilon: arrays
cannot tell them from `tf_efficientnet_*`, and their answers here would be off.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import final

import numpy as np
from torch import Tensor

from vitrail.checkpoints.names import NO_HINTS, Arrays, Hints, NameTable, Row, batch_norm, layer, read_rows, write_rows
from vitrail.checkpoints.vit_shapes import Shapes, depth_of, stages_of
from vitrail.config.efficientnet import EFFICIENTNETS, EXPANSIONS, KERNELS, WIDTHS, EfficientNetConfig
from vitrail.config.model import ModelConfig
from vitrail.config.preprocessing import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vitrail.errors import UserError
from vitrail.models.base import ImageModel

CROP_PADDING = 32
"""The official evaluation resizes to this many pixels more than the centre crop that it keeps."""

Pair = tuple[str, str]
Blocks = list[list[str]]
"""Foreign names of the blocks, stage by stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockNames:
    """Foreign names within a block: a convolution and its norm each."""

    expand: Pair | None
    depthwise: Pair
    project: Pair
    squeeze: Pair
    """The two convolutions of squeeze-and-excitation."""


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class EfficientNetNames(NameTable):
    """One convention, as data."""

    name: str
    family: type[ModelConfig] = EfficientNetConfig
    stem: Pair
    last: Pair
    head: str
    expanding: BlockNames
    """Of blocks that expand."""
    plain: BlockNames
    """Of those that do not: the first stage."""
    find: Callable[[Shapes], Blocks]
    """The blocks that arrays hold, as many stages as there are."""
    number: Callable[[EfficientNetConfig], Blocks]
    """The blocks of a configuration."""
    lite_mean: tuple[float, ...]
    lite_std: tuple[float, ...]
    """Normalisation of the Lite sizes, not ImageNet's: `efficientnet_lite_builder.py` has (level - 127) / 128."""

    def claims(self, arrays: Arrays) -> bool:
        return all(f"{name}.weight" in arrays for name in (*self.stem, *self.last))

    def to_ours(
        self, arrays: Arrays, *, hints: Hints = NO_HINTS, source: str = "this file"
    ) -> tuple[ModelConfig, dict[str, Tensor]]:
        config = self._config(Shapes(arrays, source, "EfficientNet"), hints)
        return config, read_rows(self._rows(config), arrays, source)

    def from_ours(self, model: ImageModel) -> dict[str, np.ndarray]:
        assert isinstance(model.config, EfficientNetConfig)
        return write_rows(self._rows(model.config), model.state_dict())

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        assert isinstance(config, EfficientNetConfig)
        side = min(config.image_size)
        mean, std = (self.lite_mean, self.lite_std) if config.lite else (IMAGENET_MEAN, IMAGENET_STD)
        if config.channels != 3:  # one value for all
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        return Preprocessing(
            image_size=config.image_size,
            channels=config.channels,
            crop_fraction=side / (side + CROP_PADDING),
            interpolation="bicubic",
            mean=mean,
            std=std,
        )

    def _config(self, shapes: Shapes, hints: Hints) -> EfficientNetConfig:
        """Read the configuration off names and shapes; picture size and dropout are those of the published size."""
        blocks = self.find(shapes)
        if len(blocks) != len(WIDTHS):
            raise UserError(
                f"{shapes.source} has {len(blocks)} stages of blocks; an EfficientNet has {len(WIDTHS)}, "
                "so these names must be those of another network."
            )
        kinds = [self.expanding if expansion > 1 else self.plain for expansion in EXPANSIONS]
        projects = [f"{stage[0]}.{kind.project[0]}.weight" for stage, kind in zip(blocks, kinds, strict=True)]
        stem_width, channels, _, _ = shapes.of(f"{self.stem[0]}.weight", 4)
        config = EfficientNetConfig(
            channels=channels,
            num_classes=shapes.leading(f"{self.head}.weight", 2),
            stem_width=stem_width,
            widths=tuple(shapes.of(project, 4)[0] for project in projects),
            depths=tuple(len(stage) for stage in blocks),
            head_width=shapes.of(f"{self.last[0]}.weight", 4)[0],
            lite=f"{blocks[0][0]}.{self.plain.squeeze[0]}.weight" not in shapes.arrays,
        )
        for size in EFFICIENTNETS.values():
            known = replace(config, image_size=size.image_size, dropout=size.dropout)
            if known == replace(size, channels=config.channels, num_classes=config.num_classes):
                config = known
        return config if hints.image_size is None else replace(config, image_size=hints.image_size)

    def _rows(self, config: EfficientNetConfig) -> Iterator[Row]:
        """Yield the name table of a configuration."""
        yield from _conv_norm("stem", self.stem)
        for stage, (blocks, expansion) in enumerate(zip(self.number(config), EXPANSIONS, strict=True)):
            names = self.expanding if expansion > 1 else self.plain
            for i, theirs in enumerate(blocks):
                ours = f"stages.{stage}.{i}"
                if names.expand is not None:
                    yield from _conv_norm(f"{ours}.expand", names.expand, f"{theirs}.")
                yield from _conv_norm(f"{ours}.depthwise", names.depthwise, f"{theirs}.")
                if not config.lite:
                    for part, name in zip(("reduce", "expand"), names.squeeze, strict=True):
                        yield from layer(f"{ours}.squeeze.{part}", f"{theirs}.{name}")
                yield from _conv_norm(f"{ours}.project", names.project, f"{theirs}.")
        yield from _conv_norm("last", self.last)
        if config.num_classes:
            yield from layer("head", self.head)


def _conv_norm(ours: str, theirs: Pair, prefix: str = "") -> Iterator[Row]:
    conv, norm = theirs
    yield from layer(f"{ours}.conv", f"{prefix}{conv}", bias=False)
    yield from batch_norm(f"{ours}.norm", f"{prefix}{norm}")


def _find_staged(shapes: Shapes) -> Blocks:
    """Return blocks that are numbered stage by stage; a hole in the numbers shows as a missing array."""
    return _staged(stages_of(shapes.arrays, "blocks.{}.{}."))


def _staged(depths: tuple[int, ...]) -> Blocks:
    return [[f"blocks.{stage}.{block}" for block in range(depth)] for stage, depth in enumerate(depths)]


def _find_flat(shapes: Shapes) -> Blocks:
    """Return blocks that are numbered through, cut where the kernel, the width or the kind of block changes."""

    def kind(block: str) -> tuple[bool, int, int]:
        kernel = shapes.of(f"{block}._depthwise_conv.weight", 4)[2]
        width = shapes.of(f"{block}._project_conv.weight", 4)[0]
        return f"{block}._expand_conv.weight" in shapes.arrays, kernel, width

    names = (f"_blocks.{i}" for i in range(depth_of(shapes.arrays, "_blocks.{}.")))
    return [list(stage) for _, stage in groupby(names, key=kind)]


def _flat(config: EfficientNetConfig) -> Blocks:
    kinds = zip(EXPANSIONS, KERNELS, config.widths, strict=True)
    if any(first == second for first, second in pairwise(kinds)):
        raise UserError(f"these names cannot tell stages of the widths {config.widths} apart; use names='timm'.")
    numbers = iter(range(sum(config.depths)))
    return [[f"_blocks.{next(numbers)}" for _ in range(depth)] for depth in config.depths]


_TIMM_SQUEEZE = ("se.conv_reduce", "se.conv_expand")
TIMM_EFFICIENTNET = EfficientNetNames(
    name="timm",
    stem=("conv_stem", "bn1"),
    last=("conv_head", "bn2"),
    head="classifier",
    expanding=BlockNames(
        expand=("conv_pw", "bn1"), depthwise=("conv_dw", "bn2"), project=("conv_pwl", "bn3"), squeeze=_TIMM_SQUEEZE
    ),
    plain=BlockNames(expand=None, depthwise=("conv_dw", "bn1"), project=("conv_pw", "bn2"), squeeze=_TIMM_SQUEEZE),
    find=_find_staged,
    number=lambda config: _staged(config.depths),
    lite_mean=HALF,  # timm rounds what Lite was trained with
    lite_std=HALF,
)

_PROJECT, _SQUEEZE = ("_project_conv", "_bn2"), ("_se_reduce", "_se_expand")
EFFICIENTNET_PYTORCH = EfficientNetNames(
    name="efficientnet-pytorch",
    stem=("_conv_stem", "_bn0"),
    last=("_conv_head", "_bn1"),
    head="_fc",
    expanding=BlockNames(
        expand=("_expand_conv", "_bn0"), depthwise=("_depthwise_conv", "_bn1"), project=_PROJECT, squeeze=_SQUEEZE
    ),
    plain=BlockNames(expand=None, depthwise=("_depthwise_conv", "_bn1"), project=_PROJECT, squeeze=_SQUEEZE),
    find=_find_flat,
    number=_flat,
    lite_mean=(127 / 255,),
    lite_std=(128 / 255,),
)
