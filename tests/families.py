"""One tiny member of every family, for the tests that all families must pass."""

from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.cvt import CvTConfig
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.model import ModelConfig
from vitrail.config.vit import ConvStem, ResNetStem, ViTConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.config.wide_resnet import WideResNetConfig

TINY: dict[str, ModelConfig] = {
    "vit": ViTConfig(image_size=(32, 32), patch_size=(8, 8), num_classes=5, width=16, depth=2, mlp_dim=24, heads=2),
    "hybrid": ViTConfig(
        image_size=(32, 32),
        patch_size=(2, 2),
        num_classes=5,
        width=16,
        depth=1,
        mlp_dim=24,
        heads=2,
        stem=ResNetStem(blocks=(1,), width=32),
    ),
    "convolutional hybrid": ViTConfig(
        image_size=(32, 32),
        patch_size=(1, 1),
        num_classes=5,
        width=16,
        depth=1,
        mlp_dim=24,
        heads=2,
        pool="gap+max",
        stem=ConvStem(filters=8, widths=(8, 12)),
    ),
    "vit-moe": ViTMoEConfig(
        image_size=(32, 32),
        patch_size=(8, 8),
        num_classes=5,
        width=16,
        depth=2,
        mlp_dim=24,
        heads=2,
        experts=3,
        moe_layers=(1,),
    ),
    "cvt": CvTConfig(
        image_size=(32, 32), num_classes=5, widths=(8, 12, 16), depths=(1, 1, 2), heads=(1, 3, 2), mlp_dims=(9, 24, 32)
    ),
    "coatnet": CoAtNetConfig(
        image_size=(64, 64), num_classes=5, widths=(4, 4, 8, 8, 16), depths=(1, 1, 2, 1), head_dim=4
    ),
    "efficientnet": EfficientNetConfig(
        image_size=(32, 32),
        num_classes=5,
        stem_width=8,
        widths=(4, 6, 8, 10, 12, 14, 16),
        depths=(1, 1, 2, 1, 1, 1, 1),
        head_width=24,
    ),
    "wide-resnet": WideResNetConfig(
        image_size=(16, 16), num_classes=5, stem_width=4, widths=(8, 12, 16), depths=(1, 2, 1), slope=0.1
    ),
}
