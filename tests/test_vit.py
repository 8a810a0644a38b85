"""The Vision Transformer has its published size and does what the paper says."""

from dataclasses import replace

import pytest
import scipy.ndimage
import torch
from torch.nn import functional as F

from vitrail.config.vit import ViTConfig
from vitrail.layers.attention import Attention, AttentionPool
from vitrail.layers.embedding import resize_positions, sincos_positions
from vitrail.layers.residual import DropPath
from vitrail.models import ImageModel, ViT, build, create_model

TINY = ViTConfig(image_size=(12, 12), patch_size=(4, 4), num_classes=5, width=16, depth=3, mlp_dim=24, heads=4)
VARIANTS = {
    "token": {},
    "token after positions": {"positions": "learned-patches"},
    "token, sin-cos": {"positions": "sincos"},
    "gap": {"pool": "gap"},
    "gap, sin-cos, pre-logits": {"pool": "gap", "positions": "sincos", "pre_logits": 8},
    "map": {"pool": "map"},
    "no qkv bias": {"qkv_bias": False, "gelu": "erf"},
    "grey": {"channels": 1, "gelu": "quick"},
    "five channels": {"channels": 5, "patch_size": (3, 4)},
}


def count(name: str, **overrides: object) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_model(name, **overrides).parameters())


def randomised(model: ImageModel) -> ImageModel:
    """Fill every parameter, so that zero initialisation hides nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.mark.parametrize(
    ("name", "overrides", "published"),
    [
        ("vit-b16", {"num_classes": 0}, 85_798_656),
        ("vit-b16", {}, 86_567_656),
        ("vit-b16", {"num_classes": 100}, 85_875_556),
        ("vit-b16", {"num_classes": 21_843}, 102_595_923),
        ("vit-b16", {"num_classes": 21_843, "pre_logits": 768}, 103_186_515),
        ("vit-b16", {"image_size": 384}, 86_859_496),
        ("vit-b16", {"num_classes": 0, "positions": "learned-patches"}, 85_797_888),
        ("vit-b16-21kp", {}, 94_399_957),
        ("ViT-L/16", {"num_classes": 0}, 303_301_632),
        ("vit-l16", {}, 304_326_632),
        ("vit-l16", {"num_classes": 100}, 303_404_132),
        ("vit-l16", {"num_classes": 21_843}, 325_690_707),
        ("vit-l16", {"num_classes": 21_843, "pre_logits": 1024}, 326_740_307),
        ("vit-l16", {"image_size": 384}, 304_715_752),
        ("vit-l16", {"num_classes": 0, "positions": "learned-patches"}, 303_300_608),
        ("ViT-H/14", {"num_classes": 0}, 630_764_800),
        ("vit-h14", {}, 632_045_800),
        ("vit-h14", {"num_classes": 100}, 630_892_900),
        ("vit-h14", {"num_classes": 21_843}, 658_745_683),
        ("vit-h14", {"num_classes": 21_843, "pre_logits": 1280}, 660_385_363),
        ("vit-h14", {"image_size": 518}, 633_470_440),
        ("vit-h14", {"num_classes": 0, "positions": "learned-patches"}, 630_763_520),
        ("ViT-g/14", {"num_classes": 0, "pool": "gap"}, 1_011_199_616),
        ("vit-giant14", {"num_classes": 0}, 1_036_448_384),
        ("ViT-G/14", {"num_classes": 0, "pool": "gap"}, 1_842_772_352),
        ("vit-gigantic14", {"num_classes": 0}, 1_881_132_416),
        ("vit-gigantic14", {}, 1_882_797_416),
        ("vit-gigantic14", {"num_classes": 29_593}, 1_930_404_761),
        ("vit-gigantic14", {"num_classes": 0, "pool": "token", "positions": "learned"}, 1_842_775_680),
    ],
)
def test_parameters_are_as_many_as_published(name: str, overrides: dict, published: int) -> None:
    assert count(name, **overrides) == published


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised_after_a_build_on_meta(variant: str) -> None:
    with torch.device("meta"):
        model = build(replace(TINY, **VARIANTS[variant]))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    images = torch.randn(2, model.config.channels, 12, 12)
    assert torch.equal(model(images), torch.zeros(2, 5))  # a head of zeros


def test_initialisation_is_that_of_the_official_code() -> None:
    torch.manual_seed(0)
    model = build(ViTConfig(width=256, depth=1, heads=4, mlp_dim=1024, head_bias=-7.0, pre_logits=256))
    state = model.state_dict()
    assert state["head.bias"].eq(-7.0).all()
    assert not state["class_token"].any()
    deviations = {
        "positions": 0.02,
        "patch_embed.weight": (1 / 768) ** 0.5,  # LeCun
        "pre_logits.weight": (1 / 256) ** 0.5,
        "encoder.0.attention.qkv.weight": (2 / 512) ** 0.5,  # Xavier, each of the three for itself
        "encoder.0.attention.out.weight": (2 / 512) ** 0.5,
        "encoder.0.mlp.up.weight": (2 / 1280) ** 0.5,
        "encoder.0.mlp.down.weight": (2 / 1280) ** 0.5,
        "encoder.0.mlp.up.bias": 1e-6,
    }
    for name, deviation in deviations.items():
        assert abs(float(state[name].std()) / deviation - 1) < 0.08, name
    assert state["patch_embed.weight"].abs().max() < 2.3 * (1 / 768) ** 0.5  # truncated at two deviations
    patches = build(ViTConfig(width=256, depth=1, heads=4, mlp_dim=8, pool="gap")).state_dict()["positions"]
    assert abs(float(patches.std()) * 16 - 1) < 0.08


@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_of_any_size_and_shape_are_taken(variant: str) -> None:
    config = replace(TINY, **VARIANTS[variant])
    model = randomised(build(config)).eval()
    for height, width in ((12, 12), (12, 20), (24, 16), (13, 15), (4, 4)):
        logits = model(torch.randn(2, config.channels, height, width))
        assert logits.shape == (2, 5)
        assert torch.isfinite(logits).all()
    assert model.features(torch.randn(3, config.channels, 12, 12)).shape == (3, config.pre_logits or config.width)


def test_a_native_size_that_is_not_square_keeps_its_own_table() -> None:
    model = build(replace(TINY, image_size=(8, 20)))
    assert model.state_dict()["positions"].shape == (1, 2 * 5 + 1, 16)
    assert model(torch.randn(1, 3, 8, 20)).shape == (1, 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    config = replace(TINY, **VARIANTS[variant])
    model = randomised(build(config))
    F.cross_entropy(model(torch.randn(4, config.channels, 12, 12)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("qkv.bias"):  # a bias of the keys shifts all scores of a query alike: no gradient, in theory
            query, _, value = parameter.grad.chunk(3)
            assert query.any() and value.any(), name
        else:
            assert parameter.grad.any(), name


@torch.no_grad()
def test_attention_weights_give_what_the_fused_kernel_gives() -> None:
    torch.manual_seed(0)
    attention, x = Attention(24, 3), torch.randn(2, 7, 24)
    weights = attention.weights(x)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 7), atol=1e-6)
    value = attention.qkv(x)[..., 48:].reshape(2, 7, 3, 8).transpose(1, 2)
    assert torch.allclose(attention.out((weights @ value).transpose(1, 2).reshape(2, 7, 24)), attention(x), atol=1e-6)
    pool = AttentionPool(24, 3, 32, gelu="tanh", eps=1e-6)
    pool.init_weights()
    weights = pool.weights(x)
    value = pool.key_value(x)[..., 24:].reshape(2, 7, 3, 8).transpose(1, 2)
    pooled = pool.out((weights @ value).transpose(1, 2).reshape(2, 1, 24))
    assert torch.allclose((pooled + pool.mlp(pool.norm(pooled)))[:, 0], pool(x), atol=1e-6)


def test_drop_path_keeps_the_expectation_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    layer, x = DropPath(0.3), torch.ones(20_000, 2, 3)
    y = layer(x)
    assert abs(float(y.mean()) - 1) < 0.02
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(DropPath(0.0)(x), x)


def test_drop_path_grows_linearly_with_depth() -> None:
    model = build(replace(TINY, drop_path=0.2, depth=5))
    assert isinstance(model, ViT)
    assert [block.drop_path.rate for block in model.encoder] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])  # pyright: ignore
    assert [block.drop_path.rate for block in build(replace(TINY, drop_path=0.2, depth=1)).blocks()] == [0]  # pyright: ignore


def test_dropout_acts_in_training_only() -> None:
    model, images = randomised(build(replace(TINY, dropout=0.5))), torch.randn(2, 3, 12, 12)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@torch.no_grad()
def test_pooling_takes_what_its_name_says() -> None:
    images = torch.randn(2, 3, 12, 12)
    for pool, expected in {
        "token": lambda tokens: tokens[:, 0],
        "gap": lambda tokens: tokens.mean(1),
    }.items():
        model = randomised(build(replace(TINY, pool=pool))).eval()
        assert isinstance(model, ViT)
        tokens = model.tokens(images)
        assert tokens.shape[1] == (10 if pool == "token" else 9)
        assert torch.equal(model.features(images), expected(tokens))
    model = randomised(build(replace(TINY, pre_logits=8, num_classes=0))).eval()
    assert torch.equal(model(images), model.features(images))
    assert model(images).abs().max() <= 1  # tanh


@pytest.mark.parametrize("new", [(9, 9), (3, 3), (7, 4), (2, 11), (1, 1)])
def test_positions_are_resized_as_the_official_code_does(new: tuple[int, int]) -> None:
    torch.manual_seed(0)
    table = torch.randn(1, 30, 8)
    resized = resize_positions(table, (5, 6), new)
    official = scipy.ndimage.zoom(table.numpy().reshape(5, 6, 8), (new[0] / 5, new[1] / 6, 1), order=1)
    assert torch.allclose(resized, torch.from_numpy(official).reshape(1, -1, 8), atol=4e-6)
    assert resize_positions(table, (5, 6), (5, 6)) is table


def test_sincos_positions_are_those_of_the_formula() -> None:
    table = sincos_positions(3, 5, 16)[0].reshape(3, 5, 16)
    for y, x, i in ((0, 0, 0), (2, 4, 3), (1, 3, 2), (2, 0, 1)):
        frequency = torch.tensor(10_000.0 ** -(i / 3), dtype=torch.float64)
        expected = torch.stack(
            [(x * frequency).sin(), (x * frequency).cos(), (y * frequency).sin(), (y * frequency).cos()]
        )
        assert torch.allclose(table[y, x, i::4].double(), expected, atol=1e-6)


def test_depth_of_a_parameter_runs_from_input_to_head() -> None:
    model = build(replace(TINY, pool="map", pre_logits=8))
    depths = {name.split(".")[0]: model.depth_of(name) for name in model.state_dict()}
    assert depths == {
        "positions": 0,
        "patch_embed": 0,
        "encoder": 3,
        "norm": 4,
        "attention_pool": 4,
        "pre_logits": 4,
        "head": 4,
    }
    assert [model.depth_of(f"encoder.{i}.norm1.weight") for i in range(3)] == [1, 2, 3]
    assert len(model.blocks()) == 3
