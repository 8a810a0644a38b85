"""Temperatures where they are hard to find, models that keep theirs, and ImageNet's reassessed labels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitrail import predict
from vitrail.checkpoints import load_model, save_model
from vitrail.cli import main
from vitrail.config.vit import ViTConfig
from vitrail.data.imagenet import imagenet_labels, imagenet_wnids
from vitrail.errors import UserError
from vitrail.evaluation import calibrate, evaluate, real_top1
from vitrail.metrics import Evaluation, fit_temperature, probabilities, real_accuracy
from vitrail.models import ImageModel, build


def answers(logits: object, targets: object, labels: tuple[str, ...], names: list[str] | None = None) -> Evaluation:
    rows = np.asarray(logits, np.float32)
    return Evaluation(rows, np.asarray(targets), labels, names or [f"{i}.png" for i in range(len(rows))], [])


def loss(logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    p = probabilities(logits.astype(np.float64) / temperature, False)
    return float(-np.log(p[np.arange(len(p)), targets]).mean())


@given(scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]), seed=st.integers(0, 20))
def test_a_temperature_has_no_bounds_but_follows_the_logits(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 5, 200)
    logits = rng.normal(size=(200, 5)) + np.eye(5)[targets]
    plain = fit_temperature(logits, targets)
    assert fit_temperature(logits * scale, targets) == pytest.approx(plain * scale, rel=1e-4)
    assert loss(logits, targets, plain) <= min(loss(logits, targets, plain * 1.01), loss(logits, targets, plain / 1.01))


def test_answers_that_are_all_right_or_all_worthless_have_the_temperature_1() -> None:
    eye = np.eye(4) * 5
    assert fit_temperature(eye, np.arange(4)) == 1.0  # the likelihood grows all the way to temperature 0
    assert fit_temperature(eye, np.roll(np.arange(4), 1)) == 1.0  # ... and without end
    assert fit_temperature(np.zeros((3, 2)), np.array([0, 1, 0])) == 1.0  # ... or not at all


def test_softmax_of_independent_sigmoids_is_right_when_one_label_holds() -> None:
    logits = np.random.default_rng(0).normal(size=4)
    p = 1 / (1 + np.exp(-logits))
    alone = np.array([p[i] * np.prod(np.delete(1 - p, i)) for i in range(4)])
    np.testing.assert_allclose(probabilities(logits[None], False)[0], alone / alone.sum())


def tiny_model() -> ImageModel:
    torch.manual_seed(3)
    config = ViTConfig(
        image_size=(16, 16), patch_size=(8, 8), width=16, depth=1, mlp_dim=16, heads=2, num_classes=3, pre_logits=8
    )
    model = build(config)
    for parameter in model.get_submodule("head").parameters():
        torch.nn.init.normal_(parameter, std=5.0)
    model.labels = ("leaf", "sky", "apple")  # so that it is right about some
    return model


def test_a_calibrated_model_divides_its_logits_and_keeps_doing_so(photos: Path, tmp_path: Path) -> None:
    model = tiny_model()
    before = evaluate(model, photos)
    temperature = calibrate(model, before)
    assert temperature == fit_temperature(before.logits, before.targets) != 1.0
    save_model(model, tmp_path / "m")
    after = evaluate(load_model(tmp_path / "m"), photos)
    np.testing.assert_allclose(after.logits, before.logits / temperature, rtol=1e-4, atol=1e-5)
    assert fit_temperature(after.logits, after.targets) == pytest.approx(1.0, abs=1e-3)


def test_several_labels_have_no_temperature() -> None:
    rows = Evaluation(np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32), ("a", "b"), ["x"], [])
    with pytest.raises(UserError, match="one label each"):
        calibrate(build(ViTConfig(image_size=(8, 8), patch_size=(8, 8), width=8, depth=1, heads=1)), rows)


def test_evaluate_saves_a_calibrated_model_for_predictions(photos: Path, tmp_path: Path, capsys) -> None:
    save_model(tiny_model(), tmp_path / "m")
    out = tmp_path / "calibrated"
    assert main(["evaluate", str(tmp_path / "m"), str(photos), "--calibrate", str(out), "--json"]) == 0
    temperature = json.loads(capsys.readouterr().out)["temperature"]
    picture = [photos / "sky" / "00.png"]
    raw, calm = (np.array([p for _, p in predict(load_model(tmp_path / name), picture)[0].labels]) for name in
                 ("m", "calibrated"))  # fmt: skip
    expected = raw ** (1 / temperature)
    np.testing.assert_allclose(calm, expected / expected.sum(), rtol=1e-3)
    recipe = json.loads((out / "config.json").read_text())["recipe"]
    assert recipe["calibrated"]["temperature"] == pytest.approx(temperature)


def test_real_accuracy_of_a_case_done_by_hand() -> None:
    assert real_accuracy(np.array([1, 2, 3, 4]), [[0, 1], [], [2], [4]]) == pytest.approx(2 / 3)
    assert real_accuracy(np.array([1]), [[]]) is None


def real_case(labels: tuple[str, ...], said: list[int]) -> Evaluation:
    """Answers to the validation pictures 3, 1 and 2, in this order."""
    names = [f"val/n0{i}/ILSVRC2012_val_{number:08d}.JPEG" for i, number in enumerate((3, 1, 2))]
    return answers(np.eye(len(labels))[said], [0, 0, 0], labels, names)


@pytest.mark.parametrize("labels", [imagenet_wnids(), imagenet_labels(), tuple(map(str, range(1000)))])
def test_reassessed_labels_are_found_by_the_number_in_the_pictures_name(labels, tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[5, 6], [], [7]]))
    assert real_top1(real_case(labels, [7, 6, 0]), file) == 1.0
    assert real_top1(real_case(labels, [5, 7, 0]), file) == 0.0


def test_classes_in_another_order_are_counted_as_imagenet_does(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("[[5], [8], [7]]")
    labels = tuple(imagenet_wnids()[i] for i in (8, 5, 7))
    assert real_top1(real_case(labels, [2, 1, 1]), tmp_path / "real.json") == pytest.approx(2 / 3)


def test_real_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text("[[1], [2]]")
    with pytest.raises(UserError, match=r"00000003\.JPEG is none of the 2 ImageNet validation pictures"):
        real_top1(real_case(imagenet_wnids(), [0, 0, 0]), file)
    file.write_text("[[1], [2], [3]]")
    with pytest.raises(UserError, match="has 2 others"):
        real_top1(real_case(("cat", "dog"), [0, 0, 0]), file)
    file.write_text("{")
    with pytest.raises(UserError, match="not a JSON list of lists"):
        real_top1(real_case(imagenet_wnids(), [0, 0, 0]), file)
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.json"):
        real_top1(real_case(imagenet_wnids(), [0, 0, 0]), tmp_path / "nowhere.json")


def test_evaluate_reports_real_top1(tmp_path: Path, capsys) -> None:
    wnids = imagenet_wnids()[:2]
    for number, wnid in enumerate(wnids, start=1):
        (tmp_path / "data" / wnid).mkdir(parents=True)
        Image.new("RGB", (16, 16), (99 * number, 0, 0)).save(
            tmp_path / "data" / wnid / f"ILSVRC2012_val_{number:08d}.png"
        )
    model = build(ViTConfig(image_size=(16, 16), patch_size=(8, 8), width=8, depth=1, heads=1, num_classes=2))
    model.labels = wnids
    save_model(model, tmp_path / "m")
    (tmp_path / "real.json").write_text("[[0, 1], []]")
    arguments = ["evaluate", str(tmp_path / "m"), str(tmp_path / "data"), "--real", str(tmp_path / "real.json")]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["top1"], answer["real_top1"]) == (0.5, 1.0)
