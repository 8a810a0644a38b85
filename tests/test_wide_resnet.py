"""Wide-ResNet has its published sizes and computes what the paper's figure and the recipes' code say."""

from dataclasses import replace
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.checkpoints import export_names
from vitrail.config.codec import from_json, to_json
from vitrail.config.wide_resnet import WIDE_RESNETS, WideResNetConfig
from vitrail.errors import UserError
from vitrail.layers.conv import pad_same
from vitrail.models import build
from vitrail.models.wide_resnet import WideResNet

TINY = WideResNetConfig(num_classes=5, stem_width=4, widths=(4, 6, 10), depths=(1, 2, 1), slope=0.2, norm_eps=1e-3)


def model_of(**changes: object) -> WideResNet:
    """A tiny model with every parameter and statistic away from where it starts."""
    model = build(replace(TINY, **changes))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, WideResNet)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def counted(k: int, classes: int, blocks: int = 4) -> int:
    """Parameters of WRN-28-k by table 1 of the paper: 3x3 kernels, 1x1 where widths change, two norms per block."""
    total = 3 * 16 * 9
    for stage, channels in enumerate((16, 16 * k, 32 * k)):
        out = 16 * k << stage
        total += channels * out * 9 + channels * out + (2 * blocks - 1) * out * out * 9
        total += 2 * channels + 2 * out * (2 * blocks - 1)
    return total + 2 * 64 * k + (64 * k + 1) * classes


@pytest.mark.parametrize(
    ("name", "classes", "published"),
    [
        ("wide-resnet-28-2", 10, 1.47),
        ("wide-resnet-28-2", 100, 1.47),
        ("wide-resnet-28-10", 10, 36.5),
        ("wide-resnet-28-10", 100, 36.5),
    ],
)
def test_parameters_are_as_many_as_published(name: str, classes: int, published: float) -> None:
    with torch.device("meta"):
        model = build(replace(WIDE_RESNETS[name], num_classes=classes))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == counted(int(name.split("-")[-1]), classes)
    assert parameters / 1e6 == pytest.approx(published, rel=0.01)


def test_the_sizes_have_28_convolutions_and_the_activations_of_their_recipes() -> None:
    for name, config in WIDE_RESNETS.items():
        with torch.device("meta"):
            model = build(config)
        assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 28, name
        assert from_json(WideResNetConfig, to_json(config)) == config
    student = WIDE_RESNETS["wide-resnet-28-2"]
    assert (student.slope, student.norm_eps, student.norm_momentum) == (0.2, 1e-3, 0.01)
    assert WIDE_RESNETS["wide-resnet-28-10"].slope == 0.0


def expected(model: WideResNet, images: Tensor) -> Tensor:
    """The network written once more, straight from `wrn_block` of Meta Pseudo Labels, on the model's own tensors."""
    state, config = model.state_dict(), model.config

    def before(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            state[f"{name}.norm.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (variance + config.norm_eps).sqrt() * scale + shift
        return torch.where(x > 0, x, config.slope * x)

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = state[f"{name}.weight"]
        sides = (kernel.shape[2], kernel.shape[3])
        return F.conv2d(pad_same(x, sides, (stride, stride)), kernel, stride=stride)

    x = conv(images, "stem")
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            y = before(x, f"{name}.pre1")
            changes = stride == 2 or x.shape[1] != config.widths[stage]
            shortcut = conv(y, f"{name}.shortcut", stride) if changes else x
            y = conv(before(conv(y, f"{name}.conv1", stride), f"{name}.pre2"), f"{name}.conv2")
            x = shortcut + y
    return before(x, "last").mean(dim=(2, 3)) @ state["head.weight"].T + state["head.bias"]


@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.2]), st.sampled_from([4, 6]))
def test_it_computes_what_meta_pseudo_labels_code_does(height: int, width: int, slope: float, first: int) -> None:
    model = model_of(slope=slope, widths=(first, 6, 10))
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    torch.testing.assert_close(model(images), expected(model, images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_map_is_a_quarter_of_the_picture() -> None:
    model = model_of()
    assert model.feature_map(torch.randn(1, 3, 32, 64)).shape == (1, 10, 8, 16)
    assert model.feature_map(torch.randn(1, 3, 33, 31)).shape == (1, 10, 9, 8)


def test_a_model_built_on_meta_is_wholly_initialised_as_its_recipes_do() -> None:
    with torch.device("meta"):
        model = WideResNet(replace(TINY, widths=(32, 64, 128), head_bias=-3.0))
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(77)
    model.init_weights()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.out_channels >= 32:
            deviation = sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            assert module.weight.std().item() == pytest.approx(deviation, rel=0.15), name
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all() and module.running_mean is not None
            assert module.running_mean.eq(0).all() and module.num_batches_tracked is not None
            assert module.num_batches_tracked == 0
    assert model.head is not None
    assert model.head.weight.abs().max() <= 1 / sqrt(5) and model.head.weight.std().item() > 0.2
    assert model.head.bias.eq(-3).all()


def test_drop_path_rises_from_the_first_block_to_the_last() -> None:
    rates = [block.drop_path.rate for block in model_of(drop_path=0.3).blocks()]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"widths": (8, 8)}, "one number per stage"),
        ({"slope": 1.0}, "slope must lie in"),
        ({"norm_momentum": 0.0}, "norm_momentum must lie in"),
        ({"depths": (0, 1, 1)}, "depths must be at least 1"),
    ],
)
def test_settings_that_make_no_network_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        replace(TINY, **changes)  # pyright: ignore[reportArgumentType]


def test_an_export_under_foreign_names_is_refused_by_name(tmp_path) -> None:
    with pytest.raises(UserError, match="no convention of names has a place for a WideResNet"):
        export_names(model_of(), tmp_path / "x.npz")
    with pytest.raises(UserError, match="no convention of names has a place for a WideResNet"):
        export_names(model_of(), tmp_path / "x.npz", names="timm")
