"""EfficientNet has its published sizes and does what the official code does."""

from dataclasses import replace

import efficientnet_answers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from vitrail.config.codec import from_json, to_json
from vitrail.config.efficientnet import EFFICIENTNETS, EfficientNetConfig, efficientnet_config, round_width
from vitrail.errors import UserError
from vitrail.layers.conv import SameConv2d, SqueezeExcite
from vitrail.models import build
from vitrail.models.efficientnet import EfficientNet

TINY = replace(efficientnet_config(0.1, 0.6), num_classes=5)
VARIANTS = {
    "plain": {},
    "lite": {"lite": True, "stem_width": 32},
    "grey": {"channels": 1},
    "deep": {"depths": (2, 1, 3, 1, 2, 1, 2)},
    "narrow": {"stem_width": 3, "widths": (2, 5, 7, 7, 9, 3, 4), "head_width": 6},
}


@torch.no_grad()
def randomised(model: nn.Module) -> EfficientNet:
    """Fill every parameter and statistic, so that nothing is silent or alike."""
    assert isinstance(model, EfficientNet)
    arrays, _ = efficientnet_answers.fill({name: list(t.shape) for name, t in model.state_dict().items()}, [1])
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval()


def tiny(**changes: object) -> EfficientNet:
    return randomised(build(replace(TINY, **changes)))  # pyright: ignore[reportArgumentType]


# Sizes


@pytest.mark.parametrize(
    ("config", "published"),
    [
        *[
            (EFFICIENTNETS[f"efficientnet-{size}"], count)
            for size, count in {
                "b0": 5_288_548,
                "b1": 7_794_184,
                "b2": 9_109_994,
                "b3": 12_233_232,
                "b4": 19_341_616,
                "b5": 30_389_784,
                "b6": 43_040_704,
                "b7": 66_347_960,
                "b8": 87_413_142,
                "l2": 480_309_308,
                "lite0": 4_652_008,
                "lite1": 5_416_680,
                "lite2": 6_092_072,
                "lite3": 8_197_096,
                "lite4": 13_006_568,
            }.items()
        ],
        (replace(EFFICIENTNETS["efficientnet-l2"], num_classes=100), 475_354_808),
        (efficientnet_config(5.0, 2.6), 316_649_180),  # the released B6-Wide of Meta Pseudo Labels
    ],
)
def test_parameters_are_as_many_as_published(config: EfficientNetConfig, published: int) -> None:
    with torch.device("meta"):
        model = build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_l2_has_the_stages_of_the_paper() -> None:
    large = EFFICIENTNETS["efficientnet-l2"]
    assert large.stem_width == 136
    assert large.widths == (72, 104, 176, 344, 480, 824, 1376)
    assert large.depths == (6, 11, 11, 16, 16, 22, 6)
    assert large.head_width == 5504
    with torch.device("meta"):
        assert len(build(large).blocks()) == 88


def test_a_width_is_never_rounded_down_by_more_than_a_tenth() -> None:
    assert [round_width(32, factor) for factor in (0.1, 1.0, 1.2, 4.3)] == [8, 32, 40, 136]
    assert round_width(112, 0.1) == 16  # 8 would be 29 % less than 11.2


@pytest.mark.parametrize("config", EFFICIENTNETS.values(), ids=EFFICIENTNETS)
def test_a_configuration_survives_json(config: EfficientNetConfig) -> None:
    assert from_json(EfficientNetConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8, 8)}, r"widths must hold 7 numbers, one per stage, not \(8, 8\)"),
        ({"depths": (1,) * 8}, "depths must hold 7 numbers"),
        ({"depths": (1, 1, 0, 1, 1, 1, 1)}, "depths must be at least 1"),
        ({"drop_path": 1.0}, "drop_path must lie in"),
        ({"image_size": (0, 5)}, "image_size must be two positive numbers"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


# The network


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_and_statistic_is_initialised_after_a_build_on_meta(variant: str) -> None:
    with torch.device("meta"):
        model = build(replace(TINY, **VARIANTS[variant]))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        if name.endswith(("running_mean", "num_batches_tracked", "norm.bias")):
            assert not tensor.any(), name
        elif name.endswith(("running_var", "norm.weight")):
            assert tensor.eq(1).all(), name


def test_initialisation_is_that_of_the_official_code() -> None:
    torch.manual_seed(0)
    model = build(replace(EFFICIENTNETS["efficientnet-b0"], num_classes=400, head_bias=-7.0))
    state = model.state_dict()
    deviations = {
        "stem.conv.weight": (2 / (9 * 32)) ** 0.5,
        "stages.6.0.expand.conv.weight": (2 / 1152) ** 0.5,
        "stages.5.1.depthwise.conv.weight": (2 / 25) ** 0.5,
        "stages.5.1.project.conv.weight": (2 / 192) ** 0.5,
        "stages.5.1.squeeze.reduce.weight": (2 / 48) ** 0.5,
        "stages.5.1.squeeze.expand.weight": (2 / 1152) ** 0.5,
        "last.conv.weight": (2 / 1280) ** 0.5,
        "head.weight": 400**-0.5 / 3**0.5,
    }
    for name, deviation in deviations.items():
        assert abs(float(state[name].std()) / deviation - 1) < 0.08, name
    assert state["head.weight"].abs().max() <= 400**-0.5
    assert state["head.bias"].eq(-7.0).all()
    assert not state["stages.5.1.squeeze.reduce.bias"].any()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_of_any_size_and_shape_are_taken(variant: str) -> None:
    model = tiny(**VARIANTS[variant])
    for height, width in ((32, 32), (65, 33), (1, 1), (7, 200)):
        images = torch.randn(2, model.config.channels, height, width)
        logits = model(images)
        assert logits.shape == (2, 5)
        assert torch.isfinite(logits).all()
    features, places = model.features(images), model.feature_map(images)
    assert places.shape == (2, model.config.head_width, 1, 7)  # a 32nd of each side, rounded up
    assert torch.equal(features, places.mean(dim=(2, 3)))


@given(side=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=st.integers(1, 5), stride=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_same_padding_is_tensorflows(side: tuple[int, int], kernel: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 1, *side, generator=generator)
    layer = SameConv2d(1, 1, kernel, stride=stride, bias=False).requires_grad_(False)
    result = layer(images)
    rows, columns = (-(-length // stride) for length in side)
    assert result.shape == (1, 1, rows, columns)
    # Where the kernel begins: half of what is missing, rounded down, lies before the picture.
    top, left = (max((n - 1) * stride + kernel - m, 0) // 2 for n, m in zip((rows, columns), side, strict=True))
    for row in range(rows):
        for column in range(columns):
            expected = sum(
                float(layer.weight[0, 0, i, j] * images[0, 0, y, x])
                for i in range(kernel)
                for j in range(kernel)
                if 0 <= (y := row * stride + i - top) < side[0] and 0 <= (x := column * stride + j - left) < side[1]
            )
            assert abs(float(result[0, 0, row, column]) - expected) < 1e-5


@torch.no_grad()
def test_squeeze_and_excitation_weighs_channels_by_their_means() -> None:
    layer, x = SqueezeExcite(6, 2, nn.SiLU()), torch.randn(3, 6, 4, 5)
    inner = F.silu(x.mean(dim=(2, 3)) @ layer.reduce.weight[:, :, 0, 0].mT + layer.reduce.bias)
    weights = torch.sigmoid(inner @ layer.expand.weight[:, :, 0, 0].mT + layer.expand.bias)
    assert torch.allclose(layer(x), x * weights[:, :, None, None], atol=1e-6)


@torch.no_grad()
def test_a_picture_in_channels_last_order_gets_the_same_answer() -> None:
    model, images = tiny(), torch.randn(2, 3, 47, 65)
    logits = model(images)
    model.to(memory_format=torch.channels_last)
    assert torch.allclose(model(images.to(memory_format=torch.channels_last)), logits, atol=1e-4 * logits.abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    model = tiny(**VARIANTS[variant], frozen_norm=True, dropout=0.0, drop_path=0.0).train()
    F.cross_entropy(model(torch.randn(4, model.config.channels, 64, 64)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_block_has_a_shortcut_only_where_it_changes_neither_size_nor_width() -> None:
    model = build(replace(TINY, widths=(8, 8, 16, 16, 16, 24, 24), stem_width=8, depths=(2, 1, 1, 2, 1, 1, 1)))
    assert isinstance(model, EfficientNet)
    assert [block.shortcut for block in model.blocks()] == [True, True, False, False, False, True, True, False, True]
    block = model.blocks()[1].eval()
    nn.init.zeros_(block.project.norm.weight)  # the branch says nothing
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(block(x), x)


def test_drop_path_grows_with_the_number_of_a_block_and_ends_before_the_rate() -> None:
    model = build(replace(TINY, depths=(1, 1, 2, 1, 1, 1, 1), drop_path=0.4))
    assert isinstance(model, EfficientNet)
    assert [block.drop_path.rate for block in model.blocks()] == pytest.approx([0.05 * i for i in range(8)])


def test_dropout_acts_on_the_features_and_in_training_only() -> None:
    model, images = tiny(dropout=0.5, drop_path=0.0, frozen_norm=True), torch.randn(2, 3, 40, 40)
    model.train()
    assert torch.equal(model.features(images), model.features(images))
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}


def test_running_statistics_move_by_a_hundredth_per_batch() -> None:
    model = build(replace(TINY, drop_path=0.0))
    assert isinstance(model, EfficientNet)
    images = torch.randn(4, 3, 16, 16)
    model.train()(images)
    batch = model.stem.conv(images)
    assert torch.allclose(model.stem.norm.running_mean, 0.01 * batch.mean(dim=(0, 2, 3)), atol=1e-6)
    assert {layer.eps for layer in norms(model).values()} == {1e-3}


def test_frozen_statistics_are_used_and_kept_in_training_while_scales_learn() -> None:
    fresh = build(replace(TINY, frozen_norm=True))
    assert fresh.training and not any(layer.training for layer in norms(fresh).values())
    model, images = tiny(frozen_norm=True, dropout=0.0, drop_path=0.0), torch.randn(2, 3, 40, 40)
    logits, before = model(images), {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.train()
    assert model.training and model.dropout.training
    again = model(images)
    assert torch.equal(again, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    again.sum().backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.any() for layer in norms(model).values())
    assert not torch.allclose(tiny(dropout=0.0, drop_path=0.0).train()(images), logits, rtol=1e-2)


def test_depth_of_a_parameter_runs_from_input_to_head() -> None:
    model = build(replace(TINY, depths=(1, 2, 1, 3, 1, 1, 1)))
    depths = [model.depth_of(name) for name in model.state_dict()]
    assert depths == sorted(depths)
    assert model.depth_of("stem.norm.weight") == 0
    assert model.depth_of("stages.0.0.project.conv.weight") == 1
    assert model.depth_of("stages.3.2.depthwise.conv.weight") == 7
    assert model.depth_of("last.conv.weight") == model.depth_of("head.bias") == len(model.blocks()) + 1 == 11
    assert EfficientNet.input_kernel in model.state_dict()


@torch.no_grad()
def test_without_classes_the_answer_is_the_features() -> None:
    model, images = tiny(num_classes=0), torch.randn(2, 3, 20, 20)
    assert torch.equal(model(images), model.features(images))
    assert model.with_classes(7) == replace(model.config, num_classes=7)
    with pytest.raises(UserError, match="EfficientNet has no attention"):
        next(iter(model.attention(images)))
