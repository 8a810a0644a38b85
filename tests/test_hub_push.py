"""Models go to the hub whole and to nobody who was not meant, and come back bit for bit; cards say what is known."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_stand_in import Hub
from test_hub import TINY, assert_same, random_model, server, stand_in

from vitrail.checkpoints import convert, load_model, save_model
from vitrail.checkpoints.card import card_of, model_card
from vitrail.cli import main
from vitrail.errors import UserError

__all__ = ["server", "stand_in"]  # fixtures
# huggingface_hub uploads by a spelling that httpx would rather not have
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

RECIPE = {
    "type": "RunConfig",
    "data": "/home/someone/photos",
    "out": "/home/someone/runs/a",
    "init": "vitrail-mini",
    "input": {"val": "C:\\Users\\someone\\val", "sizes": ["/home/someone/a", 3]},
    "optim": {"name": "adamw", "lr": 0.001, "schedule": "cosine"},
    "recipe": {"type": "SupervisedConfig"},
}
TOKEN = "hf_a_secret_that_is_told_to_nobody"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = random_model()
    model.labels = ("ant", "bee", "no")
    metrics = {"test": {"top1": 0.912345678, "macro_f1": 0.9, "nll": 0.25}}
    save_model(model, tmp_path / "model", metrics=metrics, recipe=RECIPE, data={"train": 120, "fingerprint": "abc"})
    return tmp_path / "model"


@pytest.fixture
def hub(server: Hub, monkeypatch) -> Iterator[Hub]:
    """The stand-in, ready to be sent to, by somebody with a token."""
    from huggingface_hub import constants

    for table in (server.private, server.uploaded, server.tokens):
        table.clear()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files by the protocol that the stand-in speaks
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server


def front_matter(card: str) -> dict:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub, folder: Path, capfd) -> None:
    assert main(["convert", str(folder), "hf:me/ants", "--license", "apache-2.0", "--json"]) == 0
    said = capfd.readouterr()
    facts = json.loads(said.out)
    assert facts["written"] == "hf:me/ants" and facts["visibility"] == "private"
    assert facts["page"] == f"{hub.url}/me/ants" and facts["commit"] == hub.names["me/ants", "main"]
    assert hub.private == {"me/ants": True}
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in said.out + said.err
    back = load_model("hf:me/ants")
    assert_same(back, load_model(folder))
    assert back.labels == ("ant", "bee", "no")
    files = hub.commits["me/ants", facts["commit"]]
    assert files.keys() == {"config.json", "README.md", "model.safetensors"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not any(b"someone" in content for content in files.values())
    document = json.loads(files["config.json"])
    assert (document["recipe"]["data"], document["metrics"]["test"]["nll"]) == ("photos", 0.25)
    card = files["README.md"].decode()
    assert 'load_model("hf:me/ants")' in card and "apache-2.0. That of the data" in card
    assert front_matter(card)["license"] == "apache-2.0"


def test_other_weights_are_sent_as_a_model_folder(hub: Hub, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "weights.npz")
    facts = convert(tmp_path / "weights.npz", "hf:me/ants", public=True, heads=4, gelu="tanh")
    assert facts["visibility"] == "public" and hub.private == {"me/ants": False}
    assert_same(load_model("hf:me/ants"), load_model(folder))
    recipe = json.loads(hub.commits["me/ants", facts["commit"]]["config.json"])["recipe"]
    assert recipe["converted"]["source"] == "weights.npz"


def test_a_public_repository_takes_a_model_only_when_that_is_said(hub: Hub, folder: Path) -> None:
    hub.private["me/ants"] = False
    with pytest.raises(UserError, match="hf:me/ants is a public repository: say --public"):
        convert(folder, "hf:me/ants")
    assert not hub.commits
    assert convert(folder, "hf:me/ants", public=True)["visibility"] == "public"
    hub.private["me/bees"] = True
    assert convert(folder, "hf:me/bees", public=True)["visibility"] == "private"


def test_a_card_that_was_edited_is_sent_as_it_is(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# My ants\n", encoding="utf-8")
    facts = convert(folder, "hf:me/ants")
    assert hub.commits["me/ants", facts["commit"]]["README.md"] == b"---\nlicense: mit\n---\n\n# My ants\n"


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "log in with `hf auth login`"), (403, "a token that may write"), (500, "try again later")],
)
def test_what_the_hub_refuses_is_told_without_the_token(hub: Hub, folder: Path, status: int, told: str) -> None:
    hub.errors["me/ants"] = (status, {})
    with pytest.raises(UserError, match=rf"refuses hf:me/ants .*HTTP {status}\): .*{told}") as caught:
        convert(folder, "hf:me/ants")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    ("dest", "more", "told"),
    [
        ("hf:ants", {}, "sent to hf:OWNER/NAME"),
        ("hf:me/ants@v1", {}, "sent to hf:OWNER/NAME"),
        ("timm:me/ants", {}, "sent to hf:OWNER/NAME"),
        ("hf:me/ants", {"names": "timm"}, "names of its own"),
        ("elsewhere", {"public": True}, "are for hf:OWNER/NAME"),
        ("elsewhere", {"license": "mit"}, "are for hf:OWNER/NAME"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_read(dest: str, more: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        convert("nothing here", dest, **more)


def test_without_a_network_it_is_told(folder: Path, hub: Hub, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be sent to hf:me/ants .*check the network"):
        convert(folder, "hf:me/ants")


def test_the_card_tells_what_is_known(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = front_matter(card)
    assert front["pipeline_tag"] == "image-classification" and front["library_name"] == "vitrail"
    assert front["datasets"] == ["photos"] and front["metrics"] == ["accuracy", "f1"]
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"type": "photos", "name": "photos", "split": "test"}
    assert result["metrics"][0] == {"type": "accuracy", "name": "Top-1 accuracy", "value": 0.912346}
    for line in ("## Results", "| test.nll | 0.25 |", "| optim.name | adamw |", "| data | photos |", "| train | 120 |"):
        assert line in card
    assert "someone" not in card and "## Licence\nNone is stated" in card and "license" not in front


def test_the_card_of_an_unknown_model_says_so() -> None:
    card = model_card(random_model())
    assert front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}
    for line in ("Nothing has been measured yet.", "is not recorded here.", "How these weights were made"):
        assert line in card


@pytest.mark.parametrize("name", ["no", "1e3", "a: b", "- c", "é", "x#y", '"', "null", "12"])
def test_names_stay_text_in_the_front_matter(name: str) -> None:
    recipe = {"data": name}
    assert front_matter(model_card(random_model(), recipe=recipe))["datasets"] == [name]


def test_figures_that_are_none_stay_out_of_the_front_matter() -> None:
    front = front_matter(model_card(random_model(), metrics={"top1": float("nan"), "per_class": [1.0]}))
    assert "model-index" not in front


def test_a_licence_replaces_what_stood_there() -> None:
    card = card_of("---\nlicense: mit\ntags:\n- a\n---\nbody ---\n", "hf:a/b", "apache-2.0")
    assert front_matter(card) == {"license": "apache-2.0", "tags": ["a"]} and card.endswith("\n---\nbody ---\n")
    assert front_matter(card_of("# Mine\n", "hf:a/b", "mit")) == {"license": "mit"}
    with pytest.raises(UserError, match="identifiers such as apache"):
        card_of("", "hf:a/b", "mit\ntags: x")


def test_sending_does_not_change_the_folder(hub: Hub, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    convert(folder, "hf:me/ants", license="mit")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(
        load_model("hf:me/ants").state_dict()["head.weight"], random_model(TINY).state_dict()["head.weight"]
    )
