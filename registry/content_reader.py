"""The bytes of a `Content`, wherever its pieces are: plain ones as the backend delivers them, inflated ones by a thread."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import Final

from kitspec.digest import Digest
from registry import layout
from registry.checkpoints import CheckpointsInvalid
from registry.content import Content, Literal, Piece
from registry.inflate import CHECKPOINT_SPACING, inflated_span
from registry.member_index import MemberIndexes
from registry.member_table import MemberTable
from registry.stored_reader import reader_of
from storage_backends.file_stream import chunks_of
from storage_backends.interface import (
    ByteStream,
    Delivery,
    LocalFile,
    PresignedUrl,
    Span,
    StorageBackend,
    StorageUnavailable,
)
from storage_backends.threads import Threads

# Each inflates for one client at a time.
_INFLATERS: Final = 8


class ContentReader:
    """One for each worker; `close` it."""

    def __init__(self, backend: StorageBackend, indexes: MemberIndexes) -> None:
        self._backend = backend
        self._indexes = indexes
        self._threads = Threads(_INFLATERS, "inflate")

    def close(self) -> None:
        self._threads.close()

    async def deliveries(self, content: Content, start: int, stop: int) -> AsyncGenerator[Delivery, None]:
        """Bytes `start` to `stop` of a content, each piece in the form in which it can be let go.

        A delivery is good until the next one is asked for; close the generator. What stands in one layer, one piece behind
        the other, is read through one opened file, or inflated in one go.

        Raises:
            ObjectMissing: a layer is gone.
        """
        async with AsyncExitStack() as stack:
            opened: tuple[Digest, LocalFile] | None = None
            inflating: _Inflating | None = None
            for segment in content.cut(start, stop):
                if isinstance(segment, Literal):
                    yield ByteStream(_once(segment.content), Span(0, segment.size), segment.size)
                    continue
                if segment.layer_type.compression is not None:
                    if inflating is None or not inflating.is_before(segment):
                        await stack.aclose()
                        inflating = await stack.enter_async_context(self._inflating(segment))
                        opened = None
                    yield ByteStream(inflating.take(segment), Span(segment.start, segment.stop), segment.size)
                    continue
                if opened is None or opened[0] != segment.layer:
                    await stack.aclose()
                    inflating, opened = None, None
                    span = Span(segment.start, segment.stop)
                    delivery = await stack.enter_async_context(
                        self._backend.deliver(layout.blob_key(segment.layer), span)
                    )
                    if isinstance(delivery, LocalFile):
                        opened = (segment.layer, delivery)
                    yield delivery
                else:
                    yield replace(opened[1], span=Span(segment.start, segment.stop))

    async def chunks(self, content: Content, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """Bytes `start` to `stop` of a content, streamed."""
        async with aclosing(
            self.deliveries(content, start, content.size if stop is None else stop)
        ) as deliveries:
            async for delivery in deliveries:
                if isinstance(delivery, PresignedUrl):
                    raise StorageUnavailable("this backend hands out addresses only")
                async for chunk in chunks_of(delivery):
                    yield chunk

    async def read(self, content: Content, start: int, stop: int) -> bytes:
        """`chunks`, for a caller that asks for little."""
        return b"".join([chunk async for chunk in self.chunks(content, start, stop)])

    async def digest(self, content: Content) -> Digest:
        hasher = hashlib.sha256()
        async for chunk in self.chunks(content):
            await self._threads.run(hasher.update, chunk)
        return Digest(f"sha256:{hasher.hexdigest()}")

    @asynccontextmanager
    async def _inflating(self, piece: Piece) -> AsyncIterator[_Inflating]:
        compression = piece.layer_type.compression
        assert compression is not None
        async with reader_of(self._backend, layout.blob_key(piece.layer)) as (read_at, size):

            async def begin(table: MemberTable) -> _Inflating:
                pieces = inflated_span(
                    compression, read_at, size, table.checkpoints, piece.start, table.inflated_size
                )
                first = await self._threads.run(next, pieces, b"")
                return _Inflating(piece, pieces, first, self._threads)

            try:
                inflating = await begin(await self._indexes.table(piece.layer, piece.layer_type))
            except CheckpointsInvalid:
                again = await self._indexes.table_made_again(piece.layer, piece.layer_type)
                inflating = await begin(again)
            try:
                yield inflating
            finally:
                await inflating.close()


class _Inflating:
    """A layer that is being inflated from somewhere on, for pieces that are asked for in their order."""

    def __init__(self, piece: Piece, pieces: Iterator[bytes], first: bytes, threads: Threads) -> None:
        self._layer = (piece.layer, piece.layer_type)
        self._position = piece.start
        self._rest = memoryview(first)
        self._pieces = pieces
        self._threads = threads

    async def close(self) -> None:
        if isinstance(self._pieces, Generator):
            await self._threads.run(self._pieces.close)

    def is_before(self, piece: Piece) -> bool:
        """Whether to go on costs less than to begin again at the piece."""
        is_near = 0 <= piece.start - self._position <= CHECKPOINT_SPACING
        return is_near and (piece.layer, piece.layer_type) == self._layer

    async def take(self, piece: Piece) -> AsyncIterator[bytes]:
        """The bytes of a piece; what lies before it is passed over."""
        while self._position < piece.stop:
            if not self._rest:
                inflated = await self._threads.run(next, self._pieces, None)
                if inflated is None:
                    raise StorageUnavailable("a layer ended before its size")
                self._rest = memoryview(inflated)
            skipped = min(len(self._rest), max(0, piece.start - self._position))
            taken = self._rest[skipped : skipped + piece.stop - self._position - skipped]
            self._rest = self._rest[skipped + len(taken) :]
            self._position += skipped + len(taken)
            if taken:
                yield bytes(taken)


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
