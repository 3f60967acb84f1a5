"""Our registry with accounts (tests/registry/auth/world.py), as kitclient sees it."""

from __future__ import annotations

from aiohttp.abc import AbstractResolver, ResolveResult

from kitclient.credentials import Credential
from kitclient.remote import RemoteRegistry
from kitclient.transport import RetryPolicy
from tests.kitclient.peer import Pauses
from tests.registry.auth.world import HOST, World


class EveryPortIsHere(AbstractResolver):
    """So that the registry can say under which name and port its token service is known."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        _ = port, family
        return [
            {"hostname": host, "host": "127.0.0.1", "port": self._port, "family": 2, "proto": 0, "flags": 0}
        ]

    async def close(self) -> None:
        pass


def seen_by(world: World, credential: Credential | None) -> RemoteRegistry:
    """A client of the registry; an async context manager."""

    async def source(host: str) -> Credential | None:
        return credential if host == HOST.removeprefix("http://") else None

    return RemoteRegistry(
        HOST.removeprefix("http://"),
        plain_http=True,
        credentials=source,
        resolver=EveryPortIsHere(world.wire.port),
        retry=RetryPolicy(sleep=Pauses().sleep),
    )
