"""Vision Transformers: their settings and published sizes."""

import re
from dataclasses import dataclass, replace
from typing import Literal

from vitrail.config.checks import require_least, require_rate, require_size
from vitrail.errors import UserError

Pool = Literal["token", "gap", "gap+max", "map"]
Positions = Literal["learned", "learned-patches", "sincos"]
Gelu = Literal["tanh", "erf", "quick"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetStem:
    """ResNet whose features are a hybrid's patches (ViT paper, section 3.1; vision_transformer `models_resnet.py`)."""

    blocks: tuple[int, ...] = ()
    """Bottlenecks in each stage; none leaves the root alone, a convolution and a pool."""
    width: int = 64
    """Channels of the root; the stages give 4, 8, 16, ... times as many."""

    def __post_init__(self) -> None:
        require_least(self, blocks=1, width=32)
        if self.width % 32:
            raise UserError(f"width of the stem must be a multiple of the 32 groups of its norms, not {self.width}.")

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return 4 * self.width * 2 ** (len(self.blocks) - 1) if self.blocks else self.width

    @property
    def stride(self) -> int:
        """Pixels from one feature to the next."""
        return 4 * 2 ** max(len(self.blocks) - 1, 0)

    def features(self, side: int) -> int:
        """Return how many features stand along a picture's side: rounded up, as the convolutions pad."""
        return -(-side // self.stride)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvStem:
    """Convolutions whose features are a small hybrid's patches (`layers/conv_stem.py`)."""

    filters: int = 24
    """Filters that whiten the picture's 2 x 2 pixels, calculated and not learned: two for each of 3 x 2 x 2 values."""
    widths: tuple[int, ...] = (96, 128)
    """Channels of the stages; each has half the rows and columns of the one before."""

    def __post_init__(self) -> None:
        require_least(self, filters=2, widths=1)
        if self.filters % 2 or not self.widths:
            raise UserError("a convolutional stem has an even number of filters and at least one stage.")

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        """Pixels from one feature to the next."""
        return 2 ** len(self.widths)

    def features(self, side: int) -> int:
        """Return how many features stand along a picture's side: rounded down, after the 2 x 2 filters took a pixel."""
        return (side - 1) // self.stride


Stem = ResNetStem | ConvStem


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int], stem: Stem | None) -> tuple[int, int]:
    """Return rows and columns of patches: cut from the picture's pixels, or from a stem's features, rounded down."""
    rows, columns = (
        (side if stem is None else stem.features(side)) // patch
        for side, patch in zip(image_size, patch_size, strict=True)
    )
    return rows, columns


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Vision Transformer (Dosovitskiy et al., 2021, arXiv 2010.11929, section 3.1; big_vision's variants)."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels that the position table is made for; any other size still works."""
    patch_size: tuple[int, int] = (16, 16)
    """Height and width of a patch: in pixels, or in features of the stem."""
    stem: Stem | None = None
    """Convolutions that read the picture first, of hybrids; None cuts patches from the picture itself."""
    channels: int = 3
    """Channels of a picture: 3 for RGB, 1 for grey."""
    num_classes: int = 1000
    """Outputs of the head; 0 leaves the head out."""
    width: int = 768
    """Width of a token (D in the paper)."""
    depth: int = 12
    """Number of Transformer blocks (L in the paper)."""
    mlp_dim: int = 3072
    """Hidden width of a block's feed-forward network."""
    heads: int = 12
    """Attention heads."""
    pool: Pool = "token"
    """How tokens become one vector: class token, mean of patches, mean beside maximum, or attention pooling (MAP)."""
    positions: Positions = "learned"
    """Learned table with a row for the class token, learned table of patches only, or fixed 2-D sin-cos."""
    pre_logits: int = 0
    """Width of the tanh layer before the head (the paper's pre-training head); 0 leaves it out."""
    qkv_bias: bool = True
    """Whether query, key and value have biases; only the ImageNet-21K-P weights do without."""
    gelu: Gelu = "tanh"
    """Flavour of GELU: tanh in the JAX code, erf in timm and Hugging Face."""
    norm_eps: float = 1e-6
    """Epsilon of LayerNorm."""
    dropout: float = 0.0
    """Dropout after the positions and in the feed-forward networks."""
    drop_path: float = 0.0
    """Stochastic depth at the last block; grows linearly from 0 at the first."""
    head_bias: float = 0.0
    """Initial bias of the head: 0 for softmax, about -log(classes) for a sigmoid loss."""
    merge_tokens: int = 0
    """Tokens that each block merges into others like them (ToMe): faster, less accurate. It changes no weight."""

    def __post_init__(self) -> None:
        require_size(self, "image_size", "patch_size")
        require_rate(self, "dropout", "drop_path")
        require_least(self, channels=1, width=1, depth=1, mlp_dim=1, heads=1, num_classes=0, merge_tokens=0)
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not a multiple of heads {self.heads}; change one of them.")
        if self.positions == "sincos" and self.width % 4:
            raise UserError(f"sin-cos positions need a width that is a multiple of 4, not {self.width}.")
        if self.positions == "learned" and self.pool != "token":
            # Official tables of models without a class token hold patches only.
            object.__setattr__(self, "positions", "learned-patches")
        if min(self.grid) < 1:
            raise UserError(f"image_size {self.image_size} is smaller than one patch, {self.cell} pixels.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        return self.grid_at(self.image_size)

    @property
    def pooled_width(self) -> int:
        """Width of the vector that tokens become."""
        return 2 * self.width if self.pool == "gap+max" else self.width

    @property
    def cell(self) -> tuple[int, int]:
        """Height and width in pixels that one patch stands for."""
        stride = 1 if self.stem is None else self.stem.stride
        return self.patch_size[0] * stride, self.patch_size[1] * stride

    def grid_at(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of patches of a picture of any size."""
        return grid_of(image_size, self.patch_size, self.stem)


# Sizes as (width, depth, mlp_dim, heads). Ti, S: DeiT (arXiv 2012.12877); B, L, H: ViT paper, table 1;
# g, G: "Scaling Vision Transformers" (arXiv 2106.04560, table 2).
VIT_SIZES: dict[str, tuple[int, int, int, int]] = {
    "ti": (192, 12, 768, 3),
    "s": (384, 12, 1536, 6),
    "b": (768, 12, 3072, 12),
    "l": (1024, 24, 4096, 16),
    "h": (1280, 32, 5120, 16),
    "giant": (1408, 40, 6144, 16),
    "gigantic": (1664, 48, 8192, 16),
}


# Hybrids as (size, patch on the features, bottlenecks per stage): vision_transformer `configs/models.py`. The R50 in
# front of B/16 has 9 bottlenecks in its third stage and no fourth; R+Ti/16 has patches of 32 pixels, despite its name.
VIT_HYBRIDS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "vit-r-ti16": ("ti", 8, ()),
    "vit-r26-s32": ("s", 1, (2, 2, 2, 2)),
    "vit-r26-b32": ("b", 1, (2, 2, 2, 2)),
    "vit-r50-b16": ("b", 1, (3, 4, 9)),
    "vit-r50-l32": ("l", 1, (3, 4, 6, 3)),
}


def vit_config(size: str, patch: int) -> ViTConfig:
    """Return the published configuration of ViT-`size`/`patch` at 224 px."""
    width, depth, mlp_dim, heads = VIT_SIZES[size]
    config = ViTConfig(width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, patch_size=(patch, patch))
    if size in ("giant", "gigantic"):
        # Section 3.3 of arXiv 2106.04560: attention pooling (MAP) instead of a class token.
        config = replace(config, pool="map", positions="learned-patches")
    return config


def vit_of_any_patch(name: str) -> ViTConfig | None:
    """Return the configuration of `vit-SIZEPATCH` at any patch size (`vit-s7`), None for other names."""
    match = re.fullmatch(rf"vit-({'|'.join(VIT_SIZES)})(\d+)", name)
    return vit_config(match[1], int(match[2])) if match else None


VITS: dict[str, ViTConfig] = {
    **{
        f"vit-{size}{patch}": vit_config(size, patch)
        for size in ["ti", "s", "b", "l", "h"]
        for patch in (8, 14, 16, 32)
    },
    # Semantic softmax weights were trained in timm (exact GELU) without query, key, value biases.
    "vit-b16-21kp": replace(vit_config("b", 16), qkv_bias=False, gelu="erf", num_classes=11221),
    **{
        name: replace(vit_config(size, patch), stem=ResNetStem(blocks=blocks))
        for name, (size, patch, blocks) in VIT_HYBRIDS.items()
    },
    "vit-giant14": vit_config("giant", 14),
    "vit-gigantic14": vit_config("gigantic", 14),
}
"""Every published size under its name."""
