"""Hybrids have their published sizes, read the official weights, and do all that a Vision Transformer does."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vitrail import npz
from vitrail.checkpoints import adapt, export_names, load_model, save_model
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.vit_names import VIT, VIT_PUBLISHED
from vitrail.config.codec import from_json, to_json
from vitrail.config.model import list_models, model_config
from vitrail.config.vit import ResNetStem, ViTConfig
from vitrail.errors import UserError
from vitrail.layers.resnet import Bottleneck, ResNet, StdConv2d
from vitrail.models import ImageModel, ViT, build, create_model

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = ("hybrid_stem_only", "hybrid_r")
TINY = ViTConfig(
    image_size=(32, 56), patch_size=(1, 1), stem=ResNetStem(blocks=(2, 1), width=32), num_classes=5, width=16, depth=2,
    mlp_dim=24, heads=4,
)  # fmt: skip
VARIANTS = {
    "stages": {},
    "root alone": {"stem": ResNetStem(width=32), "patch_size": (4, 2)},
    "gap": {"pool": "gap"},
    "map, grey": {"pool": "map", "channels": 1},
    "sin-cos, pre-logits": {"positions": "sincos", "pre_logits": 8},
}


def weights(name: str) -> Path:
    return GOLDEN / f"{name}.weights.npz"


def read_npz(path: Path) -> dict[str, np.ndarray]:
    return npz.read_npz(path, limit=10**8, advice="it is not read.")


def randomised(model: ImageModel) -> ImageModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith("norm.weight") else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def answers(name: str) -> tuple[Tensor, Tensor]:
    stored = read_npz(GOLDEN / f"{name}.io.npz")
    return torch.from_numpy(stored["images_nhwc"]).permute(0, 3, 1, 2), torch.from_numpy(stored["logits"])


@torch.no_grad()
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_give_the_official_answer_with_no_name_given(name: str) -> None:
    images, logits = answers(name)
    model = load_model(weights(name))
    assert float((model(images) - logits).abs().max()) <= 1e-5 * float(logits.abs().max())
    assert model.preprocessing.fit == "squash"


def test_the_stem_is_read_off_the_arrays() -> None:
    alone = ViTConfig(
        image_size=(64, 64), patch_size=(4, 4), stem=ResNetStem(blocks=(), width=32), num_classes=10, width=32, depth=2,
        mlp_dim=64, heads=4,
    )  # fmt: skip
    assert load_model(weights("hybrid_stem_only")).config == alone
    stages = replace(alone, patch_size=(1, 1), stem=ResNetStem(blocks=(1, 1, 1), width=32))
    assert load_model(weights("hybrid_r")).config == stages


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_arrays_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    export_names(load_model(weights(name)), tmp_path / "back.npz")
    ours, theirs = read_npz(tmp_path / "back.npz"), read_npz(weights(name))
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].shape == array.shape
        assert ours[key].tobytes() == array.tobytes(), key


@settings(max_examples=15, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 3), max_size=4).map(tuple),
    patch=st.integers(1, 3),
    grid=st.integers(1, 3),
    channels=st.integers(1, 4),
    pool=st.sampled_from(["token", "gap"]),
    published=st.booleans(),
)
def test_our_weights_there_and_back_are_the_same_bits(
    blocks: tuple[int, ...], patch: int, grid: int, channels: int, pool: str, published: bool
) -> None:
    stem = ResNetStem(blocks=blocks, width=32)
    side = stem.stride * patch * grid
    config = replace(
        TINY, stem=stem, patch_size=(patch, patch), image_size=(side, side), channels=channels, pool=pool, depth=1
    )
    model = randomised(build(config))
    table = VIT_PUBLISHED if published else VIT
    arrays = table.from_ours(model)
    found, state = table.to_ours(arrays)
    assert found == config
    assert table.claims(arrays)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_norms_of_the_oldest_files_are_read() -> None:
    arrays = read_npz(weights("hybrid_r"))
    _, expected = VIT.to_ours(arrays)
    norms = {name: array for name, array in arrays.items() if "/gn" in name or name.startswith("gn_")}
    assert len(norms) == 26
    _, state = VIT.to_ours(arrays | {name: array[None, None, None] for name, array in norms.items()})
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_missing_or_misshapen_part_of_the_stem_is_named() -> None:
    arrays = read_npz(weights("hybrid_r"))
    lacking = {name: array for name, array in arrays.items() if name != "block2/unit1/conv3/kernel"}
    with pytest.raises(UserError, match=r"a\.npz lacks the array 'block2/unit1/conv3/kernel'"):
        VIT.to_ours(lacking, source="a.npz")
    with pytest.raises(UserError, match="no place for: block3/unit1/conv4/kernel"):
        VIT.to_ours(arrays | {"block3/unit1/conv4/kernel": arrays["block3/unit1/conv1/kernel"]})
    with pytest.raises(UserError, match="multiple of the 32 groups"):
        VIT.to_ours(arrays | {"conv_root/kernel": np.zeros((7, 7, 3, 48), np.float32)})
    for name in arrays:
        for wrong in (np.zeros((5, *arrays[name].shape), np.float32), np.ones((), np.float32)):
            with pytest.raises(UserError):
                config, state = VIT.to_ours(arrays | {name: wrong})
                assemble(config, state, "a.npz")


def test_big_vision_has_no_hybrids() -> None:
    with pytest.raises(UserError, match="'big-vision' have no place for a ResNet stem; use names='vit'"):
        export_names(build(TINY), "x.npz", "big-vision")


@pytest.mark.parametrize(
    ("name", "classes", "published"),
    [
        ("vit-r26-s32", 10, 36_050_762),  # counted in the official code
        ("vit-r-ti16", 10, 6_146_634),
        ("vit-r26-s32", 1000, 36_431_912),
        ("vit-r-ti16", 1000, 6_337_704),
        ("vit-r26-b32", 1000, 101_383_976),  # as many as timm's of the same name have
        ("vit-r50-b16", 1000, 98_659_112),
        ("vit-r50-l32", 1000, 328_994_856),
    ],
)
def test_parameters_are_as_many_as_published(name: str, classes: int, published: int) -> None:
    assert name in list_models()
    with torch.device("meta"):
        model = create_model(name, num_classes=classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_published_hybrids_have_their_grids() -> None:
    grids = {name: model_config(name).grid for name in ("vit-r-ti16", "vit-r26-s32", "vit-r50-b16", "vit-r50-l32")}
    assert grids == {"vit-r-ti16": (7, 7), "vit-r26-s32": (7, 7), "vit-r50-b16": (14, 14), "vit-r50-l32": (7, 7)}
    assert model_config("vit-r-ti16").cell == (32, 32)
    assert model_config("vit-r50-b16", image_size=384).grid == (24, 24)


@cache
def stem_of(blocks: tuple[int, ...]) -> ResNet:
    with torch.device("meta"):
        return ResNet(3, 32, blocks)


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.just(1), max_size=4).map(tuple),
    patch=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(5, 140), st.integers(5, 140)),
)
def test_the_grid_is_that_of_the_features(
    blocks: tuple[int, ...], patch: tuple[int, int], size: tuple[int, int]
) -> None:
    stem = ResNetStem(blocks=blocks, width=32)
    features = stem_of(blocks)(torch.empty(1, 3, *size, device="meta"))
    assert features.shape[1] == stem.channels
    config = replace(TINY, stem=stem, patch_size=patch, image_size=(256, 256))
    assert config.grid_at(size) == (features.shape[2] // patch[0], features.shape[3] // patch[1])


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_of_any_size_and_shape_are_taken(variant: str) -> None:
    config = replace(TINY, **VARIANTS[variant])
    model = randomised(build(config))
    for height, width in ((32, 56), (31, 17), (16, 64), (13, 45)):
        images = torch.randn(2, config.channels, height, width)
        assert torch.isfinite(model(images)).all()
        assert model.features(images).shape == (2, config.pre_logits or config.width)
        rows, columns = config.grid_at((height, width))
        assert model.feature_map(images).shape == (2, config.width, rows, columns)
        tokens = rows * columns + (config.pool == "token")
        assert [maps.shape for maps in model.attention(images)] == [(2, config.heads, tokens, tokens)] * config.depth


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised_after_a_build_on_meta_and_gets_a_gradient(variant: str) -> None:
    with torch.device("meta"):
        model = build(replace(TINY, **VARIANTS[variant]))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan"))
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    randomised(model)
    F.cross_entropy(model(torch.randn(4, model.config.channels, 32, 56)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_bottleneck_begins_as_the_identity() -> None:
    stem = ResNet(3, 32, (2,))
    stem.init_weights()
    first, second = stem.stages[0]  # pyright: ignore[reportGeneralTypeIssues]
    assert isinstance(first, Bottleneck) and first.conv_proj is not None
    assert isinstance(second, Bottleneck) and second.conv_proj is None
    x = torch.randn(1, 128, 5, 5).relu()
    assert torch.equal(second(x), x)
    kernel = first.conv2.weight
    assert abs(float(kernel.detach().std()) * (9 * 32) ** 0.5 - 1) < 0.05  # LeCun
    assert first.norm1.weight.eq(1.0).all() and not first.norm3.weight.any() and not first.norm3.bias.any()


def test_filters_are_standardised_whatever_their_scale() -> None:
    conv = StdConv2d(3, 8, 7, stride=2)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape) * torch.logspace(-1, 3, 8)[:, None, None, None] + 5.0)
    filters = conv.standardised().flatten(1)
    assert torch.allclose(filters.mean(1), torch.zeros(8), atol=1e-4)
    assert torch.allclose(filters.std(1, correction=0), torch.ones(8), atol=1e-3)
    # Epsilon belongs to the deviation: a filter of deviation 1e-5 is brought to one half.
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1e-5, 1e-5]).repeat(8 * 3 * 49 // 2 + 1)[: 8 * 3 * 49].reshape(8, 3, 7, 7))
    assert torch.allclose(conv.standardised().abs(), torch.full_like(conv.weight, 0.5), atol=0.01)


@torch.no_grad()
def test_an_odd_pixel_of_padding_goes_to_the_bottom_and_the_right() -> None:
    conv = StdConv2d(1, 1, 3, stride=2)
    x = torch.randn(1, 1, 6, 7)
    padded = F.pad(x, (1, 1, 0, 1))  # TensorFlow SAME: 6 rows need one more, 7 columns need two
    assert torch.allclose(conv(x), F.conv2d(padded, conv.standardised(), stride=2), atol=1e-6)


@torch.no_grad()
def test_another_picture_size_resizes_positions_at_load() -> None:
    images = torch.randn(2, 3, 96, 80)
    model, resized = load_model(weights("hybrid_r")), load_model(weights("hybrid_r"), image_size=(96, 80))
    assert resized.state_dict()["positions"].shape == (1, 6 * 5 + 1, 32)
    assert torch.allclose(resized(images), model(images), atol=1e-6)
    timm = load_model(weights("hybrid_r"), image_size=(96, 80), position_resize="timm")
    assert not torch.allclose(timm(images), model(images), atol=1e-3)


def test_a_not_square_table_needs_to_be_told_its_picture_size(tmp_path: Path) -> None:
    model = randomised(build(TINY))
    export_names(model, tmp_path / "wide.npz")
    with pytest.raises(UserError, match=r"\(1, 29, 16\).*image_size="):
        load_model(tmp_path / "wide.npz", image_size=(32, 32))
    back = load_model(tmp_path / "wide.npz", image_size=(30, 50))  # sides are rounded up: the same grid
    assert back.config == replace(TINY, image_size=(30, 50))


@torch.no_grad()
def test_grey_weights_take_coloured_pictures() -> None:
    grey = torch.randn(2, 1, 32, 56)
    model = randomised(build(replace(TINY, channels=1)))
    expected = model(grey)
    assert torch.allclose(adapt(model, channels=3)(grey.expand(-1, 3, -1, -1)), expected, atol=1e-4)


def test_a_model_folder_keeps_the_stem(tmp_path: Path) -> None:
    model = randomised(build(TINY))
    save_model(model, tmp_path / "folder")
    back = load_model(tmp_path / "folder")
    assert back.config == TINY
    images = torch.randn(1, 3, 32, 56)
    assert torch.equal(back(images), model(images))
    assert from_json(ViTConfig, to_json(TINY)) == TINY
    assert load_model(tmp_path / "folder", num_classes=7)(images).shape == (1, 7)


def test_impossible_stems_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of the 32 groups of its norms, not 40"):
        ResNetStem(width=40)
    with pytest.raises(UserError, match="blocks must be at least 1"):
        ResNetStem(blocks=(2, 0))
    with pytest.raises(UserError, match=r"smaller than one patch, \(32, 16\) pixels"):
        replace(TINY, stem=ResNetStem(blocks=(), width=32), patch_size=(8, 4), image_size=(16, 16))


def test_the_stem_counts_as_the_embedding() -> None:
    model = build(TINY)
    assert isinstance(model, ViT)
    assert model.depth_of("stem.stages.0.1.conv1.weight") == model.depth_of("patch_embed.weight") == 0
    assert model.state_dict()[model.input_kernel].shape == (32, 3, 7, 7)
    assert len(model.blocks()) == TINY.depth
