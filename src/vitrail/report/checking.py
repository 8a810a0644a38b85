"""A check of a data set as one page: every finding, with its pictures."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitrail.check import CheckReport, Finding, Item, Suspect
from vitrail.data import read_parts
from vitrail.data.base import Picture, Source
from vitrail.errors import BrokenPicture
from vitrail.report.figures import is_small, png_uri, thumbnail
from vitrail.report.page import write_page

TITLES = {
    "broken": "Pictures that cannot be read",
    "empty-file": "Empty files",
    "conflict": "The same picture under several labels",
    "leakage": "The same picture in several parts",
    "duplicate": "The same picture more than once",
    "imbalance": "Imbalance",
    "small-class": "Small classes",
    "empty-class": "Empty classes",
    "outside-classes": "Pictures outside the classes",
    "no-file": "Names without a file",
    "tiny": "Tiny pictures",
    "elongated": "Very long pictures",
    "cmyk": "Printer's colours",
    "16-bit": "More than 8 bits",
    "palette": "Palettes",
    "transparent": "Transparency",
    "grey": "Grey pictures",
    "turned": "Turned pictures",
    "wrong-suffix": "Suffixes that belie the content",
    "ignored": "Files that are not read",
    "suspect-label": "Labels that are probably wrong",
    "near-duplicate": "Pictures that look almost the same",
    "seen-pictures": "The model knows these pictures",
    "labels-not-judged": "Labels are not judged",
}
"""What a finding of each kind is called on the page."""
SHOWN = {"suspect-label": 60, "near-duplicate": 24}
"""Items on the page; the report as JSON has all."""
SHOWN_OTHERS = 12
NAMES = 4  # of an item of several pictures
SIDE = 120  # pixels of a picture's longer side


def write_check_page(report: CheckReport, path: str | Path, *, title: str, channels: int = 3) -> None:
    """Write one self-contained HTML page about a check; a file that is there is replaced in one step.

    Args:
        report: Of `vitrail.check.check`; the data it names are read again for the pictures that are shown.
        path: The file to write.
        title: Heading of the page.
        channels: As the check read the pictures.

    Raises:
        UserError: When the data have gone, or the file cannot be written.
    """
    pictures = _Pictures(report, channels)
    numbers = {
        kind: sum(finding.severity == kind for finding in report.findings) for kind in ("error", "warning", "note")
    }
    suspects = sum(len(finding.items) for finding in report.findings if finding.kind == "suspect-label")
    cards = [
        ("Pictures", f"{sum(map(sum, report.counts.values())):,}", ", ".join(report.counts)),
        ("Classes", f"{len(report.classes):,}", _balance(report)),
        ("Errors", f"{numbers['error']:,}", ""),
        ("Warnings", f"{numbers['warning']:,}", f"{suspects:,} suspect labels" if suspects else ""),
    ]
    write_page(
        Path(path),
        "check.html.jinja",
        title=title,
        lead="Nothing is wrong." if not report.findings else "What is wrong with the data, and what to do about it.",
        cards=cards,
        findings=[_section(finding, pictures) for finding in report.findings],
    )


class _Pictures:
    """The data set's pictures by name, of those that are shown."""

    def __init__(self, report: CheckReport, channels: int) -> None:
        wanted = {name for finding in report.findings for item in _shown(finding) for name in item.names}
        splits = read_parts(report.data, channels)
        sources = (source for source in (splits.train, splits.val, splits.test) if source is not None)
        self._places: Mapping[str, tuple[Source, int]] = {
            name: (source, index)
            for source in sources
            for index in range(len(source))
            if (name := source.name(index)) in wanted
        }

    def find(self, name: str) -> Picture | None:
        """Return a picture; None when there is none of this name, or it cannot be read."""
        if name not in self._places:
            return None
        source, index = self._places[name]
        try:
            return source.load(index)
        except BrokenPicture:
            return None


def _shown(finding: Finding) -> tuple[Item, ...]:
    return finding.items[: SHOWN.get(finding.kind, SHOWN_OTHERS)]


def _section(finding: Finding, pictures: _Pictures) -> dict[str, Any]:
    shown = _shown(finding)
    items = [_item(item, pictures) for item in shown]
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "title": TITLES[finding.kind],
        "text": finding.text[:1].upper() + finding.text[1:],
        "entries": items,
        "illustrated": any(item["frames"] for item in items),
        "together": any(len(item.names) > 1 for item in shown),
        "more": len(finding.items) - len(shown),
    }


def _item(item: Item, pictures: _Pictures) -> dict[str, Any]:
    suspect = None
    if isinstance(item, Suspect):
        shares = f"{_percent(item.label_probability)} against {_percent(item.suggested_probability)}"
        suspect = {"label": item.label, "suggested": item.suggested, "shares": shares}
    return {
        "names": item.names[:NAMES],
        "more": len(item.names) - NAMES,
        "detail": item.detail,
        "frames": list(_frames(item, pictures)),
        "suspect": suspect,
    }


def _frames(item: Item, pictures: _Pictures) -> Iterator[dict[str, Any]]:
    for name in item.names[:NAMES]:
        if (pixels := pictures.find(name)) is not None:
            yield {"name": name, "uri": png_uri(thumbnail(pixels, SIDE)), "crisp": is_small(pixels)}


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "below 1%"


def _balance(report: CheckReport) -> str:
    return "" if report.imbalance is None else f"largest over smallest: {report.imbalance:,.1f}"
