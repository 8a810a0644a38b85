"""V-MoE: sparse mixtures of experts (Riquelme et al., 2021, arXiv 2106.05974; google-research/vmoe configs)."""

import math
from dataclasses import replace
from typing import NamedTuple

from vitrail.config.run import InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit_moe import VMOES, ViTMoEConfig
from vitrail.presets.augreg import MIXES
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.vit import HEAD_KEPT, INCEPTION, STEPS, vit_protocol
from vitrail.presets.vit_g import ADAFACTOR, MILLION

PAPER = "V-MoE, arXiv 2106.05974"
CONFIGS = "google-research/vmoe configs/vmoe_paper"


class OnJFT(NamedTuple):
    """A model of `get_optimizer_config`, and what it reaches: precision at 1 on JFT, ImageNet, CIFAR-100 after it."""

    model: str
    epochs: int
    lr: float
    clip_norm: float
    jft: float
    imagenet: float
    cifar100: float
    core_days: str


ON_JFT = (
    OnJFT("vmoe-s32-every2", 7, 1e-3, 0.0, 34.00, 77.08, 88.50, "17.6"),
    OnJFT("vmoe-b16-every2", 7, 8e-4, 0.0, 49.31, 85.26, 92.76, "201"),
    OnJFT("vmoe-l16-every2", 14, 4e-4, 0.0, 57.65, 87.41, 94.64, "1,206"),
    OnJFT("vmoe-h14-last5", 14, 3e-4, 10.0, 60.12, 88.23, 94.86, "2,736"),
)


def _pre_training(model: ViTMoEConfig, data: str, *, optim: OptimConfig, loop: LoopConfig) -> RunConfig:
    return RunConfig(
        model=replace(model, num_classes=DATA_SETS[data].classes),
        input=InputConfig(interpolation="bilinear", val_fraction=DATA_SETS[data].held_out),
        augment=INCEPTION,
        recipe=SupervisedConfig(loss="sigmoid"),
        optim=optim,
        loop=loop,
    )


def on_jft(row: OnJFT) -> Preset:
    """Return how the paper's models are pre-trained."""
    body = VMOES[row.model]
    model = replace(body, pre_logits=body.width, head_bias=-math.log(DATA_SETS["jft300m"].classes))
    optim = OptimConfig(
        lr=row.lr,
        weight_decay=0.1,
        decay="all",
        clip_norm=row.clip_norm,
        schedule="linear",
        min_lr=1e-5,
        warmup_steps=10_000,
    )
    return Preset(
        group="pre-train",
        purpose=f"pre-train {row.model} on JFT-300M, as in the V-MoE paper",
        config=_pre_training(model, "jft300m", optim=optim, loop=LoopConfig(batch_size=4096, epochs=float(row.epochs))),
        source=f"{PAPER}, tables 7 and 9 (as quoted by others); {CONFIGS}/common.py",
        published=f"JFT-300M {row.jft:.2f} % precision at 1; fine-tuned: ImageNet {row.imagenet:.2f} %, "
        f"CIFAR-100 {row.cifar100:.2f} %",
        cost=f"{row.core_days} TPUv3-core-days",
        departs="The code does not state the epochs: they are those of ViTs of this size (ViT paper, table 3).",
    )


def _fine_tuning(
    model: ViTMoEConfig, data: str, *, side: int, lr: float, steps: int = 10_000, warmup: int = 500
) -> RunConfig:
    """Return how the released models are fine-tuned: half as long as a ViT, with more room in the experts."""
    classes = DATA_SETS[data].classes
    run = vit_protocol(
        replace(model, image_size=(side, side), num_classes=classes, train_capacity_factor=1.5), data, lr=lr
    )
    return replace(
        run,
        optim=replace(run.optim, clip_norm=10.0, min_lr=1e-5, warmup_steps=warmup),
        loop=LoopConfig(batch_size=1024, steps=steps),
    )


# The released weights have 8 experts in a mixture.
B16, S32 = (replace(VMOES[name], experts=8) for name in ("vmoe-b16-every2", "vmoe-s32-last2"))
GROUPS = "A mixture's experts are evaluated with room for all tokens, there with {room} times an even share."

B16_IMAGENET21K = Preset(
    group="pre-train",
    purpose="pre-train vmoe-b16-every2 of 8 experts on ImageNet-21k, as its released weights",
    config=replace(
        run := _pre_training(
            replace(B16, head_bias=-10.0),
            "imagenet21k",
            optim=OptimConfig(
                lr=8e-4, weight_decay=0.1, clip_norm=1.0, schedule="linear", min_lr=1e-5, warmup_steps=10_000
            ),
            loop=LoopConfig(batch_size=4096, epochs=300.0),
        ),
        augment=replace(run.augment, policy="randaugment", operations=2, magnitude=20.0, mixup=0.5),
    ),
    source=f"{PAPER}; {CONFIGS}/pretrain_imagenet21k.py",
    published="fine-tuned: ImageNet 85.6 %, CIFAR-10 98.7 %",
    departs=MIXES,
)
S32_IMAGENET = Preset(
    group="scratch",
    purpose="vmoe-s32-last2 of 8 experts from scratch on ImageNet, as its released weights",
    config=replace(
        run := _pre_training(
            replace(S32, pre_logits=S32.width, head_bias=-math.log(1000), expert_dropout=0.2),
            "imagenet",
            optim=OptimConfig(
                lr=3e-3, weight_decay=0.1, clip_norm=1.0, schedule="linear", min_lr=1e-5, warmup_steps=10_000
            ),
            loop=LoopConfig(batch_size=8192, epochs=300.0),
        ),
        augment=replace(run.augment, policy="randaugment", operations=2, magnitude=10.0, mixup=0.2),
    ),
    source=f"{PAPER}; {CONFIGS}/vmoe_s32_last2_ilsvrc2012_randaug_light1.py",
    published="ImageNet 73.1 %, V2 59.2 %",
    cost="5 h 50 min on a TPUv3-32",
    departs="Warm-up ends with the first fifth of the run, after 9,240 updates; there it is 10,000. "
    f"{MIXES} {GROUPS.format(room=4)}",
)


def _released(config: RunConfig, *, data: str, file: str, published: str, cost: str = "") -> Preset:
    side, name = config.model.image_size[0], "vmoe-s32-last2" if "s32" in file else "vmoe-b16-every2"
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune {name} of 8 experts (--init) on {data} at {side} px, as its released weights",
        config=config,
        source=f"{PAPER}; {CONFIGS}/{file}.py",
        published=published,
        cost=cost,
        departs=GROUPS.format(room=1.5) + (f" {HEAD_KEPT}" if data == "ImageNet" else ""),
        needs_init=True,
    )


LARGEST = VMOES["vmoe-15b"]
LARGEST_JFT3B = Preset(
    group="pre-train",
    purpose="pre-train vmoe-15b, of 24 mixtures, on JFT-3B, as far as it is known",
    config=_pre_training(
        replace(LARGEST, head_bias=-math.log(DATA_SETS["jft3b"].classes)),
        "jft3b",
        optim=ADAFACTOR,
        loop=MILLION,
    ),
    source=f"{PAPER}, section 4 and appendix; Adafactor and schedule: google-research/vmoe vmoe/train",
    published="fine-tuned: ImageNet 90.35 %",
    cost="16,776 TPUv3-core-days",
    departs="Known are the model, Adafactor and the inverse square root with cooldown. Learning rate, decay, batch "
    "size and length were not published: they are those of ViT-g/14 on the same pictures (arXiv 2106.04560).",
)
LARGEST_IMAGENET = Preset(
    group="fine-tune",
    purpose="fine-tune vmoe-15b (--init) on ImageNet at 384 px, as in the V-MoE paper",
    config=replace(
        run := vit_protocol(
            replace(LARGEST, image_size=(384, 384), num_classes=1000, train_capacity_factor=1.5, expert_dropout=0.1),
            "imagenet",
            lr=0.003,
        ),
        loop=replace(run.loop, steps=STEPS["imagenet"] // 2),
    ),
    source=f"{PAPER}, section 4 and appendix; {CONFIGS}/vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012.py",
    published="90.35 % from JFT-3B",
    departs="The paper halves the ViT paper's steps and chooses the learning rate of 0.003, 0.01, 0.03 and 0.06; which "
    "won was not published, nor at what picture size this model was fine-tuned: here 0.003 and 384 px, as the released "
    "configurations of smaller ones.",
    alias="ViT-MoE-15B (Every-2)",
    needs_init=True,
)

VMOE_PRESETS: dict[str, Preset] = {
    **{f"{row.model}-jft300m": on_jft(row) for row in ON_JFT},
    "vmoe-b16-every2-imagenet21k": B16_IMAGENET21K,
    "vmoe-b16-every2-imagenet": _released(
        _fine_tuning(B16, "imagenet", side=384, lr=0.003),
        data="ImageNet",
        file="vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012",
        published="85.6 %, V2 76.1 % from ImageNet-21k",
    ),
    "vmoe-b16-every2-cifar10": _released(
        _fine_tuning(B16, "cifar10", side=128, lr=0.0015, steps=1000, warmup=100),
        data="CIFAR-10",
        file="vmoe_b16_imagenet21k_randaug_strong_ft_cifar10",
        published="98.7 % from ImageNet-21k",
        cost="10 minutes on a TPUv3-8",
    ),
    "vmoe-s32-last2-imagenet": S32_IMAGENET,
    "vmoe-s32-last2-imagenet-384": _released(
        _fine_tuning(S32, "imagenet", side=384, lr=0.003),
        data="ImageNet",
        file="vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012",
        published="75.9 %, V2 62.0 % from ImageNet at 224 px",
        cost="48 minutes on a TPUv3-8",
    ),
    "vmoe-15b-jft3b": LARGEST_JFT3B,
    "vmoe-15b-imagenet": LARGEST_IMAGENET,
}
