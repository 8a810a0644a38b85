"""The routes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vitrail.serving.batching import Batcher
from vitrail.serving.guard import HEADERS, Guard, problem
from vitrail.serving.jobs import (
    Answer,
    Answers,
    Compute,
    JobFailed,
    JobUnfit,
    Kind,
    ModelFacts,
    Unreadable,
    WorkerLost,
)
from vitrail.serving.limits import Limits, Refusal
from vitrail.serving.metrics import Metrics
from vitrail.serving.openapi import document
from vitrail.serving.reading import GONE, Reader, Upload

T = TypeVar("T")

TOP = 5
"""Classes in an answer, unless asked otherwise."""
AGAIN = 2
"""Seconds after which to ask again when the worker was lost; the next one needs about as long to load."""
ASSETS = {
    "/": ("text/html", ("serving/page.html",)),
    "/page.css": ("text/css", ("report/style.css", "serving/page.css")),
    "/page.js": ("text/javascript", ("serving/page.js",)),
}
"""Path -> media type, and the files of the package that it is made of."""


OPEN = ("/health", "/ready", "/openapi.json", *ASSETS)
"""Paths that need no token."""


@dataclass
class State:
    """What the server knows of itself."""

    compute: Compute
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    tokens: Sequence[str] = ()
    """One of them must come with requests for answers and figures, where there are any."""
    hosts: Sequence[str] = ()
    """Names under which browsers may ask; empty for any."""
    draining: bool = False
    """Whether it has been asked to stop."""


def create_app(state: State) -> Starlette:
    """Return the ASGI application."""
    routes, batcher = _Routes(state), Batcher(state.compute, state.limits, state.metrics)
    routes.batcher = batcher

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/ready", routes.ready),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
            Route("/v1/models", routes.models),
            Route("/v1/models/{model}", routes.model),
            Route("/v1/models/{model}/predict", routes.predict, methods=["POST"]),
            Route("/v1/models/{model}/explain", routes.explain, methods=["POST"]),
            *(Route(path, _asset(*of), name=f"page {path}") for path, of in ASSETS.items()),
        ],
        middleware=[Middleware(Guard, metrics=state.metrics, tokens=state.tokens, hosts=state.hosts, open_paths=OPEN)],
        exception_handlers={Refusal: _refused, HTTPException: _not_served, JobFailed: _failed, Exception: _failed},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _Routes:
    """One method per route."""

    batcher: Batcher

    def __init__(self, state: State) -> None:
        self._state = state
        self._reader = Reader(state.limits)
        self._document = document(state.compute.models, state.limits, tokens=bool(state.tokens))

    async def health(self, request: Request) -> Response:
        if self._state.compute.healthy:
            return JSONResponse({"status": "ok"})
        return problem(503, "no worker can be started; the log says why.", retry_after=30)

    async def ready(self, request: Request) -> Response:
        if self._state.draining:
            return problem(503, "the server is stopping.", retry_after=30)
        if not self._state.compute.ready:
            return problem(503, "the worker is being replaced.", retry_after=AGAIN)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        metrics = self._state.metrics
        metrics.up.set(self._state.compute.ready)
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"models": [facts.to_json() for facts in self._state.compute.models.values()]})

    async def model(self, request: Request) -> Response:
        facts = self._facts(request)
        return JSONResponse({**facts.to_json(), "labels": list(facts.labels)})

    async def predict(self, request: Request) -> Response:
        async with self._reader.pictures(request) as uploads:
            facts, answers = await self._ask(request, "predict", uploads)
        if all(isinstance(answer, Unreadable) for answer in answers):
            return problem(422, _reasons(uploads, answers))
        told = [_told(upload, answer) for upload, answer in zip(uploads, answers, strict=True)]
        return JSONResponse({"model": facts.name, "predictions": told})

    async def explain(self, request: Request) -> Response:
        async with self._reader.pictures(request) as uploads:
            if len(uploads) != 1:
                raise Refusal(400, f"one picture at a time is explained, not {len(uploads)}.")
            facts, answers = await self._ask(request, "explain", uploads)
        (answer,) = answers
        if isinstance(answer, Unreadable):
            return problem(422, _reasons(uploads, answers))
        return JSONResponse({"model": facts.name, **_told(uploads[0], answer), "explanation": answer.explanation})

    async def _ask(self, request: Request, kind: Kind, uploads: Sequence[Upload]) -> tuple[ModelFacts, Answers]:
        """Return the model that a request names and its answers to uploads, unless the client goes away meanwhile."""
        facts, top = self._facts(request), _top(request)
        pictures = [upload.data for upload in uploads]
        try:
            return facts, await _unless_gone(request, self.batcher.ask(kind, facts.name, pictures, top))
        except JobUnfit as reason:
            raise Refusal(422, str(reason)) from reason
        except WorkerLost as loss:
            raise Refusal(
                503,
                f"the process that computes was lost while it had this request: {loss}. It is being replaced; if the "
                "same request meets with this again, its picture may be the cause.",
                retry_after=AGAIN,
            ) from loss

    def _facts(self, request: Request) -> ModelFacts:
        models, name = self._state.compute.models, request.path_params["model"]
        if name not in models:
            raise Refusal(404, f"there is no such model here; there are: {', '.join(models)}.")
        return models[name]


async def _unless_gone(request: Request, answering: Awaitable[T]) -> T:
    """Return what is awaited, or give it up when the client closes the connection.

    Raises:
        Refusal: When it has.
    """
    answer, gone = asyncio.ensure_future(answering), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal(GONE, "the client went away.")
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _top(request: Request) -> int:
    given = request.query_params.get("top", str(TOP))
    if not (given.isascii() and given.isdecimal()) or len(given) > 9 or int(given) < 1:
        raise Refusal(400, "top must be a number of classes, at least 1.")
    return int(given)


def _told(upload: Upload, answer: Answer | Unreadable) -> dict[str, Any]:
    """Return plain values, as `vitrail predict --json` has them."""
    if isinstance(answer, Unreadable):
        return {"name": upload.name, "labels": [], "problem": answer.reason}
    labels = [{"label": label, "probability": round(share, 6)} for label, share in answer.labels]
    return {"name": upload.name, "labels": labels, "problem": None}


def _reasons(uploads: Sequence[Upload], answers: Sequence[Answer | Unreadable]) -> str:
    reasons = [answer.reason for answer in answers if isinstance(answer, Unreadable)]
    if len(reasons) == 1:
        return f"the picture cannot be read: {reasons[0]}."
    named = (f"{upload.name}: {reason}" for upload, reason in zip(uploads, reasons, strict=True))
    return f"none of the pictures can be read: {'; '.join(named)}."


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return problem(refusal.status, refusal.detail, retry_after=refusal.retry_after, close=refusal.close)


async def _not_served(request: Request, mistake: Exception) -> Response:
    assert isinstance(mistake, HTTPException)
    answer = problem(mistake.status_code, f"{mistake.detail}; /openapi.json tells what there is.", unread=True)
    answer.headers.update(mistake.headers or {})
    return answer


async def _failed(request: Request, failure: Exception) -> Response:
    said = f": {failure}" if isinstance(failure, JobFailed) else ""
    answer = problem(500, f"a bug of the server's{said}; its log has more.")
    answer.headers.update(HEADERS)
    return answer


def _asset(kind: str, parts: Sequence[str]) -> Callable[[Request], Awaitable[Response]]:
    text = "\n".join((files("vitrail") / part).read_text(encoding="utf-8") for part in parts)

    async def page(request: Request) -> Response:
        return Response(text, media_type=kind)

    return page
