"""Random pushes, made of a seed: what is pushed, in which requests, and when the replica that serves one is killed.

Many run at once, so that a kill also hits requests of others. A seed makes the same push again, not the same race.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tests.replicas.fleet import Client, Fleet, Kill
from tests.replicas.pushing import Kit, Mounting, Push, Sending, Way, check, delete, random_cuts

T = TypeVar("T")

MIB = 1024 * 1024
_BLOB_SIZE_MAX = 12 * MIB
# More than a part of S3, so that an upload has several.
_LARGE_FROM = 4 * MIB
_LARGE_SHARE = 0.35
# The last four parts are sent as objects of their own; before them is more than a part.
_SEGMENTS_FROM = 25 * MIB + 1
# Contents that several kits have: the second to push one meets the first, also in the same moment.
_SHARED_COUNT = 8
_SHARED_SHARE = 0.25
_MOUNT_SHARE = 0.3
# How long requests take here; most kills are to come before the answer.
_KILL_DELAY_MAX_S = 0.05
_LONG_KILL_DELAY_MAX_S = 0.5
_AT_ONCE = 4


@dataclass
class Outcome:
    """
    Attributes:
        kits: acknowledged, all of them.
        happened: how often what was out of the ordinary.
    """

    kits: list[Kit] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One push."""

    seed: int
    parts: tuple[Sending | Mounting, ...]
    kills: tuple[Kill, ...]

    @classmethod
    def of(cls, seed: int, earlier: Sequence[Kit]) -> Schedule:
        """
        Args:
            earlier: what may be mounted.
        """
        chance = random.Random(seed)
        config = Sending(chance.randbytes(chance.randrange(1, 1000)), Way.PUT)
        layers = [_random_sending(chance) for _ in range(chance.randrange(1, 3))]
        mounted = [_random_mounting(chance, earlier)] if earlier and chance.random() < _MOUNT_SHARE else []
        parts: tuple[Sending | Mounting, ...] = (config, *layers, *mounted)
        return cls(seed, parts, _random_kills(chance, requests=sum(map(_requests_of, parts)) + 1))

    @classmethod
    def of_segments(cls, seed: int, _: Sequence[Kit]) -> Schedule:
        """A layer that is kept in several objects where downloads are not redirected, and ends in objects of one request each."""
        chance = random.Random(f"segments {seed}")
        content = chance.randbytes(chance.randrange(_SEGMENTS_FROM, _SEGMENTS_FROM + _BLOB_SIZE_MAX))
        # What is still to come is known in a request that closes the upload; what came before may end in a part.
        cuts = random_cuts(chance, _LARGE_FROM * 2, 1)
        layer = Sending(content, chance.choice((Way.POST, Way.PUT, Way.LAST_IN_PUT)), cuts)
        parts = (Sending(chance.randbytes(100), Way.PUT), layer)
        requests = sum(map(_requests_of, parts)) + 1
        return cls(seed, parts, _random_kills(chance, requests=requests, delay_max_s=_LONG_KILL_DELAY_MAX_S))

    @property
    def name(self) -> str:
        return f"kits/k{self.seed}"


async def run(
    fleet: Fleet,
    seeds: Sequence[int],
    schedule_of: Callable[[int, Sequence[Kit]], Schedule] = Schedule.of,
) -> Outcome:
    """The schedules of these seeds, some at once; each is checked when it is through.

    Raises:
        Broken: in an ExceptionGroup.
    """
    outcome = Outcome()

    async def run_one(seed: int) -> None:
        schedule = schedule_of(seed, outcome.kits)
        chance = random.Random(seed)
        push = Push(Client(fleet, chance, schedule.kills), schedule.name)
        kit = await push.kit(schedule.parts, "v1")
        await check(Client(fleet, chance), kit)
        outcome.kits.append(kit)
        outcome.happened += push.happened

    await some_at_once(seeds, run_one)
    return outcome


async def read_again(fleet: Fleet, kits: Sequence[Kit]) -> None:
    """Each of these, at some replica. Raises: Broken: in an ExceptionGroup."""
    chance = random.Random(0)

    async def read(kit: Kit) -> None:
        await check(Client(fleet, chance), kit, places=[await fleet.choose(chance)])

    await some_at_once(kits, read)


async def delete_all(fleet: Fleet, kits: Sequence[Kit]) -> None:
    """Raises: Broken: in an ExceptionGroup."""
    chance = random.Random(0)
    await some_at_once(kits, lambda kit: delete(Client(fleet, chance), kit))


async def some_at_once(things: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    """`work` for each, a few at the same time. What one raises ends all."""
    left = iter(things)

    async def work_on_some() -> None:
        for thing in left:
            await work(thing)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(_AT_ONCE):
            tasks.create_task(work_on_some())


def _random_sending(chance: random.Random) -> Sending:
    # What is shared is made of a seed of its own, whoever pushes it.
    is_shared = chance.random() < _SHARED_SHARE
    maker = random.Random(f"shared {chance.randrange(_SHARED_COUNT)}") if is_shared else chance
    content = maker.randbytes(_random_size(maker))
    cuts = random_cuts(chance, len(content), chance.randrange(4))
    return Sending(content, chance.choice(tuple(Way)), cuts, is_asked_first=chance.random() < 0.5)


def _random_size(chance: random.Random) -> int:
    if chance.random() < _LARGE_SHARE:
        return chance.randrange(_LARGE_FROM, _BLOB_SIZE_MAX + 1)
    return int(_BLOB_SIZE_MAX ** chance.random())


def _random_mounting(chance: random.Random, earlier: Sequence[Kit]) -> Mounting:
    kit = chance.choice(earlier)
    return Mounting(chance.choice(kit.blobs), kit.name)


def _random_kills(
    chance: random.Random, *, requests: int, delay_max_s: float = _KILL_DELAY_MAX_S
) -> tuple[Kill, ...]:
    """One or two, of the requests that there are when nothing goes wrong."""
    numbers = chance.sample(range(requests), chance.choice((1, 1, 1, 2)))
    return tuple(_random_kill(chance, number, delay_max_s) for number in numbers)


def _random_kill(chance: random.Random, request: int, delay_max_s: float) -> Kill:
    match chance.choice(("body", "body", "body", "time", "time", "answer")):
        case "body":
            return Kill(request, share=chance.random())
        case "time":
            return Kill(request, delay_s=chance.random() * delay_max_s)
        case _:
            return Kill(request)


def _requests_of(part: Sending | Mounting) -> int:
    match part:
        case Mounting():
            return 1
        case Sending(way=Way.POST):
            return 1
        case Sending(way=Way.PUT):
            return 2
        case _:
            return 2 + len(set(part.cuts))
