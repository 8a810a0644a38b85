"""Charts as inline SVG. Colours are classes that the page's style sheet fills, so charts follow dark mode and print.

Elements are built as a tree and serialised once, so every name in them is escaped. All sizes are in CSS pixels; the
page scales a chart down to its column.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, Int

from vitrail.metrics import Bin, Kept

WIDTH, HEIGHT = 360, 220  # of one chart: as wide as a phone, three side by side on a desktop
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 30, 38  # margins around the plot
CHARACTER = 6.1  # mean width of a character of the tick labels
Element = ElementTree.Element
Number = int | float


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one set of dots."""

    name: str
    points: Sequence[tuple[Number, Number]]
    dots: bool = False


@dataclass(frozen=True)
class Row:
    """A measured value with its interval, one line of `interval_chart`."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


class Scale:
    """From values to pixels along one axis, with round ticks."""

    def __init__(
        self,
        low: Number,
        high: Number,
        start: Number,
        end: Number,
        *,
        ticks: int = 5,
        percent: bool = False,
        whole: bool = False,
    ) -> None:
        if high - low < 1e-12 * max(1.0, abs(low)):  # one value: give it room
            low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
        self.low, self.high, self._start, self._end, self._percent = low, high, start, end, percent
        self._step = _round_step((high - low) / ticks)
        if whole:
            self._step = max(self._step, 1.0)
        first, last = math.ceil(low / self._step - 1e-9), math.floor(high / self._step + 1e-9)
        self.ticks = [i * self._step for i in range(first, last + 1)]

    def at(self, value: Number) -> float:
        """Return the pixel of a value."""
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def text(self, value: Number) -> str:
        """Return a tick's label with as many digits as the step needs."""
        shown, step = (100 * value, 100 * self._step) if self._percent else (value, self._step)
        if 0 < step < 1e-4:
            return f"{shown:.0e}".replace("e-0", "e-") if value else "0"
        digits = next(d for d in range(6) if d == 5 or abs(step * 10**d - round(step * 10**d)) < 1e-6)
        return f"{shown + 0.0:,.{digits}f}" + "%" * self._percent


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    percent: bool = False,
    categories: bool = False,
    from_zero: bool = False,
) -> str:
    """Return lines over a common axis.

    Args:
        series: Lines or dots of finite values; each has its own colour, and a name in the legend of several.
        label: What the chart shows, for those who cannot see it.
        x_label: Name of the horizontal axis.
        percent: Whether values are shares, shown as percentages.
        from_zero: Let the vertical axis begin at 0.
        categories: Whether horizontal values are numbers of things, from 1; otherwise they are amounts, from 0.
    """
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    padding = max(0.06 * (max(ys) - min(ys)), 0.02 * percent)
    low, high = 0.0 if from_zero else min(ys) - padding, max(ys) + padding
    if min(ys) >= 0:
        low = max(low, 0.0)
    if percent:
        high = min(high, 1.0)
    start, end = (0.5, max(xs) + 0.5) if categories else (0.0, max(xs))
    x_scale = Scale(start, end, LEFT, WIDTH - RIGHT, ticks=12 if categories else 4, whole=True)
    y_scale = Scale(low, high, HEIGHT - BOTTOM, TOP, percent=percent)
    svg = _svg(WIDTH, HEIGHT, label)
    _axes(svg, x_scale, y_scale, x_label)
    for number, s in enumerate(series, start=1):
        pixels = [(x_scale.at(x), y_scale.at(y)) for x, y in _thinned(s.points)]
        if not s.dots:
            _polyline(svg, pixels, f"line s{number}")
        for x, y in pixels if s.dots or len(pixels) <= 24 else []:
            _add(svg, "circle", class_=f"dot s{number}", cx=x, cy=y, r=2.6)
    if len(series) > 1:
        _legend(svg, [(s.name, f"s{number}", s.dots) for number, s in enumerate(series, start=1)])
    return _text(svg)


def reliability_chart(before: Sequence[Bin], after: Sequence[Bin]) -> str:
    """Return accuracy over confidence, as bars before and as a line after temperature scaling.

    Bars are paler and dots smaller where pictures are few.
    """
    height = HEIGHT + 40
    svg = _svg(WIDTH, height, "Accuracy over confidence, before and after temperature scaling.")
    bottom = height - BOTTOM
    x_scale = Scale(0.0, 1.0, LEFT, WIDTH - RIGHT, percent=True)
    y_scale = Scale(0.0, 1.0, bottom, TOP, percent=True)
    _axes(svg, x_scale, y_scale, "confidence of the answer")
    most = max(b.count for b in (*before, *after))
    for b in before:
        if b.accuracy is not None:
            left, top = x_scale.at(b.low) + 1, y_scale.at(b.accuracy)
            width, depth = x_scale.at(b.high) - left - 1, 0.25 + 0.6 * (b.count / most) ** 0.5
            bar = _add(svg, "rect", class_="bar s1", x=left, y=top, width=width, height=max(bottom - top, 0.5))
            bar.set("fill-opacity", f"{depth:.2f}")
            _add(bar, "title", f"{b.low:.0%} to {b.high:.0%}: {b.count:,} pictures, {b.accuracy:.1%} right")
    _add(svg, "line", class_="ideal", x1=x_scale.at(0), y1=y_scale.at(0), x2=x_scale.at(1), y2=y_scale.at(1))
    points = [
        (x_scale.at(b.confidence), y_scale.at(b.accuracy), 1.5 + 3.5 * (b.count / most) ** 0.5)
        for b in after
        if b.confidence is not None and b.accuracy is not None
    ]
    _polyline(svg, [(x, y) for x, y, _ in points], "line s2")
    for x, y, radius in points:
        _add(svg, "circle", class_="dot s2", cx=x, cy=y, r=radius)
    _legend(svg, [("as trained", "s1", True), ("with temperature", "s2", False)])
    return _text(svg)


def risk_chart(curve: Sequence[Kept], marks: Sequence[tuple[str, Kept]]) -> str:
    """Return the error among the answers that are kept over the share that is kept, with some points marked by name."""
    svg = _svg(WIDTH, HEIGHT, "Error among the answers that are kept, over the share that is kept.")
    highest = max(max(kept.risk for kept in curve), 0.01)
    x_scale = Scale(0.0, 1.0, LEFT, WIDTH - RIGHT, percent=True)
    y_scale = Scale(0.0, 1.08 * highest, HEIGHT - BOTTOM, TOP, percent=True)
    _axes(svg, x_scale, y_scale, "answers kept, the surest first")
    points = _thinned([(kept.coverage, kept.risk) for kept in curve])
    _polyline(svg, [(x_scale.at(coverage), y_scale.at(risk)) for coverage, risk in points], "line s1")
    for name, kept in marks:
        x, y = x_scale.at(kept.coverage), y_scale.at(kept.risk)
        _add(svg, "circle", class_="dot s2", cx=x, cy=y, r=4)
        right = x < LEFT + 28  # room is on that side only
        _add(svg, "text", name, class_=f"tick {'start' if right else 'end'}", x=x + 6 if right else x - 6, y=y - 7)
    return _text(svg)


def bar_chart(values: Sequence[tuple[str, int]], *, label: str) -> str:
    """Return one thin bar per name and count, in the order given; a name shows when the bar is pointed at."""
    height = 120
    svg = _svg(WIDTH, height, label)
    y_scale = Scale(0, max(count for _, count in values), height - 8, 10, ticks=3)
    for tick in y_scale.ticks:
        _add(svg, "line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y_scale.at(tick), y2=y_scale.at(tick))
        _add(svg, "text", y_scale.text(tick), class_="tick end", x=LEFT - 6, y=y_scale.at(tick) + 4)
    step = (WIDTH - RIGHT - LEFT) / len(values)
    for i, (name, count) in enumerate(values):
        top = y_scale.at(count)
        x, width = LEFT + i * step + 0.1 * step, 0.8 * step
        bar = _add(svg, "rect", class_="bar s1", x=x, y=top, width=width, height=max(height - 8 - top, 0.5))
        _add(bar, "title", f"{name}: {count:,}")
    return _text(svg)


def interval_chart(rows: Sequence[Row], *, label: str) -> str:
    """Return shares as dots with their intervals on a common axis that is cut to where they lie."""
    line = 46
    height = line * len(rows) + BOTTOM
    svg = _svg(WIDTH, height, label)
    ends = [end for r in rows for end in (r.value, r.low, r.high) if end is not None]
    margin = max(0.15 * (max(ends) - min(ends)), 0.005)
    scale = Scale(max(min(ends) - margin, 0.0), min(max(ends) + margin, 1.0), 10.0, WIDTH - 10, ticks=4, percent=True)
    for tick in scale.ticks:
        x = scale.at(tick)
        _add(svg, "line", class_="grid", x1=x, x2=x, y1=20, y2=height - BOTTOM + 4)
        anchor = "" if 24 < x < WIDTH - 24 else " end" if x > WIDTH / 2 else " start"
        _add(svg, "text", scale.text(tick), class_=f"tick{anchor or ' middle'}", x=x, y=height - BOTTOM + 20)
    for number, row in enumerate(rows, start=1):
        y = line * (number - 1) + 32
        _add(svg, "text", _cut(row.name, 42), class_="name start", x=0, y=y - 16)
        _add(svg, "text", f"{row.value:.1%}", class_="name strong end", x=WIDTH, y=y - 16)
        if row.low is not None and row.high is not None:
            _add(svg, "line", class_=f"whisker s{number}", x1=scale.at(row.low), x2=scale.at(row.high), y1=y, y2=y)
        _add(svg, "circle", class_=f"dot s{number}", cx=scale.at(row.value), cy=y, r=5)
    return _text(svg)


def heat_map(counts: Int[np.ndarray, "rows columns"], names: Sequence[str], *, label: str) -> str:
    """Return a confusion matrix: a row per true class, a column per answer.

    The deeper the colour, the larger the share of the row. Right answers and mistakes have colours of their own, and
    nothing is drawn where nothing is.
    """
    n = len(names)
    cell = max(14, min(30, 400 // n))
    font = min(12, cell - 2)
    longest = max((len(_cut(name, 18)) for name in names), default=0)
    margin = 14 + round(longest * CHARACTER * font / 12)
    foot = 14 + round(0.72 * longest * CHARACTER * font / 12)
    svg = _svg(margin + n * cell + 2, n * cell + foot + 2, label)
    _add(svg, "rect", class_="frame", x=margin, y=1, width=n * cell, height=n * cell)
    shares: Float[np.ndarray, "rows columns"] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for i, name in enumerate(names):
        middle = (i + 0.5) * cell
        text = _add(svg, "text", _cut(name, 18), class_="tick end", x=margin - 6, y=middle + 4, font_size=font)
        _add(text, "title", name)
        x, y = margin + middle + 4, n * cell + 14
        turned = f"rotate(-45 {x:.1f} {y:.1f})"
        _add(svg, "text", _cut(name, 18), class_="tick end", x=x, y=y, font_size=font, transform=turned)
    for row, column in np.argwhere(counts).tolist():
        depth = float(shares[row, column]) ** 0.5  # the root lets rare mistakes show
        kind, x, y = "right" if row == column else "wrong", margin + column * cell, 1 + row * cell
        group = _add(svg, "g", class_=kind)
        _add(group, "rect", class_="cell", x=x, y=y, width=cell, height=cell, fill_opacity=max(depth, 0.06))
        if cell >= 20:
            on = " on" if depth > 0.62 else ""
            at = {"x": x + cell / 2, "y": y + cell / 2 + 4, "font_size": min(font, 11)}
            _add(group, "text", str(counts[row, column]), class_=f"count{on}", **at)
        share = f"{shares[row, column]:.1%}"
        _add(group, "title", f"{names[row]} called {names[column]}: {counts[row, column]:,} ({share})")
    return _text(svg)


def _svg(width: Number, height: Number, label: str) -> Element:
    svg = Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": label, "class": "chart"})
    svg.set("style", f"--natural:{width:g}px")
    return svg


def _add(parent: Element, tag: str, text: str | None = None, **attributes: str | Number) -> Element:
    """Append an element; `class_` stands for class, other underscores for hyphens."""
    plain = {
        key.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{round(float(value), 2):g}"
        for key, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, plain)
    element.text = text
    return element


def _polyline(svg: Element, pixels: Sequence[tuple[Number, Number]], kind: str) -> None:
    _add(svg, "polyline", class_=kind, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in pixels))


def _text(svg: Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")


def _axes(svg: Element, x_scale: Scale, y_scale: Scale, x_label: str) -> None:
    left, right = x_scale.at(x_scale.low), x_scale.at(x_scale.high)
    bottom = y_scale.at(y_scale.low)
    for tick in y_scale.ticks:
        y = y_scale.at(tick)
        _add(svg, "line", class_="grid", x1=left, x2=right, y1=y, y2=y)
        _add(svg, "text", y_scale.text(tick), class_="tick end", x=left - 6, y=y + 4)
    _add(svg, "line", class_="axis", x1=left, x2=right, y1=bottom, y2=bottom)
    for tick in x_scale.ticks:
        text, x = x_scale.text(tick), x_scale.at(tick)
        overhang = x + len(text) * CHARACTER / 2 > right + RIGHT
        _add(
            svg,
            "text",
            text,
            class_="tick end" if overhang else "tick middle",
            x=right if overhang else x,
            y=bottom + 15,
        )
    _add(svg, "text", x_label, class_="tick middle", x=(left + right) / 2, y=bottom + 32)


def _legend(svg: Element, entries: Sequence[tuple[str, str, bool]]) -> None:
    x = float(LEFT)
    for name, colour, dots in entries:
        if dots:
            _add(svg, "circle", class_=f"dot {colour}", cx=x + 8, cy=11, r=4)
        else:
            _add(svg, "line", class_=f"line {colour}", x1=x, x2=x + 16, y1=11, y2=11)
        _add(svg, "text", name, class_="tick start", x=x + 21, y=15)
        x += 21 + CHARACTER * len(name) + 16


def _thinned(points: Sequence[tuple[Number, Number]], most: int = 240) -> list[tuple[Number, Number]]:
    """Return means of neighbours where there are more points than pixels to show them."""
    if len(points) <= most:
        return list(points)
    groups = np.array_split(np.asarray(points, np.float64), most)
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups]


def _round_step(step: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _cut(name: str, longest: int) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
