"""What there is to be seen of a model, and which families show it."""

from collections.abc import Sequence
from dataclasses import dataclass

from vitrail.errors import UserError, did_you_mean
from vitrail.models import CoAtNet, CvT, EfficientNet, ImageModel, ViT, ViTMoE, WideResNet

PLACES = {"relevance", "rollout", "attention", "distance"}
"""Methods that follow tokens through all blocks."""
SMALLEST_FILTER = 4
"""Pixels along a side; principal components of smaller filters show nothing that a person could read."""


@dataclass(frozen=True)
class Method:
    """One way to look at a model."""

    title: str
    """Its name on a page."""
    caption: str
    """What is to be seen."""
    families: tuple[type[ImageModel], ...] = (ImageModel,)
    """Those that can be looked at in this way, subclasses included."""
    of_class: bool = False
    """Whether it explains one class, so that the model needs a head."""
    default_for: tuple[type[ImageModel], ...] = (ImageModel,)
    """Of them, those of which a person sees it without having asked."""


METHODS: dict[str, Method] = {
    "relevance": Method(
        "Relevance",
        "What speaks for the class: attention weighted by its gradients, through all blocks (Chefer et al., 2021).",
        (ViT,),
        of_class=True,
    ),
    "gradcam": Method(
        "Grad-CAM",
        "Where the features of the last convolutions speak for the class (Selvaraju et al., 2017).",
        (CvT, CoAtNet, EfficientNet, WideResNet),
        of_class=True,
    ),
    "occlusion": Method(
        "Occlusion",
        "Where the class loses most when the picture is hidden, square by square (Zeiler and Fergus, 2014).",
        of_class=True,
        default_for=(CvT, CoAtNet),
    ),
    "rollout": Method(
        "Attention rollout",
        "What flows into the answer, whatever it is: attention through all blocks (Abnar and Zuidema, 2020).",
        (ViT,),
    ),
    "experts": Method(
        "Experts",
        "Which expert took which patch; a colour and a number are an expert, dark patches were dropped.",
        (ViTMoE,),
    ),
    "attention": Method(
        "Attention, head by head",
        "Where each head looks. Every map has a scale of its own, from nothing (violet) to its maximum (yellow).",
        (ViT, CvT, CoAtNet),
    ),
    "positions": Method(
        "Position embeddings",
        "One small map per patch of the picture: yellow where another place's embedding is like its own (cosine "
        "similarity). Neighbours alike mean that the model has learned the grid.",
        (ViT,),
    ),
    "filters": Method(
        "Filters",
        "Principal components of what the first layer looks for, the strongest first. Smooth waves and edges are a "
        "good sign, noise is not.",
    ),
    "distance": Method(
        "Attention distance in pixels",
        "How far each head looks. Low heads look near, high heads see the whole picture.",
        (ViT,),
    ),
}
"""By the name that a person gives, in the order of a page."""


def choose_methods(model: ImageModel, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the methods to look at a model by, in the order of `METHODS`: those asked for, or the family's default.

    By default all that show something, but occlusion, which asks the model some hundred times, only of families where
    nothing else can be trusted to point at what decides (`benchmarks/results/pointing.md`).

    Raises:
        UserError: When there is no such method, or the model cannot be looked at in this way.
    """
    if not names:
        fitting = [name for name in METHODS if why_not(name, model) is None]
        return tuple(name for name in fitting if isinstance(model, METHODS[name].default_for))
    for name in names:
        if name not in METHODS:
            raise UserError(
                f"there is no method {name!r}.{did_you_mean(name, METHODS)} There are: {', '.join(METHODS)}."
            )
        if (reason := why_not(name, model)) is not None:
            others = [other for other in METHODS if why_not(other, model) is None]
            raise UserError(f"{name} {reason}. Of this model there are: {', '.join(others) or 'none'}.")
    return tuple(name for name in METHODS if name in names)


def require_head(model: ImageModel) -> None:
    """Raise UserError for a model that knows no classes."""
    if model.head is None:
        raise UserError(f"this {type(model).__name__} has no classifier, so no class can be explained.")


def why_not(name: str, model: ImageModel) -> str | None:
    """Return why a method cannot show anything of a model, or None when it can."""
    method, kind = METHODS[name], type(model).__name__
    if not isinstance(model, method.families):
        return f"is for {' and '.join(family.__name__ for family in method.families)}, not for {kind}"
    if method.of_class and model.head is None:
        return f"explains a class, and this {kind} has no classifier"
    if name in PLACES and isinstance(model, ViT) and model.config.merge_tokens:
        return f"needs tokens to have places, and this {kind} merges them (load it with merge_tokens=0)"
    if name == "filters":
        height, width = model.state_dict()[model.input_kernel].shape[2:]
        if min(height, width) < SMALLEST_FILTER:
            return f"shows nothing of first filters of {height} x {width} pixels, as those of this {kind}"
    return None
