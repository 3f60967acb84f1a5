"""Where passwords are checked: a few threads of low priority, and a short queue in front of them.

A check costs up to a second of a processor, on purpose. So it never runs in the event loop, never in the pool that
everything shares, and gives way to whatever else wants to run: pulls go on at their speed while passwords are guessed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self

from kitspec.errors import TooManyRequests

# L-25: of one worker. More would only have them wait for each other's processor.
CHECKS_MAX: Final = 4
QUEUE_MAX: Final = 64
_NICENESS: Final = 10


class PasswordChecks:
    """Runs checks, `CHECKS_MAX` at a time; the same check asked for twice at once is made once.

    Args:
        threads: how many checks run at once.
    """

    def __init__(self, threads: int = CHECKS_MAX, *, queue_max: int = QUEUE_MAX) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="password", initializer=_give_way)
        self._pending_max = threads + queue_max
        self._pending: dict[bytes, asyncio.Future[bool]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # A thread cannot be stopped, but what waits for one is not begun.
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)

    def is_pending(self, key: bytes) -> bool:
        return key in self._pending

    async def run(self, key: bytes, check: Callable[[], bool]) -> bool:
        """The result of `check`, made in a thread.

        Args:
            key: the same for checks that cannot differ.

        Raises:
            TooManyRequests: too many checks wait already; this one was not made.
        """
        pending = self._pending.get(key)
        if pending is None:
            if len(self._pending) >= self._pending_max:
                raise TooManyRequests(
                    f"{len(self._pending)} passwords are being checked; try again in a moment"
                )
            pending = asyncio.get_running_loop().run_in_executor(self._pool, check)
            self._pending[key] = pending
            pending.add_done_callback(lambda _: self._pending.pop(key, None))
        # A client that goes away must not take the check from others who wait for it.
        return await asyncio.shield(pending)


def usable_threads(worker_count: int) -> int:
    """How many checks one worker of several may run at once on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(CHECKS_MAX, cores // worker_count))


def _give_way() -> None:
    """Lower the priority of this thread. On Linux niceness is each thread's own; elsewhere it is left alone."""
    if os.uname().sysname == "Linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _NICENESS)
