"""What every comparison with a peer needs."""

from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def randomise(module: Module, seed: int = 0) -> Module:
    """Fill every parameter and BatchNorm statistic with numbers under which no part of the network is silent.

    Fresh weights hide mistakes: heads and biases of zeros, scales and variances of ones. Returns the module, in
    evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator) + 0.5

    def normal(like: Tensor, deviation: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * deviation

    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(normal(parameter, 0.2))
        elif parameter.ndim < 2:  # scales of norms
            parameter.copy_(uniform(parameter))
        else:  # matrices and kernels keep the variance; tokens and position tables have no fan-in
            parameter.copy_(normal(parameter, parameter[0].numel() ** -0.5 if len(parameter) > 1 else 0.5))
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.running_mean.copy_(normal(part.running_mean, 0.2))
            part.running_var.copy_(uniform(part.running_var))
            part.num_batches_tracked.fill_(int(torch.randint(1, 10_000, (), generator=generator)))
    return module.eval()


@torch.no_grad()
def assert_close(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    """Fail unless shapes agree and no number differs by more than `bound` x max(1, max |theirs|)."""
    assert ours.shape == theirs.shape
    difference = float((ours - theirs).abs().max())
    limit = bound * max(1.0, float(theirs.abs().max()))
    assert difference <= limit, f"differs by {difference:.2e}, more than {limit:.2e}"
