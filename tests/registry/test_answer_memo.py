"""A kept answer is the answer aiohttp would give, as long as it is true, and nobody else's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import pytest

from registry.answer_memo import is_simple
from tests.registry.conftest import Serve
from tests.registry.wire import OCI_MANIFEST, Wire, encode, image

GET = b"GET /v2/lib/a/manifests/v1 HTTP/1.1\r\nHost: x\r\n\r\n"
# What differs from one answer to the next, by right.
CHANGING = re.compile(rb"(Date|X-Request-Id): [^\r]*\r\n")


@pytest.fixture
async def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


class Client:
    """One connection that stays."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """Head and body of the answer."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"Content-Length: (\d+)", head)
        has_body = size is not None and not request.startswith(b"HEAD")
        return head, await self.reader.readexactly(int(size[1])) if size and has_body else b""


@pytest.fixture
async def client(wire: Wire) -> AsyncIterator[Client]:
    await wire.push_image("lib/a", tag="v1")
    reader, writer = await asyncio.open_connection(wire.host, wire.port)
    yield Client(reader, writer)
    writer.close()
    await writer.wait_closed()


async def kept_count(wire: Wire) -> int:
    """Manifest look-ups answered from memory."""
    text = (await wire("GET", "/metrics")).body
    found = re.search(rb'modelreg_manifest_cache_total\{result="hit"\} ([0-9.]+)', text)
    return int(float(found[1])) if found else 0


async def test_the_same_request_gets_the_same_answer_with_a_date_and_an_id_of_its_own(
    client: Client, wire: Wire
) -> None:
    answers = [await client.ask(GET) for _ in range(5)]

    assert len({CHANGING.sub(b"", head) for head, _ in answers}) == 1
    assert len({body for _, body in answers}) == 1
    identities = {re.search(rb"X-Request-Id: (\S+)", head)[1] for head, _ in answers}  # type: ignore[index]
    assert len(identities) == 5
    assert all(b"Date: " in head for head, _ in answers)


async def test_a_tag_that_moved_is_seen_at_once(client: Client, wire: Wire) -> None:
    for number in range(20):
        manifest = image(annotations={"number": str(number)})
        await wire.push_manifest("lib/a", "v1", manifest)

        bodies = [(await client.ask(GET))[1] for _ in range(3)]

        assert bodies == [encode(manifest)] * 3


async def test_a_tag_that_was_deleted_is_gone_at_once(client: Client, wire: Wire) -> None:
    await client.ask(GET)
    head, _ = await client.ask(GET)
    assert b" 200 " in head

    await wire("DELETE", "/v2/lib/a/manifests/v1")

    head, body = await client.ask(GET)
    assert b" 404 " in head
    assert b"MANIFEST_UNKNOWN" in body


async def test_another_request_on_the_connection_is_answered_as_ever(client: Client) -> None:
    await client.ask(GET)
    await client.ask(GET)

    head, _ = await client.ask(GET.replace(b"GET", b"HEAD"))
    assert b" 200 " in head
    head, _ = await client.ask(GET.replace(b"Host: x", b"Host: x\r\nIf-None-Match: *"))
    assert b" 304 " in head
    head, _ = await client.ask(
        b"POST /v2/lib/a/blobs/uploads/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    )
    assert b" 202 " in head
    head, _ = await client.ask(GET)
    assert b" 200 " in head


async def test_requests_sent_together_are_answered_in_order(client: Client) -> None:
    expected = (await client.ask(GET))[1]
    client.writer.write(GET + GET.replace(b"v1", b"v2") + GET)

    statuses = []
    for _ in range(3):
        head = await client.reader.readuntil(b"\r\n\r\n")
        size = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
        statuses.append((head.split()[1], await client.reader.readexactly(size)))

    assert [status for status, _ in statuses] == [b"200", b"404", b"200"]
    assert statuses[0][1] == statuses[2][1] == expected


async def test_a_request_in_pieces_is_answered_once(client: Client, wire: Wire) -> None:
    await client.ask(GET)
    await client.ask(GET)
    for cut in (1, 5, len(GET) - 1):
        client.writer.write(GET[:cut])
        await client.writer.drain()
        await wire("GET", "/livez")  # by then the server has read the first piece
        head, _ = await client.ask(GET[cut:])
        assert b" 200 " in head


async def test_kept_answers_are_counted(client: Client, wire: Wire) -> None:
    await client.ask(GET)
    before = await kept_count(wire)

    for _ in range(10):
        await client.ask(GET)

    assert await kept_count(wire) == before + 10


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GET[:-1],
        GET + b"G",
        GET + GET,
        GET.replace(b"1.1", b"1.0"),
        GET.replace(b"GET", b"PUT"),
        GET.replace(b"Host", b"CONTENT-LENGTH: 1\r\nHost"),
        GET.replace(b"Host", b"Transfer-Encoding: chunked\r\nHost"),
        GET.replace(b"Host", b"Connection: Close\r\nHost"),
        GET.replace(b"Host", b"X-Request-Id: mine\r\nHost"),
        GET.replace(b"Host", b"Expect: 100-continue\r\nHost"),
        GET.replace(b"Host", b"X: " + b"y" * 5000 + b"\r\nHost"),
    ],
    ids=range(12),
)
def test_what_is_more_than_a_plain_get_is_not_simple(data: bytes) -> None:
    assert not is_simple(data)


def test_a_plain_get_is_simple() -> None:
    assert is_simple(GET)
    assert is_simple(GET.replace(b"Host: x", b"Host: x\r\nAccept: " + OCI_MANIFEST.encode()))


async def test_what_is_large_is_not_kept_and_answered_all_the_same(serve: Serve) -> None:
    async with serve() as url:
        wire = Wire(url)
        manifest = image(annotations={"long": "x" * 100_000})
        await wire.push_image("lib/a")
        await wire.push_manifest("lib/a", "v1", manifest)
        reader, writer = await asyncio.open_connection(wire.host, wire.port)
        client = Client(reader, writer)

        bodies = [(await client.ask(GET))[1] for _ in range(3)]

        assert bodies == [encode(manifest)] * 3
        writer.close()
        await writer.wait_closed()
