"""What other people's EfficientNets computed, on weights that any machine can make again.

`golden/efficientnet.json` holds, per case, the names and shapes of a foreign state dict in its order, the shape of the
pictures, and the logits that the foreign code gave. Numbers come from numpy's legacy generator, which never changes.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path(__file__).parent / "golden" / "efficientnet.json"


class Case(NamedTuple):
    """A foreign model and what it said."""

    arrays: dict[str, np.ndarray]
    images: np.ndarray
    logits: np.ndarray


def load(name: str) -> Case:
    case = json.loads(FILE.read_text(encoding="utf-8"))[name]
    arrays, images = fill(case["arrays"], case["images"])
    return Case(arrays, images, np.array(case["logits"], dtype=np.float32))


def fill(shapes: dict[str, list[int]], images: list[int]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return arrays under which no part of a network is silent, and pictures."""
    random = np.random.RandomState(0)
    arrays = {name: _numbers(name, shape, random) for name, shape in shapes.items()}
    return arrays, random.standard_normal(images).astype(np.float32)


def _numbers(name: str, shape: list[int], random: np.random.RandomState) -> np.ndarray:
    if not shape:
        return np.array(random.randint(10_000), dtype=np.int64)
    if len(shape) > 1:  # kernels keep the variance
        return (random.standard_normal(shape) * (2.4 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
    if name.endswith(("bias", "running_mean")):
        return (random.standard_normal(shape) * 0.2).astype(np.float32)
    return (random.random_sample(shape) + 0.5).astype(np.float32)
