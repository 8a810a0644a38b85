"""EfficientNet computes what timm's `tf_efficientnet_*` compute, at any size, and exchanges weights with them."""

from collections.abc import Mapping
from dataclasses import replace

import efficientnet_answers
import numpy as np
import pytest
import timm
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from timm.models.efficientnet import _gen_efficientnet, _gen_efficientnet_lite
from torch import Tensor, nn
from torch.nn import functional as F

from peers.support import assert_close
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.efficientnet_names import TIMM_EFFICIENTNET
from vitrail.config.efficientnet import EFFICIENTNETS, efficientnet_config
from vitrail.models import build
from vitrail.models.base import ImageModel

TENSORFLOW = {"bn_eps": 1e-3, "bn_momentum": 0.01, "pad_type": "same"}


def peer_of(width: float, depth: float, lite: bool, num_classes: int = 7) -> nn.Module:
    """timm's network scaled by any factors, which its named variants are cases of."""
    scale = {"channel_multiplier": width, "depth_multiplier": depth, "num_classes": num_classes}
    if lite:
        return _gen_efficientnet_lite("tf_efficientnet_lite0", **scale, **TENSORFLOW)
    return _gen_efficientnet("tf_efficientnet_b0", **scale, **TENSORFLOW)


def pictures(number: int, side: tuple[int, int], seed: int = 0) -> Tensor:
    """Coarse patches of colour under noise: pictures of pure noise have all the same features."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(number, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, side) + 0.5 * torch.randn(number, 3, *side, generator=generator)


@torch.no_grad()
def speaking(peer: nn.Module, seed: int = 0) -> nn.Module:
    """Give random weights, and running statistics that keep every layer at the scale of its data, however deep."""
    shapes = {name: list(tensor.shape) for name, tensor in peer.state_dict().items()}
    arrays, _ = efficientnet_answers.fill(shapes, [1])
    peer.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    norms = [layer for layer in peer.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    peer.train()(pictures(4, (96, 96), seed))
    for norm in norms:
        norm.momentum = 0.01
    return peer.eval()


def arrays_of(peer: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in peer.state_dict().items()}


def ours_of(arrays: Mapping[str, np.ndarray]) -> ImageModel:
    return assemble(*TIMM_EFFICIENTNET.to_ours(arrays), "timm")


def assert_same_arrays(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


@torch.no_grad()
@given(
    width=st.floats(0.1, 0.7),
    depth=st.floats(0.2, 1.6),
    lite=st.booleans(),
    side=st.tuples(st.integers(32, 130), st.integers(32, 130)),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes
def test_any_width_depth_and_picture_size_gives_timms_logits(
    width: float, depth: float, lite: bool, side: tuple[int, int], seed: int
) -> None:
    peer = speaking(peer_of(width, depth, lite), seed)
    arrays = arrays_of(peer)
    model = ours_of(arrays)
    known = efficientnet_config(width, depth, lite=lite)
    assert replace(model.config, image_size=known.image_size, dropout=known.dropout) == replace(known, num_classes=7)
    assert_same_arrays(TIMM_EFFICIENTNET.from_ours(model), arrays)
    images = pictures(2, side, seed).double()
    logits = peer.double()(images)
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3  # the pictures make a difference, far above the bound
    assert_close(model.double()(images), logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "tf_efficientnet_b3", "tf_efficientnet_lite1"])
def test_a_published_size_gives_timms_logits_at_odd_picture_sizes(name: str) -> None:
    peer = speaking(timm.create_model(name))
    model = ours_of(arrays_of(peer))
    assert model.config == EFFICIENTNETS[name.removeprefix("tf_").replace("_", "-")]
    back = timm.create_model(name)
    arrays = TIMM_EFFICIENTNET.from_ours(model)
    back.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()}, strict=True)
    for network in (peer, model, back):  # float32 rounds apart with the order of numbers in memory, which is ours here
        network.double().eval()
    for side in ((65, 97), (64, 64), (33, 130)):
        images = pictures(1, side).double()
        assert_close(model(images), peer(images))
        assert_close(model.feature_map(images), peer.forward_features(images))
    assert_close(back(images), peer(images))


@pytest.mark.parametrize("name", EFFICIENTNETS)
def test_every_size_has_timms_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        peer, model = timm.create_model(f"tf_{name.replace('-', '_')}"), build(EFFICIENTNETS[name])
    # Memory that nothing touches is not taken: L2 costs no more than B0 here.
    arrays = TIMM_EFFICIENTNET.from_ours(model.to_empty(device="cpu"))
    theirs = {key: tuple(tensor.shape) for key, tensor in peer.state_dict().items()}
    assert {key: array.shape for key, array in arrays.items()} == theirs
    assert TIMM_EFFICIENTNET.to_ours(arrays)[0] == EFFICIENTNETS[name]


def test_training_moves_gradients_and_statistics_as_in_timm() -> None:
    peer = speaking(peer_of(0.3, 0.6, False)).train()
    model = ours_of(arrays_of(peer))
    model = assemble(replace(model.config, dropout=0.0, drop_path=0.0), model.state_dict(), "timm").train()
    images, targets = pictures(6, (65, 65)).double(), torch.arange(6)
    for network in (peer.double(), model.double()):
        F.cross_entropy(network(images), targets).backward()
    trained, theirs = TIMM_EFFICIENTNET.from_ours(model), arrays_of(peer.float())
    for name in theirs:
        assert_close(torch.from_numpy(trained[name]), torch.from_numpy(theirs[name]))
    ours, theirs = model.get_parameter("stem.conv.weight").grad, peer.get_parameter("conv_stem.weight").grad
    assert ours is not None and theirs is not None
    assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), bound=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("case", "lite"), [("timm", False), ("timm lite", True)])
def test_the_stored_answers_are_timms(case: str, lite: bool) -> None:
    stored = efficientnet_answers.load(case)
    peer = peer_of(0.4, 0.6, lite, num_classes=5)
    peer.load_state_dict({name: torch.from_numpy(array) for name, array in stored.arrays.items()})
    assert_close(peer.eval()(torch.from_numpy(stored.images)), torch.from_numpy(stored.logits))
