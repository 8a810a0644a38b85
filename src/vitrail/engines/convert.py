"""Models as programs that need no Python: what other engines run, and what files for them hold."""

import ctypes
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

OPSET = 20
"""Of ONNX: the newest that torch 2.13 writes and ONNX Runtime and OpenVINO both read."""


def to_program(module: nn.Module, images: Tensor, *, dynamic: Iterable[int] = (0,)) -> ExportedProgram:
    """Return what a module computes of a batch, for any number of pictures.

    Args:
        module: In evaluation mode; its weights are shared, not copied.
        images: One picture or more that it takes.
        dynamic: Axes that may have any size, the batch's among them; the others have that of these pictures.

    Raises:
        Exception: Of many kinds, when the module's course depends on more than shapes, or on the number of pictures.
    """
    # Two pictures: torch takes a side of one for a constant. A tensor of inference mode cannot be traced, its copy can.
    with torch.inference_mode(False), torch.no_grad(), _quietly():
        example = images[:1].clone().expand(2, *images.shape[1:]).contiguous()
        return torch.export.export(module, (example,), dynamic_shapes=(dict.fromkeys(dynamic, Dim.DYNAMIC),))


def to_onnx(
    program: ExportedProgram, path: Path, *, metadata: Mapping[str, str] | None = None, external_data: bool = True
) -> None:
    """Write a program as ONNX, from `images` to `logits`.

    Args:
        program: One input, one output.
        path: The file.
        metadata: Texts to go with it.
        external_data: Write the weights into `PATH.data` beside it. They must be where there are 2 GB of them.

    Raises:
        Exception: Of many kinds, when ONNX has no word for something that the program does.
    """
    with torch.inference_mode(False), torch.no_grad(), _quietly():
        found: Any = torch.onnx.export(
            program, input_names=["images"], output_names=["logits"], opset_version=OPSET, verbose=False
        )
        found.model.metadata_props.update(metadata or {})
        found.save(path, external_data=external_data)


def to_openvino(program: ExportedProgram) -> Any:
    """Return a program as `openvino.Model`.

    Raises:
        Exception: Of many kinds, when OpenVINO has no word for something that the program does.
    """
    with torch.inference_mode(False), torch.no_grad(), _quietly():
        return import_openvino().convert_model(program)


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which asks the network at the import and at every conversion."""
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    return import_module("openvino")


class _Stack(ctypes.Structure):
    """`stack_t` of signal.h."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Put back, in the end, the stack on which this thread handles signals; around whatever makes an OpenVINO `Core`.

    Each brings the thread a stack of its own and unmaps it when it goes, in whatever thread that is (2026.4): the next
    signal, as that of Ctrl-C, would find no stack and end the process.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None:
        yield
        return
    before = _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


@contextmanager
def _quietly() -> Iterator[None]:
    """Let converters keep what they tell of themselves: it is nothing that a user could mend."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
