"""What a GPU holds in each layout, beside what it has: stacked bars as an SVG file that stands for itself."""

from xml.etree import ElementTree

from vitrail.planner.gpus import GIB
from vitrail.planner.planning import Choice, Plan
from vitrail.planner.words import PREDICTED, title
from vitrail.report.charts import Number, Scale

WIDTH, LEFT, TOP, LINE, BAR = 880, 16, 100, 46, 18
COLOURS = {
    "weights": "#0b66ae", "averaged weights": "#56a5dd", "optimizer": "#00775a", "gradient": "#4ecba4",
    "half-precision copies": "#8a6fc4", "activations": "#d0561a", "working room": "#e0a100",
    "gathered, sent": "#7b8794",
}  # fmt: skip
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #56606c; } .name { font-size: 13px; fill: #1a1f26; }
.page { fill: #fff; } .grid { stroke: #e8ebef; } .limit { stroke: #b0003a; stroke-width: 2; } .red { fill: #b0003a; }
@media (prefers-color-scheme: dark) { text { fill: #a2acb8; } .name { fill: #e7eaee; } .page { fill: #181c22; }
.grid { stroke: #272d35; } .limit { stroke: #ff7a9c; } .red { fill: #ff7a9c; } }
"""


def picture(plan: Plan) -> str:
    """Return the SVG: a bar for each choice, those that fit first, and a line where the GPU's memory ends."""
    choices = [*plan.fitting, *plan.others]
    height = TOP + LINE * len(choices) + 30
    most = max(plan.room, *(choice.total for choice in choices)) / GIB
    scale = Scale(0.0, 1.04 * most, LEFT, WIDTH - LEFT, ticks=6)
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}", "role": "img"}
    svg = ElementTree.Element("svg", {**attributes, "width": str(WIDTH), "height": str(height)})
    ElementTree.SubElement(svg, "style").text = STYLE
    _add(svg, "rect", class_="page", width=WIDTH, height=height)
    _add(svg, "text", title(plan), class_="name", x=LEFT, y=24)
    _add(svg, "text", f"What a GPU holds at most. {PREDICTED}.", x=LEFT, y=42)
    _legend(svg, [part for part in COLOURS if any(choice.memory.get(part) for choice in choices)])
    bottom = TOP + LINE * len(choices)
    for tick in scale.ticks:
        x = scale.at(tick)
        _add(svg, "line", class_="grid", x1=x, x2=x, y1=TOP - 6, y2=bottom)
        _add(svg, "text", f"{scale.text(tick)} GiB" if tick else "0", x=x, y=bottom + 16, text_anchor="middle")
    for number, choice in enumerate(choices):
        _bar(svg, scale, choice, TOP + LINE * number)
    end = scale.at(plan.room / GIB)
    _add(svg, "line", class_="limit", x1=end, x2=end, y1=TOP - 6, y2=bottom)
    _add(svg, "text", f"{plan.room / GIB:.0f} GiB for a run", class_="red", x=end - 5, y=TOP - 8, text_anchor="end")
    return ElementTree.tostring(svg, encoding="unicode")


def _bar(svg: ElementTree.Element, scale: Scale, choice: Choice, top: Number) -> None:
    told = f"{choice.micro_batch:,} pictures at a time" if choice.fits else "does not fit"
    name = f"{choice.layout}, {choice.settings}: {choice.total / GIB:.1f} GiB, {told}"
    _add(svg, "text", name, class_="name", x=LEFT, y=top + 14)
    held = 0.0
    for part, size in choice.memory.items():
        start, end = scale.at(held / GIB), scale.at((held + size) / GIB)
        bar = _add(svg, "rect", x=start, y=top + 20, width=end - start, height=BAR, fill=COLOURS[part])
        ElementTree.SubElement(bar, "title").text = f"{part}: {size / GIB:.2f} GiB"
        held += size


def _legend(svg: ElementTree.Element, parts: list[str]) -> None:
    x = LEFT
    for part in parts:
        _add(svg, "rect", x=x, y=56, width=10, height=10, fill=COLOURS[part])
        _add(svg, "text", part, x=x + 14, y=65)
        x += 26 + round(6.9 * len(part))


def _add(
    parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: str | Number
) -> ElementTree.Element:
    """Append an element; `class_` stands for class, other underscores for hyphens."""
    plain = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
        for name, value in attributes.items()
    }
    element = ElementTree.SubElement(parent, tag, plain)
    element.text = text
    return element
