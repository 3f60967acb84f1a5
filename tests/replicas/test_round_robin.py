"""The proxy of the tests keeps its own promises: otherwise what is tested through it proves nothing."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from aiohttp import ClientPayloadError, ClientSession, web
from yarl import URL

from tests.replicas.round_robin import RoundRobin, raw_session

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
NOBODY = "http://127.0.0.1:9"


@asynccontextmanager
async def replica(handler: Handler) -> AsyncIterator[str]:
    runner = web.ServerRunner(web.Server(handler, auto_decompress=False), shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def proxied(*replicas: Handler | str) -> AsyncIterator[tuple[RoundRobin, ClientSession]]:
    """A proxy of these, and a client."""
    async with AsyncExitStack() as stack:
        urls = [
            one if isinstance(one, str) else await stack.enter_async_context(replica(one)) for one in replicas
        ]
        proxy = RoundRobin(lambda: urls)
        await stack.enter_async_context(proxy.listening())
        yield proxy, await stack.enter_async_context(raw_session())


def says(text: str) -> Handler:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text=text)

    return answer


async def tells(request: web.BaseRequest) -> web.StreamResponse:
    """What has arrived."""
    return web.json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "headers": dict(request.headers),
            "size": len(await request.content.read()),
        }
    )


async def goes_away(request: web.BaseRequest) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def test_each_request_goes_to_the_next_replica_also_on_one_connection() -> None:
    async with proxied(says("a"), says("b"), says("c")) as (proxy, _), ClientSession() as session:
        texts = [await (await session.get(proxy.url)).text() for _ in range(7)]

    assert "".join(texts) in {"abcabca", "bcabcab", "cabcabc"}
    assert sorted(proxy.served.values()) == [2, 2, 3]


async def test_a_request_arrives_as_it_was_sent() -> None:
    async with proxied(tells) as (proxy, session):
        answer = await session.put(
            URL(f"{proxy.url}/v2/a%2Fb/x?digest=sha256%3Aab&n=1", encoded=True),
            data=io.BytesIO(b"x" * 3_000_000),
            headers={"Content-Range": "0-2999999", "X-Own": "1", "Host": "registry.example"},
        )
        told = await answer.json()

    assert (told["method"], told["path"], told["size"]) == (
        "PUT",
        "/v2/a%2Fb/x?digest=sha256%3Aab&n=1",
        3_000_000,
    )
    assert told["headers"]["Content-Length"] == "3000000"
    assert told["headers"]["Content-Range"] == "0-2999999"
    assert told["headers"]["Host"] == "registry.example"
    assert told["headers"]["X-Own"] == "1"
    assert "Transfer-Encoding" not in told["headers"]


async def test_a_body_of_unknown_length_stays_one() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"some"
        yield b"more"

    async with proxied(tells) as (proxy, session):
        told = await (await session.post(proxy.url, data=body())).json()

    assert told["size"] == 8
    assert told["headers"]["Transfer-Encoding"] == "chunked"


async def test_a_body_is_passed_on_while_it_arrives() -> None:
    began, may_end = asyncio.Event(), asyncio.Event()

    async def takes(request: web.BaseRequest) -> web.StreamResponse:
        assert await request.content.readexactly(4) == b"some"
        began.set()
        return web.Response(body=await request.content.read())

    async def body() -> AsyncIterator[bytes]:
        yield b"some"
        await may_end.wait()
        yield b"more"

    async with proxied(takes) as (proxy, session), asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(session.post(proxy.url, data=body()))
        await began.wait()
        may_end.set()
        assert await (await asked).read() == b"more"


async def test_an_answer_comes_back_as_it_was_given() -> None:
    async def answers(request: web.BaseRequest) -> web.StreamResponse:
        headers = {"Location": "/v2/x", "Docker-Content-Digest": "sha256:ab", "Content-Encoding": "gzip"}
        return web.Response(status=307, headers=headers, body=b"no gzip")

    async with proxied(answers) as (proxy, session):
        answer = await session.get(proxy.url, allow_redirects=False)

        assert (answer.status, await answer.read()) == (307, b"no gzip")
        assert answer.headers["Location"] == "/v2/x"
        assert answer.headers["Docker-Content-Digest"] == "sha256:ab"


async def test_HEAD_keeps_the_length_that_it_is_asked_for() -> None:
    async def answers(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"Content-Length": "5000000000000"})

    async with proxied(answers) as (proxy, session):
        answer = await session.head(proxy.url)

    assert answer.headers["Content-Length"] == "5000000000000"


async def test_a_replica_that_does_not_listen_is_passed_over() -> None:
    async with proxied(NOBODY, says("here"), NOBODY) as (proxy, session):
        texts = [await (await session.post(proxy.url, data=b"x" * 1000)).text() for _ in range(4)]

    assert texts == ["here"] * 4


async def test_without_any_replica_it_says_502() -> None:
    async with proxied(NOBODY, NOBODY) as (proxy, session):
        assert (await session.get(proxy.url)).status == 502


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_a_request_whose_replica_goes_away_is_a_502_and_is_not_repeated(method: str) -> None:
    asked = []

    async def notes(request: web.BaseRequest) -> web.StreamResponse:
        asked.append(request.method)
        return await goes_away(request)

    async with proxied(notes, notes) as (proxy, session):
        answer = await session.request(method, proxy.url)

    assert answer.status == 502
    assert asked == [method]


async def test_an_answer_that_breaks_off_does_not_end_well() -> None:
    async def breaks_off(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 500)
        return await goes_away(request)

    async with proxied(breaks_off) as (proxy, session):
        answer = await session.get(proxy.url)
        with pytest.raises(ClientPayloadError):
            await answer.read()


async def test_what_a_client_breaks_off_is_broken_off_at_the_replica() -> None:
    broken, began = asyncio.Event(), asyncio.Event()

    async def takes(request: web.BaseRequest) -> web.StreamResponse:
        began.set()
        try:
            await request.content.read()
        except (web.RequestPayloadError, ConnectionError):
            broken.set()
        return web.Response()

    async with proxied(takes) as (proxy, _):
        host, port = proxy.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PATCH / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nsome")
        await began.wait()
        writer.close()
        await writer.wait_closed()

        await asyncio.wait_for(broken.wait(), 10)


async def test_who_waits_for_100_before_a_body_gets_it() -> None:
    async with proxied(tells) as (proxy, session):
        answer = await session.put(proxy.url, data=b"body", expect100=True)

        assert (await answer.json())["size"] == 4
