"""CvT: from scratch on ImageNet, and fine-tuning at 384 px (Wu et al., 2021, arXiv 2103.15808; microsoft/CvT)."""

from dataclasses import replace
from typing import NamedTuple

from vitrail.config.cvt import CVTS
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.vit import vit_protocol

DEIT = AugmentConfig(
    crop="resized",
    crop_area=(0.08, 1.0),
    policy="randaugment-increasing",
    operations=2,
    magnitude=9.0,
    magnitude_std=0.5,
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
)
"""What DeiT trains with and many papers after it (`rand-m9-mstd0.5-inc1`); timm leaves out jitter beside a policy."""
TIMM_MIXES = (
    "Every picture draws its own share of mixup and its own rectangle of CutMix, where timm draws them for the batch; "
    "strengths of RandAugment are told apart to a hundredth."
)


class Scratch(NamedTuple):
    """experiments/imagenet/cvt/NAME-224x224.yaml, and top-1 (table 3)."""

    weight_decay: float
    top1: float


SCRATCH = {"cvt-13": Scratch(0.05, 81.6), "cvt-21": Scratch(0.1, 82.5)}


def scratch(name: str, row: Scratch) -> Preset:
    """Return how a size is trained from nothing."""
    data, batch = DATA_SETS["imagenet"], 2048
    return Preset(
        group="scratch",
        purpose=f"{name} from scratch on ImageNet, as in the CvT paper",
        config=RunConfig(
            model=CVTS[name],
            input=InputConfig(val_fraction=data.held_out, mean=IMAGENET_MEAN, std=IMAGENET_STD),
            augment=DEIT,
            recipe=SupervisedConfig(loss="softmax", label_smoothing=0.1),
            optim=OptimConfig(
                lr=0.002,
                weight_decay=row.weight_decay,
                clip_norm=0.0,
                schedule="cosine",
                min_lr=1e-5,
                warmup_steps=data.steps(5.0, batch),
            ),
            loop=LoopConfig(batch_size=batch, epochs=300.0),
        ),
        source=f"CvT, arXiv 2103.15808, section 4.1; microsoft/CvT experiments/imagenet/cvt/{name}-224x224.yaml",
        published=f"{row.top1} % (table 3)",
        departs="The paper prints a learning rate of 0.02; its configurations, and this, have 0.002 at 2,048 pictures. "
        + (
            "Its repeated augmentation (three views of every picture in an epoch) is left out. "
            if name == "cvt-21"
            else ""
        )
        + f"Warm-up begins at 0, there at 1e-6. {TIMM_MIXES}",
    )


# Top-1 from ImageNet-22k (tables 3 and 4); of 13 and 21 also from ImageNet-1k.
FINE_TUNING = {
    ("cvt-13", "imagenet"): "83.0 % from ImageNet, 83.3 % from ImageNet-22k",
    ("cvt-21", "imagenet"): "83.3 % from ImageNet, 84.9 % from ImageNet-22k",
    ("cvt-w24", "imagenet"): "87.7 %, ReaL 90.6 %, V2 78.8 % from ImageNet-22k",
    ("cvt-13", "cifar100"): "91.11 % from ImageNet-22k",
    ("cvt-21", "cifar100"): "92.88 % from ImageNet-22k",
    ("cvt-w24", "cifar100"): "94.09 % from ImageNet-22k",
    ("cvt-w24", "cifar10"): "99.39 % from ImageNet-22k",
    ("cvt-w24", "pets"): "94.73 % from ImageNet-22k",
    ("cvt-w24", "flowers"): "99.72 % from ImageNet-22k",
}


def fine_tuning(name: str, data: str, published: str) -> Preset:
    """Return how a size is fine-tuned at 384 px."""
    pictures = DATA_SETS[data]
    run = vit_protocol(replace(CVTS[name], image_size=(384, 384), num_classes=pictures.classes), data, lr=0.003)
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune {name} (--init) on {pictures.title} at 384 px, as in the CvT paper",
        config=replace(run, input=replace(run.input, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD)),
        source="CvT, arXiv 2103.15808, section 4.1; microsoft/CvT lib/config/default.py (FINETUNE)",
        published=f"{published} (tables 3 and 4)",
        departs="The paper follows the ViT paper and says no more than steps and batch size. The learning rate is the "
        "default of its code, whose released 384 px configurations are those of training from scratch."
        + (" Weights that have ImageNet's 1,000 classes keep their head." if data == "imagenet" else ""),
        alias="CvT-W24" if (name, data) == ("cvt-w24", "cifar100") else None,
        needs_init=True,
    )


CVT_PRESETS: dict[str, Preset] = {
    **{f"{name}-imagenet": scratch(name, row) for name, row in SCRATCH.items()},
    **{
        f"{name}-{data}" + ("-384" if data == "imagenet" else ""): fine_tuning(name, data, published)
        for (name, data), published in FINE_TUNING.items()
    },
}
