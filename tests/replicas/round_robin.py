"""A proxy that gives every request, not every connection, to the next replica.

It stands where a load balancer without sticky sessions would. Bodies stream both ways; what the client breaks off is broken
off at the replica, and the other way round. A replica that does not listen is passed over: the next one is asked, as nothing of
the request was sent. One that goes away later costs the client a 502, or the rest of the answer that it was reading; nobody
can tell then whether the request had an effect, and the proxy repeats nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
    web,
)
from yarl import URL

# Of one hop (RFC 9110 7.6.1); the proxy's own client and server say these themselves.
_OF_THE_HOP = {"connection", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
_AUTOMATIC = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
_START_TIMEOUT_S = 10.0
# Between two bytes, of a replica that hangs; a commit of gigabytes takes seconds.
_IDLE_TIMEOUT_S = 120.0


class RoundRobin:
    """
    Args:
        replicas: asked at each request for the addresses (`http://host:port`) of those that are meant to be there.

    Attributes:
        url: where it listens; "" until it does.
        served: requests that each address has answered.
    """

    def __init__(self, replicas: Callable[[], Sequence[str]]) -> None:
        self._replicas = replicas
        self._turn = 0
        self.url = ""
        self.served: Counter[str] = Counter()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """On a free port of loopback, until the end of the block."""
        async with raw_session() as self._session:
            runner = web.ServerRunner(web.Server(self._serve, auto_decompress=False), shutdown_timeout=0)
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                yield
            finally:
                await runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        replicas = self._replicas()
        for _ in replicas:
            self._turn += 1
            replica = replicas[self._turn % len(replicas)]
            try:
                answer = await self._ask(replica, request)
            except ClientConnectorError:
                continue
            except (ClientError, TimeoutError, web.RequestPayloadError, ConnectionError) as error:
                return web.Response(status=502, text=f"{replica} went away: {error!r}\n")
            async with answer:
                self.served[replica] += 1
                return await _pass_back(answer, request)
        return web.Response(status=502, text="no replica listens\n")

    async def _ask(self, replica: str, request: web.BaseRequest) -> ClientResponse:
        headers = [pair for pair in request.headers.items() if pair[0].lower() not in _OF_THE_HOP]
        return await self._session.request(
            request.method,
            URL(replica + request.raw_path, encoded=True),
            headers=headers,
            skip_auto_headers=_AUTOMATIC,
            data=_body_of(request) if request.body_exists else None,
            allow_redirects=False,
        )


def raw_session() -> ClientSession:
    """A client that does what it is told, once: nothing is decoded, remembered or repeated.

    A connection serves one request: otherwise one that has died meanwhile would be found out by losing a request.
    """
    session = ClientSession(
        connector=TCPConnector(limit=0, force_close=True),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        timeout=ClientTimeout(total=None, sock_connect=_START_TIMEOUT_S, sock_read=_IDLE_TIMEOUT_S),
    )
    # Otherwise aiohttp sends a PUT or a DELETE again whose answer never came. Its own test client sets this too.
    session._retry_connection = False
    return session


@contextmanager
def round_robin(replicas: Callable[[], Sequence[str]]) -> Iterator[RoundRobin]:
    """A proxy with an event loop and a thread of its own, until the end of the block. For whoever has no loop."""
    proxy = RoundRobin(replicas)
    is_listening = threading.Event()
    loop = asyncio.new_event_loop()
    is_over = asyncio.Event()

    async def listen() -> None:
        async with proxy.listening():
            is_listening.set()
            await is_over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(listen(),), name="round robin")
    thread.start()
    try:
        if not is_listening.wait(_START_TIMEOUT_S):
            raise TimeoutError("the proxy does not listen")
        yield proxy
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join()
        loop.close()


async def _body_of(request: web.BaseRequest) -> AsyncIterator[bytes]:
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    async for chunk in request.content.iter_any():
        yield chunk


async def _pass_back(answer: ClientResponse, request: web.BaseRequest) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, reason=answer.reason)
    for name, value in answer.headers.items():
        if name.lower() not in _OF_THE_HOP:
            response.headers.add(name, value)
    if answer.headers.get("Transfer-Encoding", "").lower() == "chunked":
        response.enable_chunked_encoding()
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
    except (ClientError, TimeoutError):
        # The answer has begun: all that can be said is that it does not end well.
        if request.transport is not None:
            request.transport.abort()
    return response
