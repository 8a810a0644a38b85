"""Sharpness-aware minimization: runs of SAM (arXiv 2010.01412), ASAM (2102.11600), GSAM (2203.08065).

How many pictures are perturbed together (m in SAM, section 4.1) is part of a recipe: `accumulation` is chosen so that
one device perturbs as many together as an accelerator of the authors did; on n devices, take an n-th of it.
"""

from dataclasses import replace

from vitrail.config.efficientnet import EFFICIENTNETS
from vitrail.config.recipes import SamConfig
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import VITS
from vitrail.config.wide_resnet import WIDE_RESNETS
from vitrail.presets.base import Preset

CIFAR100_MEAN = (0.50707516, 0.48654887, 0.44091784)
CIFAR100_STD = (0.26733429, 0.25643846, 0.27615047)

SAM_DEPARTS = (
    "The border of the random crop is of the mean colour, not a reflection. 2 % of the training pictures are set "
    "aside to choose the best weights by; the authors trained on all."
)
HEAD_DEPARTS = "The new head starts from zeros, not from small random numbers."
SAM_CODE = "google-research/sam: flax_training.py, dataset_source.py"

FINETUNED_INPUT = InputConfig(fit="squash", val_fraction=0.02, mean=CIFAR100_MEAN, std=CIFAR100_STD, renormalise=True)
# AutoAugment was found for pictures of 32 pixels: they are made large last.
SMALL_AUTOAUGMENT = AugmentConfig(crop="padded", pad=4, policy="autoaugment-cifar", size=(32, 32))

EFFICIENTNET_L2 = Preset(
    group="fine-tune",
    purpose="fine-tune EfficientNet-L2 (Noisy Student, 475 px) on CIFAR-100 with SAM: the leaderboard's first place",
    needs_init=True,
    alias="EffNet-L2 (SAM)",
    config=RunConfig(
        model=replace(EFFICIENTNETS["efficientnet-l2"], image_size=(475, 475), num_classes=100, frozen_norm=True),
        input=FINETUNED_INPUT,
        augment=SMALL_AUTOAUGMENT,
        recipe=SamConfig(rho=0.05, l2_penalty=1e-5),
        optim=OptimConfig(name="sgd", lr=0.008, momentum=0.9, nesterov=True, weight_decay=0.0, clip_norm=5.0),
        loop=LoopConfig(batch_size=512, accumulation=128, steps=10_000),
    ),
    source=f"SAM (arXiv 2010.01412), section 3.2 and appendix C.2; {SAM_CODE}, efficientnet.py",
    published="96.08 % top-1 on CIFAR-100 (error 3.92 +- 0.06; without SAM 4.07 +- 0.08)",
    cost="the authors: a TPUv3 pod slice of 128 cores; an update is two passes over 512 pictures of 475 pixels",
    departs=(
        "The paper does not publish the radius of this run: 0.05 is its default, of a grid from 0.01 to 0.5. It says "
        "that steps were adjusted to the halved batch; 10,000 are B7's 5,000 times two. The start is the Noisy Student "
        f"checkpoint, as tf_efficientnet_l2.ns_jft_in1k_475 of timm has it. {HEAD_DEPARTS} {SAM_DEPARTS}"
    ),
)

EFFICIENTNET_B7 = Preset(
    group="fine-tune",
    purpose="fine-tune EfficientNet-B7 (ImageNet, 600 px) on CIFAR-100 with SAM",
    needs_init=True,
    config=RunConfig(
        model=replace(EFFICIENTNETS["efficientnet-b7"], num_classes=100, frozen_norm=True),
        input=FINETUNED_INPUT,
        augment=SMALL_AUTOAUGMENT,
        recipe=SamConfig(rho=0.05, l2_penalty=1e-5),
        optim=OptimConfig(name="sgd", lr=0.016, momentum=0.9, nesterov=True, weight_decay=0.0, clip_norm=5.0),
        loop=LoopConfig(batch_size=1024, accumulation=128, steps=5_000),
    ),
    source=f"SAM (arXiv 2010.01412), section 3.2 and appendix C.2; {SAM_CODE}, efficientnet.py",
    published="92.44 % top-1 on CIFAR-100 at this radius, 92.56 % at the best (without SAM 92.32 %)",
    departs=f"The best radius is not published; on how many accelerators it ran neither. {HEAD_DEPARTS} {SAM_DEPARTS}",
)

WIDE_RESNET_INPUT = InputConfig(crop_fraction=1.0, val_fraction=0.02, mean=CIFAR100_MEAN, std=CIFAR100_STD)
WIDE_RESNET_DEPARTS = (
    "The authors' Wide-ResNet has shortcuts without weights (mean of 2x2 places, channels of zeros); this one has the "
    f"1x1 convolutions of the network's own paper. {SAM_DEPARTS}"
)

WIDE_RESNET_SAM = Preset(
    group="scratch",
    purpose="Wide-ResNet-28-10 on CIFAR-100 from scratch with SAM and AutoAugment",
    config=RunConfig(
        model=replace(WIDE_RESNETS["wide-resnet-28-10"], num_classes=100),
        input=WIDE_RESNET_INPUT,
        augment=AugmentConfig(crop="padded", pad=4, policy="autoaugment-cifar"),
        recipe=SamConfig(rho=0.1, l2_penalty=5e-4),
        optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.0, clip_norm=5.0),
        loop=LoopConfig(batch_size=256, accumulation=8, epochs=200.0),
    ),
    source=f"SAM (arXiv 2010.01412), tables 1 and 6; {SAM_CODE}, wide_resnet.py",
    published="86.4 % top-1 on CIFAR-100 (error 13.6); 87.2 % in 1,800 epochs (learning rate 0.05, decay 1e-3)",
    cost="the authors: eight GPUs, 32 pictures on each",
    departs=WIDE_RESNET_DEPARTS,
)

WIDE_RESNET_SGD = Preset(
    group="scratch",
    purpose="Wide-ResNet-28-10 on CIFAR-100 from scratch, plain: what SAM is compared with",
    config=replace(
        WIDE_RESNET_SAM.config,
        recipe=SupervisedConfig(),
        optim=replace(WIDE_RESNET_SAM.config.optim, weight_decay=5e-4, decay="all"),
        loop=LoopConfig(batch_size=256, epochs=200.0),
    ),
    source=f"SAM (arXiv 2010.01412), tables 1 and 6; {SAM_CODE}, wide_resnet.py",
    published="84.2 % top-1 on CIFAR-100 (error 15.8), the better of 200 and 400 epochs",
    cost="half of what SAM takes for as many epochs",
    departs=f"Decay joins the gradient after it is clipped, not before. {WIDE_RESNET_DEPARTS}",
)

WIDE_RESNET_ASAM = Preset(
    group="scratch",
    purpose="Wide-ResNet-28-10 on CIFAR-100 from scratch with ASAM, random crops and label smoothing",
    config=RunConfig(
        model=replace(WIDE_RESNETS["wide-resnet-28-10"], num_classes=100),
        input=replace(WIDE_RESNET_INPUT, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
        augment=AugmentConfig(crop="padded", pad=4),
        recipe=SamConfig(variant="asam", rho=1.0, eta=0.01, label_smoothing=0.1),
        optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, decay="all", clip_norm=0.0),
        loop=LoopConfig(batch_size=128, epochs=200.0),
    ),
    source="ASAM (arXiv 2102.11600); SamsungLabs/ASAM: example_cifar.py, its command for CIFAR-100",
    cost="one GPU; all 128 pictures are perturbed together",
    departs=(
        "eta is the paper's 0.01, where the command leaves it at 0. The border of the random crop is of the mean "
        "colour, not black; the learning rate falls with every update, not every epoch. 2 % of the training pictures "
        "are set aside."
    ),
)

VIT_SAM = Preset(
    group="scratch",
    purpose="ViT-B/16 on ImageNet from scratch with SAM, without strong augmentation",
    config=RunConfig(
        model=replace(VITS["vit-b16"], head_bias=-10.0),
        input=InputConfig(interpolation="bilinear", val_fraction=0.01),
        augment=AugmentConfig(crop="resized", crop_area=(0.05, 1.0)),
        recipe=SamConfig(rho=0.2, loss="sigmoid"),
        optim=OptimConfig(
            lr=3e-3, weight_decay=0.3, clip_norm=1.0, schedule="linear", min_lr=3e-5, warmup_steps=10_000
        ),
        loop=LoopConfig(batch_size=4096, accumulation=128, epochs=300.0),
    ),
    source="Chen et al., 2022 (arXiv 2106.01548); google-research/vision_transformer: issue 153",
    published="5.3 points of ImageNet top-1 above the same run without SAM",
    cost="the authors: 64 TPU chips",
    departs=(
        "The radius, 0.2, is the one spoken of in that issue, not checked against the paper's table of settings. "
        "Optimizer, schedule and loss are those of GSAM's configuration, which was made to be compared with this run."
    ),
)

VIT_GSAM = Preset(
    group="scratch",
    purpose="ViT-B/16 on ImageNet from scratch with GSAM, without strong augmentation",
    config=replace(
        VIT_SAM.config,
        model=replace(VITS["vit-b16"], pool="gap", positions="learned-patches", head_bias=-10.0),
        recipe=SamConfig(variant="gsam", rho=0.6, rho_min=0.1, alpha=0.6, loss="sigmoid"),
    ),
    source="GSAM (arXiv 2203.08065); google-research/big_vision: configs/proj/gsam/vit_i1k_gsam_no_aug.py",
    published="with ViT-B/32, 3.2 points above SAM and 5.4 above AdamW on ImageNet",
    departs=(
        "Decay is the paper's 0.3 times the learning rate; the configuration says 0.001 where that makes 0.0009. The "
        "radius is 0.105 at the end, not 0.1, for it is 0.1 at learning rate 0. Of how many accelerators each "
        "perturbed for itself is not published: 128, as in SAM's run of the same model."
    ),
)

SAM_PRESETS: dict[str, Preset] = {
    "efficientnet-l2-cifar100": EFFICIENTNET_L2,
    "efficientnet-b7-cifar100": EFFICIENTNET_B7,
    "wide-resnet-28-10-cifar100": WIDE_RESNET_SGD,
    "wide-resnet-28-10-cifar100-sam": WIDE_RESNET_SAM,
    "wide-resnet-28-10-cifar100-asam": WIDE_RESNET_ASAM,
    "vit-b16-imagenet-sam": VIT_SAM,
    "vit-b16-imagenet-gsam": VIT_GSAM,
}
