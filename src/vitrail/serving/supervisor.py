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
from vitrail.serving.jobs import Answers, Compute, Failed, Job, JobFailed, JobUnfit, Ready, Setup, Unfit, WorkerLost

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
            seconds: That a job may take, from when those before it are answered. A worker that needs longer is taken
                for stuck, and killed.
        """
        self._setup, self._seconds = setup, seconds
        self._worker: _Worker | None = None
        self._here = asyncio.Event()
        self._sending = asyncio.Lock()
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Answers | Failed | Unfit]] = {}  # in the order of the pipe
        self._timed: int | None = None  # the job that the worker is at
        self._timer: asyncio.TimerHandle | None = None
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
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        try:
            while not await self._sent(number, job, answer):
                await self._here.wait()
            found = await answer
        finally:
            self._waiting.pop(number, None)
            self._watch()
        if isinstance(found, Failed):
            raise JobFailed(found.reason)
        if isinstance(found, Unfit):
            raise JobUnfit(found.reason)
        return found

    async def _sent(self, number: int, job: Job, answer: asyncio.Future[Answers | Failed | Unfit]) -> bool:
        """Hand a job to the worker, unless there is none that is ready."""
        async with self._sending:
            if self._worker is None or not self.ready:  # the next one loads: this job's time would run meanwhile
                return False
            self._waiting[number] = answer
            self._watch()
            with suppress(OSError):  # it is gone: whoever reads from it finds out, and tells
                await asyncio.to_thread(self._worker.connection.send, (number, job))
        return True

    def _watch(self) -> None:
        """Let the time of the job that the worker is at begin, if it has not."""
        number = next(iter(self._waiting), None)
        if number == self._timed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timed, self._timer = number, None
        if number is not None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._give_up, self._waiting[number])

    def _give_up(self, answer: asyncio.Future[Answers | Failed | Unfit]) -> None:
        if not answer.done():
            answer.set_exception(WorkerLost(f"it took longer than {self._seconds:g} s and was stopped"))
        if self._worker is not None:
            self._here.clear()
            self._worker.process.kill()

    async def _keep(self) -> None:
        """Take the worker's answers; when it is lost, say so to those who wait, and start another."""
        while not self._stopping:
            await asyncio.sleep(PAUSES[min(self._failures, len(PAUSES) - 1)])
            try:
                worker = self._worker or await self._begin()
                await asyncio.to_thread(self._read, worker.connection, asyncio.get_running_loop())
                await self._bury(worker)
            except Exception as problem:  # whatever: where memory lacks, so do processes and threads
                self._failures += 1
                log.error("the worker could not be replaced: %s", problem)

    async def _bury(self, worker: _Worker) -> None:
        self._worker = None
        self._here.clear()
        worker.process.kill()  # it may be alive, but have said what cannot be read
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(WorkerLost("it crashed"))
        self._waiting.clear()
        self._watch()
        if not self._stopping:
            self.on_loss()
        async with self._sending:  # of others, which fails now
            worker.connection.close()
        await asyncio.to_thread(worker.process.join)
        if not self._stopping:
            log.warning("the worker process was lost (exit code %s); another one starts", worker.process.exitcode)

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """Take answers until the worker is gone; in a thread."""
        try:
            while True:
                loop.call_soon_threadsafe(self._resolve, *connection.recv())
        except (EOFError, OSError):
            pass
        except Exception as problem:
            log.error("the worker's answer cannot be read: %s", problem)

    def _resolve(self, number: int, found: Answers | Failed | Unfit) -> None:
        answer = self._waiting.pop(number, None)
        if answer is not None and not answer.done():
            answer.set_result(found)
        self._watch()

    async def _begin(self) -> _Worker:
        """Start a worker and wait until it is ready."""
        connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # forking a process with threads is unsafe
        process = context.Process(target=_work, args=(theirs, self._setup), daemon=True, name="vitrail worker")
        with theirs:
            try:
                process.start()
            except BaseException:
                connection.close()
                raise
        worker = self._worker = _Worker(process, connection)
        try:
            said = await asyncio.to_thread(connection.recv)
        except Exception as problem:  # the end of the pipe, mostly
            said = Failed(f"it ended before it was ready ({type(problem).__name__})")
        if not isinstance(said, Ready):
            self._worker = None
            process.kill()
            connection.close()
            await asyncio.to_thread(process.join)
            raise UserError(said.reason)
        self.models, self.ahead, self._failures = said.models, said.ahead, 0
        self._here.set()
        return worker


def _work(connection: Connection, setup: Setup) -> None:
    """Begin in the new process: torch is imported there only."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s worker: %(message)s")
    from vitrail.serving.worker import work

    work(connection, setup)
