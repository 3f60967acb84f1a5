"""A request's body as it arrives: no piece is copied together with another, and none is lost when the client is.

The one place that knows aiohttp's StreamReader from inside.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

# What a client may go on sending after it was refused, so that it comes to read the answer; then the line is cut.
_REFUSED_SIZE_MAX = 256 * 1024


async def pieces_of(request: web.BaseRequest) -> AsyncIterator[bytes]:
    """The body; the client is told to send it only now, if it asked (RFC 9110 section 10.1.1).

    Raises:
        ConnectionError: the client is gone.
        RequestPayloadError: what it sends is not HTTP. In both cases what had arrived was given before.
    """
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
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
    content = request.content
    size = 0
    while not content.at_eof():
        piece, _ = await content.readchunk()
        size += len(piece)
        if size > _REFUSED_SIZE_MAX:
            return False
    return True
