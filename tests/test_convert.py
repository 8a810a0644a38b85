"""Weights go from one form to another and back, bit for bit; a file that is not what it should be is told by name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY

from vitrail.checkpoints import CONVENTIONS, convert, export_names, load_model, save_model
from vitrail.checkpoints.foreign import (
    TABLES,
    WRITTEN,
    read_arrays,
    table_of,
    tables_of,
    to_arrays,
    write_arrays,
)
from vitrail.cli import main
from vitrail.config.coatnet import CoAtNetConfig
from vitrail.config.model import ModelConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel, build

PAIRS = [
    (family, table.name)
    for family, config in TINY.items()
    for table in tables_of(config)
    if (family, table.name) not in (("hybrid", "big-vision"), ("hybrid", "hf"))
]


def model_of(family: str) -> ImageModel:
    model = build(TINY[family])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                tensor.fill_(7)
    return model.eval()


def told(config: ModelConfig) -> dict:
    """What the arrays of such a model cannot say."""
    known = {"gelu", "heads", "experts_per_token", "downsample", "stride_in", "batch_norm_eps", "norm_eps", "act"}
    return {key: getattr(config, key) for key in known if hasattr(config, key)} | (
        {} if isinstance(config, CoAtNetConfig) else {"image_size": config.image_size}
    )


@pytest.mark.parametrize(("family", "names"), PAIRS)
def test_any_family_goes_out_under_any_names_and_comes_back_the_same(family: str, names: str, tmp_path: Path) -> None:
    model, suffix = model_of(family), WRITTEN[(len(family) + len(names)) % 3]
    save_model(model, tmp_path / "model")
    there, back = tmp_path / f"there{suffix}", tmp_path / "back"
    facts = convert(tmp_path / "model", there, names=names)
    assert facts["names"] == names
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    facts = convert(there, back, allow_pickle=True, **told(model.config))
    assert re.fullmatch("[0-9a-f]{64}", facts["sha256"])
    recipe = json.loads((back / "config.json").read_text(encoding="utf-8"))["recipe"]
    assert recipe == {"converted": {"source": str(there), "sha256": facts["sha256"]}}
    again = load_model(back)
    assert replace(again.config, dropout=0.0, drop_path=0.0) == replace(model.config, dropout=0.0, drop_path=0.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(("family", "names"), PAIRS)
def test_arrays_are_claimed_by_one_table_and_damage_is_told_by_name(family: str, names: str, tmp_path: Path) -> None:
    model = model_of(family)
    arrays = to_arrays(model, names)
    claimed = [table.name for table in TABLES if table.claims(arrays)]
    assert claimed[0] == names or family == "hybrid"
    rng = np.random.default_rng(len(arrays))
    wide = [name for name, array in arrays.items() if array.ndim]
    for name in rng.choice(wide, size=4, replace=False):
        missing = {key: array for key, array in arrays.items() if key != name}
        shorter = arrays | {name: arrays[name][:-1]}
        for number, damaged in enumerate((missing, shorter)):
            path = tmp_path / f"{number}.npz"
            write_arrays(path, damaged)
            try:
                other = load_model(path, **told(model.config))
            except UserError as problem:
                assert str(path) in str(problem)
            else:  # what is left is another model, complete in itself
                assert other.config != model.config


def test_what_no_table_claims_is_refused(tmp_path: Path) -> None:
    write_arrays(tmp_path / "x.npz", {"a/b": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"x\.npz is not a model that vitrail knows by its names \(a/b"):
        load_model(tmp_path / "x.npz")


def test_names_that_do_not_exist_or_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no names 'tensorflow'; choose one of vit"):
        export_names(model_of("cvt"), tmp_path / "x.npz", "tensorflow")
    with pytest.raises(UserError, match="'vmoe' have no place for a CvT; choose hf or cvt"):
        export_names(model_of("cvt"), tmp_path / "x.npz", "vmoe")
    with pytest.raises(UserError, match=r"x\.onnx: weights are written as \.npz"):
        export_names(model_of("cvt"), tmp_path / "x.onnx", "cvt")
    assert not list(tmp_path.iterdir())


def test_a_pickle_is_read_only_when_asked_for(tmp_path: Path) -> None:
    export_names(model_of("cvt"), tmp_path / "x.pth", "cvt")
    with pytest.raises(UserError, match=r"vitrail convert .*x\.pth FOLDER --allow-pickle"):
        load_model(tmp_path / "x.pth", heads=(1, 3, 2))
    assert load_model(tmp_path / "x.pth", heads=(1, 3, 2), allow_pickle=True).config.num_classes == 5


def test_half_precision_is_widened(tmp_path: Path) -> None:
    arrays = {name: array.astype(np.float16) for name, array in to_arrays(model_of("vit"), "timm").items()}
    write_arrays(tmp_path / "half.safetensors", arrays)
    model = load_model(tmp_path / "half.safetensors", heads=2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_every_convention_is_written_by_some_family() -> None:
    assert {names for _, names in PAIRS} == set(CONVENTIONS)
    for family, names in PAIRS:
        assert table_of(to_arrays(model_of(family), names), family).family is type(TINY[family])


def test_the_verb_converts_there_and_back_and_says_what_it_did(tmp_path: Path, capsys) -> None:
    save_model(model_of("efficientnet"), tmp_path / "model")
    out = tmp_path / "timm.safetensors"
    assert main(["convert", str(tmp_path / "model"), str(out), "--names", "timm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["names"] == "timm"
    assert "conv_stem.weight" in read_arrays(out)
    assert main(["convert", str(out), str(tmp_path / "back")]) == 0
    assert "EfficientNet" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "none.npz"), str(tmp_path / "x")]) == 2
    assert "no file or folder" in capsys.readouterr().err
    assert main(["convert", str(out), str(tmp_path / "back2"), "--names", "timm"]) == 2
    assert "weights are written as .npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("cvt", {}, "cvt"),  # QuickGELU, as the authors' code; Hugging Face's has the exact one
        ("cvt", {"gelu": "erf"}, "hf"),
        ("vit", {}, "vit"),
        ("vit", {"gelu": "erf"}, "timm"),
        ("vit", {"positions": "sincos", "pool": "gap"}, "big-vision"),
        ("vit-moe", {}, "vmoe"),
    ],
)
def test_names_that_leave_the_least_untold_are_taken(family: str, changes: dict, names: str, tmp_path: Path) -> None:
    assert export_names(build(replace(TINY[family], **changes)), tmp_path / "x.npz") == names
