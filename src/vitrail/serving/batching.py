"""Pictures of many requests, gathered into batches.

Nothing waits for a batch to fill: whenever the worker is free it gets what has come, up to the number that the model is
fast with. Alone, a request is answered at once; under load, batches fill by themselves while the worker is busy.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vitrail.serving.jobs import Answer, Answers, Compute, Job, Kind, Unreadable
from vitrail.serving.limits import Limits, Refusal
from vitrail.serving.metrics import Metrics

SMOOTH = 0.2
"""Weight of the newest batch in the mean time per picture."""


@dataclass(eq=False)
class _Waiting:
    """A picture that waits."""

    kind: Kind
    model: str
    data: bytes
    top: int
    answer: asyncio.Future[Answer | Unreadable]

    def goes_with(self, other: "_Waiting") -> bool:
        return self.kind == other.kind == "predict" and self.model == other.model


class Batcher:
    """The queue. Runs inside `running`, in one event loop."""

    def __init__(self, compute: Compute, limits: Limits, metrics: Metrics) -> None:
        self._compute, self._limits, self._metrics = compute, limits, metrics
        self._waiting: list[_Waiting] = []
        self._came = asyncio.Event()
        self._pace = 0.1  # seconds per picture, until one has been measured

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hand out pictures within this block."""
        takers = [asyncio.create_task(self._take_turns()) for _ in range(self._compute.ahead)]
        try:
            yield
        finally:
            for taker in takers:
                taker.cancel()
            await asyncio.gather(*takers, return_exceptions=True)

    async def ask(self, kind: Kind, model: str, pictures: Sequence[bytes], top: int) -> Answers:
        """Return the answers to a request's pictures. When cancelled, they leave the queue.

        Raises:
            Refusal: When the queue is full, or they wait too long.
            WorkerLost: When the process that had one of them was lost.
            JobFailed: When one could not be computed.
        """
        if len(self._waiting) + len(pictures) > self._limits.queue:
            raise Refusal(
                503,
                f"{len(self._waiting)} pictures are waiting already; try again later, or send fewer at a time.",
                retry_after=self._wait_ahead(),
            )
        loop = asyncio.get_running_loop()
        mine = [_Waiting(kind, model, data, top, loop.create_future()) for data in pictures]
        self._waiting += mine
        self._note_queue()
        self._came.set()
        try:
            async with asyncio.timeout(self._limits.seconds):
                return [await each.answer for each in mine]
        except TimeoutError:
            raise Refusal(
                503,
                f"no answer within {self._limits.seconds:g} s; try again later, or send fewer at a time.",
                retry_after=self._wait_ahead(),
            ) from None
        finally:
            for each in mine:
                each.answer.cancel()
            left = set(mine)
            self._waiting = [each for each in self._waiting if each not in left]
            self._note_queue()

    async def _take_turns(self) -> None:
        while True:
            await self._came.wait()
            batch = self._take()
            if batch:
                await self._answer(batch)

    def _take(self) -> list[_Waiting]:
        """Return the next batch: the picture that has waited longest, and others for the same model."""
        if not self._waiting:
            self._came.clear()
            return []
        first, *others = self._waiting
        most = self._compute.models[first.model].batch
        batch = [first, *[each for each in others if each.goes_with(first)][: most - 1]]
        taken = set(batch)
        self._waiting = [each for each in others if each not in taken]
        self._note_queue()
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        first = batch[0]
        job = Job(first.kind, first.model, [each.data for each in batch], max(each.top for each in batch))
        began = asyncio.get_running_loop().time()
        try:
            answers = await self._compute.ask(job)
        except Exception as problem:
            for each in batch:
                if not each.answer.done():
                    each.answer.set_exception(problem)
                    each.answer.exception()  # seen here, too: a request with several pictures looks at one
            return
        taken = asyncio.get_running_loop().time() - began
        self._pace += SMOOTH * (taken / len(batch) - self._pace)
        unreadable = sum(isinstance(answer, Unreadable) for answer in answers)
        self._metrics.note_batch(first.model, first.kind, len(batch), unreadable, taken)
        for each, answer in zip(batch, answers, strict=True):
            if not each.answer.done():
                each.answer.set_result(_shortened(answer, each.top))

    def _wait_ahead(self) -> int:
        """Return the seconds that what is waiting will take, at least one."""
        return min(max(1, math.ceil(len(self._waiting) * self._pace)), 60)

    def _note_queue(self) -> None:
        self._metrics.queue.set(len(self._waiting))


def _shortened(answer: Answer | Unreadable, top: int) -> Answer | Unreadable:
    """Return an answer with as many classes as its own request asked for."""
    return answer._replace(labels=answer.labels[:top]) if isinstance(answer, Answer) else answer
