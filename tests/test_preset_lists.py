"""What is told of presets: lists and help of `vitrail train`, its names for presets and recipes, and docs/recipes."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from vitrail.cli import main
from vitrail.cli.presets import show_preset
from vitrail.config.model import MODELS
from vitrail.config.recipes import LossConfig, SamConfig
from vitrail.config.run import RECIPES, RunConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.presets import PAPERS, PRESETS, Preset, pages, preset, preset_name
from vitrail.presets.describe import MAIN, command, model_name, settings, told
from vitrail.presets.papers import papers

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "recipes"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """Returns the settings that `vitrail train` would start a run with."""
    configs: list[RunConfig] = []
    monkeypatch.setattr("vitrail.cli.training._train", lambda config, json: configs.append(config) or 0)

    def start(*arguments: str) -> RunConfig:
        assert main(["train", *arguments]) == 0
        return configs[-1]

    return start


def said(capsys, *arguments: str) -> str:
    """What `vitrail train` prints; its help ends as tyro's does."""
    try:
        assert main(["train", *arguments]) == 0
    except SystemExit as ended:
        assert not ended.code
    return capsys.readouterr().out


# Lists


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--list"], ["EffNet-L2 (SAM)", "--help"]])
def test_lists_and_help_fit_on_a_terminal(arguments: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = said(capsys, *arguments)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_the_whole_list_names_every_preset(capsys) -> None:
    assert set(PRESETS) <= set(said(capsys, "--list").split())


def test_the_first_list_is_short_and_leads_to_every_preset(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = said(capsys, "--help")
    assert len(text.splitlines()) < 80
    listed = {name for name in PRESETS if re.search(rf"^  {re.escape(name)} ", text, flags=re.MULTILINE)}
    assert {name for name, each in PRESETS.items() if each.group == "start"} <= listed
    for word in set(re.findall(r"--list ([a-z0-9-]+)  ", text)):
        listed |= {row["name"] for row in json.loads(said(capsys, "--list", word, "--json"))}
    assert listed == set(PRESETS)


def test_a_wide_terminal_shows_what_was_reached(monkeypatch, capsys) -> None:
    reached = "96.08 % top-1"
    monkeypatch.setenv("COLUMNS", "80")
    assert reached not in said(capsys, "--list", "efficientnet-l2")
    monkeypatch.setenv("COLUMNS", "160")
    assert reached in said(capsys, "--list", "efficientnet-l2")


def test_a_list_can_be_narrowed_by_words(capsys) -> None:
    rows = json.loads(said(capsys, "--list", "SAM", "cifar100", "--json"))
    assert rows and all("sam" in json.dumps(row).lower() and "cifar" in json.dumps(row).lower() for row in rows)
    assert len(rows) < len(PRESETS)


@pytest.mark.parametrize("paper", PAPERS)
def test_a_papers_name_lists_that_paper_alone(paper: str, capsys) -> None:
    assert {row["name"] for row in json.loads(said(capsys, "--list", paper, "--json"))} == set(PAPERS[paper])


def test_other_words_narrow_a_papers_list_and_two_papers_are_both_listed(capsys) -> None:
    names = [row["name"] for row in json.loads(said(capsys, "--list", "ViT", "cifar100", "--json"))]
    assert names == ["vit-b16-cifar100", "vit-l16-cifar100", "vit-h14-cifar100"]
    both = {row["name"] for row in json.loads(said(capsys, "--list", "sam", "mae", "--json"))}
    assert both == {*PAPERS["sam"], *PAPERS["mae"]}
    assert len(json.loads(said(capsys, "--list", "vit-", "--json"))) > len(PAPERS["vit"])  # part of names, no paper


def test_no_preset_is_in_two_papers() -> None:
    assert sum(map(len, PAPERS.values())) == len(PRESETS)
    assert len({id(each) for each in PRESETS.values()}) == len(PRESETS)
    assert {each.name: each.presets for each in papers()} == PAPERS
    assert all(each.title for each in papers())


def test_the_list_as_json_holds_what_presets_say_of_themselves(capsys) -> None:
    rows = json.loads(said(capsys, "--json"))
    assert {row["name"] for row in rows} == set(PRESETS)
    assert rows[0].keys() == {"name"} | {field.name for field in fields(Preset)} - {"config"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--list", "no such thing"], "'no such thing'"),
        (["--data", "x"], "--data needs a preset before it: vitrail train PRESET --data ... `vitrail train --list`"),
        (["--data=x"], "vitrail train PRESET --data ... `vitrail"),
        (["--lst"], "Did you mean '--list'?"),
        (["ViT-H/15"], "--list"),
        (["EffNet-L2 (SAN)"], "Did you mean 'EffNet-L2 (SAM)'"),
        (["photos", "--recipe", "sma"], "Did you mean 'sam'"),
        (["photos", "--recipe"], "--recipe needs a value"),
    ],
)
def test_names_that_are_none_are_refused(arguments: list[str], told: str, capsys) -> None:
    assert main(["train", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", PRESETS)
def test_help_says_all_that_is_known_of_a_preset(name: str, capsys) -> None:
    show_preset(name)
    text = " ".join(capsys.readouterr().out.split())
    for fact in told(PRESETS[name]).values():
        assert " ".join(fact.split()) in text
    assert command(name, PRESETS[name]) in text


def test_help_lists_the_settings_of_a_preset(capsys) -> None:
    text = said(capsys, "photos", "--help")
    assert preset("photos").config.optim.lr == 0.0015
    assert re.search(r"--optim\.lr FLOAT.{0,200}default: 0\.0015", text, flags=re.DOTALL)


# Names


def test_a_leaderboard_name_stands_for_its_preset(started) -> None:
    name = preset_name("EffNet-L2 (SAM)")
    assert preset("EffNet-L2 (SAM)") is PRESETS[name]
    config = started(name, "--resume")
    assert config.out == str(Path("runs") / name)
    assert started("EffNet-L2 (SAM)", "--resume") == config
    with pytest.raises(UserError, match="no preset"):
        preset("EffNet-L3")


def test_every_recipe_has_a_name() -> None:
    assert {"supervised", "sam", "semantic", "masked", "distillation", "meta-pseudo-labels"} <= RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_another_recipe_takes_the_place_of_the_presets(name: str, started) -> None:
    own = preset("photos").config
    config = started("photos", "--recipe", name)
    assert type(config.recipe) is RECIPES[name]
    assert replace(config, recipe=own.recipe, out=None) == own
    if isinstance(config.recipe, LossConfig):
        shared = [field.name for field in fields(LossConfig)]
        assert [getattr(config.recipe, field) for field in shared] == [getattr(own.recipe, field) for field in shared]
        assert config.recipe.label_smoothing == 0.1
    else:
        assert config.recipe == RECIPES[name]()


def test_flags_refine_another_recipe_and_its_own_is_kept(started, capsys) -> None:
    assert started("photos", "--recipe=sam", "--recipe.rho", "0.2").recipe == SamConfig(rho=0.2, label_smoothing=0.1)
    own = preset("EffNet-L2 (SAM)").config
    assert started("EffNet-L2 (SAM)", "--recipe", "sam", "--resume").recipe == own.recipe
    assert isinstance(started("EffNet-L2 (SAM)", "--recipe", "supervised", "--resume").recipe, SupervisedConfig)
    assert "--recipe.rho" in said(capsys, "photos", "--recipe", "sam", "--help")
    assert "--recipe.rho" not in said(capsys, "photos", "--help")


# Pages


def test_pages_are_up_to_date() -> None:
    assert {file.name: file.read_text(encoding="utf-8") for file in PAGES.glob("*.md")} == pages.pages(), (
        "python -m vitrail.presets.pages"
    )


def test_pages_that_are_no_longer_wanted_go(tmp_path: Path) -> None:
    (tmp_path / "old.md").write_text("old")
    pages.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(pages.pages())


def test_links_of_the_index_lead_to_headings() -> None:
    texts = pages.pages()
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", texts["README.md"])
    assert {anchor for _, anchor in links if anchor} == set(PRESETS)
    for file, anchor in links:
        assert not anchor or f"\n## {anchor}\n" in texts[file]


def test_settings_are_those_that_differ_from_the_models_and_recipes_own() -> None:
    found = dict(settings(preset("EffNet-L2 (SAM)").config))
    assert found["--model"] == "efficientnet-l2" and found["--model.image-size"] == "475 475"
    assert found["--recipe"] == "sam" and found["--optim.name"] == "sgd"
    assert found["--input.mean"] == "0.5071 0.4865 0.4409" and found["--input.renormalise"] == ""
    assert "--model.widths" not in found and "--augment.flip" not in found
    found = dict(settings(RunConfig(model=MODELS["vit-l16"])))
    assert found.keys() == {"--model", "--recipe"} | {f"--{flag}" for flag in MAIN} - {"--loop.steps"}


@pytest.mark.parametrize("name", PRESETS)
def test_settings_tell_the_whole_recipe_in_flags_that_are_there(name: str, started) -> None:
    found, config = dict(settings(PRESETS[name].config)), PRESETS[name].config
    length = "--loop.epochs" if config.loop.steps is None else "--loop.steps"
    assert {f"--{flag}" for flag in MAIN if not flag.startswith("loop.e") and flag != "loop.steps"} <= found.keys()
    assert ("--loop.epochs" in found, "--loop.steps" in found) == (length == "--loop.epochs", length == "--loop.steps")
    flags = [(flag, value) for flag, value in found.items() if flag not in ("--model", "--recipe")]
    given = [word for flag, value in flags if flag.startswith("--") for word in (flag, *value.split())]
    again = started(name, "--resume", *given)
    for part in ("optim", "loop", "augment"):
        for field in fields(getattr(config, part)):
            value = getattr(getattr(config, part), field.name)
            ours = getattr(getattr(again, part), field.name)
            assert ours == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), field.name


def test_what_no_one_flag_sets_is_told_in_words() -> None:
    found = dict(settings(preset("vitrail-mini").config))
    assert found["model stem"] == "convolutions with filters 24, widths 96 192"
    assert "model stem: convolutions with" in pages.pages()["small.md"]


@pytest.mark.parametrize("name", ["vit-b16", "vit-b16-21kp", "vit-gigantic14", "vmoe-15b", "coatnet-6", "cvt-w24"])
def test_a_variant_is_named_after_its_size(name: str) -> None:
    assert model_name(replace(MODELS[name], image_size=(384, 384), num_classes=3, drop_path=0.3)) == name
    assert model_name(replace(MODELS["vit-b16"], pool="gap", positions="sincos", pre_logits=768)) == "vit-b16"
    assert model_name(ViTConfig(width=100, heads=4)) is None
