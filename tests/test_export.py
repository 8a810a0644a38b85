"""Exported files answer as the model does, for any picture, and nothing is written that does not."""

import ast
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import natural

import vitrail
from vitrail.checkpoints import save_model
from vitrail.cli import main
from vitrail.config.preprocessing import Fit, Interpolation, Preprocessing
from vitrail.data import open_data, read_parts
from vitrail.data.view import evaluation_view, mean_levels, view_levels
from vitrail.errors import UserError
from vitrail.exporting import NotExported, parity, scripts, writing
from vitrail.exporting.classifier import view_of_any_size
from vitrail.exporting.parity import TOLERANCE, judge
from vitrail.exporting.pictures import parity_pictures
from vitrail.models import ImageModel, build

SUFFIXES = (".pt2", ".onnx", ".xml")


@torch.no_grad()
def at_work(family: str, **preprocessing: object) -> ImageModel:
    """A model whose weights are all at work and whose answers differ from picture to picture."""
    torch.manual_seed(0)
    model = build(TINY[family])
    model.preprocessing = replace(model.preprocessing, **preprocessing)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    photos = read_parts("clothing").train
    views = torch.stack([evaluation_view(photos.load(i), model.preprocessing) for i in range(0, 800, 50)])
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum, norm.training = 1.0, True
    model.features(views)
    model.eval()
    # A head that sees what features differ by, and no class before the others.
    features = model.features(views)
    assert model.head is not None
    torch.nn.init.normal_(model.head.weight)
    model.head.weight /= features.std(dim=0).clamp(min=1e-6)
    model.head.bias.copy_(-model.head.weight @ features.mean(dim=0))
    model.labels = ("shirt", "a <b> & 'c'", "größe", '"quoted" \\ path', "robe\nlong")
    return model


@pytest.fixture(scope="module")
def vit() -> ImageModel:
    return at_work("vit")


@pytest.fixture(scope="module")
def files(vit: ImageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One exported file of each kind."""
    folder = tmp_path_factory.mktemp("exported")
    for suffix in SUFFIXES:
        vitrail.export(vit, folder / f"model{suffix}")
    return folder


@pytest.mark.parametrize(("family", "suffix"), [("vit-moe", ".onnx"), ("wide-resnet", ".xml")])
def test_a_file_of_another_family_answers_as_the_model_does(family: str, suffix: str, tmp_path: Path) -> None:
    found = vitrail.export(at_work(family), tmp_path / f"model{suffix}")
    assert found.parity.difference <= TOLERANCE["fp32"]
    assert found.parity.agreement == 1.0
    assert not found.complaints


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    fit=st.sampled_from(["crop", "pad", "squash"]),
    fraction=st.sampled_from([1.0, 0.9, 0.875]),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
)
@settings(max_examples=60, deadline=None)
def test_the_view_of_any_size_is_the_evaluation_view(
    height: int, width: int, fit: Fit, fraction: float, interpolation: Interpolation
) -> None:
    view = Preprocessing(
        image_size=(24, 32), fit=fit, crop_fraction=fraction, interpolation=interpolation, mean=(0.4, 0.5, 0.6)
    )
    dots = torch.randint(
        0, 2, (2, 3, height, width), generator=torch.Generator().manual_seed(height), dtype=torch.uint8
    )
    found = view_of_any_size(dots * 255, view, mean_levels(view, torch.device("cpu")))
    torch.testing.assert_close(found, view_levels(dots * 255, view), rtol=0, atol=0.02)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_script_classifies_without_vitrail(suffix: str, files: Path, vit: ImageModel, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    natural(61, 47).save(picture)
    script = files / f"model{suffix}.py"
    alone = (
        "import runpy, sys; sys.modules['vitrail'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", alone, script, picture], capture_output=True, text=True, timeout=120, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    (expected,) = vitrail.predict(vit, [picture])
    assert (
        done.stdout == "\t".join([str(picture), *(f"{label} {share:.1%}" for label, share in expected.labels)]) + "\n"
    )


def texts_in(file: Path) -> dict[str, str]:
    if file.suffix == ".pt2":
        names = {"labels": "labels.json", "facts": "facts.json", "card": "README.md"}
        texts = dict.fromkeys(names.values(), "")
        torch.export.load(file, extra_files=texts)
        return {kind: texts[name] for kind, name in names.items()}
    if file.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        return {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().read_model(file)
    return {kind: model.get_rt_info(["vitrail", kind]).value for kind in ("labels", "facts", "card")}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_labels_and_card_are_inside(suffix: str, files: Path, vit: ImageModel) -> None:
    texts = texts_in(files / f"model{suffix}")
    assert tuple(json.loads(texts["labels"])) == vit.labels
    assert json.loads(texts["facts"])["preprocessing"]["crop_fraction"] == vit.preprocessing.crop_fraction
    assert texts["card"].startswith("---\nlibrary_name: vitrail")


def test_the_report_beside_the_file_counts_every_kind_of_picture(files: Path) -> None:
    report = json.loads((files / "model.onnx.json").read_text(encoding="utf-8"))
    assert report["format"] == "ONNX, opset 20"
    assert {kind["name"]: kind["pictures"] for kind in report["parity"]["kinds"]} == {
        "as they are": 44,
        "odd sizes": 4,
        "grey": 4,
        "16-bit grey": 4,
        "turned by EXIF": 4,
        "transparent": 4,
        "in a batch": 3,
    }


def test_nothing_but_the_files_is_left(files: Path) -> None:
    written = {path.name for path in files.iterdir()}
    assert written == {f"model{suffix}{more}" for suffix in SUFFIXES for more in ("", ".py", ".json")} | {"model.bin"}


@pytest.mark.parametrize(("suffix", "precision"), [(".pt2", "bf16"), (".onnx", "fp16"), (".xml", "fp16")])
def test_sixteen_bits_are_half_as_large(suffix: str, precision: Any, tmp_path: Path) -> None:
    model = build(replace(TINY["vit"], width=64, mlp_dim=4096)).eval()
    model.load_state_dict({name: value + 0.05 * torch.randn_like(value) for name, value in model.state_dict().items()})
    found = vitrail.export(model, tmp_path / f"half{suffix}", precision=precision)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 2 * parameters < found.size < 3 * parameters
    assert found.parity.difference > 1e-5


def eight_bits(model: ImageModel, dest: Path, monkeypatch: pytest.MonkeyPatch, speedup: float) -> writing.Export:
    monkeypatch.setattr(writing, "CALIBRATION_PICTURES", 8)
    monkeypatch.setattr(writing, "_speedup", lambda rounded, single, picture: speedup)
    return vitrail.export(model, dest, precision="int8")


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_eight_bits_keep_the_classes_where_they_are_faster(
    suffix: str, vit: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.AGREEMENT, "int8", 0.8)  # a random model is not sure of much
    found = eight_bits(vit, tmp_path / f"model{suffix}", monkeypatch, speedup=1.5)
    assert found.speedup == 1.5
    assert found.parity.difference > 0.001
    assert tuple(json.loads(texts_in(found.file)["labels"])) == vit.labels


def test_eight_bits_that_are_no_faster_are_not_written(
    vit: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotExported, match=r"0\.90 times as fast as fp32"):
        eight_bits(vit, tmp_path / "model.onnx", monkeypatch, speedup=0.9)
    assert not list(tmp_path.iterdir())


def test_a_model_that_answers_all_pictures_alike_is_refused(vit: ImageModel, tmp_path: Path) -> None:
    constant = build(TINY["vit"]).eval()
    assert constant.head is not None
    torch.nn.init.zeros_(constant.head.weight)
    torch.nn.init.ones_(constant.head.bias)
    with pytest.raises(NotExported, match="answers all pictures alike"):
        vitrail.export(constant, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_answers_otherwise_fails_and_is_not_kept(
    vit: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def another(model: ImageModel, *arguments: object) -> Any:
        return write(at_work("vit", crop_fraction=0.8), *arguments)  # type: ignore[arg-type]

    write = writing._write
    save_model(vit, tmp_path / "model")
    monkeypatch.setattr(writing, "_write", another)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "model.pt2")]) == 4
    assert "Not exported: logits differ by" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_script_that_reads_pictures_otherwise_fails(
    vit: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_for = writing.script_for
    careless = lambda *a, **k: script_for(*a, **k).replace("ImageOps.exif_transpose", "")  # noqa: E731
    monkeypatch.setattr(writing, "script_for", careless)
    with pytest.raises(NotExported, match="reads 4 pictures otherwise than Vitrail"):
        vitrail.export(vit, tmp_path / "model.pt2")


def test_what_stands_there_is_replaced_only_when_asked(files: Path, vit: ImageModel, tmp_path: Path) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.pt2").unlink()
    (tmp_path / "model.pt2.py").write_text("mine")
    with pytest.raises(UserError, match=r"model\.pt2\.py, .*exists already; choose another name, or add --overwrite"):
        vitrail.export(vit, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2.py").read_text() == "mine"
    vitrail.export(vit, tmp_path / "model.pt2", overwrite=True)
    assert "torch.export.load" in (tmp_path / "model.pt2.py").read_text()


def test_the_command_exports_a_grey_model_of_several_labels(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    model = build(replace(TINY["vit"], channels=1)).eval()
    model.load_state_dict({name: value + 0.2 * torch.randn_like(value) for name, value in model.state_dict().items()})
    model.multi_label = True
    save_model(model, tmp_path / "model")
    dest = tmp_path / "new" / "model.onnx"
    assert main(["export", str(tmp_path / "model"), str(dest), "--data", str(photos), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parity"]["pictures"] == 67
    assert report == json.loads(dest.with_name("model.onnx.json").read_text(encoding="utf-8"))
    assert "1 / (1 + np.exp(-answer))" in dest.with_name("model.onnx.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("model.tflite", "fp32", r"model\.tflite: models are exported to \.pt2 .*; choose one of these suffixes"),
        ("model.pt2", "int8", r"torch\.export is written in fp32, fp16, bf16, not in int8: .* \.onnx or \.xml"),
    ],
)
def test_what_cannot_be_written_is_said_at_once(
    name: str, precision: Any, message: str, vit: ImageModel, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        vitrail.export(vit, tmp_path / name, precision=precision)


def test_a_missing_package_is_told_with_its_cure(
    vit: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.engines.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match=r"needs onnxscript, not installed: pip install 'vitrail\[onnx\]'\."):
        vitrail.export(vit, tmp_path / "model.onnx")


def test_a_model_that_a_format_has_no_words_for_is_told_by_name(
    vit: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operator\nsee the manual")

    monkeypatch.setattr(writing, "write_program", fail)
    with pytest.raises(UserError, match=r"^ViT cannot be written as ONNX in fp32: no such operator$"):
        vitrail.export(vit, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_no_agreement_where_there_is_a_nan_or_another_class() -> None:
    expected = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    kinds = ["as they are"] * 64
    assert not judge(expected, expected + 1e-5, kinds, "fp32").complaints
    for spoilt in (expected + 1e-3, np.where(np.eye(64, 5) > 0, np.nan, expected)):
        assert "logits differ by" in " ".join(judge(expected, spoilt.astype(np.float32), kinds, "fp32").complaints)
    shuffled = expected[:, ::-1].copy()
    assert "same class comes first" in " ".join(judge(expected, shuffled, kinds, "int8").complaints)
    one_class = expected + np.array([9, 0, 0, 0, 0], np.float32)
    assert "one class comes first" in " ".join(judge(one_class, one_class, kinds, "int8").complaints)


def test_parity_pictures_are_those_of_the_part_that_nothing_was_learned_from(photos: Path, tmp_path: Path) -> None:
    plain = [sample for sample in parity_pictures(photos, 3, tmp_path) if sample.kind == "as they are"]
    assert len({sample.path for sample in plain}) == 44
    assert all(sample.path.is_relative_to(photos) for sample in plain)
    embedded = parity_pictures("clothing", 3, tmp_path)
    test = open_data("clothing").test
    assert test is not None
    assert np.array_equal(embedded[0].pixels, test.load(0))


def test_a_name_of_any_characters_stands_in_the_script() -> None:
    script = scripts.script_for("\U0001f600 'shoes'.onnx", channels=3, multi_label=False)
    names = [node.value for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Constant)]
    assert "\U0001f600 'shoes'.onnx" in names
