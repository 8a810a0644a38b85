"""Self-attention over a map, with a learned bias for every head and relative position (CoAtNet, section 2.1)."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.errors import UserError
from vitrail.layers.attention import attend
from vitrail.layers.embedding import PositionResize

Grid = tuple[int, int]


class RelativeAttention(nn.Module):
    """Multi-head self-attention; head h adds P[h, i - i', j - j'] to the scaled score of query (i, j), key (i', j').

    The width may change on the way: queries, keys and values are already of the new one. Fused kernels compute it;
    `weights` shows it.
    """

    def __init__(self, channels: int, width: int, heads: int, grid: Grid) -> None:
        super().__init__()
        self.heads = heads
        self.grid = grid
        self.qkv = nn.Linear(channels, 3 * width)
        self.table = nn.Parameter(torch.empty(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n d"]:
        query, key, value = self._project(x)
        mixed = attend(query, key, value, bias=self.bias(grid))
        return self.out(rearrange(mixed, "b heads n dh -> b n (heads dh)"))

    def weights(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b heads n n"]:
        """Return the attention probabilities that `forward` uses without ever holding them."""
        query, key, _ = self._project(x)
        return torch.softmax(query @ key.mT * query.shape[-1] ** -0.5 + self.bias(grid).to(query.dtype), dim=-1)

    def bias(self, grid: Grid) -> Float[Tensor, "heads n n"]:
        """Return what is added to the scores of a map of `grid` rows and columns, from the table or a resized one."""
        table = resize_relative(self.table, self.grid, grid).flatten(1)
        tokens = grid[0] * grid[1]
        return table.index_select(1, relative_index(grid, table.device)).unflatten(1, (tokens, tokens))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rearrange(self.qkv(x), "b n (three heads dh) -> three b heads n dh", three=3, heads=self.heads).unbind(0)


def relative_index(grid: Grid, device: torch.device) -> Int[Tensor, " pairs"]:
    """Return where each pair of a query and a key finds its bias in a flattened table: (i - i' + H, j - j' + W)."""
    (rows, columns), i, j = grid, torch.arange(grid[0], device=device), torch.arange(grid[1], device=device)
    vertical, horizontal = i[:, None] - i + rows - 1, j[:, None] - j + columns - 1
    return (vertical[:, None, :, None] * (2 * columns - 1) + horizontal[:, None, :]).flatten()


def resize_relative(
    table: Float[Tensor, "heads h w"], old: Grid, new: Grid, method: PositionResize = "official"
) -> Float[Tensor, "heads rows columns"]:
    """Resample tables of relative positions made for maps of `old` rows and columns to those of `new`.

    `official`: bilinear, corners not aligned, over the whole table (CoAtNet, appendix A.1; google-research/maxvit,
    `tf.image.resize`). `timm`: `resize_rel_pos_bias_table`, after BEiT.

    Raises:
        UserError: For another method; no code that resizes such tables has it.
    """
    if old == new:
        return table
    size = 2 * new[0] - 1, 2 * new[1] - 1
    match method:
        case "official":
            resized = F.interpolate(table.float()[None], size=size, mode="bilinear", align_corners=False)[0]
        case "timm":
            resized = _stretch(_stretch(table.double(), size[0]).mT, size[1]).mT
        case _:
            raise UserError(f"relative positions are resized by position_resize 'official' or 'timm', not {method!r}.")
    return resized.to(table.dtype)


def _stretch(table: Float[Tensor, "heads h w"], size: int) -> Float[Tensor, "heads rows w"]:
    """Resample rows as BEiT does (unilm, `run_class_finetuning.py`), linearly.

    The old rows are laid out on the new axis at 0, 1, 1 + q, 1 + q + q^2, ... and mirrored, where q makes the last one
    the border: near positions keep their bias, far ones are stretched. Beyond the old border its bias goes on.
    """
    half = table.shape[1] // 2
    low, high, ratio = 1.01, 1.5, 0.0
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**half) / (1 - ratio) > size // 2:
            high = ratio
        else:
            low = ratio
    steps = (ratio ** torch.arange(half, dtype=table.dtype, device=table.device)).cumsum(0)
    old = torch.cat([-steps.flip(0), steps.new_zeros(1), steps])
    new = torch.arange(size, dtype=table.dtype, device=table.device) - size // 2
    right = torch.searchsorted(old, new).clamp(max=len(old) - 1)
    left = (right - 1).clamp(min=0)
    gap = (old[right] - old[left]).clamp(min=1)  # the steps are at least 1; no gap where both are the same
    share = ((new - old[left]) / gap).clamp(0, 1)
    return torch.lerp(table[:, left], table[:, right], share[:, None])
