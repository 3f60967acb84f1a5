"""Who looks at the bytes of an upload in the pass that stores them: its hash, and the index of its members.

The index of an upload that comes in several requests is made in one piece if one worker takes them all; if not, it is made
later, from the stored layer. Nothing here is kept anywhere.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from kitspec.digest import Digest
from kitspec.media_types import LayerType
from registry.hash_state import Hasher
from registry.member_index import KEPT_SIZE_MIN
from registry.member_table import MemberTable
from registry.tar_indexer import PassIndexer
from storage_backends.interface import Observer

OnIndexed = Callable[[Digest, LayerType, MemberTable], Awaitable[None]]

PLAIN_TAR: Final = LayerType("model")
"""Any plain tar: what kind of layer it is does not matter to what is in it."""

# Uploads whose watchers wait for the next request; each holds the rows of the members so far.
_WAITING_MAX: Final = 256


class Watchers:
    """One for each worker."""

    def __init__(self, on_indexed: OnIndexed | None) -> None:
        self._on_indexed = on_indexed
        self._waiting: OrderedDict[str, PassIndexer] = OrderedDict()

    @asynccontextmanager
    async def watching(self, upload_id: str, offset: int, hasher: Hasher | None) -> AsyncIterator[Observer]:
        """The observer for an append that begins at `offset`."""
        indexer = self._waiting.pop(upload_id, None)
        if offset == 0 and self._on_indexed is not None:
            indexer = PassIndexer()
        if indexer is None or indexer.offset != offset:
            yield hasher.update if hasher is not None else _ignore
            return
        watcher = indexer

        def observe(piece: bytes | memoryview) -> None:
            watcher.observe(piece)
            if hasher is not None:
                hasher.update(piece)

        yield observe
        if watcher.is_watching:
            self._waiting[upload_id] = watcher
            if len(self._waiting) > _WAITING_MAX:
                self._waiting.popitem(last=False)

    async def committed(self, upload_id: str, digest: Digest, size: int) -> None:
        """The upload has become a blob."""
        indexer = self._waiting.pop(upload_id, None)
        if indexer is None or self._on_indexed is None or size < KEPT_SIZE_MIN or indexer.offset != size:
            return
        table = await asyncio.to_thread(indexer.table)
        if table is not None:
            await self._on_indexed(digest, PLAIN_TAR, table)


def _ignore(_: bytes | memoryview, /) -> None:
    """No hash is kept in this pass."""
