"""The way of bytes from the event loop to a thread: batches, a bounded queue, one thread at a time.

A thread belongs to an append only while there is something to do: a client that sends slowly, or not at all, holds no
thread, and a thousand of them no thousand threads. Everything but `_work` runs in the loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from storage_backends.interface import BlockingSource
from storage_backends.threads import Threads, uncancelled

# A hand-over to a thread costs about 0.1 ms, writing and hashing this much about 1 ms.
BATCH_SIZE: Final = 1024 * 1024
# A client may send single bytes: one writev takes at most 1024 pieces (IOV_MAX).
_BATCH_COUNT_MAX: Final = 1024
QUEUE_SIZE_MAX: Final = 4 * 1024 * 1024
# Then others waiting for a thread have their turn.
_TURN_BATCHES: Final = 8


def fill(view: memoryview, source: BlockingSource) -> tuple[int, BaseException | None]:
    """Fill `view`; how far it came before the end, or before what stopped it."""
    size = 0
    try:
        while size < len(view) and (count := source.read_into(view[size:])):
            size += count
    except BaseException as error:  # noqa: BLE001 - handed on by whoever waits for the bytes
        return size, error
    return size, None


async def drained(
    threads: Threads, drain: Callable[[], BaseException | None], source: BlockingSource
) -> None:
    """Wait for a thread that drains `source`; raise what stopped it, or interrupt it when cancelled."""
    failure = await threads.run_interruptible(drain, source.interrupt)
    if failure is not None:
        raise failure


class Intake:
    """
    Args:
        write: called in a thread with each batch, in order. After it raised it is not called again.
        queue_size_max: tells how many bytes may wait for it now.
    """

    def __init__(
        self,
        threads: Threads,
        write: Callable[[Sequence[bytes]], None],
        *,
        queue_size_max: Callable[[], int] = lambda: QUEUE_SIZE_MAX,
    ) -> None:
        self._threads = threads
        self._write = write
        self._queue_size_max = queue_size_max
        self._loop = asyncio.get_running_loop()
        self._batch: list[bytes] = []
        self._batch_size = 0
        self._batches: deque[tuple[list[bytes], int]] = deque()
        self._turn: asyncio.Future[None] | None = None
        self._failure: BaseException | None = None
        self._size_in = 0
        self._size_out = 0  # written by the thread only
        self._is_waiting = False
        self._room = asyncio.Event()

    async def put(self, piece: bytes) -> None:
        """Take a piece; return when there is room for another. A cancelled call has taken the piece.

        Raises whatever `write` raised.
        """
        if not piece:
            return
        self._batch.append(piece)
        self._batch_size += len(piece)
        if self._batch_size < BATCH_SIZE and len(self._batch) < _BATCH_COUNT_MAX:
            return
        self._batches.append((self._batch, self._batch_size))
        self._size_in += self._batch_size
        self._batch, self._batch_size = [], 0
        if self._turn is None and self._failure is None:
            self._begin_turn()
        await self._wait_for_room()

    async def finish(self) -> list[bytes]:
        """Wait until all that was put is written, but for a last, smaller batch, which is returned.

        Raises whatever `write` raised.
        """
        while self._turn is not None:
            await uncancelled(asyncio.ensure_future(asyncio.wait([self._turn])))
        if self._failure is not None:
            raise self._failure
        return self._batch

    async def _wait_for_room(self) -> None:
        while self._size_in - self._size_out >= self._queue_size_max() and self._failure is None:
            self._room.clear()
            self._is_waiting = True
            # Looked at again: the thread may have made room before it could see that somebody waits.
            if self._size_in - self._size_out >= self._queue_size_max():
                await self._room.wait()
        self._is_waiting = False
        if self._failure is not None:
            raise self._failure

    def _begin_turn(self) -> None:
        self._turn = self._threads.submit(self._work)
        self._turn.add_done_callback(self._end_turn)

    def _end_turn(self, turn: asyncio.Future[None]) -> None:
        self._turn = None
        self._failure = turn.exception()
        if self._failure is None and self._batches:
            self._begin_turn()
        self._room.set()

    def _work(self) -> None:
        for _ in range(_TURN_BATCHES):
            try:
                batch, size = self._batches.popleft()
            except IndexError:
                return
            self._write(batch)
            self._size_out += size
            if self._is_waiting and self._size_in - self._size_out <= self._queue_size_max() // 2:
                self._loop.call_soon_threadsafe(self._room.set)
