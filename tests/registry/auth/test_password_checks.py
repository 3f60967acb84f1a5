"""L-25, A-22: checks of passwords leave the event loop alone, and there are not too many of them."""

import asyncio
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from kitspec.errors import TooManyRequests
from registry.auth.password_checks import CHECKS_MAX, PasswordChecks, usable_threads


class Gate:
    """Checks that wait until they are let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.count = 0

    def check(self) -> bool:
        self.count += 1
        self.opened.wait()
        return True


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
async def checks() -> AsyncIterator[PasswordChecks]:
    async with PasswordChecks(2, queue_max=3) as checks:
        yield checks


async def begun(checks: PasswordChecks, gate: Gate, count: int) -> list[asyncio.Task[bool]]:
    tasks = [asyncio.create_task(checks.run(b"%d" % number, gate.check)) for number in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_A_22_the_loop_goes_on_while_passwords_are_checked(checks: PasswordChecks, gate: Gate) -> None:
    tasks = await begun(checks, gate, 2)

    turns = [await asyncio.sleep(0, number) for number in range(100)]

    assert turns == list(range(100))
    assert not any(task.done() for task in tasks)
    gate.opened.set()
    assert await asyncio.gather(*tasks) == [True, True]


async def test_L_25_A_22_what_does_not_fit_into_the_queue_is_refused(
    checks: PasswordChecks, gate: Gate
) -> None:
    tasks = await begun(checks, gate, 5)

    with pytest.raises(TooManyRequests):
        await checks.run(b"one more", gate.check)

    gate.opened.set()
    assert await asyncio.gather(*tasks) == [True] * 5
    assert await checks.run(b"one more", lambda: True)


async def test_the_same_check_is_made_once(checks: PasswordChecks, gate: Gate) -> None:
    tasks = [asyncio.create_task(checks.run(b"same", gate.check)) for _ in range(50)]
    await asyncio.sleep(0)
    assert checks.is_pending(b"same")

    gate.opened.set()

    assert await asyncio.gather(*tasks) == [True] * 50
    assert gate.count == 1
    assert not checks.is_pending(b"same")


async def test_who_goes_away_does_not_take_the_check_from_others(checks: PasswordChecks, gate: Gate) -> None:
    first, second = [asyncio.create_task(checks.run(b"same", gate.check)) for _ in range(2)]
    await asyncio.sleep(0)

    first.cancel()
    gate.opened.set()

    assert await second
    assert first.cancelled() or first.cancelling()


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread is Linux's")
async def test_A_22_checks_give_way_to_everything_else(checks: PasswordChecks) -> None:
    niceness: list[int] = []

    def look() -> bool:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return True

    await checks.run(b"look", look)

    assert niceness[0] > os.getpriority(os.PRIO_PROCESS, os.getpid())


@pytest.mark.parametrize("workers", [1, 2, 4, 256])
def test_L_25_workers_share_the_processors(workers: int) -> None:
    assert 1 <= usable_threads(workers) <= CHECKS_MAX
    assert usable_threads(256) == 1
