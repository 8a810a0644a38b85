"""Random numbers as a function of (seed, epoch, picture, purpose): no generator, no state, no order of drawing.

A picture's key is a 64-bit hash of seed, epoch and index. A draw hashes the key with the number of its stream, so what
a picture draws depends neither on its place in the batch nor on the size of the batch, the process or the device.
The hash is splitmix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators", figure 17) in
int64 arithmetic, which wraps around alike on every device.
"""

import math
from enum import IntEnum, unique
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import betaincinv
from torch import Tensor

WEYL = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the step of splitmix64's counter
QUANTILES = 4096  # cells of a quantile table


@unique
class Draw(IntEnum):
    """The streams: every independent draw of one picture has its own number. Changing one changes old runs."""

    CROP_AREA = 0
    CROP_RATIO = 1
    CROP_TOP = 2
    CROP_LEFT = 3
    FLIP = 4
    POLICY_OPERATION = 5
    POLICY_APPLY = 6
    POLICY_LEVEL = 7
    POLICY_SIGN = 8
    POLICY_TOP = 9
    POLICY_LEFT = 10
    BRIGHTNESS = 11
    CONTRAST = 12
    SATURATION = 13
    ERASE = 14
    ERASE_AREA = 15
    ERASE_RATIO = 16
    ERASE_TOP = 17
    ERASE_LEFT = 18
    ERASE_NOISE = 19
    CUTOUT_TOP = 20
    CUTOUT_LEFT = 21
    MIX_CHOICE = 22
    MIXUP = 23
    CUTMIX = 24
    CUTMIX_TOP = 25
    CUTMIX_LEFT = 26


def sample_keys(seed: int, epoch: int, indices: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Return one key per picture index for this seed (any integer) and epoch."""
    base = torch.full((), _signed(seed), dtype=torch.int64, device=indices.device)
    base = _mix(_mix(base + _signed(WEYL)) + _signed((epoch + 1) * WEYL))
    return _mix(base + (indices.long() + 1) * _signed(WEYL))


def uniform(keys: Int[Tensor, " b"], stream: int, shape: tuple[int, ...] = ()) -> Float[Tensor, "b ..."]:
    """Return uniform float32 numbers in [0, 1), multiples of 2^-24, `shape` of them per key."""
    return _unit(_words(keys, stream, shape))


def normal(keys: Int[Tensor, " b"], stream: int, shape: tuple[int, ...] = ()) -> Float[Tensor, "b ..."]:
    """Return standard normal float32 numbers, `shape` of them per key."""
    return _gauss(_words(keys, stream, shape))


def normal_at(keys: Int[Tensor, " n"], stream: int, places: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return single entries of `normal(keys, stream, shape)`, one per key, at their places in the flattened shape.

    Noise for a few pixels need not be drawn for all.
    """
    return _gauss(_counted(_streamed(keys, stream), places))


def choice(
    keys: Int[Tensor, " b"], stream: int, n: int | Int[Tensor, " b"], shape: tuple[int, ...] = ()
) -> Int[Tensor, "b ..."]:
    """Return uniform integers from 0 to n - 1; `n` is at most 2^31 and may differ from key to key."""
    if isinstance(n, Tensor):
        n = n.view(-1, *(1,) * len(shape))
    # Multiply and shift: no modulo bias, and exact in integers where a float product could round up to n.
    return _shift(high_words(keys, stream, shape) * n, 32)


def high_words(keys: Int[Tensor, " b"], stream: int, shape: tuple[int, ...] = ()) -> Int[Tensor, "b ..."]:
    """Return what `choice` is made of, integers from 0 to 2^32 - 1: a choice among n is word * n / 2^32, cut off."""
    return _shift(_words(keys, stream, shape), 32)


def beta(keys: Int[Tensor, " b"], stream: int, alpha: float) -> Float[Tensor, " b"]:
    """Return one number per key from Beta(alpha, alpha), through a table of quantiles, linear in between."""
    table = _beta_quantiles(alpha, keys.device)
    place = uniform(keys, stream) * QUANTILES
    cell = place.long()
    return torch.lerp(table[cell], table[cell + 1], place - cell)


def _words(keys: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Return 64 random bits per key and place of `shape`."""
    words = _streamed(keys, stream)
    if not shape:
        return words
    places = torch.arange(math.prod(shape), device=keys.device)
    return _counted(words[:, None], places).view(len(keys), *shape)


def _streamed(keys: Tensor, stream: int) -> Tensor:
    return _mix(keys + _signed((int(stream) + 1) * WEYL))


def _counted(words: Tensor, places: Tensor) -> Tensor:
    return _mix(words + (places + 1) * _signed(WEYL))


def _mix(z: Tensor) -> Tensor:
    """Return splitmix64's finaliser of 64-bit words: every bit of the input moves half the bits of the output."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; int64's own shift copies the sign, which the mask removes."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """Return the int64 with the lowest 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


def _unit(words: Tensor) -> Tensor:
    return _shift(words, 40).float() * 2.0**-24


def _gauss(words: Tensor) -> Tensor:
    """Box-Muller: radius from the upper 24 bits, angle from the next 24. The half keeps the logarithm finite."""
    radius = torch.sqrt(-2.0 * torch.log((_shift(words, 40).float() + 0.5) * 2.0**-24))
    angle = _unit(words << 24) * (2.0 * torch.pi)
    return radius * torch.cos(angle)


@lru_cache(maxsize=16)
def _beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor would spoil later training
        table = betaincinv(alpha, alpha, np.linspace(0.0, 1.0, QUANTILES + 1))
        return torch.tensor(table, dtype=torch.float32, device=device)
