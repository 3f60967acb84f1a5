"""Streams of a blob's bytes on their way through the client: where they come from, counted, cut, verified."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

from kitclient.progress import BlobProgress
from kitspec.digest import Digest
from kitspec.errors import DigestInvalid, SizeInvalid

BlobSource = Callable[[int], AbstractAsyncContextManager[AsyncIterable[bytes]]]
"""Gives a blob's bytes from an offset on, and may be asked again."""


async def count(
    chunks: AsyncIterable[bytes], progress: BlobProgress, *, at_most: int
) -> AsyncIterator[bytes]:
    """`chunks`, reported to `progress`.

    Raises:
        SizeInvalid: there is more than there ought to be; an endless body must not fill the disk.
    """
    left = at_most
    async for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise SizeInvalid("more bytes came than the descriptor says")
        progress.advance(len(chunk))
        yield chunk


async def verified(chunks: AsyncIterable[bytes], digest: Digest) -> AsyncIterator[bytes]:
    """`chunks`; the end is reached only when they hash to `digest`.

    Until then nothing is proved: whoever writes them somewhere makes them visible after the last one.

    Raises:
        DigestInvalid: in place of the end.
    """
    hasher = hashlib.new(digest.algorithm, usedforsecurity=False)
    async for chunk in chunks:
        # In a thread: 1 MiB takes a millisecond, and the next read can go on meanwhile.
        hashing = asyncio.create_task(asyncio.to_thread(hasher.update, chunk))
        try:
            yield chunk
        finally:
            await hashing
    actual = f"{digest.algorithm}:{hasher.hexdigest()}"
    if actual != digest:
        raise DigestInvalid(f"the content is {actual}, not {digest}")
