"""The zoo and the leaderboard say what is so: counts are counted again, tests that are named exist."""

import ast
from pathlib import Path

import pytest

from vitrail.config.model import ALIASES, list_models
from vitrail.errors import UserError
from vitrail.leaderboard import CHECKS, SYSTEMS, markdown, rows
from vitrail.presets import PRESETS, preset, preset_name
from vitrail.presets.describe import model_name
from vitrail.zoo import ALSO_AT, count, describe

ROOT = Path(__file__).parent.parent


SMALL = ["vit-ti16", "vit-r26-s32", "vmoe-s32-last2", "cvt-13", "coatnet-0", "efficientnet-b0", "wide-resnet-28-2"]


@pytest.mark.parametrize("name", SMALL)
def test_stored_counts_are_those_of_the_model(name: str) -> None:
    counted, told = count(name), describe(name)
    assert {key: told[key] for key in counted} == counted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-gigantic14", "vmoe-15b", "cvt-w24", "coatnet-7", "efficientnet-l2"])
def test_stored_counts_are_those_of_the_largest_models(name: str) -> None:
    counted, told = count(name), describe(name)
    assert {key: told[key] for key in counted} == counted


def test_every_model_is_counted_at_every_resolution() -> None:
    for name in list_models():
        facts = describe(name)
        assert facts["parameters"] > 10**6
        assert len(facts["gmacs"]) == 1 + len(ALSO_AT.get(name, ()))
        assert all(value > 0 for value in facts["gmacs"].values())
        assert facts["source"].startswith("arXiv ") or name.startswith("efficientnet-lite")


@pytest.mark.parametrize(
    ("name", "size", "published"),
    [
        ("ViT-B/16", "224", 35.1 / 2),  # arXiv 2106.04560, table 2, counts additions too
        ("ViT-B/16", "384", 111.3 / 2),
        ("ViT-L/16", "384", 382.8 / 2),
        ("ViT-G/14", "224", 965.3 / 2),
        ("cvt-13", "224", 4.53),
        ("cvt-21", "384", 24.9),
        ("CvT-W24", "384", 193.2),
        ("coatnet-0", "224", 4.2),
        ("coatnet-3", "384", 107.4),
        ("CoAtNet-7", "512", 2586.0),
        ("efficientnet-b7", "600", 37.0),
    ],
)
def test_multiply_accumulates_are_as_many_as_published(name: str, size: str, published: float) -> None:
    assert describe(name)["gmacs"][size] == pytest.approx(published, rel=0.03)


def test_any_patch_size_is_described_and_an_unknown_name_refused() -> None:
    assert describe("vit-ti28")["gmacs"].keys() == {"224"}
    with pytest.raises(UserError, match="no model named 'vit-x9'"):
        describe("vit-x9")


def test_the_leaderboard_has_its_ten_rows_and_every_system_is_an_alias() -> None:
    assert len(SYSTEMS) == 10
    for row in rows():
        assert ALIASES[row["system"]] == row["model"]
        assert row["model"] in list_models()


def test_tests_that_the_leaderboard_names_exist() -> None:
    for each in SYSTEMS:
        assert each.verified.keys() == CHECKS.keys()
        for test in (name for names in each.verified.values() for name in names):
            file, _, function = test.partition("::")
            function, _, parameter = function.partition("[")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
            assert not parameter or parameter.rstrip("]") in PRESETS, test


def test_the_recipe_of_every_system_is_a_preset_of_its_model() -> None:
    for row in rows():
        assert model_name(preset(row["system"]).config.model) == row["model"], row["system"]
        assert row["preset"] == preset_name(row["system"])
        assert "--data PATH" in markdown().partition(f"`vitrail train {row['preset']} ")[2].partition("`")[0]


def test_recipes_that_were_not_published_in_full_are_told() -> None:
    told = {row["system"] for row in rows() if "recipe not published in full" in row["note"]}
    largest = {"CoAtNet-6", "CoAtNet-7", "ViT-MoE-15B (Every-2)"}
    assert told == largest | {"Meta Pseudo Labels (EfficientNet-L2)"}
    tuned = {row["system"] for row in rows() if preset(row["system"]).needs_init}
    assert tuned == {row["system"] for row in rows()} - {"Meta Pseudo Labels (EfficientNet-L2)"}


def test_the_page_of_the_leaderboard_is_up_to_date() -> None:
    assert (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8") == markdown(), "python -m vitrail.leaderboard"


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("vit-b16", "arXiv 2010.11929"),
        ("vit-gigantic14", "arXiv 2106.04560"),
        ("vit-b16-21kp", "arXiv 2104.10972"),
        ("vmoe-15b", "arXiv 2106.05974"),
        ("cvt-13", "arXiv 2103.15808"),
        ("coatnet-7", "arXiv 2106.04803"),
        ("efficientnet-l2", "arXiv 1905.11946"),
        ("efficientnet-lite0", "tensorflow/tpu"),
        ("wide-resnet-28-10", "arXiv 1605.07146"),
    ],
)
def test_a_size_names_its_paper(name: str, paper: str) -> None:
    assert describe(name)["source"] == paper
