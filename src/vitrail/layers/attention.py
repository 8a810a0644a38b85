"""Multi-head self-attention (Vaswani et al., 2017, section 3.2) and attention pooling."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.layers.feedforward import FeedForward


def attend(
    query: Float[Tensor, "b heads q dh"],
    key: Float[Tensor, "b heads k dh"],
    value: Float[Tensor, "b heads k dh"],
    *,
    bias: Float[Tensor, "... #q k"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b heads q dh"]:
    """Return softmax(scale Q K^T + bias) V, by a fused kernel where that is faster.

    Args:
        query: What asks.
        key: What is compared with it.
        value: What is mixed.
        bias: Added to the scores: [heads q k], the same for every picture, or [b 1 1 k].
        scale: 1 / sqrt(dh) by default.
    """
    half = query.dtype == torch.bfloat16
    if query.device.type == "cpu" and query.requires_grad and (half or bias is not None):
        # torch's fused CPU kernel goes back through a bias not at all, and in bfloat16, with AMX, it takes 2 to 6 times
        # as long (torch 2.13): `benchmarks/training_step.py`.
        scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.mT
        scores = scores if bias is None else scores + bias.to(scores.dtype)
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    mask = None if bias is None else bias.to(query.dtype)
    mask = mask[None] if mask is not None and mask.ndim == 3 else mask  # the fused CPU kernel takes four axes or two
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def log_sizes(sizes: Float[Tensor, "b n"]) -> Float[Tensor, "b 1 1 n"]:
    """Return what makes attention count each token several times when it is added to the scores."""
    return sizes.log()[:, None, None]


class Attention(nn.Module):
    """Self-attention with query, key and value in one matrix. Fused kernels compute it; `weights` shows it."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        query, key, value = self._project(x)
        return self._joined(attend(query, key, value))

    def proportional(
        self, x: Float[Tensor, "b n d"], sizes: Float[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n dh"]]:
        """Return what `forward` does when a token counts as often as its size says, and the keys, mean over heads.

        Proportional attention of ToMe (arXiv 2210.09461, section 3, equation 1).
        """
        query, key, value = self._project(x)
        return self._joined(attend(query, key, value, bias=log_sizes(sizes))), key.mean(dim=1)

    def weights(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n n"]:
        """Return the attention probabilities that `forward` uses without ever holding them."""
        query, key, _ = self._project(x)
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)

    def _joined(self, mixed: Float[Tensor, "b heads n dh"]) -> Float[Tensor, "b n d"]:
        return self.out(rearrange(mixed, "b heads n dh -> b n (heads dh)"))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rearrange(self.qkv(x), "b n (three heads dh) -> three b heads n dh", three=3, heads=self.heads).unbind(0)

    def init_weights(self) -> None:
        for part in self.qkv.weight.chunk(3):  # three matrices, each with its own fan-out
            nn.init.xavier_uniform_(part)
        nn.init.xavier_uniform_(self.out.weight)
        for layer in (self.qkv, self.out):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class AttentionPool(nn.Module):
    """Multi-head attention pooling, "MAP" (Zhai et al., 2022, arXiv 2106.04560, section 3.3; big_vision MAPHead).

    A learned probe asks the tokens once; a residual feed-forward network follows. The query is not normalised.
    """

    def __init__(self, width: int, heads: int, mlp_dim: int, *, gelu: str, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = FeedForward(width, mlp_dim, gelu=gelu)

    def forward(self, x: Float[Tensor, "b n d"], sizes: Float[Tensor, "b n"] | None = None) -> Float[Tensor, "b d"]:
        """Return one vector for all tokens; one that was merged of several counts as often as `sizes` says."""
        query, key, value = self._project(x)
        mixed = attend(query, key, value, bias=None if sizes is None else log_sizes(sizes))
        pooled = self.out(rearrange(mixed, "b heads one dh -> b one (heads dh)"))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]

    def weights(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads 1 n"]:
        """Return how much of each token the probe takes, per head."""
        query, key, _ = self._project(x)
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, dim=-1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query = rearrange(
            self.query(repeat(self.probe, "1 1 d -> b 1 d", b=len(x))), "b n (h d) -> b h n d", h=self.heads
        )
        key, value = rearrange(self.key_value(x), "b n (two h d) -> two b h n d", two=2, h=self.heads).unbind(0)
        return query, key, value

    def init_weights(self) -> None:
        for weight in (self.probe[0], self.query.weight, *self.key_value.weight.chunk(2), self.out.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.query, self.key_value, self.out):
            nn.init.zeros_(layer.bias)
        self.norm.reset_parameters()
        self.mlp.init_weights()
