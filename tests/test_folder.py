"""A model folder gives back the model that was saved; what is damaged or foreign is refused by name."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import every_fault

from vitrail.checkpoints import adapt, load_folder, load_model, save_model
from vitrail.checkpoints.assemble import assemble
from vitrail.checkpoints.storage import recover
from vitrail.config.preprocessing import Preprocessing
from vitrail.config.vit import ViTConfig
from vitrail.errors import UserError
from vitrail.models import ImageModel, build

GOLDEN = Path(__file__).parent / "golden"
TINY = ViTConfig(image_size=(12, 12), patch_size=(4, 4), num_classes=3, width=8, depth=1, mlp_dim=8, heads=2)
LABELS = ("ant", "bee", "été")


def random_model(config: ViTConfig = TINY, seed: int = 0) -> ImageModel:
    model = build(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.labels = LABELS if config.num_classes == 3 else ()
    return model.eval()


def same_weights(a: ImageModel, b: ImageModel) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture
def quick_disk(monkeypatch) -> None:
    """Let syncing return at once where a test saves hundreds of times; it still counts as an operation."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(random_model(), tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_whole(tmp_path: Path) -> None:
    model = random_model(replace(TINY, drop_path=0.1, positions="sincos", gelu="erf"))
    model.preprocessing = Preprocessing(image_size=(12, 12), fit="pad", mean=(0.1, 0.2, 0.3), std=(0.4,))
    model.multi_label = True
    save_model(model, tmp_path / "model")
    for source in (tmp_path / "model", str(tmp_path / "model"), tmp_path / "model" / "model.safetensors"):
        back = load_model(source)
        assert same_weights(back, model)
        assert (back.config, back.preprocessing) == (model.config, model.preprocessing)
        assert (back.labels, back.multi_label) == (LABELS, True)
        assert not back.training
        assert all(parameter.requires_grad for parameter in back.parameters())
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(load_folder(tmp_path / "model")(images), model(images))


def test_loading_draws_no_random_number(folder: Path) -> None:
    before = torch.random.get_rng_state()
    load_folder(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_folder_says_what_the_model_is_and_how_it_was_made(tmp_path: Path) -> None:
    model = random_model()
    model.labels = ("ant", "a|b <script>", "[x](y)")
    metrics = {"top1": 0.91234567, "per_class": [1.0, 0.8, 0.9], "val": {"nll": np.float32(0.25)}, "f1": float("nan")}
    save_model(model, tmp_path / "model", metrics=metrics, recipe={"lr": 1e-3}, data={"pictures": 120})
    document = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert document["format"] == 1
    assert document["metrics"] == metrics | {"val": {"nll": 0.25}, "f1": None}
    assert (document["recipe"], document["data"]) == ({"lr": 1e-3}, {"pictures": 120})
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for shown in ("| top1 | 0.9123 |", "| val.nll | 0.25 |", "| pictures | 120 |", "3 classes", "## Limits"):
        assert shown in card
    assert r"a\|b \<script\>, \[x\]\(y\)" in card
    assert "load_model(" in card


def test_the_card_shows_long_label_lists_in_part(tmp_path: Path) -> None:
    model = build(replace(TINY, num_classes=500))
    model.labels = tuple(f"class {i}" for i in range(500))
    save_model(model, tmp_path / "model")
    assert "and 300 more in `config.json`" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    save_model(build(TINY), tmp_path / "nameless")
    assert "answers are numbers" in (tmp_path / "nameless" / "README.md").read_text(encoding="utf-8")


def test_labels_that_do_not_fit_the_head_are_refused(folder: Path) -> None:
    model = random_model()
    model.labels = ("ant", "bee")
    with pytest.raises(UserError, match="2 labels but 3 classes"):
        save_model(model, folder)
    change_config(folder, labels=["ant", "bee"])
    with pytest.raises(UserError, match=r"config\.json has 2 labels for 3 classes"):
        load_folder(folder)


def test_any_failing_operation_leaves_a_model_that_loads(folder: Path, quick_disk: None) -> None:
    old, new = load_folder(folder), random_model(seed=1)

    def check(claimed: bool) -> None:
        recover(folder)
        found = load_folder(folder)
        assert same_weights(found, new) or (not claimed and same_weights(found, old))
        save_model(old, folder)

    assert every_fault(errno.ENOSPC, lambda: save_model(new, folder), check) > 30


@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped", "empty"])
def test_damaged_weights_are_found_by_name(folder: Path, harm: str) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    else:
        data[-5] ^= 1
        path.write_bytes({"truncated": data[:-1], "flipped": data, "empty": b""}[harm])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_folder(folder)
    if harm != "flipped":  # without the manifest's hashes a flipped bit is a weight like any other
        (folder / "manifest.json").unlink()
        with pytest.raises(UserError, match=r"model\.safetensors"):
            load_folder(folder)


def test_card_and_labels_may_be_edited_by_hand(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine", encoding="utf-8")
    change_config(folder, labels=["x", "y", "z"])
    assert load_folder(folder).labels == ("x", "y", "z")
    (folder / "manifest.json").unlink()  # as when only the three files were copied
    assert load_folder(folder).labels == ("x", "y", "z")


def test_a_config_from_a_newer_version_says_so(folder: Path) -> None:
    change_config(folder, format=2)
    with pytest.raises(UserError, match=r"newer vitrail \(format 2.*pip install -U vitrail"):
        load_folder(folder)


def test_a_config_from_an_older_version_takes_defaults(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del document["model"]["drop_path"], document["model"]["head_bias"]
    change_config(folder, model=document["model"])
    assert load_folder(folder).config == TINY


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "not written by vitrail"),
        ('{"format": "1"}', "not written by vitrail"),
        ('{"format": 1}', "lacks 'model'"),
        ('{"format": 1, "model": {}, "preprocessing": {}, "labels": [1], "multi_label": false}', "list of names"),
        (
            '{"format": 1, "model": {"type": "ViTConfig", "depht": 2}, "preprocessing": {}, "labels": [], '
            '"multi_label": false}',
            "'depth'",
        ),
        (
            '{"format": 1, "model": {"type": "ViTConfig", "heads": 7}, "preprocessing": {}, "labels": [], '
            '"multi_label": false}',
            "heads 7",
        ),
    ],
)
def test_a_wrong_config_is_refused_with_its_reason(folder: Path, text: str, told: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=told):
        load_folder(folder)


def test_weights_that_do_not_fit_the_config_are_named_with_both_shapes(folder: Path) -> None:
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change_config(folder, model=document["model"] | {"mlp_dim": 9})
    with pytest.raises(UserError, match=r"model\.safetensors: 'encoder\.0\.mlp\.up\.weight' .*\(8, 8\).*\(9, 8\)"):
        load_folder(folder)
    change_config(folder, model=document["model"] | {"depth": 2})
    with pytest.raises(UserError, match=r"lacks the tensor 'encoder\.1\.norm1\.weight'"):
        load_folder(folder)
    change_config(folder, model=document["model"] | {"num_classes": 0}, labels=[])
    with pytest.raises(UserError, match=r"no place for: head\.weight, head\.bias\.|no place for: head"):
        load_folder(folder)


def test_sources_that_are_no_model_say_what_would_be(tmp_path: Path, folder: Path) -> None:
    run = tmp_path / "run"
    save_model(random_model(), run / "best")
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "a.pth").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for source, told in {
        run: "is a run folder; its models lie in .*best",
        lone: r"lone\.safetensors is not a model .* need their config\.json beside",
        tmp_path / "x.txt": r"x\.txt is not a weight file",
        tmp_path / "a.pth": r"a\.pth is a pickle.* vitrail convert .*a\.pth FOLDER --allow-pickle",
        tmp_path / "empty": r"empty is not a model folder: it has no config\.json",
        tmp_path / "nowhere.npz": r"there is no file or folder .*nowhere\.npz",
        "vit-b16": r"there are no weights at hand for 'vit-b16'.*create_model\('vit-b16'\)",
        "ViT-H/14": r"no weights at hand for 'ViT-H/14'.*create_model\('vit-h14'\)",
        "vit-q16": "there is no file or folder vit-q16",
    }.items():
        with pytest.raises(UserError, match=told):
            load_model(source)


# Loading for another task


def test_an_unknown_or_impossible_override_is_refused(folder: Path) -> None:
    for overrides, told in [
        ({"clases": 3}, "'clases'.*num_classes"),
        ({"gelu": "relu"}, "gelu must be one of 'tanh', 'erf', 'quick'"),
        ({"dropout": "much"}, "dropout must be of type float"),
        ({"position_resize": "timm"}, "needs image_size="),
        ({"position_resize": "best", "image_size": 16}, "position_resize must be one of"),
        ({"image_size": "large"}, "image_size must be a list"),
        ({"image_size": (16, 16, 16)}, "image_size must hold 2 values"),
        ({"image_size": 2}, "smaller than one patch"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"channels": 5}, r"3 channels cannot be adapted to 5.*create_model\(..., channels=5\)"),
    ]:
        with pytest.raises(UserError, match=told):
            load_model(folder, **overrides)


def test_settings_of_training_and_activation_can_be_overridden(folder: Path) -> None:
    model = load_model(folder, gelu="erf", dropout=0.1, drop_path=0.2)
    assert model.config == replace(TINY, gelu="erf", dropout=0.1, drop_path=0.2)
    assert same_weights(model, load_model(folder))
    assert model.labels == LABELS
    images = torch.rand(2, 3, 12, 12)
    difference = (model(images) - load_model(folder)(images)).abs().max()
    assert 0 < difference < 0.1


def test_positions_are_resized_by_the_method_asked_for(folder: Path) -> None:
    tables = {}
    for method in ("official", "timm", "timm-npz", "hf"):
        model = load_model(folder, image_size=(20, 28), position_resize=method)
        assert (model.config.image_size, model.preprocessing.image_size) == ((20, 28), (20, 28))
        tables[method] = model.state_dict()["positions"]
        assert tables[method].shape == (1, 5 * 7 + 1, 8)
        assert model.labels == LABELS
    first = tables["official"]
    assert torch.equal(load_model(folder, image_size=(20, 28)).state_dict()["positions"], first)
    original = load_model(folder).state_dict()["positions"]
    for method, table in tables.items():
        assert torch.equal(table[:, 0], original[:, 0])
        assert method == "official" or not torch.allclose(table, first)


def test_other_classes_bring_a_head_of_zeros_and_leave_the_rest(folder: Path) -> None:
    old, model = load_model(folder), load_model(folder, num_classes=7)
    assert (model.config.num_classes, model.labels) == (7, ())
    state = model.state_dict()
    assert not state["head.weight"].any() and not state["head.bias"].any()
    assert all(torch.equal(tensor, state[name]) for name, tensor in old.state_dict().items() if "head" not in name)
    images = torch.rand(2, 3, 12, 12)
    assert torch.equal(model.features(images), old.features(images))
    headless = load_model(folder, num_classes=0)
    assert headless.config.num_classes == 0
    assert torch.equal(headless(images), old.features(images))
    assert same_weights(load_model(folder, num_classes=3), old)


def test_a_new_head_also_replaces_the_pre_logits_layer() -> None:
    path = GOLDEN / "vit_token_published_prelogits.weights.npz"
    model = load_model(path, num_classes=4)
    assert (model.config.pre_logits, model.config.num_classes) == (0, 4)
    kept = load_model(path, num_classes=0)
    assert kept.config.pre_logits == 48
    assert "pre_logits.weight" in kept.state_dict()


def test_other_labels_bring_a_fresh_head_even_at_the_same_number() -> None:
    model = adapt(random_model(replace(TINY, head_bias=-2.0)), labels=["cat", "dog", "eel"])
    assert model.labels == ("cat", "dog", "eel")
    assert model.config.head_bias == 0.0
    assert not any(model.state_dict()[name].any() for name in ("head.weight", "head.bias"))
    same = adapt(random_model(), labels=LABELS)
    assert same_weights(same, random_model())
    nameless = random_model()
    nameless.labels = ()
    named = adapt(nameless, labels=LABELS)
    assert named.labels == LABELS
    assert same_weights(named, random_model())
    assert adapt(random_model(), labels=["a", "b"]).config.num_classes == 2
    with pytest.raises(UserError, match="num_classes=4 does not fit 3 labels"):
        adapt(random_model(), num_classes=4, labels=LABELS)


def test_colour_weights_answer_the_same_on_grey_pictures() -> None:
    grey_images = torch.rand(2, 1, 12, 12)
    colour = random_model()
    grey = adapt(random_model(), channels=1)
    assert (grey.config.channels, grey.preprocessing.channels) == (1, 1)
    assert grey.labels == LABELS
    assert torch.allclose(grey(grey_images), colour(grey_images.expand(-1, 3, -1, -1)), atol=1e-6)
    back = adapt(adapt(random_model(), channels=1), channels=3)
    assert torch.allclose(back(grey_images.expand(-1, 3, -1, -1)), colour(grey_images.expand(-1, 3, -1, -1)), atol=1e-6)
    uneven = random_model()
    uneven.preprocessing = replace(uneven.preprocessing, mean=(0.25, 0.5, 0.75), std=(0.5, 0.5, 0.5))
    view = adapt(uneven, channels=1).preprocessing
    assert (view.mean, view.std) == ((0.5,), (0.5, 0.5, 0.5)) or (view.mean, view.std) == ((0.5,), (0.5,))


def test_weights_in_another_precision_are_converted_to_the_models(tmp_path: Path) -> None:
    save_model(random_model().bfloat16(), tmp_path / "model")
    back = load_folder(tmp_path / "model")
    assert all(parameter.dtype == torch.float32 for parameter in back.parameters())
    assert torch.equal(
        back.state_dict()["norm.weight"].bfloat16(), random_model().bfloat16().state_dict()["norm.weight"]
    )


def test_assembling_copies_no_tensor() -> None:
    state = random_model().state_dict()
    model = assemble(TINY, state, "x")
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in model.state_dict().items())
