"""A large answer that a thread reads from its socket is the answer, however it comes and however it ends."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import pytest

from kitclient.remote import RemoteRegistry
from kitclient.socket_pieces import SocketPieces
from kitclient.transport import RetryPolicy
from kitspec.digest import Digest
from kitspec.http_fields import ByteSpan
from kitspec.names import RepositoryName

NAME = RepositoryName("lib/a")
CONTENT = bytes(range(251)) * 80_000  # 20 MB
DIGEST = Digest.of(CONTENT)
Send = Callable[[asyncio.StreamWriter, bytes], Awaitable[None]]


async def send_all(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(content)
    await writer.drain()


@asynccontextmanager
async def registry(send: Send) -> AsyncIterator[RemoteRegistry]:
    """A registry that has one blob, and answers GETs of it by `send`."""
    requests: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        requests.append(task)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                asked = re.search(rb"Range: bytes=(\d+)-", head)
                start = int(asked[1]) if asked else 0
                fields = (
                    f"HTTP/1.1 206 Partial\r\nContent-Range: bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"
                )
                status = fields if asked else "HTTP/1.1 200 OK"
                writer.write(f"{status}\r\nContent-Length: {len(CONTENT) - start}\r\n\r\n".encode())
                await send(writer, CONTENT[start:])
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    retry = RetryPolicy(sleep=lambda _: asyncio.sleep(0))
    try:
        async with RemoteRegistry(host, plain_http=True, retry=retry) as remote:
            yield remote
    finally:
        server.close()
        for task in requests:
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)


async def read(remote: RemoteRegistry, span: ByteSpan | None = None) -> bytes:
    async with remote.open_blob(NAME, DIGEST, span) as body:
        return b"".join([piece async for piece in body])


async def test_a_large_blob_comes_whole() -> None:
    async with registry(send_all) as remote:
        assert await read(remote) == CONTENT


async def test_a_large_span_comes_whole() -> None:
    async with registry(send_all) as remote:
        span = ByteSpan(1_234_567, 18_000_000)
        assert await read(remote, span) == CONTENT[span.start : span.stop]


async def test_a_connection_that_breaks_is_gone_on_with() -> None:
    async def break_off(writer: asyncio.StreamWriter, content: bytes) -> None:
        await send_all(writer, content[:5_000_000])
        if len(content) > 5_000_000:
            raise ConnectionResetError

    async with registry(break_off) as remote:
        assert await read(remote) == CONTENT


async def test_whoever_stops_reading_early_waits_for_nobody() -> None:
    never = asyncio.Event()

    async def stall(writer: asyncio.StreamWriter, content: bytes) -> None:
        await send_all(writer, content[:3_000_000])
        await never.wait()

    async with registry(stall) as remote, asyncio.timeout(20):
        async with remote.open_blob(NAME, DIGEST) as body, aclosing(aiter(body)) as pieces:  # type: ignore[type-var]
            assert await anext(pieces)
        reading = asyncio.create_task(read(remote))
        await asyncio.wait([reading], timeout=0.2)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_a_silent_registry_is_not_waited_for() -> None:
    import socket

    here, there = socket.socketpair()
    with here, there:
        there.send(b"abc")
        pieces = SocketPieces(here, b"", 10, idle_s=0.05).pieces()

        assert await anext(pieces) == b"abc"
        with pytest.raises(TimeoutError, match="silent"):
            await anext(pieces)
