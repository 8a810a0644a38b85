"""What MkDocs does not do by itself: take in results and code, turn links into the repository into links of the site.

A link such as `[ViT.embed](../src/vitrail/models/vit.py#ViT.embed)` works where Markdown is read in the repository. In
the site it leads to the page of that file, at these lines; where it is all of a paragraph, the lines follow it. Pages
are made of the files that are linked to. Figures are put into the page as they are, so that they follow its colours.
Notebooks become pages.
"""

import json
import os
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from listings import PAGES, RESULTS, ROOT, lines_of, listing, site_path
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]*)(?:#(?P<name>[^)\s]*))?\)")
FENCED = re.compile(r"^(?P<fence> *```+).*?^(?P=fence) *$", flags=re.DOTALL | re.MULTILINE)
FIGURE = re.compile(r"!\[(?P<text>[^\]]*)\]\((?P<target>[^)]*figures/[^)]*\.svg)\)")
ALL_RESULTS = "<!-- all results -->"
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n\n"
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", "": "text", ".txt": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add results, documents of the root, notebooks, and the code that any of them links to."""
    origins = {file.src_uri: f"docs/{file.src_uri}" for file in files.documentation_pages()}
    results = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / RESULTS).iterdir())
    for path in (*PAGES, *(path for path in results if path.endswith((".md", ".svg")))):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
        origins[site_path(path)] = path
    for file in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        path = f"docs/notebooks/{file.name}"
        files.append(File.generated(config, site_path(path), content=_of_notebook(file)))
        origins[site_path(path)] = path
    linked = {target for path in origins.values() if not path.endswith(".svg") for target in _targets(path)}
    for path in sorted(linked):
        if site_path(path).startswith("code/") and (ROOT / path).is_file():
            files.append(File.generated(config, site_path(path), content=_of_code(path)))
    config.extra["origins"] = origins
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into the repository into links of the site, or into the lines they name; put figures in."""
    path = config.extra["origins"].get(page.file.src_uri)
    if path is None:  # a page of code
        return markdown
    if ALL_RESULTS in markdown:
        results = (
            each for each in config.extra["origins"].values() if each.startswith(RESULTS) and each.endswith(".md")
        )
        links = (f"[{Path(each).stem}]({relpath(each, dirname(path))})" for each in results)
        markdown = markdown.replace(ALL_RESULTS, ", ".join(links) + ".")

    def rewritten(match: re.Match[str]) -> str:
        text, target, name = match["text"], match["target"], match["name"]
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        place = normpath(f"{dirname(path)}/{target}")
        to = relpath(site_path(place), dirname(page.file.src_uri) or ".")
        if name and place.endswith(".py"):
            # As HTML, because MkDocs does not see the anchors of lines, and would say that there are none.
            line = lines_of(ROOT / place, name)[0]
            return f'<a href="{to.removesuffix(".md")}.html#__codelineno-0-{line}">{text}</a>'
        return f"[{text}]({to}{'#' + name if name else ''})"

    def shown(paragraph: str) -> str:
        alone = LINK.fullmatch(paragraph.strip())
        link = LINK.sub(rewritten, paragraph)
        if alone is None or not alone["name"] or not alone["target"].endswith(".py"):
            return FIGURE.sub(lambda match: _figure(path, match), link)
        place = normpath(f"{dirname(path)}/{alone['target']}")
        code = listing(ROOT / place, alone["name"])
        return f"{link.strip()} in `{place}`\n{{ .of-listing }}\n\n{code}"

    parts, at = [], 0
    for block in FENCED.finditer(markdown):
        parts += ["\n\n".join(map(shown, markdown[at : block.start()].split("\n\n"))), block[0]]
        at = block.end()
    return "".join([*parts, "\n\n".join(map(shown, markdown[at:].split("\n\n")))])


def _targets(path: str) -> set[str]:
    """Return the files, named from the repository's root, that a document links to."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return {
        normpath(f"{dirname(path)}/{match['target']}")
        for match in LINK.finditer(text)
        if match["target"] and "://" not in match["target"]
    }


def _figure(path: str, match: re.Match[str]) -> str:
    """Return the drawing itself, which takes its colours from the page; as a picture it could not."""
    svg = (ROOT / normpath(f"{dirname(path)}/{match['target']}")).read_text(encoding="utf-8")
    return '<figure class="drawn">' + re.sub(r">\s+<", "><", svg).strip() + "</figure>"


def _of_code(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    language = LANGUAGES.get(Path(path).suffix, "text")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f'{UNSEARCHED}# {path}\n\n{fence}{{.{language} linenums="1"}}\n{text}\n{fence}\n'


def _of_notebook(path: Path) -> str:
    """Return a notebook as Markdown, with a link to the file itself."""
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        cells.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    title, *rest = cells
    note = f'<p class="of-listing"><a href="{os.path.basename(path)}" download>The notebook</a></p>'
    return "\n\n".join([title, note, *rest])
