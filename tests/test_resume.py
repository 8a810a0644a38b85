"""The state of a run comes back bit for bit, from the newest checkpoint that is whole."""

import copy
import errno
import json
import logging
import math
import os
import random
import shutil
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import every_fault
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitrail.checkpoints.resume import _decoded, _encoded, load_latest, save_state
from vitrail.errors import UserError


@pytest.fixture
def quick_disk(monkeypatch) -> None:
    """Let syncing return at once where a test saves hundreds of times; it still counts as an operation."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal in structure, types and bits."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [(type(key), key) for key in a] == [(type(key), key) for key in b] and all(
            same(a[key], b[key]) for key in a
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return a == b


def there_and_back(folder: Path, tree: dict[str, Any]) -> dict[str, Any]:
    save_state(folder, tree, keep=1)
    found = load_latest(folder)
    assert found is not None
    return found[0]


def state_at(step: int, text: str = "") -> dict[str, Any]:
    return {"step": step, "text": text, "weights": torch.full((50,), float(step))}


def trained(optimizer_class: type[torch.optim.Optimizer], **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    parts = [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[1].parameters(), *model[2].parameters()]}]
    optimizer = optimizer_class(parts, **settings)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}), (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9})],
)
def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path, optimizer_class: Any, options: dict) -> None:
    model, optimizer = trained(optimizer_class, **options)
    tree = {
        "step": 3,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.default_rng(7).bit_generator.state,
        "generators": [torch.Generator().manual_seed(5).get_state()],
    }
    expected = copy.deepcopy(tree)
    expected["model"] = dict(expected["model"])
    back = there_and_back(tmp_path, tree)
    assert same(back, expected)
    for _ in range(3):
        step(model, optimizer)
    other, other_optimizer = trained(optimizer_class, **options)
    other.load_state_dict(back["model"])
    other_optimizer.load_state_dict(back["optimizer"])
    torch.set_rng_state(back["torch"])
    for _ in range(3):
        step(other, other_optimizer)
    assert same(dict(other.state_dict()), dict(model.state_dict()))


def test_every_kind_of_value_comes_back_exactly(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    nan_with_payload = struct.unpack("d", struct.pack("Q", 0xFFF8_0000_0000_0123))[0]
    tree = {
        "step": 7,
        "keys": {0: "int", "0": "text", (1, "a"): "tuple", None: "none", True: "bool", -1.5: "float"},
        "plain": [None, True, False, 0, -(2**200), "", "été \ud800", "t"],
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, nan_with_payload],
        "nested": ({"tensor": "0"}, {"dict": []}, [], (), {}, ((),)),
        "kinds": [
            torch.tensor([True, False]),
            torch.arange(3, dtype=torch.int64),
            torch.randn(2, 3).bfloat16(),
            torch.randn(2).half(),
            torch.randn(2).double(),
            torch.empty(0),
            torch.tensor(4.0),
            torch.tensor([math.nan, -math.inf]),
        ],
        "shared": [shared, shared, shared[2:], shared.T],
    }
    assert same(there_and_back(tmp_path, tree), tree)
    ordered = there_and_back(tmp_path, {"step": 8, "state": OrderedDict(b=nn.Parameter(torch.ones(2)), a=1)})
    assert list(ordered["state"]) == ["b", "a"]
    assert torch.equal(ordered["state"]["b"], torch.ones(2))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_any_tree_comes_back_exactly(tree: Any) -> None:
    text = json.dumps(_encoded(tree, "state", {}), allow_nan=False)
    assert same(_decoded(json.loads(text), {}), tree)


def test_what_a_state_cannot_hold_is_named_with_its_place(tmp_path: Path) -> None:
    for odd in ({1, 2}, object(), np.zeros(2), 1j):
        with pytest.raises(TypeError, match=r"state\.optimizer\[1\]\.lr is a "):
            save_state(tmp_path, {"step": 1, "optimizer": [0, {"lr": odd}]}, keep=1)
    assert load_latest(tmp_path) is None


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nowhere") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001").write_text("a file")
    assert load_latest(tmp_path) is None


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for number in (0, 5, 10, 123_456_789):
        path = save_state(tmp_path, state_at(number), keep=2)
        assert path.name == f"step-{number:08d}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-123456789"]
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 123_456_789
    assert found[1].name == "step-123456789"


def test_checkpoints_of_later_steps_are_never_removed(tmp_path: Path) -> None:
    save_state(tmp_path, state_at(50), keep=1)
    save_state(tmp_path, state_at(10), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000050"]


def damage(path: Path, harm: str) -> None:
    if harm == "renamed":
        path.rename(path.with_name("step-00000030"))
    elif harm == "empty folder":
        shutil.rmtree(path)
        path.mkdir()
    else:
        name, kind = harm.split()
        file = path / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        if kind == "missing":
            file.unlink()
        else:
            file.write_bytes({"flipped": data, "truncated": data[:-1], "empty": b""}[kind])


@pytest.mark.parametrize(
    "harm",
    [
        "renamed",
        "empty folder",
        *[
            f"{name} {kind}"
            for name in ("state.json", "state.safetensors", "manifest.json")
            for kind in ("missing", "flipped", "truncated", "empty")
        ],
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, harm: str, caplog) -> None:
    save_state(tmp_path, state_at(10), keep=3)
    save_state(tmp_path, state_at(20), keep=3)
    damage(tmp_path / "step-00000020", harm)
    found = load_latest(tmp_path)
    assert found is not None
    assert same(found[0], state_at(10))
    assert "is damaged and passed over" in caplog.text
    save_state(tmp_path, state_at(20, "again"), keep=3)  # the wreck gives way
    if harm != "renamed":
        found = load_latest(tmp_path)
        assert found is not None
        assert found[0]["text"] == "again"


def test_when_every_checkpoint_is_damaged_the_newest_is_told(tmp_path: Path) -> None:
    for number in (10, 20):
        save_state(tmp_path, state_at(number), keep=3)
        damage(tmp_path / f"step-{number:08d}", "state.safetensors truncated")
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged.*step-00000020.state\.safetensors has"):
        load_latest(tmp_path)


def test_a_state_from_a_newer_version_is_not_taken_for_damage(tmp_path: Path, monkeypatch) -> None:
    save_state(tmp_path, state_at(10), keep=2)
    monkeypatch.setattr("vitrail.checkpoints.resume.FORMAT", 3)
    path = save_state(tmp_path, state_at(20), keep=2)
    assert json.loads((path / "state.json").read_text())["format"] == 3
    monkeypatch.setattr("vitrail.checkpoints.resume.FORMAT", 1)
    with pytest.raises(UserError, match=r"newer vitrail.*pip install -U"):
        load_latest(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", [20, 30])
def test_any_failing_operation_leaves_a_checkpoint_that_loads(
    tmp_path: Path, code: int, step: int, caplog, quick_disk: None
) -> None:
    """Step 30 is a further checkpoint that makes an old one go; step 20 replaces one that stands."""
    folder = tmp_path / "checkpoints"

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        save_state(folder, state_at(10), keep=2)
        save_state(folder, state_at(20), keep=2)

    def check(claimed: bool) -> None:
        found = load_latest(folder)
        assert found is not None
        assert same(found[0], state_at(step, "new")) or (not claimed and same(found[0], state_at(20)))
        save_state(folder, state_at(40), keep=1)  # and the next save finds its way, leaving nothing behind
        assert [path.name for path in folder.iterdir()] == ["step-00000040"]
        begin()

    begin()
    with caplog.at_level(logging.CRITICAL):
        assert every_fault(code, lambda: save_state(folder, state_at(step, "new"), keep=1), check) > 25


def test_a_checkpoint_set_aside_by_a_crash_is_found(tmp_path: Path) -> None:
    path = save_state(tmp_path, state_at(20), keep=1)
    aside = path.rename(tmp_path / ".step-00000020.vitrail-old")
    found = load_latest(tmp_path)
    assert found is not None
    assert same(found[0], state_at(20))
    assert aside.exists()  # readers change nothing
    save_state(tmp_path, state_at(30), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def test_half_removed_checkpoints_are_never_chosen(tmp_path: Path) -> None:
    save_state(tmp_path, state_at(10), keep=2)
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000020.vitrail-gone")
    shutil.copytree(tmp_path / "step-00000010", tmp_path / ".step-00000030.vitrail-new")
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 10
    save_state(tmp_path, state_at(11), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000011"]


def test_a_disk_too_small_for_the_state_is_refused_beforehand(tmp_path: Path, monkeypatch) -> None:
    save_state(tmp_path, state_at(10), keep=1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"disk is full: .*step-00000020 needs"):
        save_state(tmp_path, state_at(20), keep=1)
    found = load_latest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 10
