"""Networks train as their peers do: from the same weights, the same losses, gradients and weights after every step."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import timm.layers
import torch
from timm.models.efficientnet import _gen_efficientnet, _gen_efficientnet_lite
from timm.models.maxxvit import MaxxVit
from torch import Tensor, nn
from torch.nn import functional as F

from peers.support import randomise
from peers.test_coatnet import TIMM, cfg_of
from peers.test_cvt import theirs_of as theirs_of_cvt
from peers.test_efficientnet import TENSORFLOW
from peers.test_vit import timm_model, without_epsilons
from vitrail.checkpoints.foreign import to_arrays
from vitrail.config.cvt import CvTConfig
from vitrail.config.efficientnet import efficientnet_config
from vitrail.config.model import ModelConfig
from vitrail.config.vit import ResNetStem, ViTConfig
from vitrail.layers.residual import DropPath
from vitrail.models import ImageModel, build

CLASSES = 5
Pair = tuple[ModelConfig, nn.Module]
VIT = ViTConfig(
    image_size=(24, 24), patch_size=(8, 8), num_classes=CLASSES, width=24, depth=3, mlp_dim=40, heads=2, gelu="erf"
)
COATNET = replace(
    TIMM, image_size=(64, 64), num_classes=CLASSES, widths=(8, 8, 12, 16, 24), depths=(1, 2, 2, 1), head_dim=8
)
CVT = CvTConfig(
    image_size=(40, 40),
    num_classes=CLASSES,
    widths=(8, 16, 24),
    depths=(1, 2, 3),
    heads=(1, 2, 3),
    mlp_dims=(16, 32, 48),
    gelu="erf",
)


# Small members of families, each with the same network of its peer. Keywords change the configuration.


def vit_pair(**changes: object) -> Pair:
    config = replace(VIT, **changes)
    rates = {"pos_drop_rate": config.dropout, "proj_drop_rate": config.dropout, "drop_path_rate": config.drop_path}
    return config, timm_model(config, **rates)


def efficientnet_pair(width: float = 0.2, depth: float = 0.4, lite: bool = False, **changes: object) -> Pair:
    plain = {"image_size": (40, 40), "num_classes": CLASSES, "dropout": 0.0, "drop_path": 0.0}
    config = replace(efficientnet_config(width, depth, lite=lite), **(plain | changes))
    generate, name = (_gen_efficientnet_lite, "lite0") if lite else (_gen_efficientnet, "b0")
    scale = {"channel_multiplier": width, "depth_multiplier": depth, "num_classes": config.num_classes}
    rates = {"drop_rate": config.dropout, "drop_path_rate": config.drop_path}
    return config, generate(f"tf_efficientnet_{name}", **scale, **rates, **TENSORFLOW)


def coatnet_pair(**changes: object) -> Pair:
    config = replace(COATNET, **changes)
    options = {"img_size": config.image_size, "num_classes": config.num_classes, "drop_path_rate": config.drop_path}
    return config, MaxxVit(cfg_of(config), **options)


def cvt_pair(**changes: object) -> Pair:
    config = replace(CVT, **changes)
    return config, theirs_of_cvt(config)


PAIRS = {
    "ViT": vit_pair,
    "ViT with attention pooling": lambda: vit_pair(pool="map", gelu="tanh"),
    "hybrid": lambda: vit_pair(stem=ResNetStem(blocks=(1, 1), width=32), patch_size=(1, 1)),
    "EfficientNet": efficientnet_pair,
    "EfficientNet-Lite": lambda: efficientnet_pair(lite=True),
    "CoAtNet": coatnet_pair,
    "CoAtNet of the paper": lambda: coatnet_pair(downsample="max", stride_in="expand"),
    "CvT": cvt_pair,
}


def started_alike(config: ModelConfig, theirs: nn.Module) -> tuple[ImageModel, nn.Module]:
    """Return our network and its peer with the same weights, in double precision and training mode."""
    ours = without_epsilons(randomise(build(config)))
    theirs.load_state_dict(under_their_names(ours))
    return ours.double().train(), theirs.double().train()


def under_their_names(model: ImageModel) -> dict[str, Tensor]:
    names = "hf" if isinstance(model.config, CvTConfig) else "timm"
    return {name: torch.from_numpy(array) for name, array in to_arrays(model, names).items()}


def gradients_of(model: ImageModel) -> dict[str, Tensor]:
    """Return gradients in the place of weights, under the peer's names."""
    copied = deepcopy(model)
    for target, source in zip(copied.parameters(), model.parameters(), strict=True):
        assert source.grad is not None
        target.data = source.grad
    return under_their_names(copied)


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    answer = network(images)
    return answer if isinstance(answer, Tensor) else answer.logits


def batches(config: ModelConfig, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        images = torch.randn(8, config.channels, *config.image_size, generator=generator, dtype=torch.double)
        yield images, torch.randint(CLASSES, (8,), generator=generator)


def assert_alike(ours: Tensor, theirs: Tensor, scale: float, what: str) -> None:
    difference = float((ours - theirs).detach().abs().max())
    assert difference <= 1e-6 * scale, f"{what} differs by {difference:.1e} at a scale of {scale:.1e}"


@pytest.mark.parametrize("family", PAIRS)
def test_losses_gradients_and_weights_stay_with_the_peers(family: str) -> None:
    config, theirs = PAIRS[family]()
    ours, theirs = started_alike(config, theirs)
    optimizers = [torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05) for network in (ours, theirs)]
    for step, (images, targets) in enumerate(batches(config, 4)):
        losses = [F.cross_entropy(logits_of(network, images), targets) for network in (ours, theirs)]
        assert_alike(losses[0], losses[1], losses[1].item(), f"loss of step {step}")
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        gradients = gradients_of(ours)
        sizes = {name: parameter.grad.abs().max().item() for name, parameter in theirs.named_parameters()}
        least = 1e-3 * max(sizes.values())  # some, such as a key's bias, are nothing but rounding
        for name, parameter in theirs.named_parameters():
            assert_alike(gradients[name], parameter.grad, max(sizes[name], least), f"gradient of {name}, step {step},")
        for optimizer in optimizers:
            optimizer.step()
    weights = under_their_names(ours)
    for name, tensor in theirs.state_dict().items():  # statistics and counters of BatchNorm among them
        assert_alike(weights[name], tensor, max(1.0, float(tensor.abs().max())), name)


class WholeBranches:
    """In place of dropout and of stochastic depth: zeroes whole pictures of a branch, the same ones for both networks.

    Masks that are the same at the same call show where a network drops and how much, whatever the tensors' layout.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rates: list[float] = []
        monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: self.drop(x, p, training))
        monkeypatch.setattr(DropPath, "forward", lambda layer, x: self.drop(x, layer.rate, layer.training))
        theirs = timm.layers.DropPath
        monkeypatch.setattr(theirs, "forward", lambda layer, x: self.drop(x, layer.drop_prob, layer.training))

    def drop(self, x: Tensor, rate: float, training: bool) -> Tensor:
        if not training or not rate:
            return x
        self.rates.append(round(rate, 6))
        generator = torch.Generator().manual_seed(len(self.rates))
        kept = torch.rand(len(x), generator=generator) >= rate
        return x * kept.to(x).reshape(-1, *(1,) * (x.ndim - 1)) / (1 - rate)


# Dropout of two families stands as in the authors' code, and elsewhere in the peer: timm's CoAtNet has none after a
# feed-forward network; Hugging Face's CvT none inside it, and one before the class token joins, not after.
@pytest.mark.parametrize(
    "pair",
    [
        partial(vit_pair, dropout=0.3, drop_path=0.4),
        partial(efficientnet_pair, dropout=0.3, drop_path=0.4),
        partial(coatnet_pair, drop_path=0.4),
    ],
    ids=["ViT", "EfficientNet", "CoAtNet"],
)
def test_dropout_and_stochastic_depth_stand_where_the_peers_do(
    pair: Callable[[], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, theirs = pair()
    ours, theirs = started_alike(config, theirs)
    losses, rates = [], []
    images, targets = next(batches(config, 1))
    for network in (ours, theirs):
        dropped = WholeBranches(monkeypatch)
        losses.append(F.cross_entropy(logits_of(network, images), targets))
        rates.append(dropped.rates)
    assert rates[0] == rates[1]
    assert len(rates[0]) >= 4
    assert_alike(losses[0], losses[1], losses[1].item(), "loss")
