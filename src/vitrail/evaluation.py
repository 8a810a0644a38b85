"""A model's answers to a set of pictures, in one process or several."""

import json
import re
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.config.preprocessing import Preprocessing
from vitrail.data import read_parts
from vitrail.data.base import Source, Subset
from vitrail.data.imagenet import imagenet_labels, imagenet_wnids
from vitrail.data.view import evaluation_view, normalise
from vitrail.errors import BrokenPicture, UserError
from vitrail.metrics import Evaluation, fit_temperature, real_accuracy
from vitrail.models import ImageModel
from vitrail.parallel import Precision, autocast, gather_objects, share_of, world_size
from vitrail.sharding import is_sharded

PREFETCH = 3  # further batches decoded ahead: hides a slow picture without holding much memory
BATCH = {"cpu": 8, "cuda": 64}
"""Pictures of 224 x 224 at a time. On two cores ViT-S/16 answers 28.7 a second by 8 and 23.9 by 32, EfficientNet-B0 69
and 48: results larger than 32 MB get new memory from the system each time, and it clears every page."""
MOST = 256
"""Pictures at a time, however small they are."""

Loaded = list[tuple[int, Tensor | BrokenPicture]]


def evaluate(
    model: ImageModel,
    data: str | Path | Source,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | None = None,
    precision: Precision = "fp32",
    max_broken: float = 0.01,
) -> Evaluation:
    """Return a model's answers to labelled pictures; `.metrics()` of it are the figures.

    Args:
        model: The model; classes of the data are matched to its labels by name.
        data: A path of data, or a source of pictures.
        split: Part of the data at a path: `test`, `val` or `train`; by default the first of them that it has.
        batch_size: Pictures per forward pass; by default as many as the device is fast with.
        workers: Decoding threads; 0 decodes between the passes.
        device: Where to compute; the model is moved there. By default where it is.
        precision: Of matrix products.
        max_broken: Share of the pictures that may be unreadable; they are named, counted and left out.

    Raises:
        UserError: When the data cannot be opened, has classes that the model does not know, or too much is broken.
    """
    if isinstance(data, Source):
        source = data
    else:
        _, source = read_parts(data, model.preprocessing.channels).for_evaluation(split)
    return predict_logits(
        model,
        match_classes(source, model),
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        max_broken=max_broken,
    )


def match_classes(source: Source, model: ImageModel) -> Source:
    """Return the pictures with their labels in the model's order, matched by class name.

    Data may lack classes that the model knows. Without labels in the model, the order is taken to be the same.

    Raises:
        UserError: When the data has classes that the model does not know, or the kinds of label differ.
    """
    if source.multi_label != model.multi_label:
        kinds = {True: "several labels", False: "exactly one label"}
        raise UserError(
            f"the data gives a picture {kinds[source.multi_label]}, the model {kinds[model.multi_label]}; "
            "evaluate on data of the model's kind."
        )
    if source.classes == model.labels:
        return source
    if not model.labels:
        if len(source.classes) != model.config.num_classes:
            raise UserError(
                f"the data has {len(source.classes)} classes, but the model {model.config.num_classes} outputs and no "
                "names for them. Give it labels when you load it, or train on this data."
            )
        return source
    if unknown := [name for name in source.classes if name not in model.labels]:
        raise UserError(
            f"the data has {len(unknown)} classes that the model does not know: {_some(unknown)}. "
            f"It knows {_some(model.labels)}. Rename the classes of the data, or train on it."
        )
    if twice := [name for name in source.classes if model.labels.count(name) > 1]:
        raise UserError(f"the model has several classes of one name, so the data's labels are unclear: {_some(twice)}.")
    return _Relabelled(source, model.labels)


def calibrate(model: ImageModel, evaluation: Evaluation) -> float:
    """Divide the model's logits, in place, by the temperature that fits an evaluation of it; return the temperature.

    The division goes into the weights of the head, so that everything made from the model has it. Fit it on pictures
    that were not trained on and that nothing will be reported on.

    Raises:
        UserError: When pictures may carry several labels.
    """
    if evaluation.multi_label:
        raise UserError("a temperature is fitted to pictures with one label each; these may carry several.")
    temperature = fit_temperature(evaluation.logits, evaluation.targets)
    with torch.no_grad():
        for parameter in model.get_submodule("head").parameters():
            parameter /= temperature
    return temperature


def real_top1(evaluation: Evaluation, file: str | Path) -> float | None:
    """Return the accuracy of ImageNet validation pictures by their reassessed labels (see `metrics.real_accuracy`).

    Args:
        evaluation: Answers to pictures under their official names, `ILSVRC2012_val_00000001.JPEG` and so on, all or
            some. Classes are known by WordNet number or name; others are counted as ImageNet's heads count them.
        file: `real.json` of Beyer et al. (2020): a list of the valid labels per validation picture, in order.

    Raises:
        UserError: When the file is no such list, a picture is not of ImageNet's validation part, or the model has
            other classes.
    """
    try:
        listed = json.loads(Path(file).read_bytes())
        valid = [[int(label) for label in labels] for labels in listed]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is not a JSON list of lists of labels ({error}); fetch real.json again.") from error
    places = []
    for name in evaluation.names:
        found = re.search(r"ILSVRC2012_val_(\d{8})\.", name)
        if found is None or not 1 <= int(found[1]) <= len(valid):
            raise UserError(f"{name} is none of the {len(valid):,} ImageNet validation pictures that {file} knows.")
        places.append(int(found[1]) - 1)
    numbers = {name: number for names in (imagenet_wnids(), imagenet_labels()) for number, name in enumerate(names)}
    if all(label in numbers for label in evaluation.labels):
        order = np.array([numbers[label] for label in evaluation.labels])
    elif len(evaluation.labels) == len(imagenet_wnids()):
        order = np.arange(len(evaluation.labels))
    else:
        raise UserError(f"ReaL labels are for ImageNet's classes; the model has {len(evaluation.labels)} others.")
    return real_accuracy(order[evaluation.logits.argmax(axis=1)], [valid[place] for place in places])


class Answers(NamedTuple):
    """What a model says of a source, over all processes."""

    rows: Float[np.ndarray, "n d"]
    """Logits, or what else was asked for; float32."""
    indices: Int[np.ndarray, " n"]
    """Place of each picture in the source, rising."""
    broken: list[tuple[int, str]]
    """Place and reason of each picture that could not be read."""


def predict_logits(
    model: ImageModel,
    source: Source,
    *,
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | None = None,
    precision: Precision = "fp32",
    max_broken: float = 0.01,
    stop: Callable[[], None] | None = None,
) -> Evaluation:
    """Return the model's logits for every picture with its labels, in the source's order, in the evaluation view.

    Arguments and errors are those of `ask`; it is also an error when no picture can be read.
    """
    answers = ask(
        model,
        source,
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        max_broken=max_broken,
        stop=stop,
    )
    if not len(answers.indices):
        raise UserError(f"there is no picture to evaluate ({len(answers.broken)} could not be read).")
    return Evaluation(
        logits=answers.rows,
        targets=source.targets[answers.indices],
        labels=source.classes,
        names=[source.name(int(index)) for index in answers.indices],
        broken=[(source.name(index), reason) for index, reason in answers.broken],
        indices=answers.indices,
    )


def ask(
    model: ImageModel,
    source: Source,
    *,
    answer: Callable[[Tensor], Tensor] | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    device: torch.device | None = None,
    precision: Precision = "fp32",
    max_broken: float = 0.01,
    stop: Callable[[], None] | None = None,
) -> Answers:
    """Return the model's answer to every picture, in the source's order, in the evaluation view.

    The model is put into evaluation mode and back. With several processes, each takes every world-th picture, and
    all return the same; each picture counts once.

    Args:
        model: The model.
        source: The pictures.
        answer: What is asked of a batch of views, one row each, as `model.features`; by default the logits.
        batch_size: Pictures per forward pass; by default as many as the device is fast with.
        workers: Decoding threads; 0 decodes between the passes.
        device: Where to compute; the model is moved there. By default where it is.
        precision: Of matrix products.
        max_broken: Share of the pictures that may be unreadable; they are named, counted and left out.
        stop: Called before each batch, equally often in every process; may raise to give up.

    Raises:
        UserError: When more than `max_broken` of the pictures are unreadable.
    """
    answer = answer or model
    device = device or next(model.parameters()).device
    model.to(device)
    batch_size = batch_size or fast_batch(model.preprocessing, device)
    mine = share_of(len(source))
    # The largest share sets the number of rounds, so that processes meet in `stop`; a last round may be empty.
    rounds = -(-len(range(0, len(source), world_size())) // batch_size)
    batches = [mine[i * batch_size : (i + 1) * batch_size] for i in range(rounds)]
    rows: list[Tensor] = []
    read: list[int] = []
    broken: list[tuple[int, str]] = []
    loaded = _batches(source, model.preprocessing, batches, workers, overlapped=device.type != "cpu")
    together = is_sharded(model)
    channels, image_size = model.preprocessing.channels, model.preprocessing.image_size
    # Memory into which weights are gathered must not be inference mode's: training goes on in it.
    with closing(loaded), _evaluating(model), torch.no_grad() if together else torch.inference_mode():
        for _ in range(rounds):
            if stop is not None:
                stop()
            indices, images, unreadable = next(loaded)
            broken += unreadable
            if world_size() == 1:  # alone, there is no other process to keep in step with
                _check_broken(source, broken, max_broken)
            if indices:
                with autocast(precision, device):
                    rows.append(answer(images.to(device)).float().cpu())
                read += indices
            elif together:  # its weights are gathered by all processes, in every round
                with autocast(precision, device):
                    answer(torch.zeros(1, channels, *image_size, device=device))
    return _gather(source, torch.cat(rows).numpy() if rows else None, read, broken, max_broken)


class _Relabelled(Subset):
    """All pictures of a source, with its labels expressed in a longer or reordered list of classes."""

    def __init__(self, source: Source, classes: tuple[str, ...]) -> None:
        super().__init__(source, np.arange(len(source)))
        place = np.array([classes.index(name) for name in source.classes], np.int64)
        self.classes = classes
        if source.multi_label:
            self.targets = np.zeros((len(source), len(classes)), np.float32)
            self.targets[:, place] = source.targets
        else:
            self.targets = place[source.targets]

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class _evaluating:
    """Evaluation mode, then each module's own mode again (parts may have been frozen apart)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modes = [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *problem: object) -> None:
        for module, mode in self._modes:
            module.training = mode


def _batches(
    source: Source, preprocessing: Preprocessing, batches: Sequence[range], workers: int, *, overlapped: bool
) -> Generator[tuple[list[int], Float[Tensor, "b c h w"], list[tuple[int, str]]], None, None]:
    """Yield, per batch, the indices that could be read, their evaluation views, and the broken ones with reasons."""
    pixels = source.pixels()
    if pixels is not None and _fits(pixels.shape[1:3], preprocessing):
        # The view of pictures that fit is their normalisation, and that is the same for one picture or many.
        for batch in batches:
            taken = torch.from_numpy(pixels[batch.start : batch.stop : batch.step].transpose(0, 3, 1, 2).copy())
            yield list(batch), normalise(taken, preprocessing), []
        return
    for loaded in _load(source, preprocessing, batches, workers, overlapped=overlapped):
        views = {index: view for index, view in loaded if isinstance(view, Tensor)}
        broken = [(index, str(view)) for index, view in loaded if isinstance(view, BrokenPicture)]
        yield list(views), torch.stack(list(views.values())) if views else torch.empty(0, 0, 0, 0), broken


def fast_batch(preprocessing: Preprocessing, device: torch.device) -> int:
    """Return how many views to compute at a time: the same number of pixels, whatever the size of a view."""
    rows, columns = preprocessing.image_size
    return min(max(BATCH.get(device.type, 32) * 224 * 224 // (rows * columns), 1), MOST)


def _fits(size: tuple[int, ...], preprocessing: Preprocessing) -> bool:
    """Whether pictures of this size go into the model as they are."""
    whole = preprocessing.fit != "crop" or preprocessing.crop_fraction == 1.0
    return whole and size == preprocessing.image_size


def _load(
    source: Source, preprocessing: Preprocessing, batches: Sequence[range], workers: int, *, overlapped: bool
) -> Generator[Loaded, None, None]:
    """Yield batches with their evaluation views, decoded by threads.

    `overlapped` with the model's work, on a device of its own. On the same cores they would stop it: its threads wait
    for each other after every operation. There, pictures are decoded a few batches at once, on all cores, while the
    model rests.
    """

    def load(index: int) -> Tensor | BrokenPicture:
        try:
            return evaluation_view(source.load(index), preprocessing)
        except BrokenPicture as problem:
            return problem

    if workers == 0:
        for batch in batches:
            yield [(index, load(index)) for index in batch]
        return
    threads = torch.get_num_threads()
    # A view is a few small matrix products. Shared out among cores that the model computes on, they take twice as long
    # and stop it at every turn. The number is a thread's own, but new threads, too, begin with what was last set.
    pool = ThreadPoolExecutor(
        workers if overlapped else max(workers, threads),
        thread_name_prefix="decode",
        initializer=torch.set_num_threads,
        initargs=(1,),
    )
    waiting, ahead = iter(batches), deque[list[tuple[int, Future[Tensor | BrokenPicture]]]]()
    try:
        while True:
            if overlapped or not ahead:
                more = islice(waiting, PREFETCH + 1 - len(ahead))
                ahead.extend([(index, pool.submit(load, index)) for index in batch] for batch in more)
                if not overlapped:
                    wait([future for batch in ahead for _, future in batch])
            if not ahead:
                return
            yield [(index, future.result()) for index, future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _gather(
    source: Source, rows: Float[np.ndarray, "n d"] | None, read: list[int], broken: list[tuple[int, str]], cap: float
) -> Answers:
    """Put the processes' shares together, in the order of the source. A process may have read no picture."""
    shares: list[Any] = gather_objects((rows, read, broken))
    broken = sorted(item for share in shares for item in share[2])
    _check_broken(source, broken, cap)
    indices = np.concatenate([np.asarray(share[1], np.int64) for share in shares])
    order = np.argsort(indices)
    some = [share[0] for share in shares if share[0] is not None]
    together = np.concatenate(some)[order] if some else np.zeros((0, len(source.classes)), np.float32)
    return Answers(together, indices[order], broken)


def _check_broken(source: Source, broken: list[tuple[int, str]], cap: float) -> None:
    if len(broken) > cap * len(source):
        index, reason = min(broken)
        raise UserError(
            f"{len(broken)} of {len(source)} pictures cannot be read, more than {cap:.1%}; the first is "
            f"{source.name(index)}: {reason}. Mend or remove them, or raise --input.max-broken."
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
