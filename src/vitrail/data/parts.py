"""Batches in the CPU's memory: pages to lie in, and parts that are worked on one after the other."""

import ctypes
import math
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

PART = 2**21
"""Numbers of a batch that are worked on as one part: memory of this size is used again, not asked for anew."""
LARGE = 2**22
"""Bytes of memory for which large pages, of 2 MiB, are asked."""
_MADVISE = ctypes.CDLL(None).madvise if sys.platform == "linux" else None


def in_large_pages(memory: Tensor) -> Tensor:
    """Ask Linux for large pages for new memory of the CPU, not yet written to, and return it.

    Page by page, the system needs longer to hand out a batch of floats than we to fill it. Elsewhere nothing is asked.
    """
    if _MADVISE is not None and memory.nbytes >= LARGE:
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # the system wants whole pages
        length = (memory.data_ptr() + memory.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _MADVISE(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return memory


def by_parts(work: Callable[[slice], None], shape: tuple[int, ...]) -> None:
    """Call `work` for parts of a batch of this shape, until all pictures had their turn."""
    most = max(1, PART // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], most):
        work(slice(start, min(start + most, shape[0])))
