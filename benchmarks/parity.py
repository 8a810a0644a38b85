"""How far our logits lie from those of the official code, on its own small random models.

python benchmarks/parity.py
"""

from pathlib import Path

import numpy as np
import torch
from machine import write_result

from vitrail import load_model

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def distance(ours: torch.Tensor, official: np.ndarray) -> float:
    """Largest difference over the larger of 1 and the largest official value."""
    expected = torch.from_numpy(official)
    return float((ours - expected).abs().max() / expected.abs().max().clamp(min=1))


def main() -> None:
    rows = []
    for weights in sorted(GOLDEN.glob("*.weights.npz")):
        name = weights.name.removesuffix(".weights.npz")
        answers = np.load(GOLDEN / f"{name}.io.npz", allow_pickle=False)
        with torch.inference_mode():
            images = torch.from_numpy(answers["images_nhwc"]).permute(0, 3, 1, 2)
            first = distance(load_model(weights)(images), answers["logits"])
            second = None
            if "resized_logits" in answers:
                images = torch.from_numpy(answers["resized_images_nhwc"]).permute(0, 3, 1, 2)
                model = load_model(weights, image_size=images.shape[-1])
                second = distance(model(images), answers["resized_logits"])
        rows.append(f"| `{name}` | {first:.1e} | {'-' if second is None else f'{second:.1e}'} |")
    body = "Relative difference of logits; loaded with no name given. The goal is 1e-5.\n\n"
    body += "| official model | at its size | at another size |\n|---|---|---|\n" + "\n".join(rows)
    print(body)
    print(write_result("parity", "python benchmarks/parity.py", body))


if __name__ == "__main__":
    main()
