"""Models by configuration or name."""

import torch

from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.cvt import CvTConfig
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.model import ModelConfig, model_config
from vitrail.config.vit import ViTConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.config.wide_resnet import WideResNetConfig
from vitrail.models.base import ImageModel
from vitrail.models.coatnet import CoAtNet
from vitrail.models.cvt import CvT
from vitrail.models.efficientnet import EfficientNet
from vitrail.models.vit import ViT
from vitrail.models.vit_moe import ViTMoE
from vitrail.models.wide_resnet import WideResNet

__all__ = ["CoAtNet", "CvT", "EfficientNet", "ImageModel", "ViT", "ViTMoE", "WideResNet", "build", "create_model"]


def build(config: ModelConfig) -> ImageModel:
    """Return the model of a configuration, freshly initialised (left empty under `torch.device("meta")`)."""
    match config:
        case ViTMoEConfig():
            model = ViTMoE(config)
        case ViTConfig():
            model = ViT(config)
        case CvTConfig():
            model = CvT(config)
        case CoAtNetConfig():
            model = CoAtNet(config)
        case EfficientNetConfig():
            model = EfficientNet(config)
        case WideResNetConfig():
            model = WideResNet(config)
    if next(model.parameters()).device != torch.device("meta"):
        model.init_weights()
    return model


def create_model(name: str, **overrides: object) -> ImageModel:
    """Return a freshly initialised model.

    Args:
        name: A name of `vitrail.list_models()` or a leaderboard alias ("ViT-H/14"); case matters in aliases.
        **overrides: Fields of the family's configuration, as `num_classes=100`, `image_size=384`, `channels=1`.

    Raises:
        UserError: When there is no such model or field.
    """
    return build(model_config(name, **overrides))
