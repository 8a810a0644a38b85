"""Make the embedded data set from the official Fashion-MNIST files (Debian: package dataset-fashion-mnist).

    python benchmarks/make_embedded.py /usr/share/datasets/fashion-mnist src/vitrail/data/embedded

Of each class the first 1,000 training and the first 200 test pictures, in the order of the official files, as IDX. The
result is the same byte for byte with zlib 1.2 and 1.3; another implementation of deflate may pack it differently.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

PICTURES_PER_CLASS = {"train": 1000, "t10k": 200}
CLASSES = 10


def read_idx(path: Path) -> np.ndarray:
    """Return the array of a packed IDX file of bytes."""
    with gzip.open(path) as file:
        data = file.read()
    axes = data[3]
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array of bytes as a packed IDX file without a time stamp."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    with gzip.GzipFile(path, "wb", compresslevel=9, mtime=0) as file:
        file.write(head + array.tobytes())


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for part, count in PICTURES_PER_CLASS.items():
        files = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
        images, labels = (read_idx(source / file) for file in files)
        keep = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(CLASSES)]))
        for file, array in zip(files, (images[keep], labels[keep]), strict=True):
            write_idx(target / file, array)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
