"""What a model makes of some pictures, and by what: `explain`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from vitrail.config.preprocessing import Preprocessing
from vitrail.data.base import Picture, Resized
from vitrail.data.decode import read_picture
from vitrail.data.view import evaluation_view, view_pixels
from vitrail.errors import BrokenPicture, UserError, did_you_mean
from vitrail.explaining.attention import attention_distance, attention_views, patch_rollout, pooling_views
from vitrail.explaining.experts import expert_maps
from vitrail.explaining.gradients import grad_cam, relevance
from vitrail.explaining.learned import patch_filters, position_similarity
from vitrail.explaining.methods import choose_methods
from vitrail.explaining.occlusion import occlusion
from vitrail.metrics import probabilities
from vitrail.models import ImageModel, ViT
from vitrail.prediction import find_pictures

log = logging.getLogger("vitrail")

MOST = 64
"""Pictures at a time: their maps are held in memory, and a page of more is none to look at."""
SIDE = 448
"""Pixels of the longer side, at most, in which a picture as it came is kept."""
OF_MODEL = ("positions", "filters")
"""Methods that look at the model alone."""

ARRAYS: dict[str, tuple[str, str]] = {
    "names": ("pictures", "path of each picture"),
    "seen": ("pictures rows columns channels", "what the model saw, levels 0 to 255: the frame of all maps below"),
    "labels": ("classes", "names of the classes, where the model has them"),
    "probabilities": ("pictures classes", "the model's answer"),
    "explained": ("pictures", "number of the class that relevance, gradcam and occlusion explain"),
    "relevance": ("pictures rows columns", "0 or larger; no scale"),
    "gradcam": ("pictures rows columns", "0 or larger; no scale"),
    "occlusion": ("pictures rows columns", "log-probability lost, in nats; negative where hiding helps"),
    "rollout": ("pictures rows columns", "share of each patch; sum 1"),
    "experts": ("pictures choices rows columns", "number of the expert, from 0, first choice first; one array a block"),
    "gates": ("pictures choices rows columns", "weight of its answer"),
    "kept": ("pictures choices rows columns", "false where the expert had no place"),
    "attention": (
        "pictures heads rows columns",
        "by the class token, which keeps the rest to 1, else mean over all places; one array a block with attention, "
        "attention_pool for attention pooling",
    ),
    "positions": ("rows columns rows columns", "cosine similarity of two places' embeddings"),
    "filters": ("filters channels rows columns", "principal components, of norm 1"),
    "distance": ("pictures blocks heads", "mean attention distance in pixels"),
    "problem_names": ("problems", "pictures that could not be read"),
    "problem_reasons": ("problems", "why not"),
}
"""Shape and meaning of every array of `Explanation.arrays`; `experts_02` is that of the second block, and so on."""


@dataclass(frozen=True)
class PictureExplanation:
    """What a model makes of one picture."""

    name: str
    """Path of the picture."""
    original: Picture
    """As it came, upright; large ones shrunk."""
    seen: Resized
    """As the model saw it: resized, cropped."""
    probabilities: Float32[np.ndarray, " classes"]
    """The answer; empty without a classifier."""
    explained: int | None
    """Number of the class that is explained; None without a classifier."""
    maps: dict[str, np.ndarray]
    """The arrays of `ARRAYS` about this picture, without their first axis."""


@dataclass(frozen=True)
class Explanation:
    """What a model makes of some pictures."""

    model: ImageModel
    """The model."""
    methods: tuple[str, ...]
    """What was looked at; keys of `METHODS`."""
    pictures: list[PictureExplanation]
    """In the order found."""
    problems: list[tuple[str, str]]
    """Pictures that could not be read, and why."""
    learned: dict[str, np.ndarray] = field(default_factory=dict)
    """`positions` and `filters`, as far as they were asked for."""

    def label(self, number: int) -> str:
        """Return the name of a class."""
        return self.model.class_names[number]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything as arrays: see `ARRAYS`."""
        shown = self.pictures
        broken, reasons = zip(*self.problems, strict=True) if self.problems else ((), ())
        arrays = {
            "names": np.array([picture.name for picture in shown], np.str_),
            "labels": np.array(self.model.labels, np.str_),
            "problem_names": np.array(broken, np.str_),
            "problem_reasons": np.array(reasons, np.str_),
            **self.learned,
        }
        if shown:
            arrays |= {
                "seen": np.stack([picture.seen for picture in shown]),
                "probabilities": np.stack([picture.probabilities for picture in shown]),
                "explained": np.array([-1 if p.explained is None else p.explained for p in shown], np.int64),
                **{name: np.stack([picture.maps[name] for picture in shown]) for name in shown[0].maps},
            }
        return arrays


def explain(
    model: ImageModel, pictures: Sequence[str | Path], *, methods: Sequence[str] = (), label: str | None = None
) -> Explanation:
    """Look at how a model comes to its answers.

    Attention is computed beside the fused kernels, which the model goes on using. Maps lie on the picture as the model
    saw it: row i of R covers the rows from i / R to (i + 1) / R of it, and columns likewise.

    `vitrail.report.explanation.write_explanation` makes pictures, a page and a file of arrays of the result.

    Args:
        model: A trained model; its labels and preprocessing are used. Put into evaluation mode.
        pictures: Files, folders and globs; 64 pictures at most.
        methods: Keys of `METHODS`; by default what the family shows best.
        label: Name, or number, of the class to explain; by default each picture's likeliest.

    Raises:
        UserError: When a path does not exist, there are too many pictures, the model has no such class, or its family
            cannot be looked at in this way.
    """
    chosen = choose_methods(model, methods)
    wanted = None if label is None else class_number(model, label)
    paths = find_pictures(pictures)
    if len(paths) > MOST:
        raise UserError(f"{len(paths):,} pictures are more than the {MOST} that are explained at a time; name fewer.")
    model.eval()
    device, shown, problems = next(model.parameters()).device, list[PictureExplanation](), list[tuple[str, str]]()
    for path in paths:
        try:
            picture = read_picture(path, model.preprocessing.channels)
        except BrokenPicture as problem:
            problems.append((str(path), str(problem)))
            continue
        view = evaluation_view(picture, model.preprocessing)[None].to(device)
        shares = _answer(model, view)
        number = wanted if wanted is not None or not shares.size else int(shares.argmax())
        maps: dict[str, np.ndarray] = {}
        for method in chosen:
            maps |= {name: array.cpu().numpy() for name, array in _look(method, model, view, number).items()}
        seen = view_pixels(picture, model.preprocessing)
        original = _shrunk(picture, model.preprocessing)
        shown.append(PictureExplanation(str(path), original, seen, shares, number, maps))
    learned = {name: _look_inside(name, model) for name in chosen if name in OF_MODEL}
    return Explanation(model, chosen, shown, problems, learned)


def class_number(model: ImageModel, label: str) -> int:
    """Return the number of a class, from its name or, where no class has such a name, its number.

    Raises:
        UserError: When the model has no such class.
    """
    if label in model.labels:
        return model.labels.index(label)
    if label.isdecimal() and int(label) < model.config.num_classes:
        return int(label)
    known = f"It knows {', '.join(model.labels[:5])}{', ...' * (len(model.labels) > 5)}." if model.labels else ""
    raise UserError(
        f"the model has no class {label!r} among its {model.config.num_classes:,}."
        f"{did_you_mean(label, model.labels) or ' ' + known}"
    )


@torch.no_grad()
def _answer(model: ImageModel, view: Float[Tensor, "1 c h w"]) -> Float32[np.ndarray, " classes"]:
    if model.head is None:
        return np.zeros(0, np.float32)
    return probabilities(model(view).float().cpu().numpy(), model.multi_label)[0].astype(np.float32)


def _look(method: str, model: ImageModel, view: Float[Tensor, "1 c h w"], number: int | None) -> dict[str, Tensor]:
    """Return the maps of one picture by one method, under their names in `ARRAYS`."""
    label = torch.tensor([number or 0], device=view.device)
    match method:
        case "relevance":
            return {method: relevance(model, view, label)[0]}
        case "gradcam":
            return {method: grad_cam(model, view, label)[0]}
        case "occlusion":
            return {method: occlusion(model, view, label)[0]}
        case "rollout":
            return {method: patch_rollout(model, view)[0]}
        case "attention":
            views = enumerate(attention_views(model, view), start=1)
            maps = {f"attention_{block:02d}": seen[0] for block, seen in views}
            pooling = pooling_views(model, view)
            return maps if pooling is None else {**maps, "attention_pool": pooling[0]}
        case "experts":
            return {
                f"{name}_{block + 1:02d}": array[0]
                for block, found in expert_maps(model, view).items()
                for name, array in found._asdict().items()
            }
        case "distance" if isinstance(model, ViT):
            size = (view.shape[2], view.shape[3])
            return {method: attention_distance(model.attention(view), model.config.grid_at(size), model.config.cell)}
        case _:
            return {}


def _look_inside(method: str, model: ImageModel) -> np.ndarray:
    look = {"positions": position_similarity, "filters": patch_filters}[method]
    return look(model).cpu().numpy()


def _shrunk(picture: Picture, preprocessing: Preprocessing) -> Picture:
    """Return a picture with at most `SIDE` pixels along its longer side."""
    scale = SIDE / max(picture.shape[:2])
    if scale >= 1:
        return picture
    rows, columns = (max(1, round(side * scale)) for side in picture.shape[:2])
    return view_pixels(picture, replace(preprocessing, image_size=(rows, columns), fit="squash"))
