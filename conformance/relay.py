"""A TCP relay before a registry: counts the bytes that really pass, and can break a connection off."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock, Thread

_CHUNK_SIZE = 64 * 1024
# Between two bytes; nobody that is measured waits that long.
_IDLE_TIMEOUT_S = 120


class Relay:
    """Passes connections to itself on to another address.

    Attributes:
        host: where it listens, as `host:port`.
        cut_after: bytes of the next connection's answers that still pass before it is broken off; None: all. Used once.
    """

    def __init__(self, upstream: str) -> None:
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = Lock()
        self._passed = 0
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None

    @property
    def passed(self) -> int:
        """Bytes of all connections so far, both ways: requests, heads of answers and bodies."""
        with self._lock:
            return self._passed

    @contextmanager
    def running(self) -> Iterator[None]:
        acceptor = Thread(target=self._accept, name="relay", daemon=True)
        acceptor.start()
        try:
            yield
        finally:
            # Closing alone does not wake who accepts.
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            acceptor.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                cut_after, self.cut_after = self.cut_after, None
                # A connection ends when one of its sides does; these threads outlive nothing that matters.
                Thread(target=self._connect, args=(client, cut_after), daemon=True).start()

    def _connect(self, client: socket.socket, cut_after: int | None) -> None:
        try:
            server = socket.create_connection(self._upstream, timeout=_IDLE_TIMEOUT_S)
        except OSError:
            client.close()
            return
        client.settimeout(_IDLE_TIMEOUT_S)
        with client, server:
            requests = Thread(target=self._pass_on, args=(client, server, None), daemon=True)
            requests.start()
            self._pass_on(server, client, cut_after)
            requests.join()

    def _pass_on(self, source: socket.socket, target: socket.socket, size_max: int | None) -> None:
        """Until the source ends; after `size_max` bytes nothing passes any more, in either direction."""
        left = size_max
        is_broken = True
        with suppress(OSError):
            while left != 0 and (
                chunk := source.recv(_CHUNK_SIZE if left is None else min(left, _CHUNK_SIZE))
            ):
                # Before it is sent: whoever has received a byte finds it counted.
                with self._lock:
                    self._passed += len(chunk)
                target.sendall(chunk)
                left = None if left is None else left - len(chunk)
            is_broken = left == 0
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR if is_broken else socket.SHUT_WR)
        if is_broken:
            with suppress(OSError):
                source.shutdown(socket.SHUT_RDWR)


class Proxy(Relay):
    """An HTTP proxy behind which one address is this machine, and no other can be reached.

    What clients think of loopback (that plain HTTP will do, that no certificate need be checked) they do not think of that address.

    Args:
        address: that is asked for; whatever its port, the registry at `upstream` answers.
    """

    def __init__(self, upstream: str, address: str) -> None:
        super().__init__(upstream)
        self._address = address

    def _connect(self, client: socket.socket, cut_after: int | None) -> None:
        client.settimeout(_IDLE_TIMEOUT_S)
        with suppress(OSError):
            if _asked_for(client).startswith(f"CONNECT {self._address}:".encode()):
                client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                super()._connect(client, cut_after)
            else:
                client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        client.close()


def _asked_for(client: socket.socket) -> bytes:
    """The head of a request for a tunnel. Before the answer nobody sends what is to go through it."""
    head = b""
    while not head.endswith(b"\r\n\r\n") and (chunk := client.recv(_CHUNK_SIZE)):
        head += chunk
    return head
