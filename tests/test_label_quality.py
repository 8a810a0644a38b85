"""What a model finds in data: planted wrong labels come first, copies are found though changed, and no more."""

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_check import found, make_folder, shown

from vitrail.check import Suspect, check
from vitrail.check.label_errors import confident_classes, suspects
from vitrail.check.near_duplicates import near_pairs
from vitrail.checkpoints import save_model, training_data
from vitrail.cli import main
from vitrail.config.vit import ViTConfig
from vitrail.data import read_parts
from vitrail.metrics import Evaluation
from vitrail.models import ImageModel, build
from vitrail.report.checking import TITLES, write_check_page

CLASSES = ("cat", "dog")
COLOURS = {"cat": (200, 60, 40), "dog": (40, 60, 200)}


def red_model(labels: tuple[str, ...] = CLASSES) -> ImageModel:
    """A ViT of one patch whose class is the colour: `cat` is red, `dog` is blue."""
    model = build(
        ViTConfig(image_size=(16, 16), patch_size=(8, 8), num_classes=len(labels), width=16, depth=1, heads=2)
    )

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, (4, 1)).flatten(1)

    model.features = features  # pyright: ignore[reportAttributeAccessIssue]
    model.head = torch.nn.Linear(12, len(labels))
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
        model.head.weight[0, :4] = model.head.weight[1, 8:] = 2.0
    model.labels = labels
    return model.eval()


def coloured(seed: int, colour: tuple[int, int, int]) -> Image.Image:
    """A picture of coarse noise around a colour."""
    rng = np.random.default_rng(seed)
    coarse = (np.array(colour) + rng.integers(-40, 41, (6, 6, 3))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC)


def make_photos(root: Path, parts: tuple[str, ...] = ("",)) -> Path:
    """Write 20 pictures per class and part."""
    for number, part in enumerate(parts):
        for label, colour in COLOURS.items():
            (root / part / label).mkdir(parents=True)
            for i in range(20):
                seed = 1000 * number + 100 * CLASSES.index(label) + i
                coloured(seed, colour).save(root / part / label / f"{i:02d}.png")
    return root


def test_confident_classes_are_those_of_the_paper() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.7, 0.3, 0.0], [0.1, 0.9, 0.0], [0.75, 0.25, 0.0], [0.45, 0.55, 0.0]])
    targets = np.array([0, 0, 1, 1, 1])
    # thresholds: 0.8 for the first class, 0.9 / 3 + 0.25 / 3 + 0.55 / 3 = 0.567 for the second, none for the third
    assert confident_classes(probabilities, targets).tolist() == [0, 0, 1, 1, 1]
    probabilities[3] = 0.85, 0.15, 0.0
    assert confident_classes(probabilities, targets).tolist() == [0, 0, 1, 0, 1]
    sure = np.array([[0.99, 0.01], [0.99, 0.01], [0.02, 0.98], [0.95, 0.05]])  # a mean of 0.99 would let it pass
    assert confident_classes(sure, np.array([0, 0, 1, 1])).tolist() == [0, 0, 1, 0]


def test_of_several_confident_classes_the_likelier_counts() -> None:
    probabilities = np.array([[0.3, 0.1, 0.6], [0.1, 0.3, 0.6], [0.4, 0.35, 0.25], [0.35, 0.45, 0.2]])
    targets = np.array([0, 1, 0, 1])  # thresholds 0.35 and 0.375; class 2 has no pictures
    assert confident_classes(probabilities, targets).tolist() == [0, 1, 0, 1]
    swapped = np.array([1, 0, 1, 0])
    assert confident_classes(probabilities, swapped)[3] == 1


def test_with_several_labels_each_is_a_question_of_its_own() -> None:
    logits = np.array([[4.0, -4.0], [-4.0, 4.0], [4.0, 4.0], [-4.0, -4.0]] * 5, np.float32)
    targets = (logits > 0).astype(np.float32)
    targets[2, 1], targets[3, 0] = 0.0, 1.0
    names = [f"{i}.png" for i in range(20)]
    got = list(suspects(Evaluation(logits, targets, ("cat", "dog"), names, []), "train"))
    assert [(s.names[0], s.label, s.suggested) for s in got] == [
        ("3.png", "cat", "not cat"),
        ("2.png", "not dog", "dog"),
    ]


def test_planted_errors_come_first_and_right_labels_are_left_alone(tmp_path: Path) -> None:
    root = make_photos(tmp_path)
    for i in (3, 7):
        (root / "cat" / f"{i:02d}.png").rename(root / "dog" / f"was-cat-{i}.png")
    report = check(root, model=red_model())
    assert report.ok and found(report).keys() == {"suspect-label"}
    finding = found(report)["suspect-label"]
    assert {Path(item.names[0]).name for item in finding.items} == {"was-cat-3.png", "was-cat-7.png"}
    shares = []
    for item in finding.items:
        assert isinstance(item, Suspect)
        assert (item.label, item.suggested) == ("dog", "cat")
        assert item.label_probability < 0.5 < item.suggested_probability
        shares.append(item.label_probability)
    assert shares == sorted(shares)
    assert finding.text.startswith("2 labels of 40 pictures")
    (first, _) = json.loads(json.dumps(report.to_json()))["findings"][0]["items"]
    assert first["suggested"] == "cat" and first["detail"].startswith("train: labelled dog (")
    assert "was-cat-3.png (train: labelled dog" in shown(report)


def test_changed_copies_are_found_first_those_with_other_labels_or_parts(tmp_path: Path) -> None:
    root = make_photos(tmp_path, ("train", "test"))
    original = Image.open(root / "train" / "cat" / "04.png")
    original.save(root / "train" / "cat" / "again.jpg", quality=40)
    Image.open(root / "test" / "dog" / "05.png").resize((30, 30)).save(root / "train" / "dog" / "small.png")
    flipped = Image.open(root / "train" / "dog" / "06.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flipped.save(root / "train" / "dog" / "mirrored.png")
    report = check(root, model=red_model())
    assert found(report).keys() == {"near-duplicate", "tiny"}
    finding = found(report)["near-duplicate"]
    groups = [tuple(sorted(Path(name).name for name in item.names)) for item in finding.items]
    assert groups[0] == ("05.png", "small.png") and finding.items[0].detail.startswith("train, test; likeness ")
    assert set(groups[1:]) == {("04.png", "again.jpg"), ("06.png", "mirrored.png")}
    assert "3 groups of pictures that are almost the same (1 in several parts)" in finding.text


def test_exact_copies_are_not_told_twice(tmp_path: Path) -> None:
    root = make_photos(tmp_path)
    Image.open(root / "cat" / "04.png").save(root / "cat" / "same.bmp")
    assert found(check(root, model=red_model())).keys() == {"duplicate"}


def test_pairs_do_not_depend_on_how_many_are_compared_at_a_time(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    small = rng.normal(size=(60, 3, 8, 8)).astype(np.float32)
    small[30:33] = small[:3] + 0.01 * rng.normal(size=(3, 3, 8, 8)).astype(np.float32)
    features = small.reshape(60, -1)
    pairs, likeness = near_pairs(features, small)
    assert pairs.tolist() == [[0, 30], [1, 31], [2, 32]] and (likeness > 0.99).all()
    monkeypatch.setattr("vitrail.check.near_duplicates.COMPARED", 100)
    again, _ = near_pairs(features, small)
    assert again.tolist() == pairs.tolist()
    for count in (0, 1):
        assert len(near_pairs(features[:count], small[:count])[0]) == 0


def test_a_model_of_other_classes_judges_no_label_but_finds_copies(tmp_path: Path) -> None:
    root = make_photos(tmp_path)
    Image.open(root / "cat" / "04.png").save(root / "cat" / "again.jpg", quality=40)
    findings = found(check(root, model=red_model(("emu", "owl"))))
    assert findings.keys() == {"near-duplicate", "labels-not-judged"}
    assert "classes that the model does not know: 'cat', 'dog'" in findings["labels-not-judged"].text


def test_broken_pictures_do_not_shift_the_others(tmp_path: Path) -> None:
    root = make_photos(tmp_path)
    (root / "cat" / "00.png").write_bytes(b"nothing")
    (root / "cat" / "19.png").rename(root / "dog" / "wrong.png")
    findings = found(check(root, model=red_model()))
    assert findings.keys() == {"broken", "suspect-label"}
    assert [Path(item.names[0]).name for item in findings["suspect-label"].items] == ["wrong.png"]


def test_it_is_said_when_the_model_was_trained_on_these_pictures(tmp_path: Path) -> None:
    root = make_photos(tmp_path / "photos", ("train", "test"))
    whole = read_parts(root).train.fingerprint()
    for trained_on, known in ((whole, True), (f"{whole}[36 of 40: 0123]", True), ("0" * 64, False), (None, False)):
        findings = found(check(root, model=red_model(), trained_on=trained_on))
        assert ("seen-pictures" in findings) == known
        if known:
            assert "of the part train, with these labels" in findings["seen-pictures"].text
    model = build(ViTConfig(image_size=(16, 16), patch_size=(8, 8), num_classes=2, width=16, depth=1, heads=2))
    save_model(model, tmp_path / "model", data={"fingerprint": whole})
    assert training_data(tmp_path / "model") == training_data(str(tmp_path / "model" / "model.safetensors")) == whole
    save_model(model, tmp_path / "bare")
    assert training_data(tmp_path / "bare") is None
    assert training_data(root) is None
    assert training_data("efficientnet-lite0") is None


def test_the_page_shows_every_finding_with_its_pictures_and_no_markup(tmp_path: Path) -> None:
    root = make_photos(tmp_path / "<b>photos")
    (root / "cat" / "01.png").rename(root / "dog" / "<script>.png")
    (root / "cat" / "02.png").write_bytes(b"nothing")
    report = check(root, model=red_model())
    write_check_page(report, tmp_path / "page.html", title="<i>")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;.png" in page and "<i>" not in page and "<b>" not in page
    assert page.count("data:image/png;base64,") == 1
    assert "looks like <bdi>cat</bdi>" in page and TITLES["broken"] in page and "not a JPEG" in page
    write_check_page(check(make_folder(tmp_path / "clean")), tmp_path / "clean.html", title="t")
    assert "Nothing is wrong." in (tmp_path / "clean.html").read_text(encoding="utf-8")


def test_the_verb_checks_with_a_model_and_writes_a_page(tmp_path: Path, capsys) -> None:
    root = make_photos(tmp_path / "photos")
    data = BytesIO()
    coloured(4, COLOURS["cat"]).save(data, "JPEG", quality=50)
    (root / "cat" / "again.jpg").write_bytes(data.getvalue())
    arguments = ["check", str(root), "--model", "vitrail-mini", "--out", str(tmp_path / "page.html")]
    assert main([*arguments, "--json"]) == 0
    kinds = {finding["kind"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert kinds == {"near-duplicate", "labels-not-judged"}
    assert "again.jpg" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main([*arguments[:-1], "page.pdf"]) == 2
    assert "page.pdf" in capsys.readouterr().err


@pytest.mark.parametrize("kind", sorted(TITLES))
def test_every_kind_of_finding_has_a_title(kind: str) -> None:
    assert TITLES[kind][0].isupper()
