"""Replicas as a client in a coroutine sees them: any of them can be asked, and any can be killed while it serves.

A request has an answer, or it is `Lost`: whether it had an effect is then unknown, as it is for a real client.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import ClientError, ClientSession
from multidict import CIMultiDictProxy
from yarl import URL

from tests.replicas.cluster import Cluster
from tests.replicas.round_robin import raw_session

# A body goes to the socket in pieces of this size: the finest share of it after which somebody can be killed.
_PIECE_SIZE = 64 * 1024
_TRAIL_LENGTH = 60


class Lost(Exception):
    """No answer, or not all of it."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: CIMultiDictProxy[str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Kill:
    """The end of the replica that serves a client's request: in its body, some time after it began, or behind its answer.

    Attributes:
        request: which, counted from 0.
        share: of the body that has been sent then, from 0 to 1; at once, where there is no body.
        delay_s: since the request began. Neither of the two: when it has been answered.
    """

    request: int
    share: float | None = None
    delay_s: float | None = None


class Fleet:
    """The replicas of a cluster; the place of one that is killed is taken by another.

    Attributes:
        kills: so far.
    """

    def __init__(self, cluster: Cluster, session: ClientSession, tasks: asyncio.TaskGroup) -> None:
        self._cluster = cluster
        self.session = session
        self._tasks = tasks
        self._changed = asyncio.Condition()
        self._taken = set(range(len(cluster)))
        self.kills = 0

    async def choose(self, chance: random.Random) -> int:
        """A place where a replica is."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._taken)
        return chance.choice(sorted(self._taken))

    async def at(self, place: int) -> str:
        """The address of the replica in a place, once there is one."""
        async with self._changed:
            await self._changed.wait_for(lambda: place in self._taken)
        return self._cluster.replica(place).url

    async def kill(self, place: int) -> None:
        """SIGKILL, unless somebody else was faster; another takes the place meanwhile."""
        if place in self._taken:
            self._taken.discard(place)
            self.kills += 1
            self._cluster.kill(place)
            self._tasks.create_task(self._fill(place))

    def kill_soon(self, place: int, delay_s: float) -> asyncio.Task[None]:
        """`kill`, that much later; done when it is done."""

        async def kill_later() -> None:
            await asyncio.sleep(delay_s)
            await self.kill(place)

        return self._tasks.create_task(kill_later())

    async def _fill(self, place: int) -> None:
        await asyncio.to_thread(self._cluster.start, place)
        async with self._changed:
            self._taken.add(place)
            self._changed.notify_all()

    @property
    def places(self) -> range:
        return range(len(self._cluster))


@asynccontextmanager
async def fleet_of(cluster: Cluster) -> AsyncIterator[Fleet]:
    """All places are taken again when the block is over."""
    async with raw_session() as session, asyncio.TaskGroup() as tasks:
        yield Fleet(cluster, session, tasks)


@dataclass
class Client:
    """Sends each request to another replica, chosen at random, or in turn from `places`.

    Attributes:
        kills: who serves these of its requests does not live to answer, or just so.
        trail: what was asked of whom lately, and what came of it.
    """

    fleet: Fleet
    chance: random.Random
    kills: tuple[Kill, ...] = ()
    places: deque[int] = field(default_factory=deque)
    trail: deque[str] = field(default_factory=lambda: deque(maxlen=_TRAIL_LENGTH))
    asked: int = 0

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        place: int | None = None,
    ) -> Answer:
        """
        Args:
            path: of the URL, with its query, as it goes on the wire.
            place: whom to ask.

        Raises:
            Lost: the replica went away.
        """
        if place is None:
            place = self.places.popleft() if self.places else await self.fleet.choose(self.chance)
        kill = next((kill for kill in self.kills if kill.request == self.asked), None)
        number, self.asked = self.asked, self.asked + 1
        mark = f"{number}: {method} {path} at {place}, {len(body)} bytes{f', {kill}' if kill else ''}"
        try:
            answer = await self._ask(method, path, place, kill, body, headers or {})
        except Lost as error:
            self.trail.append(f"{mark}: lost, {error}")
            raise
        self.trail.append(f"{mark}: {answer.status} {answer.headers.get('Range', '')}")
        return answer

    async def _ask(  # noqa: PLR0917 - one call, just above
        self, method: str, path: str, place: int, kill: Kill | None, body: bytes, headers: Mapping[str, str]
    ) -> Answer:
        url = URL(await self.fleet.at(place) + path, encoded=True)
        share, delay_s = (kill.share, kill.delay_s) if kill is not None else (None, None)
        if share is not None and not body:
            share, delay_s = None, 0.0
        timer = None if delay_s is None else self.fleet.kill_soon(place, delay_s)
        try:
            async with self.fleet.session.request(
                method,
                url,
                headers={**headers, "Content-Length": str(len(body))},
                data=self._pieces(body, place, share) if body else None,
            ) as response:
                return Answer(response.status, response.headers, await response.read())
        except (ClientError, ConnectionError, TimeoutError) as error:
            raise Lost(repr(error)) from error
        finally:
            if timer is not None:
                await timer
            elif kill is not None and share is None:
                await self.fleet.kill(place)

    async def _pieces(self, body: bytes, place: int, share: float | None) -> AsyncIterator[bytes]:
        stop = len(body) if share is None else int(len(body) * share)
        for offset in range(0, stop, _PIECE_SIZE):
            yield body[offset : min(offset + _PIECE_SIZE, stop)]
        if share is not None:
            await self.fleet.kill(place)
            yield body[stop:]
