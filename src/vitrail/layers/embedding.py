"""Positions: learned tables, fixed 2-D sines and cosines, and their resizing."""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

PositionResize = Literal["official", "timm", "timm-npz", "hf"]


def sincos_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Float[Tensor, "1 n d"]:
    """Return fixed 2-D positions (big_vision `posemb_sincos_2d`; MoCo v3, arXiv 2104.02057).

    A quarter of the width each for sin x, cos x, sin y, cos y; frequencies fall from 1 to 1/10000.
    """
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    quarter = width // 4
    omega = 10_000 ** (torch.arange(quarter, device=device) / -max(quarter - 1, 1))
    angle_x, angle_y = (axis.flatten()[:, None] * omega for axis in (x, y))
    return torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], dim=1)[None]


def resize_positions(
    table: Float[Tensor, "1 n d"], old: tuple[int, int], new: tuple[int, int], method: PositionResize = "official"
) -> Float[Tensor, "1 m d"]:
    """Resample a table of patch positions from an `old` grid of rows and columns to a `new` one.

    The peers disagree. `official` (the JAX code, scipy's `zoom` of order 1) is bilinear with corners aligned;
    `timm-npz` is bilinear, `timm` bicubic with antialiasing, `hf` bicubic without.
    """
    if old == new:
        return table
    options = {
        "official": {"mode": "bilinear", "align_corners": True},
        "timm-npz": {"mode": "bilinear", "align_corners": False},
        "timm": {"mode": "bicubic", "align_corners": False, "antialias": True},
        "hf": {"mode": "bicubic", "align_corners": False},
    }[method]
    # contiguous: torch's antialiased bicubic errs on a column of one, seen through other strides
    grid = rearrange(table, "1 (h w) d -> 1 d h w", h=old[0]).float().contiguous()
    return rearrange(F.interpolate(grid, size=new, **options), "1 d h w -> 1 (h w) d").to(table.dtype)
