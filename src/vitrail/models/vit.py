"""Vision Transformer: "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv 2010.11929).

The figure of the paper, read from bottom to top, is `ViT.tokens`: patches, class token, positions, L blocks, norm.
A hybrid takes its patches from the features of a ResNet (section 3.1), or of a few convolutions: `stem`.
`pool` and `positions` cover big_vision's variants, among them ViT-G/14 (arXiv 2106.04560) with attention pooling.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypeVar

from vitrail.config.vit import ConvStem, ResNetStem, ViTConfig
from vitrail.errors import UserError
from vitrail.layers.attention import Attention, AttentionPool
from vitrail.layers.conv_stem import ConvolutionalStem
from vitrail.layers.embedding import PositionResize, resize_positions, sincos_positions
from vitrail.layers.feedforward import FeedForward
from vitrail.layers.initial import lecun_normal
from vitrail.layers.residual import DropPath
from vitrail.layers.resnet import ResNet
from vitrail.layers.token_merging import mean_of_merged, merge_tokens
from vitrail.models.base import ImageModel


class Block(nn.Module):
    """Pre-norm Transformer encoder block (section 3.1, equations 2 and 3)."""

    def __init__(self, config: ViTConfig, drop_path: float, mlp: Any = None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config.width, config.heads, qkv_bias=config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        if mlp is None:
            mlp = FeedForward(config.width, config.mlp_dim, gelu=config.gelu, dropout=config.dropout)
        self.mlp = mlp
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = self.attended(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attended(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Return the first half of the block (equation 2)."""
        return x + self.drop_path(self.dropout(self.attention(self.norm1(x))))

    def init_weights(self) -> None:
        self.norm1.reset_parameters()
        self.attention.init_weights()
        self.norm2.reset_parameters()
        self.mlp.init_weights()


class MergingBlock(Block):
    """Encoder block that merges similar tokens between its halves: ToMe (Bolya et al., 2023, arXiv 2210.09461)."""

    def __init__(self, config: ViTConfig, drop_path: float) -> None:
        super().__init__(config, drop_path)
        self.count, self.class_token = config.merge_tokens, config.pool == "token"

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "b n d"], sizes: Float[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b fewer d"], Float[Tensor, "b fewer"]]:
        y, keys = self.attention.proportional(self.norm1(x), sizes)
        x = x + self.drop_path(self.dropout(y))
        x, sizes = merge_tokens(x, sizes, keys, self.count, class_token=self.class_token)
        return x + self.drop_path(self.mlp(self.norm2(x))), sizes


Config = TypeVar("Config", bound=ViTConfig, default=ViTConfig, covariant=True)


class ViT(ImageModel[Config]):
    """Vision Transformer of any size, patch, stem, pooling and picture size."""

    input_kernel = "patch_embed.weight"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, rows = config.width, config.grid[0] * config.grid[1]
        self.stem, entering = None, config.channels
        if config.stem is not None:
            self.stem, entering = self._read_by(config.stem), config.stem.channels
        self.patch_embed = nn.Conv2d(entering, width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if config.pool == "token" else None
        if config.positions == "sincos":
            self.positions = None
        else:
            self.positions = nn.Parameter(torch.empty(1, rows + (config.positions == "learned"), width))
        self.dropout = nn.Dropout(config.dropout)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.encoder = nn.ModuleList(self.make_block(number, rate) for number, rate in enumerate(rates))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention_pool = None
        if config.pool == "map":
            self.attention_pool = AttentionPool(
                width, config.heads, config.mlp_dim, gelu=config.gelu, eps=config.norm_eps
            )
        pooled = config.pooled_width
        self.pre_logits = nn.Linear(pooled, config.pre_logits) if config.pre_logits else None
        self.head = nn.Linear(config.pre_logits or pooled, config.num_classes) if config.num_classes else None

    def _read_by(self, stem: ResNetStem | ConvStem) -> ResNet | ConvolutionalStem:
        """Return the network that reads the picture, and note where its first kernel is."""
        channels = self.config.channels
        if isinstance(stem, ConvStem):
            self.input_kernel = "stem.whitening"
            return ConvolutionalStem(channels, stem.filters, stem.widths)
        self.input_kernel, self.input_kernel_sums = "stem.conv.weight", False
        return ResNet(channels, stem.width, stem.blocks)

    def make_block(self, number: int, drop_path: float) -> Block:
        """Return a fresh block of the encoder, told its number and its rate of stochastic depth."""
        return (MergingBlock if self.config.merge_tokens else Block)(self.config, drop_path)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        if self.config.merge_tokens:
            return self.pooled(*self.merged_tokens(images))
        return self.pooled(self.tokens(images))

    def pooled(
        self, tokens: Float[Tensor, "b n d"], sizes: Float[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b width"]:
        """Return the vector that the head classifies, from the encoder's output; `sizes` are those of merged tokens."""
        if self.attention_pool is not None:
            pooled = self.attention_pool(tokens, sizes)
        elif self.class_token is not None:
            pooled = tokens[:, 0]
        else:
            pooled = tokens.mean(dim=1) if sizes is None else mean_of_merged(tokens, sizes)
            if self.config.pool == "gap+max":
                pooled = torch.cat([pooled, tokens.amax(dim=1)], dim=1)
        return pooled if self.pre_logits is None else torch.tanh(self.pre_logits(pooled))

    def tokens(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return the encoder's output after the final norm: the class token, where there is one, then the patches.

        Raises:
            UserError: When tokens are merged.
        """
        self.require_places()
        x = self.embed(images)
        for block in self.encoder:
            x = block(x)
        return self.norm(x)

    def merged_tokens(
        self, images: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b fewer d"], Float[Tensor, "b fewer"]]:
        """Return the encoder's output when tokens are merged, and of how many each is made; the class token first."""
        x = self.embed(images)
        sizes = torch.ones(x.shape[:2], device=x.device)
        for block in self.encoder:
            x, sizes = block(x, sizes)
        return self.norm(x), sizes

    def require_places(self) -> None:
        """Raise UserError when tokens are merged: then they are no patches, and have no place in the picture."""
        if self.config.merge_tokens:
            raise UserError(
                "merged tokens have no place in the picture: load the model with merge_tokens=0; weights stay the same."
            )

    def feature_map(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        rows, columns = self.config.grid_at((images.shape[2], images.shape[3]))
        return rearrange(self.tokens(images)[:, -rows * columns :], "b (h w) d -> b d h w", h=rows)

    def attention(self, images: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b heads n n"]]:
        self.require_places()
        x = self.embed(images)
        for block in self.blocks():
            yield block.attention.weights(block.norm1(x))
            x = block(x)

    def embed(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """Return patches with class token and positions: what enters the first block (equation 1)."""
        patches = self.patch_embed(images if self.stem is None else self.stem(images))
        grid = (patches.shape[2], patches.shape[3])
        x = rearrange(patches, "b d h w -> b (h w) d")
        class_row, patch_rows = self.position_rows(grid)
        x = x + patch_rows.to(x.dtype)
        if self.class_token is not None:
            token = self.class_token if class_row is None else self.class_token + class_row
            x = torch.cat([token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return self.dropout(x)

    def position_rows(self, grid: tuple[int, int]) -> tuple[Float[Tensor, "1 1 d"] | None, Float[Tensor, "1 n d"]]:
        """Return the class token's position, where it has one, and those of a grid of patches, resized if need be."""
        if self.positions is None:
            return None, sincos_positions(*grid, self.config.width, self.patch_embed.weight.device)
        if self.config.positions == "learned":
            return self.positions[:, :1], self._resized(self.positions[:, 1:], grid)
        return None, self._resized(self.positions, grid)

    def _resized(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        return resize_positions(table, self.config.grid, grid, self.position_resize)

    def fit_input(self, pictures: Callable[[], Float[Tensor, "b c h w"]]) -> None:
        if isinstance(self.stem, ConvolutionalStem):
            self.stem.whiten(pictures())

    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.encoder))

    def depth_of(self, name: str) -> int:
        root, *rest = name.split(".")
        if root == "encoder":
            return int(rest[0]) + 1
        return 0 if root in ("stem", "patch_embed", "class_token", "positions") else self.config.depth + 1

    def with_classes(self, num_classes: int) -> ViTConfig:
        """Return the configuration with a fresh head, which stands in for pre-logits too (ViT paper, section 3.2)."""
        return replace(self.config, num_classes=num_classes, pre_logits=0, head_bias=0.0)

    def resize_tables(self, state: dict[str, Tensor], image_size: tuple[int, int], method: PositionResize) -> None:
        if self.config.positions == "sincos":
            return
        class_rows = 1 if self.config.positions == "learned" else 0
        rows, grid = state["positions"], self.config.grid_at(image_size)
        resized = resize_positions(rows[:, class_rows:], self.config.grid, grid, method)
        state["positions"] = torch.cat([rows[:, :class_rows], resized], dim=1)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise as the official code does (vision_transformer `models_vit.py`, big_vision `models/vit.py`).

        | parameter | value |
        |---|---|
        | stem | see `ResNet`, `ConvolutionalStem` |
        | patch embedding | LeCun normal; bias 0 |
        | class token | 0 |
        | positions | N(0, 0.02); big_vision's tables without a class row: N(0, 1 / sqrt(width)) |
        | attention and feed-forward matrices | Xavier uniform; biases 0 and N(0, 1e-6) |
        | pre-logits | LeCun normal; bias 0 |
        | head | 0; bias `head_bias` |
        """
        config = self.config
        if self.stem is not None:
            self.stem.init_weights()
        lecun_normal(self.patch_embed)
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02 if config.positions == "learned" else config.width**-0.5)
        for block in self.blocks():
            block.init_weights()
        self.norm.reset_parameters()
        if self.attention_pool is not None:
            self.attention_pool.init_weights()
        if self.pre_logits is not None:
            lecun_normal(self.pre_logits)
        if self.head is not None:
            nn.init.zeros_(self.head.weight)
            nn.init.constant_(self.head.bias, config.head_bias)
