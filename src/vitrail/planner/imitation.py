"""A GPU, imitated on tensors of the CPU: models choose other kernels there, and autocast other types."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.layers import attention, moe, relative_attention
from vitrail.models import cvt
from vitrail.parallel import Precision
from vitrail.planner.gpus import Gpu

aten = torch.ops.aten

IN_FP32 = ("layer_norm", "group_norm")
"""What autocast computes in fp32 on GPUs and not on CPUs, of what models call ("CUDA Ops that can autocast to float32",
pytorch.org/docs/stable/amp.html)."""


def imitating(gpu: Gpu, precision: Precision) -> Iterator[AbstractContextManager[None]]:
    """Yield the contexts in which models compute on the CPU as they do on a GPU."""
    half = precision != "fp32"
    if not (half and gpu.grouped_products):
        yield replaced(moe, "multiple_of_rows", lambda *args: None)
    for module in (attention, relative_attention, cvt):
        yield replaced(module, "attend", _attend)
    for name in IN_FP32 if half else ():
        yield replaced(F, name, _in_fp32(getattr(F, name)))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attend by the kernels that GPUs have: FlashAttention, and one that goes back through a bias, or is in fp32."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    if bias is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    mask = None if bias is None else bias.to(query.dtype).expand(len(query), -1, -1, -1)
    return aten._scaled_dot_product_efficient_attention(query, key, value, mask, query.requires_grad, scale=scale)[0]


def _in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *args, **kwargs: function(x.float(), *args, **kwargs)


@contextmanager
def replaced(owner: object, name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Let something be called in place of something else for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
