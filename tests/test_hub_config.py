"""What configuration files on the hub tell of a model is read, and nothing that they may hold does harm."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrail.checkpoints.hub_config import CVT_FIXED, ForeignSettings, foreign_settings
from vitrail.config.preprocessing import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vitrail.errors import UserError

VIT = {
    "model_type": "vit",
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-6,
    "image_size": 12,
}


def told(config: dict[str, object], processor: dict[str, object] | None = None) -> ForeignSettings:
    """Return the settings of files with these contents."""
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "config.json"), Path(folder, "preprocessor_config.json")
        for path, document in zip(paths, (config, processor), strict=True):
            path.write_text(json.dumps(document), encoding="utf-8")
        return foreign_settings(paths[0], paths[1] if processor is not None else None, "hf:owner/ants")


CVT = {"model_type": "cvt"}
CENTRE = {"size": {"shortest_edge": 16}, "do_center_crop": True, "crop_size": 12}
CONVNEXT = {"feature_extractor_type": "ConvNextFeatureExtractor", "crop_pct": 0.875, "resample": 3}


@pytest.mark.parametrize(
    ("config", "processor", "fit", "fraction", "size", "interpolation"),
    [
        (VIT, {"size": 12}, "squash", 1.0, (12, 12), "bilinear"),
        (VIT | {"image_size": 224}, {}, "squash", 1.0, (224, 224), "bilinear"),
        (VIT | {"image_size": [8, 12]}, {"size": [8, 12], "resample": 3}, "squash", 1.0, (8, 12), "bicubic"),
        (VIT, CENTRE, "crop", 0.75, (12, 12), "bilinear"),
        (VIT, {"feature_extractor_type": "DeiTFeatureExtractor"}, "crop", 0.875, (12, 12), "bicubic"),
        (CVT, CONVNEXT | {"size": 224}, "crop", 224 / 256, (224, 224), "bicubic"),
        (CVT, CONVNEXT | {"size": 224, "crop_pct": None}, "crop", 224 / 256, (224, 224), "bicubic"),
        (CVT, CONVNEXT | {"size": {"shortest_edge": 224}, "crop_pct": 0.95}, "crop", 224 / 235, (224, 224), "bicubic"),
        (CVT, CONVNEXT | {"size": {"shortest_edge": 384}}, "squash", 1.0, (384, 384), "bicubic"),
        (CVT, {}, "squash", 1.0, (384, 384), "bicubic"),
    ],
)
def test_image_processors_of_transformers(
    config: dict, processor: dict, fit: str, fraction: float, size: tuple[int, int], interpolation: str
) -> None:
    view = told(config, processor).preprocessing
    assert view is not None
    assert (view.fit, view.crop_fraction, view.image_size, view.interpolation) == (fit, fraction, size, interpolation)
    assert (view.mean, view.std) == (HALF, HALF)


@pytest.mark.parametrize(
    ("changes", "fit", "fraction"),
    [
        ({}, "crop", 0.875),
        ({"crop_pct": 0.9}, "crop", 224 / 248),
        ({"crop_pct": 1.0, "crop_mode": "squash"}, "squash", 1.0),
        ({"crop_pct": 1.0, "crop_mode": "border"}, "pad", 1.0),
        ({"crop_pct": 0.9, "crop_mode": "squash"}, "crop", 224 / 248),
    ],
)
def test_views_of_timm(changes: dict, fit: str, fraction: float) -> None:
    settings = told(
        {"architecture": "tf_efficientnet_b0", "pretrained_cfg": {"tag": "in1k", "num_classes": 1000, **changes}}
    )
    assert settings.preprocessing == Preprocessing(
        fit=fit, crop_fraction=fraction, interpolation="bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    assert settings.labels[0] == "tench"
    assert settings.overrides == {}


def test_what_arrays_do_not_show_is_read() -> None:
    assert told(VIT | {"hidden_act": "quick_gelu", "image_size": [8, 16]}).overrides == {
        "heads": 4,
        "norm_eps": 1e-6,
        "gelu": "quick",
        "image_size": (8, 16),
    }
    assert told({"model_type": "vit"}).overrides == {
        "heads": 12,
        "norm_eps": 1e-12,
        "gelu": "erf",
        "image_size": (224, 224),
    }
    # the epsilon of a CvT's configuration is one that its code never uses
    assert told(CVT | CVT_FIXED | {"num_heads": [1, 2, 4], "layer_norm_eps": 1e-3}).overrides == {
        "heads": (1, 2, 4),
        "gelu": "erf",
    }
    assert told(VIT | {"problem_type": "multi_label_classification"}).multi_label
    assert told(VIT | {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}).labels == ()
    siglip = {"architecture": "vit_so400m_patch14_siglip_384", "pretrained_cfg": {"input_size": [3, 384, 384]}}
    assert told(siglip | {"global_pool": "map"}).overrides == {"heads": 16, "pool": "map"}
    siglip["pretrained_cfg"] |= {"fixed_input_size": True}
    assert told(siglip).overrides == {"heads": 16, "image_size": (384, 384)}
    assert told(siglip | {"model_args": {"img_size": 392}}).overrides == {"heads": 16, "image_size": (392, 392)}
    flat = {"architecture": "vit_base_patch16_224", "labels": ["ant", "bee"], "mean": [0.5, 0.5, 0.5], "crop_pct": 0.9}
    assert told(flat).labels == ("ant", "bee")  # as timm wrote before 0.8


@pytest.mark.parametrize(
    ("config", "processor", "named"),
    [
        (VIT | {"hidden_act": "relu"}, {}, r"config\.json: vitrail cannot use hidden_act = 'relu'"),
        (VIT | {"pooler_act": "gelu"}, {}, "pooler_act"),
        (VIT | {"image_size": 10**9}, {}, "image_size"),
        (VIT | {"layer_norm_eps": "small"}, {}, "layer_norm_eps"),
        (VIT | {"layer_norm_eps": 10**400}, {}, "layer_norm_eps"),
        (VIT | {"id2label": {"first": "ant"}}, {}, "id2label"),
        (CVT | {"stride_kv": [1, 1, 1]}, {}, "stride_kv"),
        (VIT, {"resample": 0}, r"preprocessor_config\.json: vitrail cannot use resample = 0"),
        (VIT, {"rescale_factor": 1 / 127.5}, "rescale_factor"),
        (VIT, {"do_resize": False}, "do_resize"),
        (VIT, {"image_mean": [0.5, "x", 0.5]}, "image_mean"),
        (VIT, {"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        (VIT, {"size": {"shortest_edge": 224}}, "size"),
        (VIT, {"size": {"longest_edge": 224}}, "size"),
        (VIT, {"size": {"shortest_edge": 10**400}}, "size"),
        (CVT, CONVNEXT | {"size": {"height": 224, "width": 224}}, "size"),
        (CVT, CONVNEXT | {"size": 224, "crop_pct": 7}, "crop_pct"),
        (VIT, {"image_processor_type": "PerceiverImageProcessor"}, "PerceiverImageProcessor, which vitrail does not"),
        (
            {"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"interpolation": "lanczos"}},
            None,
            "interpolation",
        ),
        ({"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"input_size": [3, 224]}}, None, "input_size"),
        ({"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"crop_mode": "border"}}, None, "crop_mode"),
        ({"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"crop_mode": "odd"}}, None, "crop_mode"),
        ({"architecture": "deit_tiny_patch16_224", "model_args": {"act_layer": "silu"}}, None, "act_layer"),
    ],
)
def test_what_vitrail_cannot_do_is_told_by_file_and_key(config: dict, processor: dict | None, named: str) -> None:
    with pytest.raises(UserError, match=named):
        told(config, processor)


USED = (
    "size crop_size do_center_crop image_mean image_std resample crop_pct input_size mean std hidden_act label_names "
    "num_attention_heads image_size id2label num_heads pretrained_cfg model_args crop_mode interpolation global_pool "
    "shortest_edge height width architectures img_size fixed_input_size"
)
KEYS = st.sampled_from(USED.split())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=2), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([{"model_type": "vit"}, CVT, {"architecture": "vit_base_patch16_224"}, {}]),
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.none() | st.dictionaries(KEYS, VALUES, max_size=6),
)
def test_no_file_brings_anything_but_settings_or_a_user_error(kind: dict, config: dict, processor: dict | None) -> None:
    try:
        told(config | kind, processor)
    except UserError as error:
        assert str(error)
