"""Scaling ViTs: g/14 and G/14 (Zhai et al., 2022, "Scaling Vision Transformers", arXiv 2106.04560)."""

from dataclasses import replace

from vitrail.config.run import InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import VITS
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.vit import INCEPTION, vit_protocol

# Few-shot ImageNet top-1 from 5 and 10 pictures per class, and how long they trained for it, in batches of 4,096.
FEW_SHOT = {"vit-giant14": (82.7, 84.5, "6.3"), "vit-gigantic14": (83.0, 84.9, "5")}

ADAFACTOR = OptimConfig(
    name="adafactor",
    lr=8e-4,
    weight_decay=0.03,
    head_decay=3.0,
    clip_norm=1.0,
    schedule="rsqrt",
    rsqrt_timescale=10_000,
    warmup_steps=10_000,
    cooldown_steps=50_000,
)
MILLION = LoopConfig(batch_size=16_384, steps=1_000_000)


def pre_training(name: str) -> Preset:
    """Return how a model is pre-trained on JFT-3B. The configuration is g/14's, and says that G/14's is the same."""
    data = DATA_SETS["jft3b"]
    five, ten, millions = FEW_SHOT[name]
    return Preset(
        group="pre-train",
        purpose=f"pre-train {name} on JFT-3B: Adafactor, inverse square root with cooldown, a head of strong decay",
        config=RunConfig(
            model=replace(VITS[name], num_classes=data.classes, head_bias=-10.0),
            input=InputConfig(interpolation="bilinear", val_fraction=data.held_out),
            augment=INCEPTION,
            recipe=SupervisedConfig(loss="sigmoid"),
            optim=ADAFACTOR,
            loop=MILLION,
        ),
        source="Scaling ViTs, arXiv 2106.04560, section 3; google-research/big_vision "
        "configs/proj/scaling_laws/train_vit_g.py",
        published=f"ImageNet from 5 pictures a class {five} %, from 10 {ten} %, after {millions} M steps of 4,096",
        departs="Batch size and length are the configuration's; the paper trains with up to 32,768 pictures an update.",
    )


# Flat: G/14 is fine-tuned at one learning rate, and its weights are averaged.
FLAT = {"vit-giant14": False, "vit-gigantic14": True}


def fine_tuning(name: str) -> Preset:
    """Return how a model is fine-tuned on ImageNet at 518 px."""
    flat = FLAT[name]
    run = vit_protocol(replace(VITS[name], image_size=(518, 518)), "imagenet", lr=0.03)
    optim = replace(run.optim, schedule="constant", ema=0.9999) if flat else run.optim
    return Preset(
        group="fine-tune",
        purpose=f"fine-tune {name} (--init) on ImageNet at 518 px, as in Scaling ViTs",
        config=replace(run, optim=optim),
        source="Scaling ViTs, arXiv 2106.04560, section 3 and appendix; as the ViT paper, arXiv 2010.11929, table 4",
        published="90.45 ± 0.03 %, ReaL 90.81 %, V2 83.33 % from JFT-3B" if flat else "in figures alone",
        departs="The learning rate is 0.03 or 0.01 in the paper, which does not say which won"
        + (", nor how fast the average forgets: 0.9999, as in the ViT paper." if flat else "."),
        alias="ViT-G/14" if flat else None,
        needs_init=True,
    )


VIT_G_PRESETS: dict[str, Preset] = {
    **{f"{name}-jft3b": pre_training(name) for name in FEW_SHOT},
    **{f"{name}-imagenet": fine_tuning(name) for name in FLAT},
}
