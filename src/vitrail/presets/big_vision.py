"""The transfer protocol of google-research/big_vision (configs/transfer.py), with what it states for AugReg's B/32."""

from dataclasses import replace
from typing import Literal, NamedTuple

from vitrail.config.vit import VITS
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.vit import HEAD_KEPT, vit_protocol


class Transfer(NamedTuple):
    """The best settings on a data set, and the range of the top-1 of five runs."""

    crop: Literal["resized", "random"]
    """Inception crop, or resized to 448 px and a random 384 px cut out."""
    lr: float
    mean: float
    lowest: float
    highest: float


TRANSFERS = {
    "imagenet": Transfer("resized", 0.03, 83.27, 83.22, 83.33),
    "cifar10": Transfer("random", 0.003, 98.55, 98.46, 98.6),
    "cifar100": Transfer("random", 0.01, 91.35, 91.09, 91.62),
    "pets": Transfer("resized", 0.003, 93.78, 93.62, 94.00),
    "flowers": Transfer("resized", 0.003, 99.43, 99.42, 99.45),
}


def transfer(data: str, row: Transfer) -> Preset:
    """Return the preset of a line of the configuration's table."""
    model = replace(
        VITS["vit-b32"], image_size=(384, 384), num_classes=DATA_SETS[data].classes, positions="learned-patches"
    )
    run = vit_protocol(model, data, lr=row.lr)
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune vit-b32 of AugReg (--init) on {DATA_SETS[data].title}, as big_vision does",
        config=replace(
            run,
            input=replace(run.input, fit="crop", crop_fraction=384 / 448),
            augment=replace(run.augment, crop=row.crop),
        ),
        source="google-research/big_vision configs/transfer.py; weights of AugReg, arXiv 2106.10270",
        published=f"{row.mean} % ({row.lowest} to {row.highest} % in five runs)",
        departs="Momentum is fp32, there bf16." + (f" {HEAD_KEPT}" if data == "imagenet" else ""),
        needs_init=True,
    )


BIG_VISION_PRESETS: dict[str, Preset] = {
    f"vit-b32-{data}-transfer": transfer(data, row) for data, row in TRANSFERS.items()
}
