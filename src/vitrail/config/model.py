"""Names of models: what `vitrail models` lists, and the configuration each stands for.

A new size is one row in its family's file; a new family is one more configuration class in `ModelConfig`.
"""

from dataclasses import fields
from typing import get_args

from vitrail.config.coatnet import COATNETS, CoAtNetConfig
from vitrail.config.codec import from_json, to_json
from vitrail.config.cvt import CVTS, CvTConfig
from vitrail.config.efficientnet import EFFICIENTNETS, EfficientNetConfig
from vitrail.config.vit import VITS, ViTConfig, vit_of_any_patch
from vitrail.config.vit_moe import VMOES, ViTMoEConfig
from vitrail.config.wide_resnet import WIDE_RESNETS, WideResNetConfig
from vitrail.errors import UserError, did_you_mean

ModelConfig = ViTConfig | ViTMoEConfig | CvTConfig | CoAtNetConfig | EfficientNetConfig | WideResNetConfig
"""What a model is. Every family has `image_size`, `channels`, `num_classes`, `dropout`, `drop_path`, `head_bias`."""
FAMILIES: tuple[type[ModelConfig], ...] = get_args(ModelConfig)

MODELS: dict[str, ModelConfig] = {**VITS, **VMOES, **CVTS, **COATNETS, **EFFICIENTNETS, **WIDE_RESNETS}
"""Every published size under its name."""

# Names of the leaderboards and papers; letter case matters: g/14 is not G/14.
ALIASES: dict[str, str] = {
    "ViT-B/16": "vit-b16",
    "ViT-L/16": "vit-l16",
    "ViT-H/14": "vit-h14",
    "ViT-g/14": "vit-giant14",
    "ViT-G/14": "vit-gigantic14",
    "ViT-B-16 (ImageNet-21K-P pretrain)": "vit-b16-21kp",
    "ViT-MoE-15B (Every-2)": "vmoe-15b",
    "CvT-W24": "cvt-w24",
    "CoAtNet-6": "coatnet-6",
    "CoAtNet-7": "coatnet-7",
    "EffNet-L2 (SAM)": "efficientnet-l2",
    "Meta Pseudo Labels (EfficientNet-L2)": "efficientnet-l2",
}


def list_models() -> list[str]:
    """Return the names of all published sizes."""
    return list(MODELS)


def model_config(name: str, **overrides: object) -> ModelConfig:
    """Return the configuration of a model name or leaderboard alias, with fields replaced by `overrides`.

    `vit-SIZEPATCH` takes any patch size (`vit-s7`). `image_size` and `patch_size` also take one number.

    Raises:
        UserError: when there is no such model or field.
    """
    plain = ALIASES.get(name, name)
    config = MODELS.get(plain) or vit_of_any_patch(plain)
    if config is None:
        hint = did_you_mean(name, [*MODELS, *ALIASES])
        raise UserError(f"there is no model named {name!r}.{hint} `vitrail models` lists them all.")
    return override(config, overrides)


def override(config: ModelConfig, overrides: dict[str, object]) -> ModelConfig:
    """Return `config` with fields replaced; a single number stands for both sides of a size."""
    known = {field.name for field in fields(config)}
    for key in overrides:
        if key not in known:
            raise UserError(f"{type(config).__name__} has no setting {key!r}.{did_you_mean(key, known)}")
    given = {key: to_json(value) for key, value in overrides.items()}
    for key in given.keys() & {"image_size", "patch_size"}:
        if type(given[key]) is int:
            given[key] = (given[key], given[key])
    return from_json(type(config), to_json(config) | given)
