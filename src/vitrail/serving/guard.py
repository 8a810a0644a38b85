"""What stands before the routes: who may ask, and what every answer carries."""

import hmac
import ipaddress
from collections.abc import Collection, Sequence
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
            return problem(421, "this server answers under its own name only; --allow-host NAME lets in another.")
        if request.method == "POST" and request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return problem(403, "pages of other sites may not ask this server.")
        # Not of `request.url`, which a Host header with a path in it would change.
        if self._tokens and request.scope["path"] not in self._open:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            known = [hmac.compare_digest(given.strip().encode(), token) for token in self._tokens]
            if scheme.lower() != "bearer" or not any(known):
                return problem(401, "a token is needed: Authorization: Bearer TOKEN.", bearer=True)
        return None


def hosts_for(address: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the names that browsers may use for a server at an address; empty for any, where it is no loopback."""
    try:
        loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        loopback = address == "localhost"
    return ("localhost", "127.0.0.1", "[::1]", address, *allowed) if loopback else tuple(allowed)


def problem(
    status: int, detail: str, *, retry_after: int | None = None, close: bool = False, bearer: bool = False
) -> Response:
    """Return an answer as RFC 9457 has it."""
    headers = {"content-type": "application/problem+json"}
    if retry_after is not None:
        headers["retry-after"] = str(retry_after)
    if close:
        headers["connection"] = "close"
    if bearer:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse({"status": status, "detail": detail[0].upper() + detail[1:]}, status, headers)


def _name_of(host: str) -> str:
    """Return the name in a Host header, without the port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() and not name.endswith(":") else host).lower()
