"""Answers: our engines beside timm's and transformers' models, `predict` beside its bare engine, `auto` beside eager.

.venv-peers/bin/python benchmarks/inference.py [PART ...] [--turns 5] [--tiny]

All in fp32, on all threads that torch takes. Contestants take turns, so that what slows the machine falls on all alike;
what is compiled or converted is made before. Parts can be measured one by one: what is known lies in
`results/inference.json`, from which the page is written.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from machine import describe as machine
from machine import read_parts, write_parts, write_result
from PIL import Image
from torch import Tensor, nn

import vitrail
from vitrail.benchmark.limits import photo, square_product
from vitrail.benchmark.timing import Work, take_turns
from vitrail.benchmark.works import timm_maker
from vitrail.config.model import model_config
from vitrail.config.vit import ViTConfig
from vitrail.data.arrays import ArraySource
from vitrail.data.base import Source
from vitrail.data.folders import FileSource
from vitrail.data.view import evaluation_view
from vitrail.engines import missing_packages
from vitrail.engines.choice import Auto, disagreement, preparation_seconds, share_to_spend
from vitrail.engines.start import Engine, start
from vitrail.evaluation import ask
from vitrail.models import ImageModel, build
from vitrail.zoo import describe

CPU = torch.device("cpu")
NOISE, PIPELINE, LATENCY = 0.03, 0.9, 0.05
"""Shares: within which "not slower" is reached; of the bare engine's rate; by which one picture may take longer."""
MODELS = ("vit-s16", "efficientnet-b0")
KINDS = {
    "arrays": "pictures of 224 x 224 in memory, decoded",
    "photos": "JPEG files of about 500 x 375",
    "small": "PNG files of 32 x 32",
}
"""What `predict` gets. The first is what the engine alone gets, too: what is lost there, `predict` loses itself."""
PARTS = (
    *(f"{model}/{size}" for model in MODELS for size in (1, 8)),
    *(f"predict/{kind}/{engine}" for kind in KINDS for engine in ("eager", "openvino")),
    *(f"auto/{model}" for model in MODELS),
)
ENGINES = ("compiled", "onnx", "openvino")
SHAPES = ((375, 500), (500, 375), (333, 500), (500, 500))
Row = dict[str, Any]


def ready(model: nn.Module, images: Tensor, names: Sequence[str] = ENGINES) -> Iterator[tuple[str, Engine]]:
    """Yield eager and a model's other engines by name, those that are installed and take it."""
    yield "eager", model
    for name in names:
        if name == "eager" or missing_packages(name):
            continue
        try:
            yield name, start(name, model, images)
        except Exception as problem:
            print(f"{name}: {str(problem).splitlines()[0]}", file=sys.stderr)


def answers(engine: Engine, images: Tensor) -> Work:
    @torch.inference_mode()
    def work() -> int:
        engine(images)
        return len(images)

    return work


def fresh(name: str, *, tiny: bool) -> ImageModel:
    """Return a model with fresh weights and a head that tells pictures apart; a ViT of one block for a rehearsal."""
    torch.manual_seed(0)
    config = model_config(name)
    model = build(replace(config, depth=1) if tiny and isinstance(config, ViTConfig) else config).eval()
    assert model.head is not None
    nn.init.normal_(model.head.weight, std=0.1)
    return model


def peers(name: str) -> dict[str, Callable[[], nn.Module]]:
    """Return what makes the models of timm and transformers, where they are installed and have such a model."""
    if not find_spec("timm") or not find_spec("transformers"):
        return {}
    threads = torch.get_num_threads()
    from training_step import of_transformers  # it also defines what timm's import of torchvision needs

    torch.set_num_threads(threads)  # which the tests' set-up, imported there, lowers to 1
    makers = {"timm": timm_maker(name), "transformers": of_transformers(name)}
    return {peer: make for peer, make in makers.items() if make is not None}


def engines(name: str, size: int, turns: int, seconds: float, *, tiny: bool) -> Row:
    """Measure all contestants on batches of one size, and the machine's matrix product."""
    model = fresh(name, tiny=tiny)
    images = torch.randn(size, model.config.channels, *model.config.image_size)
    works: dict[str, Work] = {"matrix product": square_product(CPU, 2048, torch.float32)}
    works |= {f"vitrail, {label}": answers(engine, images) for label, engine in ready(model, images)}
    for peer, make in peers(name).items():
        theirs = make().eval()
        found = ready(theirs, images) if peer == "timm" else [("eager", theirs)]
        works |= {f"{peer}, {label}": answers(engine, images) for label, engine in found}
        if name != "vit-s16":
            last: Any = make().eval()
            last.to(memory_format=torch.channels_last)
            pictures = images.contiguous(memory_format=torch.channels_last)
            works[f"{peer}, eager, channels last"] = answers(last, pictures)
    timings = take_turns(works, turns=turns, seconds=seconds)
    limit = timings.pop("matrix product").rate
    operations = 2e9 * describe(name)["gmacs"]["x".join(map(str, dict.fromkeys(model.config.image_size)))]
    best = max(timings, key=lambda label: timings[label].rate)
    return {
        "batch": size,
        "limit": limit,
        "rows": {
            label: {
                "rate": timing.rate,
                "spread": timing.spread,
                "share": operations * timing.rate / limit,
                "times_best": timing.times(timings[best]),
            }
            for label, timing in timings.items()
        },
    }


def pictures(kind: str, count: int, folder: Path, model: ImageModel) -> Source:
    """Return pictures of a kind, in memory or in files of a folder."""
    rng, targets = np.random.default_rng(0), np.zeros(count, np.int64)
    labels = [str(i) for i in range(model.config.num_classes)]
    if kind == "arrays":
        return ArraySource(rng.integers(0, 256, (count, *model.config.image_size, 3), np.uint8), targets, labels)
    paths = [folder / f"{number:04}.{'jpg' if kind == 'photos' else 'png'}" for number in range(count)]
    files = [photo(*shape) for shape in SHAPES]
    for number, path in enumerate(paths):
        if kind == "photos":
            path.write_bytes(files[number % len(files)])
        else:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return FileSource(paths, targets, labels)


def pipeline(kind: str, label: str, turns: int, count: int, *, tiny: bool) -> Row:
    """Measure `predict`, from pictures to labels, beside the engine alone on views that were made before.

    Args:
        kind: Of the pictures.
        label: Of the engine.
        turns: Of each.
        count: Pictures in a turn of `predict`; that of the engine has half as many.
        tiny: Rehearse.
    """
    model = fresh("vit-s16", tiny=tiny)
    with tempfile.TemporaryDirectory() as folder:
        source = pictures(kind, count, Path(folder), model)
        views = torch.stack([evaluation_view(source.load(i), model.preprocessing) for i in range(count // 2)]).split(8)
        engine = dict(ready(model, views[0], [label]))[label]

        def bare() -> int:
            return sum(answers(engine, batch)() for batch in views)

        def whole() -> int:
            if label == "eager":
                return len(vitrail.predict(model, source, engine="eager"))
            return len(ask(model, source, answer=engine).rows)  # `predict` would make the engine ready every time

        timings = take_turns({"predict": whole, "bare": bare}, turns=turns, seconds=0.0)
    share = timings["predict"].times(timings["bare"])
    return {"pictures": count * turns, "predict": timings["predict"].rate, "bare": timings["bare"].rate, "share": share}


@torch.inference_mode()
def automatic(model: ImageModel, turns: int, seconds: float, *, tiny: bool) -> Row:
    """Measure what `auto` takes for much work, what finding it takes, and from how many pictures on it looks for it."""
    known = tempfile.TemporaryDirectory()
    os.environ["XDG_CACHE_HOME"] = known.name  # what was found on this machine before shall not count
    images = torch.randn(2 if tiny else 8, model.config.channels, *model.config.image_size)
    model(images)
    began = perf_counter()
    model(images)
    pace = (perf_counter() - began) / len(images)
    rows: Row = {}
    for label in ("openvino", "onnx", "compiled"):
        if missing_packages(label):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # as it is the first time
            began = perf_counter()
            engine = start(label, model, images)
        taken, expected = perf_counter() - began, preparation_seconds(model, label)
        complaint = disagreement(engine(images[:5]), model(images[:5]))
        pays = round((expected + pace * len(images)) / share_to_spend(model) / pace)
        rows[label] = {"taken": taken, "expected": expected, "from": pays, "complaint": complaint}
        del engine
    many = round(rows["compiled"]["from"] * 0.9)  # too few to compile for, or it would be done twice
    auto, few = Auto(model, many), Auto(model, 64)
    for _ in range(40):
        auto(images)
    for _ in range(2):
        few(images)
    works = {"eager": model, "many": auto, "few": few}
    timings = take_turns({k: answers(engine, images) for k, engine in works.items()}, turns=turns, seconds=seconds)
    ratios = {k: timings[k].times(timings["eager"]) for k in ("many", "few")}
    return {"rows": rows, "pictures": {"many": many, "few": 64}, **ratios}


def page(known: dict[str, Row]) -> str:
    """Return what is known, each ratio beside its target."""
    lines = [str(__doc__).split("\n\n")[2], ""]
    for part, row in known.items():
        kind, _, what = part.partition("/")
        tell = {"predict": told_pipeline, "auto": told_choice}.get(kind, told_engines)
        lines += [f"## {part}", "", f"{row['machine']}", "", *tell(kind, what, row), ""]
    return "\n".join(lines)


def told_engines(name: str, size: str, row: Row) -> list[str]:
    rows = sorted(row["rows"].items(), key=lambda item: -item[1]["rate"])
    ours = max(r["times_best"] for label, r in rows if label.startswith("vitrail"))
    bound = 1 - LATENCY if size == "1" else 1 - NOISE
    return [
        f"{name}, {size} at a time. Our fastest engine beside the fastest of all, {rows[0][0]}: "
        f"**{ours:.2f}** (at least {bound:.2f}: {reached(ours, bound)}). "
        f"Matrix products: {row['limit'] / 1e9:.0f} GFLOP/s.",
        "",
        "| contestant | pictures/s | ms a batch | spread | times the fastest | of matrix products |",
        "|---|---|---|---|---|---|",
        *(
            f"| {label} | {r['rate']:.2f} | {1e3 * row['batch'] / r['rate']:.1f} | {r['spread']:.0%} | "
            f"{r['times_best']:.2f} | {r['share']:.0%} |"
            for label, r in rows
        ),
    ]


def told_pipeline(_: str, what: str, row: Row) -> list[str]:
    kind, _, engine = what.partition("/")
    goal = f"at least {PIPELINE}: {reached(row['share'], PIPELINE)}"
    if kind != "arrays":
        goal = "no target: decoding is in it, on the same cores"
    return [
        f"{row['pictures']:,} {KINDS[kind]}, ViT-S/16, {engine}: `predict` {row['predict']:.2f} pictures/s, the engine "
        f"alone on views of them that were made before {row['bare']:.2f}: **{row['share']:.3f}** of it ({goal})."
    ]


def told_choice(_: str, name: str, row: Row) -> list[str]:
    return [
        *(
            f"- `auto` for {pictures:,} pictures, once it has chosen: **{row[key]:.2f}** times eager (at least "
            f"{1 - NOISE:.2f}: {reached(row[key], 1 - NOISE)})"
            for key, pictures in row["pictures"].items()
        ),
        "",
        "| engine | ready after, s | estimated, s | tried from, pictures | answers |",
        "|---|---|---|---|---|",
        *(
            f"| {label} | {r['taken']:.1f} | {r['expected']:.1f} | {r['from']:,} | {r['complaint'] or 'equal'} |"
            for label, r in row["rows"].items()
        ),
    ]


def reached(value: float, bound: float) -> str:
    return "reached" if value >= bound else "missed"


def measure(part: str, turns: int, *, tiny: bool) -> Row:
    kind, _, what = part.partition("/")
    seconds = 0.0 if tiny else 1.0
    if kind == "predict":
        kind, _, engine = what.partition("/")
        return pipeline(kind, engine, 2 if tiny else 10, 4 if tiny else 200, tiny=tiny)
    if kind == "auto":
        return automatic(fresh(what, tiny=tiny), turns, seconds, tiny=tiny)
    return engines(kind, int(what), turns, seconds, tiny=tiny)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="rehearse a part of each kind; nothing is kept")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    known: dict[str, Row] = read_parts("inference", tiny=asked.tiny)
    for part in (
        ("vit-s16/1", "predict/arrays/eager", "predict/small/eager", "auto/vit-s16") if asked.tiny else asked.parts
    ):
        known[part] = {"machine": machine(), **measure(part, 2 if asked.tiny else asked.turns, tiny=asked.tiny)}
        print(page({part: known[part]}), flush=True)
        if not asked.tiny:
            known = {key: known[key] for key in PARTS if key in known}
            write_parts("inference", known)
            write_result("inference", ".venv-peers/bin/python benchmarks/inference.py", page(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
