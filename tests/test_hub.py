"""Models come from the hub with all that its files tell, once; what goes wrong there is told in a line."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stand_in import Files, Hub

from vitrail.checkpoints import convert, hub, save_model
from vitrail.checkpoints.foreign import to_arrays
from vitrail.checkpoints.hub import fetch_model_files, load_from_hub
from vitrail.checkpoints.tensors import write_tensors
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel, build

TINY = ViTConfig(
    image_size=(12, 12), patch_size=(4, 4), num_classes=3, width=16, depth=2, mlp_dim=24, heads=4, gelu="tanh"
)
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_act": "gelu_new",
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-6,
    "image_size": 12,
    "id2label": {"0": "ant", "2": "été", "1": "bee"},
}
SQUASH = {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}, "resample": 3}
TEST_VIT = {
    "architecture": "test_vit",
    "num_classes": 3,
    "global_pool": "token",
    "pretrained_cfg": {"input_size": [3, 12, 12], "crop_pct": 0.95, "interpolation": "bicubic", "tag": "in1k"},
}


@pytest.fixture(scope="session")
def stand_in() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(stand_in: Hub, tmp_path: Path, monkeypatch) -> Iterator[Hub]:
    """The stand-in, empty, as the hub of this process, with an empty cache."""
    pytest.importorskip("huggingface_hub", reason="pip install 'vitrail[hub]' to test it")
    from huggingface_hub import close_session, constants

    for table in (stand_in.commits, stand_in.names, stand_in.errors, stand_in.requests, stand_in.agents):
        table.clear()
    stand_in.broken = bytes
    point_to(stand_in.url, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("NO_PROXY", "*")
    yield stand_in
    close_session()


def point_to(url: str, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def random_model(config: ViTConfig = TINY, seed: int = 0) -> ImageModel:
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def safetensors(arrays: dict[str, np.ndarray], tmp_path: Path) -> bytes:
    write_tensors(tmp_path / "made", {name: torch.from_numpy(array) for name, array in arrays.items()})
    return (tmp_path / "made").read_bytes()


def as_json(**documents: object) -> Files:
    return {f"{name}.json": json.dumps(document).encode() for name, document in documents.items()}


def of_transformers(model: ImageModel, tmp_path: Path, **changes: object) -> Files:
    files = as_json(config=VIT | changes, preprocessor_config=SQUASH)
    return files | {"model.safetensors": safetensors(to_arrays(model, "hf"), tmp_path), "README.md": b"unread"}


def assert_same(loaded: ImageModel, model: ImageModel) -> None:
    images = torch.rand(2, 3, *model.config.image_size)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


# What comes back


def test_a_model_of_transformers_comes_with_all_that_its_files_tell(server: Hub, tmp_path: Path, caplog) -> None:
    model = random_model()
    files = of_transformers(model, tmp_path)
    commit = server.push("owner/ants", files)
    with caplog.at_level(logging.INFO, logger="vitrail"):
        loaded = load_from_hub("hf:owner/ants", {})
    assert_same(loaded, model)
    assert loaded.config == TINY
    assert loaded.labels == ("ant", "bee", "été")
    assert loaded.preprocessing == Preprocessing(image_size=(12, 12), fit="squash", crop_fraction=1.0)
    assert server.asked() == ["config.json", "preprocessor_config.json", "model.safetensors"]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "vitrail"]
    assert commit in line
    assert hashlib.sha256(files["model.safetensors"]).hexdigest() in line


def test_what_is_converted_from_the_hub_remembers_commit_and_hash(server: Hub, tmp_path: Path) -> None:
    files = of_transformers(random_model(), tmp_path)
    commit = server.push("owner/ants", files)
    facts = convert("hf:owner/ants", tmp_path / "model")
    recipe = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))["recipe"]
    digest = hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert recipe["converted"] == {"source": "hf:owner/ants", "commit": commit, "sha256": digest}
    assert facts["sha256"] == digest


def test_a_model_of_timm_comes_with_all_that_its_files_tell(server: Hub, tmp_path: Path) -> None:
    model = random_model(replace(TINY, heads=2, gelu="erf"))
    weights = {"model.safetensors": safetensors(to_arrays(model, "timm"), tmp_path)}
    server.push("timm/test_vit.r12_in1k", as_json(config=TEST_VIT) | weights)
    named = TEST_VIT | {"label_names": ["ant", "bee", "cow"], "model_args": {"num_heads": 4, "act_layer": "gelu_tanh"}}
    server.push("me/mine", as_json(config=named) | weights)
    loaded = load_from_hub("timm:test_vit.r12_in1k", {})
    assert_same(loaded, model)
    assert loaded.preprocessing.crop_fraction == 1.0  # 12 of int(12 / 0.95) = 12 pixels
    larger = TEST_VIT | {"pretrained_cfg": TEST_VIT["pretrained_cfg"] | {"input_size": [3, 20, 20]}}
    server.push("timm/larger", as_json(config=larger) | weights)
    at_20 = load_from_hub("timm:larger", {})  # made for 12, evaluated at 20
    assert at_20.config.image_size == at_20.preprocessing.image_size == (20, 20)
    assert load_from_hub("timm:larger", {"image_size": 12}).config == model.config
    server.requests.clear()
    server.push("timm/again", as_json(config=TEST_VIT) | weights)
    load_from_hub("timm:again", {})
    assert loaded.labels == ()
    assert server.asked() == ["config.json", "model.safetensors"]
    loaded = load_from_hub("timm:me/mine", {})
    assert (loaded.config, loaded.labels) == (TINY, ("ant", "bee", "cow"))


def test_a_model_of_vitrail_comes_back(server: Hub, tmp_path: Path) -> None:
    model = random_model()
    model.labels = ("ant", "bee", "cow")
    save_model(model, tmp_path / "model")
    server.push("me/mine", {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()})
    loaded = load_from_hub("hf:me/mine", {"num_classes": 2})
    assert loaded.config.num_classes == 2
    assert load_from_hub("hf:me/mine", {}).labels == model.labels


def test_keywords_beat_what_the_repository_says(server: Hub, tmp_path: Path) -> None:
    kind = "multi_label_classification"
    server.push("owner/ants", of_transformers(random_model(), tmp_path, problem_type=kind))
    assert load_from_hub("hf:owner/ants", {"gelu": "erf"}).multi_label
    loaded = load_from_hub("hf:owner/ants", {"gelu": "erf", "heads": 2, "image_size": 20, "num_classes": 7})
    assert (loaded.config.gelu, loaded.config.heads, loaded.config.num_classes) == ("erf", 2, 7)
    assert loaded.config.image_size == loaded.preprocessing.image_size == (20, 20)
    assert loaded.preprocessing.fit == "squash"
    assert loaded.labels == ()
    assert not loaded.multi_label  # another head


def test_shards_are_read_as_one_file(server: Hub, tmp_path: Path) -> None:
    model = random_model()
    arrays = to_arrays(model, "hf")
    cut = len(arrays) // 2
    parts = {"model-00001-of-00002.safetensors": dict(list(arrays.items())[:cut])}
    parts["model-00002-of-00002.safetensors"] = dict(list(arrays.items())[cut:])
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    files = as_json(config=VIT, preprocessor_config=SQUASH) | {
        "model.safetensors.index.json": json.dumps(index).encode()
    }
    files |= {file: safetensors(part, tmp_path) for file, part in parts.items()}
    server.push("owner/sharded", files)
    assert_same(load_from_hub("hf:owner/sharded", {}), model)
    assert {path.name for path in fetch_model_files("hf:owner/sharded").weights} == parts.keys()
    twice = files | {"model-00002-of-00002.safetensors": files["model-00001-of-00002.safetensors"]}
    server.push("owner/twice", twice)
    with pytest.raises(UserError, match="which another shard of hf:owner/twice has"):
        load_from_hub("hf:owner/twice", {})
    lost = {name: content for name, content in files.items() if "00002-of" not in name}
    server.push("owner/lost", lost)
    with pytest.raises(UserError, match=r"hf:owner/lost lacks model-00002-of-00002\.safetensors"):
        load_from_hub("hf:owner/lost", {})
    outside = json.dumps({"weight_map": {"a": "../../secret.safetensors"}}).encode()
    server.push("owner/hostile", files | {"model.safetensors.index.json": outside})
    with pytest.raises(UserError, match=r"index\.json does not say which files"):
        load_from_hub("hf:owner/hostile", {})


def test_a_pickle_is_fetched_only_when_allowed(server: Hub, tmp_path: Path) -> None:
    model = random_model()
    torch.save({name: torch.from_numpy(array) for name, array in to_arrays(model, "hf").items()}, tmp_path / "made")
    pickle = {"pytorch_model.bin": (tmp_path / "made").read_bytes()}
    server.push("owner/old", as_json(config=VIT, preprocessor_config=SQUASH) | pickle)
    with pytest.raises(UserError, match=r"hf:owner/old has no safetensors.*allow_pickle=True"):
        load_from_hub("hf:owner/old", {})
    assert "pytorch_model.bin" not in server.asked()
    assert_same(load_from_hub("hf:owner/old", {}, allow_pickle=True), model)
    server.asked()
    assert_same(load_from_hub("hf:owner/old", {}, allow_pickle=True), model)
    assert server.asked() == []


# Cache and revisions


def test_what_is_in_the_cache_is_asked_for_no_more(server: Hub, tmp_path: Path) -> None:
    model = random_model()
    server.push("owner/ants", of_transformers(model, tmp_path))
    first = fetch_model_files("hf:owner/ants")
    server.requests.clear()
    assert fetch_model_files("hf:owner/ants") == first
    assert_same(load_from_hub("hf:owner/ants", {}, offline=True), model)
    assert server.requests == []


def test_offline_makes_no_request(server: Hub, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    server.push("owner/ants", of_transformers(random_model(), tmp_path))
    with pytest.raises(UserError, match=r"config\.json of hf:owner/ants is not in the cache .*offline=True"):
        fetch_model_files("hf:owner/ants", offline=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the environment variable sets it
    with pytest.raises(UserError, match=r"is not in the cache .*HF_HUB_OFFLINE"):
        fetch_model_files("hf:owner/ants")
    assert server.requests == []


def test_a_revision_is_a_branch_a_tag_or_a_commit(server: Hub, tmp_path: Path) -> None:
    old, new = random_model(seed=1), random_model(seed=2)
    commit = server.push("owner/ants", of_transformers(old, tmp_path))
    assert_same(load_from_hub("hf:owner/ants", {}), old)
    server.push("owner/ants", of_transformers(new, tmp_path))
    server.push("owner/ants", of_transformers(new, tmp_path), branch="v2.0")
    assert_same(load_from_hub("hf:owner/ants@v2.0", {}), new)
    assert_same(load_from_hub(f"hf:owner/ants@{commit}", {}), old)
    assert_same(load_from_hub("hf:owner/ants", {}), old)  # from the cache
    with pytest.raises(UserError, match=r"hf:owner/ants@v3: owner/ants has no revision 'v3'"):
        load_from_hub("hf:owner/ants@v3", {})


def test_files_of_two_commits_are_never_mixed(server: Hub, tmp_path: Path) -> None:
    """A cache that another program left half filled is filled with one commit, the latest."""
    from huggingface_hub import hf_hub_download

    server.push("owner/ants", of_transformers(random_model(seed=1), tmp_path, num_attention_heads=2))
    hf_hub_download("owner/ants", "config.json")
    new = random_model(seed=2)
    commit = server.push("owner/ants", of_transformers(new, tmp_path))
    files = fetch_model_files("hf:owner/ants")
    assert {path.parent.name for path in (files.config, *files.weights)} == {files.commit} == {commit}
    assert_same(load_from_hub("hf:owner/ants", {}), new)


def test_a_push_while_files_are_fetched_changes_nothing(server: Hub, tmp_path: Path, monkeypatch) -> None:
    old = of_transformers(random_model(), tmp_path)
    commit = server.push("owner/ants", old)
    plain = hub.origin_of

    def push_and_go_on(*arguments):  # between the first file and the second
        server.push("owner/ants", as_json(config=VIT, preprocessor_config={"size": 24}) | {"model.safetensors": b"new"})
        return plain(*arguments)

    monkeypatch.setattr(hub, "origin_of", push_and_go_on)
    files = fetch_model_files("hf:owner/ants")
    assert files.commit == commit
    assert files.preprocessor is not None
    assert files.preprocessor.read_bytes() == old["preprocessor_config.json"]
    assert files.weights[0].read_bytes() == old["model.safetensors"]


# What goes wrong


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ((404, {"X-Error-Code": "RepoNotFound"}), r"there is no owner/ants on the hub .*hf auth login"),
        ((401, {"X-Error-Code": "GatedRepo"}), r"given only to those who asked: ask at http://\S+/owner/ants"),
        ((403, {"X-Error-Code": "GatedRepo"}), r"given only to those who asked"),
        (
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            r"refuses .*HTTP 401.*log in again",
        ),
        ((403, {}), r"the hub refuses config\.json of hf:owner/ants \(HTTP 403\)"),
        ((503, {}), r"the hub answers HTTP 503 for config\.json of hf:owner/ants; try again later"),
        ((429, {}), r"the hub answers HTTP 429"),
        ((200, {}), r"config\.json of hf:owner/ants cannot be fetched from http.*X-Repo-Commit"),
    ],
)
def test_what_the_hub_refuses_is_told(
    error: tuple[int, dict[str, str]], told: str, server: Hub, tmp_path: Path
) -> None:
    server.push("owner/ants", of_transformers(random_model(), tmp_path))
    server.errors["owner/ants"] = error
    begin = time.monotonic()
    with pytest.raises(UserError, match=told) as caught:
        load_from_hub("hf:owner/ants", {})
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 5


def test_a_hub_out_of_reach_is_told_in_seconds(server: Hub, tmp_path: Path, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        monkeypatch.setattr(hub, "TIMEOUT", 0.3)
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"config\.json of hf:owner/ants cannot be fetched .*check the network"):
            load_from_hub("hf:owner/ants", {})
    with pytest.raises(UserError, match=r"cannot be fetched .*[Rr]efused.*check the network"):
        load_from_hub("hf:owner/ants", {})
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), r"model\.safetensors of hf:owner/ants was damaged"),
        (lambda content: content[:-5], r"model\.safetensors of hf:owner/ants cannot be fetched"),
    ],
    ids=["changed", "cut short"],
)
def test_weights_damaged_on_their_way_are_refused(
    broken: Callable[[bytes], bytes], told: str, server: Hub, tmp_path: Path, monkeypatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    model = random_model()
    server.push("owner/ants", of_transformers(model, tmp_path))
    server.broken = broken
    with pytest.raises(UserError, match=told) as caught:
        load_from_hub("hf:owner/ants", {})
    server.broken = bytes
    if "delete" in str(caught.value):  # do what it says
        Path(str(caught.value).split("delete ")[1].split(" and try")[0]).unlink()
    assert_same(load_from_hub("hf:owner/ants", {}), model)


def test_weights_damaged_in_the_cache_are_refused(server: Hub, tmp_path: Path) -> None:
    server.push("owner/ants", of_transformers(random_model(), tmp_path))
    (weights,) = fetch_model_files("hf:owner/ants").weights
    if not weights.is_symlink():
        pytest.skip("on this disk the cache does not keep the hub's hash")
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(UserError, match="was damaged"):
        load_from_hub("hf:owner/ants", {}, offline=True)


def test_a_repository_that_is_no_such_model_is_refused_before_its_weights_are_fetched(
    server: Hub, tmp_path: Path
) -> None:
    files = of_transformers(random_model(), tmp_path)
    for name, config, told in [
        (
            "swin",
            {"model_type": "swin", "architectures": ["SwinModel"]},
            r"'swin' of transformers \(SwinModel\).*reads vit",
        ),
        ("other", {"architecture": "resnet50.a1_in1k"}, r"timm's 'resnet50\.a1_in1k'"),
        ("padded", {"architecture": "efficientnet_b0"}, r"timm's 'efficientnet_b0'"),
        ("none", {}, "names neither a model_type nor an architecture"),
    ]:
        server.push(f"owner/{name}", files | as_json(config=config))
        with pytest.raises(UserError, match=told):
            load_from_hub(f"hf:owner/{name}", {})
    server.push("owner/list", files | {"config.json": b"[]"})
    server.push("owner/text", files | {"config.json": b"\xff{"})
    server.push("owner/deep", files | {"config.json": b"[" * 100_000})
    for name in ("list", "text", "deep"):
        with pytest.raises(UserError, match=r"config\.json .*the repository is damaged"):
            load_from_hub(f"hf:owner/{name}", {})
    server.push("owner/empty", {"README.md": b""})
    with pytest.raises(UserError, match=r"hf:owner/empty has no config\.json"):
        load_from_hub("hf:owner/empty", {})
    assert "model.safetensors" not in server.asked()
    server.push("owner/bare", as_json(config=VIT))
    with pytest.raises(UserError, match=r"hf:owner/bare has no weights that vitrail reads"):
        load_from_hub("hf:owner/bare", {}, allow_pickle=True)


def test_files_that_contradict_each_other_are_refused(server: Hub, tmp_path: Path) -> None:
    model = random_model()
    server.push("owner/size", of_transformers(model, tmp_path, image_size=24))
    with pytest.raises(UserError, match=r"pictures of \(24, 24\), but the weights beside it are made for \(12, 12\)"):
        load_from_hub("hf:owner/size", {})
    server.push("owner/labels", of_transformers(model, tmp_path, id2label={"0": "ant", "1": "bee"}))
    with pytest.raises(UserError, match=r"names 2 classes, but the weights beside it have 3"):
        load_from_hub("hf:owner/labels", {})
    weights = {"model.safetensors": safetensors(to_arrays(model, "timm"), tmp_path)}
    server.push("owner/pool", as_json(config=TEST_VIT | {"global_pool": "avg"}) | weights)
    with pytest.raises(UserError, match="pool='gap' does not fit the weights"):
        load_from_hub("timm:owner/pool", {"heads": 4})


@pytest.mark.parametrize(
    "source",
    ["hf:", "hf:a/b/c", "hf:../secret", "hf:a--b/c", "timm:", "hf:a/b@", "hf:a/b@x y", "hf:a/b@../../x", "hf:é/b"],
)
def test_a_name_that_cannot_be_is_refused_before_anything_is_asked(source: str) -> None:
    with pytest.raises(UserError, match=r"is no name on the hub|after @ belongs"):
        fetch_model_files(source)


def test_without_the_library_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"hf:owner/ants lies on the Hugging Face hub.*pip install 'vitrail\[hub\]'"):
        fetch_model_files("hf:owner/ants")


def test_a_process_of_its_own_asks_for_nothing_else_and_prints_no_bars(server: Hub, tmp_path: Path) -> None:
    """The environment variables of the hub's library count, and nothing is sent that was not asked for."""
    server.push("owner/ants", of_transformers(random_model(), tmp_path))
    script = (
        "from vitrail.checkpoints.hub import load_from_hub\n"
        "print(load_from_hub('hf:owner/ants', {}).labels)\n"
        "print(load_from_hub('hf:owner/ants', {}, offline=True).labels)\n"
    )
    own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*", "PYTHONUTF8": "1"}
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))
    } | own
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, encoding="utf-8"
    )
    assert done.stdout.count("ant") == 2, done.stderr
    assert done.stderr == ""
    assert all("/resolve/" in request or "/stored/" in request for request in server.requests)
    assert not any("torch" in agent for agent in server.agents)
