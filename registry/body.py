"""A request's body as it arrives: no piece is copied together with another, and none is lost when the client is.

The one place that knows aiohttp's StreamReader from inside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from registry.connection import Connection
from registry.upload_sessions import Chunks

RECEIVED = web.RequestKey("registry.received", int)
"""Key of a request: bytes of its body that aiohttp did not see."""

# What a client may go on sending after it was refused, so that it comes to read the answer; then the line is cut.
_REFUSED_SIZE_MAX = 256 * 1024


@asynccontextmanager
async def upload_of(request: web.BaseRequest, slots: Slots) -> AsyncIterator[Chunks]:
    """The body of an upload, in the form that is cheapest to store.

    Args:
        slots: how many bodies threads may read at once; the others come by way of the event loop.
    """
    connection = request.protocol
    body = connection.take_body() if isinstance(connection, Connection) and slots.is_free else None
    if body is None:
        yield pieces_of(request)
        return
    assert isinstance(connection, Connection)
    slots.taken += 1
    try:
        _ask_for_body(request)
        yield body
    finally:
        slots.taken -= 1
        request[RECEIVED] = body.received
        connection.give_back(body, request.content)


class Slots:
    """Bodies that threads are reading, of as many as there may be."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.taken = 0

    @property
    def is_free(self) -> bool:
        return self.taken < self._count


def _ask_for_body(request: web.BaseRequest) -> None:
    """Tell the client to send the body, if it waits for that (RFC 9110 section 10.1.1)."""
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def pieces_of(request: web.BaseRequest) -> AsyncIterator[bytes]:
    """The body, by way of the event loop.

    Raises:
        ConnectionError: the client is gone.
        RequestPayloadError: what it sends is not HTTP. In both cases what had arrived was given before.
    """
    if isinstance(request.protocol, Connection):
        request.protocol.release_body()
    _ask_for_body(request)
    content = request.content
    while not content.at_eof():
        try:
            # Not iter_any(): that joins what has gathered, which is a copy into fresh pages for every byte.
            piece, _ = await content.readchunk()
        except (ConnectionError, RequestPayloadError):
            # aiohttp raises as soon as it knows, whatever it still holds.
            rest: bytes = content._read_nowait(-1)
            if rest:
                yield rest
            raise
        if piece:
            yield piece


async def discard(request: web.BaseRequest) -> bool:
    """Read a little of what is left of the body of a refused request; whether that was all."""
    if isinstance(request.protocol, Connection):
        request.protocol.release_body()
    content = request.content
    size = 0
    while not content.at_eof():
        piece, _ = await content.readchunk()
        size += len(piece)
        if size > _REFUSED_SIZE_MAX:
            return False
    return True
