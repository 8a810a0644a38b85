"""Few labels and many pictures: which pictures keep their labels, and which are learned from without."""

import logging

import numpy as np
from jaxtyping import Int

from vitrail.config.run import InputConfig
from vitrail.data import read_parts, without_labels
from vitrail.data.base import Source, Splits, Subset
from vitrail.errors import UserError

log = logging.getLogger("vitrail")


def with_few_labels(
    data: Splits, settings: InputConfig, *, channels: int, seed: int, learns_unlabelled: bool
) -> Splits:
    """Return the data with labels kept where `settings.labelled` says, and pictures without labels beside them.

    What is set aside to validate on has all its labels, and none of its pictures is learned from: of CIFAR-10's 50,000
    and with 5,000 set aside, 4,000 keep their labels and 41,000 lose them, as in the paper of Meta Pseudo Labels.

    Args:
        data: All parts, fully labelled.
        settings: `labelled` and `unlabelled`.
        channels: 3 for RGB, 1 for grey.
        seed: Of the draw.
        learns_unlabelled: Whether the recipe learns from pictures without labels.

    Raises:
        UserError: When there are not so many labels to keep, the recipe has no use for pictures without labels, or
            needs some and there are none.
    """
    if settings.unlabelled is not None and not learns_unlabelled:
        raise UserError(
            "this recipe has no use for --input.unlabelled: leave it out, or take a preset of Meta Pseudo Labels."
        )
    train, rest = data.train, None
    if settings.labelled is not None:
        kept = draw_labelled(data.train, settings.labelled, seed)
        train = Subset(data.train, kept)
        rest = without_labels(Subset(data.train, np.setdiff1d(np.arange(len(data.train)), kept)))
    if not learns_unlabelled:
        return Splits(train=train, val=data.val, test=data.test)
    if settings.unlabelled is not None:
        rest = read_parts(settings.unlabelled, channels, labelled=False).train
    if rest is None or not len(rest):
        raise UserError(
            "no pictures without labels: name some with --input.unlabelled, or keep the labels of a part only with "
            "--input.labelled (4000, or 0.1 for a tenth)."
        )
    log.info("learning from %d labelled pictures and %d without labels", len(train), len(rest))
    return Splits(train=train, val=data.val, test=data.test, unlabelled=rest)


def draw_labelled(source: Source, labelled: float, seed: int) -> Int[np.ndarray, " kept"]:
    """Return the pictures that keep their labels, rising.

    Args:
        source: Pictures with one label each.
        labelled: How many: a whole number, divided equally among the classes (the first ones have one more where it
            does not divide); below 1, a share of every class, at least one picture.
        seed: Of the draw.

    Raises:
        UserError: When pictures may have several labels, or there are fewer than that, in all or of a class.
    """
    if source.multi_label:
        raise UserError("--input.labelled draws class by class, but these pictures may have several labels.")
    if labelled > len(source):
        raise UserError(f"--input.labelled {labelled:.0f} is more than the {len(source)} training pictures; lower it.")
    counts = source.class_counts()
    places = np.arange(len(counts))
    wanted = np.maximum(np.round(labelled * counts), counts > 0) if labelled < 1 else None
    if wanted is None:
        each, more = divmod(int(labelled), len(counts))
        wanted = each + (places < more)
        if not each:
            raise UserError(
                f"--input.labelled {labelled:.0f} leaves classes without a label; {len(counts)} is the least."
            )
    for label in np.flatnonzero(wanted > counts)[:1]:
        raise UserError(
            f"--input.labelled {labelled:.0f} asks for {wanted[label]:.0f} labelled pictures of each class, but "
            f"{source.classes[label]!r} has {counts[label]}; lower it, or give a share of every class, below 1."
        )
    # A generator of its own: the one of the validation part has drawn with the seed alone.
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**63, 2**62]))
    # Uniform numbers and sorting instead of `permutation`, whose result NumPy may change from release to release.
    order = np.argsort(generator.random(len(source)), kind="stable")
    groups = [order[source.targets[order] == label][: int(wanted[label])] for label in places]
    return np.sort(np.concatenate(groups))
