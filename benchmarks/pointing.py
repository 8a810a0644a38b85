"""The pointing game: does each method point at the object that decides? About 15 minutes on one core.

    python benchmarks/pointing.py

Small models learn to name an object that is planted somewhere in a photo. Then every method of `vitrail explain` tells
where it sees evidence for the object's class; it wins a picture when its maximum lies in the object's box (Zhang et
al., 2016, arXiv 1608.00507, section 4.2, without tolerance).
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from machine import table, write_result
from torch import Tensor

from vitrail.checkpoints import load_model
from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.cvt import CvTConfig
from vitrail.config.model import ModelConfig
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig
from vitrail.config.vit import ConvStem, ViTConfig
from vitrail.config.wide_resnet import WideResNetConfig
from vitrail.data import read_parts
from vitrail.data.base import Source
from vitrail.data.view import evaluation_view
from vitrail.evaluation import predict_logits
from vitrail.explaining import attention_views, grad_cam, occlusion, patch_rollout, relevance
from vitrail.metrics import wilson_interval
from vitrail.models import ImageModel, ViT, WideResNet
from vitrail.training import run_training

SIDE, SMALLEST, LARGEST = 48, 12, 18  # pixels of a picture, and of an object
TARGET = 0.8
NOISE = 12.0  # on the colours of an object
SHOWN = ("relevance", "Grad-CAM", "occlusion")
"""Methods that say that they explain a class, which are held to the target."""

PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda y, x: y // 3 % 2,
    "bars": lambda y, x: x // 3 % 2,
    "checks": lambda y, x: (y // 4 + x // 4) % 2,
    "rings": lambda y, x: np.hypot(y - y.mean(), x - x.mean()).astype(int) // 3 % 2,
}
KINDS: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int]]] = {
    "red stripes": ("stripes", (205, 40, 40), (250, 225, 130)),
    "red rings": ("rings", (205, 40, 40), (250, 225, 130)),
    "blue checks": ("checks", (40, 60, 205), (150, 230, 240)),
    "blue bars": ("bars", (40, 60, 205), (150, 230, 240)),
    "green rings": ("rings", (30, 130, 50), (210, 240, 120)),
    "purple stripes": ("stripes", (130, 40, 150), (250, 170, 220)),
    "orange checks": ("checks", (235, 120, 10), (60, 40, 20)),
    "teal bars": ("bars", (10, 140, 140), (250, 250, 250)),
}
GREY = ((70, 70, 70), (180, 180, 180))

SETTINGS = {"image_size": (SIDE, SIDE), "num_classes": len(KINDS)}
LARGER = {**SETTINGS, "image_size": (2 * SIDE, 2 * SIDE)}  # their last maps would be 3 x 3
VIT = ViTConfig(
    **SETTINGS, stem=ConvStem(filters=16, widths=(24,)), patch_size=(3, 3), width=96, depth=4, mlp_dim=192, heads=4
)
STEPS = {"CvT": 1500, "CoAtNet": 1500}  # of 64 pictures; 500 for the others, which learn sooner
MODELS: dict[str, ModelConfig] = {
    "ViT, class token": VIT,
    "ViT, mean of patches": replace(VIT, pool="gap"),
    "CvT": CvTConfig(**LARGER, widths=(16, 32, 64), depths=(1, 1, 3), heads=(1, 1, 2), mlp_dims=(32, 64, 128)),
    "CoAtNet": CoAtNetConfig(**LARGER, widths=(16, 16, 32, 48, 64), depths=(1, 1, 2, 1), head_dim=16),
    "Wide-ResNet": WideResNetConfig(**SETTINGS, stem_width=16, widths=(16, 32, 64), depths=(1, 1, 1)),
}


@dataclass(frozen=True)
class Planted:
    """Photos, each with an object that decides and a grey one that says nothing."""

    pictures: UInt8[np.ndarray, "n h w 3"]
    kinds: Int[np.ndarray, " n"]
    boxes: Int[np.ndarray, "n 4"]
    """Top, left, height and width of the object that decides."""


TEXT = """\
{pictures} pieces of photos of {side} x {side} pixels, each with an object of one of {kinds} kinds that decides and a
grey one that says nothing, at places that are all alike likely. Models learn from 8,000 others from scratch: CvT and
CoAtNet in 1,500 updates of 64 pictures, the others in 500. A method wins a picture when its largest value lies in the
object's box (pointing game; Zhang et al., 2016, arXiv 1608.00507); chance is {chance}. In bold what explains a class.
Rollout and attention tell what flows into the answer, whatever it is. The best method of each model points at the
object in at least {least:.1%} of the pictures (at least {target:.0%}: {reached}).

{results}
"""


def plant(photos: Source, count: int, seed: int) -> Planted:
    """Return pieces of photos with objects at places that are all alike likely, and do not touch each other."""
    rng = np.random.default_rng(seed)
    pictures, kinds, boxes = [], rng.integers(0, len(KINDS), count), []
    for kind in kinds:
        photo = photos.load(int(rng.integers(len(photos))))
        top, left = (int(rng.integers(side - SIDE + 1)) for side in photo.shape[:2])
        picture = photo[top : top + SIDE, left : left + SIDE].copy()
        box, other = _apart(rng)
        pattern, *colours = list(KINDS.values())[kind]
        _paint(picture, box, colours, PATTERNS[pattern], rng)
        _paint(picture, other, GREY, list(PATTERNS.values())[rng.integers(len(PATTERNS))], rng)
        pictures.append(picture)
        boxes.append(box)
    return Planted(np.stack(pictures), kinds.astype(np.int64), np.array(boxes))


def _apart(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return two boxes that do not touch."""
    while True:
        sides = rng.integers(SMALLEST, LARGEST + 1, (2, 1)).repeat(2, axis=1)
        corners = rng.integers(0, SIDE - sides + 1)
        ends = corners + sides
        if (corners[0] > ends[1]).any() or (corners[1] > ends[0]).any():
            first, second = np.concatenate([corners, sides], axis=1)
            return first, second


def _paint(picture: np.ndarray, box: np.ndarray, colours: Sequence, draw: Callable, rng: np.random.Generator) -> None:
    top, left, height, width = box
    y, x = np.mgrid[:height, :width]
    shift = rng.integers(0, 12, 2)
    levels = np.array(colours)[draw(y + shift[0], x + shift[1])] + rng.normal(0, NOISE, (height, width, 3))
    disc = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) <= height / 2
    inside = disc if rng.random() < 0.5 else np.ones_like(disc)
    part = picture[top : top + height, left : left + width]
    part[inside] = levels.clip(0, 255).astype(np.uint8)[inside]


def train(config: ModelConfig, data: Path, out: Path, steps: int) -> ImageModel:
    """Return a model trained from scratch on pictures with objects."""
    run = RunConfig(
        data=str(data),
        out=str(out),
        model=config,
        input=InputConfig(workers=0, crop_fraction=1.0),
        augment=AugmentConfig(crop="padded", policy="none", pad=3),
        optim=OptimConfig(lr=2e-3, warmup_steps=steps // 10),
        loop=LoopConfig(batch_size=64, steps=steps, precision="fp32"),
    )
    return load_model(run_training(run).folder / "best")


def maps_of(
    model: ImageModel, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"]
) -> Iterator[tuple[str, Float[Tensor, "b rows columns"]]]:
    """Yield every method that a model can be looked at by, and where it sees evidence."""
    if isinstance(model, ViT):
        yield "relevance", relevance(model, images, labels)
        yield "attention rollout", patch_rollout(model, images)
    else:
        yield "Grad-CAM", grad_cam(model, images, labels)
    yield "occlusion", occlusion(model, images, labels)
    if not isinstance(model, WideResNet):
        *_, last = attention_views(model, images)
        yield "attention of the last block", last.mean(dim=1)


def points_at(values: Float[Tensor, "rows columns"], box: Sequence[int]) -> bool:
    """Return whether the centre of the largest value's cell lies in the box."""
    cell = np.unravel_index(int(values.argmax()), values.shape)
    y, x = ((place + 0.5) * SIDE / cells for place, cells in zip(cell, values.shape, strict=True))
    top, left, height, width = box
    return bool(top <= y < top + height and left <= x < left + width)


def play(model: ImageModel, test: Planted) -> list[tuple[str, int]]:
    """Return by method in how many pictures it points at the object that decides."""
    images = torch.stack([evaluation_view(picture, model.preprocessing) for picture in test.pictures])
    labels, boxes = torch.from_numpy(test.kinds), test.boxes.tolist()
    return [
        (method, sum(points_at(one, box) for one, box in zip(values, boxes, strict=True)))
        for method, values in maps_of(model, images, labels)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="rehearse in seconds; nothing is written")
    asked = parser.parse_args(arguments)
    pictures, learned = (4, 64) if asked.tiny else (200, 8000)
    photos = read_parts("clothing")
    assert photos.test is not None
    learn, test = plant(photos.train, learned, 0), plant(photos.test, pictures, 1)
    rows, best = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        parts = {"x_train": learn.pictures, "y_train": learn.kinds, "x_val": test.pictures, "y_val": test.kinds}
        np.savez(data, allow_pickle=False, classes=np.array(list(KINDS)), **parts)
        played = read_parts(data).val
        assert played is not None
        for name, config in dict(list(MODELS.items())[:1] if asked.tiny else MODELS).items():
            model = train(config, data, Path(folder) / name, 2 if asked.tiny else STEPS.get(name, 500))
            answers = predict_logits(model, played).logits.argmax(axis=1)
            right = int((answers == test.kinds).sum())
            games = play(model, test)
            best.append(max(hits for method, hits in games if method in SHOWN) / pictures)
            for method, hits in games:
                low, high = wilson_interval(hits / pictures, pictures)
                shown = "**" if method in SHOWN else ""
                share = f"{shown}{hits / pictures:.1%}{shown}"
                rows.append((name, f"{right / pictures:.1%}", method, share, f"{low:.0%} to {high:.0%}"))
                print(*rows[-1], sep=" | ", flush=True)
    if asked.tiny:
        return
    height, width = test.boxes[:, 2:].T
    body = TEXT.format(
        kinds=len(KINDS),
        pictures=pictures,
        side=SIDE,
        least=min(best),
        target=TARGET,
        reached="reached" if min(best) >= TARGET else "missed",
        chance=f"{(height * width).mean() / SIDE**2:.1%}",
        results=table(("model", "accuracy", "method", "points at the object", "95 % interval"), rows),
    )
    print(write_result("pointing", "python benchmarks/pointing.py", body))


if __name__ == "__main__":
    main()
