"""How long training waits for a checkpoint: ViT-S/16 with AdamW and averaged weights, 353 MB.

    python benchmarks/checkpoints.py [--turns 7]

`--tiny` rehearses it with a small model and writes no result.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from machine import table, write_result
from torch.utils._pytree import tree_leaves

from vitrail.config.model import model_config
from vitrail.config.vit import ViTConfig
from vitrail.models import build
from vitrail.training.folder import RunFolder
from vitrail.training.saving import Saver


def state_of(name: str) -> dict[str, object]:
    """Return what a run of this model keeps: weights, their average, and two moments."""
    tiny = ViTConfig(image_size=(32, 32), patch_size=(8, 8), width=64, depth=2, heads=2, mlp_dim=128)
    weights = build(tiny if name == "tiny" else model_config(name)).state_dict()
    copies = ("models", "average", "exp_avg", "exp_avg_sq")
    return {"learner": {each: {key: tensor.clone() for key, tensor in weights.items()} for each in copies}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args(arguments)
    state = state_of("tiny" if asked.tiny else "vit-s16")
    held = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
    waits: list[float] = []
    writes: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        saver = Saver(RunFolder(Path(place), writes=True), together=False)
        for step in range(2 if asked.tiny else asked.turns):
            began = time.perf_counter()
            saver.save({"step": step, **state}, keep=2)
            waits.append(time.perf_counter() - began)
            saver.wait()
            writes.append(time.perf_counter() - began)
        saver.close()
    rows = [
        ["until training goes on", f"{1000 * median(waits):.0f}"],
        [
            "until the checkpoint stands: copied, written, synced to the disk, and hashed",
            f"{1000 * median(writes):.0f}",
        ],
    ]
    page = f"A state of {held / 1e6:,.0f} MB, median of {len(waits)}.\n\n" + table(["", "milliseconds"], rows)
    print(page)
    if not asked.tiny:
        write_result("checkpoints", "python benchmarks/checkpoints.py", page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
