"""The other end of the pipe: keeps a worker running, and hands it jobs."""

import asyncio
import logging
import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from vitrail.errors import UserError
from vitrail.serving.jobs import Answers, Compute, Failed, Job, JobFailed, Ready, Setup, WorkerLost

log = logging.getLogger("vitrail")

PATIENCE = 3
"""Attempts to replace a worker, one after the other, after which the server calls itself unhealthy."""
PAUSES = (0.0, 1.0, 5.0, 15.0)
"""Seconds before each attempt; the last one counts for all that follow."""


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class Supervisor(Compute):
    """A worker process, replaced whenever it is lost. Used in one event loop."""

    def __init__(self, setup: Setup, seconds: float) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            setup: What the worker is told.
            seconds: That a job may take. A worker that needs longer is taken for stuck, and killed.
        """
        self._setup, self._seconds = setup, seconds
        self._worker: _Worker | None = None
        self._here = asyncio.Event()
        self._sending = asyncio.Lock()
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Answers | Failed]] = {}
        self._failures = 0
        self._keeper: asyncio.Task[None] | None = None
        self._stopping = False
        self.on_loss: Callable[[], None] = lambda: None
        """Called whenever a worker is lost."""

    @property
    def ready(self) -> bool:
        return self._here.is_set()

    @property
    def healthy(self) -> bool:
        return self.ready or self._failures < PATIENCE

    async def start(self) -> None:
        """Start the first worker.

        Raises:
            UserError: When it cannot begin, with its own words.
        """
        await self._begin()
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        """End the worker, whatever it does."""
        self._stopping = True
        if self._keeper is not None:
            self._keeper.cancel()
        if self._worker is not None:
            self._worker.process.kill()
            await asyncio.to_thread(self._worker.process.join)

    async def ask(self, job: Job) -> Answers:
        while True:
            await self._here.wait()
            async with self._sending:
                if (worker := self._worker) is None:
                    continue
                number = next(self._numbers)
                answer = self._waiting[number] = asyncio.get_running_loop().create_future()
                with suppress(OSError):  # it is gone: whoever reads from it finds out, and tells
                    await asyncio.to_thread(worker.connection.send, (number, job))
            break
        try:
            async with asyncio.timeout(self._seconds):
                found = await answer
        except TimeoutError:
            worker.process.kill()
            raise WorkerLost(f"it took longer than {self._seconds:g} s and was stopped") from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(found, Failed):
            raise JobFailed(found.reason)
        return found

    async def _keep(self) -> None:
        """Take the worker's answers; when it is lost, say so to those who wait, and start another."""
        while True:
            if self._worker is not None:
                await asyncio.to_thread(self._read, self._worker.connection, asyncio.get_running_loop())
                await self._bury(self._worker)
            if self._stopping:
                return
            await asyncio.sleep(PAUSES[min(self._failures, len(PAUSES) - 1)])
            try:
                await self._begin()
            except UserError as problem:
                self._failures += 1
                log.error("the worker could not be replaced: %s", problem)

    async def _bury(self, worker: _Worker) -> None:
        self._worker = None
        self._here.clear()
        await asyncio.to_thread(worker.process.join)
        worker.connection.close()
        if not self._stopping:
            log.warning("the worker process was lost (exit code %s); another one starts", worker.process.exitcode)
            self.on_loss()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(WorkerLost("it crashed"))

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Take answers until the worker is gone; in a thread."""
        with suppress(EOFError, OSError):
            while True:
                loop.call_soon_threadsafe(self._resolve, *connection.recv())

    def _resolve(self, number: int, found: Answers | Failed) -> None:
        answer = self._waiting.get(number)
        if answer is not None and not answer.done():
            answer.set_result(found)

    async def _begin(self) -> None:
        """Start a worker and wait until it is ready."""
        connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # forking a process with threads is unsafe
        process = context.Process(target=_work, args=(theirs, self._setup), daemon=True, name="vitrail worker")
        worker = self._worker = _Worker(process, connection)
        process.start()
        theirs.close()
        try:
            said = await asyncio.to_thread(connection.recv)
        except (EOFError, OSError):
            said = Failed("it ended before it was ready")
        if not isinstance(said, Ready):
            self._worker = None
            process.kill()
            await asyncio.to_thread(process.join)
            raise UserError(said.reason)
        self.models, self.ahead = said.models, said.ahead
        self._worker, self._failures = worker, 0
        self._here.set()


def _work(connection: Connection, setup: Setup) -> None:
    """Begin in the new process: torch is imported there only."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s worker: %(message)s")
    from vitrail.serving.worker import work

    work(connection, setup)
