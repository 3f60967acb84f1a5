"""An answer that a thread writes to the socket is what was promised, or is cut short; and the connection goes on after it."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import Any

import pytest

from kitspec.digest import Digest
from registry import app
from registry.socket_sink import SocketSink
from storage_backends.interface import BlockingSink, ByteStream, SpanChoice, StorageUnavailable
from storage_backends.memory import MemoryBackend
from storage_backends.threads import Threads
from tests.authority import Authority
from tests.registry.conftest import configured, served
from tests.registry.wire import Wire

LARGE = bytes(range(251)) * 40_000  # 10 MB: more than the kernel keeps for a client that reads nothing
SMALL = bytes(range(251)) * 1000  # by way of the event loop
STEP = 1_000_000
LIMIT_S = 0.3
SOON_S = 20


class Pair:
    """Two ends: the server's, and the client's."""

    def __init__(self) -> None:
        self.server, self.client = socket.socketpair()
        self.server.setblocking(False)
        self.sink = SocketSink(self.server)
        self.raised: list[BaseException] = []

    def write(self, content: bytes) -> threading.Thread:
        def writing() -> None:
            try:
                self.sink.write(memoryview(content))
            except ConnectionError as error:
                self.raised.append(error)

        thread = threading.Thread(target=writing)
        thread.start()
        return thread

    def received(self) -> bytes:
        return b"".join(iter(lambda: self.client.recv(1 << 16), b""))


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.sink.close()
    pair.server.close()
    pair.client.close()


def test_all_is_written_to_a_client_that_takes_it_bit_by_bit(pair: Pair) -> None:
    thread = pair.write(LARGE)
    received = b""
    while len(received) < len(LARGE):
        received += pair.client.recv(1 << 16)
    thread.join()

    assert (received, pair.raised) == (LARGE, [])
    assert pair.sink.sent == len(LARGE)


def test_a_client_that_leaves_is_an_error_and_only_what_the_kernel_took_counts(pair: Pair) -> None:
    thread = pair.write(LARGE)
    pair.client.recv(1 << 16)
    pair.client.close()
    thread.join()

    assert len(pair.raised) == 1
    assert 0 < pair.sink.sent < len(LARGE)
    pair.sink.interrupt()


def test_whoever_waits_can_be_interrupted(pair: Pair) -> None:
    thread = pair.write(LARGE)
    pair.client.recv(1, socket.MSG_PEEK)
    pair.sink.interrupt()
    thread.join()

    assert len(pair.raised) == 1
    assert len(pair.received()) == pair.sink.sent < len(LARGE)


def test_nothing_is_written_after_an_interruption(pair: Pair) -> None:
    pair.sink.interrupt()
    pair.write(b"more").join()

    assert len(pair.raised) == 1
    assert pair.received() == b""


def test_the_socket_is_the_event_loops_when_it_is_given_back(pair: Pair) -> None:
    pair.sink.close()

    assert not pair.server.getblocking()
    pair.server.send(b"next")
    assert pair.client.recv(9) == b"next"


# Over HTTP


class DrainingBackend(MemoryBackend):
    """Content in memory, written to clients by threads.

    Attributes:
        spans: of what was drained.
        threads_max: how many may drain at once.
        draining: streams that threads are writing.
        is_asked, opens: a stream is wanted, and may be opened.
        go_on: a thread waits for it before all but the first of its writes.
        fails: before all but the first of its writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[int, int]] = []
        self.threads_max = 32
        self.draining = 0
        self.is_asked = asyncio.Event()
        self.opens = asyncio.Event()
        self.opens.set()
        self.has_begun = asyncio.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fails = False
        self._drainers = Threads(32, "drain")

    async def close(self) -> None:
        self._drainers.close()
        await super().close()

    @asynccontextmanager
    async def deliver(
        self, key: str, span: SpanChoice = None, *, url_size_min: int | None = None
    ) -> AsyncIterator[ByteStream]:
        self.is_asked.set()
        await self.opens.wait()
        async with super().deliver(key, span, url_size_min=url_size_min) as stream:
            yield ByteStream(
                stream.chunks, stream.span, stream.size, lambda sink: self._drain(key, stream, sink)
            )

    async def _drain(self, key: str, stream: ByteStream, sink: BlockingSink) -> bool:
        if self.draining >= self.threads_max:
            return False
        content = memoryview(self._object(key).content)[stream.span.start : stream.span.stop]
        self.draining += 1
        self.has_begun.set()
        try:
            await self._drainers.run_interruptible(lambda: self._write(content, sink), sink.interrupt)
        finally:
            self.draining -= 1
        self.spans.append((stream.span.start, stream.span.stop))
        return True

    def _write(self, content: memoryview, sink: BlockingSink) -> None:
        for start in range(0, len(content), STEP):
            if start:
                self.go_on.wait(SOON_S)
                if self.fails:
                    raise StorageUnavailable("the store went away")
            sink.write(content[start : start + STEP])

    async def until_free(self) -> None:
        async with asyncio.timeout(SOON_S):
            while self.draining:
                await asyncio.sleep(0.01)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> DrainingBackend:
    backend = DrainingBackend()
    monkeypatch.setattr(app, "make_backend", lambda _: backend)
    return backend


def serving(**sections: Any) -> AbstractAsyncContextManager[str]:
    return served(configured({"inmemory": {}}, **sections))


@pytest.fixture
async def wire(backend: DrainingBackend) -> AsyncIterator[Wire]:
    async with serving() as url:
        wire = Wire(url)
        await wire.push_blob("lib/a", LARGE)
        await wire.push_blob("lib/a", SMALL)
        yield wire


class Client:
    """One connection that stays."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def ask(self, content: bytes = LARGE, method: str = "GET", *fields: str) -> None:
        lines = [f"{method} /v2/lib/a/blobs/{Digest.of(content)} HTTP/1.1", "Host: x", *fields, "", ""]
        self.writer.write("\r\n".join(lines).encode())

    async def head(self) -> tuple[int, int]:
        """Status and Content-Length."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"Content-Length: (\d+)", head)
        assert size is not None
        return int(head.split()[1]), int(size[1])

    async def answer(self) -> tuple[int, bytes]:
        status, size = await self.head()
        return status, await self.reader.readexactly(size)

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        received = bytearray()
        async with asyncio.timeout(SOON_S):
            try:
                while piece := await self.reader.read(1 << 20):
                    received += piece
            except ConnectionError:
                pass
        return bytes(received)


@asynccontextmanager
async def connected(wire: Wire, ssl: SSLContext | None = None) -> AsyncIterator[Client]:
    # Nearly nothing is read ahead of the test.
    client = Client(*await asyncio.open_connection(wire.host, wire.port, limit=1 << 12, ssl=ssl))
    try:
        yield client
    finally:
        client.writer.close()


async def test_a_connection_goes_on_after_answers_that_a_thread_wrote(
    wire: Wire, backend: DrainingBackend
) -> None:
    async with connected(wire) as client:
        for _ in range(3):
            client.ask()
            assert await client.answer() == (200, LARGE)
        client.ask(SMALL)
        assert await client.answer() == (200, SMALL)
        client.ask(LARGE, "HEAD")
        assert await client.head() == (200, len(LARGE))
        client.ask(LARGE, "GET", "Range: bytes=1000-5000999")
        assert await client.answer() == (206, LARGE[1000:5_001_000])
        client.ask(LARGE, "GET", "Range: bytes=1000-1999")
        assert await client.answer() == (206, LARGE[1000:2000])

    assert backend.spans == [(0, len(LARGE))] * 3 + [(1000, 5_001_000)]


async def test_requests_that_were_sent_ahead_are_answered_one_after_the_other(
    wire: Wire, backend: DrainingBackend
) -> None:
    async with connected(wire) as client:
        for content in (LARGE, SMALL, LARGE):
            client.ask(content)
        for content in (LARGE, SMALL, LARGE):
            assert await client.answer() == (200, content)

    await backend.until_free()
    assert len(backend.spans) == 2


async def test_many_at_once_all_get_everything_those_without_a_thread_too(
    wire: Wire, backend: DrainingBackend
) -> None:
    backend.threads_max = 8
    backend.go_on.clear()

    async def pull() -> bool:
        async with connected(wire) as client:
            client.ask()
            return await client.answer() == (200, LARGE)

    async with asyncio.TaskGroup() as group:
        pulls = [group.create_task(pull()) for _ in range(24)]
        while sum(pull.done() for pull in pulls) < 16:  # who has no thread waits for none
            await asyncio.sleep(0.01)
        backend.go_on.set()

    assert all(pull.result() for pull in pulls)
    await backend.until_free()
    assert len(backend.spans) == 8


async def test_a_client_that_speaks_tls_gets_its_bytes_by_way_of_the_event_loop(
    backend: DrainingBackend, tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "ca")
    certificate, key = authority.issue("registry")
    tls = {"certificate": str(certificate), "key": str(key)}
    async with serving() as url:
        await Wire(url).push_blob("lib/a", LARGE)
        async with serving(http={"tls": tls}) as secure:
            trusting = create_default_context(cafile=str(authority.file))
            trusting.check_hostname = False
            async with connected(Wire(secure), trusting) as client:
                client.ask()
                assert await client.answer() == (200, LARGE)
                client.ask(LARGE, "HEAD")
                assert await client.head() == (200, len(LARGE))

    assert backend.spans == []


async def test_what_a_thread_wrote_is_counted(wire: Wire) -> None:
    async def sent() -> float:
        text = (await wire("GET", "/metrics")).body.decode()
        return float(re.findall(r"^modelreg_sent_bytes_total ([\d.e+]+)$", text, re.MULTILINE)[0])

    before = await sent()
    async with connected(wire) as client:
        client.ask()
        await client.answer()

    async with asyncio.timeout(SOON_S):
        while (counted := await sent() - before) < len(LARGE):  # the client may know before the server does
            await asyncio.sleep(0.01)
    assert counted < 2 * len(LARGE)  # once; the pages that were asked for meanwhile count too


async def test_L_02_a_client_that_never_reads_is_cut_off_and_its_thread_is_free(
    backend: DrainingBackend,
) -> None:
    async with serving(limits={"writeidletimeout": LIMIT_S}) as url:
        wire = Wire(url)
        await wire.push_blob("lib/a", LARGE)
        async with connected(wire) as client:
            client.ask()
            await backend.has_begun.wait()
            await backend.until_free()

    assert backend.spans == []


async def test_L_02_a_slow_client_that_reads_is_never_cut(backend: DrainingBackend) -> None:
    async with serving(limits={"writeidletimeout": LIMIT_S}) as url:
        wire = Wire(url)
        await wire.push_blob("lib/a", LARGE)
        async with connected(wire) as client:
            client.ask()
            status, size = await client.head()
            received = b""
            for _ in range(9):
                await asyncio.sleep(LIMIT_S / 3)
                received += await client.reader.readexactly(STEP)
            received += await client.reader.readexactly(size - len(received))

    assert (status, received) == (200, LARGE)


async def test_a_client_that_leaves_frees_its_thread(wire: Wire, backend: DrainingBackend) -> None:
    async with connected(wire) as client:
        client.ask()
        await client.head()

    await backend.until_free()
    assert backend.spans == []


async def test_content_that_ends_early_is_cut_short_of_its_length(
    wire: Wire, backend: DrainingBackend
) -> None:
    backend.fails = True
    async with connected(wire) as client:
        client.ask()

        assert await client.head() == (200, len(LARGE))
        assert await client.rest() == LARGE[:STEP]


async def test_L_01_half_a_header_that_came_ahead_is_not_answered_in_the_middle_of_an_answer(
    backend: DrainingBackend,
) -> None:
    async with serving(limits={"headertimeout": LIMIT_S}) as url:
        wire = Wire(url)
        await wire.push_blob("lib/a", LARGE)
        backend.go_on.clear()
        backend.opens.clear()
        async with connected(wire) as client:
            client.ask()
            await backend.is_asked.wait()
            client.writer.write(b"GET /v2/ HTTP/1.1\r\nHo")
            await asyncio.sleep(LIMIT_S / 3)
            backend.opens.set()
            status, size = await client.head()
            received = await client.reader.readexactly(STEP)
            await asyncio.sleep(4 * LIMIT_S)
            backend.go_on.set()
            received += await client.reader.readexactly(size - STEP)

            assert (status, received) == (200, LARGE)
            assert (await client.rest()).startswith(b"HTTP/1.1 408 ")


async def test_a_drain_ends_what_a_client_does_not_take(backend: DrainingBackend) -> None:
    async with serving(http={"draintimeout": LIMIT_S}) as url:
        wire = Wire(url)
        await wire.push_blob("lib/a", LARGE)
        reader, writer = await asyncio.open_connection(wire.host, wire.port, limit=1 << 12)
        client = Client(reader, writer)
        client.ask()
        await client.head()

    await backend.until_free()
    assert backend.spans == []
    assert len(await client.rest()) < len(LARGE)
    writer.close()
