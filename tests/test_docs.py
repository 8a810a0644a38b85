"""The documents hold: commands exist, links lead somewhere, Python runs, tables and figures are the code's."""

import functools
import json
import re
import runpy
import shlex
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitrail.cli import VERBS, main
from vitrail.data import read_parts

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
DOCUMENTS += [*sorted((ROOT / "benchmarks" / "results").glob("*.md")), *PAGES]
FENCED = re.compile(
    r"(?:<!-- (?P<mark>run[^>]*) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\((?P<target>[^)#\s]*)(?:#(?P<fragment>[^)\s]*))?\)")
TINY = ["--loop.steps", "2", "--loop.batch-size", "8", "--model.image-size", "32", "32", "--input.workers", "0"]
"""What makes a `train` of the documents short; the last of two flags counts."""


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def blocks(document: Path, language: str) -> list[str]:
    return [each["text"] for each in FENCED.finditer(document.read_text("utf-8")) if each["language"] == language]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words after `vitrail` of every such command in a block of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\|\|?|&&", line.partition(" #")[0]):
            words = shlex.split(part)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                del words[0]
            if "-m" in words and words[:1] == ["torchrun"]:
                words = words[words.index("-m") + 1 :]
            if words[:1] == ["vitrail"]:
                yield words[1:]


@functools.cache
def anchors(document: Path) -> set[str]:
    """Return the anchors of a page: its headings, as site and repository browsers name them, and names of the API."""
    text = FENCED.sub("", document.read_text("utf-8"))
    found = set(re.findall(r"^::: (\S+)", text, flags=re.MULTILINE))
    for heading in re.findall(r"^#+ (.*)", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "generator" / "listings.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path, listings: dict[str, Any]) -> None:
    for link in LINK.finditer(FENCED.sub("", document.read_text("utf-8"))):
        target, fragment = link["target"], link["fragment"]
        if "://" in target:
            continue
        place = document if not target else document.parent / target
        assert place.exists(), f"{name_of(document)} links to {target}, which does not exist"
        if fragment and place.suffix == ".py":
            listings["lines_of"](place.resolve(), fragment)
        elif fragment and place.suffix == ".md":
            assert fragment in anchors(place.resolve()), f"{name_of(document)}: {target} has no heading #{fragment}"


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if blocks(each, "sh")], ids=name_of)
def test_commands_parse(document: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, verb in VERBS.items():
        if name != "train":
            monkeypatch.setitem(VERBS, name, functools.wraps(verb)(lambda *given, **named: 0))
    monkeypatch.setattr("vitrail.cli.training._train", lambda config, json: 0)
    monkeypatch.setattr("vitrail.cli.training._with_model", lambda config, model, init: config)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for block in blocks(document, "sh"):
        assert set(re.findall(r"^make ([a-z-]+)", block, flags=re.MULTILINE)) <= targets
        for words in commands(block):
            try:
                code = main(words)
            except SystemExit as refusal:  # tyro's, of unknown flags
                code = refusal.code
            assert code == 0, f"{shlex.join(['vitrail', *words])}\n{capsys.readouterr()}"


def run_page(page: Path, *, slow: bool) -> None:
    """Run, in the current folder, the Python of a page and the commands marked for it, from top to bottom."""
    code: dict[str, object] = {"__name__": "__main__"}
    for block in FENCED.finditer(page.read_text("utf-8")):
        if block["language"] == "python":
            exec(compile(block["text"], name_of(page), "exec"), code)
        elif block["mark"] == "run" or (block["mark"] and slow):
            for words in commands(block["text"]):
                words = [
                    found
                    for word in words
                    for found in (sorted(map(str, Path().glob(word))) or [word] if "*" in word else [word])
                ]
                assert main([*words, *TINY] if words[0] == "train" else words) == 0, shlex.join(words)


RUN = [
    page for page in [ROOT / "README.md", *PAGES] if re.search(r"^(```python|<!-- run)", page.read_text("utf-8"), re.M)
]
SLOW = [page for page in RUN if "<!-- run in the second tier -->" in page.read_text("utf-8")]


@pytest.mark.parametrize(
    ("page", "slow"),
    [*((page, False) for page in RUN), *(pytest.param(page, True, marks=pytest.mark.slow) for page in SLOW)],
    ids=lambda value: name_of(value) if isinstance(value, Path) else "",
)
def test_pages_run(page: Path, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name != "tutorial.md":  # which makes its own
        clothes = read_parts("clothing").train
        for i in range(0, len(clothes), 8):
            folder = tmp_path / "photos" / clothes.classes[clothes.targets[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(clothes.load(i)).save(folder / f"{i}.png")
        (tmp_path / "holiday").mkdir()
        Image.fromarray(clothes.load(0)).save(tmp_path / "holiday" / "one.jpg")
    run_page(page, slow=slow)


def test_every_page_is_in_the_site(listings: dict[str, Any]) -> None:
    nav = set(
        re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8").partition("\ntheme:")[0], re.MULTILINE)
    )
    pages = {name_of(page).removeprefix("docs/") for page in PAGES}
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")}
    assert nav == pages | notebooks | set(listings["PAGES"].values())


def test_figures_and_tables_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "generator"))
    from write import documents  # pyright: ignore[reportMissingImports]

    for path, text in documents().items():
        assert path.read_text("utf-8") == text, f"{path.name}: python docs/generator/write.py"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_compile_and_hold_no_outputs(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        assert not cell["outputs"] and cell["execution_count"] is None
        compile("".join(cell["source"]), path.name, "exec")


def test_public_names_are_documented_and_importable() -> None:
    import vitrail

    reference = {entry for page in PAGES for entry in anchors(page)}
    for name in vitrail.__all__:
        assert getattr(vitrail, name).__doc__, name
        assert f"vitrail.{name}" in reference
