"""Weights spread over processes: FSDP2 (`torch.distributed.fsdp.fully_shard`), and what is computed with parts of them.

Between passes a process holds its part of each weight along the first axis, gradient, moments and average alike, as
DTensors. A block's weights are gathered when it is due, forward and backward, and let go of behind it; its gradient is
scattered as a mean, so that each process receives that of its part.
"""

import copy
import os
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from typing_extensions import TypeIs

from vitrail.errors import UserError

if TYPE_CHECKING:  # together 0.8 s to import, which only runs that need them are to wait for
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)


class Stored(ABC):
    """A tensor on a disk, of which a process reads what it needs."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Return, on the CPU, the box of `shape` whose first entry is that at `offset`."""

    def whole(self) -> Tensor:
        """Return all of it, on the CPU."""
        return self.read([0] * len(self.shape), self.shape)


def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    sharding: Literal["full", "hybrid"],
    device: torch.device,
    half: torch.dtype | None = None,
) -> None:
    """Spread a module's weights over all processes, or over those of each machine, in place.

    All have the values of the first process afterwards; what the others hold, or whether it is on the meta device, does
    not matter. Never is more than one whole weight on a process's device. Blocks are gathered ahead, one while another
    computes. What lies outside of blocks is gathered for both passes, and let go of in between, too: so weights may be
    changed wherever no pass is going on, whether or not a backward pass has followed the last forward one.

    Args:
        root: The module that is called.
        blocks: Modules in it that are gathered one at a time, in the order in which they are called.
        sharding: `full`: over all processes; `hybrid`: over those of a machine, each of which holds all.
        device: Where to compute.
        half: Type in which the weights of blocks are gathered, for passes under autocast; gradients are float32.

    Raises:
        UserError: When machines have different numbers of processes.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    first = {name: tensor.detach() for name, tensor in _tensors(root)} if dist.get_rank() == 0 else {}
    mesh = _mesh(cast(dist.ProcessGroup, dist.group.WORLD), device.type, sharding)
    root.to("meta")
    for block in blocks:
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    root.to_empty(device=device)
    with torch.no_grad():
        for name, tensor in _tensors(root):
            if name in first:
                value = first.pop(name).to(device).contiguous()
            else:
                value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if is_part(tensor):
                tensor.to_local().copy_(distribute_tensor(value, mesh, tensor.placements).to_local())
            else:
                dist.broadcast(value, 0)
                tensor.copy_(value)


def of_first_process(make: Callable[[], M]) -> M:
    """Return the module that `make` makes, in the first process; in others its like on the meta device.

    `shard` brings them its values.

    Raises:
        UserError: In all processes, when `make` raises it in the first.
    """
    made: M | None = None
    shared: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = make()
            shared = [_emptied(made)]
        except UserError as mistake:  # others would wait for a module
            shared = [mistake]
    dist.broadcast_object_list(shared)
    found = shared[0]
    if isinstance(found, UserError):
        raise found
    return found if made is None else made


def is_part(tensor: Tensor) -> "TypeIs[DTensor]":
    """Return whether a tensor is spread over processes, this one holding a part of it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Return whether processes hold parts of the module's weights, so that all must call it together."""
    return any(is_part(parameter) for parameter in module.parameters())


def exchange_with(module: nn.Module, *, last: bool) -> None:
    """Say whether copies of parts, in `hybrid` sharding, are averaged over machines in the next backward pass.

    They need to be with an update's last micro-batch only. Within a machine each scatters its gradient: kept until the
    last one, that would take as much memory as all weights.
    """
    if is_sharded(module):
        module.set_requires_all_reduce(last)  # pyright: ignore[reportCallIssue] (a method of FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, to be read or changed; of one that is not spread, itself."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered if it is spread. All processes must ask."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that falls to this process where `like` is spread; else the tensor itself."""
    if not is_part(like):
        return tensor
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            parts = tensor.chunk(like.device_mesh.size(axis))
            number = like.device_mesh.get_local_rank(axis)
            tensor = parts[number] if number < len(parts) else tensor[:0]
    return tensor


def as_part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor as one that is spread as `like` is; itself where that is not spread."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def over_parts(total: Tensor, like: Tensor) -> Tensor:
    """Return a sum over all entries of tensors from that over this process's parts, spread as `like` is."""
    if is_part(like):
        for axis, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(total, group=like.device_mesh.get_group(axis))
    return total


def total_norm(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the Euclidean norm of tensors together, of which `parts` are this process's parts, spread as `like` is."""
    norm = get_total_norm(parts)
    return over_parts(norm.square(), like).sqrt() if is_part(like) else norm


def box_of(tensor: "DTensor") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which box of a tensor this process holds: its shape, and where in the tensor its first entry is."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def writes_part(tensor: "DTensor", name: str) -> bool:
    """Return whether this process is the one to write its part: of those that hold copies, each writes some tensors."""
    copies, number = 1, 0
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(axis)
            copies, number = copies * size, number * size + tensor.device_mesh.get_local_rank(axis)
    return zlib.crc32(name.encode()) % copies == number


def gathered(state: Any) -> Any:
    """Return a nested state with all of each tensor that is spread, on the CPU: in the first process, which writes it.

    Others, which must ask as well, have None in these places. Never is more than one such tensor whole on a device.
    """
    if isinstance(state, Tensor) and is_part(state):
        full = state.full_tensor()
        return full.cpu() if dist.get_rank() == 0 else None
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value) for value in state)
    return state


def read(state: Any) -> Any:
    """Return a nested state with all of each tensor that is on the disk yet."""
    if isinstance(state, Stored):
        return state.whole()
    if isinstance(state, Mapping):
        return {key: read(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(read(value) for value in state)
    return state


def spread(state: Mapping[str, Tensor | Stored], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors as those of the same name in `like` are spread, on the same devices.

    Of those on the disk, a process reads its part.
    """
    return {name: _spread(tensor, like[name]) if name in like else read(tensor) for name, tensor in state.items()}


def spread_moments(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return the whole state of an optimizer as the parameters of this one are spread.

    What has the shape of its parameter is spread as it is; all else, as Adafactor's moments of rows, every process has.
    What is on the disk is read, as by `spread`.
    """
    saved = chain.from_iterable(group["params"] for group in state["param_groups"])
    present = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameters = dict(zip(saved, present, strict=True))
    moments = {
        number: {
            name: _spread(value, parameters[number])
            if isinstance(value, Tensor | Stored) and value.shape == parameters[number].shape
            else read(value)
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _spread(tensor: Tensor | Stored, like: Tensor) -> Tensor:
    if isinstance(tensor, Stored):
        if not is_part(like):
            return tensor.whole()
        shape, offset = box_of(like)
        return as_part(tensor.read(offset, shape).to(like.device), like)
    return as_part(part_of(tensor, like).to(like.device), like) if is_part(like) else tensor


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _emptied(module: M) -> M:
    """Return a copy of a module on the meta device; the module's own values are not copied on the way."""
    memo: dict[int, Any] = {id(tensor): _empty(tensor) for _, tensor in _tensors(module)}
    return copy.deepcopy(module, memo)


def _empty(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@cache
def _mesh(world: dist.ProcessGroup, kind: str, sharding: Literal["full", "hybrid"]) -> "DeviceMesh":
    """Return the processes as a line, or as machines by processes of a machine. `world` tells one job from the next."""
    from torch.distributed.device_mesh import init_device_mesh

    processes = world.size()
    if sharding == "full":
        return init_device_mesh(kind, (processes,), mesh_dim_names=("shards",))
    of_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes % of_machine:
        raise UserError(
            f"--loop.sharding hybrid needs equally many processes on every machine, not {processes} in all with "
            f"{of_machine} on this one; take --loop.sharding full."
        )
    return init_device_mesh(kind, (processes // of_machine, of_machine), mesh_dim_names=("copies", "shards"))
