"""ImageNet-21K-P: semantic softmax, and transfer (Ridnik et al., 2021, arXiv 2104.10972; Alibaba-MIIL/ImageNet21K)."""

from dataclasses import replace

from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.semantic import SemanticConfig
from vitrail.config.vit import VITS
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS

MODEL = VITS["vit-b16-21kp"]
LEVELS = InputConfig(fit="squash", interpolation="bilinear", mean=(0.0,), std=(1.0,))
"""Whole pictures squashed to size, values in [0, 1] (src_files/data_loading/data_loader.py)."""
IMAGENET_21K, CIFAR100, BATCH = DATA_SETS["imagenet21kp"], DATA_SETS["cifar100"], 512

SEMANTIC = Preset(
    group="pre-train",
    purpose="pre-train vit-b16-21kp on ImageNet-21K-P by semantic softmax, from weights of ImageNet (--init)",
    config=RunConfig(
        model=MODEL,
        input=replace(LEVELS, val_fraction=IMAGENET_21K.held_out),
        augment=AugmentConfig(crop="none", flip=0.0, policy="randaugment", cutout=112),
        recipe=SemanticConfig(tree="imagenet21k_miil_tree.pth", label_smoothing=0.2, deepest=False),
        optim=OptimConfig(
            name="adam",
            lr=3e-4,
            weight_decay=1e-4,
            clip_norm=0.0,
            schedule="cosine",
            warmup_steps=IMAGENET_21K.steps(8.0, BATCH),
        ),
        loop=LoopConfig(batch_size=BATCH, epochs=80.0),
    ),
    source="ImageNet-21K Pretraining for the Masses, arXiv 2104.10972; Alibaba-MIIL/ImageNet21K "
    "train_semantic_softmax.py",
    published="semantic top-1 77.6 % (README); fine-tuned: ImageNet 84.4 %",
    departs="--recipe.tree is the authors' file, to be brought along with the pictures. 64 pictures in each of 8 "
    "processes: the code has the 64, nobody the 8. OneCycle warms up along a cosine from a twentieth of the peak, here "
    "along a line from 0. RandAugment is big_vision's, there a package of its own; Cutout comes after it, in the mean "
    "colour, there before it in any.",
    needs_init=True,
)
TRANSFER = Preset(
    group="fine-tune",
    purpose="fine-tune vit-b16-21kp (--init) on CIFAR-100 at 224 px, as its authors show",
    config=RunConfig(
        model=replace(MODEL, num_classes=CIFAR100.classes),
        input=replace(LEVELS, val_fraction=CIFAR100.held_out),
        augment=AugmentConfig(crop="resized", crop_area=(0.08, 1.0), policy="autoaugment-v0", erase=0.5),
        recipe=SupervisedConfig(loss="softmax", label_smoothing=0.1),
        optim=OptimConfig(
            name="adam",
            lr=2e-4,
            min_lr=1e-8,
            weight_decay=1e-4,
            clip_norm=0.0,
            schedule="cosine",
            warmup_steps=CIFAR100.steps(3.0, 128),
            ema=0.995,
        ),
        loop=LoopConfig(batch_size=128, epochs=50.0),
    ),
    source="arXiv 2104.10972; Alibaba-MIIL/ImageNet21K Transfer_learning.md",
    published="94.2 % (as Papers with Code lists it)",
    departs="The command is given for Mixer-B/16; whether ViT-B/16 reached its figure by it is not known. "
    "AutoAugment translates by 225 pixels as in EfficientNet's code, in timm's by 0.405 of the picture.",
    alias="ViT-B-16 (ImageNet-21K-P pretrain)",
    needs_init=True,
)

IMAGENET21K_PRESETS: dict[str, Preset] = {
    "vit-b16-21kp-imagenet21kp": SEMANTIC,
    "vit-b16-21kp-cifar100": TRANSFER,
}
