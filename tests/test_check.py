"""Checking a data set: every fault that is planted is found, by name, and nothing else is."""

import json
import shutil
import struct
import zlib
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from vitrail.check import CheckReport, Finding, check, print_report
from vitrail.errors import UserError


def picture(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, parts: tuple[str, ...] = ("",), classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write 10 different pictures per class and part: 0.png to 9.png."""
    seed = 0
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(10):
                picture(seed).save(root / part / name / f"{i}.png", compress_level=0)
                seed += 1
    return root


def found(report: CheckReport) -> dict[str, Finding]:
    kinds = [finding.kind for finding in report.findings]
    assert len(kinds) == len(set(kinds))
    return dict(zip(kinds, report.findings, strict=True))


def items(finding: Finding, root: Path) -> list[tuple[list[str], str]]:
    return [([str(Path(name).relative_to(root)) for name in item.names], item.detail) for item in finding.items]


def shown(report: CheckReport) -> str:
    console = Console(file=StringIO(), width=200)
    print_report(report, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_nothing_is_wrong_with_a_clean_folder(tmp_path: Path) -> None:
    report = check(make_folder(tmp_path, ("train", "test")))
    assert report.ok and report.findings == ()
    assert report.classes == ("cat", "dog")
    assert report.counts == {"train": (10, 10), "test": (10, 10)}
    assert report.median_size == (40, 48) and report.imbalance == 1.0
    assert "0 errors, 0 warnings, 0 notes" in shown(report)


def test_pictures_without_a_validation_part_are_one_part(tmp_path: Path) -> None:
    assert check(make_folder(tmp_path)).counts == {"train": (10, 10)}


def test_broken_pictures_and_empty_files_are_errors_with_their_reasons(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    data = (root / "cat" / "3.png").read_bytes()
    (root / "cat" / "3.png").write_bytes(data[: len(data) // 2])
    (root / "cat" / "4.png").write_text("<html>404</html>")
    for name in ("5.png", "6.png"):
        (root / "dog" / name).write_bytes(b"")
    report = check(root)
    findings = found(report)
    assert not report.ok and findings.keys() == {"broken", "empty-file"}
    names = [item.names for item in findings["broken"].items]
    assert names == [(str(root / "cat" / "3.png"),), (str(root / "cat" / "4.png"),)]
    assert "truncated" in findings["broken"].items[0].detail
    assert "not a JPEG, PNG" in findings["broken"].items[1].detail
    assert items(findings["empty-file"], root) == [
        (["dog/5.png"], "the file is empty"),
        (["dog/6.png"], "the file is empty"),
    ]
    assert findings["empty-file"].text == "2 files without a single byte; fetch again or remove."
    assert report.counts == {"train": (10, 10)}


def test_copies_are_found_by_bytes_and_by_pixels(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    shutil.copy(root / "cat" / "0.png", root / "cat" / "copy.png")
    Image.open(root / "dog" / "0.png").save(root / "dog" / "again.bmp")
    report = check(root)
    assert report.ok
    finding = found(report).pop("duplicate")
    assert [f.kind for f in report.findings] == ["duplicate"] and finding.severity == "warning"
    assert items(finding, root) == [
        (["cat/0.png", "cat/copy.png"], "same bytes"),
        (["dog/0.png", "dog/again.bmp"], "same pixels"),
    ]


def test_pictures_of_the_same_bytes_but_another_shape_are_different(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    Image.new("RGB", (40, 80)).save(root / "cat" / "high.png")
    Image.new("RGB", (80, 40)).save(root / "dog" / "wide.png")
    assert check(root).findings == ()


def test_one_picture_under_two_labels_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    shutil.copy(root / "cat" / "0.png", root / "dog" / "copy.png")
    report = check(root)
    assert not report.ok and found(report).keys() == {"conflict"}
    assert items(found(report)["conflict"], root) == [(["cat/0.png", "dog/copy.png"], "cat, dog")]


def test_one_picture_in_two_parts_is_an_error(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ("train", "val", "test"))
    for part in ("val", "test"):
        shutil.copy(root / "train" / "cat" / "0.png", root / part / "cat" / "copy.png")
    shutil.copy(root / "val" / "dog" / "1.png", root / "test" / "dog" / "copy.png")
    report = check(root)
    assert not report.ok and found(report).keys() == {"leakage"}
    assert items(found(report)["leakage"], root) == [
        (["train/cat/0.png", "val/cat/copy.png", "test/cat/copy.png"], "train, val, test"),
        (["val/dog/1.png", "test/dog/copy.png"], "val, test"),
    ]


def test_rare_and_small_classes_are_named_with_their_numbers(tmp_path: Path) -> None:
    root = make_folder(tmp_path, classes=("cat", "dog", "emu"))
    for i in range(1, 10):
        (root / "emu" / f"{i}.png").unlink()
    for i in range(4):
        picture(100 + i).save(root / "dog" / f"more{i}.png")
    report = check(root)
    findings = found(report)
    assert report.ok and findings.keys() == {"imbalance", "small-class"}
    assert report.imbalance == 14.0
    assert "dog has 14.0 times as many training pictures as emu" in findings["imbalance"].text
    assert [(item.names, item.detail) for item in findings["small-class"].items] == [(("emu",), "1 picture")]


def test_odd_modes_are_noted_each_with_its_pictures(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    deep = np.random.default_rng(0).integers(0, 65536, (40, 48), dtype=np.uint16)
    Image.fromarray(deep).save(root / "cat" / "deep.png")
    picture(100).convert("CMYK").save(root / "cat" / "print.jpg")
    picture(101).quantize(16).save(root / "cat" / "palette.png")
    picture(102).convert("RGBA").save(root / "cat" / "alpha.png")
    picture(103).convert("L").save(root / "dog" / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(104).save(root / "dog" / "turned.jpg", exif=exif)
    picture(105).save(root / "dog" / "turned.png", exif=exif)
    report = check(root)
    assert report.ok
    got = {kind: [names for names, _ in items(finding, root)] for kind, finding in found(report).items()}
    assert got == {
        "cmyk": [["cat/print.jpg"]],
        "16-bit": [["cat/deep.png"]],
        "palette": [["cat/palette.png"]],
        "transparent": [["cat/alpha.png"]],
        "grey": [["cat/deep.png"], ["dog/grey.png"]],
        "turned": [["dog/turned.jpg"], ["dog/turned.png"]],
    }
    assert {finding.kind for finding in report.findings if finding.severity == "warning"} == {"cmyk"}
    assert "2 grey pictures among 25 in colour" in found(report)["grey"].text
    assert "grey" not in found(check(root, channels=1))


def test_a_folder_of_grey_pictures_is_not_odd(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert check(root).findings == ()


def test_sixteen_bit_colour_is_noted_though_pillow_hides_it(tmp_path: Path) -> None:
    root = make_folder(tmp_path)

    # Pillow cannot write it: 48 x 40 pixels of 6 bytes behind a filter byte per row.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + bytes(range(0, 240)) + bytes(48)) * 40)
    header = struct.pack(">IIBBBBB", 48, 40, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (root / "cat" / "deep.png").write_bytes(png)
    report = check(root)
    assert [(f.kind, items(f, root)) for f in report.findings] == [("16-bit", [(["cat/deep.png"], "")])]


def test_a_turn_that_a_png_tells_at_its_end_is_seen(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 8
    picture(100).save(root / "cat" / "turned.png", exif=exif)
    data = (root / "cat" / "turned.png").read_bytes()
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    end = data.index(b"IEND") - 4
    moved = data[:start] + data[start + length : end] + data[start : start + length] + data[end:]
    (root / "cat" / "turned.png").write_bytes(moved)
    assert found(check(root)).keys() == {"turned"}


def test_tiny_and_elongated_pictures_are_found_among_others(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    picture(100, 31, 60).save(root / "cat" / "tiny.png")
    picture(101, 40, 160).save(root / "cat" / "long.png")
    picture(102, 161, 40).save(root / "dog" / "longer.png")
    report = check(root)
    assert report.ok and found(report).keys() == {"tiny", "elongated"}
    assert items(found(report)["tiny"], root) == [(["cat/tiny.png"], "31 x 60")]
    assert items(found(report)["elongated"], root) == [(["dog/longer.png"], "161 x 40")]


def test_a_data_set_of_small_pictures_is_not_at_fault(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        picture(i, 28, 28).save(path)
    report = check(root)
    assert report.findings == () and report.median_size == (28, 28)


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/notes.txt", "LICENSE", ".hidden", "Thumbs.db"):
        (root / name).write_text("x")
    picture(100).save(root / "lost.png")
    findings = found(check(root))
    assert findings.keys() == {"outside-classes", "ignored"}
    assert items(findings["outside-classes"], root) == [(["lost.png"], "")]
    assert items(findings["ignored"], root) == [
        (["cat/a.heic", "cat/b.HEIC"], ".heic: 2"),
        (["LICENSE"], "no suffix: 1"),
        (["dog/notes.txt"], ".txt: 1"),
    ]
    assert findings["ignored"].text.startswith("4 files ignored")


def test_links_to_nothing_are_found(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "cat" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    report = check(root)
    assert [(f.kind, items(f, root)) for f in report.findings] == [("no-file", [(["cat/gone.jpg"], "")])]


def test_class_folders_without_pictures_are_found_in_every_part(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ("Training", "test"))
    (root / "Training" / "emu").mkdir()
    (root / "test" / "dog" / "inside").mkdir()
    shutil.rmtree(root / "test" / "cat")
    (root / "test" / "cat").mkdir()
    (root / "valid" / "dog").mkdir(parents=True)
    report = check(root)
    assert report.ok and found(report).keys() == {"empty-class"}
    assert [names for names, _ in items(found(report)["empty-class"], root)] == [
        ["Training/emu"],
        ["test/cat"],
        ["valid/dog"],
    ]
    assert report.counts == {"train": (10, 10), "test": (0, 10)}


def test_pictures_in_folders_below_a_class_do_not_make_it_empty(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "cat").rename(tmp_path / "aside")
    (root / "cat" / "album").mkdir(parents=True)
    for path in sorted((tmp_path / "aside").iterdir()):
        path.rename(root / "cat" / "album" / path.name)
    (tmp_path / "aside").rmdir()
    assert check(root).findings == ()


def test_a_suffix_that_belies_the_content_is_noted(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "cat" / "0.png").rename(root / "cat" / "0.JPG")
    picture(100).save(root / "dog" / "fine.jfif", "JPEG")
    report = check(root)
    assert report.ok and found(report).keys() == {"wrong-suffix"}
    assert items(found(report)["wrong-suffix"], root) == [(["cat/0.JPG"], "PNG")]


def test_a_manifest_is_checked_with_its_labels_and_parts(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "unlisted.txt").write_text("not this check's business")
    lines = [f"{name}/{i}.png,{name},train" for name in ("cat", "dog") for i in range(10)]
    lines += ["cat/0.png,dog,train", "cat/1.png,cat,test", "dog/2.png,dog,train"]
    (tmp_path / "set.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    report = check(tmp_path / "set.csv")
    findings = found(report)
    assert not report.ok and findings.keys() == {"conflict", "leakage", "duplicate"}
    assert items(findings["conflict"], tmp_path) == [(["cat/0.png", "cat/0.png"], "cat, dog")]
    assert items(findings["leakage"], tmp_path) == [(["cat/1.png", "cat/1.png"], "train, test")]
    assert items(findings["duplicate"], tmp_path) == [(["dog/2.png", "dog/2.png"], "same bytes")]
    assert report.counts == {"train": (10, 12), "test": (1, 0)}


def test_pictures_with_several_labels_conflict_when_the_sets_differ(tmp_path: Path) -> None:
    make_folder(tmp_path)
    lines = [f"cat/{i}.png,cat" for i in range(10)] + [f"dog/{i}.png,dog;pet" for i in range(10)]
    (tmp_path / "set.csv").write_text(
        "\n".join(["path,labels", *lines, "cat/0.png,pet;cat", "dog/0.png,pet;dog"]) + "\n"
    )
    report = check(tmp_path / "set.csv")
    assert found(report).keys() == {"conflict", "duplicate"}
    assert found(report)["conflict"].items[0].detail == "cat, cat + pet"
    assert report.counts == {"train": (11, 11, 12)}


def test_arrays_are_checked_for_what_arrays_can_have(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8)
    labels = np.arange(24) % 2
    pixels[2] = pixels[0]  # both of class 0
    pixels[5] = pixels[4]  # classes 0 and 1
    test = np.random.default_rng(1).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    test[3] = pixels[7]
    np.savez(tmp_path / "set.npz", x_train=pixels, y_train=labels, x_test=test, y_test=np.array([0, 0, 1, 1]))
    report = check(tmp_path / "set.npz", channels=1)
    got = {kind: [(item.names, item.detail) for item in finding.items] for kind, finding in found(report).items()}
    train, held_out = "set.npz:x_train#{}", "set.npz:x_test#{}"
    assert got == {
        "conflict": [((train.format(4), train.format(5)), "0, 1")],
        "leakage": [((train.format(7), held_out.format(3)), "train, test")],
        "duplicate": [((train.format(0), train.format(2)), "same pixels")],
    }
    assert not report.ok
    assert report.counts == {"train": (12, 12), "test": (2, 2)} and report.median_size == (8, 8)


def test_the_result_does_not_depend_on_threads(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ("train", "test"))
    shutil.copy(root / "train" / "cat" / "0.png", root / "test" / "dog" / "copy.png")
    assert check(root, workers=0) == check(root, workers=4)


def test_the_report_is_plain_json_with_every_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for i in range(10):
        (root / "cat" / f"{i}.png").write_bytes(b"")
    document = json.loads(json.dumps(check(root).to_json(), allow_nan=False))
    assert document["ok"] is False and document["counts"] == {"train": [10, 10]}
    (finding,) = document["findings"]
    assert (finding["kind"], finding["severity"]) == ("empty-file", "error")
    assert len(finding["items"]) == 10
    assert finding["items"][0] == {"names": [str(root / "cat" / "0.png")], "detail": "the file is empty"}


def test_the_terminal_shows_the_first_pictures_of_each_finding_and_no_markup(tmp_path: Path) -> None:
    root = make_folder(tmp_path, classes=("[red]cat", "dog"))
    for i in range(7):
        (root / "[red]cat" / f"{i}.png").write_bytes(b"")
    text = shown(check(root))
    assert "[red]cat" in text.split("median size")[0]
    assert f"{root}/[red]cat/4.png (the file is empty)" in text and "5.png" not in text
    assert "error: 7 files without a single byte" in text and "and 2 more" in text
    assert "1 error, 0 warnings, 0 notes" in text


def test_names_that_no_terminal_can_print_are_shown_escaped(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    try:
        (root / "dog" / "0.png").rename(root / "dog" / "bell\a\udcff.png")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes only printable names")
    (root / "dog" / "bell\a\udcff.png").write_bytes(b"")
    assert r"bell\x07\udcff.png (the file is empty)" in shown(check(root))


def test_many_classes_are_shown_from_the_smallest(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(30), 10)
    labels[labels == 17] = 16
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels) + 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", x_train=pixels, y_train=np.append(labels, 17))
    text = shown(check(tmp_path / "set.npz", channels=1))
    rows = [line.split()[1] for line in text.splitlines() if line.startswith("│")]
    assert len(rows) == 21 and rows[0] == "17" and "16" not in rows[:20]
    assert "the 20 smallest of 30" in " ".join(text.split())


def test_a_missing_folder_and_one_without_pictures_are_mistakes_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data"):
        check(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no pictures"):
        check(tmp_path)
