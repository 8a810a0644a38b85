"""The pictures of a request, read within the limits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from vitrail.serving.limits import HELD_BYTES, Limits, Refusal

FORM = "multipart/form-data"
RAW = ("application/octet-stream", "application/x-www-form-urlencoded")
"""Beside image/*, a body that is the picture itself. The second one is what `curl --data-binary` says of any file."""
SPILL = 2
"""Times the allowed size up to which a body is read, and let go, before it is refused: many clients do not look for an
answer before they have sent all, and find the connection broken. Those that send `Expect` do."""
GONE = 499
"""What nginx writes down for a client that went away; nobody is there to read it."""


class Upload(NamedTuple):
    """A picture as it came."""

    name: str
    """Of its file; empty where none was told."""
    data: bytes


class Reader:
    """Reads requests, each within its limits and all together within the memory granted."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    @asynccontextmanager
    async def pictures(self, request: Request) -> AsyncIterator[list[Upload]]:
        """Give the pictures of a request; their memory counts until the block ends.

        Raises:
            Refusal: When it breaks a limit, is of another type, or holds no picture.
        """
        body, counted = bytearray(), 0
        try:
            try:
                await self._read(request, body)
            finally:
                counted = len(body)
            yield await self._uploads(request, body)
        finally:
            self._held -= counted

    async def _read(self, request: Request, body: bytearray) -> None:
        most = self._limits.body_bytes
        too_large = Refusal(413, f"the body is larger than {most:,} bytes; send less at a time.", close=True)
        declared = request.headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdecimal()) or len(declared) > 15:
            raise Refusal(400, "Content-Length must be a number of bytes.", close=True)
        if int(declared) > (most if "expect" in request.headers else SPILL * most):
            raise too_large
        arrived = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    arrived += len(chunk)
                    if arrived > SPILL * most:
                        raise too_large
                    if arrived > most:
                        continue
                    if self._held + len(chunk) > HELD_BYTES:
                        raise Refusal(503, "too many large requests at a time; try again.", retry_after=1, close=True)
                    body += chunk
                    self._held += len(chunk)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self._limits.body_seconds:g} s.", close=True) from None
        except ClientDisconnect:
            raise Refusal(GONE, "the client went away.") from None
        if arrived > most:
            raise too_large

    async def _uploads(self, request: Request, arrived: bytearray) -> list[Upload]:
        """Take a body apart; what arrived is let go, so that no second copy waits for the answer."""
        kind, body = _kind_of(request), bytes(arrived)
        arrived.clear()
        if not body:
            raise Refusal(400, "the request has no body; send a picture in it.")
        if kind != FORM:
            return [Upload("", body)]

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            again = Request(request.scope, replay)
            async with again.form(max_files=self._limits.pictures, max_fields=1, max_part_size=1024) as form:
                parts = [part for _, part in form.multi_items()]
                files = [part for part in parts if isinstance(part, UploadFile)]
                if len(files) != len(parts):
                    raise Refusal(400, "a form may hold nothing but files: curl -F image=@photo.jpg ...")
                uploads = [Upload(part.filename or "", await part.read()) for part in files]
        except HTTPException as problem:
            raise Refusal(400, f"the form cannot be read: {problem.detail}") from problem
        if not uploads:
            raise Refusal(400, "the form holds no file; send one: curl -F image=@photo.jpg ...")
        return uploads


def _kind_of(request: Request) -> str:
    """Return the media type of a request's body.

    Raises:
        Refusal: When pictures do not come in it.
    """
    kind = request.headers.get("content-type", RAW[0]).partition(";")[0].strip().lower()
    if kind == FORM or kind in RAW or kind.startswith("image/"):
        return kind
    raise Refusal(
        415,
        f"send the picture itself as the body (image/jpeg, image/png, ..., {RAW[0]}), or pictures as {FORM}, "
        f"not {kind[:100] or 'a body without a type'}.",
    )
