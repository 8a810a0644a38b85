"""The zoo as a table: what each published size is."""

import torch

from vitrail.config.model import model_config
from vitrail.models import build


def describe(name: str) -> dict[str, str | int]:
    """Return a model's facts. Parameters are counted on the model itself, built without memory.

    Raises:
        UserError: When there is no such model.
    """
    config = model_config(name)
    with torch.device("meta"):
        model = build(config)
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "input": f"{config.image_size[0]} x {config.image_size[1]}",
        "patch": f"{config.patch_size[0]} x {config.patch_size[1]}",
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "pool": config.pool,
    }
