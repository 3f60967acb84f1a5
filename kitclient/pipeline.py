"""Bytes between the event loop and threads, in both directions, with bounded buffers and large pieces.

A piece of about a mebibyte makes a thread's turn cheap; one being worked on and one being gathered bound the memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from kitclient.progress import BlobProgress

_T = TypeVar("_T")

_BATCH_SIZE = 1024 * 1024

Worker = Callable[[Sequence[bytes]], None]


@contextmanager
def own_threads(count: int, name: str) -> Iterator[Executor]:
    """A pool for one piece of work, all of whose turns are over when the block ends: nobody waits for its threads."""
    threads = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False)


async def drain(
    chunks: AsyncIterable[bytes], workers: Sequence[Worker], threads: Executor, progress: BlobProgress
) -> None:
    """Give all of `chunks` to every worker, in order; the workers run beside each other and beside what brings chunks.

    When anything fails or the task is cancelled, no worker runs any more when this returns.
    """
    working: list[asyncio.Future[None]] = []
    batch: list[bytes] = []
    size = 0
    try:
        async for chunk in chunks:
            progress.advance(len(chunk))
            batch.append(chunk)
            size += len(chunk)
            if size >= _BATCH_SIZE:
                await _all(working)
                working = _start(workers, batch, threads)
                batch, size = [], 0
        await _all(working)
        working = _start(workers, batch, threads)
        await _all(working)
    finally:
        await _rest(working)


async def pieces_of(source: Iterator[bytes], threads: Executor) -> AsyncIterator[bytes]:
    """What a blocking iterator gives, the next piece always being made while the last one is used."""
    loop = asyncio.get_running_loop()
    coming = loop.run_in_executor(threads, next, source, None)
    try:
        # Shielded: a thread cannot be cancelled, and nothing may be closed under it.
        while (piece := await asyncio.shield(coming)) is not None:
            coming = loop.run_in_executor(threads, next, source, None)
            yield piece
    finally:
        await _rest([coming])


def batches(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of about a mebibyte; what is large already is not copied."""
    gathered: list[bytes] = []
    size = 0
    for piece in pieces:
        if len(piece) >= _BATCH_SIZE // 2:
            if gathered:
                yield b"".join(gathered)
                gathered, size = [], 0
            yield piece
            continue
        gathered.append(piece)
        size += len(piece)
        if size >= _BATCH_SIZE:
            yield b"".join(gathered)
            gathered, size = [], 0
    if gathered:
        yield b"".join(gathered)


def _start(
    workers: Sequence[Worker], batch: Sequence[bytes], threads: Executor
) -> list[asyncio.Future[None]]:
    loop = asyncio.get_running_loop()
    return [loop.run_in_executor(threads, worker, batch) for worker in workers]


async def _all(working: Sequence[asyncio.Future[None]]) -> None:
    for future in working:
        await asyncio.shield(future)


async def _rest(working: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until no thread works any more; what it says now comes too late to matter."""
    await asyncio.gather(*working, return_exceptions=True)


async def finished(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is not interrupted: a cancellation waits until it is over, and then goes on."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
