"""Processes, devices and precision. One process by default; several under torchrun."""

import ctypes
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from vitrail.errors import UserError
from vitrail.sharding import exchange_with, is_sharded

Precision = Literal["fp32", "bf16", "fp16"]

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Settings of glibc's `mallopt` (malloc.h). As long as nobody sets them, the last two move up to 64 and 32 MiB."""


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work as if it were the only one: what it does may fail, or take its time, without the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """Return this process's number, 0 without torchrun."""
    if _alone:
        return 0
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def restarts() -> int:
    """Return how often torchrun has started these processes anew, as after one of them has died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str | None:
    """Return what tells this call of torchrun from every other, restarts being the same call; None without torchrun.

    That is the name that `--rdzv-id` or `--standalone` gives it, else the first process's machine and its torchrun.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{platform.node()}, process {os.getppid()}" if name == "none" else name


def share_of(count: int) -> range:
    """Return the places of `count` items that fall to this process: every world-th, all when it works alone.

    Outside `processes` each process works alone, whatever number torchrun gave it.
    """
    return range(rank() if dist.is_initialized() else 0, count, world_size())


def pick_device() -> torch.device:
    """Return the best device of this process: its own GPU, Apple's MPS, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started, if any, and yield this process's device."""
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    _join("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()  # nobody leaves while the first process still writes
    finally:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    """Join the other processes.

    Started again, processes on one machine meet under names of their own: torchrun (torch 2.13) keeps its store, where
    they would find the addresses of those that died. Of several machines each counts its restarts for itself; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin a new store each time.
    """
    if not restarts() or int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        dist.init_process_group(backend)
        return
    store, number, count = next(rendezvous("env://"))
    names = dist.PrefixStore(f"restart {restarts()}", store)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=names, rank=number, world_size=count)


def leave(code: int) -> NoReturn:
    """End a process that torchrun started, at once and with an exit code.

    DistributedDataParallel keeps its process group, and with it gloo's threads, beyond `destroy_process_group`
    (torch 2.13). Python taking itself down under them ends now and then in SIGABRT, after all work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def pick_precision(wanted: str, device: torch.device) -> Precision:
    """Return the precision to train in.

    `auto` takes bf16 where the GPU computes in it, fp16 on older GPUs, and fp32 elsewhere: many CPUs only emulate
    bf16, hundreds of times slower than fp32.

    Raises:
        UserError: When the device cannot do what was asked for.
    """
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    if wanted == "bf16" and device.type == "cuda" and not bf16:
        raise UserError("this GPU does not compute in bf16; use --loop.precision fp16.")
    if wanted not in ("fp32", "bf16", "fp16"):
        raise UserError(f"precision must be auto, fp32, bf16 or fp16, not {wanted!r}.")
    return wanted


def cpu_computes_in_bf16() -> bool:
    """Return whether this CPU multiplies bf16 itself, as with AMX, and does not emulate it; measured in a moment."""
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(256, 256, dtype=dtype)
        taken: list[float] = []
        for _ in range(4):
            began = time.perf_counter()
            torch.mm(square, square)
            taken.append(time.perf_counter() - began)
        seconds[dtype] = min(taken)
    return seconds[torch.bfloat16] < 2 * seconds[torch.float32]


@contextmanager
def matrix_products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Let what is computed in fp32 beside a half precision, as evaluation is, take TF32 on GPUs that have it.

    TF32 rounds factors to 10 bits of mantissa, half precisions to 7 or 10 and results as well; fp32 that was asked for
    stays fp32.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and precision != "fp32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def memory_kept(device: torch.device) -> Iterator[None]:
    """Let a process that computes on a CPU keep the memory that it frees, for the tensors of its next update.

    glibc gives large blocks back at once, and the system clears every page again when it is touched: without this,
    EfficientNet-B0 takes a third longer for an update on two cores. The peak is up to a tenth higher. Where there is no
    glibc, nothing happens. In the end all that is free goes back.
    """
    library = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(MMAP_MAX, 65536)
        library.mallopt(MMAP_THRESHOLD, 2**25)
        library.mallopt(TRIM_THRESHOLD, 2**26)
        library.malloc_trim(0)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context that runs matrix products in `precision`; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """Return the module to call in training: itself, or averaged over processes (DDP).

    One whose weights are spread over processes (`sharding.shard`) averages gradients by itself.
    """
    if world_size() == 1 or is_sharded(module):
        return module
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def accumulating(module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """Return the context of one micro-batch: copies of gradients are averaged with the last one only."""
    exchange_with(module, last=last)
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """Return the mean of a tensor over processes, element by element: a new tensor, or `value` where one works alone.

    To average many in place, see `average_over_processes`.
    """
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def average_over_processes(tensors: Sequence[torch.Tensor]) -> None:
    """Replace tensors by their means over processes, in place and in one exchange.

    Args:
        tensors: Floating-point, of any shapes, on one device; the same in all processes. Those of several precisions
            are averaged in the widest, and keep their own.
    """
    if world_size() == 1 or not tensors:
        return
    means = mean_over_processes(torch.cat([tensor.flatten() for tensor in tensors]))
    for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def mean_statistics(tensors: Iterable[torch.Tensor]) -> None:
    """Replace running statistics, which each process gathers of its own pictures, by their mean over processes.

    Counters are left alone: they are no floating-point numbers, and alike in all processes.
    """
    average_over_processes([tensor for tensor in tensors if tensor.is_floating_point()])


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is up in any process; all must ask."""
    if world_size() == 1:
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def gather_objects(value: object) -> list[object]:
    """Return every process's value, in order of rank."""
    if world_size() == 1:
        return [value]
    values: list[object] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
