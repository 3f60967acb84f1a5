"""A file's bytes as a stream, for callers that cannot let the kernel send the file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

from storage_backends.interface import LocalFile, StorageUnavailable

_PIECE_SIZE = 1024 * 1024


async def chunks_of(delivery: LocalFile) -> AsyncIterator[bytes]:
    """The bytes of the delivery's span, in pieces of at most 1 MiB, inside the delivery's context.

    Raises:
        StorageUnavailable: the file ended early.
    """
    position, stop = delivery.span.start, delivery.span.stop
    while position < stop:
        piece = await asyncio.to_thread(
            os.pread, delivery.file.fileno(), min(_PIECE_SIZE, stop - position), position
        )
        if not piece:
            raise StorageUnavailable("stored content ended before its size")
        position += len(piece)
        yield piece
