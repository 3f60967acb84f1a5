"""Who looks at the bytes of an upload in the pass that stores them: its hash, and the index of its members.

The index of an upload that comes in several requests is made in one piece if one worker takes them all; if not, it is made
later, from the stored layer. Nothing here is kept anywhere.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from kitspec.digest import Digest
from kitspec.media_types import LayerType
from registry.hash_state import Hasher
from registry.member_index import KEPT_SIZE_MIN, MemberIndexes
from registry.tar_indexer import PassIndexer
from storage_backends.interface import Observer

PLAIN_TAR: Final = LayerType("model")
"""Any plain tar: what kind of layer it is does not matter to what is in it."""

# Uploads whose watchers wait for the next request; each holds the rows of the members so far.
_WAITING_MAX: Final = 256


class Watchers:
    """One for each worker.

    Args:
        indexes: get the table of a plain tar that was stored, when the pass that stored it could make one.
    """

    def __init__(self, indexes: MemberIndexes | None) -> None:
        self._indexes = indexes
        self._waiting: OrderedDict[str, PassIndexer] = OrderedDict()

    @asynccontextmanager
    async def watching(self, upload_id: str, offset: int, hasher: Hasher | None) -> AsyncIterator[Observer]:
        """The observer for an append that begins at `offset`."""
        hash_piece = hasher.update if hasher is not None else _ignore
        if self._indexes is None:
            yield hash_piece
            return
        indexer = PassIndexer() if offset == 0 else self._waiting.pop(upload_id, None)
        with self._indexes.giving_way():
            if indexer is None or indexer.offset != offset:
                yield hash_piece
                return
            watch = indexer.observe

            def observe(piece: bytes | memoryview) -> None:
                watch(piece)
                hash_piece(piece)

            yield observe
        if indexer.is_watching:
            self._waiting[upload_id] = indexer
            if len(self._waiting) > _WAITING_MAX:
                self._waiting.popitem(last=False)

    async def committed(self, upload_id: str, digest: Digest, size: int) -> None:
        """The upload has become a blob."""
        indexer = self._waiting.pop(upload_id, None)
        if indexer is None or self._indexes is None or size < KEPT_SIZE_MIN or indexer.offset != size:
            return
        table = await asyncio.to_thread(indexer.table)
        if table is not None:
            self._indexes.keep(digest, PLAIN_TAR, table)


def _ignore(_: bytes | memoryview, /) -> None:
    """No hash is kept in this pass."""
