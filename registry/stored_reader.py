"""Stored bytes for a thread that wants some here and some there, whatever the backend is."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from storage_backends.file_stream import chunks_of
from storage_backends.interface import (
    LocalFile,
    PresignedUrl,
    Span,
    StorageBackend,
    StorageUnavailable,
)

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> those bytes, fewer only at the end. Blocks: for threads."""


@asynccontextmanager
async def reader_of(backend: StorageBackend, key: str) -> AsyncIterator[tuple[ReadAt, int]]:
    """A reader of the object at `key`, and its size; good as long as the context lasts.

    Raises:
        ObjectMissing: there is none.
    """
    loop = asyncio.get_running_loop()
    async with backend.deliver(key) as delivery:
        if isinstance(delivery, LocalFile):
            yield _reader_of_file(delivery.file.fileno(), key), delivery.size
            return
        whole = delivery.size

    def read_at(offset: int, size: int) -> bytes:
        stop = min(offset + size, whole)
        if offset >= stop:
            return b""
        return asyncio.run_coroutine_threadsafe(read_span(backend, key, Span(offset, stop)), loop).result()

    yield read_at, whole


def _reader_of_file(descriptor: int, key: str) -> ReadAt:
    def read_at(offset: int, size: int) -> bytes:
        try:
            return os.pread(descriptor, size, offset)
        except OSError as error:
            raise StorageUnavailable(f"{key}: {error.strerror}") from error

    return read_at


async def read_span(backend: StorageBackend, key: str, span: Span) -> bytes:
    """A part of an object, whole: for callers that ask for little.

    Raises:
        ObjectMissing: there is no such object.
        StorageUnavailable: it ended early.
    """
    async with backend.deliver(key, span) as delivery:
        if isinstance(delivery, PresignedUrl):
            raise StorageUnavailable("this backend hands out addresses only; the bytes cannot be read here")
        content = b"".join([chunk async for chunk in chunks_of(delivery)])
    if len(content) != span.stop - span.start:
        raise StorageUnavailable(f"{key} ended early: {len(content)} bytes of {span.stop - span.start}")
    return content
