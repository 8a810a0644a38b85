"""What our data path is measured against: torch's DataLoader, pictures transformed by Pillow in worker processes."""

import random
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.benchmark.timing import Timing, Work, take_turns

WORKERS = (1, 2, 3)
"""Numbers of processes tried for two cores; the best is kept."""


def usual_crop(data: bytes, box: tuple[float, float, float, float], side: int, filter: Image.Resampling) -> np.ndarray:
    """Return what most training code makes of a file: `box` is top, left, height and width."""
    top, left, height, width = box
    picture = Image.open(BytesIO(data)).convert("RGB")
    return np.asarray(picture.resize((side, side), filter, box=(left, top, left + width, top + height)))


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width as torchvision's `RandomResizedCrop.get_params` draws them."""
    for _ in range(10):
        area, ratio = width * height * random.uniform(0.08, 1.0), np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        columns, rows = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < columns <= width and 0 < rows <= height:
            return random.randint(0, height - rows), random.randint(0, width - columns), rows, columns
    side = min(width, height)
    return (height - side) // 2, (width - side) // 2, side, side


class PillowFiles(Dataset[np.ndarray]):
    """Random resized crop and flip of JPEG files."""

    def __init__(self, paths: Sequence[Path], side: int, filter: Image.Resampling, *, normalised: bool) -> None:
        self._paths, self._side, self._filter, self._normalised = paths, side, filter, normalised

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        picture = Image.open(self._paths[index]).convert("RGB")
        top, left, rows, columns = random_box(*picture.size)
        picture = picture.resize((self._side, self._side), self._filter, box=(left, top, left + columns, top + rows))
        if random.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        array = np.array(picture)
        if not self._normalised:
            return array
        return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255).sub_(0.5).div_(0.5)


class PillowArrays(Dataset[np.ndarray]):
    """Pictures in memory, each through `transform`."""

    def __init__(self, pictures: np.ndarray, transform: Callable[[Image.Image], Image.Image]) -> None:
        self._pictures, self._transform = pictures, transform

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self._transform(Image.fromarray(self._pictures[index])))


def stack(pictures: Sequence[Any]) -> Tensor:
    """Return a batch: of bytes, n h w c, where pictures are arrays (timm's fast collation), else of tensors."""
    first = pictures[0]
    return torch.stack(list(pictures)) if isinstance(first, Tensor) else torch.from_numpy(np.stack(pictures))


def normalise_bytes(batch: Tensor) -> Tensor:
    """Return bytes, n h w c, as float planes from -1 to 1; other batches as they are."""
    if batch.dtype != torch.uint8:
        return batch
    return batch.permute(0, 3, 1, 2).contiguous().float().sub_(127.5).div_(127.5)


def epoch(data: Dataset[Any], batch_size: int, workers: int, finish: Callable[[Tensor], object]) -> Work:
    """Return an epoch of a DataLoader whose processes live on, at its best settings."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: it is worth a try
    loader = DataLoader(
        data,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        collate_fn=stack,
        persistent_workers=True,
        prefetch_factor=4,
    )

    def work() -> int:
        done = 0
        for batch in loader:
            finish(batch)
            done += len(batch)
        return done

    return work


def best_of(works: dict[str, Work]) -> tuple[str, dict[str, Timing]]:
    """Return the name of the fastest, and how fast each was."""
    timings = take_turns(works, turns=2, seconds=0.1)
    return max(timings, key=lambda name: timings[name].rate), timings
