"""A delivery's bytes as a stream, for callers that cannot let the kernel send a file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from storage_backends.interface import ByteStream, LocalFile, StorageUnavailable

_PIECE_SIZE = 1024 * 1024


def chunks_of(delivery: LocalFile | ByteStream) -> AsyncIterator[bytes]:
    """The bytes of the delivery's span, inside the delivery's context; of a file in pieces of at most 1 MiB.

    Raises:
        StorageUnavailable: the file ended early.
    """
    return delivery.chunks if isinstance(delivery, ByteStream) else _chunks_of_file(delivery)


async def _chunks_of_file(delivery: LocalFile) -> AsyncIterator[bytes]:
    position, stop = delivery.span.start, delivery.span.stop
    while position < stop:
        piece = await asyncio.to_thread(
            os.pread, delivery.file.fileno(), min(_PIECE_SIZE, stop - position), position
        )
        if not piece:
            raise StorageUnavailable("stored content ended before its size")
        position += len(piece)
        yield piece
