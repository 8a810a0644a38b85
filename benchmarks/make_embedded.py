"""Make the embedded data set from the folders of the CC0 clothing photos (alexeygrigorev/clothing-dataset-small).

    python benchmarks/make_embedded.py FOLDER src/vitrail/data/clothing

FOLDER holds train, validation and test parts of ten classes each, and LICENSE. Of each class come the first 76 pictures
of the training part, and of the validation and test parts together the first 24, by file name (they are random
numbers): as many as the smallest class, skirts, has for testing. The centre square of each picture, resized to 80 x 80
pixels, becomes a tile of one sheet per part: a row per class. JPEG compresses a sheet in blocks of 8 x 8 pixels with
colours at full resolution, so that no tile touches another. Whoever decodes one gets the same pixels, but for a level
at most between decoders.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SIDE = 80
TRAIN, TEST = 76, 24
SAME = 0.97  # correlation of the thumbnails of one picture and a copy of it, compressed again or slightly cut
PREAMBLE = """\
The pictures and labels in this folder are a balanced subset of the clothing photos at
https://github.com/alexeygrigorev/clothing-dataset-small (which took them from
https://github.com/alexeygrigorev/clothing-dataset), cropped and made smaller. `benchmarks/make_embedded.py` in
Vitrail's repository makes the files. Those who gave the photos waived their rights:

"""


def pictures(folder: Path, name: str) -> tuple[list[Path], list[Path]]:
    """Return the training and test pictures of a class."""
    train = sorted((folder / "train" / name).iterdir())
    test = [path for part in ("validation", "test") for path in (folder / part / name).iterdir()]
    return train[:TRAIN], sorted(test, key=lambda path: path.name)[:TEST]


def tile(path: Path) -> Image.Image:
    """Return a picture as it is shipped."""
    return ImageOps.fit(Image.open(path).convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Return tiles side by side, a row per class."""
    whole = Image.new("RGB", (SIDE * len(rows[0]), SIDE * len(rows)))
    for i, row in enumerate(rows):
        for j, each in enumerate(row):
            whole.paste(each, (SIDE * j, SIDE * i))
    return whole


def closest(train: list[Image.Image], test: list[Image.Image]) -> float:
    """Return the highest correlation of a test picture's thumbnail with a training picture's."""
    flat = [
        np.stack([np.asarray(each.resize((16, 16), Image.Resampling.BOX), np.float64).ravel() for each in part])
        for part in (train, test)
    ]
    flat = [part - part.mean(axis=1, keepdims=True) for part in flat]
    first, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in flat)
    return float((first @ second.T).max())


def main(source: Path, target: Path) -> None:
    classes = sorted(path.name for path in (source / "train").iterdir())
    files = [pictures(source, name) for name in classes]
    for name, (train, test) in zip(classes, files, strict=True):
        if (len(train), len(test)) != (TRAIN, TEST):
            sys.exit(f"{name} has {len(train)} training and {len(test)} test pictures; {TRAIN} and {TEST} are needed.")
    parts = {"train": [[*map(tile, train)] for train, _ in files], "test": [[*map(tile, test)] for _, test in files]}
    likeness = closest(*([each for row in rows for each in row] for rows in parts.values()))
    if likeness > SAME:
        sys.exit(f"a test picture is a training picture again: their thumbnails correlate by {likeness:.3f}.")
    target.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        sheet(rows).save(target / f"{part}.jpg", quality=90, subsampling=0, optimize=True, progressive=True)
    (target / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8", newline="\n")
    licence = (source / "LICENSE").read_text(encoding="utf-8")
    (target / "LICENSE").write_text(PREAMBLE + licence, encoding="utf-8", newline="\n")
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {size:,} bytes; closest pair across the parts: {likeness:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
