"""Wide-ResNet: its settings and published sizes."""

from dataclasses import dataclass

from vitrail.config.checks import require_least, require_rate, require_size
from vitrail.errors import UserError

STEM_WIDTH = 16
WIDTHS = (16, 32, 64)
"""Channels of the three stages, groups conv2 to conv4 of the paper's table 1; a size multiplies them by k."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WideResNetConfig:
    """Wide-ResNet for small pictures (Zagoruyko and Komodakis, 2016, arXiv 1605.07146, table 1)."""

    image_size: tuple[int, int] = (32, 32)
    """Height and width in pixels that the size was published at; any other size still works."""
    channels: int = 3
    """Channels of a picture: 3 for RGB, 1 for grey."""
    num_classes: int = 10
    """Outputs of the head; 0 leaves the head out."""
    stem_width: int = STEM_WIDTH
    """Channels after the first convolution."""
    widths: tuple[int, ...] = WIDTHS
    """Channels of each stage; from the second on, a stage halves the picture's sides."""
    depths: tuple[int, ...] = (4, 4, 4)
    """Blocks of each stage: (d - 4) / 6 in WRN-d-k."""
    slope: float = 0.0
    """What the activation multiplies negative values with: 0 is ReLU; Meta Pseudo Labels has 0.2 (leaky ReLU)."""
    norm_eps: float = 1e-5
    """Added to the variance by BatchNorm."""
    norm_momentum: float = 0.1
    """Share of a batch in BatchNorm's running statistics: 1 minus TensorFlow's and JAX's decay."""
    dropout: float = 0.0
    """Dropout before the head."""
    drop_path: float = 0.0
    """Stochastic depth: rate of the last block, rising linearly from 0 at the first."""
    head_bias: float = 0.0
    """Initial bias of the head: 0 for softmax, about -log(classes) for a sigmoid loss."""

    def __post_init__(self) -> None:
        require_size(self, "image_size")
        require_rate(self, "slope", "norm_eps", "dropout", "drop_path")
        require_least(self, channels=1, num_classes=0, stem_width=1, widths=1, depths=1)
        if not 0 < self.norm_momentum <= 1:
            raise UserError(f"norm_momentum must lie in (0, 1], not {self.norm_momentum}.")
        if not self.widths or len(self.widths) != len(self.depths):
            raise UserError(f"widths {self.widths} and depths {self.depths} must hold one number per stage.")


def wide_resnet_config(
    depth: int,
    factor: int,
    *,
    slope: float = 0.0,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    dropout: float = 0.0,
) -> WideResNetConfig:
    """Return WRN-`depth`-`factor`: (depth - 4) / 6 blocks per stage, `factor` times as wide as a ResNet for CIFAR."""
    return WideResNetConfig(
        widths=tuple(width * factor for width in WIDTHS),
        depths=((depth - 4) // 6,) * len(WIDTHS),
        slope=slope,
        norm_eps=norm_eps,
        norm_momentum=norm_momentum,
        dropout=dropout,
    )


WIDE_RESNETS: dict[str, WideResNetConfig] = {
    # The student of Meta Pseudo Labels (google-research/meta_pseudo_labels, modeling.py and modeling_utils.py; dropout
    # of its CIFAR-10 command), as in the other work on few labels.
    "wide-resnet-28-2": wide_resnet_config(28, 2, slope=0.2, norm_eps=1e-3, norm_momentum=0.01, dropout=0.2),
    "wide-resnet-28-10": wide_resnet_config(28, 10),  # table 4 of the paper; SAM trains it (its table 1)
}
