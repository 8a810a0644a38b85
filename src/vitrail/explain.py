"""What a Vision Transformer looks at, and what it has learned about positions and patches.

Attention, rollout, and figure 7 of the ViT paper (Dosovitskiy et al., 2021, arXiv 2010.11929). Nothing here changes the
model, which should be in evaluation mode: attention is computed a second time, beside the fused kernels.
"""

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vitrail.errors import UserError
from vitrail.models import ImageModel, ViT


@torch.no_grad()
def pooling_weights(model: ImageModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Return the share that each of the encoder's output tokens has in the vector which the head classifies.

    The class token alone; all patches alike; half of it so, half by the channels in which a patch is the maximum; or
    what the probe of attention pooling attends to (mean over heads).

    Raises:
        UserError: When the model is not a ViT.
    """
    vit = _as_vit(model)
    tokens = vit.tokens(images)
    if vit.attention_pool is not None:
        return vit.attention_pool.weights(tokens).mean(dim=1)[:, 0]
    weights = tokens.new_zeros(tokens.shape[:2])
    if vit.class_token is not None:
        weights[:, 0] = 1.0
        return weights
    weights += 1.0 / weights.shape[1]
    if vit.config.pool == "gap+max":
        first = F.one_hot(tokens.argmax(dim=1), tokens.shape[1]).to(weights.dtype)
        weights = (weights + first.mean(dim=1)) / 2
    return weights


def rollout(maps: Iterable[Float[Tensor, "b heads n n"]], pooling: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Return how much of each input token arrives in the pooled vector: attention rollout.

    Abnar and Zuidema, 2020, arXiv 2005.00928, section 3, as the ViT paper's figure 6 and appendix D.7 use it: the mean
    over heads, plus the identity for the residual connection, rows scaled to sum 1, multiplied through the layers.

    Args:
        maps: Attention of each layer, first to last: of `ImageModel.attention`.
        pooling: Share of each output token in the result, `pooling_weights`; rows sum to 1, and so does the result.
    """
    mixed = None
    for attention in maps:
        layer = attention.mean(dim=1) + torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
        layer = layer / layer.sum(dim=-1, keepdim=True)
        mixed = layer if mixed is None else layer @ mixed
    return pooling if mixed is None else (pooling[:, None] @ mixed)[:, 0]


@torch.no_grad()
def patch_rollout(model: ImageModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rows columns"]:
    """Return the attention rollout of each picture on its grid of patches; each grid sums to 1.

    What stays with the class token is left out.

    Raises:
        UserError: When the model is not a ViT.
    """
    vit = _as_vit(model)
    tokens = rollout(vit.attention(images), pooling_weights(vit, images))
    rows, columns = vit.config.grid_at((images.shape[2], images.shape[3]))
    patches = rearrange(tokens[:, -rows * columns :], "b (h w) -> b h w", h=rows)
    return patches / patches.sum(dim=(1, 2), keepdim=True)


@torch.no_grad()
def attention_distance(
    maps: Iterable[Float[Tensor, "b heads n n"]], grid: tuple[int, int], patch: tuple[int, int]
) -> Float[Tensor, "layers heads"]:
    """Return how far each head looks: the mean distance in pixels between a patch and those that it attends to.

    ViT paper, figure 7 right and appendix D.7: weighted by attention, averaged over patches and pictures. The class
    token has no place, so its row and column are left out and the other weights scaled to sum 1.

    Args:
        maps: Attention of each layer: of `ImageModel.attention`.
        grid: Rows and columns of patches.
        patch: Height and width of a patch in pixels.
    """
    rows, columns = torch.meshgrid(torch.arange(grid[0]) * patch[0], torch.arange(grid[1]) * patch[1], indexing="ij")
    centres = torch.stack([rows.flatten(), columns.flatten()], dim=1).double()
    between = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    layers = []
    for attention in maps:
        weights = attention[:, :, -len(centres) :, -len(centres) :].double()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        layers.append((weights * between.to(weights.device)).sum(dim=-1).mean(dim=(0, 2)))
    return torch.stack(layers).float()


@torch.no_grad()
def position_similarity(model: ImageModel) -> Float[Tensor, "rows columns rows columns"]:
    """Return the cosine similarity of every patch position's embedding with every other's (ViT paper, figure 7 centre).

    Raises:
        UserError: When the model is not a ViT.
    """
    vit = _as_vit(model)
    rows, _ = vit.config.grid
    _, table = vit.position_rows(vit.config.grid)
    unit = F.normalize(table[0].float(), dim=-1)
    return rearrange(unit @ unit.mT, "(h w) (i j) -> h w i j", h=rows, i=rows)


@torch.no_grad()
def patch_filters(model: ImageModel, count: int = 28) -> Float[Tensor, "k c h w"]:
    """Return the leading principal components of the filters that read the picture (ViT paper, figure 7 left).

    Each has norm 1 and the sign that makes its largest weight positive. There are at most as many as a patch has
    values, and as the model is wide.

    Raises:
        UserError: When the model is not a ViT.
    """
    kernels = _as_vit(model).state_dict()[model.input_kernel].float()
    flat = rearrange(kernels, "d c h w -> d (c h w)")
    components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return (components * largest.sign()).reshape(-1, *kernels.shape[1:])


def _as_vit(model: ImageModel) -> ViT:
    if not isinstance(model, ViT):
        raise UserError(f"attention of this kind is defined for a ViT, not for a {type(model).__name__}.")
    return model
