"""The documents hold: their commands exist, their links lead somewhere, their Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vitrail.cli import VERBS
from vitrail.presets import preset_name

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
DOCUMENTS += sorted((ROOT / "benchmarks" / "results").glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


def test_the_readme_names_only_verbs_presets_and_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for line in "\n".join(blocks(ROOT / "README.md", "sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets
        if words[:1] == ["vitrail"]:
            assert words[1] in VERBS, line
            if words[1] == "train" and not words[2].startswith("-"):
                preset_name(words[2])


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "vit-gigantic14" in done.stdout


def test_public_names_are_documented_and_importable() -> None:
    import vitrail

    for name in vitrail.__all__:
        assert getattr(vitrail, name).__doc__, name
