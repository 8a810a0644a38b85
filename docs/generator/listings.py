"""Where a link from a document into the repository leads, and the lines of the code that it names."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = {
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
"""Documents outside docs/ that are pages of the site, too."""
RESULTS = "benchmarks/results/"
"""Folder of what was measured; its pages and figures go to `results/`."""


def site_path(path: str) -> str:
    """Return where a file of the repository, named from its root, stands in the site's folder of sources."""
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return f"{inside.removesuffix('.ipynb')}.md" if inside.endswith(".ipynb") else inside
    if path.startswith(RESULTS) and path.endswith((".md", ".svg")):
        return f"results/{path.removeprefix(RESULTS)}"
    return PAGES.get(path, f"code/{path.removeprefix('src/')}.md")


@cache
def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """Return first and last line of every class, function and named value of a Python file: `ViT.embed`, `VIT_SIZES`.

    Decorators belong to what they decorate.
    """
    found: dict[str, tuple[int, int]] = {}

    def note(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first = min((each.lineno for each in node.decorator_list), default=node.lineno)
                found[prefix + node.name] = (first, node.end_lineno or node.lineno)
                if isinstance(node, ast.ClassDef):
                    note(node.body, f"{prefix}{node.name}.")
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name):
                    found[prefix + target.id] = (node.lineno, node.end_lineno or node.lineno)

    note(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def lines_of(path: Path, name: str) -> tuple[int, int]:
    """Return first and last line of what a link's fragment names.

    Raises:
        KeyError: When the file defines nothing of this name.
    """
    try:
        return definitions(path)[name]
    except KeyError:
        raise KeyError(f"{path.relative_to(ROOT)} defines no {name}") from None


def listing(path: Path, name: str) -> str:
    """Return a fenced block of the lines of what is named, with the numbers that they have in the file."""
    first, last = lines_of(path, name)
    lines = path.read_text(encoding="utf-8").splitlines()[first - 1 : last]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    code = "\n".join(line[indent:] for line in lines)
    return f'```{{.python linenums="{first}"}}\n{code}\n```'
