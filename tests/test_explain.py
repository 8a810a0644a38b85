"""Attention, rollout and what the ViT paper's figure 7 shows, against the definitions written out."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from vitrail import explain
from vitrail.config.vit import Pool, ViTConfig
from vitrail.errors import UserError
from vitrail.models import ViT
from vitrail.models.base import ImageModel
from vitrail.models.vit import Block

POOLS: tuple[Pool, ...] = ("token", "gap", "map")


def tiny_vit(pool: Pool = "token", **changes: object) -> ViT:
    settings = {"image_size": (12, 8), "patch_size": (4, 4), "channels": 3, "num_classes": 5, "pool": pool}
    settings |= {"width": 16, "depth": 3, "mlp_dim": 32, "heads": 2}
    torch.manual_seed(0)
    model = ViT(ViTConfig(**(settings | changes)))  # pyright: ignore[reportArgumentType]
    model.init_weights()
    return model.eval()


def blocks(model: ViT) -> list[Block]:
    return cast(list[Block], list(model.encoder))


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 12, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pool", POOLS)
def test_attention_maps_are_those_the_fused_path_uses(pool: Pool) -> None:
    model, images = tiny_vit(pool), pictures()
    with torch.no_grad():
        maps = torch.stack(list(model.attention(images)))
    tokens = 6 + (pool == "token")
    assert maps.shape == (3, 2, 2, tokens, tokens)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, 2, tokens))
    # With the maps in hand, the encoder's output can be computed without any fused kernel.
    x = model.embed(images)
    for block, weights in zip(blocks(model), maps, strict=True):
        values = block.attention.qkv(block.norm1(x)).chunk(3, dim=-1)[2].unflatten(-1, (2, 8)).transpose(1, 2)
        x = x + block.attention.out((weights @ values).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model.norm(x), model.tokens(images))


def test_looking_at_attention_leaves_the_model_as_it_was() -> None:
    model, images = tiny_vit(), pictures()
    before = model(images)
    explain.patch_rollout(model, images)
    assert not any(module._forward_hooks for module in model.modules())
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_rollout_of_two_layers_is_the_product_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    maps = rng.random((2, 1, 3, 4, 4))
    maps /= maps.sum(-1, keepdims=True)
    first, second = (0.5 * maps[layer, 0].mean(0) + 0.5 * np.eye(4) for layer in (0, 1))
    expected = (second @ first)[0]
    class_token = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(explain.rollout(torch.from_numpy(maps), class_token)[0], torch.from_numpy(expected))


def test_rollout_without_mixing_stays_where_the_pooling_looks() -> None:
    identity = torch.eye(5).expand(4, 2, 3, 5, 5)
    pooling = torch.rand(2, 5).softmax(-1)
    torch.testing.assert_close(explain.rollout(identity, pooling), pooling)
    torch.testing.assert_close(explain.rollout([], pooling), pooling)


def test_rollout_of_uniform_attention_is_uniform_over_patches() -> None:
    model = tiny_vit("gap")
    for block in blocks(model):
        nn.init.zeros_(block.attention.qkv.weight)
    torch.testing.assert_close(explain.patch_rollout(model, pictures()), torch.full((2, 3, 2), 1 / 6))


@pytest.mark.parametrize("pool", POOLS)
def test_pooling_weights_turn_tokens_into_what_the_head_sees(pool: Pool) -> None:
    model, images = tiny_vit(pool), pictures()
    weights, tokens = explain.pooling_weights(model, images), model.tokens(images)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    if pool == "map":
        assert model.attention_pool is not None
        torch.testing.assert_close(weights, model.attention_pool.weights(tokens).mean(1)[:, 0])
    else:
        torch.testing.assert_close((weights[..., None] * tokens).sum(1), model.features(images))
    assert explain.patch_rollout(model, images).shape == (2, 3, 2)


def test_half_of_what_mean_and_maximum_see_is_where_the_maxima_are() -> None:
    model, images = tiny_vit("gap+max"), pictures()
    tokens = model.tokens(images)
    highest = torch.stack([torch.bincount(one.argmax(0), minlength=6) for one in tokens]) / 16
    torch.testing.assert_close(explain.pooling_weights(model, images), (1 / 6 + highest) / 2)


def test_rollout_follows_the_grid_of_a_picture_of_another_size() -> None:
    larger = torch.randn(1, 3, 16, 20)
    assert explain.patch_rollout(tiny_vit(), larger).shape == (1, 4, 5)


def test_attention_distance_of_known_maps_is_in_pixels() -> None:
    grid, patch = (2, 3), (4, 10)
    stay = torch.eye(7).expand(1, 1, 1, 7, 7)  # a class token and six patches
    assert explain.attention_distance(stay, grid, patch).tolist() == [[0.0]]
    to_corner = torch.zeros(1, 1, 1, 7, 7)
    to_corner[..., 1] = 1.0  # every token looks at the first patch
    expected = np.mean([math.hypot(4 * row, 10 * column) for row in range(2) for column in range(3)])
    assert explain.attention_distance(to_corner, grid, patch).item() == pytest.approx(expected)
    # Half of the attention on the class token changes nothing: it has no place.
    shared = 0.5 * to_corner
    shared[..., 0] = 0.5
    assert explain.attention_distance(shared, grid, patch).item() == pytest.approx(expected)


def test_attention_distance_has_a_row_per_layer_and_a_column_per_head() -> None:
    model = tiny_vit()
    distance = explain.attention_distance(model.attention(pictures()), (3, 2), (4, 4))
    assert distance.shape == (3, 2)
    assert (distance > 0).all()
    assert (distance < math.hypot(8, 4)).all()


@pytest.mark.parametrize("positions", ["learned", "learned-patches", "sincos"])
def test_position_similarity_is_the_cosine_of_two_rows(positions: str) -> None:
    model = tiny_vit(positions=positions)
    similarity = explain.position_similarity(model)
    assert similarity.shape == (3, 2, 3, 2)
    rows = model.position_rows((3, 2))[1][0]
    expected = torch.cosine_similarity(rows[1], rows[4], dim=0)  # (0, 1) and (2, 0)
    torch.testing.assert_close(similarity[0, 1, 2, 0], expected)
    torch.testing.assert_close(similarity.reshape(6, 6).diagonal(), torch.ones(6))


def test_patch_filters_are_the_principal_components() -> None:
    model = tiny_vit(width=64)
    nn.init.normal_(model.patch_embed.weight)
    filters = explain.patch_filters(model, count=10)
    assert filters.shape == (10, 3, 4, 4)
    expected = PCA(10).fit(model.patch_embed.weight.detach().flatten(1).numpy()).components_
    cosine = (filters.flatten(1).numpy() * expected).sum(1)
    np.testing.assert_allclose(np.abs(cosine), 1.0, atol=1e-4)
    assert (filters.flatten(1).max(1).values == filters.flatten(1).abs().max(1).values).all()
    assert explain.patch_filters(tiny_vit(channels=1)).shape == (16, 1, 4, 4)


def test_models_without_such_attention_are_refused() -> None:
    class Other(ImageModel):
        features = feature_map = forward = blocks = depth_of = init_weights = None  # pyright: ignore[reportAssignmentType]

    for figure in (explain.position_similarity, explain.patch_filters):
        with pytest.raises(UserError, match="for a ViT, not for a Other"):
            figure(Other(ViTConfig()))
