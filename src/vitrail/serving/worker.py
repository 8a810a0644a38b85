"""The process that decodes and computes. Its only way out is the pipe to the process that faces the network."""

import logging
import os
import signal
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from threading import Barrier
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.checkpoints import load_model
from vitrail.data import read_parts
from vitrail.data.base import Resized
from vitrail.data.decode import decode
from vitrail.data.view import evaluation_view, view_pixels
from vitrail.engines import PACKAGES, EngineName
from vitrail.engines.choice import ready_engine
from vitrail.engines.start import Engine
from vitrail.errors import BrokenPicture, UserError
from vitrail.evaluation import fast_batch
from vitrail.explaining import METHODS, choose_methods, grad_cam, relevance
from vitrail.metrics import probabilities
from vitrail.models import ImageModel
from vitrail.parallel import pick_device
from vitrail.prediction import top_classes
from vitrail.report.figures import heat, png_uri
from vitrail.serving.jobs import Answer, Answers, Failed, Job, ModelFacts, Ready, Setup, Unfit, Unreadable

log = logging.getLogger("vitrail")

LOOKS = {"relevance": relevance, "gradcam": grad_cam}
"""Ways to see where a model looked that take about as long as an answer or two; a family has one of them."""
SIDE = 448
"""Pixels of the longer side of a picture with its map."""
AHEAD = 3
"""Jobs at a time where the model computes on a device of its own."""


class Viewed(NamedTuple):
    """A picture as the model takes it. Its own pixels, which may be many, are let go while others are decoded."""

    view: Tensor
    seen: Resized | None
    """The same to look at, where it is to be explained."""


def work(connection: Connection, setup: Setup) -> None:
    """Load models, then do jobs until the other end of the pipe is closed."""
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the other process says when it is enough
        signal.signal(ignored, signal.SIG_IGN)
    try:
        computer = Computer(setup)
    except UserError as mistake:
        connection.send(Failed(str(mistake)))
        return
    begun = deque[tuple[int, Job, list[Future[Viewed | BrokenPicture]]]]()
    try:
        connection.send(Ready(computer.facts, computer.ahead))
        while True:
            while not begun or connection.poll():
                number, job = connection.recv()
                begun.append((number, job, computer.begin(job)))
            number, job, views = begun.popleft()
            connection.send((number, computer.answer(job, views)))
    except (EOFError, OSError):
        os._exit(0)  # the other process is gone; nobody waits for the pictures still being decoded


class Computer:
    """Models, and threads that decode for them.

    As `evaluation` found, decoding on the cores that a model computes on stops it at every operation. With one job at
    a time, which a CPU asks for, decoding and computing take turns.
    """

    def __init__(self, setup: Setup) -> None:
        """Load the models and let each answer once.

        Raises:
            UserError: When a model cannot be loaded, cannot classify, or its engine cannot take it.
        """
        self._pixels = setup.pixels
        self._device = torch.device("cpu") if setup.engine in PACKAGES else pick_device()
        self.ahead = 1 if self._device.type == "cpu" else AHEAD
        self._models = {name: load_model(source).to(self._device).eval() for name, source in setup.sources.items()}
        for name, model in self._models.items():
            if model.head is None:
                raise UserError(f"{name} gives features but no classes; serve a model with a classifier.")
        self.facts = {name: _facts(name, model, self._device) for name, model in self._models.items()}
        self._engines = {name: _engine(model, setup.engine, self.facts[name]) for name, model in self._models.items()}
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads, "decode", torch.set_num_threads, (1,))
        together = Barrier(threads)  # so that all threads begin now, before the number is set back for this one
        for begun in [self._pool.submit(together.wait) for _ in range(threads)]:
            begun.result()
        torch.set_num_threads(threads)

    def begin(self, job: Job) -> list[Future[Viewed | BrokenPicture]]:
        """Have the pictures of a job decoded."""
        return [self._pool.submit(self._view, job, data) for data in job.pictures]

    def answer(self, job: Job, begun: list[Future[Viewed | BrokenPicture]]) -> Answers | Failed | Unfit:
        """Do a job that was begun. Where the device itself has failed, the process ends."""
        try:
            viewed = [each.result() for each in begun]
            readable = [view for view in viewed if not isinstance(view, BrokenPicture)]
            found = iter(self._answers(job, readable) if readable else [])
        except UserError as reason:
            return Unfit(str(reason))
        except torch.AcceleratorError:  # a CUDA context that has failed once fails at every later call
            log.exception("the device failed; the worker ends, so that another one takes its place")
            os._exit(1)
        except Exception as problem:  # whatever it is, the next job may do
            log.exception("%d pictures for %s could not be computed", len(begun), job.model)
            return Failed(f"{type(problem).__name__} while computing")
        return [Unreadable(str(view)) if isinstance(view, BrokenPicture) else next(found) for view in viewed]

    def _view(self, job: Job, data: bytes) -> Viewed | BrokenPicture:
        preprocessing = self._models[job.model].preprocessing
        try:
            picture = decode(data, preprocessing.channels, most=self._pixels)
        except BrokenPicture as problem:
            return problem
        seen = view_pixels(picture, preprocessing) if job.kind == "explain" else None
        return Viewed(evaluation_view(picture, preprocessing), seen)

    def _answers(self, job: Job, viewed: list[Viewed]) -> Answers:
        model = self._models[job.model]
        views = torch.stack([each.view for each in viewed]).to(self._device)
        logits = self._engines[job.model](views).cpu().numpy()
        labels, answers = self.facts[job.model].labels, Answers()
        for row, view, (_, seen) in zip(probabilities(logits, model.multi_label), views, viewed, strict=True):
            if np.isfinite(row).all():
                looked = None if seen is None else _look(model, view, seen, int(row.argmax()))
                answers.append(Answer(top_classes(row, labels, job.top), looked))
            else:
                answers.append(Unreadable("the model's answer to it is not a number"))
        return answers


def _facts(name: str, model: ImageModel, device: torch.device) -> ModelFacts:
    rows, columns = model.preprocessing.image_size
    return ModelFacts(
        name=name,
        kind=type(model).__name__,
        labels=model.class_names,
        multi_label=model.multi_label,
        image_size=(rows, columns),
        channels=model.preprocessing.channels,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        batch=fast_batch(model.preprocessing, device),
    )


def _engine(model: ImageModel, name: EngineName, facts: ModelFacts) -> Engine:
    """Return the engine of this name, checked by the embedded photos, after its first batch, which is slow."""
    photos = read_parts("clothing", facts.channels).train
    seen = [evaluation_view(photos.load(i), model.preprocessing) for i in range(facts.batch)]
    views = torch.stack(seen).to(next(model.parameters()).device)
    engine = ready_engine(model, name, views)
    engine(views)
    return engine


def _look(model: ImageModel, view: Float[Tensor, "c rows columns"], seen: Resized, number: int) -> dict[str, str]:
    """Return what the model saw of a picture, and where it looked for a class.

    Raises:
        UserError: When the family can be looked at, but not this model, with the reason.
    """
    (method,) = choose_methods(model, [name for name in LOOKS if isinstance(model, METHODS[name].families)])
    found = LOOKS[method](model, view[None], torch.tensor([number], device=view.device))[0].cpu().numpy()
    return {
        "explained": model.class_names[number],
        "title": METHODS[method].title,
        "caption": METHODS[method].caption,
        "seen": png_uri(seen),
        "map": png_uri(heat(seen, found, SIDE)),
    }
