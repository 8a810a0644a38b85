"""CoAtNet: "Marrying Convolution and Attention for All Data Sizes" (Dai et al., 2021, arXiv 2106.04803).

Table 3 of the paper, read from top to bottom, is `CoAtNet.feature_map`: the stem S0, S1 and S2 of MBConv blocks, S3 and
S4 of blocks with relative attention, each at half the resolution of the one before; then pooling and the head. In
CoAtNet-6 and 7 (table 12) S3 begins with MBConv blocks.

Where paper and tables are silent, the published numbers of parameters decide, then the authors' next model, MaxViT
(google-research/maxvit). Convolutions are padded alike on all sides, as in timm, where TensorFlow pads an odd pixel
at the bottom and the right; no official weights exist that would notice.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config.coatnet import CoAtNetConfig
from vitrail.layers.conv import SqueezeExcite
from vitrail.layers.embedding import PositionResize
from vitrail.layers.feedforward import FeedForward, Gelu
from vitrail.layers.relative_attention import Grid, RelativeAttention, resize_relative
from vitrail.layers.residual import DropPath
from vitrail.models.base import ImageModel


class Stem(nn.Module):
    """S0: two 3x3 convolutions, the first at stride 2."""

    def __init__(self, config: CoAtNetConfig) -> None:
        super().__init__()
        width = config.widths[0]
        self.conv1 = nn.Conv2d(config.channels, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width, eps=config.batch_norm_eps)
        self.act = Gelu(config.gelu)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        return self.conv2(self.act(self.norm(self.conv1(images))))


class Shortcut(nn.Module):
    """Proj(Pool(x)) beside a block (appendix A.1), as far as resolution and width change."""

    def __init__(self, channels: int, width: int, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool
        self.project = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        return self.project(self.pool(x))


class MBConv(nn.Module):
    """Inverted bottleneck in pre-activation form: Proj(Pool(x)) + Conv(SE(DepthConv(Conv(Norm(x))))) (appendix A.1).

    Four times as wide inside as at its end. Squeeze-and-excitation goes down to a quarter of the block's width.
    """

    def __init__(self, channels: int, width: int, stride: int, config: CoAtNetConfig, drop_path: float) -> None:
        super().__init__()
        inner, eps = 4 * width, config.batch_norm_eps
        strides = (stride, 1) if config.stride_in == "expand" else (1, stride)
        self.shortcut = Shortcut(channels, width, _pool(stride, config))
        self.norm = nn.BatchNorm2d(channels, eps=eps)
        self.expand = nn.Conv2d(channels, inner, 1, stride=strides[0], bias=False)
        self.expand_norm = nn.BatchNorm2d(inner, eps=eps)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride=strides[1], padding=1, groups=inner, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner, eps=eps)
        self.squeeze_excite = SqueezeExcite(inner, max(width // 4, 1), nn.SiLU())
        self.project = nn.Conv2d(inner, width, 1)
        self.act = Gelu(config.gelu)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        y = self.act(self.expand_norm(self.expand(self.norm(x))))
        y = self.act(self.depthwise_norm(self.depthwise(y)))
        return self.shortcut(x) + self.drop_path(self.project(self.squeeze_excite(y)))


class RelativeBlock(nn.Module):
    """Proj(Pool(x)) + Attention(Pool(Norm(x))), then x + FFN(Norm(x)) (appendix A.1)."""

    def __init__(
        self, channels: int, width: int, stride: int, grid: Grid, config: CoAtNetConfig, drop_path: float
    ) -> None:
        super().__init__()
        self.shortcut = Shortcut(channels, width, _pool(stride, config))
        self.norm1 = nn.LayerNorm(channels, eps=config.norm_eps)
        self.pool = _pool(stride, config)
        self.attention = RelativeAttention(channels, width, width // config.head_dim, grid)
        self.norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = FeedForward(width, 4 * width, gelu=config.gelu, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        tokens, grid = self.tokens(x)
        x = rearrange(self.shortcut(x), "b d h w -> b (h w) d")
        x = x + self.drop_path(self.dropout(self.attention(tokens, grid)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return rearrange(x, "b (h w) d -> b d h w", h=grid[0])

    def weights(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads n n"]:
        """Return the attention probabilities between the places of the map that the block puts out."""
        return self.attention.weights(*self.tokens(x))

    def tokens(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n c"], Grid]:
        """Return what attention reads, Pool(Norm(x)), with its rows and columns."""
        normed = rearrange(self.norm1(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
        pooled = self.pool(normed)
        return rearrange(pooled, "b c h w -> b (h w) c"), (pooled.shape[2], pooled.shape[3])


@final
class CoAtNet(ImageModel[CoAtNetConfig]):
    """CoAtNet of any size."""

    input_kernel = "stem.conv1.weight"

    def __init__(self, config: CoAtNetConfig) -> None:
        super().__init__(config)
        self.stem = Stem(config)
        self.stages = nn.ModuleList(nn.ModuleList(blocks) for blocks in _stages(config))
        width = config.widths[-1]
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.pre_logits = nn.Linear(width, width)
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else None

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        pooled = self.feature_map(images).mean(dim=(2, 3))
        return torch.tanh(self.pre_logits(self.norm(pooled)))

    def feature_map(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        # convolutions are faster where channels lie last
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        for block in self.blocks():
            x = block(x)
        return x

    def attention(self, images: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b heads n n"]]:
        x = self.stem(images)
        for block in self.blocks():
            if isinstance(block, RelativeBlock):
                yield block.weights(x)
            x = block(x)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]

    def depth_of(self, name: str) -> int:
        root, *rest = name.split(".")
        if root == "stages":
            before = sum(len(list(stage.children())) for stage in self.stages[: int(rest[0])])
            return before + int(rest[1]) + 1
        return 0 if root == "stem" else len(self.blocks()) + 1

    def resize_tables(self, state: dict[str, Tensor], image_size: tuple[int, int], method: PositionResize) -> None:
        grids = zip(self.config.grids, replace(self.config, image_size=image_size).grids, strict=True)
        for stage, (old, new) in zip(("stages.2.", "stages.3."), grids, strict=True):
            for name in state:
                if name.startswith(stage) and name.endswith(".attention.table"):
                    state[name] = resize_relative(state[name], old, new, method)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the authors' code for MaxViT does (google-research/maxvit, `maxvit.py`); the paper is silent.

        | parameter | value |
        |---|---|
        | kernels, matrices, tables of relative positions, head | N(0, 0.02) |
        | biases | 0; head's `head_bias` |
        | norms | scale 1, shift 0; statistics of BatchNorm mean 0, variance 1 |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, RelativeAttention):
                nn.init.normal_(module.table, std=0.02)
        if self.head is not None:
            nn.init.constant_(self.head.bias, self.config.head_bias)


def _stages(config: CoAtNetConfig) -> Iterator[list[nn.Module]]:
    """Yield the blocks of S1 to S4 (tables 3 and 12). The first of a stage halves the resolution."""
    s0, s1, s2, s3, s4 = config.widths
    depth1, depth2, depth3, depth4 = config.depths
    early, early_width = config.mbconv_before_s3
    s3_grid, s4_grid = config.grids
    layout = [
        [(s1, None)] * depth1,
        [(s2, None)] * depth2,
        [(early_width, None)] * early + [(s3, s3_grid)] * depth3,
        [(s4, s4_grid)] * depth4,
    ]
    last = sum(config.depths) + early - 1
    channels, number = s0, 0
    for stage in layout:
        blocks: list[nn.Module] = []
        for width, grid in stage:
            stride, rate = 1 if blocks else 2, config.drop_path * number / last
            if grid is None:
                blocks.append(MBConv(channels, width, stride, config, rate))
            else:
                blocks.append(RelativeBlock(channels, width, stride, grid, config, rate))
            channels, number = width, number + 1
        yield blocks


def _pool(stride: int, config: CoAtNetConfig) -> nn.Module:
    """Return pooling of 2x2 places that keeps the rest of an odd side, as convolutions at stride 2 do."""
    if stride == 1:
        return nn.Identity()
    return (nn.MaxPool2d if config.downsample == "max" else nn.AvgPool2d)(2, ceil_mode=True)
