"""V-MoE: "Scaling Vision with Sparse Mixture of Experts" (Riquelme et al., 2021, arXiv 2106.05974).

A Vision Transformer in which some blocks have a mixture of experts in place of the feed-forward network (section 2).
Numerically that of google-research/vmoe, `nn/vit_moe.py`.
"""

from collections.abc import Iterable, Iterator
from typing import final

from jaxtyping import Float
from torch import Tensor

from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.layers.moe import MixtureOfExperts, Routing
from vitrail.models.base import WithLoss
from vitrail.models.vit import Block, ViT


class MixtureBlock(Block):
    """Encoder block with a mixture of experts. It also tells where the tokens went."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "b n d"]
    ) -> tuple[Float[Tensor, "b n d"], Routing]:
        x = self.attended(x)
        y, routing = self.mlp(self.norm2(x))
        return x + self.drop_path(y), routing


@final
class ViTMoE(ViT[ViTMoEConfig]):
    """Vision Transformer with sparse mixtures of experts.

    In training it answers `WithLoss`: the logits, and the weighted losses that keep the experts evenly busy.
    """

    def make_block(self, number: int, drop_path: float) -> Block:
        if number not in self.config.moe_layers:
            return super().make_block(number, drop_path)
        return MixtureBlock(self.config, drop_path, MixtureOfExperts(self.config))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Tensor | WithLoss:
        tokens, routings = self.encode(images)
        features = self.pooled(tokens)
        logits = features if self.head is None else self.head(features)
        return WithLoss(logits, self.balance_loss(routings.values())) if self.training else logits

    def tokens(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        return self.encode(images)[0]

    def encode(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], dict[int, Routing]]:
        """Return the encoder's output after the final norm, and by number of block where each mixture sent its tokens.

        The tokens are the class token, where there is one, then the patches, row by row.
        """
        x, routings = self.embed(images), {}
        for number, block in enumerate(self.encoder):
            if number in self.config.moe_layers:
                x, routings[number] = block(x)
            else:
                x = block(x)
        return self.norm(x), routings

    def balance_loss(self, routings: Iterable[Routing]) -> Float[Tensor, ""]:
        """Return the weighted sum of importance and load losses (appendix A), over layers, as means over groups."""
        config = self.config
        parts = [config.importance_loss * routing.importance + config.load_loss * routing.load for routing in routings]
        return sum((part.mean() for part in parts[1:]), start=parts[0].mean())

    def attention(self, images: Float[Tensor, "b c h w"]) -> Iterator[Float[Tensor, "b heads n n"]]:
        x = self.embed(images)
        for number, block in enumerate(self.blocks()):
            yield block.attention.weights(block.norm1(x))
            x = block(x)[0] if number in self.config.moe_layers else block(x)
