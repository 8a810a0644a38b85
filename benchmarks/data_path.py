"""From files to batches: decoding, the loader, packs of small pictures, and how long training waits for data.

    python benchmarks/data_path.py decode PHOTOS
    python benchmarks/data_path.py loader PHOTOS
    python benchmarks/data_path.py pack CLOTHING
    python benchmarks/data_path.py wait PHOTOS
    python benchmarks/data_path.py --tiny

PHOTOS is a folder of JPEGs of their original size, CLOTHING one of class folders of small JPEGs. Photos of 12
megapixels are made of PHOTOS, enlarged. `--tiny` rehearses all parts on pictures of its own and writes no result.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from loaders import WORKERS, PillowFiles, best_of, epoch, normalise_bytes, usual_crop
from machine import write_result
from PIL import Image

from vitrail import train
from vitrail.benchmark.limits import photo
from vitrail.benchmark.timing import Timing, Work, take_turns
from vitrail.config.preprocessing import Interpolation, Preprocessing
from vitrail.config.run import AugmentConfig, InputConfig, LoopConfig, RunConfig
from vitrail.config.vit import ViTConfig
from vitrail.data import FileSource, Source, Subset, decode_crop, open_data, pack
from vitrail.data.augment import Augment
from vitrail.data.boxes import random_boxes
from vitrail.data.random import sample_keys
from vitrail.data.stream import Stream

FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
CORES = 2
Box = tuple[float, float, float, float]


def main(arguments: Sequence[str]) -> None:
    """Measure one part, print, and write the result."""
    tiny = "--tiny" in arguments
    torch.set_num_threads(1)  # what is per core runs on one; decoding threads come on top
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # where packs go
        if tiny:
            pack.LEAST = 4
            photos, clothing = _rehearsal(Path(folder))
            for part in PARTS:
                print(PARTS[part](clothing if part == "pack" else photos, 2, tiny=True))
            return
        part, pictures = arguments
        body = PARTS[part](Path(pictures), 7, tiny=False)
    print(body)
    print(write_result(f"data-path-{part}", f"python benchmarks/data_path.py {part} PICTURES", body))


def verdict(ratio: float, target: float) -> str:
    """Return a ratio beside its target."""
    return f"{ratio:.2f} (target {target:g}: {'reached' if ratio >= target else 'missed'})"


def decoding(photos: Path, turns: int, *, tiny: bool) -> str:
    """Return what `crops` says of photos as they are, and of large ones."""
    side, big = (32, (400, 300)) if tiny else (224, (4000, 3000))
    files = [path.read_bytes() for path in _colour_photos(photos)]
    return "\n\n".join(
        [
            crops(f"photos as they are, to {side} px", files, side, turns, 1.2),
            crops(f"12 megapixels, to {side} px", _enlarged(files[: 2 if tiny else 12], big), side, turns, 5.0),
        ]
    )


def crops(name: str, files: Sequence[bytes], side: int, turns: int, target: float) -> str:
    """Return the rates of decoding random crops on one core, and how close they are to a full decode and resize."""
    sizes = [Image.open(BytesIO(data)).size for data in files]
    widths, heights = (torch.tensor(values) for values in zip(*sizes, strict=True))
    boxes: list[Box] = []
    for number in range(4):
        keys = sample_keys(0, number, torch.arange(len(files)))
        boxes += map(tuple, random_boxes(keys, heights, widths, (0.08, 1.0), (3 / 4, 4 / 3)).tolist())
    rows = []
    for interpolation, filter in FILTERS.items():
        works = {
            "Pillow": _crops(files, boxes, partial(usual_crop, side=side, filter=filter)),
            "vitrail": _crops(files, boxes, partial(_ours, side=side, interpolation=interpolation)),
        }
        timings = take_turns(works, turns=turns, seconds=0.2)
        ratio = timings["vitrail"].times(timings["Pillow"])
        closeness = [
            psnr(_ours(data, box, side, interpolation), usual_crop(data, box, side, filter))
            for data, box in zip([*files] * 4, boxes, strict=True)
        ]
        rows.append(
            f"| {interpolation} | {_rate(timings['Pillow'])} | {_rate(timings['vitrail'])} | {verdict(ratio, target)} "
            f"| {min(closeness):.1f} / {median(closeness):.1f} |"
        )
    return (
        f"## Decode random crops, one core: {name}\n\n"
        f"{len(files)} colour JPEGs, median size {int(median(w for w, _ in sizes))} x "
        f"{int(median(h for _, h in sizes))}. PSNR against a full decode and resize by "
        f"Pillow, minimum and median of {len(boxes)} crops, target 35 dB.\n\n"
        "| filter | Pillow, crops/s | vitrail, crops/s | times Pillow | PSNR, dB |\n|---|---|---|---|---|\n"
    ) + "\n".join(rows)


def loading(photos: Path, turns: int, *, tiny: bool) -> str:
    """Return the rates of whole loaders: a folder of JPEGs to normalised batches, random crop and flip, two cores."""
    side, batch_size = (32, 8) if tiny else (224, 64)
    paths = _colour_photos(photos)
    paths = [*paths] * max(1, -(-16 * batch_size // len(paths)))
    rows, peers = [], {}
    for interpolation, filter in FILTERS.items():
        peers |= {
            f"{interpolation}, {workers} processes, normalised {'each' if each else 'together'}": epoch(
                PillowFiles(paths, side, filter, normalised=each), batch_size, workers, normalise_bytes
            )
            for workers in WORKERS[: 1 if tiny else None]
            for each in (False, True)
        }
        best, tried = best_of({name: work for name, work in peers.items() if name.startswith(interpolation)})
        ours = _ours_loading(paths, side, batch_size, interpolation)
        timings = take_turns({"peer": peers[best], "vitrail": ours}, turns=turns, seconds=0.1)
        ratio = timings["vitrail"].times(timings["peer"])
        rows.append(
            f"| {interpolation} | {_rate(timings['peer'])} ({best.split(', ', 1)[1]}) | {_rate(timings['vitrail'])} "
            f"| {verdict(ratio, 1.3)} |"
        )
        print("\n".join(f"{name}: {timing.rate:.0f}/s" for name, timing in tried.items()))
    return (
        f"## Loader: folder of JPEGs to normalised batches of {batch_size}, {CORES} cores\n\n"
        "Random resized crop and flip. torch's DataLoader with Pillow at the best number of processes and the better "
        f"of two ways to normalise; vitrail with {CORES} decoding threads. Pictures per second.\n\n"
        "| filter | DataLoader | vitrail | times DataLoader |\n|---|---|---|---|\n"
    ) + "\n".join(rows)


def packing(folder: Path, turns: int, *, tiny: bool) -> str:
    """Return what it brings to keep small pictures decoded in a file, and what making that costs."""
    side = 32 if tiny else 128
    packed, anew = (open_data(folder).train for _ in range(2))
    began = time.perf_counter()
    packed.pack(CORES)
    seconds = time.perf_counter() - began
    made = _files_of(packed)._pack
    if made is None:
        raise SystemExit(f"the pictures in {folder} are too few or too large to be packed")
    batch_size = min(64, len(packed))
    works = {
        name: _epoch_of(source, side, batch_size, "bicubic", AugmentConfig())
        for name, source in (("decoded anew", anew), ("packed", packed))
    }
    timings = take_turns(works, turns=turns, seconds=0.1)
    return (
        f"## Small pictures in a pack\n\n{len(packed):,} JPEGs to {side} px random crops, {CORES} decoding threads. "
        f"{len(made):,} of {len(_files_of(packed)):,} pictures are in the pack, {made.nbytes / 2**20:.0f} MiB, made in "
        f"{seconds:.1f} s. The batches are the same, bit for bit (`tests/test_pack.py`).\n\n"
        f"Decoded anew {_rate(timings['decoded anew'])} pictures/s, packed {_rate(timings['packed'])}: "
        f"{timings['packed'].times(timings['decoded anew']):.2f} times."
    )


def waiting(photos: Path, turns: int, *, tiny: bool) -> str:
    """Return the share of a training step that waits for data, as `timing.jsonl` of a real run has it."""
    size, width = ((32, 32), 32) if tiny else ((224, 224), 192)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as out:
        for label in ("one", "two"):  # photos lie without classes: any will do for timing
            (Path(folder) / label).mkdir()
        for number, path in enumerate(_colour_photos(photos)):
            (Path(folder) / ("one", "two")[number % 2] / path.name).symlink_to(path.resolve())
        config = RunConfig(
            data=folder,
            out=f"{out}/run",
            model=ViTConfig(image_size=size, width=width, depth=12, mlp_dim=4 * width, heads=width // 32),
            input=InputConfig(workers=CORES, val_fraction=0.1),
            loop=LoopConfig(batch_size=4 if tiny else 32, steps=2 + 2 * turns, log_every=2, eval_every=1000),
        )
        torch.set_num_threads(CORES)
        train(config)
        torch.set_num_threads(1)
        lines = [json.loads(line) for line in Path(out, "run", "timing.jsonl").read_text().splitlines()][1:]
    rate, share = (median(line[name] for line in lines) for name in ("pictures_per_second", "data_wait"))
    return (
        f"## Share of a training step that waits for data, {CORES} cores\n\n"
        f"A real run on PHOTOS, decoding while it trains: a ViT of width {width} at {size[0]} px trains on {rate:.1f} "
        f"pictures/s, and `data_wait` is {share:.2%} (median of {len(lines)} lines; the first is left out)."
    )


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB; 99 where pictures are equal."""
    error = float(np.mean((found.astype(np.float64) - wanted) ** 2))
    return min(99.0, 10 * np.log10(255**2 / error)) if error else 99.0


def _ours(data: bytes, box: Box, side: int, interpolation: Interpolation) -> np.ndarray:
    return decode_crop(data, 3, lambda *_: box, (side, side), interpolation)


def _crops(files: Sequence[bytes], boxes: Sequence[Box], crop: Callable[[bytes, Box], object]) -> Work:
    def work() -> int:
        for data, box in zip(files, boxes, strict=False):
            crop(data, box)
        return len(files)

    return work


def _ours_loading(paths: Sequence[Path], side: int, batch_size: int, interpolation: Interpolation) -> Work:
    source = FileSource(paths, np.zeros(len(paths), np.int64), ("photo",))
    return _epoch_of(source, side, batch_size, interpolation, AugmentConfig())


def _epoch_of(source: Source, side: int, batch_size: int, interpolation: Interpolation, config: AugmentConfig) -> Work:
    """Return an epoch from a fresh start to the end of its threads, as one of a DataLoader has them."""
    view = Preprocessing(image_size=(side, side), interpolation=interpolation)
    augment = Augment(config, view)

    def work() -> int:
        stream = Stream(source, preprocessing=view, augment=config, batch_size=batch_size, workers=CORES)
        done = 0
        for batches in islice(stream, len(source) // batch_size):
            for batch in batches:
                augment(batch, classes=len(source.classes))
                done += len(batch)
        stream.close()
        return done

    return work


def _files_of(source: Source) -> FileSource:
    source = source.source if isinstance(source, Subset) else source
    assert isinstance(source, FileSource)
    return source


def _rate(timing: Timing) -> str:
    return f"{timing.rate:,.4g} ± {timing.spread / 2:.0%}"


def _colour_photos(folder: Path) -> list[Path]:
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    return sorted(path for path in paths if Image.open(path).mode == "RGB")


def _enlarged(files: Sequence[bytes], size: tuple[int, int]) -> list[bytes]:
    made = []
    for data in files:
        picture = Image.open(BytesIO(data)).convert("RGB")
        across = picture.width >= picture.height
        file = BytesIO()
        picture.resize(size if across else (size[1], size[0]), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def _rehearsal(folder: Path) -> tuple[Path, Path]:
    """Write a few photos, large and small, and return their folders."""
    photos, clothing = folder / "photos", folder / "clothing"
    for place, size, names in ((photos, (300, 400), ["."]), (clothing, (60, 80), ["train/a", "train/b"])):
        for name in names:
            (place / name).mkdir(parents=True)
            for number in range(12):
                (place / name / f"{number}.JPEG").write_bytes(photo(*size))
    return photos, clothing


PARTS = {"decode": decoding, "loader": loading, "pack": packing, "wait": waiting}


if __name__ == "__main__":
    main(sys.argv[1:])
