"""Content out of a bucket: one ranged GET for each segment, taken up again where its connection broke."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, TypeVar

from storage_backends.interface import (
    BlockingSink,
    ObjectMissing,
    PreconditionFailed,
    Span,
    StorageError,
    StorageUnavailable,
)
from storage_backends.s3_client import Body, S3Client
from storage_backends.s3_errors import TryAgain
from storage_backends.s3_format import Segment, pieces_of
from storage_backends.threads import Threads, uncancelled

T = TypeVar("T", bytes, memoryview)

# What one hand-over to a thread brings. A stream holds two: one is read while the one before is sent.
_CHUNK_SIZE: Final = 1024 * 1024
# What a thread that drains reads and writes at once. Smaller ones cost more (docs/adr/0015-s3.md).
_BUFFER_SIZE: Final = 2 * 1024 * 1024
# How much of a segment is left when the next one is asked for. More would let the store wait for us, and give up.
_ASK_AHEAD_SIZE: Final = 8 * 1024 * 1024


class SegmentStream:
    """The bytes `span` of what the segments are together. Read it to its end or not, in one of both ways, then close it."""

    def __init__(self, client: S3Client, threads: Threads, segments: Sequence[Segment], span: Span) -> None:
        self._client = client
        self._threads = threads
        self._pieces = list(pieces_of(segments, span))
        self._body: Body | None = None
        self._next_body: Future[Body] | None = None
        self._next_piece: tuple[Segment, Span] | None = None
        self._next_chunk: asyncio.Future[bytes] | None = None

    async def begin(self) -> None:
        """Send the first request: what is opened goes on although its key is deleted.

        Raises:
            ObjectMissing, PreconditionFailed: the object of a segment is not what it was.
        """
        if self._pieces:
            await self._threads.run(self._client.again, self._ensure_body)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises: StorageUnavailable: the content ends early."""
        self._read_ahead()
        while self._next_chunk is not None:
            chunk = await uncancelled(self._next_chunk)
            self._read_ahead()
            yield chunk

    def _read_ahead(self) -> None:
        self._next_chunk = self._threads.submit(self._next) if self._pieces else None

    def drain(self, sink: BlockingSink) -> None:
        """Write the bytes from the thread that calls.

        Raises:
            StorageUnavailable: the content ends early.
            whatever the sink raises.
        """
        # Pages of its own: what goes back to the heap stays in the process. They count once they are written to.
        buffer = memoryview(mmap.mmap(-1, _BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

        def fill(body: Body, size: int) -> memoryview:
            return buffer[: body.read_into(buffer[:size])]

        while self._pieces:
            sink.write(self._take(fill, len(buffer)))

    async def close(self) -> None:
        try:
            if self._next_chunk is not None:
                await uncancelled(asyncio.ensure_future(asyncio.wait([self._next_chunk])))
                self._next_chunk.exception()  # seen: nobody waits for these bytes any more
        finally:
            await self._threads.run(self._drop_bodies)

    def _next(self) -> bytes:
        return self._take(Body.read, _CHUNK_SIZE)

    def _take(self, read: Callable[[Body, int], T], size_max: int) -> T:
        """What `read` gives of the next bytes, given how many it may take; from another connection where one broke.

        Raises:
            StorageUnavailable: the content ends early.
        """
        try:
            try:
                return self._take_once(read, size_max)
            except TryAgain:
                return self._client.again(lambda: self._take_once(read, size_max))
        except (ObjectMissing, PreconditionFailed) as error:
            raise StorageUnavailable("the content was removed while it was read") from error

    def _take_once(self, read: Callable[[Body, int], T], size_max: int) -> T:
        body = self._ensure_body()
        segment, span = self._pieces[0]
        try:
            taken = read(body, min(size_max, span.stop - span.start))
        except TryAgain:
            self._drop_body()
            raise
        rest = Span(span.start + len(taken), span.stop)
        if rest.start < rest.stop:
            self._pieces[0] = (segment, rest)
            self._ask_ahead(rest.stop - rest.start)
        else:
            self._drop_body()
            del self._pieces[0]
        return taken

    def _ensure_body(self) -> Body:
        if self._body is None:
            self._body = self._asked_ahead() or self._ask(*self._pieces[0])
        return self._body

    def _ask(self, segment: Segment, span: Span) -> Body:
        wanted = f"bytes={span.start}-{span.stop - 1}"
        return self._client.get(segment.key, span=wanted, expect=segment.version)

    def _ask_ahead(self, rest_size: int) -> None:
        """Have another thread ask for the next segment, so that its answer is there when it is needed."""
        if rest_size <= _ASK_AHEAD_SIZE and self._next_body is None and len(self._pieces) > 1:
            self._next_piece = self._pieces[1]
            self._next_body = self._threads.begin(self._ask, *self._next_piece)

    def _asked_ahead(self) -> Body | None:
        """The answer for the first piece, if it was asked for ahead and not only meant to be. Raises what `_ask` raises."""
        if self._next_body is None or self._pieces[0] is not self._next_piece:
            return None
        asked, self._next_body = self._next_body, None
        # Never wait for a thread that may wait for us: we may have the last one of the pool.
        return None if asked.cancel() else asked.result()

    def _drop_body(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def _drop_bodies(self) -> None:
        self._drop_body()
        asked, self._next_body = self._next_body, None
        if asked is not None and not asked.cancel():
            with suppress(StorageError):
                asked.result().close()


class Drainers:
    """Threads that drain streams, each one at a time: slow clients hold them for long."""

    def __init__(self, count: int) -> None:
        self._threads = Threads(count, "s3-drain")
        self._free = count

    def close(self) -> None:
        self._threads.close()

    async def drain(self, stream: SegmentStream, sink: BlockingSink) -> bool:
        """Write all that is left of a stream to a sink; False where no thread is free, and nothing was read.

        A cancellation interrupts the sink, and is passed on when the thread is free.

        Raises:
            StorageUnavailable: the content ends early.
            whatever the sink raises.
        """
        if not self._free:
            return False
        self._free -= 1
        try:
            await self._threads.run_interruptible(lambda: stream.drain(sink), sink.interrupt)
        finally:
            self._free += 1
        return True
