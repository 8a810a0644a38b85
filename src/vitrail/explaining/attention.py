"""Where attention goes: per head and block, rolled out through all blocks, and how far it reaches.

Figures 6 and 7 of the ViT paper (Dosovitskiy et al., 2021, arXiv 2010.11929). Attention is computed a second time,
beside the fused kernels, by `ImageModel.attention`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.errors import UserError
from vitrail.models import CoAtNet, CvT, ImageModel, ViT
from vitrail.models.cvt import Stage

Grid = tuple[int, int]


def attention_views(
    model: ImageModel, images: Float[Tensor, "b c h w"]
) -> Iterator[Float[Tensor, "b heads rows columns"]]:
    """Yield, block by block, how much every place of the picture is looked at, per head.

    By the class token in blocks that have one, else by all places, in the mean. What a class token keeps for itself is
    left out: it is what a map lacks to a sum of 1. CvT's maps have half as many rows and columns as its tokens.

    Raises:
        UserError: When the family has no attention.
    """
    maps = model.attention(images)  # refuses families without attention before their grids are asked for
    for rows, columns in _key_grids(model, (images.shape[2], images.shape[3])):
        with torch.no_grad():  # not around `yield`, where it would go on for whoever reads
            weights = next(maps)
            class_token = weights.shape[3] > rows * columns
            seen = weights[:, :, 0, 1:] if class_token else weights.mean(dim=2)
        yield rearrange(seen, "b heads (h w) -> b heads h w", h=rows)


@torch.no_grad()
def pooling_views(model: ImageModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads rows columns"] | None:
    """Return where each head of attention pooling looks when it reads for the classifier, None without such."""
    if not isinstance(model, ViT) or model.attention_pool is None:
        return None
    return on_grid(model.attention_pool.weights(model.tokens(images))[:, :, 0], model, images)


@torch.no_grad()
def pooling_weights(model: ImageModel, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Return the share that each of the encoder's output tokens has in the vector which the head classifies.

    The class token alone; all patches alike; half of it so, half by the channels in which a patch is the maximum; or
    what the probe of attention pooling attends to (mean over heads).

    Raises:
        UserError: When the model is not a ViT.
    """
    vit = as_vit(model)
    return token_shares(vit, vit.tokens(images))


def token_shares(model: ViT, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n"]:
    """Return `pooling_weights` of the encoder's output tokens."""
    if model.attention_pool is not None:
        return model.attention_pool.weights(tokens).mean(dim=1)[:, 0]
    weights = tokens.new_zeros(tokens.shape[:2])
    if model.class_token is not None:
        weights[:, 0] = 1.0
        return weights
    weights += 1.0 / weights.shape[1]
    if model.config.pool == "gap+max":
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
    vit = as_vit(model)
    patches = on_grid(rollout(vit.attention(images), pooling_weights(vit, images)), vit, images)
    return patches / patches.sum(dim=(1, 2), keepdim=True)


@torch.no_grad()
def attention_distance(
    maps: Iterable[Float[Tensor, "b heads n n"]], grid: Grid, patch: tuple[int, int]
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


def on_grid(
    tokens: Shaped[Tensor, "*axes n"], model: ViT, images: Float[Tensor, "b c h w"]
) -> Shaped[Tensor, "*axes rows columns"]:
    """Return values of a ViT's tokens on its grid of patches; that of a class token is left out."""
    rows, columns = model.config.grid_at((images.shape[2], images.shape[3]))
    return rearrange(tokens[..., -rows * columns :], "... (h w) -> ... h w", h=rows)


def as_vit(model: ImageModel) -> ViT:
    """Return the model, which must be a ViT (a V-MoE is one).

    Raises:
        UserError: When it is not.
    """
    if not isinstance(model, ViT):
        raise UserError(f"attention of this kind is defined for ViT, not for {type(model).__name__}.")
    return model


def _key_grids(model: ImageModel, image_size: tuple[int, int]) -> list[Grid]:
    """Return rows and columns of what each attention block looks at, input to output."""
    match model:
        case ViT():
            return [model.config.grid_at(image_size)] * model.config.depth
        case CvT():
            grids, grid = list[Grid](), image_size
            for stage in (cast(Stage, stage) for stage in model.stages):
                grid = _after(stage.patch_embed.conv, grid)
                grids += [_after(block.attention.key.conv, grid) for block in stage.blocks()]
            return grids
        case CoAtNet():
            s3, s4 = replace(model.config, image_size=image_size).grids
            return [s3] * model.config.depths[2] + [s4] * model.config.depths[3]
        case _:
            raise UserError(f"where the attention of {type(model).__name__} lies in the picture is not known.")


def _after(conv: nn.Conv2d, grid: Grid) -> Grid:
    """Return rows and columns of what a convolution makes of a map."""
    sizes = zip(grid, conv.padding, conv.kernel_size, conv.stride, strict=True)
    rows, columns = ((side + 2 * int(padding) - kernel) // stride + 1 for side, padding, kernel, stride in sizes)
    return rows, columns
