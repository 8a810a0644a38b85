"""What a model has learned about positions and patches: figure 7, left and centre, of the ViT paper.

Dosovitskiy et al., 2021, arXiv 2010.11929. No picture is needed.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vitrail.explaining.attention import as_vit
from vitrail.models import ImageModel


@torch.no_grad()
def position_similarity(model: ImageModel) -> Float[Tensor, "rows columns rows columns"]:
    """Return the cosine similarity of every patch position's embedding with every other's (ViT paper, figure 7 centre).

    Raises:
        UserError: When the model is not a ViT.
    """
    vit = as_vit(model)
    rows, _ = vit.config.grid
    _, table = vit.position_rows(vit.config.grid)
    unit = F.normalize(table[0].float(), dim=-1)
    return rearrange(unit @ unit.mT, "(h w) (i j) -> h w i j", h=rows, i=rows)


@torch.no_grad()
def patch_filters(model: ImageModel, count: int = 28) -> Float[Tensor, "k c h w"]:
    """Return the leading principal components of the filters that read the picture (ViT paper, figure 7 left).

    Each has norm 1 and the sign that makes its largest weight positive. There are at most as many as a patch has
    values, and as there are filters.
    """
    kernels = model.state_dict()[model.input_kernel].float()
    flat = rearrange(kernels, "d c h w -> d (c h w)")
    components = torch.linalg.svd(flat - flat.mean(dim=0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return (components * largest.sign()).reshape(-1, *kernels.shape[1:])
