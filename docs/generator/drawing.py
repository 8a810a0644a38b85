"""Boxes, arrows and words as SVG that reads on light and on dark, alone or put into a page."""

from collections.abc import Sequence
from html import escape
from typing import Literal

Kind = Literal["input", "attention", "mlp", "head", "plain"]
Anchor = Literal["start", "middle", "end"]

# Colours of the site's own theme where the drawing stands in it, else those of the reader's system.
STYLE = """
.drawing { --ink: #24292f; --paper: #fff; font: 14px system-ui, sans-serif; max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) { .drawing { --ink: #d6dae0; --paper: #1e2129 } }
.drawing text { fill: var(--md-default-fg-color, var(--ink)); stroke: none }
.drawing .small { font-size: 12px; opacity: .8 }
.drawing .line { stroke: var(--md-default-fg-color, var(--ink)); fill: none; stroke-width: 1.3 }
.drawing .tip { fill: var(--md-default-fg-color, var(--ink)); stroke: none }
.drawing .box { stroke-width: 1.5; fill-opacity: .16; rx: 5px }
.drawing .input { fill: #e0a100; stroke: #c48c00 } .drawing .attention { fill: #0b66ae; stroke: #3a8bc9 }
.drawing .mlp { fill: #00916e; stroke: #00916e } .drawing .head { fill: #d0561a; stroke: #d0561a }
.drawing .plain { fill: #808890; stroke: #808890 }
.drawing .sum { fill: var(--md-default-bg-color, var(--paper)) }
"""


class Drawing:
    """A figure, put together from its parts; coordinates in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._size, self._title, self._parts = (width, height), title, list[str]()

    def box(self, x: float, y: float, width: float, height: float, text: str, kind: Kind) -> None:
        """Draw a box with words in its middle, which may have several lines."""
        self._parts.append(f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>')
        lines = text.split("\n")
        for number, line in enumerate(lines):
            self.words(x + width / 2, y + height / 2 + 5 + 17 * (number - (len(lines) - 1) / 2), line)

    def words(self, x: float, y: float, text: str, *, small: bool = False, anchor: Anchor = "middle") -> None:
        """Write a line."""
        kind = ' class="small"' if small else ""
        self._parts.append(f'<text{kind} x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], tip: bool = True) -> None:
        """Draw a line through points, with a tip at its end."""
        path = " L".join(f"{x} {y}" for x, y in points)
        self._parts.append(f'<path class="line" d="M{path}"/>')
        if tip:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            corners = [(x, y), (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)]
            self._parts.append(f'<polygon class="tip" points="{" ".join(f"{a},{b}" for a, b in corners)}"/>')

    def sum(self, x: float, y: float) -> None:
        """Draw a plus in a circle: a residual connection ends here."""
        self._parts.append(
            f'<circle class="line sum" cx="{x}" cy="{y}" r="9"/><path class="line" d="M{x - 5} {y}h10M{x} {y - 5}v10"/>'
        )

    def tower(
        self, x: float, width: float, top: float, rows: Sequence[tuple[str, Kind, str]], *, height: float
    ) -> None:
        """Draw boxes below one another, each with a note at its right and an arrow to the next."""
        for number, (text, kind, note) in enumerate(rows):
            y = top + number * (height + 18)
            self.box(x, y, width, height, text, kind)
            if note:
                self.words(x + width + 12, y + height / 2 + 4, note, small=True, anchor="start")
            if number:
                self.arrow((x + width / 2, y - 18), (x + width / 2, y))

    def svg(self) -> str:
        """Return the file."""
        width, height = self._size
        return (
            f'<svg class="drawing" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">\n<title>{escape(self._title)}</title>\n<style>{STYLE}</style>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )
