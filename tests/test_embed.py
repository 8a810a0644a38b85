"""Features of pictures: those of each picture alone, complete on disk, nothing lost that is broken."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import TINY

from vitrail.checkpoints import save_model
from vitrail.cli import main
from vitrail.data import read_parts
from vitrail.data.decode import read_picture
from vitrail.data.view import evaluation_view
from vitrail.embedding import Embeddings, embed, model_hash, read_embeddings, write_embeddings
from vitrail.errors import UserError
from vitrail.models import ImageModel, build


def tiny_model(family: str = "vit") -> ImageModel:
    torch.manual_seed(0)
    return build(TINY[family])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder."""
    save_model(tiny_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def torn(tmp_path: Path, photos: Path) -> list[str]:
    """Two pictures that can be read, and between them one that cannot."""
    (tmp_path / "torn.jpg").write_bytes(b"nothing")
    return [str(photos / "sky" / "03.png"), str(tmp_path / "torn.jpg"), str(photos / "leaf" / "01.png")]


@pytest.mark.parametrize("family", TINY)
def test_features_are_those_of_each_picture_alone(family: str, photos: Path) -> None:
    model = tiny_model(family)
    found = embed(model, [photos / "sky"], batch_size=8)
    model.eval()
    for place in (0, 7, 19):
        view = evaluation_view(read_picture(Path(found.names[place]), 3), model.preprocessing)
        with torch.no_grad():
            alone = model.features(view[None])[0].numpy()
        np.testing.assert_allclose(found.features[place], alone, atol=1e-5)
    assert found.names == [str(photos / "sky" / f"{i:02d}.png") for i in range(20)]


def test_a_source_gives_what_its_files_give(photos: Path) -> None:
    model = tiny_model()
    from_source = embed(model, read_parts(photos).train, batch_size=60)
    from_files = embed(model, [photos], batch_size=60)
    assert from_source.names == from_files.names
    np.testing.assert_array_equal(from_source.features, from_files.features)


def test_the_model_is_hashed_with_all_that_its_features_depend_on() -> None:
    model = tiny_model()
    before = model_hash(model)
    assert model_hash(tiny_model()) == before
    model.preprocessing = type(model.preprocessing)(image_size=(32, 32), fit="squash")
    assert model_hash(model) != before
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert model_hash(model) != before


def test_broken_pictures_are_named_and_the_others_keep_their_order(torn: list[str]) -> None:
    found = embed(tiny_model(), torn)
    assert found.names == [torn[0], torn[2]]
    assert found.features.shape == (2, 16)
    assert [name for name, _ in found.problems] == [torn[1]]
    np.testing.assert_allclose(found.features[1], embed(tiny_model(), torn[2:]).features[0], atol=1e-6)


def test_features_that_are_not_numbers_are_refused_with_the_first_picture(photos: Path) -> None:
    model = tiny_model()
    torch.nn.init.constant_(next(model.parameters()), torch.nan)
    with pytest.raises(UserError, match=r"NaN or infinity, first of .*00\.png"):
        embed(model, [photos / "sky" / "00.png"])


def random_embeddings() -> Embeddings:
    features = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    return Embeddings(["a.png", "=b.png", "ü, c.png"], features, [("d.png", "torn"), ("e.png", "empty")], "abc")


def test_npz_gives_back_what_was_written(tmp_path: Path) -> None:
    written = random_embeddings()
    write_embeddings(written, tmp_path / "f.npz")
    read = read_embeddings(tmp_path / "f.npz")
    np.testing.assert_array_equal(read.features, written.features)
    assert (read.names, read.problems, read.model) == (written.names, written.problems, written.model)


def test_csv_has_a_row_per_picture_and_every_digit(tmp_path: Path) -> None:
    written = random_embeddings()
    write_embeddings(written, tmp_path / "f.csv")
    head, *rows = csv.reader((tmp_path / "f.csv").read_text(encoding="utf-8").splitlines())
    assert head == ["name", *(f"feature_{i}" for i in range(5)), "problem"]
    np.testing.assert_array_equal(np.array([row[1:-1] for row in rows[:3]], np.float32), written.features)
    assert [row[0] for row in rows] == ["a.png", "'=b.png", "ü, c.png", "d.png", "e.png"]
    assert [row[-1] for row in rows] == ["", "", "", "torn", "empty"]


@pytest.mark.parametrize("broken", [0, 2])
def test_parquet_has_a_row_per_picture(tmp_path: Path, broken: int) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    whole = random_embeddings()
    written = Embeddings(whole.names, whole.features, whole.problems[:broken], whole.model)
    write_embeddings(written, tmp_path / "f.parquet")
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["name"] == [*written.names, *["d.png", "e.png"][:broken]]
    np.testing.assert_array_equal(np.array(table["features"][:3], np.float32), written.features)
    assert table["features"][3:] == [None] * broken
    assert table["problem"] == [None, None, None, *["torn", "empty"][:broken]]


def test_parquet_without_its_package_says_what_to_install(folder, photos, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["embed", str(folder), str(photos), "--out", str(tmp_path / "f.parquet")]) == 2
    assert "pip install 'vitrail[parquet]'" in " ".join(capsys.readouterr().err.split())


def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path: Path, monkeypatch) -> None:
    write_embeddings(random_embeddings(), tmp_path / "f.npz")
    before = (tmp_path / "f.npz").read_bytes()

    def fails(file: object, **arrays: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(random_embeddings(), tmp_path / "f.npz")
    assert (tmp_path / "f.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_files_that_hold_no_features_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(UserError, match="holds no features with names"):
        read_embeddings(tmp_path / "a.npz")
    names = np.array(["a", "b"])
    rest = {"problem_names": names[:0], "problem_reasons": names[:0], "model": np.array("m")}
    np.savez(tmp_path / "b.npz", names=names, features=np.zeros((3, 2), np.float32), **rest)
    with pytest.raises(UserError, match=r"\(3, 2\) do not fit 2 names"):
        read_embeddings(tmp_path / "b.npz")


def test_the_verb_writes_features_names_broken_pictures_and_exits_with_3(folder, torn, tmp_path, capsys) -> None:
    out = tmp_path / "f.npz"
    assert main(["embed", str(folder), *torn, "--out", str(out), "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert (answer["pictures"], answer["features"], answer["broken"][0]["name"]) == (2, 16, torn[1])
    assert read_embeddings(out).names == [torn[0], torn[2]]
    assert main(["embed", str(folder), torn[0], "--out", str(out)]) == 0
    assert "16 features of each of 1 pictures" in capsys.readouterr().out


def test_nothing_readable_still_leaves_a_file_that_says_why(folder, torn, tmp_path, capsys) -> None:
    for suffix in ("npz", "csv"):
        assert main(["embed", str(folder), torn[1], "--out", str(tmp_path / f"f.{suffix}")]) == 3
    read = read_embeddings(tmp_path / "f.npz")
    assert (read.names, [name for name, _ in read.problems]) == ([], [torn[1]])


def test_another_suffix_is_refused_before_the_work(folder, photos, capsys) -> None:
    assert main(["embed", str(folder), str(photos), "--out", "f.xls"]) == 2
    assert ".npz, .parquet, .csv" in " ".join(capsys.readouterr().err.split())
