"""CoAtNets answer as timm's do, and weights go both ways."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from test_coatnet import TIMM, TIMM_LOGITS, TIMM_MAP, drawn
from timm.layers import RelPosBias
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from timm.models.maxxvit import (
    MaxxVit,
    MaxxVitCfg,
    MaxxVitConvCfg,
    MaxxVitTransformerCfg,
    MbConvBlock,
    TransformerBlock2d,
)
from torch import nn

from peers.support import assert_close, randomise
from vitrail.checkpoints.coatnet_names import TIMM_COATNET, _mbconv, _relative_block, coatnet_rows
from vitrail.checkpoints.names import Hints, layer, read_rows
from vitrail.config.coatnet import COATNETS, CoAtNetConfig
from vitrail.errors import UserError
from vitrail.layers.relative_attention import resize_relative
from vitrail.models.coatnet import CoAtNet

Arrays = dict[str, np.ndarray]

# PyTorch has two things to say of how timm resizes tables.
timm_resizes = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")


def arrays_of(module: nn.Module) -> Arrays:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def ours_of(arrays: Arrays, image_size: tuple[int, int], **settings: object) -> CoAtNet:
    config, state = TIMM_COATNET.to_ours(arrays, hints=Hints(image_size=image_size))
    assert isinstance(config, CoAtNetConfig)
    model = CoAtNet(replace(config, **settings)).eval()
    model.load_state_dict(state)
    return model


def cfg_of(config: CoAtNetConfig) -> MaxxVitCfg:
    """Return timm's settings for a configuration."""
    pool = {"max": "max2", "avg": "avg2"}[config.downsample]
    act = {"tanh": "gelu_tanh", "erf": "gelu", "quick": "quick_gelu"}[config.gelu]
    return MaxxVitCfg(
        embed_dim=config.widths[1:],
        depths=config.depths,
        stem_width=config.widths[0],
        conv_cfg=MaxxVitConvCfg(
            stride_mode={"expand": "1x1", "depthwise": "dw"}[config.stride_in],
            pool_type=pool,
            act_layer=act,
            norm_eps=config.batch_norm_eps,
        ),
        transformer_cfg=MaxxVitTransformerCfg(
            dim_head=config.head_dim, pool_type=pool, act_layer=act, norm_eps=config.norm_eps
        ),
        head_hidden_size=config.widths[-1],
    )


def theirs_of(config: CoAtNetConfig) -> MaxxVit:
    """Build timm's network of a configuration."""
    return MaxxVit(cfg_of(config), img_size=config.image_size, in_chans=config.channels, num_classes=config.num_classes)


def some_config(seed: int) -> CoAtNetConfig:
    rng = random.Random(seed)
    head_dim = rng.choice((4, 8, 16))
    grow = [head_dim * rng.randint(1, 3) for _ in range(2)]
    return CoAtNetConfig(
        image_size=(32 * rng.randint(1, 4), 32 * rng.randint(1, 4)),
        channels=rng.choice((1, 3, 4)),
        num_classes=rng.choice((0, 2, 7)),
        widths=(2 * rng.randint(2, 8), 2 * rng.randint(2, 8), 2 * rng.randint(2, 8), grow[0], grow[1]),
        depths=(rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 2)),
        head_dim=head_dim,
        downsample=rng.choice(("max", "avg")),
        stride_in=rng.choice(("expand", "depthwise")),
        gelu=rng.choice(("tanh", "erf", "quick")),
        batch_norm_eps=rng.choice((1e-3, 1e-5)),
        norm_eps=rng.choice((1e-5, 1e-6)),
    )


SWITCHES = ("downsample", "stride_in", "gelu", "batch_norm_eps", "norm_eps")


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_any_network_answers_as_timms(seed: int) -> None:
    config = some_config(seed)
    theirs = randomise(theirs_of(config), seed)
    arrays, images = arrays_of(theirs), torch.randn(2, config.channels, *config.image_size)
    ours = ours_of(arrays, config.image_size, **{name: getattr(config, name) for name in SWITCHES})
    assert ours.config == config
    assert_close(ours(images), theirs(images))
    assert_close(ours.feature_map(images), theirs.forward_features(images))
    back = TIMM_COATNET.from_ours(ours)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].shape, back[name].dtype) == (array.shape, array.dtype), name
        assert back[name].tobytes() == array.tobytes(), name


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_timm_takes_over_our_weights(seed: int) -> None:
    config = replace(some_config(100 + seed), downsample="max", stride_in="expand", gelu="tanh")
    ours, theirs = randomise(CoAtNet(config), seed), theirs_of(config).eval()
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in TIMM_COATNET.from_ours(ours).items()})
    images = torch.randn(2, config.channels, *config.image_size)
    assert_close(ours(images), theirs(images))


@torch.no_grad()
def test_coatnet_0_at_full_size_answers_as_timms() -> None:
    theirs = randomise(timm.create_model("coatnet_0_224"))
    ours = ours_of(arrays_of(theirs), (224, 224))
    switches = {name: getattr(TIMM, name) for name in SWITCHES}
    assert ours.config == replace(COATNETS["coatnet-0"], **switches)  # what timm's models need and arrays cannot tell
    images = torch.randn(1, 3, 224, 224)
    features = theirs.forward_features(images)
    assert_close(ours.feature_map(images), features)
    assert_close(ours(images), theirs.forward_head(features))


@torch.no_grad()
def test_timm_still_answers_as_written_down() -> None:
    arrays, images = drawn()
    theirs = theirs_of(TIMM).eval()
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    assert_close(theirs(images), torch.tensor(TIMM_LOGITS))
    assert_close(theirs.forward_features(images)[:, :5, 1, 0], torch.tensor(TIMM_MAP))


@pytest.mark.parametrize("size", range(6))
def test_full_sizes_have_as_many_parameters_as_timms(size: int) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(f"coatnet_{size}_224")
        ours = CoAtNet(replace(COATNETS[f"coatnet-{size}"], head_dim=32))  # timm has 32 in CoAtNet-5 too
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    shapes = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in theirs.state_dict().items()}
    shapes |= {name: np.array(0) for name in shapes if name.endswith("num_batches_tracked")}
    assert TIMM_COATNET.claims(shapes)
    assert {row.theirs[0] for row in coatnet_rows(ours.config)} == shapes.keys()


@torch.no_grad()
@pytest.mark.parametrize("switches", [{}, {name: getattr(TIMM, name) for name in SWITCHES}], ids=["paper", "timm"])
def test_s3_of_coatnet_6_is_made_of_timms_blocks(switches: dict) -> None:
    config = CoAtNetConfig(
        image_size=(64, 96), widths=(4, 4, 8, 16, 32), depths=(1, 1, 2, 1), mbconv_before_s3=(2, 12), head_dim=8
    )
    config = replace(config, **switches)
    cfg, theirs = cfg_of(config), theirs_of(replace(config, mbconv_before_s3=(0, 0)))
    positions = partial(RelPosBias, window_size=(4, 6))
    widening = TransformerBlock2d(12, 16, stride=2, rel_pos_cls=positions, cfg=cfg.transformer_cfg)
    widening.shortcut.pool = widening.norm1.down.pool = nn.Identity()  # timm widens at stride 2 only
    theirs.stages[2].blocks = nn.Sequential(
        MbConvBlock(8, 12, stride=2, cfg=cfg.conv_cfg),
        MbConvBlock(12, 12, cfg=cfg.conv_cfg),
        widening,
        TransformerBlock2d(16, 16, rel_pos_cls=positions, cfg=cfg.transformer_cfg),
    )
    ours, names = [f"stages.2.{i}" for i in range(4)], [f"stages.2.blocks.{i}" for i in range(4)]
    rows = [
        *(row for row in coatnet_rows(replace(config, mbconv_before_s3=(0, 0))) if not row.ours.startswith("stages.2")),
        *layer(f"{ours[0]}.shortcut.project", f"{names[0]}.shortcut.expand"),
        *_mbconv(ours[0], names[0]),
        *_mbconv(ours[1], names[1]),
        *layer(f"{ours[2]}.shortcut.project", f"{names[2]}.shortcut.expand"),
        *_relative_block(ours[2], names[2], True, 2, (4, 6)),
        *_relative_block(ours[3], names[3], False, 2, (4, 6)),
    ]
    model = CoAtNet(config).eval()
    model.load_state_dict(read_rows(rows, arrays_of(randomise(theirs)), "timm"))
    images = torch.randn(2, 3, 64, 96)
    assert_close(model(images), theirs(images))
    assert_close(model.feature_map(images), theirs.forward_features(images))


@timm_resizes
@pytest.mark.parametrize("seed", range(20))
def test_tables_are_resized_as_timm_does(seed: int) -> None:
    rng = random.Random(seed)
    old, new = ((rng.randint(1, 16), rng.randint(1, 16)) for _ in range(2))
    table = torch.randn(3, 2 * old[0] - 1, 2 * old[1] - 1)
    sides = 2 * new[0] - 1, 2 * new[1] - 1
    theirs = resize_rel_pos_bias_table(table.flatten(1).T, new, (sides[0] * sides[1], 3), old)
    assert_close(resize_relative(table, old, new, "timm"), theirs.T.reshape(3, *sides), bound=2e-6)


@timm_resizes
@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (96, 160), (224, 224)])
def test_weights_at_another_picture_size_answer_as_timms(size: tuple[int, int]) -> None:
    theirs = randomise(theirs_of(TIMM))
    ours = ours_of(arrays_of(theirs), TIMM.image_size)
    state = ours.state_dict()
    ours.resize_tables(state, size, "timm")
    resized = CoAtNet(replace(ours.config, image_size=size)).eval()
    resized.load_state_dict(state)
    theirs.set_input_size(size)
    images = torch.randn(2, 3, *size)
    assert_close(resized(images), theirs(images))
    assert_close(resized.feature_map(images), theirs.forward_features(images))


@pytest.mark.parametrize("name", [name for name in timm.list_models("coatnet*") if "_rw" in name])
def test_timms_own_designs_are_refused_with_the_reason(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
    arrays = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert TIMM_COATNET.claims(arrays)
    with pytest.raises(UserError, match="one of timm's own CoAtNets"):
        TIMM_COATNET.to_ours(arrays)


def test_no_other_family_of_timms_is_claimed() -> None:
    for name in ("maxvit_tiny_tf_224", "coatnext_nano_rw_224", "tf_efficientnet_b0", "vit_tiny_patch16_224"):
        with torch.device("meta"):
            theirs = timm.create_model(name)
        assert not TIMM_COATNET.claims({name: np.zeros(0) for name in theirs.state_dict()})
