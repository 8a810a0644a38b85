"""timm's and transformers' Vision Transformers agree with ours: random weights, random sizes, both directions."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.layers import HybridEmbed, StdConv2dSame
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from transformers import ViTConfig as HuggingFaceConfig
from transformers import ViTForImageClassification, ViTModel

from peers.support import Module, assert_close, randomise
from vitrail.checkpoints import adapt, export_names, load_model
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.hf_vit import HF_VIT
from vitrail.checkpoints.names import Hints, NameTable
from vitrail.checkpoints.timm_vit import TIMM_VIT, timm_rows
from vitrail.config.vit import VITS, ResNetStem, ViTConfig
from vitrail.layers.resnet import StdConv2d
from vitrail.models import ImageModel, build

KINDS = {
    ("token", "learned"): {},
    ("token", "learned-patches"): {"no_embed_class": True},
    ("gap", "learned-patches"): {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ("map", "learned-patches"): {"class_token": False, "global_pool": "map"},
}
TINY = ViTConfig(
    image_size=(24, 24), patch_size=(4, 4), num_classes=5, width=32, depth=2, mlp_dim=64, heads=4, gelu="erf"
)


@st.composite
def sizes(draw: st.DrawFn) -> ViTConfig:
    """Configurations that arrays can tell apart: square pictures, and all that may vary."""
    heads, patch, grid = draw(st.integers(1, 4)), draw(st.integers(2, 5)), draw(st.integers(1, 4))
    return ViTConfig(
        image_size=(grid * patch, grid * patch),
        patch_size=(patch, patch),
        channels=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(0, 7)),
        width=heads * draw(st.sampled_from([4, 8, 12])),
        depth=draw(st.integers(1, 3)),
        mlp_dim=draw(st.integers(3, 40)),
        heads=heads,
        qkv_bias=draw(st.booleans()),
        gelu="erf",
    )


def timm_model(config: ViTConfig, **options: object) -> VisionTransformer:
    """Return timm's model of a configuration, with random weights."""
    if config.stem is not None:
        options["embed_layer"] = partial(HybridEmbed, backbone=timm_stem(config.stem, config.channels))
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.channels,
        num_classes=config.num_classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=(config.mlp_dim + 0.5) / config.width,  # which timm rounds down
        qkv_bias=config.qkv_bias,
        act_layer="gelu" if config.gelu == "erf" else "gelu_tanh",
        **KINDS[config.pool, config.positions],
        **options,
    )
    return without_epsilons(randomise(model))


@torch.no_grad()
def without_epsilons(model: Module) -> Module:
    """Make a stem's epsilons count for nothing: timm's are not the official ones, which our golden files show.

    Larger filters change nothing else, since they are standardised.
    """
    for part in model.modules():
        if isinstance(part, StdConv2d | StdConv2dSame):
            part.weight.mul_(1000.0)
        elif isinstance(part, nn.GroupNorm):
            part.eps = 1e-6
    return model


def timm_stem(stem: ResNetStem, channels: int) -> nn.Module:
    """Return the backbone as timm's `vision_transformer_hybrid._resnetv2` builds it, at another width too."""
    options = {"stem_type": "same", "preact": False, "conv_layer": partial(StdConv2dSame, eps=1e-8)}
    if not stem.blocks:
        return create_resnetv2_stem(channels, stem.width, **options)
    factor = stem.width / 64
    return ResNetV2(stem.blocks, num_classes=0, global_pool="", in_chans=channels, width_factor=factor, **options)


def arrays_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert ours[name].shape == array.shape, name
        assert ours[name].tobytes() == array.tobytes(), name


def ours_from(table: NameTable, arrays: dict[str, np.ndarray], config: ViTConfig) -> ImageModel:
    """Return our model of a peer's arrays, which tell all of `config` but the heads."""
    assert table.claims(arrays)
    found, state = table.to_ours(arrays, hints=Hints(heads=config.heads))
    assert replace(found, gelu=config.gelu) == config
    return assemble(replace(found, gelu=config.gelu), state, "the peer")


def random_ours(config: ViTConfig) -> ImageModel:
    return without_epsilons(randomise(build(config), seed=1))


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(config=sizes(), kind=st.sampled_from(list(KINDS)))
def test_timm_agrees_both_ways(config: ViTConfig, kind: tuple) -> None:
    config = replace(config, pool=kind[0], positions=kind[1])
    images = torch.randn(2, config.channels, *config.image_size)
    theirs = timm_model(config)
    ours = ours_from(TIMM_VIT, arrays_of(theirs), config)
    assert_close(ours(images), theirs(images))
    assert_same_bits(TIMM_VIT.from_ours(ours), arrays_of(theirs))
    ours = random_ours(config)
    theirs.load_state_dict(tensors(TIMM_VIT.from_ours(ours)))
    assert_close(ours(images), theirs(images))


@torch.no_grad()
@settings(max_examples=8, deadline=None)
@given(
    blocks=st.lists(st.integers(1, 2), max_size=3).map(tuple),
    grid=st.integers(2, 3),
    channels=st.integers(1, 4),
    width=st.sampled_from([32, 64]),
    gelu=st.sampled_from(["tanh", "erf"]),
    extra=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_timm_hybrids_agree_both_ways(blocks, grid, channels, width, gelu, extra) -> None:
    stem = ResNetStem(blocks=blocks, width=width)
    patch = 1 if blocks else 3
    side = stem.stride * patch * grid
    config = replace(
        TINY, stem=stem, patch_size=(patch, patch), image_size=(side, side), channels=channels, gelu=gelu, norm_eps=1e-6
    )
    theirs = timm_model(config)
    ours = ours_from(TIMM_VIT, arrays_of(theirs), config)
    images = torch.randn(2, channels, side, side)
    assert_close(ours(images), theirs(images))
    assert_same_bits(TIMM_VIT.from_ours(ours), arrays_of(theirs))
    # The stem alone, on a picture of any other size
    images = torch.randn(2, channels, side + extra[0], side + extra[1])
    assert_close(ours.patch_embed(ours.stem(images)), theirs.patch_embed.proj(theirs.patch_embed.backbone(images)))
    ours = random_ours(config)
    theirs.load_state_dict(tensors(TIMM_VIT.from_ours(ours)))
    images = torch.randn(2, channels, side, side)
    assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vit-ti16", "vit_tiny_patch16_224"),
        ("vit-s32", "vit_small_patch32_224"),
        ("vit-b8", "vit_base_patch8_224"),
        ("vit-l16", "vit_large_patch16_224"),
        ("vit-h14", "vit_huge_patch14_224"),
        ("vit-b16-21kp", "vit_base_patch16_224_miil"),
        ("vit-r-ti16", "vit_tiny_r_s16_p8_224"),
        ("vit-r26-s32", "vit_small_r26_s32_224"),
        ("vit-r26-b32", "vit_base_r26_s32_224"),
        ("vit-r50-b16", "vit_base_r50_s16_224"),
        ("vit-r50-l32", "vit_large_r50_s32_224"),
    ],
)
def test_every_published_size_has_the_arrays_of_timms(name: str, theirs: str) -> None:
    config = VITS[name]
    with torch.device("meta"):
        peer = timm.create_model(theirs, num_classes=config.num_classes).state_dict()
        state = build(config).state_dict()
    found = {row.theirs[0]: state[row.ours].shape for row in timm_rows(config)}
    assert found == {key: tensor.shape for key, tensor in peer.items()}
    assert sum(shape.numel() for shape in found.values()) == sum(tensor.numel() for tensor in state.values())


@torch.no_grad()
@settings(max_examples=6, deadline=None)
@given(size=st.tuples(st.integers(4, 40), st.integers(8, 40)), kind=st.sampled_from(list(KINDS)))
def test_positions_are_resized_as_timm_resizes_its_own(size: tuple[int, int], kind: tuple) -> None:
    # Two columns at least: torch's antialiased kernel is wrong about one, in the memory order that timm gives it.
    # Nor does timm resize a table that has as many rows as it wants, whatever their grid.
    assume((size[0] // 4) * (size[1] // 4) != TINY.grid[0] * TINY.grid[1] or (size[0] // 4, size[1] // 4) == TINY.grid)
    config = replace(TINY, pool=kind[0], positions=kind[1])
    small = timm_model(config)
    large = timm_model(replace(config, image_size=size))
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    ours = adapt(ours_from(TIMM_VIT, arrays_of(small), config), image_size=size, position_resize="timm")
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), large(images))


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, gelu="tanh"),
        replace(TINY, stem=ResNetStem(width=64), image_size=(32, 32)),
        replace(TINY, stem=ResNetStem(blocks=(1, 2), width=64), patch_size=(1, 1)),
    ],
)
def test_timm_reads_our_official_names_and_resizes_positions_its_own_way(config: ViTConfig, tmp_path: Path) -> None:
    model, path = random_ours(config), tmp_path / "official.npz"
    export_names(model, path, "vit-published")
    for size in (config.image_size, (48, 64)):
        theirs = timm_model(replace(config, image_size=size))
        theirs.load_pretrained(str(path))
        again = load_model(path, gelu=config.gelu, image_size=size, position_resize="timm-npz")
        images = torch.randn(2, 3, *size)
        assert_close(again(images), theirs(images))


def huggingface(config: ViTConfig, kind: type[nn.Module], **options: object) -> nn.Module:
    settings = HuggingFaceConfig(
        image_size=config.image_size[0],
        patch_size=config.patch_size[0],
        num_channels=config.channels,
        num_labels=config.num_classes,
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        intermediate_size=config.mlp_dim,
        num_attention_heads=config.heads,
        qkv_bias=config.qkv_bias,
    )
    return randomise(kind(settings, **options))


@torch.no_grad()
@settings(max_examples=10, deadline=None)
@given(config=sizes())
def test_hugging_faces_classifier_agrees_both_ways(config: ViTConfig, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("hf")
    config = replace(config, norm_eps=1e-12, num_classes=config.num_classes + 2)
    theirs = huggingface(config, ViTForImageClassification)
    images = torch.randn(2, config.channels, *config.image_size)
    ours = ours_from(HF_VIT, arrays_of(theirs), config)
    assert_close(ours(images), theirs(images).logits)
    # The file, whose names are not those of the modules
    theirs.save_pretrained(folder)
    stored = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    again = ours_from(HF_VIT, stored, config)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    assert_same_bits(HF_VIT.from_ours(again), stored)
    # And ours in its place
    ours = random_ours(config)
    save_file(tensors(HF_VIT.from_ours(ours)), folder / "model.safetensors", metadata={"format": "pt"})
    theirs, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert_close(ours(images), theirs.eval()(images).logits)


@torch.no_grad()
@pytest.mark.parametrize("pooler", [True, False])
def test_hugging_faces_features_agree_both_ways(pooler: bool, tmp_path: Path) -> None:
    config = replace(TINY, num_classes=0, pre_logits=32 if pooler else 0, norm_eps=1e-12)
    theirs = huggingface(config, ViTModel, add_pooling_layer=pooler)
    images = torch.randn(2, 3, 24, 24)

    def answer(model: nn.Module) -> Tensor:
        result = model(images)
        return result.pooler_output if pooler else result.last_hidden_state[:, 0]

    theirs.save_pretrained(tmp_path)
    stored = {name: tensor.numpy() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ours = ours_from(HF_VIT, stored, config)
    assert_close(ours(images), answer(theirs))
    assert_same_bits(HF_VIT.from_ours(ours), stored)
    ours = random_ours(config)
    save_file(tensors(HF_VIT.from_ours(ours)), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_close(ours(images), answer(ViTModel.from_pretrained(tmp_path, add_pooling_layer=pooler).eval()))


@torch.no_grad()
@settings(max_examples=6, deadline=None)
@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_positions_are_resized_as_hugging_face_resizes_them(size: tuple[int, int]) -> None:
    config = replace(TINY, norm_eps=1e-12)
    theirs = huggingface(config, ViTForImageClassification)
    pixels = size[0] * 4, size[1] * 4
    ours = adapt(ours_from(HF_VIT, arrays_of(theirs), config), image_size=pixels, position_resize="hf")
    images = torch.randn(2, 3, *pixels)
    assert_close(ours(images), theirs(images, interpolate_pos_encoding=True).logits)
