"""Speedruns: the most accuracy that minutes on one GPU make of CIFAR, from scratch."""

from dataclasses import replace

from vitrail.config.run import AugmentConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import ConvStem
from vitrail.presets.base import Preset
from vitrail.presets.small import CIFAR, FAST

# The hybrid of `cifar100-10min-cpu` for a device that computes a thousand times as fast: 15 M parameters, 49 tokens.
LARGE = replace(FAST, stem=ConvStem(widths=(128, 256)), width=384, depth=8, mlp_dim=1536, heads=6, drop_path=0.1)

CIFAR100 = Preset(
    group="scratch",
    purpose="CIFAR-100 in ten minutes of one GPU (--data: the official binary folder)",
    config=RunConfig(
        model=LARGE,
        input=CIFAR,
        augment=AugmentConfig(crop="padded", pad=4, policy="trivialaugment", cutout=8, mixup=0.2, cutmix=1.0),
        recipe=SupervisedConfig(label_smoothing=0.1),
        optim=OptimConfig(
            name="muon", lr=0.01, weight_decay=0.1, momentum=0.95, betas=(0.9, 0.99), schedule="cosine",
            warmup_steps=500, clip_norm=0.0, ema=0.999,
        ),
        loop=LoopConfig(batch_size=512, eval_every=10**9),
        minutes=9.5,
    ),
    cost="ten minutes of one GPU; `benchmarks/gpu.py` runs it",
)  # fmt: skip

CIFAR10 = Preset(
    group="scratch",
    purpose="CIFAR-10 in two minutes of one GPU (--data: the official binary folder)",
    config=replace(
        CIFAR100.config,
        model=replace(LARGE, num_classes=10, width=256, depth=6, mlp_dim=1024, heads=4, drop_path=0.05),
        augment=AugmentConfig(crop="padded", pad=4, policy="trivialaugment", cutout=8),
        minutes=1.9,
    ),
    cost="two minutes of one GPU; `benchmarks/gpu.py` runs it",
)

SPEEDRUNS = {"cifar100-speedrun": CIFAR100, "cifar10-speedrun": CIFAR10}
