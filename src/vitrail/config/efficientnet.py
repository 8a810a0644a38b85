"""EfficientNet and EfficientNet-Lite: their settings and published sizes."""

import math
from dataclasses import dataclass

from vitrail.config.checks import require_least, require_rate, require_size
from vitrail.errors import UserError

# The seven stages of EfficientNet-B0 (table 1 of the paper). A size scales widths and depths; the rest stays.
WIDTHS = (16, 24, 40, 80, 112, 192, 320)
DEPTHS = (1, 2, 2, 3, 3, 4, 1)
KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
STEM_WIDTH, HEAD_WIDTH = 32, 1280


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficientNetConfig:
    """EfficientNet (Tan and Le, 2019, arXiv 1905.11946, table 1) and EfficientNet-Lite (tensorflow/tpu)."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the size was published at; any other size still works."""
    channels: int = 3
    """Channels of a picture: 3 for RGB, 1 for grey."""
    num_classes: int = 1000
    """Outputs of the head; 0 leaves the head out."""
    stem_width: int = STEM_WIDTH
    """Channels after the first convolution."""
    widths: tuple[int, ...] = WIDTHS
    """Channels after each of the seven stages."""
    depths: tuple[int, ...] = DEPTHS
    """Blocks of each of the seven stages."""
    head_width: int = HEAD_WIDTH
    """Channels of the last convolution: the width of the features."""
    lite: bool = False
    """EfficientNet-Lite: no squeeze-and-excitation, and ReLU6 for swish."""
    dropout: float = 0.2
    """Dropout before the head. It belongs to a size as its width does: 0.2 for B0 up to 0.5 for L2."""
    drop_path: float = 0.2
    """Stochastic depth: block i of n is dropped with i / n of this rate. 0.2 is the official code's for all sizes."""
    frozen_norm: bool = False
    """Normalise by the running statistics while training too, and keep them, as fine-tuning with SAM does."""
    head_bias: float = 0.0
    """Initial bias of the head: 0 for softmax, about -log(classes) for a sigmoid loss."""

    def __post_init__(self) -> None:
        require_size(self, "image_size")
        require_rate(self, "dropout", "drop_path")
        require_least(self, channels=1, num_classes=0, stem_width=1, widths=1, depths=1, head_width=1)
        for name in ("widths", "depths"):
            if len(getattr(self, name)) != len(WIDTHS):
                raise UserError(f"{name} must hold {len(WIDTHS)} numbers, one per stage, not {getattr(self, name)}.")


# Size: (width factor, depth factor, picture side, dropout). tensorflow/tpu, models/official/efficientnet:
# efficientnet_builder.py (B0-B8, L2) and lite/efficientnet_lite_builder.py.
EFFICIENTNET_SIZES: dict[str, tuple[float, float, int, float]] = {
    "b0": (1.0, 1.0, 224, 0.2),
    "b1": (1.0, 1.1, 240, 0.2),
    "b2": (1.1, 1.2, 260, 0.3),
    "b3": (1.2, 1.4, 300, 0.3),
    "b4": (1.4, 1.8, 380, 0.4),
    "b5": (1.6, 2.2, 456, 0.4),
    "b6": (1.8, 2.6, 528, 0.5),
    "b7": (2.0, 3.1, 600, 0.5),
    "b8": (2.2, 3.6, 672, 0.5),
    "l2": (4.3, 5.3, 800, 0.5),  # Noisy Student (arXiv 1911.04252); also published at 475
    "lite0": (1.0, 1.0, 224, 0.2),
    "lite1": (1.0, 1.1, 240, 0.2),
    "lite2": (1.1, 1.2, 260, 0.3),
    "lite3": (1.2, 1.4, 280, 0.3),
    "lite4": (1.4, 1.8, 300, 0.3),
}


def round_width(width: int, factor: float) -> int:
    """Return the multiple of 8 nearest to `factor * width`, not more than a tenth below it (`round_filters`)."""
    wanted = factor * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def efficientnet_config(
    width: float, depth: float, image_size: int = 224, dropout: float = 0.2, *, lite: bool = False
) -> EfficientNetConfig:
    """Return B0 scaled by a factor for all widths and one for all depths (compound scaling, section 3.3).

    Lite leaves the stem, the last convolution and the depths of the first and last stage as they are, and does
    without squeeze-and-excitation.
    """
    depths = tuple(math.ceil(depth * blocks) for blocks in DEPTHS)
    return EfficientNetConfig(
        image_size=(image_size, image_size),
        stem_width=STEM_WIDTH if lite else round_width(STEM_WIDTH, width),
        widths=tuple(round_width(channels, width) for channels in WIDTHS),
        depths=(DEPTHS[0], *depths[1:-1], DEPTHS[-1]) if lite else depths,
        head_width=HEAD_WIDTH if lite else round_width(HEAD_WIDTH, width),
        lite=lite,
        dropout=dropout,
    )


EFFICIENTNETS: dict[str, EfficientNetConfig] = {
    f"efficientnet-{size}": efficientnet_config(*row, lite=size.startswith("lite"))
    for size, row in EFFICIENTNET_SIZES.items()
}
