"""Engines made ready: a model on its way from eager torch to what computes it faster."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrail.engines.convert import import_openvino, signal_stack_kept, to_onnx, to_openvino, to_program

Engine = Callable[[Tensor], Tensor]
"""Normalised views [b c h w] -> logits [b classes]; any number of views, from any thread."""
WARM_UP = 3
"""Passes before a CUDA graph is recorded, as torch's documentation asks for: libraries choose kernels in them."""


def start(name: str, model: nn.Module, views: Tensor) -> Engine:
    """Return an engine that answers as the model does.

    Args:
        name: `compiled`, `onnx` or `openvino`; see `require_engine`.
        model: In evaluation mode.
        views: A batch as there will be more; the last one may be smaller.

    Raises:
        Exception: Of many kinds, when the engine cannot take the model.
    """
    return {"compiled": _compiled, "onnx": _onnx, "openvino": _openvino}[name](model, views)


def eager(model: nn.Module) -> Engine:
    """Return the model itself as an engine; in evaluation mode when it is asked."""

    @torch.inference_mode()
    def answer(views: Tensor) -> Tensor:
        return model(views)

    return answer


def _compiled(model: nn.Module, views: Tensor) -> Engine:
    # One size: for batches of any size the code is slower, and for each further size it would be compiled anew.
    module, size = torch.compile(model, dynamic=False), len(views)

    @torch.inference_mode()
    def answer(views: Tensor) -> Tensor:
        parts = []
        for part in views.split(size):
            full = F.pad(part, (0, 0, 0, 0, 0, 0, 0, size - len(part)))
            parts.append(run(full)[: len(part)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    run: Engine = module
    answer(views)
    if views.device.type == "cuda":
        run = _recorded(module, views)
    return answer


@torch.inference_mode()
def _recorded(module: Engine, views: Tensor) -> Engine:
    """Return a module's work as one CUDA graph: of one picture, launching its kernels takes longer than they do."""
    given, graph, lock = views.clone(), torch.cuda.CUDAGraph(), Lock()
    side = torch.cuda.Stream(views.device)
    side.wait_stream(torch.cuda.current_stream(views.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            module(given)
    torch.cuda.current_stream(views.device).wait_stream(side)
    with torch.cuda.graph(graph):
        found = module(given)

    def answer(views: Tensor) -> Tensor:
        with lock:
            given.copy_(views)
            graph.replay()
            return found.clone()  # the next batch overwrites it

    return answer


def _onnx(model: nn.Module, views: Tensor) -> Engine:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are of constants that could not be folded
    runtime.disable_telemetry_events()  # on Windows it has some
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are mapped
        path = Path(folder) / "model.onnx"
        to_onnx(to_program(model, views), path)
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answer(views: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": views.contiguous().numpy()})[0])

    return answer


def _openvino(model: nn.Module, views: Tensor) -> Engine:
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # on CPUs that multiply bf16 it would take that
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "ENABLE_HYPER_THREADING": True,  # torch counts logical processors too
        "ENABLE_CPU_PINNING": False,  # pictures are decoded on the same cores
    }
    converted = to_openvino(to_program(model, views))
    with signal_stack_kept():
        compiled = import_openvino().Core().compile_model(converted, "CPU", options)
    request, lock = compiled.create_infer_request(), Lock()

    def answer(views: Tensor) -> Tensor:
        with lock:
            request.infer([views.contiguous().numpy()], share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(0).data.copy())  # the next batch overwrites it

    return answer
