"""Wide-ResNet: "Wide Residual Networks" (Zagoruyko and Komodakis, 2016, arXiv 1605.07146).

Table 1 of the paper, read from top to bottom, is `WideResNet.feature_map`: a 3x3 convolution, and three stages of
blocks (figure 1c) at full, half and quarter size; then mean over the picture and a linear head. BatchNorm and
activation come before every convolution, and once more before the mean.

Padding is TensorFlow's SAME (`SameConv2d`), as in the code of SAM and of Meta Pseudo Labels, whose recipes run here;
the paper's own Torch code pads an even picture on both sides at stride 2. There is no table of foreign names: people
share no weights of this family under settled ones.
"""

from itertools import pairwise
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config.wide_resnet import WideResNetConfig
from vitrail.layers.conv import SameConv2d
from vitrail.layers.initial import convolutions_as_in_tensorflow, head_as_in_tensorflow
from vitrail.layers.residual import DropPath
from vitrail.models.base import ImageModel


class NormAct(nn.Module):
    """BatchNorm and (leaky) ReLU: what the paper puts before a convolution."""

    def __init__(self, channels: int, config: WideResNetConfig) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=config.norm_eps, momentum=config.norm_momentum)
        self.act = nn.LeakyReLU(config.slope) if config.slope else nn.ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.act(self.norm(x))


class WideBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, the paper's B(3,3).

    Where the width changes, the shortcut is a 1x1 convolution of what the first convolution reads, after its norm and
    activation (the authors' `wide-resnet.lua`, Meta Pseudo Labels' `wrn_block`); elsewhere it is the block's input.
    """

    def __init__(self, channels: int, out: int, stride: int, drop_path: float, config: WideResNetConfig) -> None:
        super().__init__()
        self.pre1 = NormAct(channels, config)
        self.conv1 = SameConv2d(channels, out, 3, stride=stride, bias=False)
        self.pre2 = NormAct(out, config)
        self.conv2 = SameConv2d(out, out, 3, bias=False)
        changes = stride != 1 or channels != out
        self.shortcut = SameConv2d(channels, out, 1, stride=stride, bias=False) if changes else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out rows columns"]:
        y = self.pre1(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.pre2(self.conv1(y)))
        return shortcut + self.drop_path(y)


@final
class WideResNet(ImageModel[WideResNetConfig]):
    """Wide-ResNet of any width and depth, for pictures of any size."""

    input_kernel = "stem.weight"

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        self.stem = SameConv2d(config.channels, config.stem_width, 3, bias=False)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in _stages(config))
        self.last = NormAct(config.widths[-1], config)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.widths[-1], config.num_classes) if config.num_classes else None

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        features = self.features(images)
        return features if self.head is None else self.head(self.dropout(features))

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.feature_map(images).mean(dim=(2, 3))

    def feature_map(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        # convolutions are a sixth faster where channels lie last
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        return self.last(x)

    def blocks(self) -> list[WideBlock]:
        return [cast(WideBlock, block) for stage in self.stages for block in stage.children()]

    def depth_of(self, name: str) -> int:
        root, *rest = name.split(".")
        if root == "stages":
            return sum(self.config.depths[: int(rest[0])]) + int(rest[1]) + 1
        return 0 if root == "stem" else sum(self.config.depths) + 1

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as SAM's and Meta Pseudo Labels' code do (`conv_kernel_init_fn`, `_conv_kernel_initializer`).

        | parameter | value |
        |---|---|
        | convolutions | N(0, sqrt(2 / fan-out)) |
        | BatchNorm | scale 1, shift 0, running mean 0 and variance 1 |
        | head | uniform within 1 / sqrt(classes); bias `head_bias` |
        """
        convolutions_as_in_tensorflow(self)
        if self.head is not None:
            head_as_in_tensorflow(self.head, self.config.head_bias)


def _stages(config: WideResNetConfig) -> list[list[WideBlock]]:
    """Return the blocks of each stage; the first of a stage changes the width and, from the second stage on, halves."""
    rates = iter(torch.linspace(0.0, config.drop_path, sum(config.depths), device="cpu").tolist())
    stages = list[list[WideBlock]]()
    for stage, (channels, out) in enumerate(pairwise((config.stem_width, *config.widths))):
        first = WideBlock(channels, out, 2 if stage else 1, next(rates), config)
        stages.append([first, *(WideBlock(out, out, 1, next(rates), config) for _ in range(config.depths[stage] - 1))])
    return stages
