"""Content out of a bucket: one ranged GET for each segment, taken up again where its connection broke."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from storage_backends.interface import ObjectMissing, PreconditionFailed, Span, StorageUnavailable
from storage_backends.s3_client import Body, S3Client
from storage_backends.s3_errors import TryAgain
from storage_backends.s3_format import Segment, pieces_of
from storage_backends.threads import Threads

# What one hand-over to a thread brings; all that a stream holds in memory.
_CHUNK_SIZE: Final = 1024 * 1024


class SegmentStream:
    """The bytes `span` of what the segments are together. Read it to its end or not, then close it."""

    def __init__(self, client: S3Client, threads: Threads, segments: Sequence[Segment], span: Span) -> None:
        self._client = client
        self._threads = threads
        self._pieces = list(pieces_of(segments, span))
        self._body: Body | None = None

    async def begin(self) -> None:
        """Send the first request: what is opened goes on although its key is deleted.

        Raises:
            ObjectMissing, PreconditionFailed: the object of a segment is not what it was.
        """
        if self._pieces:
            await self._threads.run(self._client.again, self._ensure_body)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises: StorageUnavailable: the content ends early."""
        while self._pieces:
            yield await self._threads.run(self._next)

    async def close(self) -> None:
        await self._threads.run(self._drop_body)

    def _next(self) -> bytes:
        try:
            return self._client.again(self._read)
        except (ObjectMissing, PreconditionFailed) as error:
            raise StorageUnavailable("the content was removed while it was read") from error

    def _read(self) -> bytes:
        body = self._ensure_body()
        segment, span = self._pieces[0]
        try:
            chunk = body.read(min(_CHUNK_SIZE, span.stop - span.start))
        except TryAgain:
            self._drop_body()
            raise
        rest = Span(span.start + len(chunk), span.stop)
        if rest.start < rest.stop:
            self._pieces[0] = (segment, rest)
        else:
            self._drop_body()
            del self._pieces[0]
        return chunk

    def _ensure_body(self) -> Body:
        if self._body is None:
            segment, span = self._pieces[0]
            wanted = f"bytes={span.start}-{span.stop - 1}"
            self._body = self._client.get(segment.key, span=wanted, expect=segment.version)
        return self._body

    def _drop_body(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
