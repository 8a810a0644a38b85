"""Sparse mixture of experts (Riquelme et al., 2021, arXiv 2106.05974, section 2; vmoe `nn/routing.py`, `moe.py`).

A router picks k of E feed-forward networks for each token. Experts work side by side, on a buffer of fixed size that
tokens are written to and read from by index, so that the device never waits for the host to count tokens. In it the
rows of the experts follow close upon each other, for grouped matrix products (MegaBlocks, arXiv 2211.15841, section 4);
where there are none (`multiple_of_rows`), they stand in blocks of equal size, for batched ones.

Axes: `g` groups of tokens that compete for places, `s` tokens of a group, `k` choices of a token, `e` experts; `rows`
of the buffer that the experts read.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.layers.feedforward import Gelu
from vitrail.layers.initial import lecun_normal

PICTURES_PER_GROUP = 8
"""While training, as in the paper's configurations (vmoe `configs/vmoe_paper/common.py`)."""
ROOM = 2
"""Rows of a block, relative to an even spread, where no choice is turned away."""


class Routing(NamedTuple):
    """Where a mixture sent its tokens, and how evenly."""

    experts: Int[Tensor, "b n k"]
    """The experts that each token chose, the first choice first."""
    gates: Float[Tensor, "b n k"]
    """Their weights: softmax over all experts, so that they do not sum to 1 over the chosen."""
    kept: Bool[Tensor, "b n k"]
    """Whether the expert had a place; what it had none for is left out of the sum."""
    importance: Float[Tensor, " g"]
    """Squared coefficient of variation of the sums of gates over the experts, per group."""
    load: Float[Tensor, " g"]
    """That of the expected numbers of tokens, which only noise makes smooth: 0 in evaluation."""


class Seats(NamedTuple):
    """Which row of the experts' buffer each choice has, and which rows each expert has."""

    row: Int[Tensor, "g s k"]
    """Row in the buffer; one past the last for choices that have none."""
    rows: int
    """Of the buffer."""
    ends: Int32[Tensor, " e"] | None = None
    """Where the rows of each expert end, which follow upon those of the expert before. The last has all that are left.
    None: all experts have a block of equally many rows, in order."""
    more: Int[Tensor, " more"] | None = None
    """The experts of further blocks, where there are any."""


class MixtureOfExperts(nn.Module):
    """A feed-forward network for each expert, of which each token takes the k that the router weighs most.

    In evaluation there is a place for every token, unless the configuration says `capacity_factor`.
    """

    def __init__(self, config: ViTMoEConfig) -> None:
        super().__init__()
        self.router = Router(config.width, config.experts, config.experts_per_token, config.noise_std)
        self.experts = Experts(config)
        self.capacity_factor = config.capacity_factor
        self.train_capacity_factor = config.train_capacity_factor
        self.batch_priority = config.batch_priority
        self.group_size = config.group_size

    def forward(self, x: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], Routing]:
        tokens, filling = self._grouped(x)
        experts, gates, importance, load = self.router(tokens, filling)
        seats = self._seats(experts, gates, self.experts.multiple_of_rows(x))
        y = combine(self.experts(dispatch(tokens, seats), seats), gates, seats).to(x.dtype)

        def ungrouped(grouped: Tensor) -> Tensor:
            return grouped.flatten(0, 1)[: x.shape[0] * x.shape[1]].unflatten(0, x.shape[:2])

        kept = seats.row < seats.rows
        return ungrouped(y), Routing(ungrouped(experts), ungrouped(gates), ungrouped(kept), importance, load)

    def init_weights(self) -> None:
        lecun_normal(self.router.dense)
        self.experts.init_weights()

    def _grouped(self, x: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "g s d"], Bool[Tensor, "g s"] | None]:
        """Return tokens in groups, and which of them only fill up the last group, if any."""
        pictures = math.gcd(x.shape[0], PICTURES_PER_GROUP) if self.training else 1
        tokens, size = x.flatten(0, 1), self.group_size or pictures * x.shape[1]
        count = tokens.shape[0]
        groups = -(-count // size)
        if groups * size == count:
            return tokens.unflatten(0, (groups, size)), None
        tokens = F.pad(tokens, (0, 0, 0, groups * size - count)).unflatten(0, (groups, size))
        return tokens, torch.arange(groups * size, device=x.device).view(groups, size) >= count

    def _seats(self, experts: Int[Tensor, "g s k"], gates: Float[Tensor, "g s k"], multiple: int | None) -> Seats:
        factor, count = self.train_capacity_factor if self.training else self.capacity_factor, self.experts.count
        if factor is None and multiple is None:
            return seats_for_all(experts, count)
        _, size, choices = experts.shape  # no token chooses an expert twice: as many places as tokens are enough
        places = size if factor is None else min(capacity(size * choices, count, factor), size)
        return seats_by_capacity(experts, count, places, gates[:, :, 0] if self.batch_priority else None, multiple)


class Router(nn.Module):
    """Noisy top-k (section 2 and appendix A): a linear layer without bias weighs the experts for each token."""

    def __init__(self, width: int, experts: int, choices: int, noise_std: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, experts, bias=False)
        self.choices = choices
        self.noise_std = noise_std / experts

    def forward(
        self, x: Float[Tensor, "g s d"], filling: Bool[Tensor, "g s"] | None = None
    ) -> tuple[Int[Tensor, "g s k"], Float[Tensor, "g s k"], Float[Tensor, " g"], Float[Tensor, " g"]]:
        """Return the chosen experts and their gates, then importance and load (see `Routing`).

        Tokens marked as `filling` choose expert E, which is none, and count for nothing.
        """
        logits = self._logits(x)
        noise = torch.randn_like(logits) * self.noise_std if self.training and self.noise_std else None
        noisy = logits if noise is None else logits + noise
        gates = noisy.softmax(-1)
        experts = first_largest(gates, self.choices)
        gates = gates.gather(-1, experts)

        importance, load = logits.softmax(-1), torch.ones_like(logits)
        if noise is not None:
            # the chance that an expert would be among the first k, were its noise drawn again
            threshold = noisy.gather(-1, experts[..., -1:])
            load = torch.special.ndtr((logits - threshold) / self.noise_std)
        if filling is not None:
            experts = experts.masked_fill(filling[..., None], logits.shape[-1])
            importance, load = (amount.masked_fill(filling[..., None], 0.0) for amount in (importance, load))
        return experts, gates, imbalance(importance), imbalance(load)

    def _logits(self, x: Tensor) -> Tensor:
        """Return the experts' logits in float32, in mixed precision too: rounded, they would send tokens elsewhere."""
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return F.linear(x.float(), self.dense.weight.float())
        return F.linear(x.float(), self.dense.weight.float())


class Experts(nn.Module):
    """The feed-forward networks of all experts."""

    def __init__(self, config: ViTMoEConfig) -> None:
        super().__init__()
        self.count = config.experts
        self.up = ExpertLinear(config.experts, config.width, config.mlp_dim)
        self.act = Gelu(config.gelu)
        self.down = ExpertLinear(config.experts, config.mlp_dim, config.width)
        self.dropout = nn.Dropout(config.expert_dropout)

    def forward(self, x: Float[Tensor, "rows d"], seats: Seats) -> Float[Tensor, "rows d"]:
        """Return what the expert of each row makes of it."""
        return self.dropout(self.down(self.dropout(self.act(self.up(x, seats))), seats))

    def multiple_of_rows(self, x: Tensor) -> int | None:
        """Return `multiple_of_rows` for such tokens."""
        return multiple_of_rows(x.device, precision_of(x), self.up.weight.shape[1:])

    def init_weights(self) -> None:
        """All experts begin alike (vmoe `MlpMoeBlock.split_rngs`); routing tells them apart."""
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight[0])
            nn.init.normal_(layer.bias[0], std=1e-6)
            layer.weight[1:] = layer.weight[0]
            layer.bias[1:] = layer.bias[0]


class ExpertLinear(nn.Module):
    """A linear layer for each expert."""

    def __init__(self, experts: int, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, out))
        self.bias = nn.Parameter(torch.empty(experts, out))

    def forward(self, x: Float[Tensor, "rows width"], seats: Seats) -> Float[Tensor, "rows out"]:
        if seats.ends is not None:
            return grouped_products(x, self.weight, self.bias, seats.ends)
        experts = len(self.weight)
        blocks = x.unflatten(0, (experts + (0 if seats.more is None else len(seats.more)), -1))
        y = torch.baddbmm(self.bias[:, None], blocks[:experts], self.weight)
        if seats.more is not None:
            weight, bias = self.weight.index_select(0, seats.more), self.bias.index_select(0, seats.more)
            y = torch.cat([y, torch.baddbmm(bias[:, None], blocks[experts:], weight)])
        return y.flatten(0, 1)


def dispatch(tokens: Float[Tensor, "g s d"], seats: Seats) -> Float[Tensor, "rows d"]:
    """Return the experts' buffer: each token in the rows of its choices, zeros where nobody sits."""
    copies = repeat(tokens.to(precision_of(tokens)), "g s d -> (g s k) d", k=seats.row.shape[-1])
    buffer = copies.new_zeros(seats.rows + 1, copies.shape[-1])
    return buffer.index_copy_(0, seats.row.flatten(), copies)[:-1]


def combine(y: Float[Tensor, "rows d"], gates: Float[Tensor, "g s k"], seats: Seats) -> Float[Tensor, "g s d"]:
    """Return for each token the sum of what its experts made of it, weighted by their gates."""
    answers = F.pad(y, (0, 0, 0, 1)).index_select(0, seats.row.flatten()).unflatten(0, gates.shape)
    return (answers * gates[..., None]).sum(dim=2)


def precision_of(x: Tensor) -> torch.dtype:
    """Return the type in which matrix products of a tensor are computed, in mixed precision or out of it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else x.dtype


def multiple_of_rows(device: torch.device, dtype: torch.dtype, widths: Iterable[int]) -> int | None:
    """Return of what an expert's rows must be a multiple for grouped products; None where those are not to be taken.

    They have to be fast and ask the host for nothing. On GPUs those of bf16 on Hopper are; elsewhere torch takes one
    product after the other, whose sizes the host waits for (2.10 to 2.13, `aten/src/ATen/native/GroupedMMUtils.h`). On
    a CPU just that is fast; but oneDNN, which computes in bf16 there, compiles code for each new number of rows, so
    these must be few. Exported files know no such operator, compiled ones only that of bf16.

    Args:
        device: Where to compute.
        dtype: In what.
        widths: Of the rows on both sides, which must begin at multiples of 16 bytes.
    """
    match device.type:
        case "cpu":
            fast = dtype == torch.bfloat16 or (dtype == torch.float32 and not torch.compiler.is_compiling())
        case "cuda":
            fast = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == 9
        case _:
            fast = False
    if not fast or torch.compiler.is_exporting() or any(width * dtype.itemsize % 16 for width in widths):
        return None
    return 1 if dtype == torch.float32 else 16


def grouped_products(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "e width out"],
    bias: Float[Tensor, "e out"],
    ends: Int32[Tensor, " e"],
) -> Float[Tensor, "rows out"]:
    """Return each row times the weight of its expert, plus the bias.

    Args:
        x: Rows, those of an expert together.
        weight: Of the experts.
        bias: Of the experts.
        ends: Where the rows of each expert end; the last is the number of rows.
    """
    y = F.grouped_mm(x, weight.to(x.dtype), offs=ends)
    row = torch.arange(len(x), device=x.device)[:, None]
    owned = (row < ends) & (row >= F.pad(ends[:-1], (1, 0)))  # grouped products take no bias: a product adds it
    return y.addmm_(owned.to(y.dtype), bias.to(y.dtype))


def first_largest(gates: Float[Tensor, "g s e"], count: int) -> Int[Tensor, "g s k"]:
    """Return the experts of the `count` largest gates, the largest first; of equal ones the lower number, as in JAX.

    `topk` makes no such promise, and ONNX has no stable sort.
    """
    left, chosen = gates.detach(), []
    for _ in range(count):
        chosen.append(left.argmax(dim=-1, keepdim=True))
        left = left.scatter(-1, chosen[-1], -1.0)
    return torch.cat(chosen, dim=-1)


def capacity(choices: int, experts: int, factor: float) -> int:
    """Return the places per expert for a group's choices: `factor` times an even spread, rounded up to fours.

    The paper rounds to the nearest whole number; this is what its code does (vmoe `moe.compute_capacity`).
    """
    return 4 * math.ceil(math.ceil(choices * factor / experts) / 4)


def seats_by_capacity(
    experts: Int[Tensor, "g s k"],
    count: int,
    places: int,
    priority: Float[Tensor, "g s"] | None = None,
    multiple: int | None = None,
) -> Seats:
    """Seat the choices of each group until the experts are full.

    All first choices come before all second ones; among them, tokens come in order, or by falling `priority` (batch
    prioritized routing, section 4). A full expert turns choices away.

    Args:
        experts: Chosen experts; `count` stands for none.
        count: Number of experts.
        places: That each expert has for each group.
        priority: Of the tokens.
        multiple: Experts have as many rows as choices, rounded up to a multiple of this. None: as many as places.
    """
    groups = experts.shape[0]
    if priority is None:
        queue, lengths = _queues(experts, count)
    else:
        order = priority.argsort(dim=1, descending=True, stable=True)[..., None].expand_as(experts)
        queue, lengths = _queues(experts.gather(1, order), count)
        queue = queue.gather(1, order.argsort(dim=1))
    rows, ends = count * groups * places, None
    if multiple is None:
        starts = places * torch.arange(count * groups, device=experts.device).view(count, groups)
    else:
        rows = (min(rows, experts.numel()) + count * (multiple - 1)) // multiple * multiple
        seated = lengths.clamp(max=places).T
        taken = (seated.sum(dim=1, keepdim=True) + multiple - 1) // multiple * multiple
        last = taken.cumsum(dim=0)
        starts = last - taken + seated.cumsum(dim=1) - seated
        # What nobody sits in is the last expert's: of rows that are no expert's, torch leaves open what they hold.
        ends = F.pad(last[:-1, 0], (0, 1), value=rows).int()
    group = torch.arange(groups, device=experts.device)[:, None, None]
    row = starts[experts.clamp(max=count - 1), group] + queue
    return Seats(row.where((queue < places) & (experts < count), rows), rows, ends)


def seats_for_all(experts: Int[Tensor, "g s k"], count: int) -> Seats:
    """Seat all choices: some in a block of each expert's own, the rest in further blocks of the experts that need them.

    A block has `ROOM` times the rows of an even spread over the experts. However uneven the choices are, there are
    fewer than `count / ROOM` further blocks, where a buffer with room for every token at every expert would have to be
    `count` / k times as large as the choices.

    Args:
        experts: Chosen experts; `count` stands for none.
        count: Number of experts.
    """
    rows = ROOM * -(-experts.numel() // count)
    more = (count - 1) // ROOM  # as large as the sum of (n - 1) // rows over experts with n choices can be
    queue, lengths = _queues(rearrange(experts, "g s k -> 1 (g s) k"), count)
    queue = queue.view_as(experts)
    ends = ((lengths[0] - 1).clamp(min=0) // rows).cumsum(0)
    before = F.pad(ends, (1, 0))  # the last for the expert that is none
    turn = queue // rows  # which of its expert's blocks
    block = torch.where(turn == 0, experts, count + before[experts] + turn - 1)
    row = ((block - turn) * rows + queue).where(experts < count, (count + more) * rows)
    owners = (torch.arange(more, device=experts.device)[:, None] >= ends).sum(dim=1).clamp(max=count - 1)
    return Seats(row, (count + more) * rows, more=owners)


def imbalance(amounts: Float[Tensor, "g s e"]) -> Float[Tensor, " g"]:
    """Return the squared coefficient of variation over experts of the sums over tokens (appendix A)."""
    total = amounts.sum(dim=1)
    return total.var(dim=-1, correction=0) / total.mean(dim=-1).square()


def _queues(experts: Int[Tensor, "g s k"], count: int) -> tuple[Int[Tensor, "g s k"], Int[Tensor, "g e"]]:
    """Return how many choices of the same group and expert come before each, and how many there are.

    Earlier choices come first, then earlier tokens. `count` stands for no expert.
    """
    queue = rearrange(experts, "g s k -> g (k s) 1")
    joins = (queue == torch.arange(count + 1, device=experts.device)).cumsum(dim=1)
    place = joins.gather(2, queue) - 1
    return rearrange(place, "g (k s) 1 -> g s k", k=experts.shape[-1]), joins[:, -1, :count]
