"""Which places an answer depends on, told by hiding them."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vitrail.explaining.methods import require_head
from vitrail.models import ImageModel

MOST_CELLS, SMALLEST_CELL = 14, 4
"""Cells along a side of a picture, and pixels along a side of a cell."""
WINDOW = 2
"""Cells along a side of what is hidden at once."""


@torch.no_grad()
def occlusion(
    model: ImageModel,
    images: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    cells: tuple[int, int] | None = None,
    window: int = WINDOW,
    batch_size: int = 32,
) -> Float[Tensor, "b rows columns"]:
    """Return how much log-probability a class loses, in nats, where the picture is hidden.

    Zeiler and Fergus, 2014, arXiv 1311.2901, section 4.2: a square of mean colour slides over the picture, also partly
    beyond its border, so that every cell is hidden equally often. The value of a cell is the mean over the squares that
    cover it. It is negative where the picture speaks against the class.

    Args:
        model: A model in evaluation mode, with a head. It is asked (rows + window - 1) x (columns + window - 1) times.
        images: Pictures, normalised: mean colour is 0.
        labels: The class to ask about, of each.
        cells: Rows and columns of the result; by default 14 along a side, but cells of at least 4 pixels.
        window: Side of the square, in cells.
        batch_size: Pictures per forward pass.

    Raises:
        UserError: When the model has no head.
    """
    require_head(model)
    height, width = images.shape[2:]
    rows, columns = cells or (_cells(height), _cells(width))
    hidden = _hidden(height, rows, window)[:, None, :, None] & _hidden(width, columns, window)[:, None]
    hidden = rearrange(hidden, "i j h w -> (i j) 1 h w").to(images.device)
    maps = []
    for image, label in zip(images, labels.tolist(), strict=True):
        whole = _log_probability(model, image[None], label)
        parts = [
            _log_probability(model, image.masked_fill(some, 0.0), label)  # one copy of the picture per square
            for some in hidden.split(batch_size)
        ]
        lost = rearrange(whole - torch.cat(parts), "(i j) -> 1 i j", i=rows + window - 1)
        maps.append(F.avg_pool2d(lost, window, stride=1))
    return torch.cat(maps)


def _hidden(side: int, cells: int, window: int) -> Bool[Tensor, "squares side"]:
    """Return which pixels along one axis each position of the square hides."""
    edges = torch.linspace(0, side, cells + 1, device="cpu").round()
    cell_of = torch.bucketize(torch.arange(side, device="cpu"), edges[1:], right=True)
    last = torch.arange(cells + window - 1, device="cpu")[:, None]
    return (cell_of <= last) & (cell_of > last - window)


def _cells(side: int) -> int:
    return max(1, min(MOST_CELLS, side // SMALLEST_CELL))


def _log_probability(model: ImageModel, images: Tensor, label: int) -> Float[Tensor, " b"]:
    logits = model(images).float()
    return F.logsigmoid(logits[:, label]) if model.multi_label else F.log_softmax(logits, dim=1)[:, label]
