"""PyTorch files give their weights, and nothing that a file says is run."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.checkpoints.pickled import read_pickle
from vitrail.errors import UserError

WEIGHTS = {
    "layer.weight": torch.arange(6.0).reshape(2, 3) / 7,
    "layer.bias": torch.tensor([0.1, -3.0, 1e-8]),
    "norm.num_batches_tracked": torch.tensor(1234),
}


def assert_is_weights(arrays: dict[str, np.ndarray]) -> None:
    assert list(arrays) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert arrays[name].dtype == tensor.numpy().dtype
        assert arrays[name].shape == tensor.shape
        assert arrays[name].tobytes() == tensor.numpy().tobytes()


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", [None, "state_dict", "model", "state_dict_ema", "model_ema"])
def test_weights_are_found_flat_or_beside_a_training_state(tmp_path: Path, place: str | None, zipped: bool) -> None:
    state = OrderedDict(WEIGHTS)
    training = {"epoch": 3, "optimizer": {"lr": [0.1], "step": torch.ones(2)}}
    torch.save(
        state if place is None else {**training, place: state},
        tmp_path / "w.pth",
        _use_new_zipfile_serialization=zipped,
    )
    assert_is_weights(read_pickle(tmp_path / "w.pth"))


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    others = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    torch.save({"state_dict": others, "state_dict_ema": WEIGHTS}, tmp_path / "w.pth")
    assert_is_weights(read_pickle(tmp_path / "w.pth"))


def test_the_prefix_of_parallel_training_is_taken_off(tmp_path: Path) -> None:
    torch.save({"model": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}}, tmp_path / "w.pth")
    assert_is_weights(read_pickle(tmp_path / "w.pth"))
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")  # a module of that name
    assert list(read_pickle(tmp_path / "w.pth")) == ["module.a", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_widened_to_the_same_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    half = (torch.randn(50, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    torch.save({"a": nn.Parameter(half), "n": torch.tensor([2**31 - 1], dtype=torch.int32)}, tmp_path / "w.pth")
    arrays = read_pickle(tmp_path / "w.pth")
    assert arrays["a"].dtype == np.float32 and arrays["n"].dtype == np.int64
    assert torch.equal(torch.from_numpy(arrays["a"]), half.float())
    assert arrays["n"].item() == 2**31 - 1


def test_tensors_that_share_memory_are_parted(tmp_path: Path) -> None:
    table = torch.arange(12.0).reshape(3, 4)
    torch.save({"whole": table, "same": table, "part": table[1:, ::2], "turned": table.T}, tmp_path / "w.pth")
    arrays = read_pickle(tmp_path / "w.pth")
    assert np.array_equal(arrays["part"], table[1:, ::2]) and np.array_equal(arrays["turned"], table.T)
    arrays["whole"][:] = -1
    for name in ("same", "part", "turned"):
        assert arrays[name].min() >= 0, name


@pytest.mark.parametrize("place", ["file", "weights", "beside", "name"])
@pytest.mark.parametrize("form", ["zip", "before torch 1.6", "pickle 0", "pickle 2", "pickle 4"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str, place: str) -> None:
    evil = Call(os.system, f"echo > {tmp_path / 'ran'}")
    content = {
        "file": evil,
        "weights": {"state_dict": {**WEIGHTS, "a": evil}},
        "beside": {"state_dict": WEIGHTS, "args": evil},
        "name": {**WEIGHTS, evil: torch.ones(1)},
    }[place]
    path = tmp_path / "w.pth"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"w\.pth") as refusal:
        read_pickle(path)
    assert "weights_only" not in str(refusal.value)  # torch's advice is to run it
    if form in ("zip", "before torch 1.6"):
        assert "system" in str(refusal.value)
    assert not (tmp_path / "ran").exists()


def test_no_environment_variable_makes_it_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"a": Call(os.system, f"echo > {tmp_path / 'ran'}")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"asks to run .*system"):
        read_pickle(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, zipped: bool) -> None:
    torch.save(WEIGHTS, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pth").read_bytes()
    for end in sorted({0, 1, 4, 100, len(whole) - 1, *range(0, len(whole), max(len(whole) // 25, 1))}):
        (tmp_path / "cut.pth").write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cut\.pth"):
            read_pickle(tmp_path / "cut.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_damaged_file_is_read_or_refused_but_never_crashes(tmp_path: Path, zipped: bool) -> None:
    torch.save(WEIGHTS, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    whole, rng, refused = (tmp_path / "w.pth").read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(0, len(whole), size=60):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "w.pth").write_bytes(damaged)
        try:
            read_pickle(tmp_path / "w.pth")
        except UserError:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(2)], "list"),
        (torch.ones(2), "Tensor"),
        ({}, "dict"),
        (7, "int"),
        ({"a": torch.ones(2), "epoch": 3}, "'epoch' is a int"),
        ({"model": {"a": [torch.ones(2)]}}, "'a' is a list"),
        ({1: torch.ones(2)}, "1 is a Tensor"),
        ({"a": torch.ones(2, dtype=torch.float64)}, "'a' has numbers of type torch.float64"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' has numbers of type torch.complex64"),
        ({"a": torch.ones(2, dtype=torch.bool)}, "'a' has numbers of type torch.bool"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is a torch.sparse_coo tensor"),
        ({"a": torch.ones(2, device="meta")}, "'a' is a torch.strided tensor on meta"),
    ],
    ids=str,
)
def test_what_is_not_weights_is_an_error_that_names_it(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth") as refusal:
        read_pickle(tmp_path / "w.pth")
    assert says in str(refusal.value)


def test_what_is_not_a_file_of_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>Not found</title>")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    for name in ("page.pth", "other.pth", "missing.pth", "."):
        with pytest.raises(UserError, match=r"page|other|No such file|directory|Permission"):
            read_pickle(tmp_path / name)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(1).expand(10**12)}, path)  # one number, repeated by a stride of 0
    with pytest.raises(UserError, match=r"unpack to more than .* bytes at 'a'"):
        read_pickle(path)
    torch.save({str(i): shared for shared in [torch.ones(10_000)] for i in range(1000)}, path)  # a thousand names
    with pytest.raises(UserError, match="unpack to more than"):
        read_pickle(path)
    torch.save({"a": Call(bytearray, 10**13)}, path)
    with pytest.raises(UserError, match="more memory than there is"):
        read_pickle(path)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.namelist():
            bomb.writestr(member, plain.read(member))
    with pytest.raises(UserError, match="would unpack to 4,00"):
        read_pickle(tmp_path / "bomb.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_declared_sizes_beyond_the_file_are_refused(tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": torch.zeros(300)}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "w.pth").read_bytes()
    count = b"M" + struct.pack("<H", 300)  # the pickle's 300, of the storage and of the shape
    assert whole.count(count) >= 2
    for larger in (b"M" + struct.pack("<H", 65535), b"J" + struct.pack("<i", 2**31 - 1)):
        # a longer number shifts the rest of a zip file, which then is no zip file; the older format is a plain stream
        (tmp_path / "w.pth").write_bytes(whole.replace(count, larger))
        with pytest.raises(UserError, match=r"w\.pth"):
            read_pickle(tmp_path / "w.pth")
