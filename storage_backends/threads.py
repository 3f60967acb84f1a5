"""Threads of our own for what blocks, and waiting for them that a cancellation does not cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """A pool that only its owner uses: the loop's default one has few threads, and others wait in it for DNS."""

    def __init__(self, count_max: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(count_max, thread_name_prefix=name)

    def begin(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """For a caller in another thread."""
        return self._executor.submit(call, *args, **kwargs)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        return asyncio.wrap_future(self._executor.submit(call, *args, **kwargs))

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call` in a thread and wait for its end, also when cancelled: nothing goes on behind the caller's back."""
        return await uncancelled(self.submit(call, *args, **kwargs))

    async def run_interruptible(self, call: Callable[[], T], interrupt: Callable[[], None]) -> T:
        """`run`, for a call that may wait for ever: a cancellation calls `interrupt`, which makes it end."""
        future = self.submit(call)
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            interrupt()
            await uncancelled(asyncio.ensure_future(asyncio.wait([future])))
            future.exception()  # seen: the cancellation is what the caller hears of
            raise
        return future.result()

    def close(self) -> None:
        """End the threads; what still runs, runs to its end."""
        self._executor.shutdown(wait=False)


async def uncancelled(future: asyncio.Future[T]) -> T:
    """Wait for what must not be left half done; a cancellation is passed on when it is over."""
    cancellation: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        if not future.cancelled():
            future.exception()  # seen: the cancellation is what the caller hears of
        raise cancellation
    return future.result()
