"""Write what the pages of models have from the code: figures, and tables of sizes between their marks.

    python docs/generator/write.py

A test says when that is due.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from figures import FIGURES

from vitrail.config.model import MODELS, ModelConfig
from vitrail.zoo import describe

PAGES = Path(__file__).parent.parent / "models"
COLUMNS: dict[str, tuple[str, ...]] = {
    "vit": ("width", "depth", "heads", "mlp_dim"),
    "v-moe": ("width", "depth", "heads", "mlp_dim", "experts", "experts_per_token"),
    "cvt": ("widths", "depths", "heads"),
    "coatnet": ("widths", "depths"),
    "efficientnet": ("stem_width", "widths", "depths", "head_width"),
    "wide-resnet": ("widths", "depths"),
}
"""What a family's table shows beside the counts: fields of its configuration."""
FAMILIES = dict(
    zip(
        COLUMNS,
        ("ViTConfig", "ViTMoEConfig", "CvTConfig", "CoAtNetConfig", "EfficientNetConfig", "WideResNetConfig"),
        strict=True,
    )
)
MARKED = re.compile(r"(?<=<!-- sizes -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)


def sizes(family: str) -> str:
    """Return the table of a family's published sizes."""
    columns = COLUMNS[family]
    heads = ["model", "parameters", "classes", "GMACs", *(column.replace("_", " ") for column in columns)]
    rows = [_row(heads), _row([":--", *["--:"] * (len(heads) - 1)])]
    for name, config in MODELS.items():
        if type(config).__name__ == FAMILIES[family]:
            rows.append(_row([f"`{name}`", *_counts(name), *(_cell(config, column) for column in columns)]))
    return "\n" + "\n".join(rows) + "\n\n"


def _counts(name: str) -> list[str]:
    facts = describe(name)
    gmacs = ", ".join(f"{value:,.4g} at {size}" for size, value in facts["gmacs"].items())
    return [f"{facts['parameters']:,}", f"{facts['classes']:,}", gmacs]


def _cell(config: ModelConfig, column: str) -> str:
    value = getattr(config, column)
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def documents() -> dict[Path, str]:
    """Return every file that this writes, with its text."""
    found = {PAGES / "figures" / f"{name}.svg": draw().svg() for name, draw in FIGURES.items()}
    for family in COLUMNS:
        page = PAGES / f"{family}.md"
        found[page] = MARKED.sub(sizes(family).replace("\\", r"\\"), page.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    for path, text in documents().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
