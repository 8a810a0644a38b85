"""The report: one page that needs nothing beside it, escapes everything, and says only what applies."""

import base64
import html
import io
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.config.preprocessing import Preprocessing
from vitrail.config.run import OptimConfig, RunConfig, SupervisedConfig
from vitrail.config.vit import ViTConfig
from vitrail.data.arrays import ArraySource
from vitrail.data.base import Picture, Subset
from vitrail.errors import BrokenPicture, UserError
from vitrail.evaluation import predict_logits
from vitrail.metrics import Evaluation
from vitrail.models import ImageModel, ViT
from vitrail.report import Comparison, RunRecord, charts, figures, write_report
from vitrail.report.sections import risk_section

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """A page as a browser sees it: tags, attributes, text; refuses tags that are not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def values(self, key: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == key]


class Renamed(ArraySource):
    """Pictures under names of one's own."""

    def name(self, index: int) -> str:
        return f"{HOSTILE} {index}.png"


class Plain(ImageModel):
    """A model of another family, without attention."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config)
        self.head = torch.nn.Linear(config.channels, config.num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))

    def blocks(self) -> list[torch.nn.Module]:
        return []

    def depth_of(self, name: str) -> int:
        return 0

    def init_weights(self) -> None:
        torch.nn.init.zeros_(self.head.weight)


def vit_config(classes: int, side: int = 8, patch: int = 4, channels: int = 3) -> ViTConfig:
    sizes: dict[str, Any] = {"image_size": (side, side), "patch_size": (patch, patch)}
    return ViTConfig(**sizes, channels=channels, num_classes=classes, width=16, depth=2, mlp_dim=32, heads=2)


def fitted(model: ImageModel, classes: tuple[str, ...], side: int = 8, channels: int = 3) -> ImageModel:
    torch.manual_seed(0)
    model.init_weights()
    model.labels = classes
    model.preprocessing = Preprocessing(image_size=(side, side), channels=channels, fit="squash")
    return model


def pictures(n: int, side: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, side, side, channels), np.uint8)


def answers(source: ArraySource, quality: float = 2.0, broken: tuple[tuple[str, str], ...] = ()) -> Evaluation:
    """Logits that lean towards the labels, so that some are right and some wrong."""
    targets, classes = source.targets, len(source.classes)
    rows = targets if source.multi_label else np.eye(classes)[targets]
    logits = np.random.default_rng(1).normal(size=(len(source), classes)) + quality * (2 * rows - 1)
    names = [source.name(i) for i in range(len(source))]
    return Evaluation(logits.astype(np.float32), targets, source.classes, names, list(broken))


def record(data: str = "pictures") -> RunRecord:
    rows: list[dict[str, Any]] = [{"step": 10 * i, "loss": 2 / i, "lr": 1e-3 / i} for i in range(1, 31)]
    rows += [{"step": 100 * i, "val": {"top1": 0.5 + 0.1 * i, "nll": 1 / i}} for i in range(1, 4)]
    config = RunConfig(data=data, optim=OptimConfig(lr=4e-3), recipe=SupervisedConfig(label_smoothing=0.1))
    facts = {"fingerprint": "abc123", "classes": 3, "train": 900, "val": 100, "test": 0}
    return RunRecord(config, rows, 161.0, {"torch": "2.13", "command": f"vitrail train {data}"}, facts)


@pytest.fixture
def single(tmp_path: Path) -> Page:
    classes = ("cat", "dog", "owl", "yak", "emu", "fox")
    source = ArraySource(pictures(60), np.arange(60) % 6, classes)
    model = fitted(ViT(vit_config(6)), classes)
    comparison = Comparison(others=[{"name": "nearest mean", "top1": 0.5}, {"name": "guessing", "top1": 0.1}])
    path = tmp_path / "report.html"
    evaluation = answers(source, 1.0)
    write_report(
        path, title="pets", evaluation=evaluation, source=source, model=model, run=record(), comparison=comparison
    )
    return Page(path)


@pytest.fixture
def several(tmp_path: Path) -> Page:
    rows = (np.random.default_rng(2).random((40, 3)) < 0.4).astype(np.float32)
    source = ArraySource(pictures(40), rows, ("sun", "sea", "sand"))
    model = fitted(ViT(vit_config(3)), source.classes)
    model.multi_label = True
    path = tmp_path / "report.html"
    write_report(path, title="beach", evaluation=answers(source, 1.0), source=source, model=model)
    return Page(path)


def assert_self_contained(page: Page) -> None:
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), f"{tag} has the handler {key}={value}"
        if key in ("src", "href", "action", "data", "srcset"):
            assert value.startswith(("data:image/png;base64,", "#")), f"{tag} loads {value}"
    without_pictures = re.sub(r"base64,[^\"]*", "", page.source)
    assert not re.search(r"url\(|@import|https?:", without_pictures, re.IGNORECASE)
    assert "default-src 'none'" in page.source


def test_the_page_stands_alone_and_its_links_lead_somewhere(single: Page) -> None:
    assert_self_contained(single)
    targets = [value.removeprefix("#") for value in single.values("href")]
    parts = (
        "comparison training confusion classes calibration rejection mistakes right attention data settings environment"
    )
    assert " ".join(targets) == parts
    assert set(targets) <= set(single.values("id"))
    assert all(alt for tag, key, alt in single.attributes if (tag, key) == ("img", "alt"))
    assert single.tags["img"] == len(single.values("alt"))
    assert all(label for label in single.values("aria-label"))


def test_headline_figures_are_those_of_the_evaluation(single: Page) -> None:
    source = ArraySource(pictures(60), np.arange(60) % 6, ("cat", "dog", "owl", "yak", "emu", "fox"))
    metrics = answers(source, 1.0).metrics()
    right = round(60 * metrics["top1"])
    assert f"{right} of 60 pictures of 6 classes named right." in single.text
    for key in ("top1", "top5", "macro_f1", "ece", "ece_calibrated"):
        assert f"{metrics[key]:.1%}" in single.text
    assert f"temperature {metrics['temperature']:.2f}" in single.text
    assert "2 min 41 s" in single.text
    assert "Compared with nearest mean and guessing" in single.text
    assert f"makes {60 - right} mistakes, nearest mean makes 30 " in single.text
    assert f"makes {60 - right} mistakes, guessing makes 54 " in single.text
    assert "Best: 80.0% after 300 updates." in single.text
    assert "optim.lr" in single.text and "0.004" in single.text
    assert "optim.weight_decay" not in single.text.split("All settings as JSON")[0]
    assert '"weight_decay": 0.05' in single.text
    assert "abc123" in single.text


def test_thresholds_are_those_that_reject_as_told(single: Page) -> None:
    source = ArraySource(pictures(60), np.arange(60) % 6, ("cat", "dog", "owl", "yak", "emu", "fox"))
    evaluation = answers(source, 1.0)
    assert f"AURC) is {evaluation.aurc():.3f}" in " ".join(single.text.split())
    confidence = evaluation.probabilities().max(axis=1)
    right = evaluation.logits.argmax(axis=1) == evaluation.targets
    section = risk_section(evaluation)
    assert section is not None
    reached = [row for row in section["rows"] if row[1] not in ("not reached", "none needed")]
    for accuracy, threshold, kept, _ in reached:
        above = confidence >= float(threshold)
        assert right[above].mean() >= float(accuracy.rstrip("%")) / 100 - 1e-9
        assert f"{above.mean():.1%}" == kept and threshold in single.text
    assert section["chart"].count("<circle") == sum(row[1] != "not reached" for row in section["rows"]) > 0


def test_sections_that_do_not_apply_are_absent(several: Page) -> None:
    assert_self_contained(several)
    targets = [value.removeprefix("#") for value in several.values("href")]
    assert targets == ["classes", "mistakes", "right", "attention", "data"]
    assert set(targets) == set(several.values("id"))
    for word in ("Confusion", "confidence", "Top-1", "Training time", "Settings", "could not be read"):
        assert word not in several.text
    for word in ("Mean average precision", "Micro-F1", "AP", "Largest losses"):
        assert word in several.text


def test_a_model_of_another_family_has_no_attention_section(tmp_path: Path) -> None:
    source = ArraySource(pictures(9), np.arange(9) % 3, ("cat", "dog", "owl"))
    model = fitted(Plain(vit_config(3)), source.classes)
    path = tmp_path / "report.html"
    write_report(path, title="t", evaluation=predict_logits(model, source), source=source, model=model)
    assert "attention" not in Page(path).values("id")


def test_a_model_that_is_always_right_has_no_mistakes(tmp_path: Path) -> None:
    source = ArraySource(pictures(9), np.arange(9) % 3, ("cat", "dog", "owl"))
    model = fitted(ViT(vit_config(3)), source.classes)
    path = tmp_path / "report.html"
    comparison = Comparison(others=[{"name": "guessing", "top1": 1.0, "macro_f1": 0.5}])
    write_report(path, title="t", evaluation=answers(source, 50.0), source=source, model=model, comparison=comparison)
    page = Page(path)
    assert "mistakes" not in page.values("id")
    assert "Most confident mistakes" not in page.text
    assert "makes 0 mistakes, guessing makes 0 on the same pictures: as many ." in page.text.replace(".  ", ".")


@pytest.mark.parametrize("multi_label", [False, True])
def test_hostile_names_are_shown_and_never_run(tmp_path: Path, multi_label: bool) -> None:
    classes = tuple(f"{HOSTILE} {i}" for i in range(6))
    rng = np.random.default_rng(0)
    targets = (rng.random((30, 6)) < 0.3).astype(np.float32) if multi_label else np.arange(30) ** 2 % 6
    source = Renamed(pictures(30), targets, classes)
    model = fitted(ViT(vit_config(6)), classes)
    run = record(HOSTILE)
    run = replace(run, data={**run.data, "fingerprint": HOSTILE}, environment={HOSTILE: HOSTILE})
    path = tmp_path / "report.html"
    write_report(
        path,
        title=HOSTILE,
        evaluation=answers(source, 0.5, broken=((HOSTILE, HOSTILE),)),
        source=source,
        model=model,
        run=run,
        comparison=Comparison(others=[{"name": HOSTILE, "top1": 0.5, "mAP": 0.5}], ours=HOSTILE, lesson=HOSTILE),
    )
    page = Page(path)
    assert_self_contained(page)
    assert "<script" not in page.source
    assert "<img src=x" not in page.source
    assert page.text.count("<script>alert(1)</script>") > 20


def test_names_that_are_not_valid_text_do_not_stop_the_report(tmp_path: Path) -> None:
    source = ArraySource(pictures(4), np.array([0, 1, 0, 1]), ("caf\udce9", "dog\x00\x1b"), prefix="\udcff\u202e.png")
    path = tmp_path / "report.html"
    model = fitted(ViT(vit_config(2)), source.classes)
    write_report(path, title="caf\udce9", evaluation=answers(source), source=source, model=model)
    assert "caf?" in Page(path).text


@pytest.mark.parametrize("multi_label", [False, True])
def test_undefined_values_never_show_as_nan_or_none(tmp_path: Path, multi_label: bool) -> None:
    classes = ("seen", "unseen", "rare")
    targets = np.array([[1, 0, 0]], np.float32) if multi_label else np.array([0])
    source = ArraySource(pictures(1), targets, classes)
    run = record()
    rows = [*run.metrics, {"step": 310, "loss": float("nan"), "lr": 0.0}, {"step": 311, "loss": None, "lr": 0.0}]
    rows.append({"step": 312, "val": {"nll": float("inf")}})
    path = tmp_path / "report.html"
    model = fitted(ViT(vit_config(3)), classes)
    write_report(
        path, title="t", evaluation=answers(source), source=source, model=model, run=replace(run, metrics=rows)
    )
    page = Page(path)
    shown = page.text.split("All settings as JSON")[0]
    visible = " ".join([shown, *page.values("points"), *page.values("d"), *page.values("y"), *page.values("style")])
    assert not re.search(r"\b(nan|inf|infinity|None|undefined)\b", visible)
    assert "2 without pictures count in no mean." in page.text


def test_a_run_without_a_single_logged_row_has_no_curves(tmp_path: Path) -> None:
    source = ArraySource(pictures(3), np.array([0, 1, 1]), ("a", "b"))
    model = fitted(ViT(vit_config(2)), source.classes)
    path = tmp_path / "report.html"
    run = replace(record(), metrics=[])
    write_report(path, title="t", evaluation=answers(source), source=source, model=model, run=run)
    assert "training" not in Page(path).values("id")


def test_a_page_of_a_hundred_classes_and_large_pictures_stays_below_3_mb(tmp_path: Path) -> None:
    classes = tuple(f"class {i}" for i in range(100))
    source = ArraySource(pictures(200, side=224), np.arange(200) % 100, classes)  # noise: what PNG packs worst
    model = fitted(ViT(vit_config(100, side=224, patch=32)), classes, side=224)
    path = tmp_path / "report.html"
    write_report(path, title="t", evaluation=answers(source, 1.0), source=source, model=model, run=record())
    page = Page(path)
    assert path.stat().st_size < 3_000_000
    assert "Confusion matrix" not in page.source  # too many classes for a matrix
    assert "The most frequent mistakes" in page.text
    assert page.tags["img"] == 18 + 9 + 2 * 6 + 2


def test_pictures_are_those_that_the_model_saw(tmp_path: Path) -> None:
    source = ArraySource(pictures(4, channels=1), np.array([0, 1, 0, 1]), ("a", "b"))
    model = fitted(ViT(vit_config(2, channels=1)), source.classes, channels=1)
    path = tmp_path / "report.html"
    write_report(path, title="t", evaluation=answers(source, 50.0), source=source, model=model)
    page = Page(path)
    right = dict(zip(page.values("alt"), page.values("src"), strict=True))["Picture picture#2"]
    pixels = Image.open(io.BytesIO(base64.b64decode(right.partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(pixels), source.images[2, :, :, 0])
    assert "crisp" in page.values("class")


def test_a_picture_that_went_away_is_named(tmp_path: Path) -> None:
    class Gone(Subset):
        def load(self, index: int) -> Picture:
            raise BrokenPicture("no such file")

    source = ArraySource(pictures(3), np.array([0, 1, 1]), ("a", "b"))
    model = fitted(ViT(vit_config(2)), source.classes)
    with pytest.raises(UserError, match=r"picture#\d could be evaluated, but not be read again .* no such file"):
        gone = Gone(source, [0, 1, 2])
        write_report(tmp_path / "r.html", title="t", evaluation=answers(source), source=gone, model=model)


def style_colours(part: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6});", part))


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    levels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_and_lines_have_enough_contrast(single: Page, scheme: str) -> None:
    light, rest = single.source.split("@media (prefers-color-scheme: dark)")
    dark, printed = rest.split("@media print")
    colours = style_colours({"light": light, "dark": dark, "print": printed}[scheme])
    for text in ("ink", "soft", "one", "two", "three"):
        for ground in ("page", "panel"):
            low, high = sorted([luminance(colours[text]), luminance(colours[ground])])
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text} on {ground}"  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize(
    ("low", "high", "percent", "expected"),
    [
        (0.0, 1.0, True, ["0%", "20%", "40%", "60%", "80%", "100%"]),
        (0.0, 2000.0, False, ["0", "500", "1,000", "1,500", "2,000"]),
        (0.841, 0.883, True, ["85%", "86%", "87%", "88%"]),
        (0.0, 4e-5, False, ["0", "1e-5", "2e-5", "3e-5", "4e-5"]),
        (-0.5, 0.5, False, ["-0.4", "-0.2", "0.0", "0.2", "0.4"]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, percent: bool, expected: list[str]) -> None:
    scale = charts.Scale(low, high, 0, 100, percent=percent)
    assert [scale.text(tick) for tick in scale.ticks] == expected
    assert scale.at(low) == 0
    assert scale.at(high) == 100


def test_a_chart_of_one_value_and_a_long_one_stay_inside_their_frame() -> None:
    flat = charts.Series("flat", [(float(i), 0.7) for i in range(1, 5000)])
    point = charts.Series("point", [(1.0, 0.7)], dots=True)
    svg = ElementTree.fromstring(charts.line_chart([flat, point], label="l", x_label="x", percent=True))
    line = svg.find("polyline")
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    assert len(places) == 240
    assert all(charts.LEFT <= x <= charts.WIDTH and charts.TOP <= y <= charts.HEIGHT for x, y in places)


def test_shares_are_never_drawn_on_an_axis_beyond_all_or_nothing() -> None:
    for value, expected in ((1.0, "100.0%"), (0.0, "0.0%")):
        series = [charts.Series("s", [(1, value), (2, value)])]
        svg = ElementTree.fromstring(charts.line_chart(series, label="l", x_label="x", percent=True))
        ticks = [text.text or "" for text in svg.findall("text") if (text.text or "").endswith("%")]
        assert expected in ticks
        assert all(0 <= float(tick.removesuffix("%")) <= 100 for tick in ticks)


def test_a_confusion_matrix_draws_what_is_there_and_nothing_else() -> None:
    counts = np.array([[5, 0, 1], [0, 4, 0], [2, 0, 0]])
    svg = ElementTree.fromstring(charts.heat_map(counts, ("a", HOSTILE, "c"), label="m"))
    drawn = {(group.attrib["class"], group.findtext("text"), group.findtext("title")) for group in svg.findall("g")}
    assert drawn == {
        ("right", "5", "a called a: 5 (83.3%)"),
        ("wrong", "1", "a called c: 1 (16.7%)"),
        ("right", "4", f"{HOSTILE} called {HOSTILE}: 4 (100.0%)"),
        ("wrong", "2", "c called a: 2 (100.0%)"),
    }
    opacities = {group.findtext("text"): float(group[0].attrib["fill-opacity"]) for group in svg.findall("g")}
    assert opacities["4"] == 1.0 > opacities["5"] > opacities["1"]


def test_a_forty_class_matrix_fits_its_frame() -> None:
    names = tuple(f"a rather long class name {i}" for i in range(40))
    svg = ElementTree.fromstring(charts.heat_map(np.eye(40, dtype=np.int64), names, label="m"))
    width, height = map(float, svg.attrib["viewBox"].split()[2:])
    for rect in svg.iter("rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height


def test_intervals_lie_around_their_values() -> None:
    rows = [charts.Row("ours", 0.87, 0.85, 0.88), charts.Row("x" * 80, 1.0)]
    svg = ElementTree.fromstring(charts.interval_chart(rows, label="l"))
    dots = [float(dot.attrib["cx"]) for dot in svg.findall("circle")]
    whisker = next(line for line in svg.findall("line") if line.attrib["class"].startswith("whisker"))
    assert float(whisker.attrib["x1"]) < dots[0] < float(whisker.attrib["x2"]) < dots[1] <= charts.WIDTH


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_uri_gives_the_pixels_back(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    data = base64.b64decode(figures.png_uri(pixels).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))).reshape(pixels.shape), pixels)


def test_thumbnails_shrink_and_never_grow() -> None:
    assert figures.thumbnail(np.zeros((300, 150, 3), np.uint8), 100).shape == (100, 50, 3)
    assert figures.thumbnail(np.zeros((300, 150, 1), np.uint8), 100).shape == (100, 50, 1)
    small = np.zeros((28, 28, 1), np.uint8)
    assert figures.thumbnail(small, 100) is small


def test_the_spotlight_falls_where_relevance_is_high() -> None:
    for channels, side in ((1, 28), (3, 224)):
        white = np.full((side, side, channels), 255, np.uint8)
        relevance = np.array([[0.0, 0.0], [0.0, 0.5]])
        lit = figures.spotlight(white, relevance, 112)
        assert lit.shape == (112, 112, 3)
        assert lit[-1, -1].tolist() == [255, 255, 255]
        assert lit[0, 0].tolist() == [26, 26, 26]
        black = figures.spotlight(0 * white, relevance, 112)
        assert black[-1, -1, 0] > 100 > black[0, 0, 0]


def test_colours_run_from_dark_violet_to_yellow() -> None:
    colours = figures.viridis(np.array([-1.0, 0.0, 0.5, 1.0, 2.0]))
    assert colours.tolist() == [[68, 1, 84], [68, 1, 84], [33, 145, 140], [253, 231, 37], [253, 231, 37]]


def test_mosaics_put_tiles_in_order_with_clear_lines_between() -> None:
    tiles = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1)
    joined = figures.mosaic(tiles, times=2)
    assert joined.shape == (2 * 4 - 2, 3 * 4 - 2, 4)
    assert joined[0::4, 0::4, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (joined[2, :, 3] == 0).all()
    assert joined[1, 1, 3] == 255


def test_the_similarity_mosaic_is_yellow_where_a_patch_meets_itself() -> None:
    similarity = np.eye(4).reshape(2, 2, 2, 2)
    picture = figures.similarity_mosaic(similarity)
    half = picture.shape[0] // 4
    assert picture[0, 0].tolist() == [253, 231, 37, 255]
    assert picture[half, half].tolist() == [68, 1, 84, 255]
    large = figures.similarity_mosaic(np.random.default_rng(0).random((20, 16, 20, 16)))
    assert large.shape == (14 * 21 - 1, 14 * 17 - 1, 4)


def test_filters_are_scaled_around_middle_grey() -> None:
    filters = np.zeros((15, 3, 2, 2))
    filters[:, 0, 0, 0] = -3.0
    picture = figures.filter_mosaic(filters)
    assert picture[0, 0].tolist() == [0, 128, 128, 255]
    assert picture.shape[1] > 3 * picture.shape[0]  # two full rows of seven; the fifteenth is left out
    assert figures.filter_mosaic(filters[:3]).shape[0] < figures.filter_mosaic(filters[:3]).shape[1]


def test_settings_are_stored_whole_as_json(single: Page) -> None:
    start = single.source.index("<pre>") + 5
    settings = json.loads(html.unescape(single.source[start : single.source.index("</pre>")]))
    assert settings["optim"]["lr"] == 0.004
    assert settings["model"]["width"] == 16  # the model as it was built, not the preset's
