"""Which expert took which patch, in the mixtures of a V-MoE (Riquelme et al., 2021, arXiv 2106.05974)."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.errors import UserError
from vitrail.explaining.attention import on_grid
from vitrail.models import ImageModel, ViTMoE


class ExpertMap(NamedTuple):
    """Where one mixture sent the patches of pictures; the first choice of each patch comes first."""

    experts: Int[Tensor, "b k rows columns"]
    """Numbers of the experts, from 0."""
    gates: Float[Tensor, "b k rows columns"]
    """What their answers are weighted by: softmax over all experts, so that they do not sum to 1 over the chosen."""
    kept: Bool[Tensor, "b k rows columns"]
    """Whether the expert had a place. Patches are dropped only with a `capacity_factor`."""


@torch.no_grad()
def expert_maps(model: ImageModel, images: Float[Tensor, "b c h w"]) -> dict[int, ExpertMap]:
    """Return by number of block, from 0, where its mixture of experts sent the patches.

    Raises:
        UserError: When the model is no V-MoE.
    """
    if not isinstance(model, ViTMoE):
        raise UserError(f"{type(model).__name__} has no experts; ViTMoE has.")
    _, routings = model.encode(images)
    maps = {}
    for number, routing in routings.items():
        parts = (rearrange(x, "b n k -> b k n") for x in (routing.experts, routing.gates, routing.kept))
        maps[number] = ExpertMap(*(on_grid(x, model, images) for x in parts))
    return maps
