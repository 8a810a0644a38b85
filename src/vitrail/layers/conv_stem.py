"""The convolutions that a small hybrid takes its patches from: for pictures of 32 to 96 pixels and short trainings.

A Vision Transformer has to learn that neighbouring pixels belong together; a convolution knows (ViT paper, section 4.3;
"Early Convolutions Help Transformers See Better", Xiao et al., 2021, arXiv 2106.14881). The first layer is not learned
but calculated: filters that whiten the picture's 2 x 2 pixels ("94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
Jordan, 2024, arXiv 2404.00498, section 3.1).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.layers.initial import lecun_normal

PATCH = 2
"""Side of the pixels that are whitened together."""
WHITENING_EPS = 5e-4
"""Added to the variance along each direction, so that the weakest, which are noise, are not blown up."""


class ConvStage(nn.Module):
    """Convolution to more channels and max-pool to half the rows and columns, then one more convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out rows columns"]:
        x = F.silu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.silu(self.norm2(self.conv2(x)))


class ConvolutionalStem(nn.Module):
    """Whitening filters and stages of convolutions, each at half the resolution of the one before.

    Args:
        channels: Of the picture.
        filters: Of the whitening convolution; every second is the negative of another.
        widths: Channels of each stage.
    """

    whitening: Tensor

    def __init__(self, channels: int, filters: int, widths: Sequence[int]) -> None:
        super().__init__()
        # A buffer: no optimizer moves it, and it travels with the weights.
        self.register_buffer("whitening", torch.empty(filters, channels, PATCH, PATCH))
        entering = (filters, *widths[:-1])
        self.stages = nn.ModuleList(ConvStage(*pair) for pair in zip(entering, widths, strict=True))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        # oneDNN and cuDNN are fastest with channels last; what follows keeps the order it is given.
        x = images.contiguous(memory_format=torch.channels_last)
        x = F.silu(F.conv2d(x, self.whitening.to(x.dtype)))
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.no_grad()
    def whiten(self, images: Float[Tensor, "b c h w"]) -> None:
        """Set the filters by pictures: the eigenvectors of their 2 x 2 pixels, scaled to variance 1, and the negatives.

        Where pictures have fewer directions than there are filters for, as grey ones may, the others stay as they were.
        """
        channels = self.whitening.shape[1]
        pixels = F.unfold(images.float(), PATCH).transpose(1, 2).reshape(-1, channels * PATCH * PATCH)
        variances, directions = torch.linalg.eigh(pixels.T @ pixels / len(pixels))  # from weak to strong
        filters = (directions / (variances + WHITENING_EPS).sqrt()).T.flip(0).unflatten(1, (channels, PATCH, PATCH))
        half = len(self.whitening) // 2
        filters = filters[:half]
        self.whitening[: len(filters)] = filters
        self.whitening[half : half + len(filters)] = -filters

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise for training: kernels LeCun normal, those of the whitening in pairs of opposite sign."""
        half = len(self.whitening) // 2
        nn.init.normal_(self.whitening, std=self.whitening[0].numel() ** -0.5)
        self.whitening[half:] = -self.whitening[:half]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                lecun_normal(module)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
