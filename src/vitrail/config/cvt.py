"""Convolutional vision Transformers: their settings and published sizes."""

from dataclasses import dataclass

from vitrail.config.checks import require_least, require_rate, require_size
from vitrail.config.vit import Gelu
from vitrail.errors import UserError

HEAD_DIM = 64
"""Width of an attention head in every published size."""
MLP_RATIO = 4
"""Hidden width of a feed-forward network over the width of a token, in every published size."""
LEAST_SIDE = 3
"""Fewest pixels that the first convolution takes (kernel 7, padding 2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CvTConfig:
    """Convolutional vision Transformer, CvT (Wu et al., 2021, arXiv 2103.15808, table 2); the defaults are CvT-13."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels of the pictures; no weight depends on it."""
    channels: int = 3
    """Channels of a picture: 3 for RGB, 1 for grey."""
    num_classes: int = 1000
    """Outputs of the head; 0 leaves the head out."""
    widths: tuple[int, ...] = (64, 192, 384)
    """Width of a token in each stage."""
    depths: tuple[int, ...] = (1, 2, 10)
    """Blocks of each stage."""
    heads: tuple[int, ...] = (1, 3, 6)
    """Attention heads of each stage."""
    mlp_dims: tuple[int, ...] = (256, 768, 1536)
    """Hidden width of the feed-forward networks of each stage."""
    gelu: Gelu = "quick"
    """Flavour of GELU: quick in the official code, erf in Hugging Face's, which runs the same weights with it."""
    dropout: float = 0.0
    """Dropout after a stage's embedding, after attention and in the feed-forward networks."""
    drop_path: float = 0.0
    """Stochastic depth at the last block; grows linearly from 0 over the last stage, the others have none."""
    head_bias: float = 0.0
    """Initial bias of the head: 0 for softmax, about -log(classes) for a sigmoid loss."""

    def __post_init__(self) -> None:
        require_size(self, "image_size")
        require_rate(self, "dropout", "drop_path")
        require_least(self, channels=1, num_classes=0, widths=1, depths=1, heads=1, mlp_dims=1)
        if min(self.image_size) < LEAST_SIDE:
            raise UserError(f"CvT takes pictures of at least {LEAST_SIDE} pixels a side, not {self.image_size}.")
        if not self.widths:
            raise UserError("widths must hold at least one number, one per stage.")
        for name in ("depths", "heads", "mlp_dims"):
            if len(getattr(self, name)) != len(self.widths):
                raise UserError(f"{name} must hold one number per stage, as widths {self.widths} does.")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise UserError(f"widths: {width} is not a multiple of the {heads} heads of its stage; change one.")


def cvt_config(widths: tuple[int, ...], depths: tuple[int, ...], drop_path: float) -> CvTConfig:
    """Return the configuration of a size, with heads of width 64 and feed-forward networks four times as wide."""
    return CvTConfig(
        widths=widths,
        depths=depths,
        heads=tuple(width // HEAD_DIM for width in widths),
        mlp_dims=tuple(width * MLP_RATIO for width in widths),
        drop_path=drop_path,
    )


# Widths and depths of the three stages, drop path: paper, table 2; microsoft/CvT experiments/imagenet/cvt/*.yaml.
# All were also published at 384 px, W24 only there.
CVTS: dict[str, CvTConfig] = {
    "cvt-13": cvt_config((64, 192, 384), (1, 2, 10), drop_path=0.1),
    "cvt-21": cvt_config((64, 192, 384), (1, 4, 16), drop_path=0.1),
    "cvt-w24": cvt_config((192, 768, 1024), (2, 2, 20), drop_path=0.3),
}
