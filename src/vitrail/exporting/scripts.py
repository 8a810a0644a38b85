"""The script that is written beside an exported file: it classifies pictures without Vitrail, and says how to."""

from pathlib import Path
from string import Template

_SCRIPT = Template('''\
"""Classify pictures: python THIS_FILE PICTURE ... Needs $packages, numpy and pillow."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
$start


def pixels(path):
    """Return a picture upright, 16-bit grey as 8, white where transparent: uint8 [rows, columns, channels]."""
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):
        picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture, above = Image.new("RGB", picture.size, "white"), picture.convert("RGBA")
        picture.paste(above, mask=above)
    return $pixels


def logits(images):
    """Return float32 [b, classes] for b pictures of one size, any size: uint8 [b, rows, columns, channels]."""
    return $answer


if __name__ == "__main__":
    for path in sys.argv[1:]:
        answer = logits(pixels(path)[None])[0]
        shares = $shares
        best = [f"{labels[i]} {shares[i]:.1%}" for i in shares.argsort()[::-1][:5]]
        print(path, *best, sep="\\t")
''')

_START = {
    ".pt2": """\
import torch

texts = {"labels.json": ""}
model = torch.export.load(Path(__file__).with_name($file), extra_files=texts).module()
labels = json.loads(texts["labels.json"])""",
    ".onnx": """\
import onnxruntime

model = onnxruntime.InferenceSession(Path(__file__).with_name($file), providers=["CPUExecutionProvider"])
labels = json.loads(model.get_modelmeta().custom_metadata_map["labels"])""",
    ".xml": """\
sys.modules["openvino_telemetry"] = None  # it would ask the network
import openvino

model = openvino.Core().read_model(Path(__file__).with_name($file))
labels = json.loads(model.get_rt_info(["vitrail", "labels"]).value)
# On processors that multiply bf16, OpenVINO would round to that.
model = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})""",
}
_ANSWER = {
    ".pt2": "model(torch.from_numpy(images)).detach().numpy()",
    ".onnx": 'model.run(None, {"images": images})[0]',
    ".xml": "model([images])[0]",
}
_PACKAGES = {".pt2": "torch", ".onnx": "onnxruntime", ".xml": "openvino"}


def script_for(file: str, *, channels: int, multi_label: bool) -> str:
    """Return the text of the script that runs an exported file.

    Args:
        file: The file's name; its suffix says what runs it.
        channels: 3 for RGB, 1 for grey.
        multi_label: Whether the classes are independent of each other.
    """
    suffix = Path(file).suffix
    return _SCRIPT.substitute(
        packages=_PACKAGES[suffix],
        start=Template(_START[suffix]).substitute(file=repr(file)),
        answer=_ANSWER[suffix],
        pixels='np.array(picture.convert("L"))[:, :, None]' if channels == 1 else 'np.array(picture.convert("RGB"))',
        shares="1 / (1 + np.exp(-answer))" if multi_label else "np.exp(answer - np.logaddexp.reduce(answer))",
    )


def script_name(file: str) -> str:
    """Return the name of the script beside a file."""
    return f"{file}.py"
