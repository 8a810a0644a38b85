"""Initial values that several models share."""

import math

from torch import nn


def lecun_normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Truncated normal at two deviations with variance 1 / fan-in, as flax draws it; bias 0."""
    fan_in = layer.weight[0].numel()
    # 0.8796...: deviation of a unit normal truncated at 2
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
