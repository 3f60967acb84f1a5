"""One connection: aiohttp's, with short cuts: kept answers, bodies that a thread reads from the socket, answers that one writes.

The first two rest on knowing that aiohttp's parser has no part of a message: what it was given so far were whole requests, to the
byte. From the first read on of which that cannot be said, the connection is aiohttp's alone.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from aiohttp.http_parser import HttpRequestParser
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestPayloadError

from registry.http_limits import LimitedConnection, Server
from registry.socket_body import SocketBody
from registry.socket_sink import SocketSink

if TYPE_CHECKING:
    from registry.middleware import Dispatch

_UPLOADS = (b"PUT /v2/", b"PATCH /v2/", b"POST /v2/")
_END_OF_HEAD = b"\r\n\r\n"
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n", re.IGNORECASE)
_FRAMING = re.compile(rb"\r\n(?:content-length|transfer-encoding|upgrade)[ \t]*:", re.IGNORECASE)
# A smaller body is there before a thread has begun to wait for it.
_HELD_SIZE_MIN = 512 * 1024


class Connection(LimitedConnection):
    """A connection of our server.

    Attributes:
        memorable: the name (`AnswerMemo.name`) of the request that is being answered, where its answer may be kept.
    """

    __slots__ = ("_body_left", "_dispatch", "_held", "_held_size", "_is_between", "_sink", "memorable")

    def __init__(
        self,
        server: Server,
        dispatch: Dispatch,
        *,
        loop: asyncio.AbstractEventLoop,
        **arguments: Any,  # noqa: ANN401 - aiohttp's
    ) -> None:
        super().__init__(server, loop=loop, **arguments)
        self._dispatch = dispatch
        self.memorable: bytes | None = None
        # The parser is between two messages, or will be after `_body_left` more bytes.
        self._is_between = True
        self._body_left = 0
        # What was read of a body that aiohttp has not been shown yet; None while there is no such body.
        self._held: bytes | None = None
        self._held_size: int | None = None
        self._sink: SocketSink | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        # Nobody watches from here on whether the client takes anything.
        if self._sink is not None:
            self._sink.interrupt()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_between or not data:
            super().data_received(data)
        elif self._body_left:
            self._body_left -= len(data)
            self._is_between = self._body_left >= 0
            super().data_received(data)
        else:
            self._begin(data)

    def _begin(self, data: bytes) -> None:
        """`data` begins with a new request."""
        self.memorable = None
        name = self._dispatch.memo.name(data)
        if name is not None:
            if self._is_waiting():
                if self._give_kept_answer(name):
                    return
                self.memorable = name
            super().data_received(data)
            return
        end = data.find(_END_OF_HEAD) + len(_END_OF_HEAD)
        head, rest = data[:end], data[end:]
        self._is_between = False
        if end >= len(_END_OF_HEAD) and head.startswith(_UPLOADS) and len(_FRAMING.findall(head)) == 1:
            length = _CONTENT_LENGTH.search(head)
            size = int(length[1]) if length is not None else None
            left = -1 if size is None else size - len(rest)
            if size is not None and left >= 0 and size < _HELD_SIZE_MIN:
                self._is_between, self._body_left = True, left
            elif (
                (left > 0 or self._is_open_chunked(head, rest)) and self._is_waiting() and not self._is_tls()
            ):
                self._hold(rest, size)
                data = head
        super().data_received(data)

    @staticmethod
    def _is_open_chunked(head: bytes, rest: bytes) -> bool:
        """A body in chunks, of which more is likely to come: the small ones that clients send are all here."""
        return _CHUNKED.search(head) is not None and not rest.endswith(b"0\r\n\r\n")

    def _is_tls(self) -> bool:
        return self.ssl_context is not None

    # Kept answers

    def _is_waiting(self) -> bool:
        """aiohttp has answered everything and waits; what was sent has left."""
        return (
            self._waiter is not None
            and not self._messages
            and not self._close
            and not self._force_close
            and not self.is_retired
            and self.transport is not None
            and self.transport.get_write_buffer_size() == 0
        )

    def _give_kept_answer(self, name: bytes) -> bool:
        memo = self._dispatch.memo
        answer = memo.find(name)
        if answer is None:
            return False
        identity = secrets.token_hex(8)
        assert self.transport is not None
        self.transport.write(memo.render(answer, identity))
        # The clocks start anew, as after an answer of aiohttp's own.
        self.head_since = None
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        self._dispatch.count_kept_answer(answer, identity, self.peername)
        return True

    # Bodies that a thread reads

    def _hold(self, rest: bytes, size: int | None) -> None:
        """Show aiohttp the head alone, and read nothing more, until it is known who reads the body."""
        self._held, self._held_size = rest, size
        self._reading_paused = True
        self._pause_transport_reading()

    def take_body(self) -> SocketBody | None:
        """The body of the request that is being answered, for a thread to read; None where aiohttp has it.

        Whoever takes it gives it back, with `give_back`, before the answer is sent.
        """
        if self._held is None or self.transport is None:
            return None
        connection = self.transport.get_extra_info("socket")
        body = SocketBody(connection, self._held, self._held_size, idle_s=self._server.limits.bodyidletimeout)
        self._held = None
        return body

    def give_back(self, body: SocketBody, content: StreamReader) -> None:
        """Go on with the next request, if all of the body was read; close after the answer otherwise.

        Args:
            content: aiohttp's idea of the body, which has seen nothing of it.
        """
        beyond = body.close()
        content.feed_eof()
        self._reading_paused = False
        if not body.is_whole or beyond or self.transport is None:
            self.close()
            return
        self._parser = HttpRequestParser(
            self,
            self._loop,
            self._read_bufsize,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=self._max_msg_queue_size,
        )
        self._is_between, self._body_left = True, 0
        self._resume_transport_reading()

    def release_body(self) -> None:
        """Let aiohttp read the body after all."""
        if self._held is None:
            return
        rest, self._held = self._held, None
        if self._held_size is not None:
            self._is_between, self._body_left = True, self._held_size - len(rest)
        if self.transport is None:
            return
        self._reading_paused = False
        if rest:
            super().data_received(rest)
        if not self._reading_paused and not self._buffer_paused:
            self._resume_transport_reading()

    # Answers that a thread writes

    @asynccontextmanager
    async def sink(self) -> AsyncIterator[SocketSink | None]:
        """Where a thread may write what follows of the answer whose head was sent; None where it must go by way of aiohttp.

        Nothing is read until the end of the block: whatever the client asks for next can wait, and must not be answered in between.

        Raises:
            ConnectionError: the client is gone.
        """
        if self._is_tls():
            yield None
            return
        await self._wait_until_sent()
        transport = self.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        was_reading, was_in_head = transport.is_reading(), self.head_since is not None
        transport.pause_reading()
        self.head_since = None
        self._sink = SocketSink(transport.get_extra_info("socket"))
        try:
            yield self._sink
        finally:
            self._sink.close()
            self._sink = None
            if was_in_head:
                self.head_since = self._loop.time()
            if was_reading:
                transport.resume_reading()

    async def _wait_until_sent(self) -> None:
        """Until the kernel has all that was written.

        Raises:
            ConnectionError: the client is gone.
        """
        if self.transport is None or self.transport.get_write_buffer_size() == 0:
            return
        self.transport.set_write_buffer_limits(0)
        try:
            await self._drain_helper()
        finally:
            if self.transport is not None:
                self.transport.set_write_buffer_limits()
