"""Moments in 8 bits: blockwise dynamic quantisation (Dettmers et al., 2022, arXiv 2110.02861, section 2).

The numbers of a block share a scale, the largest magnitude among them; each is held as the nearest of 256 levels times
that scale. Levels are dense near 1 and reach down to 10^-7: the more of their bits the exponent takes, the fewer are
left to the fraction.
"""

from functools import cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Numbers that share a scale. The paper has 2,048; its authors' library went on to 256, which costs 1.5 % more."""
LEAST = 4096
"""Entries of a tensor from which on it is held in 8 bits: biases and norms weigh nothing beside the rest."""
DECADES = 7


@cache
def levels(signed: bool, device: torch.device) -> Float[Tensor, " 256"]:
    """Return the levels, rising, from -1 or 0 to 1.

    Each decade below 1 is cut into equal parts, whose centres are levels: half as many as in the decade above it, down
    to 1 where a bit is the sign, and to 2 where none is. 0 and 1 are levels, too.
    """
    positive: list[Tensor] = []
    for decade in range(DECADES):
        parts = 2 ** (DECADES - 1 - decade) * (1 if signed else 2)
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float64, device="cpu")
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0**-decade)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    negative = [-centres for centres in positive] if signed else []
    return torch.cat([*negative, *positive, ends]).sort().values.float().to(device)


@cache
def codes_of_halves(signed: bool, device: torch.device) -> UInt8[Tensor, " 65536"]:
    """Return the number of the nearest level for every float16, in the order of their bits seen as int16.

    A look-up takes a thirtieth of the time of a search among the levels (CPU), and float16 is far finer than they are.

    Without a sign 0 becomes the least level above it: such numbers divide.
    """
    halves = torch.arange(-(2**15), 2**15, device="cpu").to(torch.int16).view(torch.float16).float()
    table = levels(signed, torch.device("cpu"))
    between = (table[1:] + table[:-1]) / 2
    if not signed:
        between[0] = -1.0
    return torch.bucketize(halves, between).byte().to(device)


def pack(
    x: Float[Tensor, "blocks 256"], *, signed: bool
) -> tuple[UInt8[Tensor, "blocks 256"], Float[Tensor, "blocks 1"]]:
    """Return the numbers of the nearest levels, and the scales of blocks."""
    scale = x.abs().amax(dim=1, keepdim=True)
    halves = (x / scale.clamp(min=torch.finfo(x.dtype).tiny)).half()
    places = halves.view(torch.int16).int() + 2**15
    return codes_of_halves(signed, x.device).index_select(0, places.flatten()).view_as(x), scale


def unpack(
    codes: UInt8[Tensor, "blocks 256"], scale: Float[Tensor, "blocks 1"], *, signed: bool
) -> Float[Tensor, "blocks 256"]:
    """Return what was packed, as far as 8 bits tell."""
    return levels(signed, codes.device).index_select(0, codes.flatten().int()).view_as(codes).mul_(scale)


def in_blocks(x: Float[Tensor, "*shape"]) -> Float[Tensor, "blocks 256"]:
    """Return a tensor's numbers in order, filled up with zeros to whole blocks."""
    missing = -x.numel() % BLOCK
    flat = x.reshape(-1)
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)


def out_of_blocks(blocks: Float[Tensor, "blocks 256"], shape: torch.Size) -> Float[Tensor, "*shape"]:
    """Return the tensor that `in_blocks` was given."""
    return blocks.view(-1)[: shape.numel()].view(shape)
