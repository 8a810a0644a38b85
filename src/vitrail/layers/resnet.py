"""The ResNet that a hybrid Vision Transformer takes its patches from (ViT paper, sections 3.1 and 4.1).

vision_transformer's `models_resnet.py`, which is BiT's (Kolesnikov et al., 2020, arXiv 1912.11370) with the activation
after the sum: GroupNorm in place of BatchNorm, standardised convolutions, TensorFlow's SAME padding.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.layers.conv import SameConv2d, pad_same
from vitrail.layers.initial import lecun_normal

GROUPS = 32
"""Groups of every GroupNorm; each number of channels is a multiple of it."""
EXPANSION = 4
"""Channels that leave a bottleneck, as a multiple of its width."""


class StdConv2d(SameConv2d):
    """Convolution whose filters are brought to mean 0 and deviation 1 (Qiao et al., 2019, arXiv 1903.10520)."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, bias=False)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out height width"]:
        rows, columns = self.kernel_size
        x = pad_same(input, (rows, columns), (self.stride[0], self.stride[1]))
        return F.conv2d(x, self.standardised(), stride=self.stride)

    def standardised(self) -> Float[Tensor, "out c k k"]:
        """Return the filters that are applied, in the weights' own precision."""
        weight = self.weight.float()
        # Epsilon is added to the deviation, not to the variance, as the official code does.
        std, mean = torch.std_mean(weight, dim=(1, 2, 3), correction=0, keepdim=True)
        return ((weight - mean) / (std + 1e-5)).to(self.weight.dtype)


class Bottleneck(nn.Module):
    """Residual unit: 1 x 1, 3 x 3 with the stride, 1 x 1, each followed by GroupNorm; activation after the sum."""

    def __init__(self, channels: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1 = StdConv2d(channels, width, 1)
        self.norm1 = _group_norm(width)
        self.conv2 = StdConv2d(width, width, 3, stride=stride)
        self.norm2 = _group_norm(width)
        self.conv3 = StdConv2d(width, out, 1)
        self.norm3 = _group_norm(out)
        changes = stride != 1 or channels != out
        self.conv_proj = StdConv2d(channels, out, 1, stride=stride) if changes else None
        self.norm_proj = _group_norm(out) if changes else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out height width"]:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.conv_proj is not None and self.norm_proj is not None:
            x = self.norm_proj(self.conv_proj(x))
        return F.relu(x + y)


class ResNet(nn.Module):
    """Root and stages of bottlenecks. With no stages, the root alone: a convolution and a pool.

    Args:
        channels: Of the picture.
        width: Channels of the root; bottlenecks are as wide in the first stage and twice as wide in each one after.
        blocks: Bottlenecks of each stage; all stages but the first halve rows and columns.
    """

    def __init__(self, channels: int, width: int, blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv = StdConv2d(channels, width, 7, stride=2)
        self.norm = _group_norm(width)
        self.stages = nn.ModuleList()
        entering = width
        for stage, units in enumerate(blocks):
            inner = width * 2**stage
            self.stages.append(
                nn.Sequential(
                    Bottleneck(entering, inner, stride=1 if stage == 0 else 2),
                    *(Bottleneck(EXPANSION * inner, inner) for _ in range(units - 1)),
                )
            )
            entering = EXPANSION * inner

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        # convolutions are faster where channels lie last
        x = F.relu(self.norm(self.conv(images.contiguous(memory_format=torch.channels_last))))
        x = F.max_pool2d(pad_same(x, (3, 3), (2, 2), value=float("-inf")), 3, stride=2)
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the official code does: kernels LeCun normal, scales 1, biases 0.

        The last scale of a bottleneck is 0, so that it begins as the identity.
        """
        for module in self.modules():
            if isinstance(module, StdConv2d):
                lecun_normal(module)
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.norm3.weight)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)
