"""The classes of ImageNet-1k (ILSVRC 2012), in the order in which every published head counts them.

`imagenet1k.txt` holds a WordNet number and a name per line: the first of the synonyms that timm's
`imagenet_synset_to_lemma.txt` (Apache-2.0, after WordNet 3.0) lists, but for the two cranes and the two maillots,
which would share one.
"""

from functools import cache
from importlib.resources import files


@cache
def _classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    lines = (files("vitrail.data") / "imagenet1k.txt").read_text(encoding="utf-8").splitlines()
    numbers, names = zip(*(line.split("\t") for line in lines), strict=True)
    return numbers, names


def imagenet_labels() -> tuple[str, ...]:
    """Return the 1,000 class names in the order of the logits, no two alike: "tench", "goldfish", ..."""
    return _classes()[1]


def imagenet_wnids() -> tuple[str, ...]:
    """Return the 1,000 WordNet numbers in the order of the logits: "n01440764", "n01443537", ..."""
    return _classes()[0]
