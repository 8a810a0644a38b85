"""What makes large models fit: moments in 8 bits, and updates in the backward pass."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_optimizers import check_goes_on, descend
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.checkpoints import load_model
from vitrail.config.recipes import SamConfig
from vitrail.config.run import OptimConfig, RunConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel, build
from vitrail.models.base import WithLoss
from vitrail.optim import build_optimizer, set_learning_rate
from vitrail.optimizers import Adafactor, AdamW8bit, adamw_8bit
from vitrail.optimizers import adafactor as adafactor_module
from vitrail.optimizers.eight_bits import in_blocks, levels, out_of_blocks, pack, unpack
from vitrail.training import run_training

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), dtype=torch.float32)


# 8 bits


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_those_of_the_paper(signed: bool) -> None:
    """Section 1.3 and appendix: 7 decades; in each, the centres of equal parts of [0.1, 1] times a power of ten."""
    table = levels(signed, CPU).double().numpy()
    assert len(set(table)) == 256
    assert (np.diff(table) > 0).all()
    assert table[-1] == 1 and 0 in table
    positive = table[(table > 0) & (table < 1)]
    most = 64 if signed else 128
    for decade in range(7):
        inside = positive[(positive > 10.0 ** -(decade + 1)) & (positive < 10.0**-decade)]
        count = most >> decade
        centres = 0.1 + 0.9 * (np.arange(count) + 0.5) / count
        np.testing.assert_allclose(inside, centres * 10.0**-decade, rtol=1e-6)
    if signed:
        np.testing.assert_array_equal(table[:127], -positive[::-1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1500), st.integers(0, 10**6), st.booleans(), st.floats(-30.0, 30.0))
def test_each_number_becomes_its_nearest_level_in_its_block(
    count: int, seed: int, signed: bool, exponent: float
) -> None:
    x = randn(count, seed=seed) * randn(count, seed=seed + 1).mul(4).exp() * 10**exponent
    x = x if signed else x.abs()
    blocks = in_blocks(x)
    codes, scale = pack(blocks, signed=signed)
    assert codes.dtype == torch.uint8
    assert torch.equal(scale, blocks.abs().amax(1, keepdim=True))
    kept = unpack(codes, scale, signed=signed)
    table = levels(signed, CPU)
    nearest = (blocks[..., None] - table * scale[..., None]).abs().amin(-1)
    least = table[table > 0].min() * scale
    rounded_up = torch.zeros_like(blocks, dtype=torch.bool) if signed else blocks < least
    off = ((kept - blocks).abs() - nearest).where(~rounded_up, 0.0)
    assert (off <= blocks.abs() * 2**-10 + 2**-23 * scale).all()  # numbers are looked up as float16
    torch.testing.assert_close(kept.where(rounded_up, 0.0), least.expand_as(kept).where(rounded_up, 0.0))
    assert torch.equal(out_of_blocks(blocks, x.shape), x)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_stays_zero(signed: bool) -> None:
    zero = torch.zeros(2, 256)
    assert not unpack(*pack(zero, signed=signed), signed=signed).any()


def weights_of_all_kinds(seed: int = 0) -> dict[str, nn.Parameter]:
    kernel = randn(16, 32, 4, 4, seed=seed + 1).contiguous(memory_format=torch.channels_last)
    shapes = {"matrix": (65, 64), "experts": (3, 70, 64), "bias": (64,), "position": (1, 5, 8)}
    weights = {name: nn.Parameter(randn(*shape, seed=seed)) for name, shape in shapes.items()}
    return {**weights, "kernel": nn.Parameter(kernel)}


def adamw(weights: dict[str, nn.Parameter]) -> AdamW8bit:
    return AdamW8bit([{"params": [weight]} for weight in weights.values()], 0.01, weight_decay=0.1)


def adafactor(weights: dict[str, nn.Parameter]) -> Adafactor:
    return Adafactor(weights.values(), 0.01, weight_decay=0.1, eight_bits=True)


def test_the_first_update_is_that_of_adamw() -> None:
    """Nothing has been rounded yet."""
    weights, others = weights_of_all_kinds(), weights_of_all_kinds()
    descend(adamw(weights), weights, range(1))
    descend(torch.optim.AdamW(others.values(), 0.01, weight_decay=0.1), others, range(1))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], msg=name)


def test_small_parameters_are_as_exact_as_ever() -> None:
    weights, others = weights_of_all_kinds(), weights_of_all_kinds()
    descend(adamw(weights), weights, range(20))
    descend(torch.optim.AdamW(others.values(), 0.01, weight_decay=0.1), others, range(20))
    for name in ("bias", "position"):
        torch.testing.assert_close(weights[name], others[name], msg=name)
    for name in ("matrix", "experts", "kernel"):
        off = (weights[name] - others[name]).norm() / (others[name] - weights_of_all_kinds()[name]).norm()
        assert 0 < off < 0.05, name


@pytest.mark.parametrize(("make", "most"), [(adamw, 2 + 2 * 4 / 256), (adafactor, 1 + 4 / 256)])
def test_moments_take_a_byte_per_weight_each(make: Callable[..., torch.optim.Optimizer], most: float) -> None:
    weights = {"matrix": nn.Parameter(torch.zeros(256, 512))}
    optimizer = make(weights)
    descend(optimizer, weights, range(2))
    held = sum(tensor.nbytes for tensor in optimizer.state[weights["matrix"]].values())
    factors = 4 * (256 + 512) if make is adafactor else 0
    assert held == most * 256 * 512 + factors


@pytest.mark.parametrize("make", [adamw, adafactor])
def test_moments_in_8_bits_go_on_bit_for_bit(make: Callable[..., torch.optim.Optimizer], tmp_path: Path) -> None:
    check_goes_on(make, weights_of_all_kinds, tmp_path)


def test_a_large_gradient_in_a_block_does_not_let_its_neighbours_run_away() -> None:
    """Held as it is, the second moment of the others would be 0 here, and they would be divided by nothing."""
    weight, other = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    ours, theirs = AdamW8bit([weight], 0.01), torch.optim.AdamW([other], 0.01, weight_decay=0.0)
    sizes = torch.full((64, 64), 1e-4)
    sizes[:, 0] = 1.0
    for step in range(30):
        weight.grad = other.grad = sizes * randn(64, 64, seed=step)
        ours.step()
        theirs.step()
    assert weight.abs().max() <= 1.5 * other.abs().max()
    assert (weight - other).norm() < 0.3 * other.norm()


def losses_of(name: str, moments: str, steps: int = 150) -> Tensor:
    """The course of the loss of a network that learns what another one, of random weights, makes of random inputs."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    student = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 10))
    if name == "adamw":
        kind = AdamW8bit if moments == "8bit" else torch.optim.AdamW
        optimizer = kind(student.parameters(), lr=3e-3, weight_decay=0.01)
    else:
        optimizer = Adafactor(student.parameters(), lr=3e-3, eight_bits=moments == "8bit")
    losses = []
    for step in range(steps):
        x = randn(128, 64, seed=step)
        loss = F.mse_loss(student(x), teacher(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_in_8_bits_the_loss_falls_as_in_full(name: str) -> None:
    full, rounded = losses_of(name, "full"), losses_of(name, "8bit")
    assert full[-20:].mean() < 0.2 * full[0]
    assert not torch.equal(full, rounded)
    assert rounded[-20:].mean() == pytest.approx(float(full[-20:].mean()), rel=0.05)


# Updates in the backward pass


def model_of(family: str) -> ImageModel:
    torch.manual_seed(0)
    return build(replace(TINY[family], num_classes=3)).train()


def loss_of(model: ImageModel, step: int) -> Tensor:
    torch.manual_seed(step)
    answer = model(torch.randn(4, 3, *model.config.image_size))
    logits, own = answer if isinstance(answer, WithLoss) else (answer, 0.0)
    return F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])) + own


OPTIMIZERS = {
    "adamw": OptimConfig(lr=0.01, clip_norm=0.0),
    "adamw, 8 bits": OptimConfig(lr=0.01, clip_norm=0.0, moments="8bit"),
    "adafactor, 8 bits, decay by layer": OptimConfig(
        name="adafactor", lr=0.01, clip_norm=0.0, moments="8bit", layer_decay=0.7
    ),
    "muon": OptimConfig(name="muon", lr=0.01, clip_norm=0.0),
    "sgd": OptimConfig(name="sgd", lr=0.01, clip_norm=0.0, head_decay=0.3),
    "rmsprop": OptimConfig(name="rmsprop", lr=0.001, clip_norm=0.0),
}


@pytest.mark.parametrize(
    ("family", "name"), [*(("vit", name) for name in OPTIMIZERS), *((family, "adamw") for family in TINY)]
)
def test_updates_in_the_backward_pass_are_those_after_it(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (adafactor_module, adamw_8bit):
        monkeypatch.setattr(module, "LEAST", 64)  # these models are small
    config = OPTIMIZERS[name]
    model, other = model_of(family), model_of(family)
    optimizer = build_optimizer(model, replace(config, in_backward=True))
    usual = build_optimizer(other, config)
    for step in range(3):
        set_learning_rate([optimizer, usual], config.lr / (1 + step))
        loss_of(model, step).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        optimizer.step()  # finds nothing left to do
        usual.zero_grad()
        loss_of(other, step).backward()
        usual.step()
    for (label, parameter), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, theirs), label


def test_never_more_gradients_are_held_than_the_pass_works_on() -> None:
    model = model_of("vit")
    build_optimizer(model, replace(OPTIMIZERS["adamw"], in_backward=True))
    held: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in model.parameters()))
        )
    loss_of(model, 0).backward()
    assert len(held) == len(list(model.parameters()))
    assert max(held) <= 2  # those of one layer may come at once


def test_in_the_backward_pass_a_stored_optimizer_goes_on_bit_for_bit() -> None:
    config = replace(OPTIMIZERS["adamw, 8 bits"], in_backward=True)
    model = model_of("vit")
    optimizer = build_optimizer(model, config)
    for step in range(2):
        loss_of(model, step).backward()
    other = model_of("vit")
    other.load_state_dict(model.state_dict())
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(2, 4):
        loss_of(model, step).backward()
        loss_of(other, step).backward()
    for parameter, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, theirs)


def test_copies_of_a_model_do_not_update_themselves() -> None:
    """Trials learn with copies, by an optimizer of their own."""
    model = model_of("vit")
    build_optimizer(model, replace(OPTIMIZERS["adamw"], in_backward=True))
    twin = copy.deepcopy(model)
    loss_of(twin, 0).backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    for parameter, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, theirs)


def test_what_learns_later_is_updated_from_then_on() -> None:
    model = model_of("vit")
    build_optimizer(model, replace(OPTIMIZERS["adamw"], in_backward=True))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def moved() -> set[str]:
        return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    loss_of(model, 0).backward()
    assert moved() == {"head.weight", "head.bias"}
    model.requires_grad_(True)
    loss_of(model, 1).backward()
    assert moved() == before.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "sgd", "moments": "8bit"}, "--optim.moments 8bit needs --optim.name adamw or adafactor, not sgd"),
        ({"in_backward": True}, "--optim.in-backward .* add --optim.clip-norm 0"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimConfig(**changes)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="use one process"):
        build_optimizer(model_of("vit"), replace(OPTIMIZERS["adamw"], in_backward=True))


def test_a_run_that_updates_in_the_backward_pass_ends_as_any_other(tiny_run: Callable[..., RunConfig]) -> None:
    optim = {"optim__clip_norm": 0.0, "optim__in_backward": True, "optim__moments": "8bit"}
    whole = run_training(tiny_run(out="whole", **optim))
    usual = run_training(tiny_run(out="usual", **optim | {"optim__in_backward": False}))
    rows = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    assert not any("gradient_norm" in row for row in rows)
    weights, theirs = (load_model(run.folder / "last").state_dict() for run in (whole, usual))
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": SamConfig()}, "several backward passes"),
        ({"loop__accumulation": 2}, "--loop.accumulation sums"),
        ({"loop__precision": "fp16"}, "--loop.precision bf16"),
    ],
)
def test_what_needs_the_gradients_of_a_whole_update_is_refused(
    tiny_run: Callable[..., RunConfig], changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_training(tiny_run(optim__clip_norm=0.0, optim__in_backward=True, **changes))
