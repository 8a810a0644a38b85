"""CoAtNet: pre-training and fine-tuning (Dai et al., 2021, arXiv 2106.04803, section 4 and table 10)."""

from dataclasses import replace
from typing import Literal, NamedTuple

from vitrail.config.coatnet import COATNETS
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.presets.augreg import MIXES
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS

SOURCE = "CoAtNet, arXiv 2106.04803, appendix A.2, table 10"
CROP = "The paper does not name its random crop: Inception's, 5 to 100 % of the area."
HEAD = " Nor how the head's bias begins under the sigmoid: at -10, as in the code of ViT's successors."


class Column(NamedTuple):
    """What table 10 says of pre-training on one data set."""

    loss: Literal["softmax", "sigmoid"]
    smoothing: float
    mixup: float
    epochs: int
    batch_size: int
    warmup_steps: int
    schedule: Literal["cosine", "linear"]
    weight_decay: float


BATCH = 4096
COLUMNS = {
    "imagenet": Column("softmax", 0.1, 0.8, 300, BATCH, 10_000, "cosine", 0.05),
    "imagenet21k": Column("sigmoid", 1e-4, 0.0, 90, BATCH, DATA_SETS["imagenet21k"].steps(5.0, BATCH), "linear", 0.01),
    "jft300m": Column("sigmoid", 1e-4, 0.0, 14, BATCH, 20_000, "linear", 0.01),
    "jft3b": Column("sigmoid", 1e-4, 0.0, 14, BATCH, 20_000, "linear", 0.01),
}


class PreTraining(NamedTuple):
    """A model in a column."""

    size: int
    data: str
    drop_path: float
    magnitude: float | None
    """RandAugment of two operations; None is none."""
    published: str
    lr: float = 1e-3
    epochs: int | None = None
    """Where it is not the column's."""
    cost: str = ""
    suffix: str = ""


NOT_GIVEN = {6: "6.6", 7: "20.1"}
"""Models of which the paper gives no recipe, with their cost in thousand TPUv3-core-days."""
PRE_TRAINING = (
    PreTraining(0, "imagenet", 0.2, 15.0, "81.6 %"),
    PreTraining(1, "imagenet", 0.3, 15.0, "83.3 %"),
    PreTraining(2, "imagenet", 0.5, 15.0, "84.1 %"),
    PreTraining(3, "imagenet", 0.7, 15.0, "84.5 %"),
    PreTraining(2, "imagenet21k", 0.3, None, "fine-tuned at 512 px: ImageNet 87.3 %"),
    PreTraining(3, "imagenet21k", 0.5, None, "fine-tuned at 512 px: ImageNet 87.9 %"),
    PreTraining(4, "imagenet21k", 0.7, None, "fine-tuned at 512 px: ImageNet 88.1 %"),
    PreTraining(
        4, "imagenet21k", 0.7, 5.0, "fine-tuned at 512 px: ImageNet 88.56 %", epochs=150, suffix="-randaugment-150ep"
    ),
    PreTraining(3, "jft300m", 0.0, 5.0, "fine-tuned at 512 px: ImageNet 88.81 %"),
    PreTraining(
        4, "jft300m", 0.1, 5.0, "fine-tuned at 512 px: ImageNet 89.11 %", lr=5e-4, cost="950 TPUv3-core-days"
    ),
    PreTraining(
        5, "jft300m", 0.0, 5.0, "fine-tuned at 512 px: ImageNet 89.77 %", lr=5e-4, cost="1,820 TPUv3-core-days"
    ),
    *(
        PreTraining(
            size, "jft3b", 0.0, 5.0, f"fine-tuned at 512 px: ImageNet {top1} %", lr=5e-4,
            cost=f"{NOT_GIVEN[size]} thousand TPUv3-core-days",
        )
        for size, top1 in ((6, 90.45), (7, 90.88))
    ),
)  # fmt: skip


def _augment(magnitude: float | None, mixup: float) -> AugmentConfig:
    policy, strength = ("none", 10.0) if magnitude is None else ("randaugment", magnitude)
    return AugmentConfig(
        crop="resized", crop_area=(0.05, 1.0), policy=policy, operations=2, magnitude=strength, mixup=mixup
    )


def _departs(size: int, data: str, *, mixup: float, sigmoid: bool) -> str:
    parts = [CROP + (HEAD if sigmoid else "")]
    if mixup:
        parts.append(MIXES)
    if size in NOT_GIVEN:
        parts.insert(0, f"The paper gives no recipe for CoAtNet-{size}: this is CoAtNet-5's.")
    if size == 3 and data == "jft300m":
        parts.append("MBConv blocks step by two in their depthwise convolution, as in this row of the paper.")
    return " ".join(parts)


def pre_training(row: PreTraining) -> Preset:
    """Return the preset of a model in a column of pre-training, at 224 px."""
    column, data, name = COLUMNS[row.data], DATA_SETS[row.data], f"coatnet-{row.size}"
    sigmoid = column.loss == "sigmoid"
    return Preset(
        group="pre-train" if sigmoid else "scratch",
        purpose=f"{'pre-train ' if sigmoid else ''}{name} {'on' if sigmoid else 'from scratch on'} {data.title}, "
        "as in the CoAtNet paper",
        config=RunConfig(
            model=replace(
                COATNETS[name],
                num_classes=data.classes,
                drop_path=row.drop_path,
                head_bias=-10.0 if sigmoid else 0.0,
                stride_in="depthwise" if (row.size, row.data) == (3, "jft300m") else "expand",
            ),
            input=InputConfig(interpolation="bilinear", val_fraction=data.held_out),
            augment=_augment(row.magnitude, column.mixup),
            recipe=SupervisedConfig(loss=column.loss, label_smoothing=column.smoothing),
            optim=OptimConfig(
                lr=row.lr,
                min_lr=1e-5,
                weight_decay=column.weight_decay,
                clip_norm=1.0,
                schedule=column.schedule,
                warmup_steps=column.warmup_steps,
            ),
            loop=LoopConfig(batch_size=column.batch_size, epochs=float(row.epochs or column.epochs)),
        ),
        source=SOURCE,
        published=row.published,
        cost=row.cost,
        departs=_departs(row.size, row.data, mixup=column.mixup, sigmoid=sigmoid),
    )


class FineTuning(NamedTuple):
    """A model in a column of fine-tuning on ImageNet, and the largest pictures that its result is given for."""

    size: int
    after: str
    side: int
    drop_path: float
    magnitude: float | None
    published: str


FINE_TUNING = (
    FineTuning(0, "imagenet", 384, 0.2, 15.0, "83.9 %"),
    FineTuning(1, "imagenet", 384, 0.3, 15.0, "85.1 %"),
    FineTuning(2, "imagenet", 512, 0.5, 15.0, "85.9 %"),
    FineTuning(3, "imagenet", 512, 0.7, 20.0, "86.0 %"),
    FineTuning(2, "imagenet21k", 512, 0.3, None, "87.3 %"),
    FineTuning(3, "imagenet21k", 512, 0.5, None, "87.9 %"),
    FineTuning(4, "imagenet21k", 512, 0.7, 5.0, "88.56 % after 150 epochs with RandAugment, 88.1 % after 90 without"),
    FineTuning(3, "jft300m", 512, 0.1, 5.0, "88.81 %"),
    FineTuning(4, "jft300m", 512, 0.3, 5.0, "89.11 %"),
    FineTuning(5, "jft300m", 512, 0.2, 5.0, "89.77 %"),
    FineTuning(6, "jft3b", 512, 0.2, 5.0, "90.45 %"),
    FineTuning(7, "jft3b", 512, 0.2, 5.0, "90.88 %"),
)


def fine_tuning(row: FineTuning) -> Preset:
    """Return the preset of a model in a column of fine-tuning."""
    name, after = f"coatnet-{row.size}", DATA_SETS[row.after].title
    mixup = COLUMNS[row.after].mixup
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune {name} from {after} (--init) on ImageNet at {row.side} px, as in the CoAtNet paper",
        config=RunConfig(
            model=replace(
                COATNETS[name],
                image_size=(row.side, row.side),
                drop_path=row.drop_path,
                stride_in="depthwise" if (row.size, row.after) == (3, "jft300m") else "expand",
            ),
            input=InputConfig(fit="squash", interpolation="bilinear", val_fraction=DATA_SETS["imagenet"].held_out),
            augment=_augment(row.magnitude, mixup),
            recipe=SupervisedConfig(loss="softmax", label_smoothing=0.1),
            optim=OptimConfig(lr=5e-5, weight_decay=1e-8, clip_norm=1.0, schedule="constant", ema=0.9999),
            loop=LoopConfig(batch_size=1024 if row.after == "imagenet21k" else 512, epochs=30.0),
        ),
        source=SOURCE,
        published=f"{row.published} from {after}",
        departs=_departs(row.size, row.after, mixup=mixup, sigmoid=False)
        + (" Weights of ImageNet keep their head." if row.after == "imagenet" else ""),
        alias=f"CoAtNet-{row.size}" if row.size in NOT_GIVEN else None,
        needs_init=True,
    )


COATNET_PRESETS: dict[str, Preset] = {
    **{f"coatnet-{row.size}-{row.data}{row.suffix}": pre_training(row) for row in PRE_TRAINING},
    **{f"coatnet-{row.size}-imagenet-{row.side}-from-{row.after}": fine_tuning(row) for row in FINE_TUNING},
}
