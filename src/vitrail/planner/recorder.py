"""What a step of training would do, written down while it runs on tensors without numbers.

`Recorder` sees every operator below autograd: the memory that it takes and gives back, what it computes, what it moves.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

aten = torch.ops.aten


class Phase(IntEnum):
    """Of a step."""

    UPDATE = 0
    """All that concerns weights alone, and what comes before and after the step."""
    FORWARD = 1
    BACKWARD = 2


class Kind(IntEnum):
    """What memory holds."""

    WEIGHTS = 0
    """Weights and buffers of all models, as they are stored."""
    AVERAGE = 1
    """Averaged weights."""
    OPTIMIZER = 2
    """What the optimizer remembers."""
    GRADIENT = 3
    COPIES = 4
    """Weights in half precision, made for matrix products."""
    ACTIVATIONS = 5
    """Pictures, and what the forward pass has computed of them."""
    BACKWARD = 6
    """Working room of the backward pass."""
    UPDATE = 7
    """Working room of the update."""


class Work(IntEnum):
    """What bounds an operator's speed."""

    PRODUCT = 0
    CONVOLUTION = 1
    ATTENTION = 2
    MEMORY = 3
    """Everything else: it moves numbers."""


class Operation(NamedTuple):
    """One operator."""

    phase: Phase
    work: Work
    flops: float
    moved: float
    """Bytes read and written."""


WORK = {
    aten.convolution: Work.CONVOLUTION,
    aten.convolution_backward: Work.CONVOLUTION,
    **{
        op: Work.ATTENTION
        for op in (
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_flash_attention_backward,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_efficient_attention_backward,
        )
    },
}
"""Operators that are counted, and no plain matrix products."""


class Recorder(TorchDispatchMode):
    """Notes memory and operations, step by step. Everything that is to be known must be made inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        """Bytes of every piece of memory, by its number."""
        self.kinds: list[Kind] = []
        self.experts: set[int] = set()
        """Numbers of what belongs to the weights of a mixture's experts."""
        self.events: list[tuple[Phase, int]] = []
        """Taken (its number) or given back (the number's complement), in order."""
        self.operations: list[Operation] = []
        self._numbers: dict[int, int] = {}  # by address
        self._held: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._weights: set[int] = set()
        self._backward = False
        self._depth = 0  # of modules that are being called

    @property
    def phase(self) -> Phase:
        if self._backward:
            return Phase.BACKWARD
        return Phase.FORWARD if self._depth or torch.is_grad_enabled() else Phase.UPDATE

    def mark(self, tensor: Tensor, kind: Kind, *, expert: bool) -> None:
        """Say what a tensor holds, and whether it is of a mixture's experts."""
        number = self._numbers[tensor.untyped_storage()._cdata]
        self.kinds[number] = kind
        if kind is Kind.WEIGHTS:
            self._weights.add(number)
        if expert:
            self.experts.add(number)

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Let what happens be part of a backward pass."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Tell forward passes from updates, also where no gradient is asked for: by modules being called."""

        def enter(*_: object) -> None:
            self._depth += 1

        def leave(*_: object) -> None:
            self._depth -= 1

        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(enter),
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        fresh = [self._take(tensor, func, inputs) for tensor in outputs]
        if any(fresh) or func._schema.is_mutable:
            self._note(func, args, kwargs or {}, out, inputs, outputs)
        return out

    def _take(self, tensor: Tensor, func: Any, inputs: list[Tensor]) -> bool:
        """Note an operator's output, and return whether it is in memory of its own."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._numbers:
            return False
        number = self._numbers[storage._cdata] = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.kinds.append(self._kind(number, func, inputs))
        self.events.append((self.phase, number))
        self._held[number] = weakref.ref(storage, partial(self._give_back, storage._cdata, number))
        return True

    def _give_back(self, address: int, number: int, _: object) -> None:
        del self._held[number], self._numbers[address]
        self.events.append((self.phase, ~number))

    def _kind(self, number: int, func: Any, inputs: list[Tensor]) -> Kind:
        if func is aten._to_copy.default:
            source = self._numbers.get(inputs[0].untyped_storage()._cdata)
            if source in self._weights:
                if source in self.experts:
                    self.experts.add(number)
                return Kind.COPIES
        return {Phase.FORWARD: Kind.ACTIVATIONS, Phase.BACKWARD: Kind.BACKWARD, Phase.UPDATE: Kind.UPDATE}[self.phase]

    def _note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        packet = func._overloadpacket
        count = COUNTED.get(packet)
        flops = float(count(*args, **kwargs, out_val=out)) if count else 0.0
        work = WORK.get(packet, Work.PRODUCT) if count else Work.MEMORY
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        self.operations.append(Operation(self.phase, work, flops, float(moved)))


def _grouped(a: Tensor, b: Tensor, *args: object, **kwargs: object) -> int:
    """Each row, or each column, of `a` meets one matrix of `b`."""
    return 2 * a.numel() * b.shape[-1]


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *args: Any, **kwargs: object) -> int:
    """Either gradient, of the input and of the weight, takes what the forward pass does."""
    transposed, wanted = args[4], args[7]
    return sum(wanted[:2]) * conv_flop_count(x.shape, weight.shape, gradient.shape, transposed)  # pyright: ignore[reportArgumentType]


COUNTED: dict[Any, Callable[..., int]] = {
    **cast(dict[Any, Callable[..., int]], flop_registry),
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    aten._grouped_mm: _grouped,
    aten.convolution_backward: _convolution_backward,
}
"""How torch's own counter (`FlopCounterMode`) counts, and how what it does not know is counted. In the backward pass of
a convolution of groups it counts as many times too much as there are groups (torch 2.13)."""
