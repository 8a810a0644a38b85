"""Arrays: what CIFAR, IDX and `.npz` files hold comes back exactly, and damaged or hostile ones are refused."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import idx, manifest, put, write_cifar, write_idx

from vitrail.data import ArraySource, open_data
from vitrail.data.arrays import read_cifar, read_idx, read_npz, read_sheets
from vitrail.errors import UserError


@pytest.mark.parametrize(("name", "fine"), [("cifar-10-batches-bin", False), ("cifar-100-binary", True)])
def test_cifar_is_read_from_its_folder_or_the_one_above(tmp_path: Path, name: str, fine: bool) -> None:
    written = write_cifar(tmp_path / name, fine)
    for folder in (tmp_path, tmp_path / name):
        data = read_cifar(folder)
        for part, source in (("train", data.train), ("test", data.test)):
            assert isinstance(source, ArraySource)
            assert np.array_equal(source.images, written[part][0])
            assert np.array_equal(source.targets, written[part][1])
        assert data.train.classes == tuple(f"class {i}" for i in range(100 if fine else 10))
    assert data.train.name(3) == ("cifar-100-binary/train.bin#3" if fine else "cifar-10-batches-bin/data_batch#3")


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda at: cut(at / "train.bin", 10000), r"train.bin has 10,000 bytes, expected 12,296 .4 pictures of 3,074"),
        (lambda at: cut(at / "test.bin", 0), "test.bin has 0 bytes, expected 3,074"),
        (lambda at: (at / "test.bin").unlink(), "test.bin is missing; unpack the official archive again"),
        (lambda at: (at / "fine_label_names.txt").unlink(), "fine_label_names.txt is missing; it names the classes"),
        (lambda at: cut(at / "fine_label_names.txt", 20), r"has label \d+, but there are 3 class names"),
        (lambda at: (at / "train.bin").unlink(), "no CIFAR binaries"),
        (lambda at: as_folder(at / "test.bin"), "cannot read .*test.bin: Is a directory"),
        (lambda at: as_folder(at / "fine_label_names.txt"), "cannot read .*fine_label_names.txt: .*Is a directory"),
    ],
)
def test_damaged_cifar_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_cifar(tmp_path / "cifar", fine=True)
    damage(tmp_path / "cifar")
    with pytest.raises(UserError, match=message):
        read_cifar(tmp_path / "cifar")


def test_two_cifar_sets_in_one_folder_must_be_told_apart(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin", fine=False)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3.bin is missing"):
        read_cifar(tmp_path)
    write_cifar(tmp_path / "cifar-100-binary", fine=True)
    with pytest.raises(UserError, match="more than one CIFAR set; name one"):
        open_data(tmp_path)


def test_cifar_as_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match=r"Python pickles, which are never read .* fetch the binary version"):
        open_data(tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_packed_or_not(tmp_path: Path, packed: bool) -> None:
    images, labels = write_idx(tmp_path, packed=packed)
    data = read_idx(tmp_path)
    assert isinstance(data.train, ArraySource) and isinstance(data.test, ArraySource)
    assert np.array_equal(np.concatenate([data.train.images, data.test.images])[..., 0], images)
    assert np.array_equal(np.concatenate([data.train.targets, data.test.targets]), labels)
    assert data.train.classes == tuple("0123456789")
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghij"))
    assert read_idx(tmp_path).train.classes == tuple("abcdefghij")
    assert data.train.images.flags.writeable  # torch warns of arrays it may not write to


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-images-idx3-ubyte", idx(np.zeros((20, 5, 4), np.uint8))[:-7], "holds 393 bytes .* expected 400"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 5, 4), np.uint8)) + b"?", "holds more after .* expected 400"),
        ("train-images-idx3-ubyte", idx(np.zeros((19, 5, 4), np.uint8)), "19 pictures, but 20 labels"),
        ("train-images-idx3-ubyte", bytes([0, 0, 8, 3]) + b"\xff" * 12, "declares .* bytes, more than the"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + bytes(12), "not an IDX file of bytes with 3 axes"),
        ("train-labels-idx1-ubyte", idx(np.full(20, 10, np.uint8)), "has label 10, but there are 10 class names"),
        ("t10k-labels-idx1-ubyte", None, r"no t10k-labels-idx1-ubyte.* but its counterpart is there"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    write_idx(tmp_path)
    (tmp_path / name).unlink() if data is None else (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_idx(tmp_path)


def test_idx_files_may_come_without_a_test_part(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no train-images-idx3-ubyte"):
        read_idx(tmp_path)
    write_idx(tmp_path)
    for path in tmp_path.glob("t10k-*"):
        path.unlink()
    assert read_idx(tmp_path).test is None


def test_a_packed_idx_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, packed=True)
    cut(tmp_path / "train-images-idx3-ubyte.gz", 200)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz is damaged or cannot be read"):
        read_idx(tmp_path)


def test_a_tile_of_a_sheet_is_the_picture_that_was_put_there(tmp_path: Path) -> None:
    levels = np.arange(2 * 3, dtype=np.uint8).reshape(2, 3) * 40
    Image.fromarray(np.repeat(np.repeat(levels, 8, axis=0), 8, axis=1)).save(tmp_path / "train.jpg", quality=100)
    Image.fromarray(np.full((16, 8), 7, np.uint8)).save(tmp_path / "test.jpg", quality=100)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = read_sheets(tmp_path)
    assert data.test is not None
    assert data.train.targets.tolist() == [0, 0, 0, 1, 1, 1] and data.test.targets.tolist() == [0, 1]
    for i, level in enumerate(levels.flat):
        assert np.abs(data.train.load(i).astype(int) - level).max() <= 1
    assert data.train.name(4) == f"{tmp_path.name}/train#4"


@pytest.mark.parametrize(
    ("size", "message"),
    [((16, 17), "has 17 x 16 pixels: no rows of squares for 2 classes"), ((15, 16), "no rows of squares")],
)
def test_sheets_that_are_not_whole_are_refused(tmp_path: Path, size: tuple[int, int], message: str) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"train\.jpg is damaged: .*install vitrail again"):
        read_sheets(tmp_path)
    Image.new("RGB", size[::-1]).save(tmp_path / "train.jpg")
    with pytest.raises(UserError, match=message):
        read_sheets(tmp_path)


GREY = np.random.default_rng(5).integers(0, 256, (6, 4, 5), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def test_npz_arrays_make_the_parts(tmp_path: Path) -> None:
    path, column = tmp_path / "data.npz", LABELS[:, None]  # Keras gives labels as a column
    np.savez_compressed(path, x_train=GREY, y_train=LABELS, x_test=GREY[:2], y_test=column[:2], classes=["a", "b", "c"])
    data = read_npz(path)
    assert isinstance(data.train, ArraySource) and data.train.images.shape == (6, 4, 5, 1)
    assert data.test is not None and data.test.targets.tolist() == [0, 1] and data.val is None
    assert data.train.classes == ("a", "b", "c") and data.train.name(4) == "data.npz:x_train#4"
    np.savez(path, x_train=GREY, y_train=LABELS, x_val=GREY[3:], y_val=LABELS[3:])
    data = read_npz(path)
    assert data.train.classes == ("0", "1", "2") and data.val is not None and len(data.val) == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": GREY / 255.0, "y_train": LABELS}, r"float64, not uint8 .* save .x \* 255.*astype"),
        ({"x_train": GREY, "y_train": LABELS[:5]}, "6 pictures, but 5 labels"),
        ({"x_train": GREY, "y_train": LABELS, "classes": ["a", "b"]}, "x_train#2 has label 2, but there are 2 class"),
        ({"x_train": GREY, "y_train": LABELS - 1}, "x_train#0 has label -1"),
        ({"x_train": GREY, "y_train": LABELS / 2}, "labels are float64 of shape .6,.; give one whole number"),
        ({"x_train": GREY, "y_train": np.eye(6, dtype=int)}, "labels are int64 of shape .6, 6.; give one whole number"),
        ({"x_train": GREY[:, None], "y_train": LABELS}, r"channels come last, as after x.transpose.0, 2, 3, 1."),
        ({"x_train": GREY[:0], "y_train": LABELS[:0]}, r"shape .0, 4, 5, 1., not"),
        ({"x_train": GREY, "labels": LABELS}, "has no array y_train; it holds labels, x_train. Needed are x_train"),
        ({"x_train": GREY, "y_train": LABELS, "x_val": GREY}, "has no array y_val"),
        (
            {"x_train": np.array([{}], dtype=object), "y_train": LABELS},
            "holds Python objects .pickle., which",
        ),
    ],
)
def test_arrays_of_another_kind_are_refused_with_a_cure(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_npz(tmp_path / "data.npz")


def test_an_npz_that_declares_too_much_or_lies_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"
    for shape, size, message in (
        ("9000000000,", 9_000_000_000, "unpack to 9,000,000,000 bytes, more than the 8,589,934,592"),
        ("9000000000,", 10, "the header of x_train.npy does not fit its size"),
        ("-1, -10", 10, "does not fit its size"),
    ):
        text = (header % shape).ljust(117) + "\n"
        member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
        info = zipfile.ZipInfo("x_train.npy")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, member + bytes(10))
            info.file_size = len(member) + size  # what the archive's directory will claim
        with pytest.raises(UserError, match=message):
            read_npz(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x09\x00")
    with pytest.raises(UserError, match=r"unknown version .9, 0. of x_train.npy"):
        read_npz(path)
    path.write_bytes(b"PK\3\4 no archive")
    with pytest.raises(UserError, match=r"damaged or not a .npz file"):
        read_npz(path)


def test_arrays_may_carry_several_labels() -> None:
    rows = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=np.float32)
    source = ArraySource(GREY[:3], rows, "abc")
    assert source.multi_label and source.class_counts().tolist() == [1, 1, 2]
    assert source.pixels() is source.images and source.name(2) == "picture#2"


def test_arrays_become_grey_or_colour_by_pillows_formula() -> None:
    colour = np.random.default_rng(6).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    source = ArraySource(colour, np.array([0, 1, 1]), ("a", "b"))
    grey = source.with_channels(1)
    assert np.array_equal(grey.load(2)[..., 0], np.asarray(Image.fromarray(colour[2]).convert("L")))
    assert np.array_equal(grey.with_channels(3).load(2), np.repeat(grey.load(2), 3, axis=2))
    assert source.with_channels(3) is source and source.images is colour


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_cropped_as_pillow_does(channels: int) -> None:
    images = np.random.default_rng(7).integers(0, 256, (2, 9, 11, channels), dtype=np.uint8)
    crop = ArraySource(images, np.array([0, 1]), ("a", "b")).load_crop(
        1, lambda height, width: (0.5, 1.5, height - 2.0, width - 3.0), (4, 5), "bilinear"
    )
    image = Image.fromarray(images[1].squeeze()).resize((5, 4), Image.Resampling.BILINEAR, box=(1.5, 0.5, 9.5, 7.5))
    assert np.array_equal(crop, np.asarray(image).reshape(4, 5, channels))


def test_an_arrays_fingerprint_changes_with_pixels_labels_and_classes() -> None:
    changed = GREY.copy()
    changed[5, 3, 4] ^= 1
    sources = [
        ArraySource(GREY, LABELS, "abc"),
        ArraySource(changed, LABELS, "abc"),
        ArraySource(GREY, LABELS[::-1], "abc"),
        ArraySource(GREY, LABELS, "abd"),
        ArraySource(GREY.reshape(6, 5, 4), LABELS, "abc"),
    ]
    assert len({source.fingerprint() for source in sources}) == 5
    assert sources[0].fingerprint() == ArraySource(GREY.copy(), LABELS.astype(np.uint8), "abc").fingerprint()


def test_every_kind_of_data_is_recognised(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar", fine=True)
    (tmp_path / "idx").mkdir()
    write_idx(tmp_path / "idx")
    put(tmp_path / "folder", *(f"{name}/{i}.png" for name in "ab" for i in range(3)))
    table = manifest(tmp_path / "table", "path,label", "1.png,a", "2.png,a", "3.png,b", "4.png,b")
    np.savez(tmp_path / "arrays.npz", x_train=GREY, y_train=LABELS)
    for path, shape in (
        (tmp_path / "cifar", (32, 32, 1)),
        (tmp_path / "idx", (5, 4, 1)),
        (tmp_path / "folder", (2, 3, 1)),
        (table, (2, 3, 1)),
        (tmp_path / "arrays.npz", (4, 5, 1)),
    ):
        data = open_data(str(path), channels=1)
        assert data.val is not None
        assert data.train.load(0).shape == data.val.load(0).shape == shape
        assert open_data(path).train.load(0).shape == (*shape[:2], 3)
