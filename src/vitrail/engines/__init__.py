"""Engines: what computes a model's answers. They differ in speed alone.

`eager` is the model itself; `compiled` is what torch.compile makes of it, on a GPU replayed as one CUDA graph; `onnx`
runs it in ONNX Runtime and `openvino` in OpenVINO, both on the CPU. `auto` is the fastest of them on this machine.

For work of known length, as `vitrail predict` has it, `choice.engine_for` begins at once with eager and goes over to a
faster engine where looking for it pays. For a server, `choice.ready_engine` measures before the first request. Both
give an `Engine`: a function of normalised views [b c h w] that returns logits [b classes] in fp32, for any b, without
gradients. Any thread may call it, several at once.

No engine is taken unless it has given the model's own answers to real pictures: logits that differ by no more than
rounding in fp32. Nothing computes in bf16, though some engines would by default on processors that have it.
"""

from importlib.util import find_spec
from typing import Literal, get_args

from vitrail.errors import UserError, did_you_mean

EngineName = Literal["auto", "eager", "compiled", "onnx", "openvino"]

PACKAGES: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
"""What the engines need that compute on the CPU only and are no part of torch; the extras have the same names."""


def missing_packages(name: str) -> list[str]:
    """Return the packages that an engine needs and that are not installed. Nothing is imported."""
    return [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]


def require_engine(name: str) -> None:
    """Raise UserError when there is no such engine, or a package that it needs is not installed."""
    if name not in get_args(EngineName):
        raise UserError(
            f"engine must be one of {', '.join(get_args(EngineName))}, not {name!r}."
            f"{did_you_mean(name, get_args(EngineName))}"
        )
    if lacking := missing_packages(name):
        raise UserError(f"engine {name} needs {', '.join(lacking)}, not installed: pip install 'vitrail[{name}]'.")
