"""Exported files beside the model: every family in every format, and what 8 bits bring.

    python benchmarks/export_parity.py [--photos FOLDER] [--int8 MODEL ...] [--tiny]

A small member of each family, all its weights random and at work, is exported to torch.export, ONNX and OpenVINO, and
asked about 64 pictures, real ones and odd ones made of them: by the script that is written beside the file. Then models
with trained weights are exported in 8 bits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from machine import write_result
from torch import nn

import vitrail
from vitrail.config.model import ModelConfig
from vitrail.data import EMBEDDED, read_parts
from vitrail.data.view import evaluation_view
from vitrail.exporting import FORMATS, Export, NotExported, Precision
from vitrail.exporting.parity import TOLERANCE
from vitrail.models import ImageModel, build

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import TINY

SAMPLES = 16


@torch.no_grad()
def at_work(config: ModelConfig, data: str) -> ImageModel:
    """Return a model with random weights whose answers differ from picture to picture, no class before the others."""
    torch.manual_seed(0)
    model = build(config)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    _, photos = read_parts(data, labelled=False).for_evaluation()
    step = max(len(photos) // SAMPLES, 1)
    views = torch.stack([evaluation_view(photos.load(i), model.preprocessing) for i in range(0, len(photos), step)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.training = 1.0, True  # one batch sets the running statistics
    model.features(views)
    features = model.eval().features(views)
    assert model.head is not None
    nn.init.normal_(model.head.weight)
    model.head.weight /= features.std(dim=0).clamp(min=1e-6)
    model.head.bias.copy_(-model.head.weight @ features.mean(dim=0))
    return model


def exported(model: ImageModel, suffix: str, precision: Precision, data: str) -> Export:
    """Return what came of an export, kept or not."""
    with TemporaryDirectory() as folder:
        try:
            return vitrail.export(model, Path(folder) / f"model{suffix}", precision=precision, data=data)
        except NotExported as refusal:
            return refusal.export


def families(names: Sequence[str], data: str) -> list[str]:
    """Return a table of every family in every format."""
    heads = " | ".join(kind.name for kind in FORMATS.values())
    lines = [f"| family | {heads} |", "|---|" + "---:|" * len(FORMATS)]
    pictures, reached = 0, True
    for name in names:
        model, cells = at_work(TINY[name], data), list[str]()
        for suffix in FORMATS:
            found = exported(model, suffix, "fp32", data)
            pictures = found.parity.pictures
            reached &= not found.complaints
            cells.append(f"{found.parity.difference:.1e}, {found.parity.agreement:.1%}")
            print(name, suffix, cells[-1], *found.complaints, file=sys.stderr)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    told = f"{pictures} pictures each (the last three in one batch): largest difference of a logit relative to the"
    target = f"Target: at most {TOLERANCE['fp32']:.0e}, and 100 %: {'reached' if reached else 'not reached'}."
    return [f"{told} largest logit, and for how many the same class comes first.", "", *lines, "", target]


def eight_bits(names: Sequence[str], data: str) -> list[str]:
    """Return a table of models in 8 bits, beside themselves in 32."""
    head = "| model | format | times fp32 | same class first, as they are | all pictures | MB | kept |"
    lines = [head, "|---|---|---:|---:|---:|---:|---|"]
    for name in names:
        model = vitrail.load_model(name)
        for suffix in (".onnx", ".xml"):
            found = exported(model, suffix, "int8", data)
            plain = found.parity.kinds[0]
            lines.append(
                f"| {name} | {FORMATS[suffix].name} | {found.speedup:.2f} | {plain.agreeing / plain.pictures:.1%} | "
                f"{found.parity.agreement:.1%} | {found.size / 1e6:.1f} | {'no' if found.complaints else 'yes'} |"
            )
            print(lines[-1], file=sys.stderr)
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write `results/export.md`; a rehearsal only prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", default=EMBEDDED, help="a folder of pictures; default: the embedded photos")
    parser.add_argument("--int8", nargs="*", default=["vitrail-mini"], metavar="MODEL")
    parser.add_argument("--tiny", action="store_true", help="one family, no 8 bits, nothing written")
    options = parser.parse_args(arguments)
    body = ["## fp32", "", *families(["vit"] if options.tiny else list(TINY), options.photos)]
    if not options.tiny:
        told = "ONNX Runtime's static quantisation, batches of 8; kept where it is faster and 98 % of the pictures as"
        body += ["", "## int8", "", f"{told} they are keep their class.", ""]
        body += eight_bits(options.int8, options.photos)
        shown = f"--photos PHOTOS --int8 {' '.join(options.int8)}"
        write_result("export", f"python benchmarks/export_parity.py {shown}", "\n".join(body))
    print("\n".join(body))


if __name__ == "__main__":
    main()
