"""Augmentation policies: which operations a picture gets, and how strong.

- AutoAugment (Cubuk et al., 2019, arXiv 1805.09501): one of 25 learned pairs of operations, each with a probability.
- RandAugment (Cubuk et al., 2020, arXiv 1909.13719): N operations at random, all at magnitude M. In timm's flavour,
  which DeiT and its successors train with, every operation grows stronger with M, and acts on half of the pictures.
  In that of Meta Pseudo Labels for CIFAR each picture has a chance of its own, from 20 to 80 %, and shifts are small.
- TrivialAugment (Müller and Hutter, 2021, arXiv 2103.10158): one operation at one of 31 strengths, wide space.

All draw a table row per picture; the rows say operation and argument. Operations act in groups of pictures.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.config.run import AugmentConfig
from vitrail.data import operations as ops
from vitrail.data.random import Draw, choice, normal, uniform

Plan = tuple[Int[Tensor, "b n"], Float[Tensor, "b n"]]
"""Number in OPERATIONS and argument of the n operations that each picture gets, in turn."""

WITHOUT_ARGUMENT = {"AutoContrast": ops.auto_contrast, "Equalize": ops.equalize, "Invert": ops.invert}
WITH_ARGUMENT = {
    "Posterize": ops.posterize,
    "Solarize": ops.solarize,
    "SolarizeAdd": ops.solarize_add,
    "Color": ops.color,
    "Contrast": ops.contrast,
    "Brightness": ops.brightness,
    "Sharpness": ops.sharpness,
}
AFFINE = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # their argument gets a random sign
OPERATIONS = ("Identity", *WITHOUT_ARGUMENT, *WITH_ARGUMENT, *AFFINE, "Cutout")
ENHANCE = ("Color", "Contrast", "Brightness", "Sharpness")


class Group(NamedTuple):
    """Pictures of a batch that get the same operation."""

    name: str
    rows: Int[Tensor, " n"] | slice
    """Places in the batch."""
    argument: Float[Tensor, " n"]
    down: Int[Tensor, " n"]
    """Row of Cutout's middle."""
    right: Int[Tensor, " n"]
    """Column of Cutout's middle."""


# All of RandAugment's; TrivialAugment has no Invert, SolarizeAdd and Cutout, but Identity.
RANDAUGMENT = tuple(name for name in OPERATIONS if name != "Identity")
TRIVIALAUGMENT = tuple(name for name in OPERATIONS if name not in ("Invert", "SolarizeAdd", "Cutout"))
# timm's `_RAND_INCREASING_TRANSFORMS`: erasing is a step of its own there.
INCREASING = tuple(name for name in RANDAUGMENT if name != "Cutout")
TRIVIAL_LEVELS = 31
# Meta Pseudo Labels' for CIFAR.
CIFAR_RANDAUGMENT = tuple(name for name in RANDAUGMENT if name != "SolarizeAdd")
INCREASING_CHANCE = 0.5
INCREASING_STEPS = 100  # strengths told apart from one level to the next

Pair = tuple[tuple[str, float, int], tuple[str, float, int]]

# Operation, probability, level 0 to 9. Operations without a strength have level 0 here. The paper's own repetitions
# stay: they are weights. Its table 9, ImageNet:
AUTOAUGMENT_IMAGENET: tuple[Pair, ...] = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)
# What EfficientNets were trained with; no paper has it (tensorflow/tpu models/official/efficientnet/autoaugment.py,
# `policy_v0`). Levels are RandAugment's.
AUTOAUGMENT_V0: tuple[Pair, ...] = (
    (("Equalize", 0.8, 0), ("ShearY", 0.8, 4)),
    (("Color", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
    (("Solarize", 0.8, 3), ("Equalize", 0.4, 0)),
    (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
    (("Color", 0.2, 0), ("Equalize", 0.8, 0)),
    (("Equalize", 0.4, 0), ("SolarizeAdd", 0.8, 3)),
    (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
    (("Color", 0.6, 1), ("Equalize", 1.0, 0)),
    (("Invert", 0.4, 0), ("Rotate", 0.6, 0)),
    (("Equalize", 1.0, 0), ("ShearY", 0.6, 3)),
    (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
    (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 0)),
    (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
    (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
    (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
    (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
    (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
    (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
    (("Equalize", 0.8, 0), ("Equalize", 0.0, 0)),
    (("Equalize", 1.0, 0), ("AutoContrast", 0.6, 0)),
    (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
    (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
    (("Solarize", 0.6, 8), ("Equalize", 0.6, 0)),
    (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
V0_TRANSLATION = 250  # pixels at level 10, whatever the picture's size
# Table 7, CIFAR-10 (used for CIFAR-100 as well).
AUTOAUGMENT_CIFAR: tuple[Pair, ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)


def apply_policy(
    images: Float[Tensor, "b c h w"], keys: Int[Tensor, " b"], config: AugmentConfig, fill: Float[Tensor, "c 1 1"]
) -> Float[Tensor, "b c h w"]:
    """Apply the configured policy to pictures of whole levels, in place, and return them.

    Args:
        images: Pictures, overwritten.
        keys: What each picture draws from.
        config: `policy`, and for RandAugment `operations`, `magnitude` and `magnitude_std`.
        fill: Colour of what comes into the picture from outside, and of Cutout's squares; whole levels.
    """
    size = images.shape[2], images.shape[3]
    numbers, arguments = plan_policy(keys, config, size)
    count = numbers.shape[1]
    signed = _signed_operations(keys.device)[numbers] & (uniform(keys, Draw.POLICY_SIGN, (count,)) < 0.5)
    arguments = torch.where(signed, -arguments, arguments)
    centres = [
        choice(keys, draw, n, (count,)) for draw, n in zip((Draw.POLICY_TOP, Draw.POLICY_LEFT), size, strict=True)
    ]
    if ops.pictures_at_once(images) == 1:  # all that is done to a large picture is done while it lies in the cache
        for row, names in enumerate(numbers.tolist()):
            at = slice(row, row + 1)
            for turn, number in enumerate(names):
                drawn = (each[at, turn] for each in (arguments, *centres))
                _apply(images, [Group(OPERATIONS[number], at, *drawn)], fill)
        return images
    for turn in range(count):
        # One sort and one look at the counts serve all operations: on a GPU, one synchronisation instead of sixteen.
        counts = torch.bincount(numbers[:, turn], minlength=len(OPERATIONS)).tolist()
        order = numbers[:, turn].argsort(stable=True)
        drawn = (each[:, turn].index_select(0, order).split(counts) for each in (arguments, *centres))
        groups = (Group(*each) for each in zip(OPERATIONS, order.split(counts), *drawn, strict=True))
        _apply(images, [group for group, many in zip(groups, counts, strict=True) if many], fill)
    return images


def plan_policy(keys: Int[Tensor, " b"], config: AugmentConfig, size: tuple[int, int]) -> Plan:
    """Return what `config.policy` does to each picture of rows and columns `size`, before signs are drawn."""
    if config.policy == "randaugment-increasing":
        return _plan_increasing(keys, config, size)
    numbers, arguments, chances = _table(config.policy, config.magnitude, size, keys.device)
    if config.policy == "randaugment":
        rows = choice(keys, Draw.POLICY_OPERATION, len(numbers), (config.operations,))
        return numbers[rows, 0], arguments[rows, 0]
    if config.policy == "randaugment-cifar":
        rows = choice(keys, Draw.POLICY_OPERATION, len(numbers), (config.operations,))
        chance = 0.2 + 0.6 * uniform(keys, Draw.POLICY_LEVEL)[:, None]  # one per picture
        acts = uniform(keys, Draw.POLICY_APPLY, (config.operations,)) < chance
        return torch.where(acts, numbers[rows, 0], OPERATIONS.index("Identity")), arguments[rows, 0]
    rows = choice(keys, Draw.POLICY_OPERATION, len(numbers))
    acts = uniform(keys, Draw.POLICY_APPLY, (numbers.shape[1],)) < chances[rows]
    return torch.where(acts, numbers[rows], OPERATIONS.index("Identity")), arguments[rows]


def randaugment_argument(name: str, level: float, size: tuple[int, int]) -> float:
    """Return an operation's argument at RandAugment's `level`, as in big_vision (pp/archive/autoaugment.py).

    Level 10 is AutoAugment's full range; higher levels go on. No level is off: Posterize keeps int(0.4 * level) bits
    and Solarize inverts from int(25.6 * level), so these act most at 0. There, translation is at most 100 pixels and
    Cutout's half side 40, at 224 pixels; here both grow with the picture.
    """
    height, width = size
    share = level / 10
    if name in ENHANCE:
        return 0.1 + 1.8 * share
    scales = {
        "Posterize": min(8, int(4 * share)),
        "Solarize": int(256 * share),
        "SolarizeAdd": int(110 * share),
        "Rotate": 30 * share,
        "ShearX": 0.3 * share,
        "ShearY": 0.3 * share,
        "TranslateX": round(100 * share * width / 224),
        "TranslateY": round(100 * share * height / 224),
        "Cutout": int(40 * share * min(size) / 224),
    }
    return float(scales.get(name, 0))


def _plan_increasing(keys: Int[Tensor, " b"], config: AugmentConfig, size: tuple[int, int]) -> Plan:
    """Return what timm's RandAugment does: a strength of its own for every operation, and a chance to be left out."""
    shape = (config.operations,)
    numbers, arguments = _increasing_table(size, keys.device)
    rows = choice(keys, Draw.POLICY_OPERATION, len(numbers), shape)
    level = config.magnitude + config.magnitude_std * normal(keys, Draw.POLICY_LEVEL, shape)
    step = (level.clamp(0.0, 10.0) * INCREASING_STEPS).round().long()
    down = (uniform(keys, Draw.POLICY_SIGN, shape) < 0.5).long()  # of a factor, away from 1; `apply_policy`'s sign
    acts = uniform(keys, Draw.POLICY_APPLY, shape) < INCREASING_CHANCE
    return torch.where(acts, numbers[rows], OPERATIONS.index("Identity")), arguments[rows, step, down]


def increasing_argument(name: str, level: float, size: tuple[int, int], *, down: bool = False) -> float:
    """Return an operation's argument at level 0 to 10 of timm's RandAugment (`rand-m9-mstd0.5-inc1`).

    Enhancements have a factor above or, with `down`, below 1. Translation is a share of the picture.
    """
    height, width = size
    share = level / 10
    if name in ENHANCE:
        return max(0.1, 1 - 0.9 * share) if down else 1 + 0.9 * share
    scales = {
        "Posterize": 4 - int(4 * share),
        "Solarize": 256 - int(256 * share),
        "SolarizeAdd": int(110 * share),
        "Rotate": 30 * share,
        "ShearX": 0.3 * share,
        "ShearY": 0.3 * share,
        "TranslateX": 0.45 * share * width,
        "TranslateY": 0.45 * share * height,
    }
    return float(scales.get(name, 0))


def cifar_randaugment_argument(name: str, level: float, size: tuple[int, int]) -> float:
    """Return an operation's argument at the level of RandAugment as Meta Pseudo Labels has it for CIFAR.

    From google-research/meta_pseudo_labels, augment.py and data_utils.py: translation and Cutout's half side reach an
    eighth of the picture at level 10. Solarize's threshold begins again at 0 above 255, as uint8 does there.
    """
    height, width = size
    share = level / 10
    scales = {
        "Solarize": int(256 * share) % 256,
        "TranslateX": share * (width // 8),
        "TranslateY": share * (height // 8),
        "Cutout": int(share * (min(size) // 8)),
    }
    return float(scales[name]) if name in scales else randaugment_argument(name, level, size)


def trivialaugment_argument(name: str, level: int) -> float:
    """Return an operation's argument at TrivialAugment's `level`, 0 to 30, in the wide space of the official code."""
    last = TRIVIAL_LEVELS - 1
    if name in ENHANCE:
        return 0.01 + 1.99 * level / last
    scales = {
        "Posterize": 8 - int(level * 6 / last),
        "Solarize": 256 - int(level * 256 / last),
        "Rotate": int(level * 135 / last),
        "ShearX": 0.99 * level / last,
        "ShearY": 0.99 * level / last,
        "TranslateX": int(level * 32 / last),
        "TranslateY": int(level * 32 / last),
    }
    return float(scales.get(name, 0))


def v0_argument(name: str, level: int, size: tuple[int, int]) -> float:
    """Return an operation's argument at a level, 0 to 10, of `policy_v0`: RandAugment's, but for its translation."""
    return V0_TRANSLATION * level / 10 if name == "TranslateY" else randaugment_argument(name, float(level), size)


def autoaugment_argument(name: str, level: int, size: tuple[int, int]) -> float:
    """Return an operation's argument at AutoAugment's `level`: ten even steps, 0 to 9, through the range of table 6.

    Posterize and Solarize grow stronger with the level, as in the official CIFAR code and torchvision; translation is
    the paper's 150 of 331 pixels, as a share of the picture.
    """
    height, width = size
    share = level / 9
    if name in ENHANCE:
        return 0.1 + 1.8 * share
    scales = {
        "Posterize": 8 - round(4 * share),
        "Solarize": 256 * (1 - share),
        "Rotate": 30 * share,
        "ShearX": 0.3 * share,
        "ShearY": 0.3 * share,
        "TranslateX": round(150 / 331 * share * width),
        "TranslateY": round(150 / 331 * share * height),
    }
    return float(scales.get(name, 0))


@lru_cache(maxsize=16)
def _table(
    policy: str, magnitude: float, size: tuple[int, int], device: torch.device
) -> tuple[Int[Tensor, "rows n"], Float[Tensor, "rows n"], Float[Tensor, "rows n"]]:
    """Return number, argument and probability of the operations of every row that the policy draws from."""
    rows: list[list[tuple[str, float, float]]]
    if policy == "randaugment":
        rows = [[(name, randaugment_argument(name, magnitude, size), 1.0)] for name in RANDAUGMENT]
    elif policy == "randaugment-cifar":
        rows = [[(name, cifar_randaugment_argument(name, magnitude, size), 1.0)] for name in CIFAR_RANDAUGMENT]
    elif policy == "trivialaugment":
        levels = range(TRIVIAL_LEVELS)
        rows = [[(name, trivialaugment_argument(name, level), 1.0)] for name in TRIVIALAUGMENT for level in levels]
    elif policy == "autoaugment-v0":
        rows = [[(name, v0_argument(name, level, size), p) for name, p, level in pair] for pair in AUTOAUGMENT_V0]
    else:
        pairs = {"autoaugment-cifar": AUTOAUGMENT_CIFAR, "autoaugment-imagenet": AUTOAUGMENT_IMAGENET}[policy]
        rows = [[(name, autoaugment_argument(name, level, size), p) for name, p, level in pair] for pair in pairs]
    with torch.inference_mode(False):  # a cached inference tensor would spoil later training
        numbers = torch.tensor([[OPERATIONS.index(name) for name, _, _ in row] for row in rows], device=device)
        arguments = torch.tensor([[argument for _, argument, _ in row] for row in rows], device=device)
        chances = torch.tensor([[chance for _, _, chance in row] for row in rows], device=device)
    return numbers, arguments.float(), chances


@lru_cache(maxsize=4)
def _increasing_table(
    size: tuple[int, int], device: torch.device
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "rows levels 2"]]:
    """Return the operations of timm's RandAugment, and their arguments at every level, upwards and downwards."""
    levels = [step / INCREASING_STEPS for step in range(10 * INCREASING_STEPS + 1)]
    rows = [
        [[increasing_argument(name, level, size, down=down) for down in (False, True)] for level in levels]
        for name in INCREASING
    ]
    with torch.inference_mode(False):  # as above
        numbers = torch.tensor([OPERATIONS.index(name) for name in INCREASING], device=device)
        return numbers, torch.tensor(rows, device=device)


@lru_cache(maxsize=4)
def _signed_operations(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([name in AFFINE for name in OPERATIONS], device=device)


def _apply(images: Tensor, groups: Sequence[Group], fill: Tensor) -> None:
    """Overwrite the pictures of each group by what its operation makes of them."""
    size = images.shape[2], images.shape[3]
    mapped: list[tuple[Tensor | slice, Tensor]] = []
    for name, rows, argument, down, right in groups:
        if name == "Identity":
            continue
        if name in AFFINE and not _in_whole_pixels(name, argument):
            mapped.append((rows, ops.affine_maps(name, argument, size)))
            continue
        pictures = _take(images, rows)
        if name in WITHOUT_ARGUMENT:
            pictures = WITHOUT_ARGUMENT[name](pictures)
        elif name in WITH_ARGUMENT:
            pictures = WITH_ARGUMENT[name](pictures, argument)
        elif name == "Cutout":
            pictures = ops.cutout(pictures, argument, down, right, fill)
        else:
            pixels = [int(n) for n in argument.tolist()]
            pictures = ops.translate(pictures, pixels, 2 if name == "TranslateY" else 3, fill)
        _put(images, rows, pictures)
    if len(mapped) > 1:  # one operation, whatever the map
        places, maps = zip(*mapped, strict=True)
        mapped = [(torch.cat(places), torch.cat(maps))]
    for rows, maps in mapped:
        _put(images, rows, ops.affine(_take(images, rows), maps, fill))


def _in_whole_pixels(name: str, amount: Tensor) -> bool:
    """Return whether pixels only change places; a GPU need not report that."""
    whole = name in ("TranslateX", "TranslateY") and amount.device.type == "cpu"
    return whole and all(n.is_integer() for n in amount.tolist())


def _take(images: Tensor, rows: Tensor | slice) -> Tensor:
    return images[rows] if isinstance(rows, slice) else images.index_select(0, rows)


def _put(images: Tensor, rows: Tensor | slice, pictures: Tensor) -> None:
    if isinstance(rows, slice):
        images[rows] = pictures
    else:
        ops.put(images, rows, pictures)
