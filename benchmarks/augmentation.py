"""Augmentation of whole batches beside timm's picture by picture: the AugReg recipe at 224 and at 32 pixels.

    .venv-peers/bin/python benchmarks/augmentation.py
    .venv-peers/bin/python benchmarks/augmentation.py --tiny

Needs timm. Both sides start from decoded pictures and end with normalised batches and mixed targets: flip (at 32 pixels
pad-and-crop before), two operations of RandAugment at magnitude 10 that always act, mixup.
"""

import random
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from loaders import WORKERS, PillowArrays, best_of, epoch, stack
from machine import write_result
from PIL import Image, ImageOps
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import peers.conftest  # noqa: F401  defines what timm's import of torchvision needs
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup

from vitrail.benchmark.limits import photo
from vitrail.benchmark.timing import Timing, take_turns
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import AugmentConfig
from vitrail.data.arrays import ArraySource
from vitrail.data.augment import Augment
from vitrail.data.base import Batch
from vitrail.data.decode import decode
from vitrail.data.random import sample_keys
from vitrail.data.stream import Stream

CLASSES = 100
PAD = 4
CORES = 2
Transform = Callable[[Image.Image], Image.Image]


def main(arguments: Sequence[str]) -> None:
    """Measure, print, and write the result."""
    tiny = "--tiny" in arguments
    turns = 2 if tiny else 7
    torch.set_num_threads(1)
    rows = [
        per_core(224 if not tiny else 48, 4 if tiny else 64, turns, target=1.0),
        per_core(32, 16 if tiny else 512, turns, target=5.0),
    ]
    body = (
        "AugReg recipe: flip, RandAugment (2 operations, magnitude 10, always acting), normalisation, mixup; at 32 "
        "pixels pad-and-crop, too. timm transforms each picture with Pillow, then collates bytes and normalises and "
        "mixes whole batches, its fastest way. Pictures per second.\n\n"
        "## One core, from decoded pictures in memory\n\n"
        "| side | batch | timm | vitrail | times timm |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        + loading(32, 16 if tiny else 512, turns, epochs=4 if tiny else 16)
    )
    print(body)
    if not tiny:
        print(write_result("augmentation", ".venv-peers/bin/python benchmarks/augmentation.py", body))


def per_core(side: int, batch_size: int, turns: int, target: float) -> str:
    """Return a row: batches of decoded pictures on one core."""
    pictures = windows(batch_size, side)
    targets, keys = torch.arange(batch_size) % CLASSES, sample_keys(0, 0, torch.arange(batch_size))
    transform, finish = picture_by_picture(side), mixing()
    augment, images = ours(side), torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def theirs() -> int:
        finish(stack([np.asarray(transform(Image.fromarray(picture))) for picture in pictures]))
        return batch_size

    def batched() -> int:
        nonlocal keys
        keys = keys + 1  # other draws every time
        augment(Batch(images, targets, keys, cropped=side != 32), classes=CLASSES)
        return batch_size

    timings = take_turns({"timm": theirs, "vitrail": batched}, turns=turns, seconds=0.5)
    ratio = timings["vitrail"].times(timings["timm"])
    reached = "reached" if ratio >= 0.97 * target else "missed"
    return (
        f"| {side} | {batch_size} | {_rate(timings['timm'])} | {_rate(timings['vitrail'])} "
        f"| {ratio:.2f} (target {target:g}: {reached}) |"
    )


def loading(side: int, batch_size: int, turns: int, epochs: int) -> str:
    """Return the rates of whole loaders of pictures of CIFAR's size in memory, on two cores."""
    pictures = windows(batch_size * epochs, side)
    data, finish = PillowArrays(pictures, picture_by_picture(side)), mixing()
    peers = {f"{workers} processes": epoch(data, batch_size, workers, finish) for workers in WORKERS}
    best, tried = best_of(peers)
    source = ArraySource(pictures, np.arange(len(pictures)) % CLASSES, [str(number) for number in range(CLASSES)])
    augment, config = ours(side), ours(side).config
    view = Preprocessing(image_size=(side, side), crop_fraction=1.0)

    def batched() -> int:
        torch.set_num_threads(CORES)
        stream = Stream(source, preprocessing=view, augment=config, batch_size=batch_size, workers=CORES)
        done = 0
        for batches in islice(stream, epochs):
            for batch in batches:
                augment(batch, classes=CLASSES)
                done += len(batch)
        stream.close()
        torch.set_num_threads(1)
        return done

    timings = take_turns({"timm": peers[best], "vitrail": batched}, turns=turns, seconds=0.1)
    ratio = timings["vitrail"].times(timings["timm"])
    others = ", ".join(f"{name} {timing.rate:,.0f}" for name, timing in tried.items())
    return (
        f"## Loader of {len(pictures):,} pictures of {side} x {side}, batches of {batch_size}, {CORES} cores\n\n"
        f"torch's DataLoader with timm's transforms ({others}; the best is {best}) {_rate(timings['timm'])}, "
        f"vitrail {_rate(timings['vitrail'])}: {ratio:.2f} times (target 5: {'reached' if ratio >= 5 else 'missed'})."
    )


def ours(side: int) -> Augment:
    """Return the recipe as vitrail has it."""
    crop = "padded" if side == 32 else "none"
    config = AugmentConfig(crop=crop, pad=PAD, policy="randaugment", operations=2, magnitude=10.0, mixup=0.5)
    return Augment(config, Preprocessing(image_size=(side, side), crop_fraction=1.0))


def picture_by_picture(side: int) -> Transform:
    """Return the recipe as timm has it, up to bytes."""
    settings = {"translate_const": 100 * side // 224, "img_mean": (128, 128, 128)}
    policy = rand_augment_transform("rand-m10-n2-p1", settings | {"interpolation": Image.Resampling.BILINEAR})

    def transform(picture: Image.Image) -> Image.Image:
        if side == 32:
            left, top = (random.randint(0, 2 * PAD) for _ in range(2))
            picture = ImageOps.expand(picture, PAD, (128, 128, 128)).crop((left, top, left + side, top + side))
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return policy(picture)

    return transform


def mixing() -> Callable[[Tensor], object]:
    """Return what timm does to a batch of bytes: normalise and mix."""
    mixup = Mixup(mixup_alpha=0.5, label_smoothing=0.0, num_classes=CLASSES)
    mean = deviation = 127.5

    def finish(batch: Tensor) -> object:
        images = batch.permute(0, 3, 1, 2).contiguous().float().sub_(mean).div_(deviation)
        return mixup(images, torch.arange(len(images)) % CLASSES)

    return finish


def windows(count: int, side: int) -> np.ndarray:
    """Return pieces of a photo."""
    whole, rng = decode(photo()), np.random.default_rng(0)
    places = zip(
        rng.integers(0, whole.shape[0] - side, count), rng.integers(0, whole.shape[1] - side, count), strict=True
    )
    return np.stack([whole[top : top + side, left : left + side] for top, left in places])


def _rate(timing: Timing) -> str:
    return f"{timing.rate:,.4g} ± {timing.spread / 2:.0%}"


if __name__ == "__main__":
    main(sys.argv[1:])
