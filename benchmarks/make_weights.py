"""Bring the model of a finished run into the package: in half precision, with its settings and what it reaches.

    python benchmarks/make_weights.py RUN/last src/vitrail/weights/vitrail-mini
    python -m vitrail.zoo

The second command counts its parameters for `vitrail models`. Metrics are those of the rounded weights on the run's
test pictures. Paths of the run, which mean nothing elsewhere, are left out of the settings.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from vitrail.checkpoints import load_folder, save_model
from vitrail.config.codec import from_json, to_json
from vitrail.config.run import RunConfig
from vitrail.evaluation import predict_logits
from vitrail.training.setup import open_run_data


def main(source: Path, target: Path) -> None:
    made = json.loads((source / "config.json").read_text(encoding="utf-8"))
    run = json.loads((source.parent / "config.json").read_text(encoding="utf-8"))
    config = from_json(RunConfig, run["resolved"], "config.json")
    split, pictures = open_run_data(config).for_evaluation()
    recipe = to_json(replace(config, data=None, out=None, init=None, input=replace(config.input, val=None)))
    model = load_folder(source)
    save_model(model, target, recipe=recipe, data=made["data"], half=True)
    metrics = predict_logits(load_folder(target), pictures).metrics()
    save_model(model, target, metrics={split: metrics}, recipe=recipe, data=made["data"], half=True)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {size:,} bytes, {split} top-1 {metrics['top1']:.2%}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
