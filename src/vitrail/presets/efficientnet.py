"""EfficientNet: B0 to B7 from scratch on ImageNet (Tan and Le, 2019, arXiv 1905.11946, section 5.2; tensorflow/tpu)."""

from vitrail.config.efficientnet import EFFICIENTNETS
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, OptimConfig, RunConfig, SupervisedConfig
from vitrail.presets.base import Preset
from vitrail.presets.data_sets import DATA_SETS

# Top-1 with AutoAugment (table 2). Picture size and dropout are the size's.
TOP1 = {"b0": 77.1, "b1": 79.1, "b2": 80.1, "b3": 81.6, "b4": 82.9, "b5": 83.6, "b6": 84.0, "b7": 84.3}
IMAGENET, BATCH = DATA_SETS["imagenet"], 4096

EFFICIENTNET_PRESETS: dict[str, Preset] = {
    f"efficientnet-{size}-imagenet": Preset(
        group="scratch",
        purpose=f"efficientnet-{size} from scratch on ImageNet, with RMSProp and AutoAugment as in its paper",
        config=RunConfig(
            model=EFFICIENTNETS[f"efficientnet-{size}"],
            input=InputConfig(val_fraction=IMAGENET.held_out, mean=IMAGENET_MEAN, std=IMAGENET_STD),
            augment=AugmentConfig(crop="resized", crop_area=(0.08, 1.0), policy="autoaugment-v0"),
            recipe=SupervisedConfig(loss="softmax", label_smoothing=0.1),
            optim=OptimConfig(
                name="rmsprop",
                lr=0.016 * BATCH / 256,
                momentum=0.9,
                weight_decay=1e-5,
                clip_norm=0.0,
                schedule="exponential",
                decay_factor=0.97,
                decay_steps=IMAGENET.steps(2.4, BATCH),
                warmup_steps=IMAGENET.steps(5.0, BATCH),
                ema=0.9999,
            ),
            loop=LoopConfig(batch_size=BATCH, epochs=350.0),
        ),
        source="EfficientNet, arXiv 1905.11946, section 5.2; tensorflow/tpu models/official/efficientnet/main.py",
        published=f"{top1} % (table 2)",
        departs="Biases do not decay; there, all but those of norms do. BatchNorm sees the pictures of one process, "
        "there those of several.",
    )
    for size, top1 in TOP1.items()
}
