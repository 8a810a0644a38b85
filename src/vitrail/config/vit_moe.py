"""V-MoE, Vision Transformers with sparse mixtures of experts: their settings and published sizes."""

from dataclasses import dataclass
from typing import Literal

from vitrail.config.checks import require_least, require_rate
from vitrail.config.vit import VIT_SIZES, ViTConfig
from vitrail.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTMoEConfig(ViTConfig):
    """V-MoE (Riquelme et al., 2021, arXiv 2106.05974, section 2): a ViT with mixtures of experts in some blocks."""

    moe_layers: tuple[int, ...] = (1, 3, 5, 7, 9, 11)
    """Blocks, counted from 0, whose feed-forward network is a mixture of experts."""
    experts: int = 32
    """Experts in a mixture (E in the paper)."""
    experts_per_token: int = 2
    """Experts that a token is sent to (k)."""
    capacity_factor: float | None = None
    """Places per expert in evaluation, relative to an even spread of the tokens (C); a full expert drops tokens.

    None: places for all, so that an answer does not depend on the other pictures of its batch."""
    train_capacity_factor: float = 1.05
    """The same while training. The paper pre-trains with 1.05 and fine-tunes with 1.5."""
    batch_priority: bool = False
    """Whether tokens with the largest gates get their places first (batch prioritized routing), not the foremost."""
    group_size: int | None = None
    """Tokens that compete for places. None: those of one picture, and of 8 pictures while training."""
    noise_std: float = 1.0
    """Deviation of the noise on the router's logits while training, before it is divided by the number of experts."""
    importance_loss: float = 0.005
    """Weight of the loss that balances the gates over the experts."""
    load_loss: float = 0.005
    """Weight of the loss that balances the expected number of tokens over the experts."""
    expert_dropout: float = 0.0
    """Dropout in the experts, in place of `dropout`."""

    def __post_init__(self) -> None:
        ViTConfig.__post_init__(self)  # a dataclass with slots is made anew, which plain super() does not survive
        require_rate(self, "expert_dropout")
        require_least(self, experts=1, experts_per_token=1)
        if self.experts_per_token > self.experts:
            raise UserError(f"experts_per_token {self.experts_per_token} is more than the {self.experts} experts.")
        if self.merge_tokens:
            raise UserError("merge_tokens is for ViTs without experts, which route tokens; leave it at 0.")
        if not self.moe_layers or list(self.moe_layers) != sorted({*self.moe_layers} & {*range(self.depth)}):
            raise UserError(
                f"moe_layers must be growing numbers of blocks from 0 to {self.depth - 1}, not {self.moe_layers}."
            )
        for name in ("capacity_factor", "train_capacity_factor", "group_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{name} must be larger than 0, not {value}.")
        for name in ("noise_std", "importance_loss", "load_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} must be 0 or larger, not {getattr(self, name)}.")


# Sizes as (width, depth, mlp_dim, heads): vmoe `configs/vmoe_paper/common.py`. S is not the S of the ViTs.
VMOE_SIZES: dict[str, tuple[int, int, int, int]] = {
    "s": (512, 8, 2048, 8),
    "b": VIT_SIZES["b"],
    "l": VIT_SIZES["l"],
    "h": VIT_SIZES["h"],
    "15b": (1408, 48, 6400, 16),  # the paper's largest; patch 14 and 32 experts make up its 14,705.1 million parameters
}


def vmoe_config(size: str, patch: int, where: Literal["every", "last"], number: int) -> ViTMoEConfig:
    """Return the published configuration of V-MoE-`size`/`patch` at 224 px, with 32 experts of which 2 are chosen.

    Mixtures stand in every `number`-th block, or in the last `number` of the blocks with an odd number.
    """
    width, depth, mlp_dim, heads = VMOE_SIZES[size]
    layers = range(number - 1, depth, number) if where == "every" else range(1, depth, 2)[-number:]
    return ViTMoEConfig(
        width=width, depth=depth, mlp_dim=mlp_dim, heads=heads, patch_size=(patch, patch), moe_layers=tuple(layers)
    )


VMOES: dict[str, ViTMoEConfig] = {
    # the models that arXiv 2106.05974 reports
    "vmoe-s32-every2": vmoe_config("s", 32, "every", 2),
    "vmoe-s32-last2": vmoe_config("s", 32, "last", 2),
    "vmoe-b32-every2": vmoe_config("b", 32, "every", 2),
    "vmoe-b32-last2": vmoe_config("b", 32, "last", 2),
    "vmoe-b16-every2": vmoe_config("b", 16, "every", 2),
    "vmoe-b16-last2": vmoe_config("b", 16, "last", 2),
    "vmoe-l16-every2": vmoe_config("l", 16, "every", 2),
    "vmoe-l16-last2": vmoe_config("l", 16, "last", 2),
    "vmoe-h14-every2": vmoe_config("h", 14, "every", 2),
    "vmoe-h14-last5": vmoe_config("h", 14, "last", 5),
    "vmoe-15b": vmoe_config("15b", 14, "every", 2),
}
"""Every published size under its name."""
