"""From models to a server that runs until it is asked to stop: `serve`."""

import asyncio
import errno
import logging
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitrail.engines import EngineName, require_engine
from vitrail.errors import UserError
from vitrail.serving.app import State, create_app
from vitrail.serving.guard import hosts_for
from vitrail.serving.jobs import ModelFacts, Setup
from vitrail.serving.limits import HEAD_SECONDS, Limits
from vitrail.serving.supervisor import Supervisor

log = logging.getLogger("vitrail")

LINGER = 1.0
"""Seconds between a signal to stop and the end of listening: what is on its way by then is answered."""
IDLE_SECONDS = 15
"""After which a connection without a request is closed; proxies keep theirs open about as long."""


def serve(
    models: Mapping[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: EngineName = "auto",
    limits: Limits | None = None,
    tokens: Sequence[str] = (),
    allow_hosts: Sequence[str] = (),
    on_ready: Callable[[str, Mapping[str, ModelFacts]], None] = lambda url, models: None,
) -> None:
    """Answer over HTTP until SIGTERM or SIGINT; then finish what has been asked, and return.

    Args:
        models: Name of each model -> what `load_model` takes.
        host: Address to listen at; by default this machine alone can ask.
        port: Port; 0 for any that is free.
        engine: What computes the answers; see `vitrail.engines`.
        limits: What is granted to requests.
        tokens: One of them must come with each request for answers, where there are any.
        allow_hosts: Further names under which browsers may ask; at a loopback address others are refused.
        on_ready: Called with the address and the models once requests are taken.

    Raises:
        UserError: When a model cannot be loaded, the engine cannot take it, or the address cannot be had.
    """
    require_engine(engine)
    limits = limits or Limits()
    with _listen(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}"
        supervisor = Supervisor(Setup(dict(models), engine, limits.pixels), limits.seconds)
        state = State(supervisor, limits, tokens=tokens, hosts=hosts_for(host, allow_hosts))
        supervisor.on_loss = state.metrics.losses.inc
        asyncio.run(_run(supervisor, state, listener, lambda: on_ready(url, supervisor.models)))


def model_names(sources: Sequence[str]) -> dict[str, str]:
    """Return names for models: NAME=SOURCE says it, else the last part of a source that tells models apart.

    Raises:
        UserError: When two have the same one.
    """
    named: dict[str, str] = {}
    for given in sources:
        name, equals, source = given.partition("=")
        if not equals or Path(given).exists() or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            name, source = _short_name(given), given
        if name in named:
            raise UserError(f"two models are called {name}; name them: vitrail serve NAME=MODEL NAME=MODEL.")
        named[name] = source
    return named


def _short_name(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        path = path.resolve()
        path = path.parent if path.name in ("best", "last") else path  # of a run
        name = path.name
    else:
        name = path.stem if path.suffix in (".npz", ".safetensors", ".pth", ".pt", ".bin", ".index") else path.name
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


async def _run(supervisor: Supervisor, state: State, listener: socket.socket, on_ready: Callable[[], None]) -> None:
    try:
        await supervisor.start()
        config = uvicorn.Config(
            create_app(state),
            http=_Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(state.limits.body_seconds + state.limits.seconds),
        )
        await _Server(config, state, on_ready).serve([listener])
    finally:
        await supervisor.stop()


class _Server(uvicorn.Server):
    """A server that goes on listening for a moment after the signal to stop, and says by `/ready` that it stops."""

    def __init__(self, config: uvicorn.Config, state: State, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._state, self._on_ready = state, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._state.draining or not self.started:  # asked twice, or before the first request: at once
            self.should_exit = self.force_exit = True
            return
        self._state.draining = True
        self._loop.call_soon_threadsafe(self._loop.call_later, LINGER, self._stop)

    def _stop(self) -> None:
        self.should_exit = True


class _Protocol(H11Protocol):
    """HTTP/1.1 with deadlines for the head of a request, and for a body that nobody waits for; uvicorn has none."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._unwanted():
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE and not self._unwanted():
            self._forget()  # the head is here, or nothing more will be read
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unwanted(self) -> bool:
        """Whether the client still sends the body of a request that has been answered; uvicorn waits for its end."""
        return self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port must be 0 to 65535, not {port}.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is taken; choose another with --port, 0 for any.") from problem
        raise UserError(f"cannot listen at {host}, port {port}: {problem.strerror or problem}.") from problem
