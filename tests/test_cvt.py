"""CvTs have their published sizes, do what the official code does, and take over its weights and Hugging Face's.

`golden/cvt_*` hold what microsoft/CvT, `lib/models/cls_cvt.py`, answered on random weights of small sizes: QuickGELU
with three stages, exact GELU with two.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail import npz
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.cvt_names import CVT, HF_CVT, CvTNames
from vitrail.checkpoints.names import Arrays, Hints
from vitrail.config.codec import from_json, to_json
from vitrail.config.cvt import CVTS, CvTConfig
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vitrail.errors import UserError
from vitrail.models.cvt import Block, ConvAttention, CvT, as_map

GOLDEN = Path(__file__).parent / "golden"
TINY = CvTConfig(
    image_size=(32, 32), num_classes=5, widths=(8, 12, 16), depths=(1, 2, 3), heads=(1, 3, 2), mlp_dims=(9, 24, 32)
)
VARIANTS = {
    "three stages": {},
    "one stage": {"widths": (16,), "depths": (2,), "heads": (4,), "mlp_dims": (8,)},
    "exact GELU, grey": {"gelu": "erf", "channels": 1},
    "dropout": {"dropout": 0.3, "drop_path": 0.3},
}


def build(config: CvTConfig) -> CvT:
    model = CvT(config)
    model.init_weights()
    return model


def randomised(config: CvTConfig, seed: int = 0) -> CvT:
    """Return a model with random parameters and statistics, so that no zero or one hides anything."""
    model, generator = CvT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(int(torch.randint(1, 10_000, (), generator=generator)))
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()


def golden(name: str) -> tuple[dict[str, np.ndarray], Tensor, Tensor]:
    """Return official weights, pictures and logits."""
    weights, answers = (
        npz.read_npz(GOLDEN / f"{name}.{kind}.npz", limit=10**7, advice="it is not read.") for kind in ("weights", "io")
    )
    return weights, torch.from_numpy(answers["images_nchw"]), torch.from_numpy(answers["logits"])


def read(table: CvTNames, arrays: Arrays, heads: tuple[int, ...] | None = None, **settings: object) -> CvT:
    config, state = table.to_ours(arrays, hints=Hints(heads=heads))
    assert isinstance(config, CvTConfig)
    model = CvT(replace(config, **settings)).eval()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("name", "classes", "published"),
    [
        ("cvt-13", 1000, 19_997_480),
        ("cvt-13", 0, 19_997_480 - 385 * 1000),
        ("cvt-21", 1000, 31_622_696),
        ("cvt-w24", 1000, 277_196_392),
        ("cvt-w24", 100, 277_196_392 - 1025 * 900),
    ],
)
def test_parameters_are_as_many_as_published(name: str, classes: int, published: int) -> None:
    with torch.device("meta"):
        model = CvT(replace(CVTS[name], num_classes=classes))
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_published_sizes_are_those_of_the_official_configurations() -> None:
    assert CVTS["cvt-13"] == CvTConfig(drop_path=0.1)
    assert CVTS["cvt-21"] == CvTConfig(depths=(1, 4, 16), drop_path=0.1)
    assert CVTS["cvt-w24"] == CvTConfig(
        widths=(192, 768, 1024), depths=(2, 2, 20), heads=(3, 12, 16), mlp_dims=(768, 3072, 4096), drop_path=0.3
    )


@torch.no_grad()
def test_official_weights_give_the_official_answer() -> None:
    for name, heads, gelu, wrong in (("cvt_quick_gelu", (1, 2, 4), "quick", "erf"), ("cvt_gelu", None, "erf", "quick")):
        weights, images, logits = golden(name)
        assert CVT.claims(weights) and not HF_CVT.claims(weights)
        bound = 1e-5 * max(1.0, float(logits.abs().max()))
        assert float((read(CVT, weights, heads, gelu=gelu)(images) - logits).abs().max()) <= bound
        assert float((read(CVT, weights, heads, gelu=wrong)(images) - logits).abs().max()) > 100 * bound


def test_the_configuration_is_read_off_the_arrays() -> None:
    quick = CVT.to_ours(golden("cvt_quick_gelu")[0], hints=Hints(heads=(1, 2, 4), image_size=(33, 38)))[0]
    assert quick == CvTConfig(
        image_size=(33, 38),
        num_classes=7,
        widths=(8, 12, 24),
        depths=(1, 1, 2),
        heads=(1, 2, 4),
        mlp_dims=(32, 48, 96),
    )
    exact = CVT.to_ours(golden("cvt_gelu")[0])[0]
    assert exact == CvTConfig(num_classes=7, widths=(64, 64), depths=(1, 1), heads=(1, 1), mlp_dims=(16, 16))


@pytest.mark.parametrize(("name", "heads"), [("cvt_quick_gelu", (1, 2, 4)), ("cvt_gelu", None)])
def test_official_arrays_come_back_bit_for_bit(name: str, heads: tuple[int, ...] | None) -> None:
    weights = golden(name)[0]
    assert_same_arrays(CVT.from_ours(read(CVT, weights, heads)), weights)


def assert_same_arrays(ours: Arrays, theirs: Arrays) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


def drawn(seed: int) -> CvTConfig:
    """Return a configuration of random sizes."""
    rng = random.Random(seed)
    heads = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 4)))
    return CvTConfig(
        channels=rng.randint(1, 4),
        num_classes=rng.choice([0, 3, 7]),
        widths=tuple(count * rng.randint(1, 8) for count in heads),
        depths=tuple(rng.randint(1, 3) for _ in heads),
        heads=heads,
        mlp_dims=tuple(rng.randint(1, 40) for _ in heads),
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("table", [CVT, HF_CVT], ids=["official", "hf"])
def test_any_size_comes_back_bit_for_bit(table: CvTNames, seed: int) -> None:
    config = drawn(seed)
    model = randomised(replace(config, gelu=table.gelu))
    arrays = table.from_ours(model)
    assert table.claims(arrays)
    back, state = table.to_ours(arrays, hints=Hints(heads=config.heads))
    assert back == model.config
    assert {name: (t.dtype, t.shape) for name, t in state.items()} == {
        name: (t.dtype, t.shape) for name, t in model.state_dict().items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_ten_and_more_blocks_keep_their_order() -> None:
    model = randomised(replace(TINY, widths=(8,), depths=(12,), heads=(1,), mlp_dims=(8,)))
    for table in (CVT, HF_CVT):
        _, state = table.to_ours(table.from_ours(model), hints=Hints(heads=(1,)))
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_heads_are_64_wide_unless_said() -> None:
    arrays = CVT.from_ours(randomised(replace(TINY, widths=(64, 192), depths=(1, 1), heads=(2, 1), mlp_dims=(8, 8))))
    assert CVT.to_ours(arrays)[0].heads == (1, 3)
    assert CVT.to_ours(arrays, hints=Hints(heads=(2, 1)))[0].heads == (2, 1)
    arrays = CVT.from_ours(randomised(TINY))
    with pytest.raises(UserError, match=r"w\.pth does not tell .* width 8 .* for each of the 3 stages, as heads="):
        CVT.to_ours(arrays, source="w.pth")


def test_the_convention_says_the_gelu() -> None:
    model = randomised(replace(TINY, gelu="tanh"))
    for table, gelu in ((CVT, "quick"), (HF_CVT, "erf")):
        assert table.to_ours(table.from_ours(model), hints=Hints(heads=TINY.heads))[0].gelu == gelu


def test_missing_left_over_and_misshapen_arrays_are_named() -> None:
    weights, hints = golden("cvt_quick_gelu")[0], Hints(heads=(1, 2, 4))
    for name in (
        "stage2.cls_token",
        "stage0.patch_embed.proj.weight",
        "stage1.blocks.0.mlp.fc1.weight",
        "stage2.blocks.0.attn.conv_proj_k.bn.running_var",
        "head.bias",
    ):
        less = {key: array for key, array in weights.items() if key != name}
        with pytest.raises(UserError, match=rf"w\.pth .*'{name}'"):
            CVT.to_ours(less, hints=hints, source="w.pth")
    with pytest.raises(UserError, match=r"w\.pth holds 1 arrays .* stage2\.pos_embed"):
        CVT.to_ours({**weights, "stage2.pos_embed": np.zeros((1, 4, 24), np.float32)}, hints=hints, source="w.pth")
    with pytest.raises(UserError, match=r"stage0\.patch_embed\.proj\.weight cannot have the shape \(8, 3\)"):
        CVT.to_ours({**weights, "stage0.patch_embed.proj.weight": np.zeros((8, 3), np.float32)}, hints=hints)
    name = "stage1.blocks.0.attn.conv_proj_q.conv.weight"
    config, state = CVT.to_ours({**weights, name: np.zeros((12, 1, 5, 5), np.float32)}, hints=hints)
    with pytest.raises(UserError, match=r"query\.conv\.weight.*\(12, 1, 5, 5\).*\(12, 1, 3, 3\)"):
        assemble(config, state, "w.pth")


@pytest.mark.parametrize("table", [CVT, HF_CVT], ids=["official", "hf"])
def test_files_from_before_batches_were_counted_are_read(table: CvTNames) -> None:
    state = randomised(TINY).state_dict()
    arrays = {name: a for name, a in table.from_ours(randomised(TINY)).items() if not name.endswith("batches_tracked")}
    for name, tensor in read(table, arrays, TINY.heads).state_dict().items():
        assert torch.equal(tensor, torch.tensor(0) if name.endswith("batches_tracked") else state[name]), name


def test_names_of_others_are_not_claimed() -> None:
    for names in (["stage0.blocks.0.norm1.weight"], ["vit.encoder.layer.0.layernorm_before.weight"], ["cls"], []):
        arrays = {name: np.zeros(1, np.float32) for name in names}
        assert not CVT.claims(arrays) and not HF_CVT.claims(arrays)


@pytest.mark.parametrize("table", [CVT, HF_CVT], ids=["official", "hf"])
def test_pictures_are_prepared_as_for_the_published_results(table: CvTNames) -> None:
    at_224 = table.preprocessing(TINY)
    assert (at_224.image_size, at_224.fit, at_224.crop_fraction) == ((32, 32), "crop", 0.875)
    assert (at_224.interpolation, at_224.mean, at_224.std) == ("bicubic", IMAGENET_MEAN, IMAGENET_STD)
    assert table.preprocessing(replace(TINY, image_size=(384, 384))).fit == "squash"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_is_initialised_after_a_build_on_meta(variant: str) -> None:
    with torch.device("meta"):
        model = CvT(replace(TINY, **VARIANTS[variant]))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all() and not tensor.eq(-1).any(), name


def test_initialisation_is_that_of_the_official_code() -> None:
    torch.manual_seed(0)
    model = build(replace(TINY, widths=(256,), depths=(1,), heads=(4,), mlp_dims=(512,), head_bias=-7.0))
    state = model.state_dict()
    assert state["head.bias"].eq(-7.0).all()
    block = "stages.0.encoder.0"
    for name in ("attention.query.linear", "attention.key.linear", "attention.out", "mlp.up", "mlp.down"):
        assert abs(float(state[f"{block}.{name}.weight"].std()) / 0.02 - 1) < 0.05, name
        assert not state[f"{block}.{name}.bias"].any(), name
    assert abs(float(state["stages.0.class_token"].std()) / 0.02 - 1) < 0.2
    assert abs(float(state["head.weight"].std()) / 0.02 - 1) < 0.1
    for name, fan_in in (("stages.0.patch_embed.conv", 3 * 49), (f"{block}.attention.value.conv", 9)):
        largest = float(state[f"{name}.weight"].abs().max())  # of a uniform distribution
        assert 0.97 * fan_in**-0.5 < largest <= fan_in**-0.5


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_of_any_size_and_shape_are_taken(variant: str) -> None:
    config = replace(TINY, **VARIANTS[variant])
    model = randomised(config)
    for height, width in ((32, 32), (16, 40), (31, 18), (7, 3), (3, 3)):
        images = torch.randn(2, config.channels, height, width)
        logits, features, places = model(images), model.features(images), model.feature_map(images)
        assert logits.shape == (2, 5) and torch.isfinite(logits).all()
        assert features.shape == (2, 16)
        rows, columns = ((side - 3) // 4 + 1 for side in (height, width))
        for _ in config.widths[1:]:
            rows, columns = -(-rows // 2), -(-columns // 2)
        assert places.shape == (2, 16, rows, columns)
        assert model(images[:1]).shape == (1, 5)  # the official code loses the axis of a batch of one
        assert torch.allclose(model(images[:1]), logits[:1], atol=1e-5)


def test_every_parameter_gets_a_gradient() -> None:
    model = randomised(TINY).train()
    F.cross_entropy(model(torch.randn(8, 3, 48, 48)), torch.arange(8) % 5).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # What is added to all keys alike shifts all scores of a query alike: no gradient, in theory.
        alike = name.endswith(("key.linear.bias", "key.norm.bias"))
        # The head reads the class token alone, which in the last block asks without a convolution.
        unread = name.startswith(("stages.2.encoder.2.attention.query.conv", "stages.2.encoder.2.attention.query.norm"))
        assert alike or bool(parameter.grad.any()) != unread, name


@torch.no_grad()
def test_attention_shows_what_the_fused_kernel_uses() -> None:
    model, images = randomised(TINY), torch.randn(2, 3, 48, 36)
    maps = list(model.attention(images))
    shapes = [(1, 12 * 9, 6 * 5)] + [(3, 6 * 5, 3 * 3)] * 2 + [(2, 3 * 3 + 1, 2 * 2 + 1)] * 3
    assert [tuple(weights.shape[1:]) for weights in maps] == shapes
    for weights in maps:
        assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-5)
    used: list[Tensor] = []

    def mix(module: ConvAttention, inputs: tuple, output: Tensor) -> None:
        x, grid = inputs
        token = x[:, :1] if x.shape[1] > grid[0] * grid[1] else None
        value = module.value(as_map(x, grid), token).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        mixed = (maps[len(used)] @ value).transpose(1, 2).flatten(2)
        used.append((module.out(mixed) - output).abs().max())

    for block in model.blocks():
        block.attention.register_forward_hook(mix)
    model(images)
    assert len(used) == 6 and max(used) < 1e-4


@torch.no_grad()
def test_scores_are_scaled_by_the_width_of_the_token() -> None:
    torch.manual_seed(0)
    attention, x = ConvAttention(12, 3).eval(), torch.randn(1, 7, 12)
    query = attention.query(as_map(x, (2, 3)), x[:, :1])[0].unflatten(-1, (3, 4))
    key = attention.key(as_map(x, (2, 3)), x[:, :1])[0].unflatten(-1, (3, 4))
    expected = torch.einsum("qhd,khd->hqk", query, key).div(12**0.5).softmax(dim=-1)
    assert torch.allclose(attention.weights(x, (2, 3))[0], expected, atol=1e-6)


@torch.no_grad()
def test_the_map_of_features_has_every_patch_in_its_place() -> None:
    model, images = randomised(TINY), torch.randn(2, 3, 40, 64)
    tokens, (rows, columns) = model.tokens(images)
    places = model.feature_map(images)
    assert (rows, columns) == (3, 4) and tokens.shape[1] == 13
    assert torch.equal(model.features(images), tokens[:, 0])
    for row, column in ((0, 0), (0, 3), (2, 1)):
        assert torch.equal(places[:, :, row, column], tokens[:, 1 + row * columns + column])


@torch.no_grad()
def test_the_class_token_is_in_the_last_stage_and_passes_by_the_convolutions() -> None:
    model = randomised(TINY)
    assert [name for name in model.state_dict() if "class_token" in name] == ["stages.2.class_token"]
    projection, patches, token = model.blocks()[-1].attention.key, torch.randn(2, 16, 3, 4), torch.randn(2, 1, 16)
    with_token = projection(patches, token)
    assert with_token.shape == (2, 1 + 2 * 2, 16)
    assert torch.allclose(with_token[:, :1], projection.linear(token), atol=1e-6)
    assert torch.allclose(with_token[:, 1:], projection(patches, None), atol=1e-6)


def test_drop_path_grows_over_the_last_stage_alone() -> None:
    model = build(replace(TINY, drop_path=0.2))
    assert [block.drop_path.rate for block in model.blocks()] == pytest.approx([0, 0, 0, 0, 0.1, 0.2])
    alone = build(replace(TINY, depths=(1, 1, 1), drop_path=0.2))
    assert [block.drop_path.rate for block in alone.blocks()] == [0, 0, 0]


def test_dropout_acts_in_training_only() -> None:
    model, images = randomised(replace(TINY, dropout=0.5)), torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.allclose(model(images), model(images), atol=1e-3)


def test_statistics_are_learned_in_training_and_used_in_evaluation() -> None:
    model, images = randomised(TINY), torch.randn(4, 3, 32, 32)
    name = "stages.1.encoder.0.attention.key.norm"
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.startswith(name)}
    model(images)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    model.train()(images)
    assert model.state_dict()[f"{name}.num_batches_tracked"] == before[f"{name}.num_batches_tracked"] + 1
    assert not torch.equal(model.state_dict()[f"{name}.running_mean"], before[f"{name}.running_mean"])


def test_depth_of_a_parameter_runs_from_input_to_head() -> None:
    model = build(TINY)
    assert len(model.blocks()) == 6 and all(isinstance(block, Block) for block in model.blocks())
    for name, depth in {
        "stages.0.patch_embed.conv.weight": 0,
        "stages.0.encoder.0.norm1.weight": 1,
        "stages.1.patch_embed.norm.bias": 2,
        "stages.1.encoder.1.mlp.up.weight": 3,
        "stages.2.class_token": 4,
        "stages.2.encoder.2.attention.query.conv.weight": 6,
        "norm.weight": 7,
        "head.bias": 7,
    }.items():
        assert name in model.state_dict()
        assert model.depth_of(name) == depth, name
    assert model.state_dict()[model.input_kernel].shape == (8, 3, 7, 7)


def test_a_model_without_a_head_gives_its_features() -> None:
    model, images = randomised(replace(TINY, num_classes=0)), torch.randn(1, 3, 32, 32)
    assert model.head is None
    assert torch.equal(model(images), model.features(images))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"widths": ()}, "widths must hold at least one"),
        ({"depths": (1, 2)}, "depths must hold one number per stage"),
        ({"depths": (1, 0, 2)}, "depths must be at least 1"),
        ({"heads": (1, 5, 2)}, "12 is not a multiple of the 5 heads"),
        ({"mlp_dims": (8, 8, 8, 8)}, "mlp_dims must hold one number per stage"),
        ({"image_size": (32, 2)}, "at least 3 pixels"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\)"),
        ({"channels": 0}, "channels must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(TINY, **changes)


def test_a_configuration_goes_through_json() -> None:
    assert from_json(CvTConfig, to_json(TINY)) == TINY
