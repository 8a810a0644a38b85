"""AugReg: how much augmentation ViTs want (Steiner et al., 2022, "How to train your ViT?", arXiv 2106.10270)."""

from dataclasses import replace
from typing import NamedTuple

from vitrail.config.run import InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import VITS, ViTConfig
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.vit import HEAD_KEPT, INCEPTION, vit_protocol


class Level(NamedTuple):
    """A column of the paper's figure 4: strength of RandAugment's two operations, and mixup's alpha."""

    magnitude: float | None
    mixup: float


LEVELS = {
    "none": Level(None, 0.0),
    "light1": Level(0.0, 0.0),  # which is not nothing, see `randaugment_argument`
    "light2": Level(10.0, 0.2),
    "medium1": Level(15.0, 0.2),
    "medium2": Level(15.0, 0.5),
    "strong1": Level(20.0, 0.5),
    "strong2": Level(20.0, 0.8),
}
# The level that big_vision trains a size with (configs/vit_i1k.py and vit_i21k.py).
DEFAULTS = {
    "imagenet": {
        "vit-ti16": "light1",
        "vit-s32": "medium1",
        "vit-s16": "medium2",
        "vit-b32": "medium2",
        "vit-b16": "medium2",
        "vit-l16": "medium2",
    },
    "imagenet21k": {
        "vit-ti16": "none",
        "vit-s32": "none",
        "vit-s16": "light1",
        "vit-b32": "light2",
        "vit-b16": "light2",
        "vit-l16": "medium2",
    },
}
# Best of the models that were pre-trained on ImageNet-21k, fine-tuned on ImageNet at 384 px (README of
# vision_transformer): top-1, and how it was pre-trained, with weight decay 0.1 where it says nothing else.
BEST = {
    "vit-ti16": (78.22, "none, weight decay 0.03"),
    "vit-s16": (83.73, "light1, weight decay 0.03"),
    "vit-b32": (83.59, "light1"),
    "vit-b16": (85.49, "medium1"),
    "vit-l16": (85.59, "strong1"),
    "vit-r-ti16": (75.40, "none, weight decay 0.03"),
    "vit-r26-s32": (83.85, "medium2, weight decay 0.03"),
    "vit-r50-l32": (85.99, "medium1, dropout and stochastic depth 0.1"),
}
MIXES = "Every picture draws its own share of mixup, where the code draws one for the batch."
POOLED = "As in the configuration, patches are pooled; the released weights have a class token. "


def _model(name: str, data: str) -> ViTConfig:
    """Return the model as big_vision pre-trains it."""
    body = replace(VITS[name], num_classes=DATA_SETS[data].classes, positions="learned-patches")
    if data == "imagenet":
        return replace(body, pre_logits=body.width, head_bias=-6.9)
    return replace(body, pool="gap", head_bias=-10.0)


def pre_training(name: str, data: str, level: str) -> Preset:
    """Return the preset of a cell of figure 4."""
    magnitude, mixup = LEVELS[level]
    pictures = DATA_SETS[data]
    on, strength = ("none", 10.0) if magnitude is None else ("randaugment", magnitude)
    # Figure 4 has no numbers in print: the README's are of one cell for each size, and decay here is 0.1.
    accuracy, how = BEST.get(name, (0.0, ""))
    is_best = data == "imagenet21k" and how == level
    return Preset(
        group="pre-train",
        purpose=f"pre-train {name} on {pictures.title} with augmentation {level}, as AugReg does",
        config=RunConfig(
            model=_model(name, data),
            input=InputConfig(interpolation="bilinear", val_fraction=pictures.held_out),
            augment=replace(INCEPTION, policy=on, operations=2, magnitude=strength, mixup=mixup),
            recipe=SupervisedConfig(loss="sigmoid"),
            optim=OptimConfig(lr=1e-3, weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=10_000),
            loop=LoopConfig(batch_size=4096, epochs=300.0),
        ),
        source="AugReg, arXiv 2106.10270, figure 4 (without numbers); "
        f"google-research/big_vision configs/vit_{_SHORT[data]}.py",
        published=f"fine-tuned at 384 px: ImageNet {accuracy:.2f} % (README)" if is_best else "",
        departs=(f"{MIXES} " if mixup else "")
        + (POOLED if data == "imagenet21k" else "")
        + "Adam's first moment is fp32, there bf16.",
    )


_SHORT = {"imagenet": "i1k", "imagenet21k": "i21k"}


def fine_tuning(name: str) -> Preset:
    """Return the preset of the weights that the README recommends, fine-tuned."""
    accuracy, how = BEST[name]
    # These weights, older than the configurations above, have a class token with a position of its own.
    model = replace(VITS[name], image_size=(384, 384))
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune {name} (--init) on ImageNet at 384 px, as AugReg does",
        config=vit_protocol(model, "imagenet", lr=0.03),
        source="AugReg, arXiv 2106.10270, section 3.4; google-research/vision_transformer vit_jax/configs/augreg.py",
        published=f"{accuracy:.2f} % from ImageNet-21k (augmentation {how})",
        departs="The paper takes the better of learning rates 0.03 and 0.01 on held-out pictures; here the first. "
        f"{HEAD_KEPT}",
        needs_init=True,
    )


AUGREG_PRESETS: dict[str, Preset] = {
    **{
        f"{name}-{data}-{level}": pre_training(name, data, level)
        for data, defaults in DEFAULTS.items()
        for name, default in defaults.items()
        for level in (LEVELS if name == "vit-b16" else [default])
    },
    **{f"{name}-imagenet-augreg": fine_tuning(name) for name in BEST},
}
"""Every size with its own level, B/16 with all seven; and fine-tuning."""
