"""Adafactor and Muon against their authors' code and against slow ones; the schedule of ViT-G."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_optimizers import check_goes_on, descend
from torch import nn

from vitrail.config.run import OptimConfig
from vitrail.optim import learning_rate
from vitrail.optimizers import Adafactor, Muon
from vitrail.optimizers.adafactor import factored_axes
from vitrail.optimizers.muon import orthogonalise

GOLDEN = np.load(Path(__file__).parent / "golden" / "adafactor.npz")
QKV = ("query/kernel", "key/kernel", "value/kernel")


def randn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def official(part: str, kind: str) -> dict[str, np.ndarray]:
    start = f"{part}/{kind}/"
    arrays = {name.removeprefix(start): GOLDEN[name].astype(np.float32) for name in GOLDEN if name.startswith(start)}
    return laid_out(arrays)


def laid_out(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays as our layers have them: [out in], and query, key and value in one."""
    ours = {name: array for name, array in arrays.items() if name not in QKV}
    if QKV[0] in arrays:
        ours["qkv/kernel"] = np.stack([arrays[name].transpose(1, 2, 0) for name in QKV]).reshape(-1, 36)
        ours["out/kernel"] = arrays["out/kernel"].transpose(2, 0, 1).reshape(36, -1)
        ours["embedding/kernel"] = arrays["embedding/kernel"].transpose(3, 2, 0, 1)
    return {n: a.T if n.endswith("/kernel") and a.ndim == 2 and n[0] not in "qo" else a for n, a in ours.items()}


@pytest.mark.parametrize(("part", "least"), [("vit", 32), ("moe", 6)])
def test_adafactor_goes_where_big_vision_goes(part: str, least: int) -> None:
    """Six steps of `big_vision.optax.make` (0127fb6b, optax 0.2.8, jitted) with the optimizer of `train_vit_g.py`.

    Clipping, decay of the head 100 times that of other kernels, warm-up, rsqrt, cooldown. Where a moment lies on the
    edge between two numbers of bfloat16, a rounding error decides which it becomes, hence the rare exceptions.
    """
    weights = {name: nn.Parameter(torch.tensor(array)) for name, array in official(part, "before").items()}
    decay = {name: 0.03 * name.endswith("/kernel") * (100 if "head" in name else 1) for name in weights}
    shapes = {"qkv/kernel": (3, 2, 34, 36), "out/kernel": (36, 2, 34)}
    groups = [
        {"params": [weight], "weight_decay": decay[name], "shape": shapes.get(name)} for name, weight in weights.items()
    ]
    optimizer = Adafactor(groups, lr=1.0, min_dim_size_to_factor=least)
    for step, rate in enumerate(GOLDEN[f"{part}/rates"]):
        start = f"{part}/gradient/"
        gradients = {name.removeprefix(start): GOLDEN[name] for name in GOLDEN if name.startswith(start)}
        rolled = {n: np.roll(g.ravel(), 7 * step).reshape(g.shape).astype(np.float32) for n, g in gradients.items()}
        for name, gradient in laid_out(rolled).items():
            weights[name].grad = torch.tensor(gradient * np.float32(0.5**step))
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.step()
    errors = np.concatenate(
        [
            np.abs(weights[name].detach().numpy() - after).ravel() / np.abs(after).max()
            for name, after in official(part, "after").items()
        ]
    )
    assert (errors > 1e-6).mean() < 1e-3
    assert errors.max() < 1e-3


def test_adafactor_forgets_at_a_capped_rate_late_in_training() -> None:
    weight, rng = nn.Parameter(torch.zeros(3)), np.random.default_rng(0)
    optimizer = Adafactor([weight], lr=1.0)
    optimizer.param_groups[0]["step"] = 50_000
    second, first, expected = np.zeros(3), np.zeros(3), np.zeros(3)
    for _ in range(4):
        gradient = rng.normal(size=3)
        second = 0.999 * second + 0.001 * gradient**2
        first = 0.9 * first + 0.1 * gradient / np.sqrt(second)
        expected -= first
        weight.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=2e-2)  # the first moment has 8 bits


def test_the_two_largest_axes_are_factored_where_both_are_large() -> None:
    assert factored_axes((1664, 8192), 32) == (0, 1)
    assert factored_axes((3, 16, 104, 1664), 32) == (2, 3)
    assert factored_axes((1664, 16, 104), 32) == (2, 0)
    assert factored_axes((32, 6400, 1408), 33) == (2, 1)
    assert factored_axes((32, 6400), 33) is None  # biases of experts
    assert factored_axes((1664, 31), 32) is factored_axes((1664,), 1) is None


def test_adafactor_holds_little_more_than_two_bytes_per_weight() -> None:
    weight = nn.Parameter(torch.zeros(256, 512))
    weight.grad = torch.ones_like(weight)
    optimizer = Adafactor([weight], lr=0.1)
    optimizer.step()
    held = sum(tensor.nbytes for tensor in optimizer.state[weight].values())
    assert held == 2 * weight.numel() + 4 * (256 + 512)


def weights_of_all_kinds() -> dict[str, nn.Parameter]:
    kernel = torch.tensor(randn(40, 36, 2, 2, seed=1)).contiguous(memory_format=torch.channels_last)
    shapes = {"qkv": (96, 34), "experts": (3, 33, 34), "bias": (34,), "tall": (40, 5)}
    weights = {name: nn.Parameter(torch.tensor(randn(*shape))) for name, shape in shapes.items()}
    return {**weights, "kernel": nn.Parameter(kernel)}


def adafactor(weights: dict[str, nn.Parameter]) -> Adafactor:
    rest = [weight for name, weight in weights.items() if name != "qkv"]
    return Adafactor([{"params": [weights["qkv"]], "shape": (3, 1, 32, 34)}, {"params": rest}], 0.01, weight_decay=0.1)


def muon(weights: dict[str, nn.Parameter]) -> Muon:
    groups = [
        {"params": [weights["qkv"]], "parts": 3},
        {"params": [weights[name] for name in ("experts", "tall", "kernel")]},
        {"params": [weights["bias"]], "matrices": False, "weight_decay": 0.0},
    ]
    return Muon(groups, 0.01, weight_decay=0.1, ns_steps=4, fused=True)


@pytest.mark.parametrize("make", [adafactor, muon])
def test_a_stored_optimizer_goes_on_bit_for_bit(make: Callable[..., torch.optim.Optimizer], tmp_path: Path) -> None:
    check_goes_on(make, weights_of_all_kinds, tmp_path)


@pytest.mark.parametrize("make", [adafactor, muon])
def test_a_weight_without_gradient_stays_and_one_with_gradient_zero_only_decays(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    weights = weights_of_all_kinds()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = make(weights)
    weights["qkv"].grad = torch.zeros_like(weights["qkv"])
    for _ in range(2):
        optimizer.step()
    torch.testing.assert_close(weights["qkv"].detach(), before["qkv"] * (1 - 0.01 * 0.1) ** 2)
    assert all(torch.equal(weights[name], before[name]) for name in before if name != "qkv")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 17), (2, 1, 4)])
@pytest.mark.parametrize("steps", [4, 5])
def test_newton_schulz_takes_singular_values_through_its_polynomial(shape: tuple[int, ...], steps: int) -> None:
    matrices = randn(*shape)
    u, s, v = np.linalg.svd(matrices.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum(-1, keepdims=True))
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    answer = orthogonalise(torch.tensor(matrices), steps)
    np.testing.assert_allclose(answer.numpy(), (u * s[:, None]) @ v, atol=2e-5)


def slow_muon(weight: np.ndarray, gradients: list[np.ndarray], *, lr: float, decay: float, momentum: float):
    """Muon on one matrix, by singular values in float64."""
    weight, buffer = weight.astype(np.float64), np.zeros(weight.shape)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        u, s, v = np.linalg.svd(momentum * buffer + (1 - momentum) * gradient, full_matrices=False)
        s = s / np.sqrt((s**2).sum())
        for _ in range(4):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        weight = (1 - lr * decay) * weight - lr * 0.2 * np.sqrt(max(weight.shape)) * (u * s) @ v
    return weight


@pytest.mark.parametrize("momentum", [0.9, 0.95])
def test_muon_moves_each_matrix_by_itself(momentum: float) -> None:
    """Parts of one above the other, experts, and kernels as [out, in x height x width]; wide, tall and square."""
    weights = weights_of_all_kinds()
    matrices = {
        "qkv": lambda array: list(array.reshape(3, 32, 34)),
        "experts": list,
        "tall": lambda array: [array],
        "kernel": lambda array: [array.reshape(40, -1)],
    }
    before = {name: weight.detach().numpy().copy() for name, weight in weights.items()}
    optimizer = muon(weights)
    for group in optimizer.param_groups:
        group["momentum"] = momentum
    descend(optimizer, weights, range(3))
    for i, name in enumerate(weights):
        if name == "bias":
            continue
        gradients = [matrices[name](randn(*weights[name].shape, seed=100 * step + i)) for step in range(3)]
        for number, got in enumerate(matrices[name](weights[name].detach().numpy())):
            expected = slow_muon(
                matrices[name](before[name])[number],
                [gradient[number] for gradient in gradients],
                lr=0.01,
                decay=0.1,
                momentum=momentum,
            )
            np.testing.assert_allclose(got, expected, atol=1e-5)


def test_muon_leaves_the_rest_to_adamw() -> None:
    weights, others = weights_of_all_kinds(), weights_of_all_kinds()
    adamw = torch.optim.AdamW([others["bias"]], lr=0.01, weight_decay=0.0, fused=True)
    descend(muon(weights), weights, range(3))
    descend(adamw, others, range(3))
    assert torch.equal(weights["bias"], others["bias"])
    assert not torch.equal(weights["tall"], others["tall"])


def test_muon_does_as_torchs_own_as_far_as_bfloat16_reaches() -> None:
    start, gradient = torch.tensor(randn(24, 16)), torch.tensor(randn(24, 16, seed=1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    for optimizer, weight in (
        (Muon([{"params": [ours]}], 0.1, weight_decay=0.1, momentum=0.95), ours),
        (torch.optim.Muon([theirs], 0.1, 0.1, 0.95, adjust_lr_fn="match_rms_adamw"), theirs),
    ):
        weight.grad = gradient.clone()
        optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_an_update_of_muon_is_as_large_as_one_of_adamw_whatever_the_shape() -> None:
    for shape in ((64, 64), (16, 200), (200, 16), (8, 4, 3, 3), (2, 30, 50)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.tensor(randn(*shape))
        Muon([{"params": [weight]}], 1.0).step()
        assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2, rel=0.3)


def test_the_schedule_of_vit_g_has_the_values_of_big_vision() -> None:
    """`create_learning_rate_schedule` with 10k warm-up, timescale 10k, 50k cooldown, 1M steps.

    Its warm-up begins at 0, with an update that changes nothing; ours is one step ahead there, and nowhere else.
    """
    config = OptimConfig(lr=1.0, schedule="rsqrt", warmup_steps=10_000, rsqrt_timescale=10_000, cooldown_steps=50_000)
    values = {5_000: 0.5, 10_000: 1.0, 20_000: 0.70711, 500_000: 0.14142, 950_000: 0.10260, 975_000: 0.05064}
    for step, value in {**values, 1_000_000: 0.0}.items():
        ahead = 1 if step < 10_000 else 0
        assert learning_rate(config, step - ahead, 1_000_000) == pytest.approx(value, abs=1e-5)
    assert learning_rate(config, 0, 1_000_000) == pytest.approx(1e-4)
