"""The load generator: HTTP/1.1 on a bare socket, so that the client costs little and the same for every server.

Bodies go out by sendfile and come in by MSG_TRUNC, which drops them in the kernel. Plain HTTP only; a server that
answers outside of what is expected here is an error, never a figure.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urljoin, urlsplit

from bench.figures import MIB

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
# What docker, oras and crane send: Go copies a body of unknown length in pieces of 32 KiB, a chunk each.
CHUNK_SIZE = 32 * 1024
CONNECT_TIMEOUT_S = 10
SILENCE_S = 300


class UnexpectedReply(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that no server has seen: a file that is made once, and behind it what is new."""

    path: Path
    tail: bytes
    digest: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size + len(self.tail)


class Source:
    """Blobs of one size. The file is hashed once; each new salt costs microseconds.

    Args:
        size: of the random bytes in the file.
        head, rest: what stands before them, and behind the salt.
    """

    def __init__(self, path: Path, size: int, *, head: bytes = b"", rest: bytes = b"") -> None:
        self.size = len(head) + size + SALT_SIZE + len(rest)
        self._path = path
        self._rest = rest
        self._hash = hashlib.sha256(head)
        with path.open("wb") as file:
            file.write(head)
            for offset in range(0, size, MIB):
                piece = os.urandom(min(MIB, size - offset))
                self._hash.update(piece)
                file.write(piece)

    def blob(self) -> Blob:
        tail = os.urandom(SALT_SIZE) + self._rest
        salted = self._hash.copy()
        salted.update(tail)
        return Blob(self._path, tail, f"sha256:{salted.hexdigest()}")


SALT_SIZE = 32


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    fields: dict[str, str]
    body: bytes = b""


class Connection:
    """One keep-alive connection to `url`; with an `Authorization`, if one is given."""

    def __init__(self, url: str, authorization: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url}: only http://host:port can be measured")
        self.url = url
        self._host = parts.netloc
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), CONNECT_TIMEOUT_S)
        # Blocking from here on: os.sendfile would find a socket with Python's timeout full and give up. The kernel
        # keeps watch instead.
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_S * 1000)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", SILENCE_S, 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sink = bytearray(MIB)
        self._authorization = {"Authorization": authorization} if authorization else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, method: str, target: str, body: bytes = b"", *, expect: int, **fields: str) -> Reply:
        """A small request and its small reply."""
        self._send_head(method, target, {"Content-Length": str(len(body)), **fields}, body)
        return self._reply(expect)

    def push_whole(self, name: str, blob: Blob) -> float:
        """POST, then one PUT that carries everything; seconds from its last byte to the answer's."""
        location = self._begin(name)
        self._send_head("PUT", _with_digest(location, blob.digest), {"Content-Length": str(blob.size)})
        with _opened(blob.path) as file:
            self._send_file(file, 0, blob.size - len(blob.tail))
        self._socket.sendall(blob.tail)
        sent = time.perf_counter()
        self._reply(201)
        return time.perf_counter() - sent

    def push_stream(self, name: str, blob: Blob) -> None:
        """POST, one PATCH of unknown length, and an empty PUT that closes it."""
        location = self._begin(name)
        self._send_head("PATCH", location, {"Transfer-Encoding": "chunked"})
        size = blob.size - len(blob.tail)
        with _opened(blob.path) as file:
            for offset in range(0, size, CHUNK_SIZE):
                stop = min(offset + CHUNK_SIZE, size)
                self._socket.sendall(b"%x\r\n" % (stop - offset), socket.MSG_MORE)
                self._send_file(file, offset, stop)
                self._socket.sendall(b"\r\n", socket.MSG_MORE)
        self._socket.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(blob.tail), blob.tail))
        location = self._location(self._reply(202))
        self.request("PUT", _with_digest(location, blob.digest), expect=201)

    def push_bytes(self, name: str, content: bytes) -> str:
        """POST and PUT of a few bytes; their digest."""
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.request("PUT", _with_digest(self._begin(name), digest), content, expect=201)
        return digest

    def push_manifest(self, name: str, tag: str, content: bytes) -> None:
        fields = {"Content-Type": MANIFEST_TYPE}
        self.request("PUT", f"/v2/{name}/manifests/{tag}", content, expect=201, **fields)

    def pull(self, name: str, digest: str) -> bool:
        """GET of a blob; the bytes are counted and dropped in the kernel. Whether they came from elsewhere."""
        with self._opened_blob(name, digest) as (connection, size):
            connection._drop(size)
            return connection is not self

    def _drop(self, size: int) -> int:
        remaining = size
        while remaining:
            count = self._socket.recv_into(self._sink, min(remaining, len(self._sink)), socket.MSG_TRUNC)
            if not count:
                raise UnexpectedReply(f"the connection ended {remaining} bytes before the blob did")
            remaining -= count
        return size

    def get(self, target: str) -> bytes:
        """GET of something small."""
        return self.request("GET", target, expect=200).body

    def stream(self, target: str) -> int:
        """GET of something large, dropped in the kernel; its size."""
        self._send_head("GET", target, {})
        return self._drop(int(self._head(200).fields["content-length"]))

    def check(self, name: str, digest: str) -> None:
        """GET of a blob, hashed."""
        actual = hashlib.sha256()
        with self._opened_blob(name, digest) as (connection, size):
            remaining = size
            while remaining:
                piece = connection._received(min(remaining, MIB))
                actual.update(piece)
                remaining -= len(piece)
        if f"sha256:{actual.hexdigest()}" != digest:
            raise UnexpectedReply(f"{digest} came back as sha256:{actual.hexdigest()}")

    @contextmanager
    def _opened_blob(self, name: str, digest: str) -> Iterator[tuple[Self, int]]:
        """The connection on which the blob comes, and its size: this one, or one to where the server sends us."""
        self._send_head("GET", f"/v2/{name}/blobs/{digest}", {})
        reply = self._head(200, 307)
        if reply.status == 200:
            yield self, int(reply.fields["content-length"])
            return
        self._drop(int(reply.fields["content-length"]))
        url = urlsplit(reply.fields["location"])
        # A new connection for each: that is where a client is who pulls one large layer.
        with type(self)(f"{url.scheme}://{url.netloc}") as elsewhere:
            elsewhere._send_head("GET", f"{url.path}?{url.query}", {})
            yield elsewhere, int(elsewhere._head(200).fields["content-length"])

    def _begin(self, name: str) -> str:
        return self._location(self.request("POST", f"/v2/{name}/blobs/uploads/", expect=202))

    def _location(self, reply: Reply) -> str:
        parts = urlsplit(urljoin(self.url, reply.fields["location"]))
        return parts.path + (f"?{parts.query}" if parts.query else "")

    def _send_head(self, method: str, target: str, fields: dict[str, str], body: bytes = b"") -> None:
        lines = [
            f"{method} {target} HTTP/1.1",
            f"Host: {self._host}",
            *(f"{k}: {v}" for k, v in (self._authorization | fields).items()),
        ]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def _send_file(self, file: int, start: int, stop: int) -> None:
        while start < stop:
            start += os.sendfile(self._socket.fileno(), file, start, min(MIB, stop - start))

    def _reply(self, expect: int) -> Reply:
        head = self._head(expect)
        remaining = int(head.fields.get("content-length", 0))
        body = b""
        while len(body) < remaining:
            body += self._received(remaining - len(body))
        return Reply(head.status, head.fields, body)

    def _head(self, *expect: int) -> Reply:
        # Peeked first, so that not a byte of the body is taken with the head.
        head = b""
        while b"\r\n\r\n" not in head:
            peeked = self._socket.recv(64 * 1024, socket.MSG_PEEK)
            if not peeked:
                raise UnexpectedReply(f"the connection ended inside a reply's head: {head!r}")
            seen = len(head)
            stop = (head + peeked).find(b"\r\n\r\n")
            head += self._received(len(peeked) if stop < 0 else stop + 4 - seen)
        status_line, *lines = head.decode("latin-1").rstrip().split("\r\n")
        fields = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        status = int(status_line.split()[1])
        if status not in expect or "transfer-encoding" in fields:
            wanted = " or ".join(map(str, expect))
            raise UnexpectedReply(f"wanted {wanted} and a Content-Length, got {status_line} {fields}")
        return Reply(status, fields)

    def _received(self, size: int) -> bytes:
        piece = self._socket.recv(size)
        if not piece:
            raise UnexpectedReply("the connection ended inside a reply")
        return piece


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def _with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"
