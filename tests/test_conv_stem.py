"""The small hybrid's convolutions: filters that whiten, and what a Vision Transformer does with their features."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitrail.checkpoints import convert, load_model, save_model
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import InputConfig, RunConfig
from vitrail.config.vit import ConvStem, ViTConfig
from vitrail.data.arrays import ArraySource
from vitrail.data.base import Splits
from vitrail.errors import BrokenPicture, UserError
from vitrail.layers.attention import attend
from vitrail.layers.conv_stem import ConvolutionalStem
from vitrail.models import ViT, build
from vitrail.training.setup import build_model, some_views

TINY = ViTConfig(
    image_size=(32, 24), patch_size=(1, 1), stem=ConvStem(widths=(8, 12)), num_classes=5, width=16, depth=1, mlp_dim=24,
    heads=2, pool="gap+max",
)  # fmt: skip


def smooth(count: int = 64, channels: int = 3) -> Tensor:
    """Pictures whose neighbouring pixels and channels are alike, as those of photos are."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.randn(count, 1, 8, 8, generator=generator)
    coarse = grey + 0.3 * torch.randn(count, channels, 8, 8, generator=generator)
    fine = 0.05 * torch.randn(count, channels, 32, 32, generator=generator)
    return F.interpolate(coarse, size=(32, 32), mode="bilinear") + fine


def test_whitened_pixels_are_uncorrelated_and_of_variance_one() -> None:
    stem = ConvolutionalStem(3, 24, [8])
    stem.init_weights()
    images = smooth()
    stem.whiten(images)
    answers = F.conv2d(images, stem.whitening)[:, :12].transpose(0, 1).flatten(1)
    moments = answers @ answers.T / answers.shape[1]
    # The epsilon takes something off the weakest directions' variance, and off nothing else.
    assert float((moments - torch.diag(moments.diag())).abs().max()) < 1e-4
    assert moments.diag()[0] == pytest.approx(1.0, abs=1e-3)
    assert bool((moments.diag() <= 1.0 + 1e-4).all()) and float(moments.diag().min()) > 0.5
    assert torch.equal(stem.whitening[12:], -stem.whitening[:12])


def test_filters_beyond_the_directions_of_grey_pictures_stay_as_they_were() -> None:
    stem = ConvolutionalStem(1, 24, [8])
    stem.init_weights()
    before = stem.whitening.clone()
    stem.whiten(smooth(channels=1))
    assert torch.equal(stem.whitening[4:12], before[4:12]) and not torch.equal(stem.whitening[:4], before[:4])
    assert torch.equal(stem.whitening[12:], -stem.whitening[:12])


@pytest.mark.parametrize("side", [3, 4, 5, 8, 31, 32, 33, 65])
def test_features_are_counted_as_the_convolutions_make_them(side: int) -> None:
    config = ConvStem(widths=(4, 4) if side > 4 else (4,))
    stem = ConvolutionalStem(3, config.filters, config.widths)
    stem.init_weights()
    assert stem(torch.randn(1, 3, side, 32)).shape[2] == config.features(side)


def test_pictures_without_a_whole_feature_are_refused() -> None:
    with pytest.raises(UserError, match="smaller than one patch"):
        replace(TINY, image_size=(4, 32))


def test_mean_and_maximum_stand_side_by_side() -> None:
    model = build(TINY).eval()
    tokens = torch.randn(2, 7, 16)
    assert torch.equal(model.pooled(tokens), torch.cat([tokens.mean(1), tokens.amax(1)], dim=1))  # pyright: ignore
    assert model.head is not None and model.head.in_features == 32


def test_a_fresh_model_whitens_the_training_pictures_as_it_sees_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 24, 3), dtype=np.uint8)
    source = ArraySource(pixels, np.arange(40) % 5, tuple("abcde"))
    config = RunConfig(model=TINY, input=InputConfig(crop_fraction=1.0, mean=(0.4,), std=(0.3,)))
    model = build_model(config, Splits(train=source))
    assert isinstance(model, ViT) and isinstance(model.stem, ConvolutionalStem)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.4) / 0.3
    answers = F.conv2d(images, model.stem.whitening)[:, :12].transpose(0, 1).flatten(1)
    assert float((answers @ answers.T / answers.shape[1] - torch.eye(12)).abs().max()) < 2e-2


def test_pictures_none_of_which_can_be_read_are_counted(monkeypatch) -> None:
    source = ArraySource(np.zeros((600, 8, 8, 3), np.uint8), np.arange(600) % 5, tuple("abcde"))

    def fail(index: int) -> Tensor:
        raise BrokenPicture(f"{index} is broken")

    monkeypatch.setattr(source, "load", fail)
    with pytest.raises(UserError, match="none of the 300 training pictures tried can be read"):
        some_views(source, Preprocessing(image_size=(8, 8)))


def test_no_optimizer_moves_the_whitening_and_it_travels_with_the_weights(tmp_path: Path) -> None:
    model = build(TINY)
    assert "stem.whitening" not in dict(model.named_parameters())
    save_model(model, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model").state_dict()["stem.whitening"], model.stem.whitening)  # pyright: ignore


def test_no_foreign_convention_has_a_place_for_it(tmp_path: Path) -> None:
    save_model(build(TINY), tmp_path / "model")
    with pytest.raises(UserError, match=re.escape("save_model")):
        convert(tmp_path / "model", tmp_path / "weights.npz", names="vit")
    with pytest.raises(UserError, match=re.escape("save_model")):
        convert(tmp_path / "model", tmp_path / "weights.npz")


def test_attention_in_bfloat16_on_a_cpu_is_that_of_the_fused_kernel() -> None:
    query, key, value = torch.randn(3, 2, 4, 9, 8).unbind(0)
    fused = attend(query, key, value)
    plain = attend(query.bfloat16().requires_grad_(), key.bfloat16(), value.bfloat16()).detach()
    assert plain.dtype == torch.bfloat16
    assert float((plain.float() - fused).abs().max()) < 0.05
