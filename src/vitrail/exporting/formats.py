"""The files that a model can be exported to, and what is written into them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch.export import ExportedProgram

from vitrail import __version__
from vitrail.checkpoints.card import model_card
from vitrail.config.codec import to_json
from vitrail.data.base import Picture
from vitrail.engines import missing_packages
from vitrail.engines.convert import import_openvino, signal_stack_kept, to_onnx, to_openvino
from vitrail.errors import UserError
from vitrail.exporting.int8 import to_int8
from vitrail.models import ImageModel

Precision = Literal["fp32", "fp16", "bf16", "int8"]
COMPUTED = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""What a model computes in where the precision is not fp32; but OpenVINO's devices choose that themselves."""

ONE_FILE = 1_900_000_000
"""Bytes of weights that go into an ONNX file, which may have 2 GB; more lie in `FILE.data` beside it."""


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    name: str
    engine: str
    """Whose packages write and run it, as `engines.PACKAGES` names it."""
    precisions: tuple[Precision, ...]
    companion: str
    """Name of the file with the weights beside a file of this stem and name; empty when they are inside."""


FORMATS = {
    ".pt2": Format("torch.export", "eager", ("fp32", "fp16", "bf16"), ""),
    ".onnx": Format("ONNX", "onnx", ("fp32", "fp16", "int8"), "{name}.data"),
    ".xml": Format("OpenVINO IR", "openvino", ("fp32", "fp16", "int8"), "{stem}.bin"),
}
"""By suffix."""


def format_of(dest: Path, precision: str) -> Format:
    """Return the format of a file by its name, ready to be written.

    Raises:
        UserError: When there is none, it has no such precision, or a package is missing.
    """
    found = FORMATS.get(dest.suffix)
    if found is None:
        known = ", ".join(f"{suffix} ({kind.name})" for suffix, kind in FORMATS.items())
        raise UserError(f"{dest}: models are exported to {known}; choose one of these suffixes.")
    if precision not in get_args(Precision):
        raise UserError(f"--precision must be one of {', '.join(get_args(Precision))}, not {precision!r}.")
    if precision not in found.precisions:
        raise UserError(
            f"{found.name} is written in {', '.join(found.precisions)}, not in {precision}: choose one of them, or "
            f"{' or '.join(suffix for suffix, kind in FORMATS.items() if precision in kind.precisions)}."
        )
    for engine in (found.engine, *(["onnx"] if precision == "int8" else [])):
        if lacking := missing_packages(engine):
            reason = f"{dest.suffix} in {precision} needs {', '.join(lacking)}, not installed"
            raise UserError(f"{reason}: pip install 'vitrail[{engine}]'.")
    return found


def texts_of(model: ImageModel, precision: str) -> dict[str, str]:
    """Return what goes with the numbers into a file: labels, preprocessing and the model card."""
    facts = {
        "vitrail": __version__,
        "model": type(model).__name__,
        "precision": precision,
        "multi_label": model.multi_label,
        "input": "uint8 [pictures, rows, columns, channels]: pictures of one size, any size, upright",
        "output": "float32 [pictures, classes]: logits in the order of the labels",
        "preprocessing": to_json(model.preprocessing),
    }
    return {
        "labels": json.dumps(model.class_names, ensure_ascii=False),
        "facts": json.dumps(facts, ensure_ascii=False),
        "card": model_card(model),
    }


def write_program(program: ExportedProgram, path: Path, texts: Mapping[str, str], *, half: bool = False) -> None:
    """Write a program as its path's suffix says.

    Args:
        program: From `images` to logits.
        path: The file.
        texts: To go with it: see `texts_of`.
        half: Store the weights of OpenVINO IR in 16 bits; other formats store what the program has.

    Raises:
        Exception: Of many kinds, when the format has no word for something that the program does.
    """
    match path.suffix:
        case ".pt2":
            names = {"labels": "labels.json", "facts": "facts.json", "card": "README.md"}
            torch.export.save(program, path, extra_files={names[kind]: text for kind, text in texts.items()})
        case ".onnx":
            size = sum(weights.nbytes for weights in program.parameters())
            to_onnx(program, path, metadata=texts, external_data=size > ONE_FILE)
        case _:
            _save_openvino(to_openvino(program), path, texts, half=half)


def write_int8(program: ExportedProgram, path: Path, texts: Mapping[str, str], pictures: Sequence[Picture]) -> None:
    """Write a program in 8 bits, as ONNX or OpenVINO IR; scales are set by these pictures.

    Raises:
        UserError: When the weights are too large for one ONNX file.
        Exception: Of many kinds, when one of the converters has no word for something.
    """
    with TemporaryDirectory(dir=path.parent) as folder:
        single, rounded = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        write_program(program, single, {})
        if single.with_name(f"{single.name}.data").exists():
            raise UserError(f"models of more than {ONE_FILE / 1e9:.1f} GB are not written in int8; choose fp16.")
        to_int8(single, rounded, pictures)
        if path.suffix == ".xml":
            # Not `convert_model`, which rewrites the graph and loses on the way where numbers are to be rounded.
            with signal_stack_kept():
                _save_openvino(import_openvino().Core().read_model(rounded), path, texts)
            return
        import onnx

        model = onnx.load(rounded)
        onnx.helper.set_model_props(model, dict(texts))
        onnx.save(model, path)


def _save_openvino(model: Any, path: Path, texts: Mapping[str, str], *, half: bool = False) -> None:
    model.outputs[0].get_tensor().set_names({"logits"})
    for kind, text in texts.items():
        model.set_rt_info(text, ["vitrail", kind])
    import_openvino().save_model(model, path, compress_to_fp16=half)
