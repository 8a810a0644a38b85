"""The verb that shows what a model looks at: `explain`."""

from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import Positional

from vitrail.cli.console import Console, Model, print_json
from vitrail.errors import UserError


def explain(
    model: Model,
    images: Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="PICTURE ...")]],
    *,
    out: Path,
    method: tuple[str, ...] = (),
    label: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None,
    json: bool = False,
) -> int:
    """Show what a model looks at: attention, relevance, Grad-CAM, occlusion, experts, and what it has learned.

    Args:
        model: Model folder or weight file.
        images: Pictures, folders, globs; 64 pictures at most.
        out: Folder for the page explain.html, the arrays explain.npz, and a PNG of every figure.
        method: Any of relevance, gradcam, occlusion, rollout, experts, attention, positions, filters, distance;
            default: what the model's family shows best.
        label: The class to explain, by name or number; default: each picture's likeliest.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import load_model
    from vitrail.explaining import explain as look
    from vitrail.parallel import pick_device
    from vitrail.report.explanation import write_explanation

    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another place for the folder.")  # before the work, not after it
    explanation = look(load_model(model).to(pick_device()), images, methods=method, label=label)
    written = write_explanation(explanation, out, title=f"What {Path(model).name} looks at")
    if json:
        print_json(written)
    else:
        table = Table(Column("picture", overflow="fold"), "explained", "share")
        for picture in written["pictures"]:
            named, share = picture["explained"], picture["probability"]
            cells = ("-", "-") if named is None else (Text(named), f"{share:.1%}")
            table.add_row(Text(picture["name"]), *cells)
        console = Console()
        console.print(table)
        for row in written["broken"]:
            console.print(f"skipped {row['name']}: {row['reason']}", markup=False)
        Console(soft_wrap=True).print(f"{written['page']}: {', '.join(written['methods'])}.", markup=False)
    return 3 if written["broken"] else 0
