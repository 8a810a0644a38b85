"""Folders, manifests and arrays: what is found, how it is split, and what a mistake says."""

import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import manifest, put

from vitrail.check import check
from vitrail.data import FileSource, Source, Splits, Subset, open_data
from vitrail.data.folders import read_folder, read_manifest
from vitrail.errors import BrokenPicture, UserError


def listed(source: Source | None, root: Path) -> dict[str, list[str]]:
    """Class -> files below the root."""
    assert isinstance(source, FileSource)
    found: dict[str, list[str]] = {name: [] for name in source.classes}
    for index, label in enumerate(source.targets):
        found[source.classes[label]].append(Path(source.name(index)).relative_to(root).as_posix())
    return found


def test_class_folders_hold_pictures_at_any_depth(tmp_path: Path) -> None:
    put(tmp_path, "dog/b.png", "cat/x/y/2.JPG", "cat/1.jpeg", "dog/a.webp", "ant/a.tif")
    data = read_folder(tmp_path)
    assert listed(data.train, tmp_path) == {
        "ant": ["ant/a.tif"],
        "cat": ["cat/1.jpeg", "cat/x/y/2.JPG"],
        "dog": ["dog/a.webp", "dog/b.png"],
    }
    assert data.val is data.test is None
    assert data.train.targets.dtype == np.int64


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
@pytest.mark.parametrize("test", ["test", "Testing", "eval", "EVALUATION"])
def test_every_spelling_of_the_parts(tmp_path: Path, train: str, val: str, test: str) -> None:
    put(tmp_path, *(f"{part}/{name}/1.png" for part in (train, val, test) for name in ("cat", "dog")))
    data = read_folder(tmp_path)
    for source, folder in ((data.train, train), (data.val, val), (data.test, test)):
        assert listed(source, tmp_path) == {name: [f"{folder}/{name}/1.png"] for name in ("cat", "dog")}


def test_hidden_files_litter_and_other_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "cat/1.png", "dog/1.png", "cat/._1.png", "cat/.ipynb_checkpoints/1.png", "__MACOSX/cat/1.png")
    put(tmp_path, ".git/1.png", "loose.png")
    for name in ("cat/Thumbs.db", "cat/.DS_Store", "cat/notes.txt", "cat/photo.heic", "cat/raw.heic", "README"):
        (tmp_path / name).write_bytes(b"?")
    assert listed(read_folder(tmp_path).train, tmp_path) == {"cat": ["cat/1.png"], "dog": ["dog/1.png"]}
    assert "left out 2 x .heic" in caplog.text
    for kind in ("1 x .txt", "1 x .png outside class folders", "1 x no suffix outside class folders"):
        assert kind in caplog.text
    assert "Thumbs" not in caplog.text


def test_an_empty_class_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "cow" / "deeper").mkdir(parents=True)
    assert read_folder(tmp_path).train.classes == ("cat", "dog")
    assert f"{tmp_path / 'cow'} has no pictures; the class is left out." in caplog.text


def test_a_test_part_may_lack_classes_but_not_bring_new_ones(tmp_path: Path) -> None:
    put(tmp_path, "train/ant/1.png", "train/cat/1.png", "train/Dog/1.png", "test/cat/1.png")
    data = read_folder(tmp_path)
    assert data.test is not None and data.test.classes == data.train.classes == ("Dog", "ant", "cat")
    assert data.test.targets.tolist() == [2]
    put(tmp_path, "test/dog/1.png")
    with pytest.raises(UserError, match=r"test: no training picture is of class 'dog'. Did you mean 'Dog'.*Rename"):
        read_folder(tmp_path)


def test_a_part_without_pictures_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "train/cat/1.png", "train/dog/1.png", "other/1.png")
    (tmp_path / "val").mkdir()
    assert read_folder(tmp_path).val is None
    assert f"{tmp_path / 'val'} has no pictures in class folders" in caplog.text
    assert "left out other, which are not parts" in caplog.text


def test_a_class_may_be_called_train_or_test(tmp_path: Path) -> None:
    put(tmp_path, "bus/1.png", "train/1.png", "test/1.png")
    assert read_folder(tmp_path).train.classes == ("bus", "test", "train")


def test_accents_written_in_two_ways_are_one_class(tmp_path: Path) -> None:
    put(tmp_path, "train/caf\u00e9/1.png", "train/bar/1.png", "test/cafe\u0301/1.png")
    data = read_folder(tmp_path)
    assert data.train.classes == ("bar", "caf\u00e9")
    assert data.test is not None and data.test.targets.tolist() == [1]


def test_links_are_followed_but_never_in_circles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "elsewhere", "3.png")
    root = tmp_path / "data"
    put(root, "cat/1.png", "dog/1.png")
    for link, target in {
        "cat/up": root,
        "cat/self": root / "cat",
        "cat/loop.png": root / "cat" / "loop.png",
        "cat/loop": root / "cat" / "loop",
        "cat/gone.png": root / "gone.png",
        "dog/more": tmp_path / "elsewhere",
        "dog/again": tmp_path / "elsewhere",
        "dog/2.png": tmp_path / "elsewhere" / "3.png",
    }.items():
        (root / link).symlink_to(target)
    if hasattr(os, "mkfifo"):
        os.mkfifo(root / "dog" / "pipe.png")
    found = listed(read_folder(root).train, root)
    assert found["cat"] == ["cat/1.png"]
    assert found["dog"][:2] == ["dog/1.png", "dog/2.png"] and len(found["dog"]) == 3
    assert "3 x not a file" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.png", "2.png"], "has pictures, but no class folders: put each class into a folder of its own"),
        (["cat/1.png"], r"one class only, 'cat'; a classifier needs two. If the classes are .* name .*cat"),
        (["train/cat/1.png"], r"train has pictures of one class only, 'cat'"),
        ([], "no pictures in folders of .*expected is CLASS/picture"),
        (["val/cat/1.png", "test/cat/1.png"], "has test, val, but no training part with class folders"),
        (["train/1.png", "test/1.png"], "no training part with class folders; training pictures belong into"),
        (["cat/1.png", "dog/1.png", "val/cat/1.png"], "has val, but no training part"),
        (["train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png"], "two folders for one part: val and valid"),
    ],
)
def test_layouts_that_cannot_be_meant_are_refused_with_a_cure(tmp_path: Path, files: list[str], message: str) -> None:
    put(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the folder .*gone: No such file"):
        read_folder(tmp_path / "gone")


def test_files_decode_when_asked_for(tmp_path: Path) -> None:
    put(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "dog" / "2.png").write_bytes(b"no picture")
    source = read_folder(tmp_path).train
    assert source.load(1).tolist() == [[[101] * 3] * 3] * 2
    crop = source.load_crop(0, lambda height, width: (0.0, 0.0, float(height), float(width)), (4, 5), "bicubic")
    assert crop.tolist() == [[[100] * 3] * 5] * 4
    assert read_folder(tmp_path, channels=1).train.load(0).shape == (2, 3, 1)
    assert source.pixels() is None
    with pytest.raises(BrokenPicture, match="not a JPEG"):
        source.load(2)
    (tmp_path / "cat" / "1.png").unlink()
    with pytest.raises(BrokenPicture, match="cannot be read: No such file"):
        source.load_crop(0, lambda *_: (0.0, 0.0, 1.0, 1.0), (1, 1), "bicubic")


def test_a_folders_fingerprint_changes_with_names_sizes_and_labels_alone(tmp_path: Path) -> None:
    root = tmp_path / "one"
    put(root, "cat/1.png", "dog/1.png")
    if sys.platform == "linux":  # elsewhere every name is Unicode
        put(root, "dog/caf\udce9.png")
    first = read_folder(root).train.fingerprint()
    moved = tmp_path / "two"
    shutil.copytree(root, moved)
    assert read_folder(moved).train.fingerprint() == first
    (moved / "dog" / "1.png").rename(moved / "dog" / "2.png")
    renamed = read_folder(moved).train.fingerprint()
    with (moved / "dog" / "2.png").open("ab") as file:
        file.write(b"\0")
    grown = read_folder(moved).train.fingerprint()
    (moved / "dog").rename(moved / "cow")
    relabelled = read_folder(moved).train
    assert len({first, renamed, grown, relabelled.fingerprint()}) == 4
    before = relabelled.fingerprint()
    (moved / "cat" / "1.png").unlink()
    assert relabelled.fingerprint() != before


@pytest.mark.parametrize("columns", ["path,label", "File,CLASS", "filename,label", "image,extra,label"])
def test_a_manifest_names_pictures_and_labels(tmp_path: Path, columns: str) -> None:
    put(tmp_path, "a/1.png", "b, c/2.png")
    path, label = tmp_path / "data.csv", [name.lower() in ("label", "class") for name in columns.split(",")]
    rows = [["cat" if is_label else "a/1.png" for is_label in label]]
    rows += [["dog" if is_label else '"b, c/2.png"' for is_label in label]]
    lines = [columns, *(",".join(row) for row in rows), ""]
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    data = read_manifest(path)
    assert listed(data.train, tmp_path) == {"cat": ["a/1.png"], "dog": ["b, c/2.png"]}
    assert data.train.load(1)[0, 0, 0] == 101


def test_a_manifests_split_column_makes_the_parts(tmp_path: Path) -> None:
    path = manifest(
        tmp_path, "path,label,split", "1.png,dog,Train", "2.png,cat,training", "3.png,dog,VALID", "4.png,cat,test"
    )
    data = read_manifest(path)
    assert listed(data.train, tmp_path) == {"cat": ["2.png"], "dog": ["1.png"]}
    assert listed(data.val, tmp_path) == {"cat": [], "dog": ["3.png"]}
    assert listed(data.test, tmp_path) == {"cat": ["4.png"], "dog": []}


def test_a_labels_column_may_hold_any_number_of_names(tmp_path: Path) -> None:
    data = read_manifest(manifest(tmp_path, "path,labels", "1.png,red; big", "2.png,", "3.png,big", "4.png,red;blue;"))
    assert data.train.classes == ("big", "blue", "red")
    assert data.train.targets.dtype == np.float32 and data.train.multi_label
    assert data.train.targets.tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert data.train.class_counts().tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "needs the columns path and label .* has nothing"),
        (["path;label", "1.png;cat"], "separated by commas; its first line has path;label"),
        (["path,label"], "has a header, but no pictures"),
        (["path,label", "1.png,cat", "x.png,cat", "y.png,dog"], r"2 of 3 files do not exist .line 3: x.png, line 4: y"),
        (["path,label", "1.png,cat", "2.png"], "line 3: the column label is empty"),
        (["path,label", "1.png,cat", ",dog"], "line 3: the column path is empty"),
        (["path,label,split", "1.png,cat,trian"], "split 'trian' is not train, val or test. Did you mean 'train'"),
        (["path,label,split", "1.png,cat,test"], "line 2: no training picture is of class 'cat'"),
        (["path,labels,split", "1.png,,test"], "has no row for training"),
        (["path,label,split", "1.png,cat,train", "2.png,cats,val"], "line 3: .* 'cats'. Did you mean 'cat'"),
    ],
)
def test_mistakes_in_a_manifest_name_line_and_cure(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_manifest(manifest(tmp_path, *lines))


def test_a_manifest_in_another_encoding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not UTF-8 .*save it as CSV UTF-8"):
        read_manifest(manifest(tmp_path, "path,label", "1.png,caf\u00e9", encoding="latin-1"))
    with pytest.raises(UserError, match=r"cannot read .*gone.csv: No such file"):
        read_manifest(tmp_path / "gone.csv")
    with pytest.raises(UserError, match="is not a CSV file: field larger than field limit"):
        read_manifest(manifest(tmp_path, "path,label", "1.png," + "x" * 200_000))


def test_the_embedded_set_is_a_thousand_clothes_of_ten_classes() -> None:
    data = open_data("clothing")
    names = "dress hat longsleeve outwear pants shirt shoes shorts skirt t-shirt"
    assert " ".join(data.train.classes) == names
    assert data.val is not None and data.test is not None
    for source, each in ((data.train, 68), (data.val, 8), (data.test, 24)):
        assert source.class_counts().tolist() == [each] * 10
    assert data.test.load(0).shape == (80, 80, 3)
    assert open_data("clothing", channels=1).test.load(0).shape == (80, 80, 1)


def test_no_embedded_picture_is_there_twice() -> None:
    report = check("clothing")
    assert not [finding for finding in report.findings if finding.severity != "note"]
    assert report.median_size == (80, 80)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "no such data: .*gone. Name a folder of pictures, a .csv, an .npz, or clothing"),
        ("data.zip", "neither a folder nor a .csv or .npz file; unpack archives first"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "data.zip").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_data(tmp_path / name)


def test_data_of_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 1 class; a classifier needs two"):
        open_data(manifest(tmp_path, "path,label", "1.png,cat", "2.png,cat"))
    with pytest.raises(UserError, match="channels, not 2"):
        open_data(tmp_path, channels=2)


def numbers(source: Source | None) -> list[int]:
    assert isinstance(source, Subset)
    return source.indices.tolist()


def counted(root: Path, counts: list[int]) -> Path:
    """An .npz with this many pictures per class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    np.savez(root / "data.npz", x_train=np.zeros((len(labels), 2, 2), np.uint8), y_train=labels)
    return root / "data.npz"


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.35, 0.999])
@pytest.mark.parametrize("counts", [[5, 5], [1, 2, 3, 40], [100, 1, 1, 17]])
def test_every_class_has_its_share_on_both_sides(tmp_path: Path, counts: list[int], fraction: float) -> None:
    data = open_data(counted(tmp_path, counts), val_fraction=fraction)
    assert data.val is not None
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(sum(counts)))
    for total, kept, aside in zip(counts, data.train.class_counts(), data.val.class_counts(), strict=True):
        assert kept + aside == total and kept >= 1
        assert aside == (0 if total == 1 else min(max(round(total * fraction), 1), total - 1))


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = counted(tmp_path, [50, 50])
    draws = [numbers(open_data(path, seed=seed).val) for seed in (0, 1, -1, 2**40, 0)]
    assert draws[0] == draws[4] and len({tuple(draw) for draw in draws}) == 4
    # Old runs must find their validation pictures again.
    assert draws[0] == [2, 3, 11, 13, 20, 53, 59, 62, 69, 92]


def test_the_order_of_the_file_system_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, *(f"{name}/{deep}/{i}.png" for name in "cab" for deep in "yx" for i in range(9)))
    first = open_data(tmp_path)
    entries = os.scandir

    class Backwards(list):
        def __enter__(self) -> "Backwards":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(sorted(entries(path), key=lambda e: e.name)[::-1]))
    second = open_data(tmp_path)
    assert numbers(first.val) == numbers(second.val)
    assert first.train.fingerprint() == second.train.fingerprint()
    assert [first.train.name(i) for i in range(len(first.train))] == [second.train.name(i) for i in range(48)]


def test_pictures_with_several_labels_are_drawn_together(tmp_path: Path) -> None:
    lines = [f"{i % 4 + 1}.png,{'red' * (i % 2)};{'blue' * (i % 3 > 0)}" for i in range(20)]
    data = open_data(manifest(tmp_path, "path,labels", *lines), val_fraction=0.25)
    assert data.val is not None and (len(data.train), len(data.val)) == (15, 5)
    assert sorted(numbers(data.train) + numbers(data.val)) == list(range(20))


def test_existing_parts_are_left_alone(tmp_path: Path) -> None:
    put(tmp_path, *(f"{part}/{name}/{i}.png" for part in ("train", "val", "test") for name in "ab" for i in range(4)))
    data = open_data(tmp_path)
    assert [len(source) for source in (data.train, data.val, data.test) if source] == [8, 8, 8]


def test_too_few_pictures_and_impossible_shares_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few pictures to set any aside"):
        open_data(counted(tmp_path, [1, 1]))
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="must lie between 0 and 1"):
            open_data(counted(tmp_path, [5, 5]), val_fraction=fraction)


def with_val(root: Path, *names: str, csv: str = "") -> Splits:
    """Open classes ant, bee and cow with separate validation data."""
    put(root / "train", *(f"{name}/{i}.png" for name in ("ant", "bee", "cow") for i in range(2)))
    put(root / "val", *names)
    if csv:
        (root / "val" / "data.csv").write_text(csv)
    return open_data(root / "train", val=str(root / "val" / "data.csv" if csv else root / "val"))


def test_labels_of_separate_validation_data_are_matched_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vitrail")
    data = with_val(tmp_path, "cow/1.png", "bee/1.png")
    assert data.val is not None and data.val.classes == data.train.classes == ("ant", "bee", "cow")
    assert [(data.val.name(i)[-9:], data.val.targets[i]) for i in range(2)] == [("bee/1.png", 1), ("cow/1.png", 2)]
    assert len(data.train) == 6 and "matched by class name" in caplog.text


def test_separate_validation_data_may_be_the_val_part_of_other_data(tmp_path: Path) -> None:
    parts = ("train", "val", "test")
    data = with_val(tmp_path, *(f"{part}/{name}/{part}.png" for part in parts for name in ("cow", "ant")))
    assert data.val is not None and data.val.name(1)[-11:] == "cow/val.png" and data.val.targets.tolist() == [0, 2]
    shutil.rmtree(tmp_path / "val" / "val")
    with pytest.raises(UserError, match="parts train and test, but none for validation; name one of its folders"):
        open_data(tmp_path / "train", val=str(tmp_path / "val"))


def test_separate_validation_data_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val: no training picture is of class 'aunt'. Did you mean 'ant'"):
        with_val(tmp_path / "1", "aunt/1.png", "bee/1.png")
    with pytest.raises(UserError, match="both have one label per picture, or both several"):
        with_val(tmp_path / "2", "1.png", csv="path,labels\n1.png,ant;bee\n")


def test_several_labels_are_matched_by_name_too(tmp_path: Path) -> None:
    train = manifest(tmp_path / "a", "path,labels", "1.png,ant;bee", "2.png,cow", "3.png,bee", "4.png,cow")
    val = manifest(tmp_path / "b", "path,labels", "1.png,cow;bee", "2.png,cow")
    data = open_data(train, val=str(val))
    assert data.val is not None and data.val.targets.tolist() == [[0, 1, 1], [0, 0, 1]]
