"""V-MoE has its published sizes, routes tokens exactly as the official code does, and answers what it answered."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vitrail import npz
from vitrail.checkpoints import load_model
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.names import Hints
from vitrail.checkpoints.vmoe_names import VMOE
from vitrail.config.codec import from_json, to_json
from vitrail.config.vit import ViTConfig
from vitrail.config.vit_moe import VMOES, ViTMoEConfig
from vitrail.errors import UserError
from vitrail.layers import moe
from vitrail.layers.moe import MixtureOfExperts, Router, capacity, first_largest, seats_by_capacity, seats_for_all
from vitrail.models import ImageModel, build
from vitrail.models.base import WithLoss
from vitrail.models.vit_moe import ViTMoE

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "vmoe.weights.npz"
CASES = {
    "k2_C1.05": {"capacity_factor": 1.05, "group_size": 34},
    "k2_C0.5": {"capacity_factor": 0.5, "group_size": 34},
    "k2_C0.5_bpr": {"capacity_factor": 0.5, "group_size": 34, "batch_priority": True},
    "k2_C8": {"capacity_factor": 8.0, "group_size": 34},
}
TINY = ViTMoEConfig(
    image_size=(12, 12),
    patch_size=(4, 4),
    num_classes=5,
    width=16,
    depth=4,
    mlp_dim=24,
    heads=4,
    moe_layers=(1, 3),
    experts=4,
)
VARIANTS = {
    "token": {},
    "gap, sin-cos": {"pool": "gap", "positions": "sincos"},
    "map, pre-logits": {"pool": "map", "pre_logits": 8},
    "first block, one expert a token": {"moe_layers": (0, 1), "experts_per_token": 1, "channels": 1},
    "a single expert": {"experts": 1, "experts_per_token": 1},
    "full experts": {"capacity_factor": 0.5, "group_size": 7, "batch_priority": True},
}


def read_npz(name: str) -> dict[str, np.ndarray]:
    return npz.read_npz(GOLDEN / name, limit=10**8, advice="it is not read.")


def official_pictures() -> Tensor:
    return torch.from_numpy(read_npz("vmoe.io.npz")["images_nhwc"]).permute(0, 3, 1, 2)


def randomised(model: ImageModel | MixtureOfExperts, scale: float = 0.3) -> None:
    """Fill every parameter, so that experts differ and zero initialisation hides nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def model_of(config: ViTMoEConfig) -> ViTMoE:
    model = build(config)
    assert isinstance(model, ViTMoE)
    randomised(model)
    return model


def mixture_of(**changes: object) -> MixtureOfExperts:
    mixture = MixtureOfExperts(replace(TINY, **changes))
    randomised(mixture)
    return mixture


# Sizes


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vmoe-s32-every2", 296.9),
        ("vmoe-b32-every2", 980.6),
        ("vmoe-b16-every2", 979.0),
        ("vmoe-l16-every2", 3446.0),
        ("vmoe-l16-last2", 843.6),
        ("vmoe-h14-every2", 7160.8),
        ("vmoe-h14-last5", 2688.6),
    ],
)
def test_parameters_are_as_many_as_published(name: str, published: float) -> None:
    with torch.device("meta"):
        model = build(replace(VMOES[name], num_classes=18_291, pre_logits=VMOES[name].width))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == published


def test_the_15b_model_has_every_one_of_its_parameters() -> None:
    with torch.device("meta"):
        model = build(replace(VMOES["vmoe-15b"], num_classes=29_593))
    assert sum(parameter.numel() for parameter in model.parameters()) == 14_705_071_769


def test_mixtures_stand_where_the_names_say() -> None:
    assert VMOES["vmoe-s32-every2"].moe_layers == (1, 3, 5, 7)
    assert VMOES["vmoe-l16-last2"].moe_layers == (21, 23)
    assert VMOES["vmoe-h14-last5"].moe_layers == (23, 25, 27, 29, 31)
    assert len(VMOES["vmoe-15b"].moe_layers) == 24


# What the official code answered


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_official_weights_give_the_official_answer_and_losses(case: str) -> None:
    official = read_npz("vmoe.io.npz")[f"logits_{case}"]
    model = load_model(WEIGHTS, **CASES[case])
    assert isinstance(model, ViTMoE)
    images = official_pictures()
    assert float((model(images) - torch.from_numpy(official)).abs().max()) <= 1e-5 * np.abs(official).max()
    losses = json.loads((GOLDEN / "vmoe.losses.json").read_text())[case]
    _, routings = model.encode(images)
    assert {str(number) for number in routings} == losses.keys()
    for number, routing in routings.items():
        official = losses[str(number)]
        assert routing.importance.tolist() == pytest.approx(official["importance_loss"], rel=1e-5)
        loss = model.balance_loss([routing])
        assert float(loss) == pytest.approx(np.mean(official["auxiliary_loss"]), rel=1e-5)
        assert not routing.load.any()  # no noise in evaluation


@torch.no_grad()
def test_by_default_the_answer_is_that_of_experts_with_room_for_all() -> None:
    official = read_npz("vmoe.io.npz")["logits_k2_C8"]
    model = load_model(WEIGHTS)
    assert float((model(official_pictures()) - torch.from_numpy(official)).abs().max()) <= 1e-5 * np.abs(official).max()


def test_training_gives_the_official_loss_and_gradients() -> None:
    answers = read_npz("vmoe.training.npz")
    model = load_model(WEIGHTS, group_size=34, noise_std=0.0).train()
    answer = model(official_pictures())
    assert isinstance(answer, WithLoss)
    loss = F.cross_entropy(answer.logits, torch.from_numpy(answers["labels"])) + answer.loss
    loss.backward()
    assert answer.loss.item() == pytest.approx(float(answers["auxiliary_loss"]), rel=1e-5)
    assert loss.item() == pytest.approx(float(answers["loss"]), rel=1e-5)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    ours = VMOE.from_ours(model)
    checked = [name for name in answers if name.startswith("gradient/")]
    assert len(checked) == 10
    for name in checked:
        theirs = answers[name]
        assert np.abs(ours[name.removeprefix("gradient/")] - theirs).max() <= 1e-4 * np.abs(theirs).max(), name


@pytest.mark.parametrize("choices", [1, 2, 3])
def test_balance_losses_with_noise_are_the_official_ones(choices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = read_npz("vmoe.training.npz")
    x, noise = torch.from_numpy(answers["x"]), torch.from_numpy(answers["noise"])
    router = Router(16, 6, choices, 1.0)
    with torch.no_grad():
        router.dense.weight.copy_(torch.from_numpy(answers["kernel"]).T)
    monkeypatch.setattr(moe.torch, "randn_like", lambda tensor: noise)
    experts, gates, importance, load = router(x)
    assert importance.tolist() == pytest.approx(answers["importance"].tolist(), rel=1e-5)
    assert load.tolist() == pytest.approx(answers[f"load_k{choices}"].tolist(), rel=1e-5)
    probabilities = (x @ router.dense.weight.T + noise / 6).softmax(-1)
    assert torch.allclose(gates, probabilities.gather(-1, experts))
    _, _, quiet, none = router.eval()(x)
    assert torch.equal(quiet, importance)
    assert not none.any()


# Routing, against an implementation that is slow and plain


def routed_by_loops(
    gates: list[list[float]], choices: int, places: int, *, batch_priority: bool
) -> tuple[list[list[int]], list[list[bool]]]:
    """Return which experts each token chooses, and which of those have a place for it."""
    chosen = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:choices] for row in gates]
    tokens = list(range(len(gates)))
    if batch_priority:
        tokens.sort(key=lambda t: (-gates[t][chosen[t][0]], t))
    taken = [0] * len(gates[0])
    kept = [[False] * choices for _ in gates]
    for choice in range(choices):
        for token in tokens:
            expert = chosen[token][choice]
            kept[token][choice] = taken[expert] < places
            taken[expert] += 1
    return chosen, kept


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Gates of groups of tokens with many ties, and a number of choices."""
    groups, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    seed = draw(st.integers(0, 10**6))
    gates = torch.randint(1, 5, (groups, tokens, experts), generator=torch.Generator().manual_seed(seed)) / 8
    return gates, draw(st.integers(1, experts))


@settings(max_examples=200, deadline=None)
@given(grids(), st.integers(1, 8), st.booleans(), st.sampled_from([None, 1, 4]))
def test_full_experts_turn_away_whom_the_official_order_says(
    drawn: tuple[Tensor, int], places: int, batch_priority: bool, multiple: int | None
) -> None:
    gates, choices = drawn
    groups, _, count = gates.shape
    experts = first_largest(gates, choices)
    priority = gates.gather(-1, experts)[..., 0] if batch_priority else None
    seats = seats_by_capacity(experts, count, places, priority, multiple)
    seated = seats.row < seats.rows
    for group in range(groups):
        chosen, kept = routed_by_loops(gates[group].tolist(), choices, places, batch_priority=batch_priority)
        assert experts[group].tolist() == chosen
        assert seated[group].tolist() == kept
    rows = seats.row[seated]
    assert len(rows.unique()) == len(rows)
    if multiple is None:
        assert (seats.rows, seats.ends, seats.more) == (count * groups * places, None, None)
        owners = rows // (groups * places)
    else:
        assert seats.ends is not None
        lengths = [-(-int((experts[seated] == expert).sum()) // multiple) * multiple for expert in range(count)]
        assert seats.ends.tolist() == [*np.cumsum(lengths)[:-1], seats.rows]
        assert sum(lengths) <= seats.rows <= min(experts.numel(), count * groups * places) + count * (multiple - 1)
        owners = torch.searchsorted(seats.ends, rows.int(), right=True)
    assert torch.equal(owners, experts[seated])


@settings(max_examples=100, deadline=None)
@given(grids(), st.integers(1, 6), st.floats(0.0, 1.0))
def test_experts_have_as_many_rows_as_choices_however_uneven_these_are(
    drawn: tuple[Tensor, int], crowd: int, nowhere: float
) -> None:
    gates, choices = drawn
    count = gates.shape[-1]
    experts = first_largest(gates, choices) % crowd
    experts = experts.masked_fill(torch.rand(gates.shape[:2])[..., None] < nowhere, count)
    seats = seats_by_capacity(experts, count, experts[0].numel(), multiple=1)
    real = experts < count
    rows = seats.row[real]
    assert seats.rows == experts.numel()
    assert sorted(rows.tolist()) == list(range(int(real.sum())))
    assert (seats.row[~real] == seats.rows).all()
    assert seats.ends is not None
    assert torch.equal(torch.searchsorted(seats.ends, rows.int(), right=True), experts[real])


@settings(max_examples=150, deadline=None)
@given(grids(), st.integers(1, 6), st.floats(0.0, 1.0))
def test_there_is_a_seat_for_all_however_uneven_the_choices(
    drawn: tuple[Tensor, int], crowd: int, nowhere: float
) -> None:
    gates, choices = drawn
    count = gates.shape[-1]
    experts = first_largest(gates, choices) % crowd  # fewer experts, so that some have most of the tokens
    experts = experts.masked_fill(torch.rand(gates.shape[:2])[..., None] < nowhere, count)
    seats = seats_for_all(experts, count)
    real = experts < count
    assert torch.equal(seats.row < seats.rows, real)
    rows = seats.row[real]
    assert len(rows.unique()) == len(rows)
    assert seats.more is not None
    owners = torch.cat([torch.arange(count), seats.more])
    assert len(owners) < 2 * count
    assert torch.equal(owners[rows // (seats.rows // len(owners))], experts[real])


@pytest.mark.parametrize(
    ("choices", "experts", "factor", "places"),
    [(68, 4, 1.05, 20), (68, 4, 0.5, 12), (34, 4, 1.05, 12), (1, 32, 0.01, 4), (3152, 32, 1.05, 104), (64, 8, 1.0, 8)],
)
def test_capacity_is_rounded_up_to_a_multiple_of_four(choices: int, experts: int, factor: float, places: int) -> None:
    assert capacity(choices, experts, factor) == places


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 6),
    st.none() | st.floats(0.1, 3.0),
    st.booleans(),
    st.none() | st.integers(1, 20),
    st.integers(0, 10**6),
)
def test_a_mixture_is_the_weighted_sum_of_its_experts(
    pictures: int,
    tokens: int,
    experts: int,
    choices: int,
    factor: float | None,
    batch_priority: bool,
    group_size: int | None,
    seed: int,
) -> None:
    choices = min(choices, experts)
    mixture = mixture_of(
        experts=experts,
        experts_per_token=choices,
        capacity_factor=factor,
        batch_priority=batch_priority,
        group_size=group_size,
    ).eval()
    x = torch.randn(pictures, tokens, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y, routing = mixture(x)
        gates = (x.flatten(0, 1) @ mixture.router.dense.weight.T).softmax(-1)
        up, down = mixture.experts.up, mixture.experts.down
        answers = torch.stack(
            [
                F.gelu(x.flatten(0, 1) @ up.weight[e] + up.bias[e], approximate="tanh") @ down.weight[e] + down.bias[e]
                for e in range(experts)
            ],
            dim=1,
        )
    size = group_size or tokens
    places = tokens * pictures if factor is None else capacity(size * choices, experts, factor)
    expected = torch.zeros(pictures * tokens, 16)
    for start in range(0, pictures * tokens, size):
        group = slice(start, min(start + size, pictures * tokens))
        chosen, kept = routed_by_loops(gates[group].tolist(), choices, places, batch_priority=batch_priority)
        assert routing.experts.flatten(0, 1)[group].tolist() == chosen
        assert routing.kept.flatten(0, 1)[group].tolist() == kept
        for token, (row, held) in enumerate(zip(chosen, kept, strict=True), start=start):
            for expert, there in zip(row, held, strict=True):
                expected[token] += gates[token, expert] * answers[token, expert] * there
    assert torch.allclose(y.flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


# Rows that follow close upon each other, for grouped products, and rows in blocks


def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "multiple_of_rows", lambda *_: None)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_grouped_products_do_what_batched_ones_do(seed: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and gradients, with experts that nobody chooses, one that all do, and choices that are turned away."""
    rng = np.random.default_rng(seed)
    experts, pictures = int(rng.integers(1, 9)), int(rng.integers(1, 10))
    changes = {
        "experts": experts,
        "experts_per_token": min(experts, int(rng.integers(1, 4))),
        "train_capacity_factor": float(rng.choice([0.3, 1.05, 4.0])),
        "batch_priority": bool(rng.integers(2)),
        "noise_std": 0.0,
    }
    mixture = mixture_of(**changes).train(training)
    with torch.no_grad():
        kernel = mixture.router.dense.weight
        kernel[: experts // 2] *= rng.choice([0.0, 1.0, 30.0])
        kernel.copy_(kernel[torch.from_numpy(rng.permutation(experts))])
    x = torch.tensor(rng.normal(size=(pictures, 7, 16)), dtype=torch.float32)
    weights = torch.tensor(rng.normal(size=x.shape), dtype=torch.float32)

    def answered() -> list[Tensor]:
        tokens = x.clone().requires_grad_()
        y, routing = mixture(tokens)
        loss = (y * weights).sum() + routing.importance.sum()
        return [y, routing.kept.float(), *torch.autograd.grad(loss, [tokens, *mixture.parameters()])]

    assert mixture.experts.multiple_of_rows(x) == 1
    grouped = answered()
    in_blocks(monkeypatch)
    for ours, wanted in zip(grouped, answered(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_in_mixed_precision_grouped_products_round_as_batched_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, x = mixture_of(noise_std=0.0), torch.randn(8, 9, 16)

    def answered() -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = mixture(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(mixture.parameters()))]

    grouped = answered()
    in_blocks(monkeypatch)
    for ours, wanted in zip(grouped, answered(), strict=True):
        assert ours.dtype == wanted.dtype == torch.float32
        assert (ours - wanted).abs().max() <= 0.03 * wanted.abs().max()


def test_grouped_products_are_taken_where_they_are_fast_and_ask_nothing_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, cpu, gpu = moe.multiple_of_rows, torch.device("cpu"), torch.device("cuda")
    assert (rows(cpu, torch.float32, (768, 3072)), rows(cpu, torch.bfloat16, (768, 3072))) == (1, 16)
    assert (rows(cpu, torch.float32, (16, 20)), rows(cpu, torch.bfloat16, (16, 20))) == (1, None)  # 16 bytes
    assert rows(cpu, torch.float64, (16, 16)) is rows(torch.device("meta"), torch.float32, (16, 16)) is None
    for major, multiple in ((8, None), (9, 16), (10, None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert rows(gpu, torch.bfloat16, (768, 3072)) == multiple
        assert rows(gpu, torch.float32, (768, 3072)) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (rows(cpu, torch.bfloat16, (16, 24)), rows(cpu, torch.float32, (16, 24))) == (16, None)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert rows(cpu, torch.bfloat16, (16, 24)) is None


def test_what_is_turned_away_leaves_no_trace_in_gradients() -> None:
    """torch leaves open what stands in rows that no expert has: nothing may come from there."""
    mixture = mixture_of(train_capacity_factor=0.01, noise_std=0.0)
    x = torch.randn(8, 40, 16)
    y, routing = mixture(x)
    assert routing.kept.float().mean() < 0.1
    for gradient in torch.autograd.grad(y.sum(), list(mixture.parameters())):
        assert gradient.isfinite().all()


@torch.no_grad()
def test_tokens_that_fill_up_a_group_take_no_place_and_count_for_nothing() -> None:
    mixture = mixture_of(capacity_factor=0.25, group_size=64).eval()
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(0))
    _, routing = mixture(x)
    # 57 zeros choose expert 0 first, whose 8 places they would take before any token's second choice
    assert (routing.experts[..., 1] == 0).any()
    assert routing.kept.all()
    sums = (x[0] @ mixture.router.dense.weight.T).softmax(-1).sum(0)
    assert routing.importance.tolist() == pytest.approx([float(sums.var(correction=0) / sums.mean() ** 2)], rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"capacity_factor": 0.5}, {"capacity_factor": 0.5, "batch_priority": True}])
def test_an_answer_does_not_depend_on_the_other_pictures(changes: dict) -> None:
    model = model_of(replace(TINY, **changes)).eval()
    images = torch.randn(5, 3, 12, 12)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(model(images), alone, atol=1e-5)
    images[2] = float("nan")
    beside = model(images)
    assert beside[2].isnan().all()
    assert torch.allclose(beside[[0, 1, 3, 4]], alone[[0, 1, 3, 4]], atol=1e-5)


def test_routing_stays_in_full_precision_in_mixed_precision() -> None:
    mixture = mixture_of().eval()
    x = torch.randn(2, 50, 16)
    with torch.no_grad():
        expected, routing = mixture(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, mixed = mixture(x)
    assert torch.equal(mixed.experts, routing.experts)
    assert torch.equal(mixed.gates, routing.gates)
    assert 0 < (y - expected).abs().max() < 0.1 * expected.abs().max()


# Training


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    torch.manual_seed(0)
    model = model_of(replace(TINY, **VARIANTS[variant]))
    answer = model(torch.randn(8, model.config.channels, 12, 12))
    assert answer.logits.shape == (8, 5)
    assert answer.loss.shape == ()
    (F.cross_entropy(answer.logits, torch.arange(8) % 5) + answer.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if model.config.experts > 1 or "router" not in name:  # nothing to choose from one
            assert parameter.grad.any(), name


def test_experts_learn_only_from_the_tokens_that_reached_them() -> None:
    mixture = mixture_of(capacity_factor=0.5, group_size=30).eval()
    x = torch.randn(3, 10, 16, requires_grad=True)
    y, routing = mixture(x)
    y.square().sum().backward()
    assert x.grad is not None
    dropped = ~routing.kept.any(-1)
    assert dropped.any()
    assert not x.grad[dropped].any()
    assert x.grad[~dropped].any(-1).all()
    assert not y[dropped].any()  # only the residual path is left for them


def test_noise_and_losses_belong_to_training() -> None:
    model, images = model_of(TINY), torch.randn(8, 3, 12, 12)
    first, second = model(images), model(images)
    assert not torch.equal(first.logits, second.logits)
    assert first.loss > 0
    _, routings = model.encode(images)
    assert all(routing.load.gt(0).all() for routing in routings.values())
    assert all(len(routing.load) == 1 for routing in routings.values())  # a group of 8 pictures
    assert all(len(routing.load) == 3 for routing in model.encode(images[:3])[1].values())
    model.eval()
    assert isinstance(model(images), Tensor)
    assert torch.equal(model(images), model(images))
    silent = model_of(replace(TINY, noise_std=0.0))
    assert torch.equal(silent(images).logits, silent(images).logits)


def test_the_loss_weighs_importance_and_load() -> None:
    model = model_of(replace(TINY, importance_loss=0.5, load_loss=0.25))
    _, routings = model.encode(torch.randn(16, 3, 12, 12))
    expected = sum(0.5 * routing.importance.mean() + 0.25 * routing.load.mean() for routing in routings.values())
    assert torch.allclose(model.balance_loss(routings.values()), torch.as_tensor(expected))


def test_capacity_in_training_has_its_own_setting() -> None:
    images = torch.randn(8, 3, 12, 12)
    for factor, full in ((0.3, True), (4.0, False)):
        model = model_of(replace(TINY, train_capacity_factor=factor))
        _, routings = model.encode(images)
        assert all(routing.kept.all() != full for routing in routings.values())
        _, routings = model.eval().encode(images)
        assert all(routing.kept.all() for routing in routings.values())


def test_dropout_in_the_experts_acts_in_training_only() -> None:
    model = model_of(replace(TINY, expert_dropout=0.5, noise_std=0.0))
    images = torch.randn(4, 3, 12, 12)
    assert not torch.equal(model(images).logits, model(images).logits)
    model.eval()
    assert torch.equal(model(images), model(images))
    assert model.blocks()[0].mlp.dropout.p == 0.0  # the dense blocks have their own


# The model


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised_after_a_build_on_meta(variant: str) -> None:
    with torch.device("meta"):
        model = build(replace(TINY, **VARIANTS[variant]))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    images = torch.randn(2, model.config.channels, 12, 12)
    assert torch.equal(model.eval()(images), torch.zeros(2, 5))  # a head of zeros


def test_experts_begin_alike_and_the_router_as_flax_begins_it() -> None:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(replace(TINY, width=256, mlp_dim=512, experts=32))
    with torch.no_grad():
        mixture.init_weights()
    state = mixture.state_dict()
    for name in ("experts.up.weight", "experts.up.bias", "experts.down.weight", "experts.down.bias"):
        assert torch.equal(state[name], state[name][:1].expand_as(state[name])), name
    deviations = {
        "experts.up.weight": (2 / 768) ** 0.5,
        "experts.down.weight": (2 / 768) ** 0.5,
        "experts.up.bias": 1e-6,
        "router.dense.weight": (1 / 256) ** 0.5,
    }
    for name, deviation in deviations.items():
        assert abs(float(state[name].std()) / deviation - 1) < 0.08, name
    assert "router.dense.bias" not in state


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_do_not_depend_on_what_the_numbers_are(variant: str, training: bool) -> None:
    """On the meta device there are none: whoever asked for one would be told so."""
    with torch.device("meta"):
        model = build(replace(TINY, **VARIANTS[variant])).train(training)
        for height, width in ((12, 12), (20, 9)):
            answer = model(torch.empty(3, model.config.channels, height, width))
            assert (answer.logits if training else answer).shape == (3, 5)


@torch.no_grad()
def test_features_attention_and_routes_are_at_hand() -> None:
    model = model_of(TINY).eval()
    images = torch.randn(2, 3, 12, 20)
    assert model.features(images).shape == (2, 16)
    assert model.head is not None
    assert torch.equal(model.head(model.features(images)), model(images))
    assert model.feature_map(images).shape == (2, 16, 3, 5)
    maps = list(model.attention(images))
    assert [tuple(weights.shape) for weights in maps] == [(2, 4, 16, 16)] * 4
    assert torch.allclose(maps[-1].sum(-1), torch.ones(2, 4, 16), atol=1e-5)
    tokens, routings = model.encode(images)
    assert torch.equal(tokens, model.tokens(images))
    assert list(routings) == [1, 3]
    assert routings[3].experts.shape == routings[3].gates.shape == routings[3].kept.shape == (2, 16, 2)
    assert model.depth_of("encoder.3.mlp.experts.up.weight") == 4
    assert len(model.blocks()) == 4


@torch.no_grad()
def test_a_model_can_be_exported_for_batches_of_any_size() -> None:
    model = model_of(replace(TINY, depth=2, moe_layers=(1,))).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (torch.randn(4, 3, 12, 12),), dynamic_shapes={"images": {0: batch}}).module()
    for count in (1, 7):
        images = torch.randn(count, 3, 12, 12)
        assert torch.allclose(exported(images), model(images), atol=1e-5)


# Settings and names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token 5 is more than the 4 experts"),
        ({"experts_per_token": 0}, "experts_per_token must be at least 1"),
        ({"moe_layers": (3, 1)}, "moe_layers must be growing numbers of blocks from 0 to 3"),
        ({"moe_layers": (1, 4)}, "moe_layers"),
        ({"moe_layers": ()}, "moe_layers"),
        ({"capacity_factor": 0.0}, "capacity_factor must be larger than 0"),
        ({"train_capacity_factor": float("nan")}, "train_capacity_factor must be larger than 0"),
        ({"group_size": 0}, "group_size must be larger than 0"),
        ({"noise_std": -1.0}, "noise_std must be 0 or larger"),
        ({"expert_dropout": 1.0}, r"expert_dropout must lie in \[0, 1\)"),
        ({"heads": 3}, "not a multiple of heads"),  # what the ViT asks for
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


def test_settings_survive_as_json() -> None:
    for config in (TINY, replace(TINY, capacity_factor=1.5, group_size=40), VMOES["vmoe-15b"]):
        assert from_json(ViTMoEConfig, json.loads(json.dumps(to_json(config)))) == config


def test_the_configuration_is_read_off_the_arrays() -> None:
    config, _ = VMOE.to_ours(read_npz("vmoe.weights.npz"))
    assert config == ViTMoEConfig(
        image_size=(64, 64),
        num_classes=10,
        width=32,
        depth=4,
        mlp_dim=64,
        heads=4,
        moe_layers=(1, 3),
        experts=4,
    )
    assert VMOE.preprocessing(config).fit == "squash"
    assert VMOE.preprocessing(VMOES["vmoe-b16-every2"]).fit == "crop"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "gap"},
        {"pool": "map", "pre_logits": 8, "channels": 1},
        {"positions": "sincos", "num_classes": 0},
        {"moe_layers": (0, 1, 2, 3), "experts": 1, "experts_per_token": 1},
        {"image_size": (8, 20)},
    ],
)
def test_names_lead_there_and_back_bit_for_bit(changes: dict) -> None:
    model = model_of(replace(TINY, **changes))
    arrays = VMOE.from_ours(model)
    assert VMOE.claims(arrays)
    config, state = VMOE.to_ours(arrays, hints=Hints(image_size=model.config.image_size))
    assert config == model.config
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_official_arrays_come_back_bit_for_bit() -> None:
    theirs = read_npz("vmoe.weights.npz")
    ours = VMOE.from_ours(load_model(WEIGHTS))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].shape == array.shape
        assert ours[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda arrays: arrays.pop("Encoder/encoderblock_3/Moe/Mlp/Dense_1/bias"), "lacks the array .*_3/Moe/Mlp/Den"),
        (lambda arrays: arrays.pop("Encoder/encoderblock_2/Mlp/Dense_1/bias"), "lacks the array .*block_2/Mlp/Dense_1"),
        (lambda arrays: arrays.pop("embedding/kernel"), "no array 'embedding/kernel'.*official V-MoE"),
        (lambda arrays: arrays.update({"Encoder/encoderblock_0/Moe/x": np.zeros(3)}), "no place for: .*block_0/Moe/x"),
        (
            lambda arrays: arrays.update({"Encoder/encoderblock_3/Moe/Router/dense/kernel": np.zeros((32, 5), "f4")}),
            r"encoder.3.mlp.router.dense.weight' has the shape \(5, 32\).*\(4, 32\)",
        ),
        (
            lambda arrays: arrays.update({"Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel": np.zeros((4, 32), "f4")}),
            r"Moe/Mlp/Dense_0/kernel cannot have the shape \(4, 32\)",
        ),
    ],
)
def test_wrong_arrays_are_named(spoil: Callable[[dict], object], message: str) -> None:
    arrays = read_npz("vmoe.weights.npz")
    spoil(arrays)
    with pytest.raises(UserError, match=message):
        assemble(*VMOE.to_ours(arrays, source="a.npz"), "a.npz")


def test_names_refuse_models_that_the_official_code_cannot_build() -> None:
    for changes in ({"qkv_bias": False}, {"positions": "learned-patches"}):
        with pytest.raises(UserError, match="the names 'vmoe' have no place for"):
            VMOE.from_ours(build(replace(TINY, **changes)))
    with pytest.raises(UserError, match="have no place for a ViT without experts"):
        VMOE.from_ours(build(ViTConfig(width=16, depth=1, mlp_dim=8, heads=2)))
