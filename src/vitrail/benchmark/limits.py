"""What a machine can do at most: the rates that everything else is a share of, measured in the same run."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from vitrail.benchmark.timing import Timing, Work, take_turns
from vitrail.data.decode import decode

SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the square matrices that are multiplied: large enough that doubling it no longer changes the rate."""
BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Copied at once: more than any cache holds."""


@dataclass(frozen=True)
class Limits:
    """Rates per second."""

    matmul: dict[str, Timing]
    """Floating-point operations (two per multiply-accumulate) of square matrix products, by precision."""
    copy: Timing
    """Bytes read and written by copies in memory, both counted."""
    decode: Timing
    """JPEGs of 500 x 375 pixels decoded on one core by Pillow, without a resize."""


def measure_limits(device: torch.device, *, turns: int = 5, seconds: float = 0.3) -> Limits:
    """Return the limits of a device and of the threads that torch has now.

    bf16 is left out on a CPU that only emulates it, at a hundredth of the rate of fp32: there it is no limit.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    works: dict[str, Work] = {"fp32": square_product(device, SIDE[kind], torch.float32)}
    if kind == "cuda" or computes_in_bf16():
        works["bf16"] = square_product(device, SIDE[kind], torch.bfloat16)
    works |= {"copy": _copy(device, BYTES[kind]), "decode": _decode()}
    timings = take_turns(works, turns=turns, seconds=seconds, device=device)
    copy, decoding = timings.pop("copy"), timings.pop("decode")
    return Limits(matmul=timings, copy=copy, decode=decoding)


def computes_in_bf16() -> bool:
    """Return whether this CPU multiplies bf16 itself (AMX, AVX-512 BF16), and does not emulate it."""
    small, probe = 256, {"fp32": torch.float32, "bf16": torch.bfloat16}
    works = {name: square_product(torch.device("cpu"), small, dtype) for name, dtype in probe.items()}
    timings = take_turns(works, turns=3, seconds=0.01)
    return timings["bf16"].times(timings["fp32"]) > 0.5


def square_product(device: torch.device, side: int, dtype: torch.dtype) -> Work:
    """Return the product of two square matrices; its items are floating-point operations."""
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def work() -> int:
        torch.mm(left, right, out=out)
        return 2 * side**3

    return work


def photo(height: int = 375, width: int = 500, quality: int = 90) -> bytes:
    """Return a JPEG with the detail of a photo, the same every time: noise whose power falls with its frequency."""
    rng = np.random.default_rng(0)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(rows, columns), 1 / max(height, width))
    waves = np.fft.rfft2(rng.standard_normal((3, height, width))) * falling
    levels = np.fft.irfft2(waves, s=(height, width))
    levels = 127 + 50 * (levels - levels.mean()) / levels.std()
    picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    file = BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _copy(device: torch.device, size: int) -> Work:
    source = torch.zeros(size // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)

    def work() -> int:
        target.copy_(source)
        return size

    return work


def _decode() -> Work:
    data = photo()

    def work() -> int:
        decode(data)
        return 1

    return work
