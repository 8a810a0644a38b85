"""Better plain ViT baselines: ViT-S/16 on ImageNet in a few hours (Beyer et al., 2022, arXiv 2205.01580)."""

from dataclasses import replace

from vitrail.config.run import InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import VITS
from vitrail.presets.augreg import MIXES
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS
from vitrail.presets.vit import INCEPTION

# Epochs: top-1, ReaL, V2. Head of two layers, mean pooling, sin-cos positions: each better than what the ViT paper has.
RESULTS = {90: (76.5, 83.1, 64.2), 150: (78.5, 84.5, 66.4), 300: (80.0, 85.4, 68.3)}

PLAIN_VIT_PRESETS: dict[str, Preset] = {
    f"vit-s16-imagenet-{epochs}ep": Preset(
        group="scratch",
        purpose=f"vit-s16 from scratch on ImageNet in {epochs} epochs: the better plain ViT baseline",
        config=RunConfig(
            model=replace(VITS["vit-s16"], pool="gap", positions="sincos", pre_logits=VITS["vit-s16"].width),
            input=InputConfig(interpolation="bilinear", val_fraction=DATA_SETS["imagenet"].held_out),
            augment=replace(INCEPTION, policy="randaugment", operations=2, magnitude=10.0, mixup=0.2),
            recipe=SupervisedConfig(loss="softmax"),
            optim=OptimConfig(lr=1e-3, weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=10_000),
            loop=LoopConfig(batch_size=1024, epochs=float(epochs)),
        ),
        source="Better plain ViT baselines, arXiv 2205.01580; google-research/big_vision configs/vit_s16_i1k.py",
        published=f"ImageNet {top1} %, ReaL {real} %, V2 {v2} %",
        cost="6 to 7 hours on a TPUv3-8" if epochs == 90 else "",
        departs=f"{MIXES} Adam's first moment is fp32, there bf16.",
    )
    for epochs, (top1, real, v2) in RESULTS.items()
}
"""The full recipe at its three lengths."""
