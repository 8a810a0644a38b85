"""The ViT paper: pre-training and fine-tuning (Dosovitskiy et al., 2021, arXiv 2010.11929, tables 2 to 5)."""

from dataclasses import replace
from typing import Literal, NamedTuple

from vitrail.config.model import ModelConfig
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import VITS
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS

INCEPTION = AugmentConfig(crop="resized", crop_area=(0.05, 1.0))
"""Random resized crop and flip: all the augmentation there is (vision_transformer `input_pipeline.py`)."""


class PreTraining(NamedTuple):
    """A model of table 3, and what it reaches on ImageNet and CIFAR-100 after fine-tuning (table 5, at 384 px)."""

    model: str
    data: str
    epochs: int
    lr: float
    imagenet: float
    cifar100: float
    cost: str = ""
    """Table 2."""


PRE_TRAINING = (
    PreTraining("vit-b32", "jft300m", 7, 8e-4, 80.73, 90.49),
    PreTraining("vit-b16", "jft300m", 7, 8e-4, 84.15, 91.87),
    PreTraining("vit-l32", "jft300m", 7, 6e-4, 84.37, 92.52),
    PreTraining("vit-l16", "jft300m", 14, 4e-4, 87.12, 94.04, "680 TPUv3-core-days"),
    PreTraining("vit-h14", "jft300m", 14, 3e-4, 88.04, 94.55, "2,500 TPUv3-core-days"),
    PreTraining("vit-b32", "imagenet21k", 90, 1e-3, 81.28, 91.97),
    PreTraining("vit-b16", "imagenet21k", 90, 1e-3, 83.97, 91.67),
    PreTraining("vit-l32", "imagenet21k", 90, 1e-3, 80.99, 93.04),
    PreTraining("vit-l16", "imagenet21k", 90, 1e-3, 85.15, 93.44, "230 TPUv3-core-days"),
    PreTraining("vit-b32", "imagenet", 300, 3e-3, 73.38, 86.31),
    PreTraining("vit-b16", "imagenet", 300, 3e-3, 77.91, 87.13),
    PreTraining("vit-l32", "imagenet", 300, 3e-3, 71.16, 87.07),
    PreTraining("vit-l16", "imagenet", 300, 3e-3, 76.53, 86.35),
)


class PerData(NamedTuple):
    """What table 3 says of all models on one data set."""

    schedule: Literal["linear", "cosine"]
    weight_decay: float
    dropout: float
    clip_norm: float
    head_bias: float


PER_DATA = {
    "jft300m": PerData("linear", 0.1, 0.0, 0.0, -10.0),
    "imagenet21k": PerData("linear", 0.03, 0.1, 0.0, -10.0),
    "imagenet": PerData("cosine", 0.3, 0.1, 1.0, -6.9),
}


def pre_training(row: PreTraining) -> Preset:
    """Return the preset of a line of table 3."""
    data, own, body = DATA_SETS[row.data], PER_DATA[row.data], VITS[row.model]
    return Preset(
        group="pre-train",
        purpose=f"pre-train {row.model} on {data.title} for {row.epochs} epochs, as in the ViT paper",
        config=RunConfig(
            model=replace(
                body, num_classes=data.classes, pre_logits=body.width, dropout=own.dropout, head_bias=own.head_bias
            ),
            input=InputConfig(interpolation="bilinear", val_fraction=data.held_out),
            augment=INCEPTION,
            recipe=SupervisedConfig(loss="sigmoid"),
            optim=OptimConfig(
                lr=row.lr,
                weight_decay=own.weight_decay,
                clip_norm=own.clip_norm,
                schedule=own.schedule,
                warmup_steps=10_000,
            ),
            loop=LoopConfig(batch_size=4096, epochs=float(row.epochs)),
        ),
        source="ViT, arXiv 2010.11929, table 3; google-research/vision_transformer vit_jax/input_pipeline.py",
        published=f"fine-tuned at 384 px: ImageNet {row.imagenet:.2f} %, CIFAR-100 {row.cifar100:.2f} % (table 5)",
        cost=row.cost,
        departs=(
            "The paper does not name the loss, nor how the head's bias begins: sigmoid and a bias that expects few "
            "labels, as in the code of the papers that follow it." + (_LONGER if row.model == "vit-l16" else "")
        ),
    )


_LONGER = " Table 3 has two lengths for L/16, 7 and 14 epochs of JFT-300M, 30 and 90 of ImageNet-21k: here the longer."


class FineTuning(NamedTuple):
    """A cell of table 2 or 5."""

    model: str
    data: str
    published: str
    lr: float = 0.03
    side: int = 384
    ema: float = 0.0


STEPS = {"imagenet": 20_000, "cifar100": 10_000, "cifar10": 10_000, "pets": 500, "flowers": 500}
"""Table 4."""
FINE_TUNING = (
    FineTuning("vit-b16", "cifar10", "98.95 % from ImageNet-21k (table 5)", lr=0.01),
    FineTuning("vit-b16", "cifar100", "91.87 % from JFT-300M, 91.67 % from ImageNet-21k (table 5)"),
    FineTuning("vit-b16", "imagenet", "84.15 % from JFT-300M, 83.97 % from ImageNet-21k (table 5)"),
    FineTuning("vit-l16", "cifar10", "99.42 % from JFT-300M, 99.15 % from ImageNet-21k (table 2)"),
    FineTuning("vit-l16", "cifar100", "93.90 ± 0.05 % from JFT-300M, 93.25 ± 0.05 % from ImageNet-21k (table 2)"),
    FineTuning("vit-l16", "pets", "97.32 % from JFT-300M, 94.67 % from ImageNet-21k (table 2)"),
    FineTuning("vit-l16", "flowers", "99.74 % from JFT-300M, 99.61 % from ImageNet-21k (table 2)"),
    FineTuning(
        "vit-l16",
        "imagenet",
        "87.76 ± 0.03 % from JFT-300M, 85.30 ± 0.02 % from ImageNet-21k (table 2)",
        side=512,
        ema=0.9999,
    ),
    FineTuning("vit-h14", "cifar10", "99.50 % from JFT-300M (table 2)"),
    FineTuning("vit-h14", "cifar100", "94.55 ± 0.04 % from JFT-300M (table 2)"),
    FineTuning("vit-h14", "pets", "97.56 % from JFT-300M (table 2)"),
    FineTuning("vit-h14", "flowers", "99.68 % from JFT-300M (table 2)"),
    FineTuning("vit-h14", "imagenet", "88.55 ± 0.04 % from JFT-300M (table 2)", side=518, ema=0.9999),
)
ALIASES = {("vit-l16", "cifar100"): "ViT-L/16", ("vit-h14", "cifar100"): "ViT-H/14"}


def vit_protocol(model: ModelConfig, data: str, *, lr: float, ema: float = 0.0) -> RunConfig:
    """Return how the ViT paper fine-tunes (table 4); the papers after it do so "as ViT", or say what they do else.

    The head begins at zero. Pictures are squashed to size for evaluation, not cropped (`input_pipeline.py`).
    """
    return RunConfig(
        model=model,
        input=InputConfig(fit="squash", interpolation="bilinear", val_fraction=DATA_SETS[data].held_out),
        augment=INCEPTION,
        recipe=SupervisedConfig(loss="softmax"),
        optim=OptimConfig(
            name="sgd",
            momentum=0.9,
            lr=lr,
            weight_decay=0.0,
            clip_norm=1.0,
            schedule="cosine",
            warmup_steps=min(500, STEPS[data] // 5),
            ema=ema,
        ),
        loop=LoopConfig(batch_size=512, steps=STEPS[data]),
    )


UNSAID = (
    "The paper chooses the learning rate on held-out pictures, of {grid}, and does not say which won: here "
    "{lr:g}, which the released code takes. Its last runs learn from the held-out pictures, too."
)

HEAD_KEPT = "Weights that have ImageNet's 1,000 classes keep their head; the authors begin with a new one."
"""Of fine-tuning on ImageNet what was pre-trained there as well, at another picture size."""


def fine_tuning(row: FineTuning) -> Preset:
    """Return the preset of a cell of table 2 or 5."""
    data = DATA_SETS[row.data]
    grid = "0.003, 0.01, 0.03 and 0.06" if row.data == "imagenet" else "0.001, 0.003, 0.01 and 0.03"
    model = replace(VITS[row.model], image_size=(row.side, row.side), num_classes=data.classes)
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune {row.model} (--init) on {data.title} at {row.side} px, as in the ViT paper",
        config=vit_protocol(model, row.data, lr=row.lr, ema=row.ema),
        source="ViT, arXiv 2010.11929, table 4; google-research/vision_transformer vit_jax/configs/common.py",
        published=row.published,
        departs=UNSAID.format(grid=grid, lr=row.lr) + (f" {HEAD_KEPT}" if row.data == "imagenet" else ""),
        alias=ALIASES.get((row.model, row.data)),
        needs_init=True,
    )


VIT_PRESETS: dict[str, Preset] = {
    **{f"{row.model}-{row.data}": pre_training(row) for row in PRE_TRAINING},
    # Where a model is pre-trained on ImageNet as well, fine-tuning says its picture size.
    **{
        f"{row.model}-{row.data}" + (f"-{row.side}" if row.data == "imagenet" else ""): fine_tuning(row)
        for row in FINE_TUNING
    },
}
"""Every line of table 3 and, of tables 2 and 5, what was fine-tuned."""
