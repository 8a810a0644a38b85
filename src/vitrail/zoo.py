"""The zoo as a table: what each published size is.

`zoo.json` holds what `count` finds for every listed name, so that listing them all takes no time:
`python -m vitrail.zoo` writes it anew, and a test counts again.
"""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TypedDict

from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.cvt import CvTConfig
from vitrail.config.efficientnet import EfficientNetConfig
from vitrail.config.model import ALIASES, ModelConfig, list_models, model_config
from vitrail.config.vit import ViTConfig
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.config.wide_resnet import WideResNetConfig
from vitrail.weights import config_at_hand, weights_at_hand

# Resolutions beyond the one a size is built for, at which its paper reports results.
ALSO_AT: dict[str, tuple[int, ...]] = {
    "vit-b16": (384,),
    "vit-b32": (384,),
    "vit-l16": (384, 512),
    "vit-l32": (384,),
    "vit-h14": (518,),
    "vit-giant14": (518,),
    "vit-gigantic14": (518,),
    "vit-r50-b16": (384,),
    "vit-r50-l32": (384,),
    "cvt-13": (384,),
    "cvt-21": (384,),
    "cvt-w24": (384,),
    **{f"coatnet-{size}": (384,) for size in (0, 1)},
    **{f"coatnet-{size}": (384, 512) for size in (2, 3, 4)},
    **{f"coatnet-{size}": (512,) for size in (5, 6, 7)},
    "efficientnet-l2": (475,),
}


class Count(TypedDict):
    """What a model holds and does for one picture."""

    parameters: int
    gmacs: dict[str, float]
    """Billions of multiply-accumulates by resolution ("224", or "224x160"): see `count`."""


class Facts(Count):
    """A row of `vitrail models`."""

    model: str
    classes: int
    source: str


def describe(name: str) -> Facts:
    """Return the facts of a model name or leaderboard alias.

    Raises:
        UserError: When there is no such model.
    """
    config = _config(name)
    counted = _counted().get(ALIASES.get(name, name)) or count(name)
    source = "comes with its weights" if name in weights_at_hand() else source_of(config)
    return {"model": name, "classes": config.num_classes, "source": source, **counted}


def count(name: str) -> Count:
    """Count a model's parameters and multiply-accumulates on the model itself, built without memory.

    Convolutions and matrix products count, at the sizes they are run with, the empty places of a mixture's experts
    included. Papers on convolutions call this number FLOPs; the one on ViT-G counts additions too: twice as many.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from vitrail.models import build

    config = _config(name)
    with torch.device("meta"):
        model = build(config).eval().requires_grad_(False)
    gmacs: dict[str, float] = {}
    for size in [config.image_size, *((side, side) for side in ALSO_AT.get(ALIASES.get(name, name), ()))]:
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, config.channels, *size, device="meta"))
        gmacs["x".join(map(str, dict.fromkeys(size)))] = round(counter.get_total_flops() / 2e9, 3)
    return {"parameters": sum(p.numel() for p in model.parameters()), "gmacs": gmacs}


def source_of(config: ModelConfig) -> str:
    """Return where the sizes of a family were published."""
    match config:
        case ViTMoEConfig():
            return "arXiv 2106.05974"
        case ViTConfig(pool="map"):
            return "arXiv 2106.04560"
        case ViTConfig(qkv_bias=False):
            return "arXiv 2104.10972"
        case ViTConfig():
            return "arXiv 2010.11929"
        case CvTConfig():
            return "arXiv 2103.15808"
        case CoAtNetConfig():
            return "arXiv 2106.04803"
        case EfficientNetConfig(lite=True):
            return "tensorflow/tpu"
        case EfficientNetConfig():
            return "arXiv 1905.11946"
        case WideResNetConfig():
            return "arXiv 1605.07146"


def _config(name: str) -> ModelConfig:
    return config_at_hand(name) if name in weights_at_hand() else model_config(name)


@cache
def _counted() -> dict[str, Count]:
    return json.loads((files("vitrail") / "zoo.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    rows = [f" {json.dumps(name)}: {json.dumps(count(name))}" for name in [*weights_at_hand(), *list_models()]]
    Path(__file__).with_name("zoo.json").write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
