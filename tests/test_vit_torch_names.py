"""A Vision Transformer's weights under timm's and Hugging Face's names: there and back, and what is refused.

What the peers themselves make of them is tested in tests/peers.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrail.checkpoints import export_names, load_model
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.hf_vit import HF_VIT
from vitrail.checkpoints.names import Hints, NameTable
from vitrail.checkpoints.timm_vit import TIMM_VIT
from vitrail.checkpoints.vit_names import BIG_VISION, VIT, VIT_PUBLISHED
from vitrail.checkpoints.vit_shapes import heads_of
from vitrail.config.model import model_config
from vitrail.config.vit import VITS, ResNetStem, ViTConfig
from vitrail.errors import UserError
from vitrail.layers.embedding import resize_positions
from vitrail.models import ImageModel, build

TINY = ViTConfig(
    image_size=(12, 12), patch_size=(4, 4), num_classes=5, width=16, depth=2, mlp_dim=24, heads=4, gelu="erf"
)
HF_TINY = replace(TINY, norm_eps=1e-12)

GRIDS = st.sampled_from([(1, 1), (2, 2), (3, 3), (1, 3), (2, 3), (4, 2), (3, 4)])
"""Square, or with a number of rows that could not be a square: files do not say which they are."""


def random_model(config: ViTConfig) -> ImageModel:
    model = build(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def assert_there_and_back(table: NameTable, config: ViTConfig) -> None:
    model = random_model(config)
    arrays = table.from_ours(model)
    assert table.claims(arrays)
    found, state = table.to_ours(arrays, hints=Hints(image_size=config.image_size, heads=config.heads))
    assert found == config
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    back = table.from_ours(assemble(found, state, "a.safetensors"))
    assert back.keys() == arrays.keys()
    assert all(back[name].tobytes() == array.tobytes() for name, array in arrays.items())


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_width=st.integers(1, 6),
    depth=st.integers(1, 11),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=GRIDS,
    channels=st.integers(1, 4),
    num_classes=st.integers(0, 3),
    qkv_bias=st.booleans(),
    kind=st.sampled_from([("token", "learned"), ("gap", "learned-patches"), ("map", "learned-patches")]),
    stem=st.sampled_from([None, ResNetStem(width=32), ResNetStem(blocks=(2, 1), width=32)]),
)
def test_timm_names_there_and_back(heads, head_width, patch, grid, kind, stem, **others) -> None:
    stride = 1 if stem is None else stem.stride
    config = ViTConfig(
        image_size=(grid[0] * patch[0] * stride, grid[1] * patch[1] * stride),
        patch_size=patch,
        width=heads * head_width,
        mlp_dim=7,
        heads=heads,
        pool=kind[0],
        positions=kind[1],
        gelu="erf",
        stem=stem,
        **others,
    )
    assert_there_and_back(TIMM_VIT, config)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 4),
    head_width=st.integers(1, 6),
    depth=st.integers(1, 11),
    patch=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    grid=GRIDS,
    channels=st.integers(1, 4),
    head=st.sampled_from([{"num_classes": 3}, {"num_classes": 0}, {"num_classes": 0, "pre_logits": 5}]),
    qkv_bias=st.booleans(),
)
def test_hugging_face_names_there_and_back(heads, head_width, patch, grid, head, **others) -> None:
    config = ViTConfig(
        image_size=(grid[0] * patch[0], grid[1] * patch[1]),
        patch_size=patch,
        width=heads * head_width,
        mlp_dim=7,
        heads=heads,
        gelu="erf",
        norm_eps=1e-12,
        **head,
        **others,
    )
    assert_there_and_back(HF_VIT, config)


def test_a_class_token_without_a_position_is_known_by_its_table() -> None:
    assert_there_and_back(TIMM_VIT, replace(TINY, positions="learned-patches"))


def test_the_tanh_layer_of_the_oldest_timm_weights_is_kept() -> None:
    model = random_model(replace(TINY, pre_logits=8))
    arrays = TIMM_VIT.from_ours(random_model(TINY)) | {
        "pre_logits.fc.weight": model.state_dict()["pre_logits.weight"].numpy(),
        "pre_logits.fc.bias": model.state_dict()["pre_logits.bias"].numpy(),
        "head.weight": model.state_dict()["head.weight"].numpy(),
    }
    config, state = TIMM_VIT.to_ours(arrays, hints=Hints(heads=4))
    assert config == model.config
    assert torch.equal(state["pre_logits.weight"], model.state_dict()["pre_logits.weight"])


def test_heads_of_published_sizes_need_not_be_said() -> None:
    for config in VITS.values():
        assert heads_of(config.width, config.depth, config.mlp_dim, Hints(), "a.pth") == config.heads
    assert heads_of(1152, 27, 4304, Hints(), "a.pth") == 16  # SigLIP so400m
    assert heads_of(512, 8, 2048, Hints(), "a.pth") == 8  # 64 wide each, as almost everywhere
    assert heads_of(1280, 32, 5120, Hints(heads=20), "a.pth") == 20


def test_heads_that_nothing_tells_must_be_said() -> None:
    for table, config in ((TIMM_VIT, TINY), (HF_VIT, HF_TINY)):
        arrays = table.from_ours(random_model(config))
        with pytest.raises(UserError, match=r"a\.pth does not tell .* attention heads.*say it as heads="):
            table.to_ours(arrays, source="a.pth")
        assert table.to_ours(arrays, hints=Hints(heads=8))[0] == replace(config, heads=8)
        with pytest.raises(UserError, match="width 16 is not a multiple of heads 3"):
            table.to_ours(arrays, hints=Hints(heads=3))


def test_prefixes_and_names_of_transformers_5_are_read() -> None:
    files = HF_VIT.from_ours(random_model(HF_TINY))
    assert "vit.encoder.layer.1.attention.attention.key.weight" in files
    assert "classifier.weight" in files
    now = {
        "encoder.layer": "layers", "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj", "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    }  # fmt: skip
    modules = dict(files)
    for then, new in now.items():
        modules = {name.replace(then, new): array for name, array in modules.items()}
    assert HF_VIT.claims(modules)
    assert "vit.layers.1.attention.k_proj.weight" in modules
    hints = Hints(heads=4)
    config, expected = HF_VIT.to_ours(files, hints=hints)
    found, state = HF_VIT.to_ours(modules, hints=hints)
    assert found == config == HF_TINY
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_pooler_beside_a_classifier_is_never_asked() -> None:
    arrays = HF_VIT.from_ours(random_model(HF_TINY))
    ones = np.ones((16, 16), np.float32)
    pooler = {"vit.pooler.dense.weight": ones, "vit.pooler.dense.bias": ones[0]}
    hints = Hints(heads=4)
    assert HF_VIT.to_ours(arrays | pooler, hints=hints)[0] == HF_TINY
    body = {name: array for name, array in arrays.items() if not name.startswith("classifier.")}
    found, state = HF_VIT.to_ours(body | pooler, hints=hints)
    assert found == replace(HF_TINY, num_classes=0, pre_logits=16)
    assert state["pre_logits.weight"].eq(1.0).all()


def test_one_array_under_two_names_is_refused() -> None:
    arrays = HF_VIT.from_ours(random_model(HF_TINY))
    twice = arrays | {"vit.layers.0.mlp.fc1.bias": np.zeros(24, np.float32)}
    with pytest.raises(UserError, match="same array under two names"):
        HF_VIT.to_ours(twice, hints=Hints(heads=4))


def test_models_that_the_peers_cannot_build_are_refused() -> None:
    for table, changes, message in [
        (TIMM_VIT, {"positions": "sincos"}, "timm's ViT has learned positions only"),
        (TIMM_VIT, {"pre_logits": 8}, "no layer like pre_logits"),
        (HF_VIT, {"pool": "map"}, "not pool 'map' with positions 'learned-patches'"),
        (HF_VIT, {"positions": "learned-patches"}, "not pool 'token' with positions 'learned-patches'"),
        (HF_VIT, {"stem": ResNetStem(width=32), "patch_size": (1, 1)}, "and a ResNet stem"),
        (HF_VIT, {"pre_logits": 8}, "or a classifier, not both"),
    ]:
        with pytest.raises(UserError, match=message):
            table.from_ours(build(replace(TINY, **changes)))


def test_weights_that_average_before_the_norm_are_refused() -> None:
    arrays = TIMM_VIT.from_ours(random_model(replace(TINY, pool="gap")))
    moved = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: a for name, a in arrays.items()}
    assert TIMM_VIT.claims(moved)
    with pytest.raises(UserError, match=r"a\.pth averages tokens before the last norm \(fc_norm\)"):
        TIMM_VIT.to_ours(moved, source="a.pth")


def test_missing_left_over_and_misshapen_arrays_are_named() -> None:
    hints = Hints(heads=4)
    for table, config, one, extra in (
        (TIMM_VIT, TINY, "blocks.1.attn.proj.bias", "blocks.0.ls1.gamma"),
        (TIMM_VIT, replace(TINY, stem=ResNetStem(blocks=(1,), width=32), patch_size=(1, 1)),
         "patch_embed.backbone.stages.0.blocks.0.downsample.norm.bias", "patch_embed.backbone.norm.weight"),
        (HF_VIT, HF_TINY, "encoder.layer.1.attention.attention.key.bias", "embeddings.mask_token"),
    ):  # fmt: skip
        arrays = table.from_ours(random_model(config))
        prefix = "vit." if table is HF_VIT else ""
        with pytest.raises(UserError, match=rf"a\.pth lacks the array '{one}'"):
            table.to_ours({name: a for name, a in arrays.items() if name != prefix + one}, hints=hints, source="a.pth")
        with pytest.raises(UserError, match=f"no place for: {extra}"):
            table.to_ours(arrays | {extra: np.ones(3, np.float32)}, hints=hints)
        for name, array in arrays.items():
            for wrong in (array[..., None], np.zeros((0,) * array.ndim, np.float32), np.ones((), np.float32)):
                with pytest.raises(UserError):
                    found, state = table.to_ours(arrays | {name: wrong}, hints=hints)
                    assemble(found, state, "a.pth")


def test_files_under_their_names_load_with_no_name_given(tmp_path: Path) -> None:
    config = replace(TINY, width=64, heads=1, qkv_bias=False)  # as the ImageNet-21K-P weights: no biases
    model, images = random_model(config), torch.randn(2, 3, 12, 12)
    state = {name: torch.from_numpy(array) for name, array in TIMM_VIT.from_ours(model).items()}
    torch.save({"state_dict": state, "epoch": 80}, tmp_path / "miil.pth")
    miil = load_model(tmp_path / "miil.pth", allow_pickle=True)
    assert miil.config == config
    assert torch.equal(miil(images), model(images))
    assert (miil.preprocessing.interpolation, miil.preprocessing.std) == ("bilinear", (1.0, 1.0, 1.0))
    for names, said in (("timm", {}), ("hf", {"norm_eps": 1e-6})):
        assert export_names(model, tmp_path / "model.safetensors", names) == names
        assert torch.equal(load_model(tmp_path / "model.safetensors", **said)(images), model(images))
    resized = load_model(tmp_path / "miil.pth", allow_pickle=True, image_size=16)
    expected = resize_positions(model.state_dict()["positions"][:, 1:], (3, 3), (4, 4), "timm")
    assert torch.equal(resized.state_dict()["positions"][:, 1:], expected)  # the source's own method


def test_every_table_claims_its_own_names_only() -> None:
    official = replace(TINY, gelu="tanh")
    arrays = {
        "vit": VIT.from_ours(random_model(official)),
        "vit-published": VIT_PUBLISHED.from_ours(random_model(official)),
        "big-vision": BIG_VISION.from_ours(random_model(official)),
        "timm": TIMM_VIT.from_ours(random_model(TINY)),
        "hf": HF_VIT.from_ours(random_model(HF_TINY)),
    }
    for table in (VIT, VIT_PUBLISHED, BIG_VISION, TIMM_VIT, HF_VIT):
        assert [name for name, given in arrays.items() if table.claims(given)] == [table.name]
        assert not table.claims({}) and not table.claims({"head.weight": np.zeros((3, 3))})


def test_preprocessing_is_that_of_the_source() -> None:
    timm = TIMM_VIT.preprocessing(TINY)
    assert (timm.fit, timm.interpolation, timm.crop_fraction, timm.mean) == ("crop", "bicubic", 0.9, (0.5, 0.5, 0.5))
    assert TIMM_VIT.preprocessing(replace(TINY, image_size=(384, 384))).crop_fraction == 1.0
    miil = TIMM_VIT.preprocessing(model_config("vit-b16-21kp"))
    assert (miil.fit, miil.interpolation, miil.crop_fraction) == ("crop", "bilinear", 0.875)
    assert (miil.mean, miil.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    hf = HF_VIT.preprocessing(HF_TINY)
    assert (hf.fit, hf.interpolation, hf.mean, hf.std) == ("squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert (TIMM_VIT.position_resize, HF_VIT.position_resize) == ("timm", "hf")
