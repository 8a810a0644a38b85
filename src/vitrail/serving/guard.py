"""What stands before the routes: who may ask, and what every answer carries."""

import asyncio
import hmac
import ipaddress
from collections.abc import Collection, Sequence
from contextlib import suppress
from time import perf_counter

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitrail.serving.metrics import Metrics

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names of a server that always are its own: the page of this machine, and a container's health check."""
PARTING_SECONDS = 5.0
"""For which the body of a refused request is read, and let go, before its connection is closed: many clients do not
look for an answer before they have sent all, and find the connection broken."""


class Guard:
    """Lets in who may ask, counts and times requests, and adds the headers of every answer."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        tokens: Sequence[str],
        hosts: Sequence[str],
        open_paths: Collection[str],
    ) -> None:
        """Stand before an application.

        Args:
            app: The application.
            metrics: Where requests are counted.
            tokens: One of them must come with a request, where there are any.
            hosts: Names under which browsers may ask; empty for any.
            open_paths: Paths that need no token.
        """
        self._app, self._metrics, self._hosts, self._open = app, metrics, hosts, open_paths
        self._tokens = [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics, began, status = self._metrics, perf_counter(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                carried = {name for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in carried]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        with metrics.in_flight.track_inprogress():
            try:
                refused = self._refuse(Request(scope))
                await (refused or self._app)(scope, receive, noting)
            finally:
                # The path itself may be anything; a route is one of a few.
                route = getattr(scope.get("endpoint"), "__name__", "none")
                metrics.requests.labels(route, str(status)).inc()
                metrics.seconds.labels(route).observe(perf_counter() - began)

    def _refuse(self, request: Request) -> Response | None:
        host = request.headers.get("host", "")
        if self._hosts and _name_of(host) not in self._hosts:
            # Another site can make its own name point here, and then read what it gets: DNS rebinding.
            said = "this server answers under its own name only; --allow-host NAME lets in another."
            return problem(421, said, unread=True)
        if request.method == "POST" and request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return problem(403, "pages of other sites may not ask this server.", unread=True)
        # Not of `request.url`, which a Host header with a path in it would change.
        if self._tokens and request.scope["path"] not in self._open:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            known = [hmac.compare_digest(given.strip().encode(), token) for token in self._tokens]
            if scheme.lower() != "bearer" or not any(known):
                return problem(401, "a token is needed: Authorization: Bearer TOKEN.", bearer=True, unread=True)
        return None


def hosts_for(address: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the names that browsers may use for a server at an address; empty for any, where it is no loopback.

    With further names allowed, those and the loopback's are the ones at any address. A port given with a name is let
    go, as that of a request is.
    """
    try:
        loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        loopback = address == "localhost"
    if not loopback and not allowed:
        return ()
    return (*LOOPBACK, *map(_allowed_name, [address, *allowed] if loopback else allowed))


class _Parting(JSONResponse):
    """The last answer on a connection, to a request whose body has not been read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(PARTING_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


def problem(
    status: int,
    detail: str,
    *,
    retry_after: int | None = None,
    close: bool = False,
    bearer: bool = False,
    unread: bool = False,
) -> Response:
    """Return an answer as RFC 9457 has it.

    Args:
        status: Of HTTP.
        detail: What is the matter, and what the client can do about it.
        retry_after: Seconds after which to ask again.
        close: Whether the connection ends with it, at once.
        bearer: Whether a token is asked for.
        unread: Whether the request's body has not been read; the connection then ends with the answer, too, once what
            is on its way has come, or `PARTING_SECONDS` are over.
    """
    headers = {"content-type": "application/problem+json"}
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    if close or unread:
        headers["connection"] = "close"
    if bearer:
        headers["www-authenticate"] = "Bearer"
    kind = _Parting if unread else JSONResponse
    return kind({"status": status, "detail": detail[0].upper() + detail[1:]}, status, headers)


def _allowed_name(given: str) -> str:
    """Return a name that a person gave as `_name_of` returns it of requests."""
    with suppress(ValueError):
        if ipaddress.ip_address(given).version == 6:
            return f"[{given.lower()}]"
    return _name_of(given)


def _name_of(host: str) -> str:
    """Return the name in a Host header, without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() and not name.endswith(":") else host).lower()
