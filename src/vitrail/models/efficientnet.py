"""EfficientNet: "Rethinking Model Scaling for Convolutional Neural Networks" (Tan and Le, 2019, arXiv 1905.11946).

Table 1 of the paper, read from top to bottom, is `EfficientNet.feature_map`: a stem, seven stages of inverted
bottlenecks (MBConv), a 1x1 convolution; then mean over the picture and a linear head. EfficientNet-Lite is the same
without squeeze-and-excitation and with ReLU6.

As TensorFlow has it: SAME padding (`SameConv2d`), BatchNorm with epsilon 1e-3 and decay 0.99, convolutions without
bias. Weights trained so do not work with symmetric padding, nor the other way round.
"""

from itertools import pairwise
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config.efficientnet import EXPANSIONS, KERNELS, STRIDES, EfficientNetConfig
from vitrail.layers.conv import SameConv2d, SqueezeExcite
from vitrail.layers.initial import convolutions_as_in_tensorflow, head_as_in_tensorflow
from vitrail.layers.residual import DropPath
from vitrail.models.base import ImageModel

NORM_EPS = 1e-3
NORM_MOMENTUM = 0.01
"""What a batch adds to the running statistics: 1 minus TensorFlow's momentum."""


SQUEEZE = 4
"""How many times narrower squeeze-and-excitation is than what enters the block."""


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and, where one is given, an activation."""

    def __init__(
        self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv = SameConv2d(channels, out, kernel, stride=stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=NORM_EPS, momentum=NORM_MOMENTUM)
        self.act = act

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out rows columns"]:
        x = self.norm(self.conv(x))
        return x if self.act is None else self.act(x)


class MBConv(nn.Module):
    """Inverted bottleneck (MobileNetV2, arXiv 1801.04381, figure 4d) with squeeze-and-excitation."""

    def __init__(
        self, channels: int, out: int, kernel: int, stride: int, expansion: int, *, lite: bool, drop_path: float
    ) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = ConvNorm(channels, inner, 1, act=_activation(lite)) if expansion != 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride=stride, groups=inner, act=_activation(lite))
        self.squeeze = None if lite else SqueezeExcite(inner, max(1, channels // SQUEEZE), _activation(lite))
        self.project = ConvNorm(inner, out, 1)
        self.drop_path = DropPath(drop_path)
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out rows columns"]:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.squeeze is None else self.squeeze(y)
        y = self.project(y)
        return x + self.drop_path(y) if self.shortcut else y


@final
class EfficientNet(ImageModel[EfficientNetConfig]):
    """EfficientNet or EfficientNet-Lite of any width, depth and picture size."""

    input_kernel = "stem.conv.weight"

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__(config)
        self.stem = ConvNorm(config.channels, config.stem_width, 3, stride=2, act=_activation(config.lite))
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in _stages(config))
        self.last = ConvNorm(config.widths[-1], config.head_width, 1, act=_activation(config.lite))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.head_width, config.num_classes) if config.num_classes else None
        self.train()  # a new module is in training mode without being told; `frozen_norm` wants to hear of it

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        features = self.features(images)
        return features if self.head is None else self.head(self.dropout(features))

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.feature_map(images).mean(dim=(2, 3))

    def feature_map(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        # depthwise convolutions are a third faster where channels lie last
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        return self.last(x)

    def train(self, mode: bool = True) -> "EfficientNet":
        """Set the mode of all layers; with `frozen_norm`, BatchNorm stays in evaluation mode.

        It then normalises by the running statistics and keeps them, while its scales and shifts still learn: how SAM's
        authors fine-tune EfficientNet (arXiv 2010.01412, appendix C.2).
        """
        super().train(mode)
        if self.config.frozen_norm:
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        return self

    def blocks(self) -> list[MBConv]:
        return [cast(MBConv, block) for stage in self.stages for block in stage.children()]

    def depth_of(self, name: str) -> int:
        root, *rest = name.split(".")
        if root == "stages":
            return sum(self.config.depths[: int(rest[0])]) + int(rest[1]) + 1
        return 0 if root == "stem" else sum(self.config.depths) + 1

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the official code does (tensorflow/tpu `efficientnet_model.py`).

        | parameter | value |
        |---|---|
        | convolutions | N(0, sqrt(2 / fan-out)), the fan-out of a depthwise kernel being its area; biases 0 |
        | BatchNorm | scale 1, shift 0, running mean 0 and variance 1 |
        | head | uniform within 1 / sqrt(classes); bias `head_bias` |
        """
        convolutions_as_in_tensorflow(self)
        if self.head is not None:
            head_as_in_tensorflow(self.head, self.config.head_bias)


def _stages(config: EfficientNetConfig) -> list[list[MBConv]]:
    """Return the blocks of each stage; the first of a stage changes width and stride, the others repeat it."""
    rows = zip(pairwise((config.stem_width, *config.widths)), config.depths, KERNELS, STRIDES, EXPANSIONS, strict=True)
    total, stages, before = sum(config.depths), list[list[MBConv]](), 0
    for (channels, out), depth, kernel, stride, expansion in rows:
        rates = [config.drop_path * (before + i) / total for i in range(depth)]
        first = MBConv(channels, out, kernel, stride, expansion, lite=config.lite, drop_path=rates[0])
        rest = [MBConv(out, out, kernel, 1, expansion, lite=config.lite, drop_path=rate) for rate in rates[1:]]
        stages.append([first, *rest])
        before += depth
    return stages


def _activation(lite: bool) -> nn.Module:
    """Return swish, x * sigmoid(x); for Lite ReLU cut off at 6, which quantises well."""
    return nn.ReLU6() if lite else nn.SiLU()
