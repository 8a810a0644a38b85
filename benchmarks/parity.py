"""How far our logits lie from those of the official code, on its own small random models.

python benchmarks/parity.py [FOLDER]

FOLDER holds NAME.weights.npz with NAME.io.npz, and V-MoE checkpoints (.index) with .io.npz; default: tests/golden.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import write_result

from vitrail import load_model

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
# What arrays cannot tell. A case of V-MoE is the rest of an answer's name: k2_C0.5_bpr is capacity 0.5 with priority.
GROUP = {"group_size": 34}
CASES: dict[str, dict[str, Any]] = {
    "k1": {"experts_per_token": 1, "capacity_factor": 1.05, **GROUP},
    "k2_C1.05": {"capacity_factor": 1.05, **GROUP},
    "k2_C0.5": {"capacity_factor": 0.5, **GROUP},
    "k2_C0.5_bpr": {"capacity_factor": 0.5, "batch_priority": True, **GROUP},
    "k2_C0.5_bpr_idx": {"capacity_factor": 0.5, "batch_priority": True, **GROUP},
    "k2_C8": {"capacity_factor": 8.0, **GROUP},
}
SAID: dict[str, dict[str, Any]] = {"cvt_gelu": {"gelu": "erf"}}


def distance(weights: Path, images: np.ndarray, official: np.ndarray, **keywords: Any) -> float:
    """Largest difference over the larger of 1 and the largest official value."""
    expected = torch.from_numpy(official)
    pictures = torch.from_numpy(images)
    if pictures.shape[1] > 4:
        pictures = pictures.permute(0, 3, 1, 2)
    with torch.inference_mode():
        ours = load_model(weights, **keywords)(pictures)
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1))


def rows_of(weights: Path, name: str) -> list[str]:
    answers = dict(np.load(weights.with_name(f"{name}.io.npz"), allow_pickle=False))
    images = next(answers[key] for key in ("images_nhwc", "images_nchw", "x") if key in answers)
    keywords = dict(SAID.get(name, {}))
    if name == "cvt_quick_gelu" and weights.parent == GOLDEN:
        keywords["heads"] = (1, 2, 4)  # narrower than 64 a head, to be small
    rows = []
    for key, official in answers.items():
        case = key.removeprefix("logits_")
        if key == "logits":
            rows.append((name, distance(weights, images, official, **keywords), keywords))
        elif case in CASES:
            rows.append((name, distance(weights, images, official, **CASES[case]), CASES[case]))
        elif key == "resized_logits":
            resized = answers["resized_images_nhwc"]
            said = {"image_size": resized.shape[1:3]}
            rows.append((name, distance(weights, resized, official, **said), said))
    told = [", ".join(f"{key}={value}" for key, value in said.items()) or "nothing" for _, _, said in rows]
    return [f"| `{name}` | {what} | {far:.1e} |" for (name, far, _), what in zip(rows, told, strict=True)]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    rows = []
    for weights in sorted(folder.glob("*.weights.npz")):
        rows += rows_of(weights, weights.name.removesuffix(".weights.npz"))
    for index in sorted(folder.rglob("*.index")):
        rows += rows_of(index, index.stem)
    body = "Relative difference of logits. The goal is 1e-5.\n\n| official model | said | difference |\n|---|---|---|\n"
    body += "\n".join(rows)
    print(body)
    print(write_result("parity", " ".join(["python benchmarks/parity.py", *sys.argv[1:]]), body))


if __name__ == "__main__":
    main()
