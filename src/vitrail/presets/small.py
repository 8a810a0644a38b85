"""Small hybrids for small pictures: a short training on two CPU cores, and the weights that come with Vitrail."""

from dataclasses import replace

from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import ConvStem, ViTConfig
from vitrail.presets.base import Preset

CIFAR = InputConfig(
    crop_fraction=1.0,
    val_fraction=0.02,
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)

# Convolutions see first, attention then weighs what they found: 0.68 M parameters, 49 tokens.
FAST = ViTConfig(
    image_size=(32, 32),
    patch_size=(1, 1),
    stem=ConvStem(widths=(96, 128)),
    num_classes=100,
    width=128,
    depth=2,
    mlp_dim=256,
    heads=4,
    pool="gap+max",
    positions="learned-patches",
)

CIFAR100_10MIN = Preset(
    group="scratch",
    purpose="the best that ten minutes on two CPU cores make of CIFAR-100 (--data: the official binary folder)",
    config=RunConfig(
        model=FAST,
        input=CIFAR,
        augment=AugmentConfig(crop="padded", pad=2),
        recipe=SupervisedConfig(label_smoothing=0.1),
        # Muon needs half the epochs that AdamW needs here.
        optim=OptimConfig(
            name="muon", lr=0.01, weight_decay=0.05, momentum=0.95, betas=(0.9, 0.99), schedule="linear",
            warmup_steps=50, clip_norm=0.0, ema=0.99,
        ),
        loop=LoopConfig(batch_size=192, epochs=4.8, eval_every=10_000),
    ),
    measured="Measured: 63.5 % top-1 on the test pictures (three seeds), 9 min 27 s on two CPU cores; where they have "
    "AMX, --loop.precision bf16 --loop.epochs 9.6 make 67.7 % in 8 min.",
)  # fmt: skip

MINI = Preset(
    group="pre-train",
    purpose="the weights that come with Vitrail (`vitrail-mini`): a compact hybrid on CIFAR-100, for 32 to 96 pixels",
    config=replace(
        CIFAR100_10MIN.config,
        model=replace(FAST, stem=ConvStem(widths=(96, 192)), width=192, depth=4, mlp_dim=384, heads=6, drop_path=0.1),
        augment=AugmentConfig(crop="padded", pad=4, cutout=8),
        optim=replace(CIFAR100_10MIN.config.optim, warmup_steps=200, ema=0.998),
        loop=LoopConfig(batch_size=256, epochs=20.0),
    ),
    measured="Measured: 72.53 % top-1 on the test pictures, last weights in half precision (one seed, bf16), 63 min on "
    "one CPU core with AMX.",
)

SMALL_PRESETS = {"cifar100-10min-cpu": CIFAR100_10MIN, "vitrail-mini": MINI}
