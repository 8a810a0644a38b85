"""Pictures that are almost the same: copies that were resized, compressed again, mirrored, or cropped by a little.

A model's features alone also bring together different pictures of one kind, the more so the better it knows them, and
few pixels alone all pictures of one composition. A near-duplicate is close in both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vitrail.check.base import Finding, Item, tell

SIDE = 8
"""Rows and columns of the small picture."""
ALIKE = 0.97
"""Least correlation of the small pictures. The most alike of the 1,000 embedded photos have 0.972; copies at JPEG
quality 40 or at half the size have 0.996 at least, nine in ten of those that lost 5 % of width and height 0.973."""
COMPARED = 2**24  # distances held at a time


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture as near-duplicates are told by."""

    part: str
    name: str
    label: str
    features: Float32[np.ndarray, " d"]
    small: Float32[np.ndarray, "c 8 8"]
    """Its view, shrunk."""


def near_pairs(
    features: Float32[np.ndarray, "n d"], small: Float32[np.ndarray, "n c 8 8"]
) -> tuple[Int[np.ndarray, "m 2"], Float[np.ndarray, " m"]]:
    """Return the pairs of pictures that are almost the same, and the correlation of their small pictures.

    Features must be closer than half of all pictures are to their nearest (1 - cosine, from the mean of all features);
    a small picture is compared as it is and mirrored. Time grows with the square of the number of pictures.
    """
    if len(features) < 2:
        return np.zeros((0, 2), np.int64), np.zeros(0)
    unit = _unit(features - features.mean(axis=0))
    upright, mirrored = (_unit(_centred(pictures)) for pictures in (small, small[..., ::-1]))
    chunks = np.array_split(np.arange(len(unit)), -(-(len(unit) ** 2) // COMPARED))
    usual = np.median(np.concatenate([_distances(unit, rows).min(axis=1) for rows in chunks]))
    pairs, likeness = [], []
    for rows in chunks:
        alike = np.maximum(upright[rows] @ upright.T, upright[rows] @ mirrored.T)
        first, second = np.nonzero((alike >= ALIKE) & (_distances(unit, rows) <= usual))
        once = rows[first] < second
        pairs.append(np.stack([rows[first], second], axis=1)[once])
        likeness.append(alike[first, second][once])
    return np.concatenate(pairs), np.concatenate(likeness)


def near_duplicates(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Groups of pictures that are almost the same: those under several labels or in several parts first.

    Args:
        seen: Pictures that all differ in their pixels.
    """
    if not seen:
        return
    pairs, likeness = near_pairs(np.stack([s.features for s in seen]), np.stack([s.small for s in seen]))
    if not len(pairs):
        return
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(seen), len(seen)))
    _, group_of = connected_components(links, directed=False)
    ranked: list[tuple[bool, float, Item]] = []
    conflicts = leaks = 0
    for group in np.unique(group_of[pairs]).tolist():
        members = [seen[row] for row in np.flatnonzero(group_of == group).tolist()]
        labels, parts = (list(dict.fromkeys(told)) for told in ((s.label for s in members), (s.part for s in members)))
        conflicts += len(labels) > 1
        leaks += len(parts) > 1
        apart = [", ".join(values) for values in (labels, parts) if len(values) > 1]
        best = float(likeness[group_of[pairs[:, 0]] == group].max())
        item = Item(tuple(member.name for member in members), "; ".join([*apart, f"likeness {best:.3f}"]))
        ranked.append((not apart, -best, item))
    counts = [
        f"{number:,} {what}"
        for number, what in ((conflicts, "under several labels"), (leaks, "in several parts"))
        if number
    ]
    where = f" ({', '.join(counts)})" if counts else ""
    groups = tell(len(ranked), "group", "groups")
    text = f"{groups} of pictures that are almost the same{where}; look at them, and keep one of each."
    items = tuple(item for *_, item in sorted(ranked, key=lambda entry: entry[:2]))
    yield Finding("near-duplicate", "warning", text, items)


def _distances(unit: Float[np.ndarray, "n d"], rows: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k n"]:
    """Return distances from some rows to all, from itself infinite."""
    found = 1 - unit[rows] @ unit.T
    found[np.arange(len(rows)), rows] = np.inf
    return found


def _centred(small: Float32[np.ndarray, "n c 8 8"]) -> Float32[np.ndarray, "n d"]:
    """Return small pictures without their mean colour."""
    return (small - small.mean(axis=(2, 3), keepdims=True)).reshape(len(small), -1)


def _unit(rows: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
