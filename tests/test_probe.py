"""Probes of frozen features, against scikit-learn and against slow code that follows the sources."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn import linear_model
from sklearn import metrics as sk

from vitrail.checkpoints import save_model
from vitrail.cli import main
from vitrail.config.vit import ViTConfig
from vitrail.embedding import embed, read_embeddings, write_embeddings
from vitrail.errors import UserError
from vitrail.models import ImageModel, build
from vitrail.probe import (
    STRENGTHS,
    Labelled,
    few_shot,
    held_out,
    linear_probe,
    nearest_neighbours,
    probe,
    regression_path,
    ridge_weights,
)

linear: Any = linear_model  # its stubs refuse arguments that it takes


def clusters(n: int, d: int = 8, classes: int = 4, spread: float = 2.0, seed: int = 0) -> Labelled:
    """Pictures of which each class lies around a point of its own."""
    centres = np.random.default_rng(99).normal(size=(classes, d))
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    features = 3 + centres[targets] + spread * rng.normal(size=(n, d))
    return Labelled(features.astype(np.float32), targets, tuple(map(str, range(classes))))


def several(n: int, d: int = 8, seed: int = 0) -> Labelled:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    targets = x @ np.random.default_rng(98).normal(size=(d, 3)) + rng.normal(size=(n, 3)) > 0.5
    return Labelled(x.astype(np.float32), targets.astype(np.float32), ("a", "b", "c"))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), d=st.integers(1, 40), seed=st.integers(0, 1000))
def test_ridge_weights_are_scikit_learns_in_primal_and_dual_form(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = np.pad(rng.normal(size=(n, d)), ((0, 0), (0, 1)), constant_values=100.0), rng.choice([-1.0, 1.0], (n, 3))
    expected = linear.Ridge(alpha=1024.0, fit_intercept=False, solver="cholesky").fit(x, y).coef_.T
    np.testing.assert_allclose(ridge_weights(x, y), expected, atol=1e-6)


@pytest.mark.parametrize("shots", [1, 3, 20])
def test_few_shot_is_the_procedure_of_the_official_evaluator(shots: int) -> None:
    train, tested = clusters(90, d=12), clusters(200, d=12, seed=1)
    for seed in range(3):
        rng = np.random.default_rng(seed)  # one generator, a permutation per class in the order of classes
        order = [rng.permutation(np.where(train.targets == label)[0])[:shots] for label in range(4)]
        picked = np.concatenate(order)
        x, y = train.features[picked].astype(np.float64), train.targets[picked]
        mean, std = x.mean(0), np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5
        inside = np.hstack([(x - mean) / std, np.full((len(x), 1), 100.0)])
        outside = np.hstack([(tested.features - mean) / std, np.full((200, 1), 100.0)])
        signs = np.where(y[:, None] == np.arange(4), 1.0, -1.0)
        weights = linear.Ridge(alpha=2.0**10, fit_intercept=False, solver="svd").fit(inside, signs).coef_.T
        expected = ((outside @ weights).argmax(1) == tested.targets).mean()
        assert few_shot(train, tested, shots, seed) == expected


def test_more_shots_and_easier_features_help() -> None:
    train, tested = clusters(200), clusters(300, seed=1)
    one, many = (np.mean([few_shot(train, tested, shots, seed) for seed in range(3)]) for shots in (1, 25))
    assert many > one > 0.3
    assert few_shot(clusters(200, spread=0.1), clusters(300, spread=0.1, seed=1), 5, 0) == 1.0


def test_a_feature_that_never_changes_does_no_harm() -> None:
    train, tested = clusters(60, spread=0.1), clusters(60, spread=0.1, seed=1)
    with_constant = [
        Labelled(np.pad(part.features, ((0, 0), (0, 1)), constant_values=7.0), part.targets, part.classes)
        for part in (train, tested)
    ]
    assert few_shot(*with_constant, 5, 0) == 1.0
    assert linear_probe(*with_constant)[1].metrics()["top1"] == 1.0


@pytest.mark.parametrize("decay", [1e-1, 1e-3])
def test_the_linear_probe_solves_what_scikit_learn_solves(decay: float) -> None:
    train = clusters(120)
    got = regression_path(train, (1.0, decay))[1]
    peer = linear.LogisticRegression(C=1 / (decay * len(train)), tol=1e-8, max_iter=2000)
    peer.fit(train.features.astype(np.float64), train.targets)
    # The bias is not regularised, so that it is free up to a constant.
    np.testing.assert_allclose(got[:-1], peer.coef_.T, atol=2e-3)
    np.testing.assert_allclose(got[-1] - got[-1].mean(), peer.intercept_ - peer.intercept_.mean(), atol=1e-2)


def test_several_labels_are_one_regression_each() -> None:
    train, decay = several(150), 1e-2
    got = regression_path(train, (decay,))[0]
    for label in range(3):
        peer = linear.LogisticRegression(C=1 / (decay * len(train)), tol=1e-8, max_iter=2000)
        peer.fit(train.features.astype(np.float64), train.targets[:, label])
        np.testing.assert_allclose(got[:-1, label], peer.coef_[0], atol=2e-3)


def test_the_weight_decay_is_picked_on_the_validation_part() -> None:
    train, val, tested = clusters(40, d=30), clusters(400, d=30, seed=2), clusters(400, d=30, seed=1)
    decay, evaluation = linear_probe(train, tested, val)
    assert decay in STRENGTHS

    mean, std = train.features.mean(0), train.features.std(0) + 1e-5

    def top1(weights: np.ndarray, part: Labelled) -> float:
        logits = (part.features - mean) / std @ weights[:-1] + weights[-1]
        return float((logits.argmax(1) == part.targets).mean())

    paths = regression_path(Labelled((train.features - mean) / std, train.targets, train.classes), STRENGTHS)
    shares = [top1(weights, val) for weights in paths]
    assert shares[STRENGTHS.index(decay)] == max(shares) > min(shares)
    assert evaluation.metrics()["top1"] == top1(paths[STRENGTHS.index(decay)], tested)


def test_without_a_validation_part_all_training_pictures_are_fitted_in_the_end() -> None:
    train, tested = clusters(100), clusters(200, seed=1)
    decay, evaluation = linear_probe(train, tested)
    mean, std = train.features.mean(0), train.features.std(0) + 1e-5
    peer = linear.LogisticRegression(C=1 / (decay * len(train)), tol=1e-8, max_iter=2000)
    peer.fit((train.features - mean) / std, train.targets)
    expected = peer.decision_function((tested.features - mean) / std)
    got = evaluation.logits - evaluation.logits.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(got, expected - expected.mean(axis=1, keepdims=True), atol=0.02)


def test_several_labels_are_measured_as_scikit_learn_does() -> None:
    tested = several(200, seed=1)
    got = linear_probe(several(300), tested)[1]
    assert got.metrics()["mAP"] == pytest.approx(sk.average_precision_score(tested.targets, got.logits))
    assert got.metrics()["mAP"] > 0.8


def test_neighbours_vote_as_in_dinos_evaluation() -> None:
    train, tested = clusters(150), clusters(100, seed=1)
    # eval_knn.py: cosines, the 20 nearest, exp(cosine / T) added up by class.
    bank, query = (torch.nn.functional.normalize(torch.from_numpy(part.features)) for part in (train, tested))
    cosine, place = (query @ bank.T).topk(20)
    votes = torch.zeros(100, 4).scatter_add_(1, torch.from_numpy(train.targets)[place], (cosine / 0.07).exp())
    expected = float((votes.argmax(1).numpy() == tested.targets).mean())
    assert nearest_neighbours(train, tested) == expected
    few = clusters(6)
    assert 0 <= nearest_neighbours(few, tested) <= 1  # fewer pictures than neighbours


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_what_is_held_out_leaves_every_class_a_picture(counts: list[int]) -> None:
    targets = np.repeat(np.arange(len(counts)), counts)
    rest, aside = held_out(targets)
    assert sorted([*rest, *aside]) == list(range(len(targets)))
    assert set(targets[rest]) == set(range(len(counts)))
    assert set(targets[aside]) == {label for label, count in enumerate(counts) if count > 1}


def test_one_picture_per_class_can_be_probed() -> None:
    train, tested = clusters(4, spread=0.1), clusters(50, spread=0.1, seed=1)
    assert few_shot(train, tested, 25, 0) > 0.9
    assert linear_probe(train, tested)[1].metrics()["top1"] > 0.9


def tiny_model(channels: int = 3) -> ImageModel:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=(16, 16), channels=channels, patch_size=(8, 8), width=16, depth=1, mlp_dim=16, heads=2, num_classes=0
    )
    return build(config)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model folder."""
    save_model(tiny_model(), tmp_path / "model")
    return str(tmp_path / "model")


def test_colours_are_found_by_every_probe(photos: Path) -> None:
    result = probe(tiny_model(), photos)
    assert (result.part, result.pictures, result.width) == ("held out", {"train": 54, "held out": 6}, 16)
    assert [row.method for row in result.rows] == [*["few-shot ridge"] * 4, "linear", "nearest neighbours"]
    assert all(row.metrics["top1"] > 0.9 for row in result.rows[1:])
    assert all(len(row.draws) == 3 for row in result.rows[:4])


def test_features_are_computed_once_and_then_taken_from_the_file(photos, tmp_path, monkeypatch) -> None:
    file = tmp_path / "features.npz"
    first = probe(tiny_model(), photos, features=file)
    assert len(read_embeddings(file).names) == 60
    monkeypatch.setattr("vitrail.probe.embed", lambda *_, **__: pytest.fail("computed again"))
    assert probe(tiny_model(), photos, features=file) == first


def test_a_file_of_the_verb_embed_will_do(photos: Path, tmp_path: Path) -> None:
    write_embeddings(embed(tiny_model(), [photos]), tmp_path / "f.npz")
    assert probe(tiny_model(), photos, features=tmp_path / "f.npz").to_json() == probe(tiny_model(), photos).to_json()


def test_features_of_another_model_or_other_pictures_are_refused(photos: Path, tmp_path: Path) -> None:
    write_embeddings(embed(tiny_model(), [photos / "sky"]), tmp_path / "f.npz")
    with pytest.raises(UserError, match=r"f\.npz lacks the features of \d+ of 54 pictures, first of .*apple"):
        probe(tiny_model(), photos, features=tmp_path / "f.npz")
    other = tiny_model()
    torch.nn.init.normal_(next(other.parameters()))
    with pytest.raises(UserError, match=r"f\.npz holds the features of another model"):
        probe(other, photos, features=tmp_path / "f.npz")
    with pytest.raises(UserError, match=r"\.npz"):
        probe(tiny_model(), photos, features=tmp_path / "f.csv")


def test_the_test_part_is_measured_and_the_decay_picked_on_val(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 30), ("val", 12), ("test", 21)):
        labels = np.arange(count) % 3
        noise = rng.integers(0, 100, (count, 16, 16, 3))
        noise[np.arange(count), :, :, labels] += 120
        arrays |= {f"x_{part}": noise.astype(np.uint8), f"y_{part}": labels}
    np.savez(tmp_path / "data.npz", **arrays)
    result = probe(tiny_model(), tmp_path / "data.npz", features=tmp_path / "f.npz")
    assert (result.part, result.pictures) == ("test", {"train": 30, "test": 21})
    assert len(read_embeddings(tmp_path / "f.npz").names) == 63
    assert result.rows[4].metrics["top1"] > 0.9


def test_the_verb_prints_a_table_or_json(folder: str, photos: Path, capsys) -> None:
    assert main(["probe", folder, str(photos)]) == 0
    said = capsys.readouterr().out
    assert "25 shots" in said and "nearest neighbours" in said and "weight decay" in said
    assert main(["probe", folder, str(photos), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["setting"] for row in answer["probes"][:4]] == ["1 shot", "5 shots", "10 shots", "25 shots"]
    assert len(answer["probes"][0]["draws"]) == 3
    assert answer["left_out"] is None


def test_pictures_of_several_labels_get_the_linear_probe_alone(folder: str, tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    rows = ["path,labels"]
    for i in range(60):
        red, blue = i % 2, i // 2 % 2
        pixels = rng.integers(0, 60, size=(20, 20, 3), dtype=np.uint8)
        pixels[..., 0] += np.uint8(150 * red)
        pixels[..., 2] += np.uint8(150 * blue)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{';'.join(['red'] * red + ['blue'] * blue)}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert main(["probe", folder, str(tmp_path / "list.csv"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in answer["probes"]] == ["linear"]
    assert answer["probes"][0]["mAP"] > 0.9
    assert main(["probe", folder, str(tmp_path / "list.csv")]) == 0
    assert "only the linear probe applies" in " ".join(capsys.readouterr().out.split())


def test_broken_pictures_are_named_and_counted(folder: str, photos: Path, tmp_path: Path, capsys) -> None:
    for label in ("sky", "leaf"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(60):
            link = tmp_path / "data" / label / f"{i:02d}.png"
            link.write_bytes((photos / label / f"{i % 20:02d}.png").read_bytes())
    link.write_bytes(b"torn")
    assert main(["probe", folder, str(tmp_path / "data"), "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert [Path(row["name"]).name for row in answer["broken"]] == ["59.png"]
    assert sum(answer["pictures"].values()) == 119
    (tmp_path / "data" / "sky" / "00.png").write_bytes(b"torn")
    assert main(["probe", folder, str(tmp_path / "data"), "--json"]) == 2
    assert "2 of 120 pictures cannot be read, more than 1.0%" in " ".join(capsys.readouterr().err.split())
