"""Initial values that several models share."""

import math

import torch
from torch import nn


def lecun_normal(layer: nn.Conv2d | nn.Linear) -> None:
    """Truncated normal at two deviations with variance 1 / fan-in, as flax draws it; bias 0."""
    fan_in = layer.weight[0].numel()
    # 0.8796...: deviation of a unit normal truncated at 2
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def convolutions_as_in_tensorflow(model: nn.Module) -> None:
    """Initialise convolutions and BatchNorm as `efficientnet_model.py` (tensorflow/tpu) and all that followed it do.

    Kernels N(0, sqrt(2 / fan-out)), the fan-out of a depthwise kernel being its area; biases 0; BatchNorm scale 1,
    shift 0, running mean 0 and variance 1.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()


@torch.no_grad()
def head_as_in_tensorflow(head: nn.Linear, bias: float) -> None:
    """Initialise a head as the same code does: uniform within 1 / sqrt(classes), and a bias of one value."""
    bound = head.out_features**-0.5
    nn.init.uniform_(head.weight, -bound, bound)
    nn.init.constant_(head.bias, bias)
