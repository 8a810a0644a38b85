"""What a repository on the hub says of its weights that their arrays cannot tell. Read as data; nothing is executed.

Two kinds of repositories of others are known: transformers' (`config.json` with `model_type`, and
`preprocessor_config.json`) and timm's (`config.json` with `architecture` and `pretrained_cfg`). What they leave out has
the defaults of transformers 5.23 (`configuration_vit.py`, `image_processing_*.py`) and timm 1.0.31 (`data/config.py`).
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vitrail.checkpoints.documents import Document
from vitrail.config.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Fit, Interpolation, Preprocessing
from vitrail.data.imagenet import imagenet_labels
from vitrail.errors import UserError

Origin = Literal["vitrail", "transformers", "timm"]

GELUS = {
    "gelu": "erf",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_tanh": "tanh",
    "quick_gelu": "quick",
    "quickgelu": "quick",
}
"""Flavours of GELU by the names that transformers (`ACT2FN`) and timm (`layers/create_act.py`) have for them."""

POOLS = {"token": "token", "avg": "gap", "map": "map"}
"""Ways of pooling by timm's names."""

CVT_FIXED = {
    "patch_stride": [4, 2, 2],
    "patch_padding": [2, 1, 1],
    "padding_q": [1, 1, 1],
    "padding_kv": [1, 1, 1],
    "stride_q": [1, 1, 1],
    "stride_kv": [2, 2, 2],
    "qkv_projection_method": ["dw_bn", "dw_bn", "dw_bn"],
}
"""What no array of a CvT shows and every published one shares."""

TRANSFORMERS = ("vit", "cvt")
"""Known values of `model_type`."""

_VITS = r"tiny|small|base|large|huge|giant|gigantic|so400m|giantopt"
TIMM: tuple[tuple[str, dict[str, object]], ...] = (
    (r"test_vit", {"heads": 2}),
    (r"vit_base_patch16_gap_\d+", {"heads": 16}),
    (r"vit_giantopt_patch16_siglip(_gap)?_\d+", {"heads": 16, "gelu": "tanh"}),
    (r"vit_so400m_patch16_siglip(_gap)?_\d+", {"heads": 16, "gelu": "tanh"}),
    (r"vit_so400m_patch14_siglip(_gap)?_\d+", {"heads": 16}),
    (r"vit_base_patch32_siglip(_gap)?_\d+", {"gelu": "tanh"}),
    (r"vit_large_patch16_siglip(_gap)?_512", {"gelu": "tanh"}),
    (rf"vit_({_VITS})_(patch\d+|r\d*_s\d+(_p8)?)(_siglip)?(_gap)?_\d+(_miil)?", {}),
    (r"flexivit_(small|base|large)", {}),
    (r"deit_(tiny|small|base)_patch16_\d+", {}),
    (r"tf_efficientnet_(b[0-8]|l2|lite[0-4])", {}),
    (r"coatnet_[0-5]_\d+", {}),
)
"""Architectures of timm that vitrail computes alike, and settings that their arrays do not show; the first that fits.

timm's `efficientnet_*` have the arrays of `tf_efficientnet_*`, but other padding; they are left out for that.
"""

PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2},
    "DeiT": {"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3},
    "ConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "resample": 3},
}
"""Image processors of transformers and what they do when nothing else is said; CvT uses ConvNext's."""
INTERPOLATIONS: dict[object, Interpolation] = {
    2: "bilinear",
    3: "bicubic",
    "bilinear": "bilinear",
    "bicubic": "bicubic",
}
"""Filters by Pillow's number (transformers) and by name (timm)."""
WARPED_FROM = 384
"""Shortest edge from which on ConvNext's processor squashes the whole picture instead of cropping it."""

_log = logging.getLogger("vitrail")


@dataclass(frozen=True, kw_only=True, slots=True)
class ForeignSettings:
    """What configuration files tell of a model beyond its arrays."""

    overrides: Mapping[str, object]
    """Fields of the model's configuration; `image_size`, if it is said, is that of the weights' own positions."""
    labels: tuple[str, ...] = ()
    """Class names in the order of the logits; empty when unknown."""
    multi_label: bool = False
    preprocessing: Preprocessing | None = None
    """How pictures are prepared, perhaps larger than the weights' own; None when nothing is said."""


def origin_of(config: Document, source: str) -> Origin:
    """Return whose repository a `config.json` belongs to.

    Raises:
        UserError: When vitrail has no model like the one it speaks of.
    """
    if type(config.data.get("format")) is int and "vitrail" in config.data:
        return "vitrail"
    if architecture := config.get("architecture", str, ""):
        if not any(re.fullmatch(pattern, architecture) for pattern, _ in TIMM):
            raise _unknown(source, f"timm's {architecture!r}")
        return "timm"
    if kind := config.get("model_type", str, ""):
        if kind not in TRANSFORMERS:
            names = ", ".join(map(str, config.get("architectures", list, [])))
            raise _unknown(source, f"{kind!r} of transformers{f' ({names})' if names else ''}")
        return "transformers"
    raise UserError(
        f"{config.path} names neither a model_type nor an architecture: {source} is no model vitrail knows."
    )


def _unknown(source: str, what: str) -> UserError:
    return UserError(
        f"{source} is a model of the kind {what}, which vitrail does not have; it reads {' and '.join(TRANSFORMERS)} "
        "of transformers, and of timm the ViT, DeiT, hybrid, SigLIP, FlexiViT, tf_efficientnet and coatnet models that "
        "compute what vitrail's do."
    )


def foreign_settings(config: Path, preprocessor: Path | None, source: str) -> ForeignSettings:
    """Return what the files of a repository of transformers or timm tell.

    Args:
        config: The `config.json`.
        preprocessor: The `preprocessor_config.json`, where there is one.
        source: What to call the repository in errors.

    Raises:
        UserError: When a file is malformed, or the model or its view of pictures is not one that vitrail has.
    """
    document = Document.read(config)
    if origin_of(document, source) == "timm":
        return _timm_settings(document)
    return _transformers_settings(document, Document.read(preprocessor) if preprocessor else None)


def _transformers_settings(config: Document, processor: Document | None) -> ForeignSettings:
    view = None if processor is None else _processor_view(config, processor)
    if config.data["model_type"] == "cvt":
        for key, value in CVT_FIXED.items():
            if config.get(key, list, value) != value:
                raise config.wrong(key)
        # Its layer_norm_eps is never used: the code leaves torch's 1e-5.
        overrides: dict[str, object] = {"heads": tuple(config.get("num_heads", list, [1, 3, 6])), "gelu": "erf"}
        if view is not None:
            overrides["image_size"] = view.image_size
    else:
        if config.get("pooler_act", str, "tanh") != "tanh":
            raise config.wrong("pooler_act")
        overrides = {
            "heads": config.get("num_attention_heads", int, 12),
            "norm_eps": config.get("layer_norm_eps", float, 1e-12),
            "gelu": _gelu(config, "hidden_act"),
            "image_size": config.size("image_size", 224),
        }
        if view is not None:  # which transformers' ViT takes in no other size
            view = replace(view, image_size=config.size("image_size", 224))
    labels = _labels(config, "id2label")
    return ForeignSettings(
        overrides=overrides,
        labels=() if labels == tuple(f"LABEL_{i}" for i in range(len(labels))) else labels,
        multi_label=config.get("problem_type", str, "") == "multi_label_classification",
        preprocessing=view,
    )


def _processor_view(config: Document, processor: Document) -> Preprocessing:
    """Return the view of an image processor, each of which has its own defaults."""
    name = processor.get("image_processor_type", str, "") or processor.get("feature_extractor_type", str, "")
    plain = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", name)
    kind = plain or ("ConvNext" if config.data["model_type"] == "cvt" else "ViT")
    if kind not in PROCESSORS:
        raise UserError(
            f"{processor.path} has a {name}, which vitrail does not; it has {', '.join(PROCESSORS)}ImageProcessor. "
            "The weights alone load from the file beside it."
        )
    said = {key: value for key, value in processor.data.items() if value is not None}
    document = Document(processor.path, PROCESSORS[kind] | said)
    for key in ("do_resize", "do_rescale"):
        if not document.get(key, bool, True):
            raise document.wrong(key)
    if not math.isclose(document.get("rescale_factor", float, 1 / 255), 1 / 255, rel_tol=1e-4):
        raise document.wrong("rescale_factor")
    normalised = document.get("do_normalize", bool, True)
    fit, fraction, size = _convnext_fit(document) if kind == "ConvNext" else _processor_fit(document)
    return Preprocessing(
        image_size=size,
        channels=config.get("num_channels", int, 3),
        fit=fit,
        crop_fraction=fraction,
        interpolation=_interpolation(document, "resample"),
        mean=document.numbers("image_mean", (0.5, 0.5, 0.5)) if normalised else (0.0,),
        std=_deviations(document, "image_std", (0.5, 0.5, 0.5)) if normalised else (1.0,),
    )


def _convnext_fit(document: Document) -> tuple[Fit, float, tuple[int, int]]:
    """Below 384: the shortest edge to int(size / crop_pct), then a centre crop; from 384 on the whole, squashed."""
    size = side, _ = document.size("size")
    if isinstance(document.data["size"], dict) and "shortest_edge" not in document.data["size"]:
        raise document.wrong("size")
    if document.get("do_center_crop", bool, False):
        raise document.wrong("do_center_crop")
    if side >= WARPED_FROM:
        return "squash", 1.0, size
    return "crop", side / int(side / _share(document, "crop_pct", 224 / 256)), size


def _processor_fit(document: Document) -> tuple[Fit, float, tuple[int, int]]:
    """Squashed to a size, or the shortest edge resized, and then perhaps a centre crop."""
    crop = document.size("crop_size") if document.get("do_center_crop", bool, False) else None
    height, width = document.size("size")
    if isinstance(document.data["size"], dict) and "shortest_edge" in document.data["size"]:
        if crop is None or crop[0] != crop[1] or crop[0] > height:
            raise document.wrong("size")
        return "crop", crop[0] / height, crop
    if crop is None or crop == (height, width):
        return "squash", 1.0, (height, width)
    if crop[0] * width != crop[1] * height or crop[0] > height:
        raise document.wrong("crop_size")
    return _squashed_crop(document, crop, (height, width))


def _squashed_crop(
    document: Document, crop: tuple[int, int], size: tuple[int, int]
) -> tuple[Fit, float, tuple[int, int]]:
    """Return the nearest view of ours to a crop of the squashed picture; the models' papers keep proportions, too."""
    _log.warning(
        "%s squashes pictures to %d x %d and crops %d x %d of it; vitrail crops as much and keeps their proportions.",
        *(document.path, *size, *crop),
    )
    return "crop", crop[0] / size[0], crop


def _timm_settings(config: Document) -> ForeignSettings:
    architecture = config.get("architecture", str, "")
    trained = config.part("pretrained_cfg") if "pretrained_cfg" in config.data else config  # one object until timm 0.8
    arguments = config.part("model_args")
    overrides = dict(next(said for pattern, said in TIMM if re.fullmatch(pattern, architecture)))
    if arguments.get("num_heads", int, 0):
        overrides["heads"] = arguments.data["num_heads"]
    if arguments.get("act_layer", str, ""):
        overrides["gelu"] = _gelu(arguments, "act_layer")
    pool = arguments.get("global_pool", str, "") or config.get("global_pool", str, "")
    if pool in POOLS and re.search("vit|deit", architecture):
        overrides["pool"] = POOLS[pool]  # the same as the arrays show, or an error says that it is not
    view = _timm_view(trained)
    # Positions are made for `img_size`. Where it is not said, a model that takes any size may have them for another
    # than that of the pictures, and arrays tell; they are resized then, as timm does it on the way.
    if arguments.data.get("img_size") is not None:
        overrides["image_size"] = arguments.size("img_size")
    elif trained.get("fixed_input_size", bool, False):
        overrides["image_size"] = view.image_size
    names = next((place for place in (config, trained) if "label_names" in place.data), None)
    labels = _labels(names, "label_names") if names else _labels(trained, "labels")
    classes = config.get("num_classes", int, 0) or trained.get("num_classes", int, 0)
    if not labels and classes == 1000 and trained.get("tag", str, "").endswith("in1k"):
        labels = imagenet_labels()
    return ForeignSettings(
        overrides=overrides,
        labels=labels,
        preprocessing=view,
    )


def _timm_view(trained: Document) -> Preprocessing:
    """Return the view of `transforms_imagenet_eval`, which rounds the resized picture down to whole pixels."""
    match trained.get("input_size", list, [3, 224, 224]):
        case [int(channels), *sides] if len(sides) == 2:
            size = Document(trained.path, {"input_size": sides}).size("input_size")
        case _:
            raise trained.wrong("input_size")
    share = _share(trained, "crop_pct", 0.875)
    scaled = math.floor(size[0] / share), math.floor(size[1] / share)
    fit: Fit = "squash"
    fraction = 1.0
    match trained.get("crop_mode", str, "") or "center":
        case "center":
            fit, fraction = "crop", size[0] / scaled[0]
        case "squash" if scaled != size:
            fit, fraction, _ = _squashed_crop(trained, size, scaled)
        case "squash":
            pass
        case "border" if scaled == size:
            fit = "pad"
        case _:
            raise trained.wrong("crop_mode")
    return Preprocessing(
        image_size=size,
        channels=channels,
        fit=fit,
        crop_fraction=fraction,
        interpolation=_interpolation(trained, "interpolation"),
        mean=trained.numbers("mean", IMAGENET_MEAN),
        std=_deviations(trained, "std", IMAGENET_STD),
    )


def _gelu(document: Document, key: str) -> str:
    name = document.get(key, str, "gelu")
    if name not in GELUS:
        raise document.wrong(key)
    return GELUS[name]


def _interpolation(document: Document, key: str) -> Interpolation:
    name = document.data.get(key)
    if name is None or name == "":
        return "bicubic"  # timm's default; transformers' processors have their own
    if isinstance(name, list | dict) or name not in INTERPOLATIONS:
        raise document.wrong(key)
    return INTERPOLATIONS[name]


def _share(document: Document, key: str, default: float) -> float:
    share = document.get(key, float, default) or default
    if not 0.1 <= share <= 1.0:
        raise document.wrong(key)
    return share


def _deviations(document: Document, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = document.numbers(key, default)
    if min(values) <= 0:
        raise document.wrong(key)
    return values


def _labels(document: Document, key: str) -> tuple[str, ...]:
    """Return names in the order of the logits, from a list or from an object by number; with gaps there are none."""
    names = document.data.get(key) or []
    if isinstance(names, dict):
        if not all(number.isdecimal() for number in names):
            raise document.wrong(key)
        by_number = {int(number): name for number, name in names.items()}
        names = [by_number[i] for i in range(len(names))] if by_number.keys() == set(range(len(names))) else []
    if not isinstance(names, list) or not all(type(name) in (str, int) for name in names):
        raise document.wrong(key)
    return tuple(str(name) for name in names)
