"""What timm and transformers write for the hub is read as they read it: the same view of a picture, the same logits."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from torch import nn
from transformers import (
    ConvNextImageProcessor,
    CvtConfig,
    CvtForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from peers.support import assert_close, randomise
from vitrail.checkpoints.hub import HubFiles, load_files
from vitrail.data.view import evaluation_view

SIZES = [(300, 450), (450, 300), (200, 800), (256, 256)]
"""Of pictures, height and width: in whole proportions, which leave the peers the least to round."""


def files_of(folder: Path) -> HubFiles:
    """Return a folder as if it had been fetched."""
    preprocessor = folder / "preprocessor_config.json"
    return HubFiles(
        source="hf:owner/name",
        commit="0" * 40,
        config=folder / "config.json",
        preprocessor=preprocessor if preprocessor.exists() else None,
        weights=(folder / "model.safetensors",),
        sha256={},
    )


def smooth_picture(height: int, width: int) -> np.ndarray:
    """A picture of a few soft spots, in which half a pixel of the view is two levels."""
    spots = np.random.default_rng(0).integers(40, 215, size=(5, 5, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC))


def assert_same_view(ours: torch.Tensor, theirs: torch.Tensor, std: tuple[float, ...]) -> None:
    """Fail unless views agree to what rounding to whole pixels and levels explains.

    The peers round sides and corners to whole pixels; sizes here leave no half pixel to the corners.
    """
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().mean()) * 255 * max(std) < 1.0


@torch.no_grad()
def assert_same_logits(ours: nn.Module, theirs: nn.Module, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size)
    answer = theirs(images)
    assert_close(ours(images), answer if isinstance(answer, torch.Tensor) else answer.logits)


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"])
def test_a_vit_of_transformers(act: str, tmp_path: Path) -> None:
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64,
        hidden_act=act, layer_norm_eps=1e-3, num_labels=5, id2label={i: f"kind {i}" for i in range(5)},
    )  # fmt: skip
    theirs = randomise(ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    ours = load_files(files_of(tmp_path), {})
    assert ours.labels == ("kind 0", "kind 1", "kind 2", "kind 3", "kind 4")
    assert_same_logits(ours, theirs, (32, 32))
    for size in SIZES:
        picture = smooth_picture(*size)
        view = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
        assert_same_view(evaluation_view(picture, ours.preprocessing), view, ours.preprocessing.std)


@pytest.mark.parametrize(("side", "crop"), [(64, 0.8), (64, 0.94), (384, 0.875)])
def test_a_cvt_of_transformers(side: int, crop: float, tmp_path: Path) -> None:
    config = CvtConfig(embed_dim=[16, 24, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=4)
    theirs = randomise(CvtForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    processor = ConvNextImageProcessor(size={"shortest_edge": side}, crop_pct=crop)
    processor.save_pretrained(tmp_path)
    ours = load_files(files_of(tmp_path), {})
    assert ours.config.image_size == (side, side)
    assert_same_logits(ours, theirs, (64, 64))
    for size in SIZES:
        picture = smooth_picture(*size)
        view = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
        assert_same_view(evaluation_view(picture, ours.preprocessing), view, ours.preprocessing.std)


@pytest.mark.parametrize(
    ("name", "arguments", "view"),
    [
        ("test_vit", {}, {}),
        ("test_vit", {"img_size": 96, "act_layer": "gelu_tanh"}, {"crop_pct": 0.8, "interpolation": "bilinear"}),
        ("test_vit", {"num_classes": 7}, {"crop_pct": 1.0, "crop_mode": "squash"}),
        ("test_vit", {}, {"crop_pct": 1.0, "crop_mode": "border", "mean": (0.1, 0.5, 0.9)}),
        ("tf_efficientnet_lite0", {"num_classes": 7}, {}),
    ],
)
def test_a_model_of_timm(name: str, arguments: dict, view: dict, tmp_path: Path) -> None:
    theirs = randomise(timm.create_model(name, **arguments))
    save_for_hf(theirs, tmp_path, safe_serialization=True, data_config=view)
    ours = load_files(files_of(tmp_path), {})
    assert_same_logits(ours, theirs, ours.config.image_size)
    data = resolve_data_config(args={"input_size": (3, *ours.config.image_size), **view}, model=theirs)
    transform = create_transform(**data)
    for size in SIZES:
        picture = smooth_picture(*size)
        assert_same_view(evaluation_view(picture, ours.preprocessing), transform(Image.fromarray(picture)), data["std"])
