"""Token merging, "ToMe" (Bolya et al., 2023, arXiv 2210.09461, section 3): similar tokens become one, block by block.

Between attention and feed-forward network, every second token looks for the token most like it among the others; the
`count` most alike pairs are merged into their mean. A token remembers of how many patches it is, so that means weigh
them, and attention counts it as often as it has patches ("proportional attention", `Attention.proportional`).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def merge_tokens(
    x: Float[Tensor, "b n d"],
    sizes: Float[Tensor, "b n"],
    keys: Float[Tensor, "b n dh"],
    count: int,
    *,
    class_token: bool,
) -> tuple[Float[Tensor, "b fewer d"], Float[Tensor, "b fewer"]]:
    """Return `count` tokens fewer, and of how many patches each is made.

    Args:
        x: The tokens.
        sizes: Patches in each.
        keys: What similarity (cosine) is measured by: the attention's keys, mean over heads.
        count: How many to merge away; at most half of the tokens are, the class token never is.
        class_token: Whether the first token is one. It stays the first, and alone.
    """
    count = min(count, (x.shape[1] - class_token) // 2)
    if count < 1:
        return x, sizes
    keys = F.normalize(keys.float(), dim=-1)
    likeness = keys[:, ::2] @ keys[:, 1::2].mT
    if class_token:
        likeness = torch.cat([torch.full_like(likeness[:, :1], -torch.inf), likeness[:, 1:]], dim=1)
    best, partner = likeness.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    gone, kept = order[:, :count], order[:, count:].sort(dim=-1).values  # sorted: the class token stays the first
    partner = partner.gather(1, gone)

    def merged(rows: Float[Tensor, "b n wide"]) -> Float[Tensor, "b fewer wide"]:
        even, odd = rows[:, ::2], rows[:, 1::2]
        moved = even.gather(1, _wide(gone, rows))
        return torch.cat([even.gather(1, _wide(kept, rows)), odd.scatter_add(1, _wide(partner, rows), moved)], dim=1)

    weights = sizes[..., None]
    total = merged(weights)
    return merged(x * weights.to(x.dtype)) / total.to(x.dtype), total[..., 0]


def mean_of_merged(x: Float[Tensor, "b n d"], sizes: Float[Tensor, "b n"]) -> Float[Tensor, "b d"]:
    """Return the mean over the patches that tokens are made of."""
    return (x * (sizes / sizes.sum(dim=1, keepdim=True)).to(x.dtype)[..., None]).sum(dim=1)


def _wide(places: Tensor, rows: Tensor) -> Tensor:
    """Return places of rows [b k] as `gather` and `scatter_add` want them: [b k wide]."""
    return places[..., None].expand(-1, -1, rows.shape[2])
