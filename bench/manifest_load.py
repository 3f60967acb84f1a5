"""Manifest GETs a second: 16 keep-alive connections, by wrk when it is there, else by a loop of our own."""

from __future__ import annotations

import re
import selectors
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from bench.wire import MANIFEST_TYPE

CONNECTIONS = 16
PROCESSES = 2


def manifest_gets_per_second(url: str, seconds: float, authorization: str = "") -> float:
    """
    Args:
        authorization: the field of each request; "" for none.
    """
    wrk = shutil.which("wrk")
    fields = [f"Accept: {MANIFEST_TYPE}", *([f"Authorization: {authorization}"] if authorization else [])]
    # wrk counts in whole seconds.
    return _by_wrk(wrk, url, max(1, round(seconds)), fields) if wrk else _by_loops(url, seconds, fields)


def generator() -> str:
    return "wrk" if shutil.which("wrk") else "an own loop"


def _by_wrk(wrk: str, url: str, seconds: int, fields: Sequence[str]) -> float:
    command = [
        wrk,
        f"-t{PROCESSES}",
        f"-c{CONNECTIONS}",
        f"-d{seconds}s",
        *(word for field in fields for word in ("-H", field)),
        url,
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate = re.search(r"Requests/sec:\s*([\d.]+)", output)
    if rate is None or "Non-2xx" in output or "Socket errors" in output:
        raise RuntimeError(f"wrk did not measure what it should:\n{output}")
    return float(rate[1])


def _by_loops(url: str, seconds: float, fields: Sequence[str]) -> float:
    share = str(CONNECTIONS // PROCESSES)
    command = [sys.executable, "-m", "bench.manifest_load", url, str(seconds), share, *fields]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    outputs = [loop.communicate()[0] for loop in loops]
    if any(loop.returncode for loop in loops):
        raise RuntimeError(f"a loop of GETs against {url} failed")
    return sum(map(float, outputs))


def _loop(url: str, seconds: float, connections: int, fields: Sequence[str]) -> float:
    """Requests a second on `connections`, each with one request under way."""
    parts = urlsplit(url)
    head = [f"GET {parts.path} HTTP/1.1", f"Host: {parts.netloc}", *fields]
    request = "".join(f"{line}\r\n" for line in [*head, ""]).encode()
    count, start = 0, time.perf_counter()
    with selectors.DefaultSelector() as selector:
        sockets = [socket.create_connection((parts.hostname, parts.port)) for _ in range(connections)]
        for each in sockets:
            each.sendall(request)
            selector.register(each, selectors.EVENT_READ)
        while (elapsed := time.perf_counter() - start) < seconds:
            for key, _ in selector.select():
                _read_reply(key.fileobj)  # type: ignore[arg-type]
                key.fileobj.sendall(request)  # type: ignore[union-attr]
                count += 1
        for each in sockets:
            each.close()
    return count / elapsed


def _read_reply(connection: socket.socket) -> None:
    reply = b""
    while not _is_whole(reply):
        piece = connection.recv(65536)
        if not piece:
            raise RuntimeError(f"the connection ended inside {reply!r}")
        reply += piece


def _is_whole(reply: bytes) -> bool:
    head, end, body = reply.partition(b"\r\n\r\n")
    size = _SIZE.search(head)
    if end and (size is None or not head.startswith(b"HTTP/1.1 200 ")):
        raise RuntimeError(f"not the manifest: {head!r}")
    return size is not None and bool(end) and len(body) >= int(size[1])


_SIZE = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)

if __name__ == "__main__":
    print(_loop(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
