"""A body that a thread reads from the socket is the body, or is refused; and the connection goes on after it."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.errors import BlobUploadInvalid
from registry.socket_body import SocketBody
from tests.registry.conftest import Serve
from tests.registry.wire import Wire, path_of

LARGE = bytes(range(251)) * 12_000  # 3 MB: by way of a thread


def in_chunks(content: bytes, size: int, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    framed = [b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces]
    return b"".join(framed) + b"0\r\n" + trailers + b"\r\n"


class Pair:
    """Two ends: a client whose bytes come in pieces, from a thread, and the server's."""

    def __init__(self) -> None:
        self.server, self.client = socket.socketpair()

    def send(self, pieces: list[bytes], *, close: bool = True) -> threading.Thread:
        def sending() -> None:
            for piece in pieces:
                self.client.sendall(piece)
            if close:
                self.client.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=sending)
        thread.start()
        return thread


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.server.close()
    pair.client.close()


def read(body: SocketBody, step: int = 1000) -> bytes:
    buffer = memoryview(bytearray(step))
    pieces = []
    while count := body.read_into(buffer):
        pieces.append(bytes(buffer[:count]))
    return b"".join(pieces)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in at} | {0, len(data)})
    return [data[start:stop] for start, stop in pairwise(places)]


@given(
    content=st.binary(max_size=5000),
    size=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    held=st.integers(0, 10_000),
    extension=st.sampled_from([b"", b";a=b", b' ; x="y"']),
    trailers=st.sampled_from([b"", b"X-A: b\r\n", b"X-A: b\r\nX-C: d\r\n"]),
    step=st.integers(1, 4000),
)
def test_any_cutting_of_chunks_gives_the_content_and_what_follows_it(  # noqa: PLR0917
    content: bytes, size: int, cuts: list[int], held: int, extension: bytes, trailers: bytes, step: int
) -> None:
    pair = Pair()
    sent = in_chunks(content, size, extension, trailers) + b"NEXT"
    held %= len(sent) + 1
    thread = pair.send(cut(sent[held:], cuts))
    body = SocketBody(pair.server, sent[:held], None, idle_s=20)

    assert read(body, step) == content

    assert (body.is_whole, body.received) == (True, len(content))
    beyond = body.close()
    thread.join()
    with pair.server, pair.client:
        rest = b"".join(iter(lambda: pair.server.recv(100), b""))
        assert beyond + rest == b"NEXT"


@given(
    content=st.binary(max_size=5000),
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
    held=st.integers(0, 6000),
)
def test_any_cutting_of_a_body_with_a_length_gives_the_content(
    content: bytes, cuts: list[int], held: int
) -> None:
    pair = Pair()
    held %= len(content) + 1
    thread = pair.send(cut(content[held:] + b"NEXT", cuts))
    body = SocketBody(pair.server, content[:held], len(content), idle_s=20)

    assert read(body) == content

    assert body.is_whole
    assert body.close() == b""
    thread.join()
    with pair.server, pair.client:
        assert b"".join(iter(lambda: pair.server.recv(100), b"")) == b"NEXT"


@pytest.mark.parametrize(
    "sent",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n",
        b" 1\r\na\r\n",
        b"1_0\r\n",
        b"0x1\r\na\r\n",
        b"\r\n",
        b"1\nab",
        b"1\r\nab\r\n0\r\n\r\n",
        b"1\r\na0\r\n\r\n",
        b"1" * 16 + b"\r\n",
        b"1;" + b"x" * 5000 + b"\r\na\r\n0\r\n\r\n",
        b"1;\x00\r\na\r\n0\r\n\r\n",
        b"0\r\n" + b"X-A: bbbbbbbbb\r\n" * 1000 + b"\r\n",
    ],
    ids=range(14),
)
def test_V_61_V_62_chunks_that_are_not_well_formed_are_refused(pair: Pair, sent: bytes) -> None:
    body = SocketBody(pair.server, b"", None, idle_s=20)
    thread = pair.send([sent])

    with pytest.raises((BlobUploadInvalid, ConnectionError)):
        read(body)

    assert not body.is_whole
    body.close()
    pair.server.close()
    thread.join()


def test_a_client_that_leaves_early_is_told_from_one_that_is_done(pair: Pair) -> None:
    pair.send([b"abc"]).join()
    body = SocketBody(pair.server, b"", 10, idle_s=20)
    buffer = memoryview(bytearray(10))

    assert body.read_into(buffer) == 3
    with pytest.raises(ConnectionError, match="gone"):
        body.read_into(buffer)

    assert not body.is_whole
    body.close()


def test_L_02_a_silent_client_is_not_waited_for(pair: Pair) -> None:
    body = SocketBody(pair.server, b"", 10, idle_s=0.05)

    with pytest.raises(ConnectionError, match="silent"):
        body.read_into(memoryview(bytearray(10)))

    body.close()


def test_whoever_waits_can_be_interrupted(pair: Pair) -> None:
    body = SocketBody(pair.server, b"", 10, idle_s=20)
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            body.read_into(memoryview(bytearray(10)))
        except ConnectionError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    body.interrupt()
    thread.join()

    assert raised
    body.close()


def test_the_socket_waits_for_nobody_when_it_is_given_back(pair: Pair) -> None:
    pair.server.setblocking(False)
    body = SocketBody(pair.server, b"", 10, idle_s=0.05)
    body.close()

    with pytest.raises(BlockingIOError):
        pair.server.recv(1)


# Over HTTP


@pytest.fixture
async def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


class Client:
    """One connection that stays."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, bytes]:
        head = await self.reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"Content-Length: (\d+)", head)
        return int(head.split()[1]), await self.reader.readexactly(int(size[1]) if size else 0)

    async def ask(self, head: str, body: bytes = b"") -> tuple[int, bytes]:
        self.writer.write(head.encode() + body)
        return await self.answer()


@pytest.fixture
async def client(wire: Wire) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection(wire.host, wire.port))
    yield client
    client.writer.close()


def put(target: str, framing: str) -> str:
    return f"PUT {target} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n"


GET = f"GET /v2/lib/a/blobs/{Digest.of(LARGE)} HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_connection_goes_on_after_a_large_body(wire: Wire, client: Client, framing: str) -> None:
    for _ in range(3):
        target = f"{await wire.begin_upload('lib/a')}?digest={Digest.of(LARGE)}"
        if framing == "length":
            status, _ = await client.ask(put(target, f"Content-Length: {len(LARGE)}"), LARGE)
        else:
            chunked = in_chunks(LARGE, 50_000)
            status, _ = await client.ask(put(target, "Transfer-Encoding: chunked"), chunked)

        assert status == 201
        assert await client.ask(GET) == (200, LARGE)


async def test_a_client_that_asks_first_is_told_to_go_on(wire: Wire, client: Client) -> None:
    target = f"{await wire.begin_upload('lib/a')}?digest={Digest.of(LARGE)}"
    client.writer.write(put(target, f"Content-Length: {len(LARGE)}\r\nExpect: 100-continue").encode())

    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"

    client.writer.write(LARGE)
    assert (await client.answer())[0] == 201


async def test_a_large_body_for_an_unknown_upload_is_404_and_not_read_to_its_end(client: Client) -> None:
    head = put("/v2/lib/a/blobs/uploads/0123?digest=sha256:" + "0" * 64, f"Content-Length: {10**12}")
    status, body = await client.ask(head, LARGE[:100_000])

    assert status == 404
    assert b"BLOB_UPLOAD_UNKNOWN" in body


async def test_a_large_body_of_another_digest_is_400_and_the_upload_is_gone(
    wire: Wire, client: Client
) -> None:
    upload = await wire.begin_upload("lib/a")
    head = put(f"{upload}?digest=sha256:{'0' * 64}", f"Content-Length: {len(LARGE)}")

    status, body = await client.ask(head, LARGE)

    assert status == 400
    assert b"DIGEST_INVALID" in body
    assert (await wire("GET", upload)).status == 404


async def test_X_07_what_arrived_of_a_large_body_is_kept(wire: Wire, client: Client) -> None:
    upload = await wire.begin_upload("lib/a")
    head = f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(LARGE)}\r\n\r\n"
    client.writer.write(head.encode() + LARGE[:2_000_000])
    await client.writer.drain()
    client.writer.close()
    await client.writer.wait_closed()

    async with asyncio.timeout(20):
        # The server may not have begun with the request yet when the client is gone already.
        while (reply := await wire("GET", upload)).header("Range") == "0-0":
            await asyncio.sleep(0.01)

    assert reply.status == 204
    offset = int(reply.header("Range").partition("-")[2]) + 1
    assert 0 < offset <= 2_000_000
    rest = await wire("PUT", f"{upload}?digest={Digest.of(LARGE)}", body=LARGE[offset:])
    assert rest.status == 201


async def test_a_body_over_the_limit_is_413_whatever_its_framing(serve: Serve) -> None:
    async with serve(limits={"blobsize": 1_000_000}) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")

        async def chunked() -> AsyncIterator[bytes]:
            for start in range(0, len(LARGE), 100_000):
                yield LARGE[start : start + 100_000]

        declared = await wire("PATCH", upload, body=LARGE)
        streamed = await wire("PATCH", upload, body=chunked())

        assert (declared.status, streamed.status) == (413, 413)


async def test_more_bodies_than_threads_are_all_stored(wire: Wire) -> None:
    contents = [LARGE + bytes([number]) for number in range(40)]

    async def push(content: bytes) -> int:
        upload = path_of((await wire("POST", "/v2/lib/a/blobs/uploads/")).header("Location"))
        return (await wire("PUT", f"{upload}?digest={Digest.of(content)}", body=content)).status

    assert await asyncio.gather(*map(push, contents)) == [201] * 40
