"""What a plan assumes of machines beyond their data sheets: one table.

None of it has been measured on a GPU yet. Whoever measures one (`benchmarks/gpu.py`) writes the figure here, and
`measured` with the machine and the day in place of `predicted`: every plan prints this table.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Constant:
    """A figure, and how it is known."""

    value: float
    says: str
    how: Literal["measured", "predicted"]
    source: str


CONSTANTS: dict[str, Constant] = {
    "products": Constant(
        0.60, "of the peak that matrix products reach", "predicted",
        "large square ones reach about 0.8 on H100 and H200, a Transformer's less",
    ),
    "convolutions": Constant(
        0.35, "of the peak that convolutions reach", "predicted", "between products and those of few channels"
    ),
    "attention": Constant(
        0.25, "of the peak that attention reaches, forward and backward", "predicted",
        "FlashAttention 2 at 64 to 88 channels a head and 512 tokens: 0.28 of an H100 forward, less backward",
    ),
    "bandwidth": Constant(0.80, "of the memory's rate that is reached", "predicted", "copies reach 0.9 of an H200"),
    "fused": Constant(
        0.45, "of what other operators move that is left when blocks are compiled", "predicted",
        "an elementwise operator that joins its neighbour saves a write and a read",
    ),
    "launch": Constant(
        6e-6, "seconds from one operator to the next at least, of which compiling leaves as much as of what they move",
        "predicted", "torch's host time",
    ),
    "links": Constant(0.75, "of a link's rate that exchanges reach", "predicted", "usual bus bandwidth of NCCL"),
    "message": Constant(30e-6, "seconds that any exchange takes at least", "predicted", "usual latency of NCCL"),
    "overlap": Constant(
        0.80, "of the time of passes in which an exchange can hide", "predicted",
        "DDP and FSDP exchange while they compute; the first and the last exchange cannot hide",
    ),
    "reserve": Constant(
        2.5, "GiB that CUDA, NCCL and cuBLAS take", "predicted", "context, communicators and workspaces"
    ),
    "fragments": Constant(
        0.04, "of the memory that is lost between pieces", "predicted", "of torch's allocator, with expandable segments"
    ),
}  # fmt: skip


def constant(name: str) -> float:
    """Return the value of a constant."""
    return CONSTANTS[name].value
