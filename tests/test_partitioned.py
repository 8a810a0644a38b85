"""V-MoE's partitioned checkpoints are read and written as the official code does it; damaged ones are refused."""

import contextlib
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrail import npz
from vitrail.checkpoints import load_model, msgpack, partitioned, storage
from vitrail.checkpoints.msgpack import Ext, Malformed, Reader, Span, pack
from vitrail.checkpoints.partitioned import CHUNKS, read_partitioned, write_partitioned
from vitrail.checkpoints.storage import replace_file
from vitrail.checkpoints.vmoe_names import VMOE
from vitrail.config.vit_moe import ViTMoEConfig
from vitrail.errors import UserError

OFFICIAL = Path(__file__).parent / "golden" / "vmoe_partitioned"
INDEX = OFFICIAL / "vmoe_tiny.index"
FILES = ("vmoe_tiny.index", "vmoe_tiny.data-00000-of-00002", "vmoe_tiny.data-00001-of-00002")
CASES = {
    "k1": {"experts_per_token": 1, "capacity_factor": 1.05, "group_size": 34},
    "k2_C1.05": {"capacity_factor": 1.05, "group_size": 34},
    "k2_C0.5": {"capacity_factor": 0.5, "group_size": 34},
    "k2_C0.5_bpr": {"capacity_factor": 0.5, "group_size": 34, "batch_priority": True},
    "k2_C0.5_bpr_idx": {"capacity_factor": 0.5, "group_size": 34, "batch_priority": True},
    "k2_C8": {"capacity_factor": 8.0, "group_size": 34},
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The official checkpoint in a folder of its own; the path of its index."""
    for name in FILES:
        shutil.copyfile(OFFICIAL / name, tmp_path / name)
    return tmp_path / INDEX.name


def assert_same_arrays(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (array.shape, array.dtype), name
        assert ours[name].tobytes() == array.tobytes(), name


# What the official code wrote, and what it reads


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_an_official_checkpoint_gives_the_official_answer(case: str) -> None:
    answers = npz.read_npz(OFFICIAL / "vmoe_tiny.io.npz", limit=10**8, advice="it is not read.")
    model = load_model(INDEX, **CASES[case])
    logits = model(torch.from_numpy(answers["x"]).permute(0, 3, 1, 2))
    assert float((logits - torch.from_numpy(answers[case])).abs().max()) <= 1e-5 * np.abs(answers[case]).max()


def test_the_configuration_is_read_off_the_arrays() -> None:
    arrays = read_partitioned(INDEX)
    assert len(arrays) == 74
    config, _ = VMOE.to_ours(arrays)
    assert config == ViTMoEConfig(
        image_size=(64, 64), num_classes=10, width=32, depth=4, mlp_dim=64, heads=4, moe_layers=(1, 3), experts=4
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    arrays = read_partitioned(INDEX)
    write_partitioned(tmp_path / "a.b.index", arrays)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.data-00000-of-00001", "a.b.index"]
    assert_same_arrays(read_partitioned(tmp_path / "a.b.index"), arrays)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.lists(st.sampled_from(["a", "b", "c_1", "c_10", "c_2", "é", "-"]), min_size=2, max_size=2).map("/".join),
        st.tuples(
            st.lists(st.integers(1, 5), max_size=4),
            st.sampled_from(["float32", "float16", ">f4", "int64", "bool", "V2"]),
            st.integers(0, 10**6),
        ),
        min_size=1,
        max_size=20,
    ),
    st.integers(1, 40),
)
def test_any_arrays_survive_in_any_number_of_pieces(
    tmp_path: Path, drawn: dict[str, tuple[list[int], str, int]], piece: int
) -> None:
    arrays = {}
    for name, (shape, dtype, seed) in drawn.items():
        raw = np.random.default_rng(seed).integers(0, 2, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
        arrays[name] = raw.view(dtype)[..., 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioned, "MAX_PIECE", 8 * piece)
        write_partitioned(tmp_path / "a.index", arrays)
    little = {name: array.astype(array.dtype.newbyteorder("<")) for name, array in arrays.items()}
    assert_same_arrays(read_partitioned(tmp_path / "a.index"), little)


def test_a_checkpoint_is_written_to_an_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.npz: .*ends in \.index"):
        write_partitioned(tmp_path / "a.npz", {})


def test_a_write_that_stops_between_data_and_index_leaves_no_mix(tmp_path: Path) -> None:
    old, new = {"a": np.zeros(3, np.float32)}, {"a": np.ones(3, np.float32)}
    write_partitioned(tmp_path / "a.index", old)
    replaced: list[str] = []

    def stopping(path: Path, write: Callable[[BinaryIO], object], *, size: int = 0) -> None:
        if replaced:
            raise OSError("the machine stops")
        replaced.append(path.name)
        replace_file(path, write, size=size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioned, "replace_file", stopping)
        with pytest.raises(OSError, match="the machine stops"):
            write_partitioned(tmp_path / "a.index", new)
    assert replaced == ["a.data-00000-of-00001"]
    with pytest.raises(UserError, match=r"cannot read .*a\.index: No such file"):
        read_partitioned(tmp_path / "a.index")
    write_partitioned(tmp_path / "a.index", new)
    assert_same_arrays(read_partitioned(tmp_path / "a.index"), new)


def test_a_checkpoint_stands_when_the_next_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"a": np.zeros(3, np.float32)}
    write_partitioned(tmp_path / "a.index", old)
    monkeypatch.setattr(storage, "_free", lambda path: 7)
    with pytest.raises(UserError, match="the disk is full"):
        write_partitioned(tmp_path / "a.index", {"a": np.ones(3, np.float32)})
    assert_same_arrays(read_partitioned(tmp_path / "a.index"), old)


# Trees that the official code also writes


def leaf(shape: list[int], parts: list[list[tuple[int, int]]], files: list[int], dtype: str = "float32") -> Ext:
    described = pack([shape, dtype, False, {}])
    return Ext(8, pack([described, [slices(part) for part in parts], files]))


def slices(part: list[tuple[int, int]]) -> bytes:
    return pack([pack([start, stop, None]) for start, stop in part])


def chunk(numbers: np.ndarray, part: list[tuple[int, int]]) -> list[Any]:
    described = [list(numbers.shape), numbers.dtype.name, numbers.tobytes()]
    return [[Ext(1, pack(described))], Ext(6, slices(part))]


def checkpoint(folder: Path, tree: dict[str, Any], *data: dict[str, Any], **changes: Any) -> Path:
    """Write a checkpoint from trees, its index with some changes at the top (`...` leaves something out)."""
    head = {"shard_count": len(data), "index": tree, "version": "20220622"} | changes
    (folder / "made.index").write_bytes(pack({name: value for name, value in head.items() if value is not ...}))
    for number, chunks in enumerate(data):
        path = folder / f"made.data-{number:05d}-of-{len(data):05d}"
        path.write_bytes(pack({CHUNKS: True} | chunks))
    return folder / "made.index"


def test_parts_in_several_files_are_put_together(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    parts = [[(0, 2), (0, 6)], [(2, 4), (0, 3)], [(2, 4), (3, 6)]]
    chunks = [chunk(whole[tuple(slice(*side) for side in part)].copy(), part) for part in parts]
    path = checkpoint(
        tmp_path, {"w": leaf([4, 6], parts, [1, 0, 1])}, {"0": [chunks[1]]}, {"0": [chunks[2], chunks[0]]}
    )
    assert_same_arrays(read_partitioned(path), {"w": whole})


def test_only_the_weights_of_a_training_state_are_read(tmp_path: Path) -> None:
    one, part = np.ones(3, np.float32), [(0, 3)]
    index = {
        "opt_state": {"0": {"count": leaf([], [[]], [0], "int32"), "empty": None, "nothing": {}}, "1": {}},
        "params": {"b": leaf([3], [part], [1]), "a": leaf([3], [part], [1])},
        "step": leaf([], [[]], [0], "int32"),
    }
    # numbered: 0 count, 1 a, 2 b, 3 step; the file of the optimizer's state may be left behind
    path = checkpoint(tmp_path, index, {}, {"1": [chunk(one, part)], "2": [chunk(2 * one, part)]})
    (tmp_path / "made.data-00000-of-00002").unlink()
    assert_same_arrays(read_partitioned(path), {"a": one, "b": 2 * one})


def test_the_oldest_checkpoints_have_no_version_and_hold_weights_alone(tmp_path: Path) -> None:
    one, part = np.ones(3, np.float32), [(0, 3)]
    path = checkpoint(tmp_path, {"head": {"bias": leaf([3], [part], [0])}}, {"0": [chunk(one, part)]}, version=...)
    assert_same_arrays(read_partitioned(path), {"head/bias": one})


def test_scalars_and_bfloat16_are_read(tmp_path: Path) -> None:
    short = np.array([1, 2, 3], dtype="u2").view("V2")
    described = Ext(1, pack([[3], "bfloat16", short.tobytes()]))
    index = {"a": leaf([], [[]], [0]), "b": leaf([3], [[(0, 3)]], [0], "bfloat16")}
    data = {"0": [chunk(np.ones(1, np.float32), [])], "1": [[[described], Ext(6, slices([(0, 3)]))]]}
    assert_same_arrays(read_partitioned(checkpoint(tmp_path, index, data)), {"a": np.array(1, "f4"), "b": short})


# Damaged and hostile files

ONE = np.ones(4, np.float32)
PART = [(0, 4)]
GOOD = leaf([4], [PART], [0])


@pytest.mark.parametrize(
    ("index", "data", "message"),
    [
        ({"w": leaf([5], [PART], [0])}, {}, r"made\.index.*'w': its parts do not make up its shape \(5,\)"),
        ({"w": leaf([4], [[(0, 2)], [(0, 2)]], [0, 0])}, {}, "'w': its parts do not make up"),
        ({"w": leaf([4, 4], [[(0, 2), (0, 4)], [(1, 3), (0, 4)]], [0, 0])}, {}, "'w': its parts do not make up"),
        ({"w": leaf([4], [[(0, 4), (0, 1)]], [0])}, {}, "'w': its parts do not make up"),
        ({"w": leaf([4], [[(0, 8)]], [0])}, {}, "'w': its parts do not make up"),
        ({"w": leaf([4], [PART], [1])}, {}, "'w': its parts do not make up"),
        ({"w": leaf([4], [PART], [])}, {}, "'w': it is not described"),
        ({"w": leaf([2**50], [[(0, 2**50)]], [0])}, {}, "'w': 1125899906842624 is not a size"),
        ({"w": leaf([2**40], [[(0, 2**40)]], [0])}, {}, r"made\.index: 'w' of shape \(1099511627776,\) is larger than"),
        ({"w": leaf([1] * 9, [[(0, 1)] * 9], [0])}, {}, "'w': its shape is not described"),
        ({"w": leaf([4], [PART], [0], "object")}, {}, r"made\.index: 'w' has numbers of a type that vitrail does not"),
        ({"w": [1, 2]}, {}, r"made\.index.*'w' is not an array"),
        ({"w": Ext(1, b"")}, {}, r"'w': a value has another type"),
        ({"w": GOOD}, {}, r"made\.data-00000-of-00001 lacks 'w'"),
        ({"w": GOOD}, {"0": [chunk(ONE, [(0, 3)])]}, "holds a part of array 0 that the index does not expect"),
        ({"w": GOOD}, {"0": [chunk(ONE, PART)] * 2}, "holds a part of array 0 that the index does not expect"),
        ({"w": GOOD}, {"0": [chunk(ONE[:3], PART)]}, "'w' has a part of another size"),
        ({"w": GOOD}, {"0": [chunk(np.ones(5, np.float32), PART)]}, "'w' has a part of another size"),
        ({"w": GOOD}, {"0": [chunk(np.ones(4, np.int32), PART)]}, "'w' is not an array of float32"),
        ({"w": GOOD}, {"0": [[1, 2]]}, "'0' is not an array in parts"),
        ({"w": GOOD}, {"0": "x"}, "'0' is not an array in parts"),
        ({"w": GOOD}, {"x": [chunk(ONE, PART)]}, "'x' is not an array in parts"),
    ],
)
def test_trees_that_do_not_hold_together_are_refused(tmp_path: Path, index: dict, data: dict, message: str) -> None:
    path = checkpoint(tmp_path, index, data)
    with pytest.raises(UserError, match=message):
        read_partitioned(path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"version": "20300101"}, r"made\.index is of version '20300101'; vitrail reads up to version 20220622"),
        ({"shard_count": 0}, "does not begin as one"),
        ({"shard_count": 10**6}, "does not begin as one"),
        ({"index": ...}, "does not begin as one"),
    ],
)
def test_an_index_of_another_kind_is_refused(tmp_path: Path, head: dict, message: str) -> None:
    path = checkpoint(tmp_path, {"w": GOOD}, {"0": [chunk(ONE, PART)]}, **head)
    with pytest.raises(UserError, match=message):
        read_partitioned(path)


def test_missing_files_are_named(copy: Path) -> None:
    (copy.parent / FILES[2]).unlink()
    with pytest.raises(UserError, match=r"vmoe_tiny\.data-00001-of-00002 is missing; vmoe_tiny\.index needs it"):
        read_partitioned(copy)
    with pytest.raises(UserError, match=r"cannot read .*none\.index: No such file"):
        read_partitioned(copy.with_name("none.index"))
    with pytest.raises(UserError, match="cannot read"):
        read_partitioned(copy.parent)


@pytest.mark.parametrize("name", FILES)
def test_truncated_official_files_are_refused(copy: Path, name: str) -> None:
    path = copy.parent / name
    data = path.read_bytes()
    for length in (0, 1, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="vmoe_tiny"):
            read_partitioned(copy)
    path.write_bytes(data + b"\x00")
    with pytest.raises(UserError, match=f"{name} is damaged.*more in it"):
        read_partitioned(copy)


def small(folder: Path) -> tuple[Path, list[Path]]:
    """Write a checkpoint small enough to be damaged everywhere: its index, and all its files."""
    matrix, parts = np.arange(6, dtype=np.float32).reshape(2, 3), [[(0, 1), (0, 3)], [(1, 2), (0, 3)]]
    tree = {"params": {"a": leaf([2, 3], parts, [0, 1]), "b": leaf([4], [PART], [1])}, "step": leaf([], [[]], [0])}
    rows = [chunk(matrix[i : i + 1], part) for i, part in enumerate(parts)]
    path = checkpoint(folder, tree, {"0": [rows[0]], "2": []}, {"0": [rows[1]], "1": [chunk(ONE, PART)]})
    return path, sorted(folder.iterdir())


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    index, files = small(tmp_path)
    assert read_partitioned(index)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for file in files:
        data = file.read_bytes()
        for length in range(0, len(data), 3):
            file.write_bytes(data[:length])
            with pytest.raises(UserError, match=r"made\."):
                read_partitioned(index)
        file.write_bytes(data)


def test_a_bit_flipped_anywhere_is_refused_or_changes_a_number(tmp_path: Path) -> None:
    index, files = small(tmp_path)
    random = np.random.default_rng(0)
    refused = 0
    for file in files:
        data = file.read_bytes()
        for place in range(0, len(data), 3):
            damaged = bytearray(data)
            damaged[place] ^= 1 << random.integers(8)
            file.write_bytes(damaged)
            try:
                shapes = [array.shape for array in read_partitioned(index).values()]
            except UserError as error:
                refused += 1
                assert "made." in str(error)
            else:
                assert set(shapes) <= {(2, 3), (4,), ()}
        file.write_bytes(data)
    assert refused > 100


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2), st.lists(st.tuples(st.integers(0, 10**4), st.binary(max_size=6)), min_size=1, max_size=4))
def test_bytes_put_in_anywhere_never_crash_it(tmp_path: Path, which: int, changes: list[tuple[int, bytes]]) -> None:
    index, files = small(tmp_path)
    data = files[which].read_bytes()
    for place, new in changes:
        place %= len(data)
        data = data[:place] + new + data[place + len(new) // 2 :]
    files[which].write_bytes(data)
    with contextlib.suppress(UserError):
        read_partitioned(index)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.index").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.index"):
        read_partitioned(tmp_path / "a.index")


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">BI", 0xDD, 2**32 - 1) + b"\xc0" * 3000,  # more values than MAX_VALUES
        struct.pack(">BI", 0xDD, 2**32 - 1),
        struct.pack(">BI", 0xDF, 2**32 - 1),
        struct.pack(">BI", 0xDB, 2**32 - 1),
        struct.pack(">BI", 0xC6, 2**32 - 1),
        b"\x91" * 10_000,  # lists in lists
        struct.pack(">BH", 0xDA, 5000) + b"x" * 5000,
        b"\x82\xa1a\x01\xa1a\x02",  # the same name twice
        b"\x81\x01\x01",
        b"\xc1",
        b"\xa2\xff\xff",
    ],
)
def test_absurd_sizes_take_no_memory(tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack, "MAX_VALUES", 2000)
    path = tmp_path / "a.index"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.index is damaged"):
        read_partitioned(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


# msgpack itself


def decoded(data: bytes, tmp_path: Path) -> Any:
    (tmp_path / "value").write_bytes(data)
    with open(tmp_path / "value", "rb") as file:
        return Reader(file).whole_file()


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"\xc0", None),
        (b"\xc2", False),
        (b"\xc3", True),
        (b"\x7f", 127),
        (b"\xe0", -32),
        (b"\xcc\xff", 255),
        (b"\xcd\x01\x00", 256),
        (b"\xce\x00\x01\x00\x00", 65536),
        (b"\xcf" + bytes(7) + b"\x05", 5),
        (b"\xd0\x80", -128),
        (b"\xd1\xff\xfe", -2),
        (b"\xd2\xff\xff\xff\xfd", -3),
        (b"\xd3" + b"\xff" * 8, -1),
        (b"\xca\x3f\x80\x00\x00", 1.0),
        (b"\xcb\x3f\xf8" + bytes(6), 1.5),
        (b"\xa2ab", "ab"),
        (b"\xd9\x01a", "a"),
        (b"\xda\x00\x01a", "a"),
        (b"\xdb\x00\x00\x00\x01a", "a"),
        (b"\x92\x01\x02", [1, 2]),
        (b"\xdc\x00\x01\x01", [1]),
        (b"\xdd\x00\x00\x00\x01\x01", [1]),
        (b"\x81\xa1a\x01", {"a": 1}),
        (b"\xde\x00\x01\xa1a\x01", {"a": 1}),
        (b"\xdf\x00\x00\x00\x01\xa1a\x01", {"a": 1}),
        (b"\xc4\x02ab", Span(None, 2, 4)),
        (b"\xc5\x00\x02ab", Span(None, 3, 5)),
        (b"\xc6\x00\x00\x00\x02ab", Span(None, 5, 7)),
        (b"\xd4\x07a", Span(7, 2, 3)),
        (b"\xd5\x07ab", Span(7, 2, 4)),
        (b"\xd6\x07abcd", Span(7, 2, 6)),
        (b"\xd7\x07" + bytes(8), Span(7, 2, 10)),
        (b"\xd8\x07" + bytes(16), Span(7, 2, 18)),
        (b"\xc7\x02\x07ab", Span(7, 3, 5)),
        (b"\xc8\x00\x02\x07ab", Span(7, 4, 6)),
        (b"\xc9\x00\x00\x00\x02\x07ab", Span(7, 6, 8)),
    ],
)
def test_every_kind_of_value_is_decoded_as_the_specification_says(tmp_path: Path, data: bytes, value: Any) -> None:
    assert decoded(data, tmp_path) == value
    for length in range(len(data)):
        with pytest.raises(Malformed):
            decoded(data[:length], tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**64 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_decoding_undoes_encoding(tmp_path: Path, value: Any) -> None:
    assert decoded(pack(value), tmp_path) == value
