"""Presets to begin with: they run anywhere, from the pictures alone or from weights at hand."""

from dataclasses import replace

from vitrail.config.distillation import DistillationConfig
from vitrail.config.efficientnet import EFFICIENTNETS
from vitrail.config.masked import MaskedConfig
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.presets.base import Preset
from vitrail.presets.small import CIFAR, SMALL_PRESETS
from vitrail.weights import MINI

DEMO = Preset(
    group="start",
    purpose="fine-tune vitrail-mini, pre-trained on CIFAR-100, on 1,000 embedded photos of clothes, in about a minute",
    config=RunConfig(
        data="clothing",
        init=MINI,
        # The size that the weights know: larger pictures cost more and told its features no more.
        model=SMALL_PRESETS[MINI].config.model,
        input=InputConfig(crop_fraction=1.0),
        # Stronger augmentation (TrivialAugment) needs more updates than a demo has.
        augment=AugmentConfig(crop="resized", crop_area=(0.5, 1.0)),
        recipe=SupervisedConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=3e-3, weight_decay=0.05, head_first=0.1, layer_decay=0.8, warmup_steps=50, ema=0.98),
        loop=LoopConfig(batch_size=64, epochs=None, steps=160, eval_every=40, save_every=80),
    ),
    measured="Measured: 63.3 % of the test pictures right (three seeds), from scratch 35.1 %; both in 98 s on two CPU "
    "cores.",
)

CIFAR100 = Preset(
    group="scratch",
    purpose="a plain ViT on full CIFAR-100 (--data: the official binary folder), in ten minutes on two CPU cores",
    config=RunConfig(
        model=ViTConfig(
            image_size=(32, 32),
            patch_size=(4, 4),
            num_classes=100,
            width=128,
            depth=4,
            mlp_dim=256,
            heads=4,
            pool="gap",
            positions="learned-patches",
        ),
        input=CIFAR,
        # So few passes over the data underfit, so there is no label smoothing, and little shift.
        augment=AugmentConfig(crop="padded", pad=2),
        optim=OptimConfig(lr=1.5e-3, weight_decay=0.05, warmup_steps=300, ema=0.998),
        loop=LoopConfig(batch_size=64, epochs=5.5),
    ),
    measured="Measured: 31.99 % top-1 on the test pictures (one seed), 9 min 26 s on two CPU cores.",
)

PHOTOS = Preset(
    group="start",
    purpose="a small ViT from scratch on a folder of one's own photos, when no pretrained weights are at hand",
    config=RunConfig(
        model=ViTConfig(
            image_size=(96, 96),
            patch_size=(12, 12),
            width=128,
            depth=6,
            mlp_dim=256,
            heads=4,
            pool="gap",
            positions="sincos",
        ),
        augment=AugmentConfig(crop="resized", crop_area=(0.35, 1.0), policy="trivialaugment"),
        recipe=SupervisedConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=1.5e-3, weight_decay=0.1, warmup_steps=100, ema=0.998),
        loop=LoopConfig(batch_size=64, epochs=25.0),
    ),
)

FINETUNE = Preset(
    group="start",
    purpose="fine-tune EfficientNet-Lite0, or other pretrained weights (--init), on a folder of one's own photos",
    needs_init=True,
    config=RunConfig(
        init="efficientnet-lite0",
        # A few pictures per batch say little of a feature's mean and variance; ImageNet has settled them.
        model=replace(EFFICIENTNETS["efficientnet-lite0"], image_size=(160, 160), frozen_norm=True),
        augment=AugmentConfig(crop="resized", crop_area=(0.35, 1.0)),
        recipe=SupervisedConfig(label_smoothing=0.1),
        # Layer decay keeps what the lower layers know (BEiT, arXiv 2106.08254; MAE, arXiv 2111.06377, table 9).
        # Head first: a random one would bend good features before it knows them (LP-FT, arXiv 2202.10054).
        optim=OptimConfig(lr=1e-3, weight_decay=0.05, head_first=0.2, layer_decay=0.9, warmup_steps=50, ema=0.99),
        loop=LoopConfig(batch_size=32, epochs=4.0),
    ),
    measured="Measured: without head_first, 90.86 % of the test pictures right on 3,068 clothing photos of 10 classes "
    "(one seed), 365 s.",
)

DISTIL = Preset(
    group="start",
    purpose="teach EfficientNet-Lite0, or other weights, what a larger model (--recipe.teacher) says of one's photos",
    needs_init=True,
    config=replace(
        FINETUNE.config,
        # A patient teacher: long, and with pictures mixed, which make many of few (Beyer et al., arXiv 2106.05237).
        augment=AugmentConfig(crop="resized", crop_area=(0.35, 1.0), mixup=1.0),
        recipe=DistillationConfig(),
        loop=LoopConfig(batch_size=32, epochs=12.0),
    ),
    source="Hinton et al., 2015, arXiv 1503.02531, section 2; temperature and share of the labels as in the comparison "
    "of Tian et al., 2020, arXiv 1910.10699",
)

MASKED = Preset(
    group="pre-train",
    purpose="pre-train a small ViT on a folder of photos without labels, by filling in hidden patches (MAE)",
    config=RunConfig(
        model=replace(PHOTOS.config.model, drop_path=0.0),
        # He et al., 2021, arXiv 2111.06377, table 8, but for the decoder, which is as small as the model.
        augment=AugmentConfig(crop="resized", crop_area=(0.2, 1.0)),
        recipe=MaskedConfig(decoder_width=128, decoder_depth=2, decoder_heads=4),
        optim=OptimConfig(lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.95), warmup_steps=200),
        loop=LoopConfig(batch_size=64, epochs=100.0),
    ),
)

STARTERS = {
    "demo": DEMO,
    "cifar100-vit": CIFAR100,
    "photos": PHOTOS,
    "finetune": FINETUNE,
    "distil": DISTIL,
    "masked": MASKED,
}
