"""An answer's bytes, written to the client's socket by the thread that reads them from the store.

By way of the event loop each piece is made anew, handed over once and written then, while nothing is read. Here one buffer
goes back and forth between two calls of the kernel (docs/adr/0015-s3.md has the measurement), and the loop sees nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket


class SocketSink:
    """A BlockingSink. It has no clock of its own: who is too slow is found by those of registry/http_limits.py.

    Args:
        connection: to the client; nobody else writes to it until `close`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        # For the event loop's descriptor too, which is so already.
        self._socket.setblocking(False)
        self._room = select.poll()
        self._room.register(self._socket, select.POLLOUT)
        self.sent = 0
        """Bytes that the kernel took."""

    def write(self, content: memoryview, /) -> None:
        """
        Raises:
            ConnectionError: the client is gone, or was cut off.
        """
        while content:
            try:
                count = self._socket.send(content)
            except BlockingIOError:
                self._room.poll()
            except OSError as error:
                raise ConnectionResetError("the client is gone") from error
            else:
                self.sent += count
                content = content[count:]

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):  # of a client that is gone
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the connection back to the event loop."""
        self._socket.close()
