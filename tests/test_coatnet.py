"""CoAtNets have their published sizes, do what the paper says, and take over timm's weights."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.checkpoints.coatnet_names import TABLE, TIMM_COATNET
from vitrail.checkpoints.names import Arrays, Hints
from vitrail.config.coatnet import COATNETS, CoAtNetConfig
from vitrail.config.codec import from_json, to_json
from vitrail.errors import UserError
from vitrail.layers.relative_attention import RelativeAttention, relative_index, resize_relative
from vitrail.models.coatnet import CoAtNet, MBConv, RelativeBlock

TINY = CoAtNetConfig(image_size=(64, 64), num_classes=5, widths=(4, 4, 8, 8, 16), depths=(1, 2, 2, 1), head_dim=4)
AS_TIMM = {
    "downsample": "avg",
    "stride_in": "depthwise",
    "gelu": "erf",
    "batch_norm_eps": 1e-5,
    "norm_eps": 1e-6,
}
VARIANTS = {
    "paper": {},
    "timm": AS_TIMM,
    "MBConv in S3": {"widths": (4, 4, 8, 12, 24), "mbconv_before_s3": (2, 8)},
    "grey, one width": {"channels": 1, "widths": (4,) * 5},
}


def build(config: CoAtNetConfig) -> CoAtNet:
    model = CoAtNet(config)
    model.init_weights()
    return model


def randomised(config: CoAtNetConfig, seed: int = 0) -> CoAtNet:
    """Return a model with random parameters and statistics, so that no zero or one hides anything."""
    model, generator = CoAtNet(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(int(torch.randint(1, 10_000, (), generator=generator)))
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def parameters(config: CoAtNetConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CoAtNet(config).parameters())


@pytest.mark.parametrize(
    ("name", "at_224", "at_512"),
    [
        ("coatnet-0", 25_036_820, 25_269_236),
        ("coatnet-1", 42_225_776, 42_808_112),
        ("coatnet-2", 74_684_744, 75_461_192),
        ("coatnet-3", 166_966_264, 168_130_936),
        ("coatnet-4", 275_425_288, 277_678_600),
        ("coatnet-5", 687_052_952, 688_918_040),
        ("coatnet-6", 1_471_125_232, 1_472_796_208),
        ("coatnet-7", 2_441_972_728, 2_444_188_024),
    ],
)
def test_parameters_are_as_many_as_computed_from_the_paper(name: str, at_224: int, at_512: int) -> None:
    assert parameters(COATNETS[name]) == at_224
    assert parameters(replace(COATNETS[name], image_size=(512, 512))) == at_512


def test_coatnet_6_as_printed_has_too_few_parameters() -> None:
    printed = replace(COATNETS["coatnet-6"], widths=(192, 192, 384, 1536, 2048))
    assert parameters(printed) == 1_348_435_040  # the paper says 1470 M


def test_only_the_tables_depend_on_the_picture_size() -> None:
    names = [
        {name: tensor.shape for name, tensor in CoAtNet(replace(TINY, image_size=size)).state_dict().items()}
        for size in ((64, 64), (96, 160))
    ]
    different = {name for name in names[0] if names[0][name] != names[1][name]}
    assert different == {f"stages.{block}.attention.table" for block in ("2.0", "2.1", "3.0")}
    assert names[1]["stages.2.0.attention.table"] == (2, 2 * 6 - 1, 2 * 10 - 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_is_initialised_after_a_build_on_meta(variant: str) -> None:
    with torch.device("meta"):
        model = CoAtNet(replace(TINY, **VARIANTS[variant]))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.fill_(7 if name.endswith("tracked") else float("nan"))
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert not name.endswith("tracked") or tensor == 0
    assert torch.isfinite(model(torch.randn(2, model.config.channels, 64, 64))).all()


def test_initialisation_is_that_of_the_authors_code() -> None:
    torch.manual_seed(0)
    model = build(replace(TINY, widths=(32, 32, 64, 128, 256), image_size=(224, 224), head_bias=-7.0))
    state = model.state_dict()
    assert state["head.bias"].eq(-7.0).all()
    for name in (
        "stem.conv2.weight",
        "stages.1.0.depthwise.weight",
        "stages.2.0.attention.qkv.weight",
        "stages.2.0.attention.table",
        "stages.3.0.mlp.up.weight",
        "pre_logits.weight",
    ):
        assert abs(float(state[name].std()) / 0.02 - 1) < 0.1, name
        assert abs(float(state[name].mean())) < 0.002, name
    assert not state["stages.3.0.mlp.up.bias"].any()
    assert state["stages.1.0.norm.running_var"].eq(1).all()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (33, 47), (97, 31), (1, 1), (16, 2)])
def test_pictures_of_any_size_and_shape_are_taken(variant: str, size: tuple[int, int]) -> None:
    model = randomised(replace(TINY, **VARIANTS[variant]))
    images = torch.randn(2, model.config.channels, *size)
    features = model.feature_map(images)
    assert features.shape == (2, model.config.widths[-1], -(-size[0] // 32), -(-size[1] // 32))
    assert torch.isfinite(model(images)).all()
    assert model(images).shape == (2, 5)


@torch.no_grad()
def test_tables_fit_the_maps_of_the_native_size_whatever_it_is() -> None:
    config = replace(TINY, image_size=(33, 79))
    maps = list(randomised(config).attention(torch.randn(1, 3, 33, 79)))
    places = [attention.shape[-1] for attention in maps]
    assert config.grids == ((3, 5), (2, 3))
    assert places == [15, 15, 6]


@torch.no_grad()
def test_the_head_is_pool_norm_tanh_linear() -> None:
    model, images = randomised(TINY), torch.randn(2, 3, 64, 64)
    pooled = model.feature_map(images).mean(dim=(2, 3))
    normed = F.layer_norm(pooled, (16,), model.norm.weight, model.norm.bias, eps=1e-5)
    features = torch.tanh(model.pre_logits(normed))
    assert torch.allclose(model.features(images), features, atol=1e-6)
    assert model.head is not None
    assert torch.allclose(model(images), model.head(features), atol=1e-6)
    headless = randomised(replace(TINY, num_classes=0))
    assert torch.equal(headless(images), headless.features(images))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    config = replace(TINY, **VARIANTS[variant])
    model = randomised(config).train()
    F.cross_entropy(model(torch.randn(4, config.channels, 64, 64)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("qkv.bias"):  # a bias of the keys shifts all scores of a query alike: no gradient, in theory
            query, _, value = parameter.grad.chunk(3)
            assert query.any() and value.any(), name
        else:
            assert parameter.grad.any(), name


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_a_bias_depends_on_the_offset_from_key_to_query(rows: int, columns: int) -> None:
    table = torch.randn(2, 2 * rows - 1, 2 * columns - 1)
    attention = RelativeAttention(4, 4, 2, (rows, columns))
    attention.table = nn.Parameter(table)
    bias = attention.bias((rows, columns)).view(2, rows, columns, rows, columns)
    for i, j, k, m in product(range(rows), range(columns), range(rows), range(columns)):
        # equation 3 and appendix A.1, counted from 0
        assert torch.equal(bias[:, i, j, k, m], table[:, i - k + rows - 1, j - m + columns - 1])


def test_the_index_is_made_on_the_device_of_the_table() -> None:
    assert relative_index((3, 4), torch.device("meta")).is_meta


@torch.no_grad()
def test_attention_weights_give_what_the_fused_kernel_gives() -> None:
    torch.manual_seed(0)
    attention, x = RelativeAttention(12, 24, 3, (2, 3)), torch.randn(2, 6, 12)
    nn.init.normal_(attention.table)
    weights = attention.weights(x, (2, 3))
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 6), atol=1e-6)
    query, key, value = (part.view(2, 6, 3, 8).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    assert torch.allclose(weights, (query @ key.mT / 8**0.5 + attention.bias((2, 3))).softmax(-1), atol=1e-6)
    mixed = (weights @ value).transpose(1, 2).reshape(2, 6, 24)
    assert torch.allclose(attention.out(mixed), attention(x, (2, 3)), atol=1e-6)


@torch.no_grad()
def test_attention_is_shown_block_by_block_at_its_resolution() -> None:
    model = randomised(replace(TINY, **VARIANTS["MBConv in S3"]))
    maps = list(model.attention(torch.randn(2, 3, 64, 96)))
    assert [tuple(attention.shape) for attention in maps] == [(2, 3, 24, 24), (2, 3, 24, 24), (2, 6, 6, 6)]
    for attention in maps:
        assert torch.allclose(attention.sum(-1), torch.ones(attention.shape[:-1]), atol=1e-5)


def official_resize(table: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with half-pixel centres and clamped borders, as `tf.image.resize` does, by other means."""
    axes = [(np.arange(n) + 0.5) * side / n - 0.5 for n, side in zip(size, table.shape[1:], strict=True)]
    places = np.meshgrid(*axes, indexing="ij")
    return np.stack([scipy.ndimage.map_coordinates(head, places, order=1, mode="nearest") for head in table])


sides = st.integers(1, 7)


@settings(max_examples=25, deadline=None)
@given(old=st.tuples(sides, sides), new=st.tuples(sides, sides))
def test_tables_are_resized_bilinearly(old: tuple[int, int], new: tuple[int, int]) -> None:
    table = torch.randn(2, 2 * old[0] - 1, 2 * old[1] - 1)
    resized = resize_relative(table, old, new)
    expected = official_resize(table.numpy(), (2 * new[0] - 1, 2 * new[1] - 1))
    assert torch.allclose(resized, torch.from_numpy(expected), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(old=st.integers(2, 14), larger=st.integers(1, 3))
def test_timm_keeps_the_bias_of_neighbours(old: int, larger: int) -> None:
    new, table = old * larger, torch.randn(2, 2 * old - 1, 2 * old - 1)
    resized = resize_relative(table, (old, old), (new, new), "timm")
    assert resized.shape == (2, 2 * new - 1, 2 * new - 1)
    near = slice(old - 2, old + 1), slice(new - 2, new + 1)
    assert torch.allclose(resized[:, near[1], near[1]], table[:, near[0], near[0]], atol=1e-6)


def test_other_methods_of_resizing_are_refused() -> None:
    with pytest.raises(UserError, match="'official' or 'timm', not 'hf'"):
        resize_relative(torch.zeros(1, 3, 3), (2, 2), (3, 3), "hf")


@torch.no_grad()
def test_tables_resized_once_answer_as_those_resized_on_the_way() -> None:
    model, images = randomised(TINY), torch.randn(2, 3, 96, 128)
    state = model.state_dict()
    model.resize_tables(state, (96, 128), "official")
    resized = CoAtNet(replace(TINY, image_size=(96, 128))).eval()
    resized.load_state_dict(state)
    assert torch.allclose(resized(images), model(images), atol=1e-5)
    model.resize_tables(other := dict(model.state_dict()), (96, 128), "timm")
    assert not torch.equal(other["stages.2.0.attention.table"], state["stages.2.0.attention.table"])


def first_blocks(config: CoAtNetConfig) -> tuple[MBConv, RelativeBlock]:
    blocks = randomised(config).blocks()
    mbconv, relative = blocks[0], next(block for block in blocks if isinstance(block, RelativeBlock))
    assert isinstance(mbconv, MBConv)
    return mbconv, relative


@torch.no_grad()
@pytest.mark.parametrize(("downsample", "pool"), [("max", F.max_pool2d), ("avg", F.avg_pool2d)])
def test_shortcuts_are_projections_of_the_pooled_map(downsample: str, pool: Callable) -> None:
    for block in first_blocks(replace(TINY, downsample=downsample, widths=(4, 6, 8, 12, 16))):
        silent = [block.project] if isinstance(block, MBConv) else [block.attention.out, block.mlp.down]
        for layer in silent:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        x = torch.randn(2, block.shortcut.project.in_channels, 8, 6)
        assert torch.allclose(block(x), block.shortcut.project(pool(x, 2)), atol=1e-6)
        odd = torch.randn(2, x.shape[1], 5, 7)
        assert torch.allclose(block(odd)[..., 2, 3], block.shortcut.project(odd[..., 4:, 6:])[..., 0, 0], atol=1e-6)


@torch.no_grad()
def test_attention_reads_the_map_normed_then_pooled() -> None:
    _, block = first_blocks(TINY)
    x = torch.randn(2, 8, 6, 4)
    tokens, grid = block.tokens(x)
    normed = block.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert grid == (3, 2)
    assert torch.allclose(tokens, F.max_pool2d(normed, 2).flatten(2).transpose(1, 2))


def test_the_step_is_in_the_first_convolution_or_in_the_depthwise_one() -> None:
    paper, _ = first_blocks(TINY)
    timm, _ = first_blocks(replace(TINY, stride_in="depthwise"))
    assert (paper.expand.stride, paper.depthwise.stride) == ((2, 2), (1, 1))
    assert (timm.expand.stride, timm.depthwise.stride) == ((1, 1), (2, 2))


def test_blocks_run_from_input_to_output() -> None:
    model = CoAtNet(replace(TINY, **VARIANTS["MBConv in S3"], drop_path=0.7))
    kinds = [type(block) for block in model.blocks()]
    assert kinds == [MBConv] * 5 + [RelativeBlock] * 3
    rates = [block.drop_path.rate for block in model.blocks()]  # pyright: ignore[reportAttributeAccessIssue]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    modules = {name: model.depth_of(f"{name}.weight") for name, _ in model.named_modules() if name.count(".") == 2}
    starts = {name: depth for name, depth in modules.items() if name.startswith("stages")}
    assert [starts[f"stages.{block}"] for block in ("0.0", "1.0", "1.1", "2.0", "2.1", "2.2", "2.3", "3.0")] == [
        *range(1, 9)
    ]
    assert [model.depth_of(name) for name in ("stem.conv1.weight", "norm.bias", "pre_logits.weight", "head.bias")] == [
        0,
        9,
        9,
        9,
    ]
    assert model.state_dict()[model.input_kernel].shape == (4, 3, 3, 3)


def test_norms_have_the_epsilons_of_the_settings() -> None:
    norms = [layer for layer in CoAtNet(TINY).modules() if isinstance(layer, nn.BatchNorm2d | nn.LayerNorm)]
    assert {type(norm): norm.eps for norm in norms} == {nn.BatchNorm2d: 1e-3, nn.LayerNorm: 1e-5}
    assert len({(type(norm), norm.eps) for norm in norms}) == 2


def test_dropout_acts_in_training_only() -> None:
    model, images = randomised(replace(TINY, dropout=0.5)), torch.randn(2, 3, 64, 64)
    model.train()
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (4, 4, 8, 10, 16)}, "width 10 .* not a multiple of head_dim 4"),
        ({"mbconv_before_s3": (2, 0)}, "mbconv_before_s3 must be a number of blocks and their width"),
        ({"depths": (1, 0, 1, 1)}, "depths must be at least 1"),
        ({"image_size": (0, 64)}, "image_size"),
    ],
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize("name", COATNETS)
def test_settings_survive_json(name: str) -> None:
    assert from_json(CoAtNetConfig, to_json(COATNETS[name])) == COATNETS[name]


# timm's names


def from_timm(arrays: Arrays, **hints: tuple[int, int]) -> CoAtNet:
    config, state = TIMM_COATNET.to_ours(arrays, hints=Hints(**hints))
    assert isinstance(config, CoAtNetConfig)
    model = CoAtNet(config).eval()
    model.load_state_dict(state)
    return model


TIMM = replace(TINY, **AS_TIMM)
# What timm 1.0.31 answers to weights and pictures drawn as below; tests/peers/test_coatnet.py asks it again.
TIMM_LOGITS = [
    [0.21801811, -0.09811234, 0.10084201, -0.12247192, 0.21606576],
    [0.21976966, -0.09814754, 0.10234141, -0.12213915, 0.21850085],
]
# Five of its last features at one place, which pooling does not dull.
TIMM_MAP = [
    [0.73011625, -1.54658794, -0.78089434, 1.25161624, 3.04090118],
    [0.76194739, -1.52545369, -0.80530936, 1.26736712, 3.03788662],
]


def drawn() -> tuple[dict[str, np.ndarray], Tensor]:
    """Return weights under timm's names, and pictures, from numpy's frozen generator."""
    random = np.random.RandomState(0)
    shapes = {name: array.shape for name, array in TIMM_COATNET.from_ours(CoAtNet(TIMM)).items()}
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(shapes):
        if name.endswith("num_batches_tracked"):
            arrays[name] = np.array(3)
            continue
        low, high = (0.5, 1.5) if name.endswith(("running_var", "norm1.weight", "norm2.weight")) else (-0.5, 0.5)
        if name.endswith(TABLE) or len(shapes[name]) > 1:  # enough for attention to have a choice
            high = 3 if name.endswith(TABLE) else (3 / np.prod(shapes[name][1:])) ** 0.5
            low = -high
        arrays[name] = random.uniform(low, high, shapes[name]).astype(np.float32)
    return arrays, torch.from_numpy(random.uniform(-2, 2, (2, 3, 64, 64)).astype(np.float32))


@torch.no_grad()
def test_timm_weights_give_timms_answer() -> None:
    arrays, images = drawn()
    model = from_timm(arrays)
    assert torch.allclose(model(images), torch.tensor(TIMM_LOGITS), atol=1e-5)
    assert torch.allclose(model.feature_map(images)[:, :5, 1, 0], torch.tensor(TIMM_MAP), atol=1e-5)


even = st.integers(1, 3).map(lambda half: 2 * half)


@settings(max_examples=10, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    head_dim=even,
    widths=st.tuples(even, even, even),
    depths=st.tuples(*[st.integers(1, 2)] * 4),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    channels=st.integers(1, 4),
    num_classes=st.integers(0, 3),
)
def test_weights_go_to_timm_and_back_bit_for_bit(
    heads: tuple[int, int],
    head_dim: int,
    widths: tuple[int, int, int],
    depths: tuple[int, int, int, int],
    grid: tuple[int, int],
    channels: int,
    num_classes: int,
) -> None:
    config = replace(
        TIMM,
        image_size=(32 * grid[0], 32 * grid[1]),
        widths=(*widths, heads[0] * head_dim, heads[1] * head_dim),
        depths=depths,
        head_dim=head_dim,
        channels=channels,
        num_classes=num_classes,
    )
    model = randomised(config)
    arrays = TIMM_COATNET.from_ours(model)
    assert TIMM_COATNET.claims(arrays)
    back = from_timm(arrays, image_size=config.image_size)
    assert back.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    again = TIMM_COATNET.from_ours(back)
    assert all(again[name].tobytes() == array.tobytes() for name, array in arrays.items())


def test_timm_orders_queries_keys_and_values_head_by_head() -> None:
    model = randomised(TIMM)
    arrays, ours = TIMM_COATNET.from_ours(model), model.state_dict()["stages.3.0.attention.qkv.weight"].numpy()
    theirs = arrays["stages.3.blocks.0.attn.qkv.weight"]
    assert theirs.shape == (48, 8, 1, 1)
    for head, part in product(range(4), range(3)):
        rows = theirs[12 * head + 4 * part : 12 * head + 4 * part + 4, :, 0, 0]
        assert np.array_equal(rows, ours[16 * part + 4 * head : 16 * part + 4 * head + 4])


def test_the_picture_size_is_that_of_the_tables() -> None:
    tall = TIMM_COATNET.from_ours(randomised(replace(TIMM, image_size=(128, 64))))
    with pytest.raises(UserError, match=r"105 and 21 relative positions.*image_size=\(height, width\)"):
        TIMM_COATNET.to_ours(tall)
    assert from_timm(tall, image_size=(128, 64)).config.image_size == (128, 64)
    square = TIMM_COATNET.from_ours(randomised(TIMM))
    assert from_timm(square, image_size=(224, 224)).config.image_size == (64, 64)  # a wish, not what they are
    assert from_timm(square, image_size=(50, 63)).config.image_size == (50, 63)  # of which they may be as well


def test_damaged_weights_are_refused_by_name() -> None:
    arrays = TIMM_COATNET.from_ours(randomised(TIMM))
    table = f"stages.3.blocks.0.{TABLE}"
    qkv = "stages.2.blocks.1.attn.qkv.weight"
    for changed, message in (
        ({name: array for name, array in arrays.items() if name != "head.norm.bias"}, "lacks the array 'head.norm.b"),
        (arrays | {"stages.0.blocks.0.extra": arrays["head.fc.bias"]}, "no place for: stages.0.blocks.0.extra"),
        (arrays | {table: arrays[table][:, :3]}, r"3\.blocks\.0\.attn.* the shape \(9, 3\)"),
        (arrays | {qkv: arrays[qkv][:-1]}, r"2\.blocks\.1\.attn\.qkv\.weight cannot have the shape \(23, 8, 1, 1\)"),
        (arrays | {"stem.conv1.weight": np.zeros(3, np.float32)}, r"stem.conv1.weight cannot have the shape \(3,\)"),
    ):
        with pytest.raises(UserError, match=message):
            TIMM_COATNET.to_ours(changed)


def test_files_from_before_batches_were_counted_are_read() -> None:
    model = randomised(TIMM)
    arrays = {name: a for name, a in TIMM_COATNET.from_ours(model).items() if not name.endswith("batches_tracked")}
    state = from_timm(arrays).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], torch.tensor(0) if name.endswith("batches_tracked") else tensor), name


def test_timms_own_designs_are_refused_with_the_reason() -> None:
    arrays = TIMM_COATNET.from_ours(randomised(TIMM))
    with pytest.raises(UserError, match="one of timm's own CoAtNets"):
        TIMM_COATNET.to_ours(arrays | {"norm.weight": np.ones(16, np.float32)})


def test_timm_has_no_coatnet_6() -> None:
    with pytest.raises(UserError, match="no CoAtNet with MBConv blocks in S3"):
        TIMM_COATNET.from_ours(randomised(replace(TINY, **VARIANTS["MBConv in S3"])))


def test_pictures_are_prepared_as_timm_does() -> None:
    preprocessing = TIMM_COATNET.preprocessing(TIMM)
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert (preprocessing.interpolation, preprocessing.crop_fraction) == ("bicubic", 0.95)
    assert preprocessing.image_size == TIMM.image_size
