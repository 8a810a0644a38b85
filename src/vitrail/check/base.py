"""What a check says: findings, each with its severity, its cure and the pictures concerned."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
Kind = Literal[
    "broken",
    "empty-file",
    "conflict",
    "leakage",
    "duplicate",
    "imbalance",
    "small-class",
    "empty-class",
    "outside-classes",
    "no-file",
    "tiny",
    "elongated",
    "cmyk",
    "16-bit",
    "palette",
    "transparent",
    "grey",
    "turned",
    "wrong-suffix",
    "ignored",
    "suspect-label",
    "near-duplicate",
    "seen-pictures",
    "labels-not-judged",
]


@dataclass(frozen=True)
class Item:
    """One picture, or several that belong together."""

    names: tuple[str, ...]
    """Names of pictures, other files, or classes."""
    detail: str = ""
    """What is particular about them: the reason, the labels, the parts, the size."""


@dataclass(frozen=True, kw_only=True)
class Suspect(Item):
    """One picture whose label is probably wrong."""

    label: str
    suggested: str
    """The class that the model takes it for."""
    label_probability: float
    """Probability of its label: the lower, the more suspect."""
    suggested_probability: float


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing."""

    kind: Kind
    severity: Severity
    """An error makes results wrong or stops training; a warning may; a note is for information."""
    text: str
    """One line, with the cure."""
    items: tuple[Item, ...]
    """All pictures concerned."""


@dataclass(frozen=True)
class CheckReport:
    """What is in a data set, and what is wrong with it."""

    data: str
    """What was checked, as it was named."""
    classes: tuple[str, ...]
    """Class names in the order of the labels."""
    counts: dict[str, tuple[int, ...]]
    """Part (train, val, test) to its number of pictures per class, broken ones included."""
    imbalance: float | None
    """Training pictures of the largest class over those of the smallest; None where a class has none."""
    median_size: tuple[int, int] | None
    """Median height and median width of the readable pictures in pixels; None without any."""
    findings: tuple[Finding, ...]
    """Errors first, notes last."""

    @property
    def ok(self) -> bool:
        """Whether there is no error: nothing broken, no conflicting labels, no leakage."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return everything as dicts, lists and plain values."""
        return {"ok": self.ok, **asdict(self)}


def tell(number: int, one: str, many: str) -> str:
    """Return a number with the words that fit it."""
    return f"{number:,} {one if number == 1 else many}"
