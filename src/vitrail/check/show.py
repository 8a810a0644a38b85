"""A check's report on a terminal."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrail.check.base import CheckReport, Item, Severity, tell

SHOWN_CLASSES = 20
SHOWN_ITEMS = 5
SHOWN_NAMES = 4
STYLES: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_report(report: CheckReport, console: Console) -> None:
    """Show what is in the data, then every finding with its first pictures; `to_json` has them all."""
    console.print(_counts(report))
    if report.median_size is not None:
        console.print(f"median size: {report.median_size[0]} x {report.median_size[1]} pixels (height x width)")
    if report.imbalance is not None:
        console.print(f"largest over smallest class in training: {report.imbalance:,.1f}")
    for finding in report.findings:
        console.print(Text.assemble((f"{finding.severity}: ", STYLES[finding.severity]), _plain(finding.text)))
        for item in finding.items[:SHOWN_ITEMS]:
            console.print(Text(f"    {_line(item)}", style="dim"), soft_wrap=True)
        if (more := len(finding.items) - SHOWN_ITEMS) > 0:
            console.print(Text(f"    and {more:,} more", style="dim"))
    numbers = {kind: sum(finding.severity == kind for finding in report.findings) for kind in STYLES}
    console.print(Text(", ".join(tell(number, kind, f"{kind}s") for kind, number in numbers.items()), style="bold"))


def _counts(report: CheckReport) -> Table:
    """Return pictures per class and part; of many classes the smallest in training."""
    order = list(range(len(report.classes)))
    title = "Pictures per class"
    if len(order) > SHOWN_CLASSES:
        order = sorted(order, key=lambda i: report.counts["train"][i])[:SHOWN_CLASSES]
        title += f", the {SHOWN_CLASSES} smallest of {len(report.classes):,}"
    table = Table("class", title=title, show_footer=True)
    table.columns[0].footer = f"all {len(report.classes):,} classes"
    for part, counts in report.counts.items():
        table.add_column(part, footer=f"{sum(counts):,}", justify="right")
    for i in order:
        table.add_row(Text(_plain(report.classes[i])), *(f"{counts[i]:,}" for counts in report.counts.values()))
    return table


def _line(item: Item) -> str:
    names = ", ".join(item.names[:SHOWN_NAMES])
    if (more := len(item.names) - SHOWN_NAMES) > 0:
        names += f" and {more:,} more"
    return _plain(f"{names} ({item.detail})" if item.detail else names)


def _plain(text: str) -> str:
    """Return text that any terminal can print: a file's name need not be Unicode, nor free of control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
