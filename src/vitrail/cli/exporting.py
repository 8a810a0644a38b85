"""The verb that writes a model for others to run: `export`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Column, Table
from tyro.conf import Positional

from vitrail.cli.console import Console, Model, print_json

PARITY_FAILED = 4
"""Exit code: the file does not answer as the model does, or has no advantage, and was not kept."""


def export(
    model: Model,
    dest: Positional[Annotated[Path, tyro.conf.arg(metavar="DEST")]],
    *,
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32",
    data: str = "clothing",
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Write a model with its preprocessing for others to run, and prove that the file answers as the model does.

    Beside DEST come DEST.py, a script that classifies pictures with it without Vitrail, and DEST.json, the report.

    Args:
        model: Model folder or weight file.
        dest: FILE.onnx, FILE.pt2 (torch.export) or FILE.xml (OpenVINO).
        precision: fp32; fp16 (.pt2, .onnx, .xml), bf16 (.pt2); int8 (.onnx, .xml), kept only where it is faster here.
        data: Real pictures to compare answers by, and for int8 to calibrate by: a folder, or the embedded photos.
        overwrite: Replace files that stand there.
        json: Print one JSON document on stdout.
    """
    from vitrail.checkpoints import load_model
    from vitrail.exporting import NotExported
    from vitrail.exporting import export as write

    try:
        found = write(load_model(model), dest, precision=precision, data=data, overwrite=overwrite)
    except NotExported as refusal:
        found = refusal.export
    failed = PARITY_FAILED if found.complaints else 0
    if json:
        print_json(found.to_json())
        return failed
    right = [Column(name, justify="right") for name in ("number", "largest difference", "same class first")]
    table = Table("pictures", *right)
    for kind in found.parity.kinds:
        table.add_row(kind.name, str(kind.pictures), f"{kind.difference:.1e}", str(kind.agreeing))
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print("Differences are relative to the largest logit.")
    if found.speedup is not None:
        console.print(f"{found.speedup:.2f} times as fast as fp32 on this machine.")
    for complaint in found.complaints:
        console.print(f"Not exported: {complaint}.", markup=False)
    if not found.complaints:
        told = f"{dest}: {found.format}, {found.precision}, {found.size / 1e6:.1f} MB"
        console.print(f"{told}. Try: python {dest}.py PICTURE", markup=False)
    return failed
