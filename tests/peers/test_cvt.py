"""CvTs answer as Hugging Face's do, and weights go both ways."""

import random

import numpy as np
import pytest
import torch
from transformers import CvtConfig, CvtForImageClassification

from peers.support import assert_close, randomise
from vitrail.checkpoints.cvt_names import HF_CVT
from vitrail.checkpoints.names import Hints
from vitrail.config.cvt import CVTS, CvTConfig
from vitrail.models.cvt import CvT

Arrays = dict[str, np.ndarray]


def theirs_of(config: CvTConfig) -> CvtForImageClassification:
    """Build Hugging Face's network of a configuration."""
    stages = len(config.widths)
    later = [2] * (stages - 1)
    return CvtForImageClassification(
        CvtConfig(
            num_channels=config.channels,
            patch_sizes=[7, *(3 for _ in later)],
            patch_stride=[4, *later],
            patch_padding=[2, *(1 for _ in later)],
            embed_dim=list(config.widths),
            num_heads=list(config.heads),
            depth=list(config.depths),
            mlp_ratio=[hidden / width for hidden, width in zip(config.mlp_dims, config.widths, strict=True)],
            cls_token=[False] * (stages - 1) + [True],
            **{
                name: [value] * stages
                for name, value in {
                    "attention_drop_rate": 0.0,
                    "drop_rate": 0.0,
                    "drop_path_rate": 0.0,
                    "qkv_bias": True,
                    "qkv_projection_method": "dw_bn",
                    "kernel_qkv": 3,
                    "padding_kv": 1,
                    "stride_kv": 2,
                    "padding_q": 1,
                    "stride_q": 1,
                }.items()
            },
            num_labels=config.num_classes,
        )
    )


def drawn(seed: int) -> tuple[CvTConfig, torch.Tensor]:
    """Return a configuration of random sizes, and pictures of a random size."""
    rng = random.Random(seed)
    heads = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 4)))
    widths = tuple(count * rng.randint(2, 10) for count in heads)
    config = CvTConfig(
        channels=rng.choice([1, 3, 4]),
        num_classes=rng.randint(1, 9),
        widths=widths,
        # Hugging Face's stage s takes the drop path of its block s for all, and fails where there are fewer blocks.
        depths=tuple(stage + rng.randint(1, 2) for stage in range(len(heads))),
        heads=heads,
        mlp_dims=tuple(width * rng.randint(1, 4) for width in widths),
        gelu="erf",
    )
    size = rng.randint(3, 90), rng.randint(3, 90)
    return config, torch.randn(2, config.channels, *size, generator=torch.Generator().manual_seed(seed))


def arrays_of(module: torch.nn.Module) -> Arrays:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def ours_of(arrays: Arrays, heads: tuple[int, ...] | None = None) -> CvT:
    config, state = HF_CVT.to_ours(arrays, hints=Hints(heads=heads))
    assert isinstance(config, CvTConfig)
    model = CvT(config).eval()
    model.load_state_dict(state)
    return model


def assert_same_arrays(ours: Arrays, theirs: Arrays) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


@torch.no_grad()
@pytest.mark.parametrize("seed", range(10))
def test_their_weights_give_their_answer_here_and_come_back_bit_for_bit(seed: int) -> None:
    config, images = drawn(seed)
    theirs = randomise(theirs_of(config), seed)
    ours = ours_of(arrays_of(theirs), config.heads)
    assert ours.config == config
    assert_close(ours(images), theirs(images).logits)
    assert_same_arrays(HF_CVT.from_ours(ours), arrays_of(theirs))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(10, 16))
def test_our_weights_give_our_answer_there(seed: int) -> None:
    config, images = drawn(seed)
    ours = CvT(config)
    ours.init_weights()
    randomise(ours, seed)
    theirs = theirs_of(config).eval()
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in HF_CVT.from_ours(ours).items()})
    assert_close(ours(images), theirs(images).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["cvt-13", "cvt-21"])
def test_published_sizes_answer_alike_with_nothing_said(name: str) -> None:
    theirs = randomise(theirs_of(CVTS[name]))
    ours = ours_of(arrays_of(theirs))
    images = torch.randn(1, 3, 57, 64, generator=torch.Generator().manual_seed(0))
    assert_close(ours(images), theirs(images).logits)


@pytest.mark.parametrize("name", CVTS)
def test_published_sizes_have_the_same_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = CvT(CVTS[name]), theirs_of(CVTS[name])
    shapes, wanted = ({key: tuple(tensor.shape) for key, tensor in m.state_dict().items()} for m in (ours, theirs))
    assert {row.theirs[0]: shapes[row.ours] for row in HF_CVT._rows(CVTS[name])} == wanted
    assert len(shapes) == len(wanted)


@torch.no_grad()
def test_the_map_of_features_is_theirs_after_the_last_norm() -> None:
    config, images = drawn(3)
    theirs = randomise(theirs_of(config))
    ours = ours_of(arrays_of(theirs), config.heads)
    out = theirs.cvt(images)
    normed = theirs.layernorm(out.last_hidden_state.movedim(1, -1)).movedim(-1, 1)
    assert_close(ours.feature_map(images), normed)
    assert_close(ours.features(images), theirs.layernorm(out.cls_token_value)[:, 0])


def test_a_training_step_gives_the_same_gradients_and_statistics() -> None:
    config, images = drawn(5)
    theirs = randomise(theirs_of(config))
    ours = ours_of(arrays_of(theirs), config.heads)
    for model in (ours, theirs):
        model.train().double()  # statistics of two small pictures are no firm ground for float32
    images, labels = images.double(), torch.arange(len(images)) % config.num_classes
    for logits in (ours(images), theirs(images).logits):
        torch.nn.functional.cross_entropy(logits, labels).backward()
    wanted = dict(theirs.named_parameters())
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for row in HF_CVT._rows(config):
        (name,) = row.theirs
        if row.ours in gradients:
            assert_close(gradients[row.ours], wanted[name].grad, bound=1e-9)
        else:
            assert_close(ours.state_dict()[row.ours], theirs.state_dict()[name], bound=1e-9)
