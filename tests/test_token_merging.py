"""Token merging: the pairs of the paper, sizes that count patches, and off without a trace."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitrail.checkpoints import load_model, save_model
from vitrail.config.masked import MaskedConfig
from vitrail.config.run import AugmentConfig, OptimConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.augment import Augment
from vitrail.engines.choice import disagreement
from vitrail.engines.start import start
from vitrail.errors import UserError
from vitrail.explaining.attention import patch_rollout
from vitrail.explaining.gradients import relevance
from vitrail.layers.attention import Attention, AttentionPool
from vitrail.layers.token_merging import mean_of_merged, merge_tokens
from vitrail.models import ViT, build
from vitrail.recipes.masked import MaskedLearner

CONFIG = ViTConfig(
    image_size=(24, 32), patch_size=(8, 8), width=16, depth=3, mlp_dim=32, heads=2, num_classes=5, merge_tokens=2
)
POOLS = ("token", "gap", "gap+max", "map")


@torch.no_grad()
def vit(**changes: object) -> ViT:
    torch.manual_seed(0)
    model = build(replace(CONFIG, **changes))
    assert isinstance(model, ViT)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 32)


def merged_one_by_one(x: np.ndarray, sizes: np.ndarray, keys: np.ndarray, count: int, class_token: bool) -> list[tuple]:
    """What is left of one picture's tokens, as (patches, mean), by the words of the paper's section 3.

    Tokens alternate between sets A and B; each of A draws an edge to the most similar of B; the `count` most similar
    edges are kept; connected tokens are merged by their size-weighted mean.
    """
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    edges = []
    for a in range(0, len(x), 2):
        if not (class_token and a == 0):
            b = max(range(1, len(x), 2), key=lambda b: unit[a] @ unit[b])
            edges.append((unit[a] @ unit[b], a, b))
    edges = sorted(edges, reverse=True)[: min(count, (len(x) - class_token) // 2)]
    groups = {token: [token] for token in range(len(x))}
    for _, a, b in edges:
        groups[b] += groups.pop(a)
    return sorted((sizes[g].sum(), *np.average(x[g], axis=0, weights=sizes[g])) for g in groups.values())


@given(tokens=st.integers(2, 12), count=st.integers(0, 8), class_token=st.booleans(), seed=st.integers(0, 2**16))
def test_tokens_are_merged_as_the_paper_says(tokens: int, count: int, class_token: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, keys = rng.standard_normal((3, tokens, 5)), rng.standard_normal((3, tokens, 4))
    sizes = rng.integers(1, 6, (3, tokens)).astype(float)
    tensors = torch.tensor(x), torch.tensor(sizes), torch.tensor(keys)
    found, left = merge_tokens(*tensors, count, class_token=class_token)
    assert found.shape[1] == tokens - min(count, (tokens - class_token) // 2)
    np.testing.assert_allclose(left.sum(dim=1), sizes.sum(axis=1))
    for picture in range(3):
        expected = merged_one_by_one(x[picture], sizes[picture], keys[picture], count, class_token)
        rows = sorted(tuple(row) for row in torch.cat([left[picture, :, None], found[picture]], dim=1).tolist())
        np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-9)
    if class_token:
        np.testing.assert_allclose(found[:, 0], x[:, 0])


def test_a_merged_token_is_attended_to_as_often_as_it_has_patches() -> None:
    torch.manual_seed(0)
    attention, pool = Attention(16, 2), AttentionPool(16, 2, 32, gelu="erf", eps=1e-6)
    for layer in (attention, pool):
        layer.init_weights()
    x, sizes = torch.randn(2, 3, 16), torch.tensor([[1.0, 3.0, 2.0]]).expand(2, 3)
    copies = x.repeat_interleave(torch.tensor([1, 3, 2]), dim=1)
    torch.testing.assert_close(attention.proportional(x, sizes)[0], attention(copies)[:, [0, 1, 4]])
    torch.testing.assert_close(pool(x, sizes), pool(copies))
    torch.testing.assert_close(mean_of_merged(x, sizes), copies.mean(dim=1))


@pytest.mark.parametrize("pool", POOLS)
def test_blocks_that_merge_nothing_answer_as_others_do(pool: str) -> None:
    plain, merging = vit(pool=pool, merge_tokens=0), vit(pool=pool)
    for block in merging.blocks():
        vars(block)["count"] = 0
    images = pictures()
    torch.testing.assert_close(merging(images), plain(images))


@pytest.mark.parametrize("pool", POOLS)
def test_every_block_merges_its_share(pool: str) -> None:
    model = vit(pool=pool)
    tokens, sizes = model.merged_tokens(pictures())
    patches = 12 + (pool == "token")
    assert tokens.shape[1] == patches - 2 * 3
    assert sizes.sum(dim=1).tolist() == [patches] * 2
    assert (sizes[:, 0] == 1.0).all() or pool != "token"
    assert not torch.allclose(model(pictures()), vit(pool=pool, merge_tokens=0)(pictures()))


def test_pictures_that_repeat_one_patch_lose_nothing() -> None:
    same = pictures(3)[:, :, :8, :8].repeat(1, 1, 3, 4)
    changes = {"pool": "gap", "positions": "learned-patches"}
    plain, merging = vit(**changes, merge_tokens=0), vit(**changes)
    with torch.no_grad():
        for model in (plain, merging):
            assert model.positions is not None
            model.positions.zero_()
    torch.testing.assert_close(merging(same), plain(same))


def test_it_is_a_word_when_a_model_is_loaded_and_changes_no_tensor(tmp_path: Path) -> None:
    plain = vit(merge_tokens=0)
    save_model(plain, tmp_path / "model")
    merging = load_model(tmp_path / "model", merge_tokens=2).eval()
    images = pictures()
    assert merging.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(merging(images), vit()(images))
    assert load_model(tmp_path / "model").config == plain.config
    save_model(merging, tmp_path / "merging")
    again = load_model(tmp_path / "merging", merge_tokens=0).eval()
    torch.testing.assert_close(again(images), plain(images))


def test_it_trains_and_a_merged_token_brings_gradients_to_all_its_patches() -> None:
    model, images = vit(dropout=0.1, drop_path=0.1).train(), pictures().requires_grad_()
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert images.grad is not None and (images.grad.abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("name", [pytest.param("onnx", marks=pytest.mark.slow), "openvino"])
def test_other_engines_merge_the_same_tokens(name: str) -> None:
    model, images = vit(), pictures(4)
    with torch.inference_mode():
        engine = start(name, model, images)
        for count in (4, 1):
            assert not disagreement(engine(images[:count]), model(images[:count]))


def test_what_needs_a_place_in_the_picture_refuses_merged_tokens() -> None:
    model = vit()
    labels = torch.zeros(2, dtype=torch.long)
    for ask in (
        model.tokens,
        model.feature_map,
        lambda images: list(model.attention(images)),
        lambda images: patch_rollout(model, images),
        lambda images: relevance(model, images, labels),
    ):
        with pytest.raises(UserError, match="load the model with merge_tokens=0"):
            ask(pictures())


def test_masked_pretraining_refuses_it_too() -> None:
    model, optim = vit(pool="gap"), OptimConfig(lr=1e-3)
    augment = Augment(AugmentConfig(crop="none", flip=0.0), model.preprocessing)
    with pytest.raises(UserError, match="merge_tokens=0"):
        MaskedLearner(model, MaskedConfig(), optim, augment=augment, device=torch.device("cpu"), precision="fp32")


def test_it_is_for_plain_vits() -> None:
    with pytest.raises(UserError, match="without experts"):
        replace(TINY["vit-moe"], merge_tokens=2)
    with pytest.raises(UserError, match="merge_tokens must be at least 0"):
        replace(CONFIG, merge_tokens=-1)
