"""The house keeps its shape: floors, file and function sizes, a torch-free command line."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitrail

PACKAGE = Path(vitrail.__file__).parent
# Low to high. A module imports from lower floors and from its own package, never sideways or upwards.
FLOORS = [
    ["errors", "config"],
    ["npz", "weights", "sharding", "cache", "arrow"],
    ["layers", "optimizers", "presets"],
    ["models"],
    ["losses", "optim", "parallel", "metrics", "data", "engines"],
    ["checkpoints", "recipes"],
    ["evaluation"],
    ["prediction", "training"],
    ["explaining", "zoo", "check", "embedding"],
    ["report", "leaderboard", "probe", "distributed_prediction"],
    ["runs", "compare", "benchmark", "planner", "serving"],
    ["demo", "exporting"],
    ["cli"],
    ["__init__", "__main__"],
]
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def house_of(file: Path) -> str:
    """The top-level module or package a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every vitrail import, the deferred ones of functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_floors(file: Path) -> None:
    house = house_of(file)
    if house == "__init__":  # the public face names every floor, lazily
        return
    for line, name in imports_of(file):
        if not name.startswith("vitrail."):
            continue
        target = name.split(".")[1]
        assert target == house or FLOOR_OF[target] < FLOOR_OF[house] or (FLOOR_OF[target] == FLOOR_OF[house] == 0), (
            f"{file.name}:{line} imports {name} from floor {FLOOR_OF[target]}, itself on floor {FLOOR_OF[house]}"
        )


def test_no_modules_import_each_other() -> None:
    edges = {
        str(file.relative_to(PACKAGE)): {name for _, name in imports_of(file) if name.startswith("vitrail.")}
        for file in FILES
        if house_of(file) != "__init__"
    }
    modules = {
        path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): deps for path, deps in edges.items()
    }
    graph = {f"vitrail.{name}": deps for name, deps in modules.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module in done:
            return
        for dependency in graph.get(module, ()):
            visit(dependency, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_every_module_has_a_floor() -> None:
    assert {house_of(file) for file in FILES} <= FLOOR_OF.keys()


def test_files_and_functions_stay_short() -> None:
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 420, f"{file.name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = node.end_lineno - body[0].lineno + 1 if body and node.end_lineno else 0
                assert length <= 60, f"{file.name}: {node.name} has {length} lines"


def test_no_grab_bags_and_no_ignored_mistakes() -> None:
    assert not [file for file in FILES if file.stem in ("utils", "common", "helpers", "misc")]
    ignores = sum(file.read_text(encoding="utf-8").count("pyright: ignore") for file in FILES)
    assert ignores <= 25, f"{ignores} type-check ignores; mend the types instead of raising this budget"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "demo", "--help"], ["predict", "--help"]]
)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom vitrail.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'sklearn', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
