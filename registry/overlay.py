"""A storage backend that may be read only: records that are written to it are kept in memory, in front of what is stored.

For what can be made again: tables of members, derived manifests. It is forgotten with the process, and unknown to others.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Final

from storage_backends.interface import (
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    PreconditionFailed,
    StorageBackend,
)

_SIZE_MAX: Final = 64 * 1024 * 1024


class Overlay:
    """Takes records only; the oldest are forgotten when they are too many."""

    def __init__(self, inner: StorageBackend) -> None:
        self._inner = inner
        self._records: OrderedDict[str, tuple[bytes, ObjectInfo]] = OrderedDict()
        self._size = 0
        self.start = inner.start
        self.close = inner.close
        self.probe = inner.probe
        self.now = inner.now
        self.sweep = inner.sweep
        self.strays = inner.strays
        self.deliver = inner.deliver
        self.begin_upload = inner.begin_upload
        self.resume_upload = inner.resume_upload
        self.uploads = inner.uploads

    @property
    def source_appends_max(self) -> int:
        return self._inner.source_appends_max

    async def stat(self, key: str) -> ObjectInfo:
        kept = self._records.get(key)
        return await self._inner.stat(key) if kept is None else kept[1]

    def version_at_once(self, key: str) -> str | None:
        kept = self._records.get(key)
        return self._inner.version_at_once(key) if kept is None else kept[1].version

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        kept = self._records.get(key)
        if kept is None:
            return await self._inner.read(key, size_max=size_max)
        if kept[1].size > size_max:
            raise ObjectTooLarge(f"{key} has {kept[1].size} bytes, at most {size_max} were wanted")
        return kept

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        if expect is not None and expect != await self._version(key):
            raise PreconditionFailed(f"{key} is not the expected version")
        self._forget(key)
        info = ObjectInfo(key, len(content), secrets.token_hex(8), time.time())
        self._records[key] = (content, info)
        self._size += len(content)
        while self._size > _SIZE_MAX:
            self._forget(next(iter(self._records)))
        return info

    async def create(self, key: str, content: bytes) -> ObjectInfo:
        return await self.write(key, content, expect="")

    async def touch(self, key: str) -> ObjectInfo:
        """Only what is kept in memory can be."""
        kept = self._records.get(key)
        return await self.stat(key) if kept is None else await self.write(key, kept[0])

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        """Only what is kept in memory can go."""
        if expect is not None and expect != await self._version(key):
            raise PreconditionFailed(f"{key} is not the expected version")
        self._forget(key)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        kept = sorted(key for key in self._records if key.startswith(prefix) and key > after)
        stored = [info.key async for info in self._inner.list(prefix, after=after)]
        for key in dict.fromkeys(heapq.merge(kept, stored)):
            yield await self.stat(key)

    async def _version(self, key: str) -> str:
        try:
            return (await self.stat(key)).version
        except ObjectMissing:
            return ""

    def _forget(self, key: str) -> None:
        kept = self._records.pop(key, None)
        if kept is not None:
            self._size -= len(kept[0])


_: type[StorageBackend] = Overlay
