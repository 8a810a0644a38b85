"""Which engine answers. An engine is taken only after it has given the model's own answers to real pictures."""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from statistics import median
from threading import Lock
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitrail.engines import PACKAGES, EngineName, missing_packages, require_engine
from vitrail.engines.known import Finding, key_of, recall, remember
from vitrail.engines.start import Engine, eager, start
from vitrail.errors import UserError
from vitrail.models import ImageModel

log = logging.getLogger("vitrail")

TOLERANCE = 1e-4
"""Largest difference between logits of two engines, relative to the largest logit where that is above 1: rounding in
fp32 makes a tenth of it, bf16 a hundred times as much."""
SHARE, SHARE_WITH_NORMS = 0.03, 0.2
"""Of the work ahead that may be spent on looking for a faster engine: all that is lost where there is none.

More where a model has BatchNorm, which other engines take into the convolutions: EfficientNet-B0 is 2.4 times as fast
without it on two cores, ViT-S/16 1.1 times.
"""
SERVED = 3600.0
"""Seconds of computing that a server is taken to have ahead of it."""
GAIN = 1.03
"""What is less times as fast as eager may be noise."""
TURNS = 7
"""Batches that each engine is measured by."""
SECONDS = {"openvino": (1.5, 0.025, 0.03), "onnx": (2.0, 0.035, 0.03), "compiled": (20.0, 0.5, 0.0)}
"""What it takes to make an engine ready: at least, per layer, and per million parameters."""


class Refused(Exception):
    """An engine that cannot take the model, or answers otherwise than the model does."""


def engine_for(model: ImageModel, name: EngineName, pictures: int) -> Engine:
    """Return the engine of this name for work of known length. It is made ready and checked by the first batches.

    Args:
        model: The model; in evaluation mode when the engine is asked.
        name: Of the engine.
        pictures: That will be asked about: `auto` weighs by it what pays.

    Raises:
        UserError: When a package is missing, or the engine does not compute where the model lies. The engine itself
            raises it at its first batch when it cannot take the model, or answers wrongly.
    """
    _require(model, name)
    if name == "eager":
        return eager(model)
    return Auto(model, pictures) if name == "auto" else _Asked(model, name)


def ready_engine(model: ImageModel, name: EngineName, views: Tensor, *, seconds: float = 30.0) -> Engine:
    """Return the engine of this name, ready and checked: for a server, before its first request.

    `auto` measures whole batches and single pictures in turns, and takes the engine that needs the least time for one
    of each. What has been measured on this machine before is not measured again.

    Args:
        model: In evaluation mode.
        name: Of the engine.
        views: The largest batch that there will be, of real pictures, normalised.
        seconds: That `auto` may spend on making engines ready, by an estimate.

    Raises:
        UserError: When a package is missing, the engine does not compute where the model lies, cannot take the model,
            or answers wrongly.
    """
    _require(model, name)
    if name == "eager":
        return eager(model)
    answers = eager(model)(views)
    if name != "auto":
        return _asked(model, name, views, answers)
    contest = Contest(model, views, answers, use="served", ahead=SERVED, budget=seconds)
    for label, engine in contest.turns():
        began = perf_counter()
        engine(views)
        engine(views[:1])
        _wait_for(views.device)
        contest.taken[label].append(perf_counter() - began)
    return contest.winner()


class Auto:
    """Answers by eager, and by a faster engine as soon as one has been found, where finding it is worth its time.

    Making an engine ready takes seconds to minutes. Whether one pays that was measured on this machine before is
    calculated; others are tried only where that is a small share of the work ahead, estimated from the time that eager
    takes. Engines that answer as the model does then take turns, a batch each, and the fastest one does the rest. One
    line in the log tells the choice.
    """

    def __init__(self, model: ImageModel, pictures: int) -> None:
        self._model, self._pictures, self._lock = model, pictures, Lock()
        self._course = self._choosing()
        self._engine, self._chosen = next(self._course), False

    def __call__(self, views: Tensor) -> Tensor:
        if self._chosen:
            return self._engine(views)
        with self._lock:  # what is measured computes alone
            began = perf_counter()
            answers = self._engine(views)
            _wait_for(views.device)
            self._pictures -= len(views)
            if not self._chosen:
                try:
                    self._engine = self._course.send(_Batch(views, answers, (perf_counter() - began) / len(views)))
                except StopIteration as end:
                    self._engine, self._chosen = end.value, True
            return answers

    def _choosing(self) -> Generator[Engine, "_Batch", Engine]:
        """Yield the engine for the next batch and take what came of it; return the one for all that follow."""
        model = eager(self._model)
        yield model  # the first batch is slow: memory is new to it
        if self._pictures <= 0:
            log.info("engine: eager")
            return model
        batch = yield model
        ahead = batch.seconds * self._pictures
        budget = share_to_spend(self._model) * ahead
        contest = Contest(self._model, batch.views, batch.answers, use="batches", ahead=ahead, budget=budget)
        for label, engine in contest.turns():
            contest.taken[label].append((yield engine).seconds)
        return contest.winner()


class _Batch(NamedTuple):
    views: Tensor
    answers: Tensor
    seconds: float
    """That the engine took, per picture."""


class Contest:
    """Engines that may do the work: eager, the best of those known from before, and others that are worth a try."""

    ready: dict[str, Engine]
    """Those that are ready and answer as the model does."""
    taken: dict[str, list[float]]
    """What each needed for the same work in each of its turns, in seconds."""

    def __init__(
        self, model: ImageModel, views: Tensor, answers: Tensor, *, use: str, ahead: float, budget: float
    ) -> None:
        """Make the engines ready that may pay.

        Args:
            model: In evaluation mode.
            views: A batch of real pictures.
            answers: The model's own to them.
            use: What the engines are for; see `known.key_of`.
            ahead: Seconds that eager would take for the work.
            budget: Seconds to spend on engines that are not known.
        """
        self._key = key_of(model.config, tuple(views.shape), views.device, use)
        self._known = recall(self._key)
        self._seconds = dict[str, float]()
        self._hint = ""
        lacking = views.device.type == "cpu" and all(map(missing_packages, PACKAGES))
        if lacking and preparation_seconds(model, "openvino") <= budget:
            self._hint = "; another may be faster: pip install 'vitrail[openvino]'"
        self.ready = {"eager": eager(model)}
        for name in self._worth_trying(model, _candidates(views.device), ahead, budget):
            began = perf_counter()
            try:
                self.ready[name] = verified(model, name, views, answers)
            except Refused as reason:
                log.warning("engine %s is not taken: %s.", name, reason)
            self._seconds[name] = perf_counter() - began
        self.taken = {name: [] for name in self.ready}

    def _worth_trying(self, model: ImageModel, candidates: Sequence[str], ahead: float, budget: float) -> Iterator[str]:
        """Yield the known engine that saves the most time, if any does, and unknown ones that the budget allows."""
        saved = {
            name: ahead * (1 - 1 / found.times) - found.seconds
            for name, found in self._known.items()
            if name in candidates and found.times >= GAIN
        }
        if saved and max(saved.values()) > 0:
            yield max(saved, key=lambda name: saved[name])
        for name in candidates:
            cost = preparation_seconds(model, name)
            if name not in self._known and cost <= budget:
                budget -= cost
                yield name

    def turns(self) -> Iterator[tuple[str, Engine]]:
        """Yield the engine whose turn it is, with its name; none when there is nothing new to find."""
        if self.ready.keys() - self._known.keys() - {"eager"}:
            for _ in range(TURNS):
                yield from self.ready.items()

    def winner(self) -> Engine:
        """Return the engine to take, remember what was found, and tell the choice."""
        if self.taken["eager"]:
            times = relative(self.taken)
            found = {name: Finding(times[name], self._seconds[name]) for name in times if name != "eager"}
            remember(self._key, found)
            best, told = told_choice(times)
        else:
            best = next((name for name in self.ready if name != "eager"), "eager")
            told = best if best == "eager" else f"{best}, {self._known[best].times:.2f} times eager when last measured"
        log.info("engine: %s%s", told, self._hint)
        return self.ready[best]


class _Asked:
    """An engine that was asked for by name: made ready and checked at the first batch."""

    def __init__(self, model: ImageModel, name: str) -> None:
        self._model, self._name, self._lock = model, name, Lock()
        self._engine: Engine | None = None

    def __call__(self, views: Tensor) -> Tensor:
        with self._lock:
            if self._engine is None:
                self._engine = _asked(self._model, self._name, views, eager(self._model)(views))
        return self._engine(views)


def _asked(model: ImageModel, name: str, views: Tensor, answers: Tensor) -> Engine:
    """Return an engine that was asked for by name, or raise UserError."""
    try:
        engine = verified(model, name, views, answers)
    except Refused as reason:
        raise UserError(f"engine {name}: {reason}; use --engine eager.") from reason
    log.info("engine: %s", name)
    return engine


def verified(model: ImageModel, name: str, views: Tensor, answers: Tensor) -> Engine:
    """Return an engine that gave the model's own answers to these views, and to the first one alone.

    Args:
        model: In evaluation mode.
        name: Of the engine.
        views: Real ones; noise may hide what an engine does wrongly.
        answers: What the model says of them.

    Raises:
        Refused: When the engine cannot take the model, or answers otherwise.
    """
    try:
        engine = start(name, model, views)
        found, alone = engine(views), engine(views[:1])
    except Exception as problem:  # converters and compilers raise whatever they come across
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise Refused(f"it cannot take this model ({first})") from problem
    if complaint := disagreement(found, answers) or disagreement(alone, answers[:1]):
        raise Refused(f"it answers otherwise than the model does ({complaint})")
    return engine


def disagreement(found: Tensor, answers: Tensor) -> str:
    """Return in words how much logits differ from those expected; empty when they may count as equal."""
    if found.shape != answers.shape:
        return f"logits of shape {tuple(found.shape)}, not {tuple(answers.shape)}"
    bound = TOLERANCE * max(1.0, float(answers.abs().max()))
    difference = float((found - answers).abs().max())
    if not difference <= bound:  # NaN is no agreement
        return f"logits differ by {difference:.1e}, more than {bound:.1e}"
    return ""


def share_to_spend(model: ImageModel) -> float:
    """Return the share of the work ahead that looking for a faster engine may take."""
    normed = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return SHARE_WITH_NORMS if normed else SHARE


def preparation_seconds(model: ImageModel, name: str) -> float:
    """Return about how long it takes to make an engine ready."""
    least, per_layer, per_million = SECONDS[name]
    layers = sum(1 for module in model.modules() if not any(module.children()))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return least + per_layer * layers + per_million * parameters / 1e6


def relative(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return how many times as fast as eager each engine is, from the seconds that each took in the same turns."""
    eagers = taken["eager"]
    return {name: median(e / s for e, s in zip(eagers, seconds, strict=True)) for name, seconds in taken.items()}


def told_choice(times: Mapping[str, float]) -> tuple[str, str]:
    """Return the engine to take, and in words why, from how many times as fast as eager each is."""
    best = max(times, key=lambda name: times[name])
    best = best if times[best] >= GAIN else "eager"
    others = [f"{name} {share:.2f}" for name, share in times.items() if name not in ("eager", best)]
    told = f", {times[best]:.2f} times eager" if best != "eager" else ""
    return best, best + told + (f" ({', '.join(others)})" if others else "")


def _require(model: ImageModel, name: str) -> None:
    """Raise UserError when an engine is not installed, or does not compute where the model lies."""
    require_engine(name)
    device = next(model.parameters()).device
    if name in PACKAGES and device.type != "cpu":
        raise UserError(f"engine {name} computes on the CPU, the model lies on {device}: move it there, model.cpu().")


def _candidates(device: torch.device) -> list[str]:
    """Return the engines to try, cheapest first."""
    if device.type == "cpu":
        return [name for name in ("openvino", "onnx", "compiled") if not missing_packages(name)]
    return ["compiled"] if device.type == "cuda" else []


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
