"""A request's body, read from the socket by the thread that stores it.

Of the processor time that a push takes, a third is aiohttp's way of bringing a body: every byte is copied once more by the
parser, into memory that is given back at once, and the event loop and the storing thread pass the interpreter's lock to and
fro (docs/adr/0012-socket-bodies.md has the measurement). Here the kernel copies into a buffer that is used again and
again, and the loop sees nothing.

Framing is RFC 9112 sections 6.2 and 7.1. What cannot be read strictly is refused, and the connection ends with it.
"""

from __future__ import annotations

import os
import re
import socket
import struct

from kitspec.errors import BlobUploadInvalid

_SCRATCH_SIZE = 256 * 1024
# Chunks at least this long are received in place, smaller ones by way of the scratch.
_IN_PLACE_SIZE_MIN = 128 * 1024
_LINE_SIZE_MAX = 4096
_TRAILERS_SIZE_MAX = 8190
# Sixteen digits reach beyond 2**63; extensions are allowed and mean nothing to us.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\x21-\x7e \t]*)?")
_NO_TIMEOUT = struct.pack("ll", 0, 0)


class SocketBody:
    """A BlockingSource.

    Args:
        connection: of the client; nobody else reads from it until `close`.
        held: what was read of the body already.
        size: of the body; None for one in chunks.
        idle_s: how long the client may be silent.
    """

    def __init__(self, connection: socket.socket, held: bytes, size: int | None, *, idle_s: float) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._socket.setblocking(True)
        whole_s = int(idle_s)
        timeout = struct.pack("ll", whole_s, int((idle_s - whole_s) * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        self._scratch = memoryview(bytearray(max(_SCRATCH_SIZE, len(held))))
        self._scratch[: len(held)] = held
        self._start, self._stop = 0, len(held)
        self._is_chunked = size is None
        # Of the body, or of the chunk that is being read.
        self._left = size or 0
        self._is_first_chunk = True
        self.is_whole = size == 0
        self.received = 0
        """Bytes of the body that were given."""

    def read_into(self, buffer: memoryview, /) -> int:
        """
        Raises:
            ConnectionError: the client is gone, or silent for too long.
            BlobUploadInvalid: the chunks are not well-formed.
        """
        if not self._left and not self.is_whole:
            self._begin_chunk()
        if self.is_whole:
            return 0
        wanted = buffer[: self._left]
        count = self._take(wanted) or self._receive_content(wanted)
        self._left -= count
        self.received += count
        if not self._left and not self._is_chunked:
            self.is_whole = True
        return count

    def interrupt(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)

    def close(self) -> bytes:
        """Give the connection back to the event loop, with what was read beyond the body."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _NO_TIMEOUT)
        self._socket.setblocking(False)
        self._socket.close()
        return bytes(self._scratch[self._start : self._stop])

    def _begin_chunk(self) -> None:
        if not self._is_first_chunk and self._line() != b"":
            raise BlobUploadInvalid("a chunk of the body is longer than it says")
        self._is_first_chunk = False
        match = _CHUNK_LINE.fullmatch(self._line())
        if match is None:
            raise BlobUploadInvalid("the size of a chunk of the body cannot be read")
        self._left = int(match[1], 16)
        if not self._left:
            size = 0
            while line := self._line():
                size += len(line)
                if size > _TRAILERS_SIZE_MAX:
                    raise BlobUploadInvalid("the trailers of the body are too long")
            self.is_whole = True

    def _line(self) -> bytes:
        """The next line, without its end."""
        while True:
            window = bytes(self._scratch[self._start : min(self._stop, self._start + _LINE_SIZE_MAX)])
            end = window.find(b"\r\n")
            if end >= 0:
                self._start += end + 2
                return window[:end]
            if len(window) == _LINE_SIZE_MAX:
                raise BlobUploadInvalid("a line between the chunks of the body is too long")
            self._scratch[: len(window)] = window
            self._start, self._stop = 0, len(window)
            self._stop += self._receive(self._scratch[self._stop :])

    def _take(self, wanted: memoryview) -> int:
        """From what was read already."""
        count = min(len(wanted), self._stop - self._start)
        wanted[:count] = self._scratch[self._start : self._start + count]
        self._start += count
        return count

    def _receive_content(self, wanted: memoryview) -> int:
        if not self._is_chunked:
            return self._receive(wanted, socket.MSG_WAITALL)
        if len(wanted) >= _IN_PLACE_SIZE_MIN:
            return self._receive(wanted)
        self._start, self._stop = 0, self._receive(self._scratch)
        return self._take(wanted)

    def _receive(self, buffer: memoryview, flags: int = 0) -> int:
        try:
            count = self._socket.recv_into(buffer, 0, flags)
        except BlockingIOError as error:
            raise ConnectionResetError("the client was silent for too long") from error
        if count == 0:
            raise ConnectionResetError("the client is gone")
        return count
