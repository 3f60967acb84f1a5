"""A server that answers as a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from kitclient.remote import RemoteRegistry
from kitclient.transport import RetryPolicy

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Peer:
    """A server on a loopback port. `answer` may be replaced at any time."""

    answer: Answer
    port: int = 0
    requests: list[web.BaseRequest] = field(default_factory=list)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.path_qs}" for request in self.requests]

    @property
    def authorizations(self) -> list[list[str]]:
        """The Authorization fields of each request, every one of them."""
        return [request.headers.getall("Authorization", []) for request in self.requests]


@asynccontextmanager
async def serving(answer: Answer, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    peer = Peer(answer)

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        peer.requests.append(request)
        return await peer.answer(request)  # type: ignore[arg-type]

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    peer.port = runner.addresses[0][1]
    try:
        yield peer
    finally:
        await runner.cleanup()


class EveryNameIsHere(AbstractResolver):
    """So that a test can own any host."""

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        _ = family
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


@dataclass
class Pauses:
    """Time that is asked for and not spent."""

    seconds: list[float] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)


def client(
    peer: Peer, *, host: str | None = None, pauses: Pauses | None = None, **settings: Any
) -> RemoteRegistry:
    """A client of the peer, under its own address or, on its port, under any name."""
    return RemoteRegistry(
        f"{host}:{peer.port}" if host else peer.host,
        retry=RetryPolicy(sleep=(pauses or Pauses()).sleep),
        resolver=EveryNameIsHere(),
        **{"plain_http": True, **settings},
    )


async def not_found(request: web.BaseRequest) -> web.Response:
    _ = request
    return web.Response(status=404)
