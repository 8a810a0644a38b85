"""Small data sets on disk, in every layout that Vitrail reads."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def put(root: Path, *names: str, level: int = 100) -> None:
    """Write one small grey picture per name; each a level brighter."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 2), level + number).save(root / name)


def manifest(root: Path, *lines: str, encoding: str = "utf-8") -> Path:
    """A CSV beside pictures 1.png to 4.png."""
    put(root, *(f"{number}.png" for number in range(1, 5)))
    (root / "data.csv").write_text("\r\n".join(lines), encoding=encoding)
    return root / "data.csv"


def write_cifar(folder: Path, fine: bool, per_file: int = 6) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write a small CIFAR-100 (fine) or CIFAR-10 in the official layout; return pictures and labels per part."""
    rng = np.random.default_rng(3)
    folder.mkdir(parents=True)
    names = [f"class {i}" for i in range(100 if fine else 10)]
    (folder / ("fine_label_names.txt" if fine else "batches.meta.txt")).write_text("\n".join(names) + "\n\n")
    found = {}
    train = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    for part, files in {"train": train, "test": ["test" if fine else "test_batch"]}.items():
        images = rng.integers(0, 256, (per_file * len(files), 32, 32, 3), dtype=np.uint8)
        labels = (np.arange(len(images)) % 3 * (len(names) // 3)).astype(np.uint8)
        heads = np.stack([rng.integers(0, 20, len(images), dtype=np.uint8), labels], 1) if fine else labels[:, None]
        records = np.concatenate([heads, images.transpose(0, 3, 1, 2).reshape(len(images), -1)], axis=1)
        for number, file in enumerate(files):
            (folder / f"{file}.bin").write_bytes(records[number * per_file : (number + 1) * per_file].tobytes())
        found[part] = images, labels
    return found


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, *, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    images, labels = rng.integers(0, 256, (30, 5, 4), dtype=np.uint8), np.arange(30, dtype=np.uint8) % 10
    for part, keep in (("train", slice(20)), ("t10k", slice(20, 30))):
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = idx(array[keep])
            (folder / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)
    return images, labels
