"""Meta Pseudo Labels: few labels and many pictures (Pham et al., 2021, arXiv 2003.10580), with UDA (arXiv 1904.12848).

The hyper-parameters are those of the released commands (google-research/meta_pseudo_labels, README.md and
flag_utils.py), which its authors call more up to date than the paper's (google-research issue 540). Rates there are for
256 labelled pictures: 0.1 is 0.05 at the 128 of CIFAR. Which pictures keep their labels follows from `--seed`.
"""

from dataclasses import replace

from vitrail.config.efficientnet import EFFICIENTNETS
from vitrail.config.meta_pseudo_labels import MetaPseudoLabelsConfig
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig
from vitrail.config.wide_resnet import WIDE_RESNETS
from vitrail.presets.base import Preset

CODE = "google-research/meta_pseudo_labels: README.md, training_utils.py, data_utils.py, augment.py"
TEACHES = (
    "Pseudo labels are hard and the feedback is the loss on labels before the student's step minus that after it, as "
    "the paper derives it; the released code has soft labels and a feedback whose gradient is 0."
)
SMALL_DEPARTS = (
    "BatchNorm takes all pictures of a device and micro-batch together, not 256 at a time. Fine-tuning takes 128 "
    "pictures an update, not 512. What comes into a picture from outside is of the mean colour, not 128."
)

CIFAR10 = Preset(
    group="semi-supervised",
    purpose="Wide-ResNet-28-2 on CIFAR-10 with 4,000 labels: Meta Pseudo Labels",
    config=RunConfig(
        model=WIDE_RESNETS["wide-resnet-28-2"],
        # 5,000 pictures to validate on, 4,000 with labels, 41,000 without.
        input=InputConfig(
            crop_fraction=1.0,
            val_fraction=0.1,
            labelled=4_000.0,
            mean=(0.4914, 0.482158, 0.4465309),
            std=(0.247032, 0.243485, 0.26159),
        ),
        augment=AugmentConfig(
            crop="padded", pad=4, policy="randaugment-cifar", operations=2, magnitude=16.0, cutout=16
        ),
        recipe=MetaPseudoLabelsConfig(
            unlabelled_ratio=7,
            label_smoothing=0.15,
            uda_weight=8.0,
            uda_steps=5_000,
            uda_temperature=0.7,
            uda_threshold=0.6,
            student_wait=3_000,
            finetune_steps=1_000,
            finetune_lr=1e-5,
        ),
        optim=OptimConfig(
            name="sgd",
            lr=0.05,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            clip_norm=0.0,
            warmup_steps=5_000,
            ema=0.995,
        ),
        loop=LoopConfig(batch_size=128, steps=301_000),  # 300,000 and fine-tuning
    ),
    source=f"Meta Pseudo Labels (arXiv 2003.10580), section 3.2; {CODE}",
    published="96.11 ± 0.07 % top-1 on CIFAR-10 (ten runs)",
    cost="the authors: TPUs",
    departs=f"{TEACHES} {SMALL_DEPARTS}",
)

CIFAR100 = Preset(
    group="semi-supervised",
    purpose="Wide-ResNet-28-2 on CIFAR-100 with 10,000 labels: Meta Pseudo Labels",
    config=replace(
        CIFAR10.config,
        model=replace(WIDE_RESNETS["wide-resnet-28-2"], num_classes=100),
        input=replace(CIFAR10.config.input, labelled=10_000.0),  # the code normalises CIFAR-100 by CIFAR-10's numbers
    ),
    source=f"the settings of CIFAR-10 in Meta Pseudo Labels (arXiv 2003.10580); {CODE}",
    departs=f"No command for CIFAR-100 was released, and no result. {TEACHES} {SMALL_DEPARTS}",
)

RELEASED = Preset(
    group="semi-supervised",
    purpose="Wide-ResNet-28-2 on CIFAR-10 with 4,000 labels, as the released code of Meta Pseudo Labels trains it",
    config=replace(CIFAR10.config, recipe=replace(CIFAR10.config.recipe, feedback="released")),
    source=CIFAR10.source,
    published=CIFAR10.published,
    cost=CIFAR10.cost,
    departs=(
        "The feedback is measured without dropout and by the same statistics before and after; its gradient is 0 in "
        f"both. The released code has no fine-tuning. {SMALL_DEPARTS}"
    ),
)

NO_FEEDBACK = Preset(
    group="semi-supervised",
    purpose="Wide-ResNet-28-2 on CIFAR-10 with 4,000 labels: UDA and a student, without feedback to compare with",
    config=replace(CIFAR10.config, recipe=replace(CIFAR10.config.recipe, feedback="none")),
    source=f"Meta Pseudo Labels without its third term; UDA (arXiv 1904.12848); {CODE}",
    cost=CIFAR10.cost,
    departs=SMALL_DEPARTS,
)

IMAGENET10 = Preset(
    group="semi-supervised",
    purpose="EfficientNet-B0 on ImageNet with a tenth of its labels: Meta Pseudo Labels",
    config=RunConfig(
        model=replace(EFFICIENTNETS["efficientnet-b0"], dropout=0.1, drop_path=0.0),
        input=InputConfig(labelled=0.1, val_fraction=0.01, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        augment=AugmentConfig(crop="resized", policy="randaugment", operations=2, magnitude=17.0),
        recipe=MetaPseudoLabelsConfig(
            unlabelled_ratio=15,
            label_smoothing=0.1,
            uda_weight=20.0,
            uda_steps=50_000,
            uda_temperature=0.5,
            uda_threshold=0.6,
            teacher_lr_ratio=1.5,
            student_wait=20_000,
            finetune_steps=2_000,
            finetune_lr=1e-5,
        ),
        optim=OptimConfig(
            name="sgd",
            lr=0.4,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            clip_norm=5.0,
            warmup_steps=5_000,
            ema=0.999,
        ),
        loop=LoopConfig(batch_size=1024, steps=702_000),
    ),
    source=f"the settings of ResNet-50 in Meta Pseudo Labels (arXiv 2003.10580); {CODE}",
    departs=(
        "The model is ours: the authors trained ResNet-50, which reached 73.89 % top-1. Pictures without labels are "
        "those whose labels are not kept; the authors took all: name ImageNet again with --input.unlabelled for that. "
        "RandAugment acts on every picture. Fine-tuning takes 1,024 pictures an update, not 512. The other releases of "
        f"the 10 % split are not drawn class by class. {TEACHES}"
    ),
)

EFFICIENTNET_L2 = Preset(
    group="semi-supervised",
    purpose="EfficientNet-L2 on ImageNet and many pictures without labels: Meta Pseudo Labels at full size",
    config=replace(
        IMAGENET10.config,
        model=replace(EFFICIENTNETS["efficientnet-l2"], image_size=(512, 512)),
        input=replace(IMAGENET10.config.input, labelled=None),
        recipe=replace(IMAGENET10.config.recipe, unlabelled_ratio=8, finetune_steps=20_000),
        optim=replace(IMAGENET10.config.optim, lr=0.8),
        loop=LoopConfig(batch_size=2048, steps=1_020_000),
    ),
    source=f"Meta Pseudo Labels (arXiv 2003.10580), section 4, and its authors' slides; {CODE}",
    published="90.2 % top-1, 98.8 % top-5 and 91.02 % ReaL on ImageNet (480 million parameters)",
    cost="the authors: 2,048 TPUv3 cores for 11 days; JFT-300M as pictures without labels (--input.unlabelled)",
    departs=(
        "JFT is not public. Published are resolution, batch sizes and lengths. Dropout of 0.5 and drop-path of 0.2 are "
        "EfficientNet-L2's own; all else is what ResNet-50 was trained with on a tenth of ImageNet. "
        f"{TEACHES}"
    ),
    alias="Meta Pseudo Labels (EfficientNet-L2)",
)

MPL_PRESETS: dict[str, Preset] = {
    "wrn28-2-cifar10-4000-mpl": CIFAR10,
    "wrn28-2-cifar10-4000-mpl-released-code": RELEASED,
    "wrn28-2-cifar10-4000-mpl-feedback-none": NO_FEEDBACK,
    "wrn28-2-cifar100-10000-mpl": CIFAR100,
    "efficientnet-b0-imagenet10-mpl": IMAGENET10,
    "efficientnet-l2-imagenet-mpl": EFFICIENTNET_L2,
}
