"""A model and its evaluation view as one module: pictures as they come in, logits out."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from vitrail.config.preprocessing import Preprocessing
from vitrail.data.view import mean_levels, normalise, resize_matrices
from vitrail.models import ImageModel


class Classifier(nn.Module):
    """What an exported file computes.

    The view is `data.view.view_levels` with the picture's size unknown: the same filters (`resize_matrices`) as whole
    matrices, calculated from the size by the file itself, in 32 bits. On black and white dots, the worst there is, its
    levels are within 0.02 of 255 of those of `view_levels`.
    """

    mean: Tensor

    def __init__(self, model: ImageModel, dtype: torch.dtype = torch.float32) -> None:
        """Hold a model in evaluation mode whose parameters are of type `dtype`."""
        super().__init__()
        self.model, self.view, self.dtype = model, model.preprocessing, dtype
        # Before anything is traced, too: `normalise` keeps what it calculates once, and must not keep a tracer's.
        self.register_buffer("mean", mean_levels(self.view, torch.device("cpu")))

    def forward(self, images: UInt8[Tensor, "b height width c"]) -> Float[Tensor, "b classes"]:
        """Return the logits of pictures of one size, any size."""
        levels = view_of_any_size(images.permute(0, 3, 1, 2), self.view, self.mean)
        return self.model(normalise(levels, self.view).to(self.dtype)).float()


def view_of_any_size(
    images: UInt8[Tensor, "b c height width"], preprocessing: Preprocessing, mean: Float[Tensor, "c 1 1"]
) -> Float[Tensor, "b c rows columns"]:
    """Return what `view_levels` does, by operations that do not depend on the size of the pictures.

    Args:
        images: Pictures of one size.
        preprocessing: Of the model.
        mean: The border's colour, in levels.
    """
    rows, columns = preprocessing.image_size
    height, width = (torch.full((1,), size, dtype=torch.float32) for size in images.shape[2:])
    tall, broad = torch.full_like(height, rows), torch.full_like(width, columns)
    if preprocessing.fit == "pad":  # how many rows and columns of the view show the picture
        tall = (height * columns / width).round().clamp(1, rows)
        broad = (width * rows / height).round().clamp(1, columns)
    above, before = ((rows - tall) / 2).floor(), ((columns - broad) / 2).floor()
    # The view is a box of the picture, or reaches beyond it. Steps are pixels of the picture per pixel of the view.
    if preprocessing.fit == "crop":
        down = across = preprocessing.crop_fraction * torch.minimum(height / rows, width / columns)
        top, left = (height - rows * down) / 2, (width - columns * across) / 2
    else:
        down, across = height / tall, width / broad
        top, left = -above * down, -before * across
    vertical = resize_matrices(images.shape[2], rows, top, rows * down, preprocessing.interpolation)[0]
    horizontal = resize_matrices(images.shape[3], columns, left, columns * across, preprocessing.interpolation)[0]
    levels = (vertical @ (images.float() @ horizontal.mT).clamp(0.0, 255.0)).clamp(0.0, 255.0)
    if preprocessing.fit != "pad":
        return levels
    # Pixels of the border see nothing of the picture; the sums of their weights, by which those are divided, are 0.
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    inside = (row >= above) & (row < above + tall) & (column >= before) & (column < before + broad)
    return torch.where(inside, levels, mean)
