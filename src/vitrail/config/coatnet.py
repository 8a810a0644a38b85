"""CoAtNets: their settings and published sizes."""

from dataclasses import dataclass
from typing import Literal

from vitrail.config.checks import require_least, require_rate, require_size
from vitrail.config.vit import Gelu
from vitrail.errors import UserError

Downsample = Literal["max", "avg"]
StrideIn = Literal["expand", "depthwise"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CoAtNetConfig:
    """CoAtNet (Dai et al., 2021, arXiv 2106.04803, tables 3, 11 and 12; appendix A.1)."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the tables of relative positions are made for; any other size still works."""
    channels: int = 3
    """Channels of a picture: 3 for RGB, 1 for grey."""
    num_classes: int = 1000
    """Outputs of the head; 0 leaves the head out."""
    widths: tuple[int, int, int, int, int] = (64, 96, 192, 384, 768)
    """Widths of the stages S0 to S4 (D in the paper): stem, two of MBConv blocks, two of attention blocks."""
    depths: tuple[int, int, int, int] = (2, 3, 5, 2)
    """Blocks in the stages S1 to S4 (L in the paper)."""
    mbconv_before_s3: tuple[int, int] = (0, 0)
    """Number and width of MBConv blocks with which S3 begins, before its attention blocks (CoAtNet-6 and 7)."""
    head_dim: int = 32
    """Width of an attention head."""
    downsample: Downsample = "max"
    """Pooling in shortcuts and before attention where a stage begins: max in the paper, avg in timm."""
    stride_in: StrideIn = "expand"
    """Convolution of an MBConv block that steps by two: the first, 1x1, in the paper; the depthwise one in timm."""
    gelu: Gelu = "tanh"
    """Flavour of GELU: tanh in the authors' code (google-research/maxvit), erf in timm."""
    batch_norm_eps: float = 1e-3
    """Epsilon of BatchNorm, in stem and MBConv blocks: 1e-3 in the authors' code, 1e-5 in timm."""
    norm_eps: float = 1e-5
    """Epsilon of LayerNorm, in attention blocks and head: 1e-5 in the authors' code, 1e-6 in timm."""
    dropout: float = 0.0
    """Dropout after attention and in the feed-forward networks."""
    drop_path: float = 0.0
    """Stochastic depth at the last block; grows linearly from 0 at the first."""
    head_bias: float = 0.0
    """Initial bias of the head: 0 for softmax, about -log(classes) for a sigmoid loss."""

    def __post_init__(self) -> None:
        require_size(self, "image_size")
        require_rate(self, "dropout", "drop_path")
        require_least(self, channels=1, num_classes=0, widths=1, depths=1, mbconv_before_s3=0, head_dim=1)
        if (self.mbconv_before_s3[0] > 0) != (self.mbconv_before_s3[1] > 0):
            raise UserError(
                f"mbconv_before_s3 must be a number of blocks and their width, or 0 and 0, not {self.mbconv_before_s3}."
            )
        for width in self.widths[3:]:
            if width % self.head_dim:
                raise UserError(f"width {width} of an attention stage is not a multiple of head_dim {self.head_dim}.")

    @property
    def grids(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the maps of S3 and S4 at `image_size`: a 16th and a 32nd, rounded up."""
        height, width = self.image_size
        return (-(-height // 16), -(-width // 16)), (-(-height // 32), -(-width // 32))


# Size: D of S0 to S4, L of S1 to S4, head size (tables 3, 11 and 12). CoAtNet-6 is printed with D = 2048 in S4, which
# gives 1348 M parameters; 3072 gives the published 1470 M and fits the published FLOPs.
COATNET_SIZES: dict[str, tuple[tuple[int, int, int, int, int], tuple[int, int, int, int], int]] = {
    "0": ((64, 96, 192, 384, 768), (2, 3, 5, 2), 32),
    "1": ((64, 96, 192, 384, 768), (2, 6, 14, 2), 32),
    "2": ((128, 128, 256, 512, 1024), (2, 6, 14, 2), 32),
    "3": ((192, 192, 384, 768, 1536), (2, 6, 14, 2), 32),
    "4": ((192, 192, 384, 768, 1536), (2, 12, 28, 2), 32),
    "5": ((192, 256, 512, 1280, 2048), (2, 12, 28, 2), 64),
    "6": ((192, 192, 384, 1536, 3072), (2, 4, 42, 2), 128),
    "7": ((192, 256, 512, 2048, 3072), (2, 4, 42, 2), 128),
}
# L and D of the MBConv blocks at the head of S3 (table 12).
MBCONV_BEFORE_S3: dict[str, tuple[int, int]] = {"6": (8, 768), "7": (8, 1024)}

COATNETS: dict[str, CoAtNetConfig] = {
    f"coatnet-{size}": CoAtNetConfig(
        widths=widths, depths=depths, head_dim=head_dim, mbconv_before_s3=MBCONV_BEFORE_S3.get(size, (0, 0))
    )
    for size, (widths, depths, head_dim) in COATNET_SIZES.items()
}
