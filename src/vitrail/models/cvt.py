"""CvT: "Introducing Convolutions to Vision Transformers" (Wu et al., 2021, arXiv 2103.15808).

Figure 2 of the paper, read from left to right, is `CvT.tokens`: three stages, each a convolutional token embedding and
Transformer blocks whose queries, keys and values come from convolutional projections; in the last stage a class token
joins, and the head reads it. There are no positions, so pictures of any size are taken as they are.

Where paper and official code (microsoft/CvT, `lib/models/cls_cvt.py`) leave room, the code counts: attention scores are
divided by the root of the token's width, not of the head's, and GELU is x * sigmoid(1.702 x).
"""

from collections.abc import Iterator
from typing import cast, final

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vitrail.config.cvt import CvTConfig
from vitrail.layers.attention import attend
from vitrail.layers.feedforward import FeedForward
from vitrail.layers.residual import DropPath
from vitrail.models.base import ImageModel

Grid = tuple[int, int]
"""Rows and columns of patch tokens."""


def as_map(tokens: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b d h w"]:
    """Return patch tokens as a map; a class token before them is left out."""
    rows, columns = grid
    return rearrange(tokens[:, -rows * columns :], "b (h w) d -> b d h w", h=rows)


class ConvEmbed(nn.Module):
    """Convolutional token embedding (section 3.1): overlapping patches, then LayerNorm."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        x = self.conv(x)
        return self.norm(rearrange(x, "b d h w -> b (h w) d")), (x.shape[2], x.shape[3])


class ConvProjection(nn.Module):
    """Convolutional projection (section 3.2): depthwise convolution and BatchNorm on the map, then a linear layer.

    A stride of 2 leaves a quarter of the tokens: figure 3c, the paper's "squeezed" keys and values. The class token has
    no place in the map and takes the linear layer only.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, width)

    def forward(
        self, patches: Float[Tensor, "b d h w"], class_token: Float[Tensor, "b 1 d"] | None
    ) -> Float[Tensor, "b m d"]:
        x = rearrange(self.norm(self.conv(patches)), "b d h w -> b (h w) d")
        return self.linear(x if class_token is None else torch.cat([class_token, x], dim=1))


class ConvAttention(nn.Module):
    """Multi-head self-attention on convolutional projections. Fused kernels compute it; `weights` shows it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = width**-0.5  # of the token, where most models take the head's width
        self.query = ConvProjection(width, stride=1)
        self.key = ConvProjection(width, stride=2)
        self.value = ConvProjection(width, stride=2)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n d"]:
        query, key, value = self._project(x, grid)
        mixed = attend(query, key, value, scale=self.scale)
        return self.out(rearrange(mixed, "b heads n dh -> b n (heads dh)"))

    def weights(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b heads n m"]:
        """Return the attention probabilities that `forward` uses without ever holding them."""
        query, key, _ = self._project(x, grid)
        return torch.softmax(query @ key.mT * self.scale, dim=-1)

    def _project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        class_token = x[:, :1] if x.shape[1] > grid[0] * grid[1] else None
        patches = as_map(x, grid)
        query, key, value = (
            rearrange(project(patches, class_token), "b n (heads dh) -> b heads n dh", heads=self.heads)
            for project in (self.query, self.key, self.value)
        )
        return query, key, value


class Block(nn.Module):
    """Pre-norm convolutional Transformer block (figure 2b)."""

    def __init__(self, config: CvTConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        width = config.widths[stage]
        self.norm1 = nn.LayerNorm(width)
        self.attention = ConvAttention(width, config.heads[stage])
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, config.mlp_dims[stage], gelu=config.gelu, dropout=config.dropout)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b n d"]:
        x = x + self.drop_path(self.dropout(self.attention(self.norm1(x), grid)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Token embedding and blocks of one resolution (table 2); the last stage has the class token and the drop path."""

    def __init__(self, config: CvTConfig, stage: int) -> None:
        super().__init__()
        width, depth, last = config.widths[stage], config.depths[stage], stage == len(config.widths) - 1
        if stage == 0:
            self.patch_embed = ConvEmbed(config.channels, width, kernel=7, stride=4, padding=2)
        else:
            self.patch_embed = ConvEmbed(config.widths[stage - 1], width, kernel=3, stride=2, padding=1)
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if last else None
        self.dropout = nn.Dropout(config.dropout)
        rates = [config.drop_path * i / max(depth - 1, 1) if last else 0.0 for i in range(depth)]
        self.encoder = nn.ModuleList(Block(config, stage, rate) for rate in rates)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        tokens, grid = self.embed(x)
        for block in self.encoder:
            tokens = block(tokens, grid)
        return tokens, grid

    def embed(self, x: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        """Return what enters the first block: patches, in the last stage behind the class token."""
        tokens, grid = self.patch_embed(x)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.dropout(tokens), grid

    def blocks(self) -> list[Block]:
        """Return the blocks, input to output."""
        return cast(list[Block], list(self.encoder))


@final
class CvT(ImageModel[CvTConfig]):
    """Convolutional vision Transformer of any size."""

    input_kernel = "stages.0.patch_embed.conv.weight"

    def __init__(self, config: CvTConfig) -> None:
        super().__init__(config)
        self.stages = nn.ModuleList(Stage(config, stage) for stage in range(len(config.widths)))
        self.norm = nn.LayerNorm(config.widths[-1])
        self.head = nn.Linear(config.widths[-1], config.num_classes) if config.num_classes else None

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        return self.tokens(images)[0][:, 0]

    def feature_map(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        return as_map(*self.tokens(images))

    def tokens(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], Grid]:
        """Return the last stage's output after the final norm, class token first, and its rows and columns."""
        tokens, grid = self.stages[0](images)
        for stage in self.stages[1:]:
            tokens, grid = stage(as_map(tokens, grid))
        return self.norm(tokens), grid

    def attention(self, images: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b heads q k"]]:
        """Yield the attention probabilities of one block after the other; there are fewer keys than queries.

        Keys and values lie on a map of half as many rows and columns as queries; a class token comes first in both.
        """
        x = images
        for stage in self._stages():
            tokens, grid = stage.embed(x)
            for block in stage.blocks():
                yield block.attention.weights(block.norm1(tokens), grid)
                tokens = block(tokens, grid)
            x = as_map(tokens, grid)

    def blocks(self) -> list[Block]:
        return [block for stage in self._stages() for block in stage.blocks()]

    def depth_of(self, name: str) -> int:
        root, *rest = name.split(".")
        if root != "stages":
            return len(self.blocks()) + 1
        before = sum(self.config.depths[: int(rest[0])])
        if rest[1] == "encoder":
            return before + int(rest[2]) + 1
        return 0 if rest[0] == "0" else before + 1  # a later embedding and the class token go with the block they feed

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.stages if isinstance(stage, Stage)]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the official code does (`trunc_norm`).

        | parameter | value |
        |---|---|
        | linear layers, the head among them | truncated N(0, 0.02); biases 0 |
        | class token | truncated N(0, 0.02) |
        | convolutions | PyTorch's default: uniform within 1 / sqrt(fan-in), biases too |
        | LayerNorm, BatchNorm | scale 1, shift 0, running mean 0 and variance 1 |
        | bias of the head | `head_bias`; the official code leaves PyTorch's default |
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
                layer.reset_parameters()
            elif isinstance(layer, Stage) and layer.class_token is not None:
                nn.init.trunc_normal_(layer.class_token, std=0.02)
        if self.head is not None:
            nn.init.constant_(self.head.bias, self.config.head_bias)
