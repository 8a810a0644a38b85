"""From what the pictures say of themselves to what is wrong with them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from jaxtyping import Int

from vitrail.check.base import Finding, Item, tell
from vitrail.check.scan import FORMATS, Scan, Trait

LARGEST_RATIO = 10
"""Of training pictures between two classes, before the rare one is likely to be neglected."""
FEWEST = 10
"""Training pictures of a class that say something about it."""
SMALLEST_SIDE = 32
"""Pixels."""
LARGEST_ASPECT = 4
"""Longer side over shorter side; of such a picture a centre crop shows less than a quarter."""

_FEW = ("picture", "pictures")

TRAITS: dict[Trait, tuple[str, str]] = {
    "cmyk": ("printer's colours (CMYK)", "their colours are guessed, since profiles are not applied; save them as RGB"),
    "16-bit": ("more than 8 bits per channel", "they are scaled to 8; nothing to do unless the lowest bits matter"),
    "palette": ("a palette of 256 colours at most", "nothing to do, but better originals may exist"),
    "transparent": ("transparency", "it is laid over white; flatten them where another background is meant"),
    "turned": ("a turn written in EXIF", "they are turned upright; other tools may show them lying"),
}
"""What files have -> what that means and what to do."""


def broken(scans: Sequence[Scan]) -> Iterator[Finding]:
    """Pictures that cannot be decoded, and files without a byte."""
    failed = [(scan.empty, Item((scan.name,), scan.problem)) for scan in scans if scan.problem is not None]
    if damaged := tuple(item for empty, item in failed if not empty):
        text = f"{tell(len(damaged), *_FEW)} cannot be read; fetch again or remove."
        yield Finding("broken", "error", text, damaged)
    if hollow := tuple(item for empty, item in failed if empty):
        text = f"{tell(len(hollow), 'file', 'files')} without a single byte; fetch again or remove."
        yield Finding("empty-file", "error", text, hollow)


def same_pictures(scans: Iterable[Scan], classes: Sequence[str]) -> Iterator[Finding]:
    """The same pixels under two labels, in two parts, or twice in one part under one label."""
    groups: dict[bytes, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.problem is None:
            groups[scan.pixel_hash].append(scan)
    conflicts, leaks, copies = [], [], []
    for group in groups.values():
        if len({scan.labels for scan in group}) > 1:
            labels = dict.fromkeys(" + ".join(classes[i] for i in scan.labels) or "no label" for scan in group)
            conflicts.append(Item(_names(group), ", ".join(labels)))
        if len(parts := dict.fromkeys(scan.part for scan in group)) > 1:
            leaks.append(Item(_names(group), ", ".join(parts)))
        places: dict[tuple[object, ...], list[Scan]] = defaultdict(list)
        for scan in group:
            places[scan.part, scan.labels].append(scan)
        for place in places.values():
            if len(place) > 1:
                files = {scan.file_hash for scan in place}
                copies.append(Item(_names(place), "same pixels" if len(files) > 1 or None in files else "same bytes"))
    if conflicts:
        text = (
            f"{tell(len(conflicts), *_FEW)} under more than one label; keep each where it belongs, remove the others."
        )
        yield Finding("conflict", "error", text, tuple(conflicts))
    if leaks:
        text = (
            f"{tell(len(leaks), *_FEW)} in more than one part: a model that has seen the answers looks better than it "
            "is; remove them from the training part."
        )
        yield Finding("leakage", "error", text, tuple(leaks))
    if copies:
        spare = sum(len(item.names) - 1 for item in copies)
        text = f"{tell(len(copies), *_FEW)} more than once in a class; keep one of each ({spare:,} too many)."
        yield Finding("duplicate", "warning", text, tuple(copies))


def balance(counts: Int[np.ndarray, " classes"], classes: Sequence[str]) -> Iterator[Finding]:
    """Training classes that are much rarer than others, or too small to learn."""
    order = [int(label) for label in np.argsort(counts, kind="stable")]
    low, high = order[0], order[-1]
    if (ratio := ratio_of(counts)) is not None and ratio > LARGEST_RATIO:
        text = (
            f"{classes[high]} has {ratio:,.1f} times as many training pictures as {classes[low]}; add pictures, or "
            "train with --input.balanced or --recipe.class-weights auto."
        )
        items = [Item((classes[i],), tell(int(counts[i]), *_FEW)) for i in (high, low)]
        yield Finding("imbalance", "warning", text, tuple(items))
    few = [i for i in order if counts[i] < FEWEST]
    if few:
        text = (
            f"{tell(len(few), 'class has', 'classes have')} fewer than {FEWEST} training pictures; "
            "add some, or merge it with another."
        )
        items = [Item((classes[i],), tell(int(counts[i]), *_FEW)) for i in few]
        yield Finding("small-class", "warning", text, tuple(items))


def ratio_of(counts: Int[np.ndarray, " classes"]) -> float | None:
    """Return the largest count over the smallest; None when a class has none."""
    return float(counts.max() / counts.min()) if counts.min() else None


def sizes(readable: Sequence[Scan]) -> Iterator[Finding]:
    """Pictures that are much smaller than the others, or much longer than wide."""
    # In MNIST and CIFAR every picture is small, and that is no fault.
    if readable and median(min(scan.size) for scan in readable) >= SMALLEST_SIDE:
        tiny = [Item((s.name,), _size(s)) for s in readable if min(s.size) < SMALLEST_SIDE]
        if tiny:
            text = (
                f"{tell(len(tiny), *_FEW)} with a side below {SMALLEST_SIDE} pixels, unlike the others; "
                "look for the originals, or remove."
            )
            yield Finding("tiny", "warning", text, tuple(tiny))
    long = [Item((s.name,), _size(s)) for s in readable if max(s.size) > LARGEST_ASPECT * min(s.size)]
    if long:
        text = (
            f"{tell(len(long), *_FEW)} more than {LARGEST_ASPECT} times as long as wide, of which a centre crop shows "
            "little; cut to what matters, or train with --input.fit pad."
        )
        yield Finding("elongated", "warning", text, tuple(long))


def making(readable: Sequence[Scan], channels: int) -> Iterator[Finding]:
    """Files of unusual modes, and files whose suffix does not tell what they hold."""
    for trait, (what, cure) in TRAITS.items():
        if names := tuple(scan.name for scan in readable if trait in scan.traits):
            text = f"{tell(len(names), *_FEW)} with {what}; {cure}."
            yield Finding(trait, "warning" if trait == "cmyk" else "note", text, _single(names))
    grey = tuple(scan.name for scan in readable if "grey" in scan.traits)
    if channels == 3 and 0 < len(grey) < len(readable):
        text = (
            f"{tell(len(grey), 'grey picture', 'grey pictures')} among {len(readable) - len(grey):,} in colour; "
            "see that no class has more of them than others, or the model learns that instead."
        )
        yield Finding("grey", "note", text, _single(grey))
    wrong = [
        Item((scan.name,), scan.format)
        for scan in readable
        if scan.format is not None and FORMATS.get(Path(scan.name).suffix.lower(), scan.format) != scan.format
    ]
    if wrong:
        text = (
            f"{tell(len(wrong), 'file holds', 'files hold')} another format than the suffix says; read by content, so "
            "nothing to do here, but rename for other tools."
        )
        yield Finding("wrong-suffix", "note", text, tuple(wrong))


def _names(scans: Iterable[Scan]) -> tuple[str, ...]:
    return tuple(scan.name for scan in scans)


def _single(names: Iterable[str]) -> tuple[Item, ...]:
    return tuple(Item((name,)) for name in names)


def _size(scan: Scan) -> str:
    return f"{scan.size[0]} x {scan.size[1]}"
