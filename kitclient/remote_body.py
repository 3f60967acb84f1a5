"""A blob's bytes over HTTP: a connection that breaks is replaced by another that goes on where it broke."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
from yarl import URL

from kitclient.errors import RegistryUnreachable, ServerMisbehaved, TransportRefused
from kitclient.socket_pieces import take_socket
from kitclient.transport import IDLE_TIMEOUT_S, Transport
from kitspec.errors import BlobUnknown, RangeInvalid
from kitspec.http_fields import ByteSpan

_CONTENT_RANGE = re.compile(
    r"bytes (?P<first>[0-9]{1,18})-(?P<last>[0-9]{1,18})/(?P<size>[0-9]{1,18})", re.ASCII
)
# A server that breaks every connection after a few bytes is not one that makes progress.
_PROGRESS_SIZE = 1024 * 1024


@asynccontextmanager
async def open_body(
    transport: Transport, url: URL, scope: str, span: ByteSpan | None
) -> AsyncIterator[RemoteBody]:
    """The bytes of a blob, or of a span of it.

    Raises:
        BlobUnknown, RangeInvalid: as the registry says.
        ServerMisbehaved: it does not say how many bytes there are, or sends others than were asked for.
    """
    body = RemoteBody(transport, url, scope)
    try:
        await body.open(span)
        yield body
    finally:
        await body.close()


class RemoteBody:
    """Given out by `open_body`."""

    def __init__(self, transport: Transport, url: URL, scope: str) -> None:
        self._transport = transport
        self._url = url
        self._scope = scope
        self._span = ByteSpan(0, 0)
        self._connection = AsyncExitStack()
        self._answer: aiohttp.ClientResponse | None = None
        self._skip = 0
        self._received: AsyncGenerator[bytes, None] | None = None

    @property
    def size(self) -> int:
        return self._span.size

    async def open(self, span: ByteSpan | None) -> None:
        """Ask for the bytes and learn how many there are."""
        size = await self._connect(
            span.start if span is not None else 0, span.stop if span is not None else None
        )
        if span is not None and span.start >= min(size, span.stop):
            raise RangeInvalid(f"{span} does not begin inside the {size} bytes of the blob", size=size)
        self._span = ByteSpan(0, size) if span is None else ByteSpan(span.start, min(span.stop, size))

    async def close(self) -> None:
        self._answer = None
        if self._received is not None:
            await self._received.aclose()  # who stops early leaves no thread behind that waits for bytes
        await self._connection.aclose()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        position, stop = self._span.start, self._span.stop
        breaks, progress = 0, position
        while position < stop:
            try:
                if self._answer is None:
                    await self._connect(position, stop)
                async for piece in self._pieces(stop - position):
                    position += len(piece)
                    yield piece
                self._check_whole(position)
            except RegistryUnreachable as error:
                await self.close()
                breaks = 1 if position - progress >= _PROGRESS_SIZE else breaks + 1
                progress = position
                if isinstance(error, TransportRefused) or breaks >= self._transport.retry.tries:
                    raise
                await self._transport.retry.sleep(self._transport.retry.pause_s(breaks))

    def _check_whole(self, position: int) -> None:
        if position < self._span.stop:
            raise RegistryUnreachable(
                f"{self._transport.host} ended a blob after {position} of {self._span.stop} bytes"
            )

    async def _connect(self, start: int, stop: int | None) -> int:
        """Ask for bytes from `start` on; the size of the whole blob."""
        headers = {}
        if start > 0 or stop is not None:
            headers["Range"] = f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"
        request = self._transport.request(
            "GET", self._url, scope=self._scope, headers=headers, missing=(BlobUnknown,)
        )
        answer = await self._connection.enter_async_context(request)
        if answer.status == 206:
            match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if match is None or int(match["first"]) != start:
                raise ServerMisbehaved(
                    f"{self._transport.host} sent other bytes of a blob than were asked for"
                )
            self._answer, self._skip = answer, 0
            return int(match["size"])
        if answer.status != 200 or answer.content_length is None:
            raise ServerMisbehaved(f"{self._transport.host} does not say how many bytes a blob has")
        # A server may ignore a Range: what comes before the span is read past.
        self._answer, self._skip = answer, start
        return answer.content_length

    async def _pieces(self, left: int) -> AsyncIterator[bytes]:
        assert self._answer is not None
        answer = self._answer
        taken = take_socket(answer, idle_s=IDLE_TIMEOUT_S)
        received = self._received = None if taken is None else taken.pieces()
        try:
            async for chunk in answer.content.iter_any() if received is None else received:
                piece = chunk
                if self._skip:
                    piece = chunk[self._skip :]
                    self._skip -= len(chunk) - len(piece)
                if len(piece) >= left:
                    if piece:
                        yield piece[:left]
                    return
                if piece:
                    left -= len(piece)
                    yield piece
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._transport.translate(error, answer.url) from error
        finally:
            if received is not None:
                await received.aclose()
                answer.close()
