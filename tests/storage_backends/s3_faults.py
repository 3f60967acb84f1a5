"""A proxy in front of an object store, which does what networks and stores do when they are not well."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum

from aiohttp import ClientSession, DummyCookieJar, web
from yarl import URL

# Of one hop, or signed for nobody: the proxy's own client and server say these themselves.
_OF_THE_HOP = {"connection", "expect", "transfer-encoding", "keep-alive", "content-length", "date", "server"}


class Fault(Enum):
    SLOW_DOWN = "503 SlowDown, without effect"
    CONFLICT = "409 ConditionalRequestConflict, without effect"
    FAILS = "500 InternalError, without effect"
    REFUSES = "403 AccessDenied, without effect"
    CUT = "the connection is closed, without effect"
    LOSES_ANSWER = "done, and the connection is closed without an answer"
    HANGS = "done, and no answer ever comes"
    ERROR_IN_200 = "200 whose body says InternalError, with the effect"
    TRUNCATES = "the connection is closed half-way through the answer"
    IGNORES_CONDITION = "a condition that is false is answered with 200"


@dataclass(frozen=True, slots=True)
class Request:
    """What a rule sees of a request.

    Attributes:
        key: as S3 has it.
        query, conditions: names only.
    """

    method: str
    key: str
    query: frozenset[str]
    conditions: frozenset[str]

    @property
    def is_internal(self) -> bool:
        return self.key.startswith("_store/")

    @property
    def is_complete(self) -> bool:
        return self.method == "POST" and "uploadId" in self.query


Rule = Callable[[Request], Fault | None]


@dataclass
class FaultyStore:
    """
    Attributes:
        url: where the proxy listens.
        rule: asked at each request.
        requests: all so far, with what was done to them.
        is_over: the end of the block has come.
    """

    url: str = ""
    rule: Rule = lambda _: None
    requests: list[tuple[Request, Fault | None]] = field(default_factory=list)
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    def once(self, fault: Fault, wanted: Callable[[Request], bool]) -> None:
        """From now on: `fault` at the next request that is `wanted`, and none after."""
        left = [fault]
        self.rule = lambda request: left.pop() if left and wanted(request) else None

    def count(self, fault: Fault) -> int:
        return sum(done is fault for _, done in self.requests)


def at_random(seed: int, share: float, faults: Sequence[Fault]) -> Rule:
    """One of the faults at a share of the requests, where it can happen."""
    chance = random.Random(seed)

    def rule(request: Request) -> Fault | None:
        if chance.random() >= share:
            return None
        fault = chance.choice(faults)
        return fault if _can_happen(fault, request) else None

    return rule


def _can_happen(fault: Fault, request: Request) -> bool:
    match fault:
        case Fault.TRUNCATES:
            return request.method == "GET"
        case Fault.ERROR_IN_200:
            return request.is_complete
        case Fault.CONFLICT:
            return bool(request.conditions) and request.method == "PUT"
        case _:
            return True


@asynccontextmanager
async def faulty(endpoint: str) -> AsyncIterator[FaultyStore]:
    """A proxy on loopback for the store at `endpoint`, until the end of the block."""
    store = FaultyStore()
    async with ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar()) as session:

        async def serve(request: web.BaseRequest) -> web.StreamResponse:
            return await _serve(store, session, endpoint, request)

        runner = web.ServerRunner(web.Server(serve))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        store.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield store
        finally:
            store.is_over.set()
            await runner.cleanup()


async def _serve(
    store: FaultyStore, session: ClientSession, endpoint: str, request: web.BaseRequest
) -> web.StreamResponse:
    seen = _seen(request)
    fault = store.rule(seen)
    store.requests.append((seen, fault))
    body = await request.content.read()
    match fault:
        case Fault.SLOW_DOWN:
            return _error(503, "SlowDown")
        case Fault.CONFLICT:
            return _error(409, "ConditionalRequestConflict")
        case Fault.FAILS:
            return _error(500, "InternalError")
        case Fault.REFUSES:
            return _error(403, "AccessDenied")
        case Fault.CUT:
            return _cut(request)
        case _:
            return await _forward(store, session, endpoint, request, body, fault)


async def _forward(  # noqa: PLR0917 - one call, just above
    store: FaultyStore,
    session: ClientSession,
    endpoint: str,
    request: web.BaseRequest,
    body: bytes,
    fault: Fault | None,
) -> web.StreamResponse:
    url = URL(endpoint + request.raw_path, encoded=True)
    headers = {name: text for name, text in request.headers.items() if name.lower() not in _OF_THE_HOP}
    async with session.request(
        request.method, url, data=io.BytesIO(body), headers=headers, skip_auto_headers=("Content-Type",)
    ) as answer:
        content = await answer.read()
        kept = {name: text for name, text in answer.headers.items() if name.lower() not in _OF_THE_HOP}
        if fault is Fault.HANGS:
            await store.is_over.wait()
        if fault in {Fault.LOSES_ANSWER, Fault.HANGS}:
            return _cut(request)
        if fault is Fault.ERROR_IN_200:
            return _error(200, "InternalError")
        if fault is Fault.IGNORES_CONDITION and answer.status == 412:
            return web.Response(status=200, headers={"ETag": '"0"'})
        if request.method == "HEAD":
            kept["Content-Length"] = answer.headers["Content-Length"]
        if fault is Fault.TRUNCATES and len(content) > 1:
            return await _truncated(request, answer.status, kept, content)
        return web.Response(status=answer.status, body=content, headers=kept)


async def _truncated(
    request: web.BaseRequest, status: int, headers: dict[str, str], content: bytes
) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers={**headers, "Content-Length": str(len(content))})
    await response.prepare(request)
    await response.write(content[: len(content) // 2])
    _cut(request)
    return response


def _seen(request: web.BaseRequest) -> Request:
    path, _, query = request.raw_path.partition("?")
    key = URL(path, encoded=True).path.lstrip("/").partition("/")[2]
    names = frozenset(part.partition("=")[0] for part in query.split("&") if part)
    conditions = frozenset(name for name in ("If-Match", "If-None-Match") if name in request.headers)
    return Request(request.method, key, names, conditions)


def _error(status: int, code: str) -> web.Response:
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>m</Message></Error>'
    return web.Response(status=status, text=text, content_type="application/xml")


def _cut(request: web.BaseRequest) -> web.Response:
    if request.transport is not None:  # else the client was faster
        request.transport.abort()
    return web.Response()
