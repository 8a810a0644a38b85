"""The page's section about what a ViT looks at and has learned: figures 6 and 7 of its paper (arXiv 2010.11929)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.data.base import Source
from vitrail.data.view import evaluation_view
from vitrail.explaining import attention_distance, patch_filters, patch_rollout, position_similarity
from vitrail.metrics import Answer, Evaluation
from vitrail.models import ImageModel, ViT
from vitrail.report.charts import Series, line_chart
from vitrail.report.figures import filter_mosaic, is_small, png_uri, similarity_mosaic, spotlight, thumbnail
from vitrail.report.sections import picture_of

RIGHT, WRONG = 4, 2  # pictures with an overlay
SAMPLE = 32  # pictures behind the mean attention distance; the paper takes 128
SIDE = 120  # pixels of an overlay's longer side


def attention_section(evaluation: Evaluation, source: Source, model: ImageModel) -> dict[str, Any] | None:
    """Return overlays, position similarity, filters and attention distance; None for models other than ViTs.

    None, too, for ViTs that merge tokens: those have no place in the picture.
    """
    if not isinstance(model, ViT) or model.config.merge_tokens:
        return None
    shown = evaluation.right(RIGHT) + evaluation.worst(WRONG)
    overlays = [_overlay(answer, source, model) for answer in shown]
    count = min(SAMPLE, len(evaluation))
    sample = [evaluation.answer(i * len(evaluation) // count) for i in range(count)]
    similarity = position_similarity(model).cpu().numpy()
    return {
        "overlays": overlays,
        "positions": png_uri(similarity_mosaic(similarity)) if similarity.size > 1 else None,
        "lowest": f"{similarity.min():.2f}".replace("-", "\u2212"),
        # A stem's first kernels are too small to show anything.
        "filters": png_uri(filter_mosaic(patch_filters(model).cpu().numpy())) if model.stem is None else None,
        "distance": distance_chart(_mean_distance(sample, source, model)),
        "sample": len(sample),
    }


def _overlay(answer: Answer, source: Source, model: ViT) -> dict[str, Any]:
    pixels = picture_of(answer, source, model)
    relevance = patch_rollout(model, _input(answer, source, model))[0].float().cpu().numpy()
    return {
        "picture": png_uri(thumbnail(pixels, SIDE)),
        "crisp": is_small(pixels),
        "lit": png_uri(spotlight(pixels, relevance, SIDE)),
        "name": answer.name,
        "truth": answer.truth,
        "predicted": answer.predicted,
    }


def _mean_distance(sample: list[Answer], source: Source, model: ViT) -> Float[Tensor, "layers heads"]:
    """One picture at a time: the attention of a large model to several may not fit into memory."""
    patch, grid = model.config.cell, model.config.grid_at(model.preprocessing.image_size)
    distances = [attention_distance(model.attention(_input(answer, source, model)), grid, patch) for answer in sample]
    return torch.stack(distances).mean(dim=0).cpu()


def distance_chart(distance: Float[Tensor, "layers heads"]) -> str:
    """Return how far each head looks, by depth, as a chart (ViT paper, figure 7 right)."""
    heads = [(layer + 1, value) for layer, row in enumerate(distance.tolist()) for value in row]
    means = [(layer + 1, value) for layer, value in enumerate(distance.mean(dim=1).tolist())]
    series = [Series("one head", heads, dots=True), Series("mean of heads", means)]
    label = "Mean attention distance in pixels of each head, by depth."
    return line_chart(series, label=label, x_label="block, from input to output", categories=True, from_zero=True)


def _input(answer: Answer, source: Source, model: ViT) -> Float[Tensor, "1 c h w"]:
    view = evaluation_view(source.load(answer.index), model.preprocessing)
    return view[None].to(next(model.parameters()).device)
