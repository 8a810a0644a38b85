"""An explanation as pictures, one self-contained page, and a file of arrays: `write_explanation`."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from vitrail.checkpoints.storage import replace_file, write_file
from vitrail.config.preprocessing import Fit
from vitrail.explaining import ARRAYS, METHODS, Explanation, PictureExplanation
from vitrail.prediction import top_classes
from vitrail.report.attention import distance_chart
from vitrail.report.figures import (
    expert_mosaic,
    filter_mosaic,
    heat,
    is_small,
    mosaic,
    png_bytes,
    png_uri,
    similarity_mosaic,
    thumbnail,
    viridis,
)
from vitrail.report.page import write_page
from vitrail.report.sections import short_number

SIDE = 320  # pixels of a picture's longer side on the page
TILE = 44  # of one head's map
HEAT = ("relevance", "gradcam", "occlusion", "rollout")  # methods that give one map of the picture


@dataclass(frozen=True)
class _Figure:
    key: str
    """Ends its file's name."""
    title: str
    caption: str
    pixels: UInt8[np.ndarray, "h w c"]
    crisp: bool = False
    """Whether it is enlarged without smoothing."""


def write_explanation(explanation: Explanation, folder: str | Path, *, title: str) -> dict[str, Any]:
    """Write `explain.html`, `explain.npz` and, in `pictures`, a PNG of everything shown. Files of these names go.

    Args:
        explanation: Of `vitrail.explain`.
        folder: Where to write; made when it is not there.
        title: Heading of the page.

    Returns:
        What was written, and what the model says of each picture, as plain values.

    Raises:
        UserError: When a file cannot be written.
    """
    folder = Path(folder)
    sections, told = [], []
    for number, picture in enumerate(explanation.pictures, start=1):
        figures = list(_figures(picture, explanation.model.preprocessing.fit))
        stem = f"pictures/{number:03d}-{_plain(Path(picture.name).stem)}"
        files = _write_figures(folder, stem, figures)
        sections.append(_section(explanation, picture, figures))
        told.append({"name": picture.name, **_told(explanation, picture), "files": files})
    learned = list(_learned_figures(explanation))
    arrays = explanation.arrays()
    replace_file(folder / "explain.npz", lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    write_page(
        folder / "explain.html",
        "explain.html.jinja",
        title=title,
        lead=_lead(explanation),
        heat=any(method in HEAT for method in explanation.methods),
        pictures=sections,
        learned=[_shown(figure) for figure in learned],
        distance=_distance(explanation),
        arrays=[(name, " x ".join(map(str, array.shape)), *_meaning(name)) for name, array in arrays.items()],
        problems=explanation.problems,
    )
    return {
        "page": str(folder / "explain.html"),
        "arrays": str(folder / "explain.npz"),
        "methods": list(explanation.methods),
        "pictures": told,
        "files": _write_figures(folder, "pictures/model", learned),
        "broken": [{"name": name, "reason": reason} for name, reason in explanation.problems],
    }


def _figures(picture: PictureExplanation, fit: Fit) -> Iterator[_Figure]:
    """Yield what is shown of one picture: it, what the model saw, and the maps."""
    original, seen = picture.original, picture.seen
    yield _Figure("original", "Picture", "As it came, upright.", thumbnail(original, SIDE), is_small(original))
    made = {"crop": "cropped", "pad": "padded", "squash": "squashed"}[fit]
    size = f"{seen.shape[0]} x {seen.shape[1]}"
    yield _Figure("seen", "What the model saw", f"Resized and {made} to {size} pixels.", seen, is_small(seen))
    for method in HEAT:
        if method in picture.maps:
            positive = picture.maps[method].clip(min=0.0)
            yield _Figure(method, METHODS[method].title, METHODS[method].caption, heat(picture.seen, positive, SIDE))
    for name, experts in picture.maps.items():
        if name.startswith("experts_"):
            block = name.removeprefix("experts_")
            pixels = expert_mosaic(picture.seen, experts[0], picture.maps[f"kept_{block}"][0], SIDE)
            yield _Figure(f"experts-{block}", f"Experts of block {int(block)}", METHODS["experts"].caption, pixels)
    yield from _attention_figures(picture)


def _attention_figures(picture: PictureExplanation) -> Iterator[_Figure]:
    """Yield the heads' maps, a row per block; blocks in a row with maps of the same shape share a figure."""
    maps = [(name.removeprefix("attention_"), x) for name, x in picture.maps.items() if name.startswith("attention_")]
    for _, group in itertools.groupby(maps, key=lambda item: (item[0] == "pool", item[1].shape)):
        names, views = zip(*group, strict=True)
        if names == ("pool",):
            title, key, note = "Attention pooling", "attention-pool", "The heads that read for the classifier."
        else:
            first, last = int(names[0]), int(names[-1])
            title = f"Attention of block {first}" if first == last else f"Attention of blocks {first} to {last}"
            key = f"attention-{first:02d}-{last:02d}"
            note = "Rows are blocks, from input to output; columns are heads."
        tiles = np.stack([_coloured(view) for view in views])
        pixels = mosaic(tiles, times=max(1, TILE // max(tiles.shape[2:4])))
        yield _Figure(key, title, f"{note} {METHODS['attention'].caption}", pixels, True)


def _coloured(view: Float[np.ndarray, "heads rows columns"]) -> UInt8[np.ndarray, "heads rows columns 3"]:
    return viridis(view / np.maximum(view.max(axis=(1, 2), keepdims=True), 1e-12))


def _learned_figures(explanation: Explanation) -> Iterator[_Figure]:
    draw = {"positions": similarity_mosaic, "filters": filter_mosaic}
    for name, array in explanation.learned.items():
        yield _Figure(name, METHODS[name].title, METHODS[name].caption, draw[name](array), True)


def _distance(explanation: Explanation) -> dict[str, str] | None:
    """Return the chart of mean attention distance over the pictures."""
    found = [picture.maps["distance"] for picture in explanation.pictures if "distance" in picture.maps]
    if not found:
        return None
    count, method = len(found), METHODS["distance"]
    over = f"Over {count} pictures, in the mean." if count > 1 else "Of one picture; more make it surer."
    chart = distance_chart(torch.from_numpy(np.mean(found, axis=0)))
    return {"title": method.title, "caption": f"{method.caption} {over}", "chart": chart}


def _section(explanation: Explanation, picture: PictureExplanation, figures: list[_Figure]) -> dict[str, Any]:
    answers, number = list(_answers(explanation, picture)), picture.explained
    if number is not None and (explained := explanation.label(number)) not in dict(answers):
        answers.append((explained, float(picture.probabilities[number])))
    frames, wide = figures[:2], [figure for figure in figures if figure.key.startswith("attention-")]
    return {
        "name": Path(picture.name).name,
        "path": picture.name,
        "explained": None if number is None else explanation.label(number),
        "answers": [(label, f"{share:.1%}", f"{100 * share:.1f}%") for label, share in answers],
        "frames": [_shown(figure) for figure in frames],
        "maps": [_shown(figure) for figure in figures[2 : len(figures) - len(wide)]],
        "attention": [_shown(figure) for figure in wide],
    }


def _told(explanation: Explanation, picture: PictureExplanation) -> dict[str, Any]:
    """Return the answer to a picture, and the class that is explained, as plain values."""
    answers = [{"label": label, "probability": round(p, 6)} for label, p in _answers(explanation, picture)]
    number = picture.explained
    if number is None:
        return {"explained": None, "probability": None, "labels": answers}
    share = round(float(picture.probabilities[number]), 6)
    return {"explained": explanation.label(number), "probability": share, "labels": answers}


def _shown(figure: _Figure) -> dict[str, Any]:
    return {
        "title": figure.title,
        "caption": figure.caption,
        "uri": png_uri(figure.pixels),
        "crisp": figure.crisp,
    }


def _answers(explanation: Explanation, picture: PictureExplanation) -> tuple[tuple[str, float], ...]:
    return top_classes(picture.probabilities, explanation.model.class_names, 5)


def _lead(explanation: Explanation) -> str:
    model, count = explanation.model, len(explanation.pictures)
    number, _ = short_number(sum(parameter.numel() for parameter in model.parameters()))
    pictures = f"{count} picture{'s' * (count != 1)}"
    kind = type(model).__name__
    return f"What {'an' if kind[0] in 'AEIOU' else 'a'} {kind} of {number} parameters makes of {pictures}, and by what."


def _meaning(name: str) -> tuple[str, str]:
    return ARRAYS[name] if name in ARRAYS else ARRAYS[name.rpartition("_")[0]]


def _write_figures(folder: Path, stem: str, figures: list[_Figure]) -> dict[str, str]:
    """Write figures as PNG files and return their paths by key."""
    files = {figure.key: folder / f"{stem}-{figure.key}.png" for figure in figures}
    for figure in figures:
        write_file(files[figure.key], png_bytes(figure.pixels))
    return {key: str(path) for key, path in files.items()}


def _plain(stem: str) -> str:
    """Return a name that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-")[:60] or "picture"
