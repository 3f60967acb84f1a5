"""The rest of a large answer, read from its socket by a thread.

By way of aiohttp every byte is copied once more by its parser, and the event loop and the threads that hash and write pass the
interpreter's lock to and fro: a third of the time of a pull. Here the next piece is received while the last one is used.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import suppress

import aiohttp

from kitclient.pipeline import own_threads

# Each piece passes between threads five times: by 1 MiB an unpack of 1 GiB took 2.5 s, by 4 MiB 1.8 s.
_PIECE_SIZE = 4 * 1024 * 1024
# A smaller answer is here before a thread has begun to wait for it.
_SIZE_MIN = 8 * 1024 * 1024


class SocketPieces:
    """
    Args:
        connection: nobody else reads from it any more.
        first: what was read already.
        left: bytes that are still to come.
        idle_s: how long the other side may be silent.
    """

    def __init__(self, connection: socket.socket, first: bytes, left: int, *, idle_s: float) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._socket.setblocking(True)
        timeout = struct.pack("ll", int(idle_s), int(idle_s % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._first = first
        self._left = left

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """
        Raises:
            TimeoutError: the other side was silent for too long.
        """
        loop = asyncio.get_running_loop()
        with self._socket, own_threads(1, "receive") as threads:
            coming = loop.run_in_executor(threads, self._receive)
            try:
                if self._first:
                    yield self._first
                while piece := await asyncio.shield(coming):
                    coming = loop.run_in_executor(threads, self._receive)
                    yield piece
            finally:
                if not coming.done():
                    with suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)
                    await asyncio.wait([coming])
                if not coming.cancelled():
                    coming.exception()  # seen: what it says now comes too late to matter

    def _receive(self) -> bytes:
        """The next piece; empty at the end, also at one that comes too early."""
        try:
            piece = self._socket.recv(min(_PIECE_SIZE, self._left), socket.MSG_WAITALL) if self._left else b""
        except BlockingIOError as error:
            raise TimeoutError("the registry was silent for too long") from error
        self._left -= len(piece)
        return piece


def take_socket(answer: aiohttp.ClientResponse, *, idle_s: float) -> SocketPieces | None:
    """Take an answer's body from aiohttp, where it is large and comes as it is; None otherwise.

    The connection cannot be used for another request: whoever took it closes the answer.
    """
    connection, size = answer.connection, answer.content_length
    if (
        connection is None
        or connection.transport is None
        or connection.protocol is None
        or connection.protocol._reading_paused  # its parser may hold what nobody has seen
        or connection.transport.get_extra_info("sslcontext") is not None
        or size is None
        or size - answer.content.total_bytes < _SIZE_MIN
        or "Transfer-Encoding" in answer.headers
        or "Content-Encoding" in answer.headers
        or not hasattr(socket, "MSG_WAITALL")
        or os.name != "posix"
    ):
        return None
    transport = connection.transport
    assert isinstance(transport, asyncio.Transport)
    first: bytes = answer.content._read_nowait(-1)
    # Last: what was just read may have made aiohttp ask for more. Nothing comes before the loop turns.
    transport.pause_reading()
    left = size - answer.content.total_bytes
    return SocketPieces(transport.get_extra_info("socket"), first, left, idle_s=idle_s)
