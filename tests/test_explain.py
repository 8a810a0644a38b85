"""Attention, rollout and what the ViT paper's figure 7 shows, against the definitions written out."""

import math
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from families import TINY
from sklearn.decomposition import PCA
from torch import Tensor, nn

from vitrail import explaining as explain
from vitrail.config.vit import Pool, ViTConfig
from vitrail.config.wide_resnet import WideResNetConfig
from vitrail.errors import UserError
from vitrail.explaining.gradients import weighed
from vitrail.models import ImageModel, ViT, ViTMoE, WideResNet, build
from vitrail.models.vit import Block
from vitrail.models.wide_resnet import NormAct

POOLS: tuple[Pool, ...] = ("token", "gap", "map")


def tiny_vit(pool: Pool = "token", **changes: object) -> ViT:
    settings = {"image_size": (12, 8), "patch_size": (4, 4), "channels": 3, "num_classes": 5, "pool": pool}
    settings |= {"width": 16, "depth": 3, "mlp_dim": 32, "heads": 2}
    torch.manual_seed(0)
    model = ViT(ViTConfig(**(settings | changes)))  # pyright: ignore[reportArgumentType]
    model.init_weights()
    return model.eval()


def lively(model: ViT) -> ViT:
    """The model with all parameters drawn anew, in double precision: a fresh head is zero and says nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def randomised(family: str) -> ImageModel:
    torch.manual_seed(0)
    model = build(TINY[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
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
    with pytest.raises(UserError, match="for ViT, not for EfficientNet"):
        explain.position_similarity(randomised("efficientnet"))
    with pytest.raises(UserError, match="EfficientNet has no attention"):
        next(explain.attention_views(randomised("efficientnet"), pictures()))
    with pytest.raises(UserError, match="ViT has no experts"):
        explain.expert_maps(tiny_vit(), pictures())
    with pytest.raises(UserError, match="features of convolutions, which ViT does not have"):
        explain.grad_cam(tiny_vit(), pictures(1), torch.tensor([0]))


def slow_rollout(maps: np.ndarray, pooling: np.ndarray) -> np.ndarray:
    """Rollout of one picture, token by token: every token is half itself and half what it attends to."""
    layers, heads, tokens, _ = maps.shape
    arrived = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
    for layer in range(layers):
        before, arrived = arrived, [[0.0] * tokens for _ in range(tokens)]
        for i in range(tokens):
            for j in range(tokens):
                share = math.fsum(maps[layer, head, i, j] for head in range(heads)) / heads
                for k in range(tokens):
                    arrived[i][k] += 0.5 * share * before[j][k]
            for k in range(tokens):
                arrived[i][k] += 0.5 * before[i][k]
    return np.array([math.fsum(pooling[i] * arrived[i][k] for i in range(tokens)) for k in range(tokens)])


@pytest.mark.parametrize("pool", POOLS)
def test_rollout_agrees_with_a_slow_one(pool: Pool) -> None:
    model, images = tiny_vit(pool), pictures(1)
    with torch.no_grad():
        maps = np.stack([weights[0].double().numpy() for weights in model.attention(images)])
    expected = slow_rollout(maps, explain.pooling_weights(model, images)[0].double().numpy())
    found = explain.rollout(model.attention(images), explain.pooling_weights(model, images))[0]
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        explain.patch_rollout(model, images).flatten().numpy(), expected[-6:] / expected[-6:].sum(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (46, 35)])
@pytest.mark.parametrize("family", ["vit", "hybrid", "vit-moe", "cvt", "coatnet"])
def test_where_heads_look_is_where_the_family_has_its_keys(family: str, size: tuple[int, int]) -> None:
    model = randomised(family)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = list(model.attention(images))
    views = list(explain.attention_views(model, images))
    assert len(views) == len(maps)
    for number, (view, weights) in enumerate(zip(views, maps, strict=True)):
        class_token = family != "coatnet" and (family != "cvt" or number >= 2)
        expected = weights[:, :, 0, 1:] if class_token else weights.mean(dim=2)
        torch.testing.assert_close(view.flatten(2), expected)
        assert abs(view.shape[2] / view.shape[3] - size[0] / size[1]) < 0.7  # as tall and broad as the picture


def test_attention_pooling_looks_where_its_probe_does() -> None:
    model, images = tiny_vit("map"), pictures()
    assert model.attention_pool is not None
    seen = explain.pooling_views(model, images)
    assert seen is not None and explain.pooling_views(tiny_vit(), images) is None
    torch.testing.assert_close(seen.flatten(2), model.attention_pool.weights(model.tokens(images))[:, :, 0])


def slow_relevance(model: ViT, image: Tensor, label: int) -> Tensor:
    """Chefer et al. on one picture: attention written out, its probabilities in the graph, a loop over heads."""
    x, probabilities = model.embed(image[None]).detach(), []

    def split(block_qkv: Tensor, heads: int) -> Tensor:
        return block_qkv.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, -1)
        probabilities.append(weights)
        return (weights @ value).transpose(1, 2).flatten(2)

    def forward(x: Tensor) -> Tensor:
        for number, block in enumerate(blocks(model)):
            parts = block.attention.qkv(block.norm1(x)).chunk(3, dim=-1)
            x = x + block.attention.out(attend(*(split(part, block.attention.heads) for part in parts)))
            y = block.mlp(block.norm2(x))
            x = x + (y[0] if number in getattr(model.config, "moe_layers", ()) else y)
        tokens = model.norm(x)
        if model.attention_pool is None:
            return model.head(model.pooled(tokens))
        pool = model.attention_pool
        key, value = pool.key_value(tokens).chunk(2, dim=-1)
        query = pool.query(pool.probe)
        y = pool.out(attend(split(query, pool.heads), split(key, pool.heads), split(value, pool.heads)))
        return model.head((y + pool.mlp(pool.norm(y)))[:, 0])

    score = forward(x)[0, label]
    gradients = torch.autograd.grad(score, probabilities)
    total = torch.eye(x.shape[1], dtype=x.dtype)
    for weights, slope in zip(probabilities[: model.config.depth], gradients, strict=False):
        mean = torch.zeros_like(weights[0, 0])
        for head in range(weights.shape[1]):
            mean += (weights[0, head] * slope[0, head]).clamp(min=0) / weights.shape[1]
        total = total + mean.detach() @ total
    if model.attention_pool is not None:
        row = (probabilities[-1] * gradients[-1])[0].clamp(min=0).mean(0)[0] @ total
    else:
        row = explain.pooling_weights(model, image[None])[0] @ (total - torch.eye(len(total)))
    rows, columns = model.config.grid_at((image.shape[1], image.shape[2]))
    return row[-rows * columns :].detach().view(rows, columns)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("pool", ["token", "gap", "gap+max", "map"])
def test_relevance_agrees_with_attention_written_out(pool: Pool, frozen: bool) -> None:
    model, images = lively(tiny_vit(pool)), pictures().double()
    model.requires_grad_(not frozen)
    with torch.no_grad():  # as a person would look at a model
        found = explain.relevance(model, images, torch.tensor([3, 1]))
    model.requires_grad_()
    for place, label in enumerate((3, 1)):
        expected = slow_relevance(model, images[place], label)
        assert expected.max() > 0
        torch.testing.assert_close(found[place], expected, rtol=1e-9, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_relevance_goes_through_mixtures_of_experts() -> None:
    model = cast(ViT, randomised("vit-moe").double())
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = explain.relevance(model, images, torch.tensor([2]))[0]
    torch.testing.assert_close(found, slow_relevance(model, images[0], 2), rtol=1e-4, atol=1e-7)


def test_attention_is_weighted_by_the_gradient_that_speaks_for_the_class() -> None:
    """One query, three keys, two heads: by hand, (0.5 * 2 + 0) / 2, (0 + 0) / 2 and (0.25 * 4 + 0.5 * 2) / 2."""
    attention = torch.tensor([[[[0.5, 0.25, 0.25]], [[0.25, 0.25, 0.5]]]])
    gradients = torch.tensor([[[[2.0, -1.0, 4.0]], [[-4.0, 0.0, 2.0]]]])
    torch.testing.assert_close(weighed(attention, gradients), torch.tensor([[[0.5, 0.0, 1.0]]]))


class Fixed(nn.Module):
    """Features that are known, whatever comes in."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features + 0.0 * x.sum()


def test_grad_cam_of_two_channels_is_that_worked_out_by_hand() -> None:
    """y = 3 mean(A1) - 2 mean(A2): gradients are 3/4 and -2/4 everywhere, so the map is relu(3 A1 - 2 A2) / 4."""
    model = WideResNet(
        WideResNetConfig(image_size=(8, 8), num_classes=2, stem_width=2, widths=(2, 2, 2), depths=(1, 1, 1))
    )
    model.init_weights()
    first, second = torch.tensor([[4.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    model.last = cast(NormAct, Fixed(torch.stack([first, second])[None]))
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[9.0, 9.0], [3.0, -2.0]]))
    found = explain.grad_cam(model.eval(), torch.zeros(1, 3, 8, 8), torch.tensor([1]))
    torch.testing.assert_close(found, torch.tensor([[[3.0, 0.0], [0.25, 0.0]]]))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("cvt", "stages.2.patch_embed.conv"),
        ("coatnet", "stages.1.0"),
        ("efficientnet", "last"),
        ("wide-resnet", "last"),
    ],
)
def test_grad_cam_agrees_with_differences(family: str, name: str) -> None:
    """The gradient of the last features of convolutions, by nudging each of them; then the paper's two equations."""
    model, step = randomised(family).double(), 1e-5
    generator = torch.Generator().manual_seed(1)
    side = 16 if family == "wide-resnet" else 64  # it keeps a quarter of them, the others a 16th or 32nd
    images = torch.randn(1, 3, side, side, dtype=torch.float64, generator=generator)
    module, seen, nudges = model.get_submodule(name), list[Tensor](), torch.zeros(1, dtype=torch.float64)

    def nudged(features: Tensor) -> Tensor:
        seen.append(features)
        return features + nudges

    if family == "cvt":  # this convolution reads them
        handle = module.register_forward_pre_hook(lambda module, arguments: (nudged(arguments[0]),))
    else:
        handle = module.register_forward_hook(lambda module, arguments, answer: nudged(answer))
    with torch.no_grad():
        model(images)
        features = seen[0][0]
        each = step * torch.eye(features.numel(), dtype=torch.float64).view(-1, *features.shape)
        slopes = []
        for some in each.split(128):
            nudges = torch.cat([some, -some])  # every feature up in one picture of a batch, and down in another
            up, down = model(images.expand(len(nudges), -1, -1, -1)).chunk(2)
            slopes.append((up - down) / (2 * step))
    handle.remove()
    weights = torch.cat(slopes).T.unflatten(1, features.shape).mean(dim=(2, 3))
    expected = torch.einsum("kc,chw->khw", weights, features).clamp(min=0)
    assert expected.max() > 0
    found = explain.grad_cam(model, images.expand(5, -1, -1, -1), torch.arange(5))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7 * expected.max().item())


@pytest.mark.parametrize(("cells", "window"), [((3, 2), 1), ((4, 4), 2), ((5, 3), 3), (None, 2)])
@pytest.mark.parametrize("multi_label", [False, True])
def test_occlusion_agrees_with_a_loop(cells: tuple[int, int] | None, window: int, multi_label: bool) -> None:
    model, image, label = lively(tiny_vit()).float(), pictures(1)[0], 3
    model.multi_label = multi_label
    rows, columns = cells or (3, 2)  # 12 x 8 pixels, in cells of 4
    top, left = [round(12 * i / rows) for i in range(rows + 1)], [round(8 * i / columns) for i in range(columns + 1)]

    @torch.no_grad()
    def sure(picture: Tensor) -> float:
        logits = model(picture[None])[0].double()
        return float(torch.sigmoid(logits[label]).log() if multi_label else torch.softmax(logits, 0)[label].log())

    expected = np.zeros((rows, columns))
    for row in range(-window + 1, rows):
        for column in range(-window + 1, columns):
            covered = [
                (i, j)
                for i in range(max(row, 0), min(row + window, rows))
                for j in range(max(column, 0), min(column + window, columns))
            ]
            hidden = image.clone()
            for i, j in covered:
                hidden[:, top[i] : top[i + 1], left[j] : left[j + 1]] = 0.0
            for place in covered:
                expected[place] += (sure(image) - sure(hidden)) / window**2
    found = explain.occlusion(model, image[None], torch.tensor([label]), cells=cells, window=window, batch_size=5)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


def test_expert_maps_are_the_routing_of_the_patches_and_show_what_was_dropped() -> None:
    config = replace(TINY["vit-moe"], moe_layers=(0, 1), capacity_factor=0.5, experts_per_token=2)
    model = build(config).eval()
    assert isinstance(model, ViTMoE)
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(1))
    maps = explain.expert_maps(model, images)
    with torch.no_grad():
        _, routings = model.encode(images)
    assert set(maps) == {0, 1}
    for number, found in maps.items():
        assert found.experts.shape == (2, 2, 3, 5)
        # the patch in row 1, column 2 is token 1 + 1 * 5 + 2
        assert found.experts[1, :, 1, 2].tolist() == routings[number].experts[1, 8].tolist()
        assert found.gates[1, :, 1, 2].tolist() == routings[number].gates[1, 8].tolist()
        assert not found.kept.all() and found.kept.sum() == routings[number].kept[:, 1:].sum()


@pytest.mark.parametrize(("method", "family"), [("relevance", "vit"), ("grad_cam", "cvt"), ("occlusion", "coatnet")])
def test_a_class_cannot_be_explained_without_a_classifier(method: str, family: str) -> None:
    model = build(replace(TINY[family], num_classes=0)).eval()
    with pytest.raises(UserError, match="has no classifier"):
        getattr(explain, method)(model, torch.zeros(1, 3, 32, 32), torch.tensor([0]))


EXPECTED = {
    "vit": "relevance rollout attention positions filters distance",
    "hybrid": "relevance rollout attention positions filters distance",
    "convolutional hybrid": "relevance rollout attention positions distance",  # its filters have 2 x 2 pixels
    "vit-moe": "relevance rollout experts attention positions filters distance",
    "cvt": "gradcam occlusion attention filters",
    "coatnet": "gradcam occlusion attention",
    "efficientnet": "gradcam",
    "wide-resnet": "gradcam",
}


@pytest.mark.parametrize("family", TINY)
def test_the_default_shows_what_a_family_has(family: str) -> None:
    model = randomised(family)
    assert " ".join(explain.choose_methods(model)) == EXPECTED[family]
    headless = build(replace(model.config, num_classes=0))
    assert not {"relevance", "gradcam", "occlusion"} & set(explain.choose_methods(headless))


def test_what_cannot_be_shown_is_told_with_what_can() -> None:
    model = randomised("efficientnet")
    with pytest.raises(UserError, match=r"is for ViT, not for EfficientNet\. Of this model there are: gradcam"):
        explain.choose_methods(model, ["occlusion", "rollout"])
    with pytest.raises(UserError, match=r"no method 'grad-cam'\. Did you mean 'gradcam'"):
        explain.choose_methods(model, ["grad-cam"])
    with pytest.raises(UserError, match="filters of 3 x 3 pixels"):
        explain.choose_methods(model, ["filters"])
    with pytest.raises(UserError, match="relevance explains a class, and this ViT has no classifier"):
        explain.choose_methods(tiny_vit(num_classes=0), ["relevance"])
    assert explain.choose_methods(model, ["occlusion", "gradcam"]) == ("gradcam", "occlusion")


def test_views_of_attention_have_no_graph_and_leave_the_readers_gradients_on() -> None:
    for view in explain.attention_views(randomised("vit"), pictures()):
        assert not view.requires_grad
        assert torch.is_grad_enabled()


def test_merged_tokens_have_no_place_to_be_shown_at() -> None:
    model = tiny_vit(merge_tokens=1)
    assert not {"relevance", "rollout", "attention", "distance"} & set(explain.choose_methods(model))
    with pytest.raises(UserError, match="merge_tokens=0"):
        explain.choose_methods(model, ["rollout"])
