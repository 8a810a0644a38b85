"""`export`: write a file, try it on real pictures by the script beside it, and only then put both in their place."""

import json
import runpy
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from vitrail.benchmark.timing import Work, take_turns
from vitrail.checkpoints.storage import replace_file
from vitrail.data import EMBEDDED, Picture
from vitrail.engines.choice import GAIN
from vitrail.engines.convert import OPSET, signal_stack_kept, to_program
from vitrail.errors import UserError
from vitrail.exporting.classifier import Classifier
from vitrail.exporting.formats import COMPUTED, Format, Precision, format_of, texts_of, write_int8, write_program
from vitrail.exporting.int8 import CALIBRATION_PICTURES
from vitrail.exporting.parity import Answer, Parity, compare
from vitrail.exporting.pictures import calibration_pictures, parity_pictures
from vitrail.exporting.scripts import script_for, script_name
from vitrail.models import ImageModel

TIMED_PICTURES = 8
"""In a batch, where 8 bits are timed beside 32."""


@dataclass(frozen=True)
class Export:
    """What was exported, and how its answers compare with the model's."""

    file: Path
    format: str
    precision: Precision
    size: int
    """Bytes of the file, and of that with its weights where there is one."""
    parity: Parity
    speedup: float | None
    """How many times as fast as in fp32 it is on this machine; measured for int8."""
    complaints: tuple[str, ...]
    """Why the files were not put in their place; empty when they were."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "file": self.file.name,
            "format": self.format,
            "precision": self.precision,
            "size": self.size,
            "parity": self.parity.to_json(),
            "times_fp32": self.speedup,
            "complaints": list(self.complaints),
        }


class NotExported(UserError):
    """The file was written, but does not answer as the model does, or has no advantage. It is not kept."""

    def __init__(self, export: Export) -> None:
        super().__init__(f"{export.file} is not written: {'; '.join(export.complaints)}.")
        self.export = export


def export(
    model: ImageModel,
    dest: str | Path,
    *,
    precision: Precision = "fp32",
    data: str | Path = EMBEDDED,
    overwrite: bool = False,
) -> Export:
    """Write a model with its evaluation view as a file that others run, and prove that it answers as the model does.

    The file takes pictures as they come, uint8 [pictures, rows, columns, channels], of any size, and gives logits. It
    holds the labels and the model card. Beside it come `DEST.py`, a script that classifies pictures with it without
    Vitrail, and `DEST.json`, the report of the comparison. Nothing appears unless the comparison succeeds.

    Args:
        model: A trained model.
        dest: The file; its suffix is one of `FORMATS`.
        precision: fp32; fp16 or bf16, half the size and for machines that compute in them; int8.
        data: Pictures, as `train` takes them, to compare by, and for int8 to set the scales by.
        overwrite: Replace what stands there.

    Raises:
        UserError: When the suffix or precision is unknown, a package is missing, something stands there already, or
            the model cannot be written in that format.
        NotExported: A UserError with the report: when the file answers otherwise, when the model answers all pictures
            alike, so that agreement would say nothing, or when int8 is not faster than fp32 on this machine.
    """
    dest = Path(dest)
    kind = format_of(dest, precision)
    if model.head is None:
        raise UserError("the model has no head, so it has no answers to export; create it with num_classes.")
    if not overwrite and (there := [path for path in _places(dest, kind) if path.exists()]):
        raise UserError(f"{', '.join(map(str, there))} exists already; choose another name, or add --overwrite.")
    if model.training or next(model.parameters()).device.type != "cpu":
        model = deepcopy(model).cpu().eval()
    dest.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".vitrail-export-", dir=dest.parent, ignore_cleanup_errors=True) as folder:
        staged = Path(folder) / "file" / dest.name
        staged.parent.mkdir()
        found = _made_and_compared(model, staged, dest, kind, precision, data)
        if found.complaints:
            raise NotExported(found)
        report = json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n"
        staged.with_name(f"{dest.name}.json").write_text(report, encoding="utf-8")
        dest.unlink(missing_ok=True)  # where it stands, all that belongs to it does
        for place in _places(dest, kind):
            if (new := staged.with_name(place.name)).exists():
                _put(new, place)
            else:
                place.unlink(missing_ok=True)
    return found


def _made_and_compared(
    model: ImageModel, staged: Path, dest: Path, kind: Format, precision: Precision, data: str | Path
) -> Export:
    """Write file and script to where they can be tried, and try them."""
    channels = model.preprocessing.channels
    odd = staged.parent.parent / "pictures"
    odd.mkdir()
    samples = parity_pictures(data, channels, odd)
    calibration = calibration_pictures(data, channels, CALIBRATION_PICTURES) if precision == "int8" else []
    try:
        single = _write(model, staged, precision, calibration)
    except UserError:
        raise
    except Exception as problem:  # converters raise whatever they come across
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(f"{type(model).__name__} cannot be written as {kind.name} in {precision}: {first}") from problem
    script = _run_script(staged)
    parity = compare(model, samples, precision, pixels=script["pixels"], answer=script["logits"])
    complaints, speedup = list(parity.complaints), None
    if single is not None:
        speedup = _speedup(script["logits"], _run_script(single)["logits"], samples[0].pixels)
        if speedup < GAIN:
            complaints.append(
                f"int8 is {speedup:.2f} times as fast as fp32 on this machine, so it does not pay; choose --precision "
                "fp32, or export where it will run"
            )
    size = sum(path.stat().st_size for path in staged.parent.iterdir() if path.suffix != ".py")
    name = f"{kind.name}, opset {OPSET}" if dest.suffix == ".onnx" else kind.name
    return Export(dest, name, precision, size, parity, speedup, tuple(complaints))


def _write(model: ImageModel, path: Path, precision: Precision, calibration: list[Picture]) -> Path | None:
    """Write a file and its script; return the same file in fp32 where the precision is int8."""
    texts = texts_of(model, precision)
    script = script_for(path.name, channels=model.preprocessing.channels, multi_label=model.multi_label)
    path.with_name(script_name(path.name)).write_text(script, encoding="utf-8")
    # OpenVINO's devices compute in what they like best: 16 bits are a matter of storage there.
    dtype = torch.float32 if path.suffix == ".xml" else COMPUTED.get(precision, torch.float32)
    body = model if dtype == torch.float32 else deepcopy(model).to(dtype)
    rows, columns = model.preprocessing.image_size
    example = torch.zeros(1, rows + 3, columns + 5, model.preprocessing.channels, dtype=torch.uint8)
    program = to_program(Classifier(body, dtype).eval(), example, dynamic=(0, 1, 2))
    if precision != "int8":
        write_program(program, path, texts, half=precision == "fp16")
        return None
    write_int8(program, path, texts, calibration)
    single = path.parent.parent / "fp32" / path.name
    single.parent.mkdir()
    write_program(program, single, texts)
    single.with_name(script_name(path.name)).write_text(script, encoding="utf-8")
    return single


def _run_script(file: Path) -> Mapping[str, Any]:
    """Return what the script beside a file defines: `pixels` and `logits`."""
    with signal_stack_kept():
        return runpy.run_path(str(file.with_name(script_name(file.name))))


def _speedup(rounded: Answer, single: Answer, picture: Picture) -> float:
    """Return how many times as fast as the second one the first one answers."""
    images = np.repeat(picture[None], TIMED_PICTURES, axis=0)

    def work(answer: Answer) -> Work:
        return lambda: len(answer(images))

    timings = take_turns({"int8": work(rounded), "fp32": work(single)}, turns=5, seconds=0.3)
    return timings["int8"].times(timings["fp32"])


def _places(dest: Path, kind: Format) -> list[Path]:
    """Return all files that an export may write, the one that needs the others last."""
    companion = kind.companion.format(name=dest.name, stem=dest.stem)
    names = [*([companion] if companion else []), script_name(dest.name), f"{dest.name}.json", dest.name]
    return [dest.with_name(name) for name in names]


def _put(new: Path, place: Path) -> None:
    with open(new, "rb") as source:
        replace_file(place, lambda file: shutil.copyfileobj(source, file, 1 << 24), size=new.stat().st_size)
