"""How fast engines were found to be on this machine, from one run to the next: `engines.json` in the user's cache.

Speed is a matter of the architecture, not of its weights: a finding holds for all models of one configuration. It is
looked up by all that it depends on, so a change of any of that begins anew: configuration, pictures at a time and their
size, processor or GPU, threads, and versions of what computes. Findings grow old, for a machine may have been busy when
they were made. Nothing depends on the file: it may be missing, broken, or in a place that cannot be written to.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrail.cache import cache_folder
from vitrail.config.codec import to_json
from vitrail.config.model import ModelConfig

DAYS = 30
"""After which a finding is made anew."""
MOST = 200
"""Findings that are kept, the newest."""
PACKAGES = ("vitrail", "torch", "onnx", "onnxruntime", "onnxscript", "openvino")


class Finding(NamedTuple):
    """What was measured of an engine."""

    times: float
    """As many pictures a second as eager answers, and so many times."""
    seconds: float
    """It took to make the engine ready."""


def recall(key: str) -> dict[str, Finding]:
    """Return what is known of engines, by their names."""
    try:
        entry = _read()[key]
        return {name: Finding(*map(float, values)) for name, values in entry["engines"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def remember(key: str, found: Mapping[str, Finding]) -> None:
    """Keep what was found of engines, beside what is known of others."""
    if not found:
        return
    known = _read()
    known[key] = {"when": time.time(), "engines": {**recall(key), **found}}
    newest = sorted(known.items(), key=lambda item: -item[1]["when"])[:MOST]
    file = cache_file()
    if file is None:
        return
    part = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(newest), indent=1), encoding="utf-8")
        part.replace(file)  # whole or not at all, whoever writes beside us


def key_of(config: ModelConfig, shape: tuple[int, ...], device: torch.device, use: str) -> str:
    """Return what findings are looked up by.

    Args:
        config: Of the model.
        shape: Of the batch that was measured: b c h w.
        device: Where it was.
        use: What else sets one measurement apart from another.
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    facts = [to_json(config), shape, where, torch.get_num_threads(), use, {name: _version(name) for name in PACKAGES}]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cache_file() -> Path | None:
    """Return where findings are kept; None where there is no place."""
    folder = cache_folder()
    return folder and folder / "engines.json"


def _read() -> dict[str, Any]:
    """Return all findings that are not too old."""
    file = cache_file()
    if file is None:
        return {}
    try:
        known = json.loads(file.read_bytes())
        return {key: entry for key, entry in known.items() if time.time() - entry["when"] < DAYS * 86400}
    except (OSError, KeyError, TypeError, ValueError, AttributeError):
        return {}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
