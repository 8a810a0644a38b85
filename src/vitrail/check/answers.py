"""What a model finds in a data set: labels that it contradicts, and pictures that look almost the same to it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vitrail.check.base import Finding
from vitrail.check.label_errors import suspect_labels, suspects
from vitrail.check.near_duplicates import SIDE, Seen, near_duplicates
from vitrail.check.scan import Scan
from vitrail.data import Source
from vitrail.errors import UserError
from vitrail.evaluation import ask, match_classes
from vitrail.metrics import Evaluation
from vitrail.models import ImageModel


def ask_model(
    model: ImageModel,
    parts: Mapping[str, Source],
    scans: Sequence[Scan],
    *,
    trained_on: str | None,
    workers: int,
) -> Iterator[Finding]:
    """Yield what a model finds in the parts of a data set.

    Args:
        model: The model. Where its classes do not fit the data's, labels are not judged.
        parts: The pictures.
        scans: Of all of them, in their order.
        trained_on: As `check` takes it.
        workers: Decoding threads.
    """
    head, problem = model.head, ""
    try:
        judged = {part: match_classes(source, model) for part, source in parts.items()}
    except UserError as error:
        judged, head, problem = dict(parts), None, str(error)

    def answer(images: Tensor) -> Tensor:
        small, features = adaptive_avg_pool2d(images, SIDE), model.features(images)
        return torch.cat([small.flatten(1), features, *([] if head is None else [head(features)])], dim=1)

    seen: dict[bytes, Seen] = {}  # by pixels: copies of the very same are another finding
    found, start, pictures = [], 0, 0
    small_size = model.preprocessing.channels * SIDE**2
    for part, source in judged.items():
        answers = ask(model, source, answer=answer, workers=workers, max_broken=1.0)
        small, features, logits = np.split(
            answers.rows, [small_size, answers.rows.shape[1] - (head.out_features if head else 0)], axis=1
        )
        for row, index in enumerate(answers.indices.tolist()):
            scan = scans[start + index]
            label = " + ".join(parts[part].classes[i] for i in scan.labels)
            shown = Seen(part, scan.name, label, features[row], small[row].reshape(-1, SIDE, SIDE))
            seen.setdefault(scan.pixel_hash, shown)
        if head is not None and len(answers.indices):
            found += suspects(_evaluation(source, answers.indices, logits), part)
        start, pictures = start + len(source), pictures + len(answers.indices)
    if problem:
        yield Finding("labels-not-judged", "note", f"labels are not judged, only copies are sought: {problem}", ())
    else:
        yield from _trained_on(parts, trained_on)
        yield from suspect_labels(found, pictures)
    yield from near_duplicates(list(seen.values()))


def _evaluation(source: Source, indices: np.ndarray, logits: np.ndarray) -> Evaluation:
    names = [source.name(int(index)) for index in indices]
    return Evaluation(logits, source.targets[indices], source.classes, names, [], indices)


def _trained_on(parts: Mapping[str, Source], fingerprint: str | None) -> Iterator[Finding]:
    """Tell of parts that the model was trained on, which it knows by heart, wrong labels included."""
    # A part of a source has the source's hash before a bracket; labelled and unlabelled pictures are joined by a plus.
    learned = {piece.split("[")[0] for piece in (fingerprint or "").split(" + ")}
    known = [part for part, source in parts.items() if source.fingerprint().split("[")[0] in learned]
    if known:
        text = (
            f"the model was trained on pictures of the part {', '.join(known)}, with these labels: it finds fewer "
            "wrong ones there. Train on one half of the pictures and check the other, then the other way round."
        )
        yield Finding("seen-pictures", "note", text, ())
