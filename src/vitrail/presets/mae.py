"""Masked pre-training: MAE (He et al., 2021, arXiv 2111.06377), and the ViT paper's masked colours (appendix B.1.2)."""

from dataclasses import replace
from typing import NamedTuple

from vitrail.config.masked import MaskedConfig
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import VITS, ViTConfig
from vitrail.presets.base import Preset
from vitrail.presets.cvt import DEIT, TIMM_MIXES
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.vit import INCEPTION

IMAGENET = DATA_SETS["imagenet"]
INPUT = InputConfig(val_fraction=IMAGENET.held_out, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _model(name: str) -> ViTConfig:
    """Return the ViT of facebookresearch/mae: timm's, with fixed positions."""
    return replace(VITS[name], positions="sincos", gelu="erf")


class PreTraining(NamedTuple):
    """A length of pre-training, and ImageNet top-1 after fine-tuning at 224 px (tables 1 and 3)."""

    model: str
    epochs: int
    top1: float
    cost: str = ""


PRE_TRAINING = (
    PreTraining("vit-b16", 1600, 83.6),
    PreTraining("vit-l16", 800, 85.4, "42 hours on 64 V100"),
    PreTraining("vit-l16", 1600, 85.9),
    PreTraining("vit-h14", 1600, 86.9),
)


def pre_training(row: PreTraining) -> Preset:
    """Return the recipe of table 8."""
    batch = 4096
    return Preset(
        group="pre-train",
        purpose=f"pre-train {row.model} on ImageNet without labels for {row.epochs} epochs: MAE",
        config=RunConfig(
            model=_model(row.model),
            input=INPUT,
            augment=AugmentConfig(crop="resized", crop_area=(0.2, 1.0)),
            recipe=MaskedConfig(objective="pixels", mask_ratio=0.75, norm_targets=True),
            optim=OptimConfig(
                lr=1.5e-4 * batch / 256,
                weight_decay=0.05,
                betas=(0.9, 0.95),
                clip_norm=0.0,
                schedule="cosine",
                warmup_steps=IMAGENET.steps(40.0, batch),
            ),
            loop=LoopConfig(batch_size=batch, epochs=float(row.epochs)),
        ),
        source="MAE, arXiv 2111.06377, table 8; facebookresearch/mae PRETRAIN.md",
        published=f"fine-tuned: ImageNet {row.top1} %",
        cost=row.cost,
        departs="Sin-cos positions are big_vision's, whose frequencies end at 1/10000, there a step before; class and "
        "mask token do not decay.",
    )


class FineTuning(NamedTuple):
    """A script of FINETUNE.md; the learning rate is per 256 pictures."""

    model: str
    epochs: int
    lr: float
    layer_decay: float
    drop_path: float
    published: str
    cost: str


FINE_TUNING = (
    FineTuning("vit-b16", 100, 5e-4, 0.65, 0.1, "83.57 % (four runs)", "7 h 11 min on 32 V100"),
    FineTuning("vit-l16", 50, 1e-3, 0.75, 0.2, "85.87 % (four runs)", "8 h 52 min on 32 V100"),
    FineTuning("vit-h14", 50, 1e-3, 0.75, 0.3, "86.9 %", "13 h 9 min on 64 V100"),
)


def fine_tuning(row: FineTuning) -> Preset:
    """Return the recipe of table 9."""
    batch = 1024
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune {row.model} of MAE (--init) on ImageNet, with layer decay",
        config=RunConfig(
            model=replace(_model(row.model), drop_path=row.drop_path),
            input=INPUT,
            augment=DEIT,
            recipe=SupervisedConfig(loss="softmax", label_smoothing=0.1),
            optim=OptimConfig(
                lr=row.lr * batch / 256,
                min_lr=1e-6,
                weight_decay=0.05,
                clip_norm=0.0,
                layer_decay=row.layer_decay,
                schedule="cosine",
                warmup_steps=IMAGENET.steps(5.0, batch),
            ),
            loop=LoopConfig(batch_size=batch, epochs=float(row.epochs)),
        ),
        source="MAE, arXiv 2111.06377, table 9; facebookresearch/mae FINETUNE.md",
        published=row.published,
        cost=row.cost,
        departs="The class token is what is classified, where the code takes the patches' mean (they do as well, it "
        "says), and positions stay fixed, where the code learns on from them. The head begins at zero. "
        f"{TIMM_MIXES}",
        needs_init=True,
    )


COLOURS = Preset(
    group="pre-train",
    purpose="pre-train vit-b16 on JFT-300M without labels, by the mean colours of masked patches, as in the ViT paper",
    config=RunConfig(
        model=VITS["vit-b16"],
        input=InputConfig(interpolation="bilinear", val_fraction=DATA_SETS["jft300m"].held_out),
        augment=INCEPTION,
        recipe=MaskedConfig(objective="colour", mask_ratio=0.5),
        optim=OptimConfig(lr=2e-4, weight_decay=0.01, clip_norm=0.0, schedule="cosine", warmup_steps=10_000),
        loop=LoopConfig(batch_size=4096, epochs=14.0),
    ),
    source="ViT, arXiv 2010.11929, appendix B.1.2",
    published="fine-tuned: ImageNet 79.9 %",
    departs="The paper does not state the weight decay: 0.01, as BERT (arXiv 1810.04805, appendix A.2). A patch that "
    "another one replaces gets one of the same picture; the paper leaves open of which.",
)

MAE_PRESETS: dict[str, Preset] = {
    **{f"{row.model}-imagenet-mae-{row.epochs}ep": pre_training(row) for row in PRE_TRAINING},
    **{f"{row.model}-imagenet-mae-fine-tuned": fine_tuning(row) for row in FINE_TUNING},
    "vit-b16-jft300m-masked": COLOURS,
}
