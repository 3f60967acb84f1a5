"""A storage backend that counts what the one inside takes; nothing else changes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager

from registry.metrics import Metrics
from storage_backends.interface import (
    BlockingSource,
    ObjectInfo,
    Observer,
    StorageBackend,
    Upload,
)


class MeteredBackend:
    """Looking up is not counted, on a local disk it costs less than the counting; nor is delivery, which only begins here."""

    def __init__(self, inner: StorageBackend, metrics: Metrics, *, driver: str) -> None:
        self._inner = inner
        self._metrics = metrics
        self._driver = driver
        self.start = inner.start
        self.close = inner.close
        self.stat = inner.stat
        self.now = inner.now
        self.version_at_once = inner.version_at_once
        self.deliver = inner.deliver
        self.list = inner.list
        self.sweep = inner.sweep
        self.strays = inner.strays
        self.uploads = inner.uploads

    @property
    def source_appends_max(self) -> int:
        return self._inner.source_appends_max

    @contextmanager
    def timed(self, action: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._metrics.storage_action(self._driver, action, time.perf_counter() - started)

    async def probe(self) -> None:
        with self.timed("probe"):
            await self._inner.probe()

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        with self.timed("read"):
            return await self._inner.read(key, size_max=size_max)

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        with self.timed("write"):
            return await self._inner.write(key, content, expect=expect)

    async def create(self, key: str, content: bytes) -> ObjectInfo:
        with self.timed("create"):
            return await self._inner.create(key, content)

    async def touch(self, key: str) -> ObjectInfo:
        with self.timed("touch"):
            return await self._inner.touch(key)

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        with self.timed("delete"):
            await self._inner.delete(key, expect=expect)

    async def begin_upload(self, upload_id: str, *, note: bytes = b"") -> Upload:
        with self.timed("begin"):
            return _MeteredUpload(await self._inner.begin_upload(upload_id, note=note), self)

    async def resume_upload(self, upload_id: str) -> Upload:
        return _MeteredUpload(await self._inner.resume_upload(upload_id), self)


class _MeteredUpload:
    def __init__(self, inner: Upload, backend: MeteredBackend) -> None:
        self._inner = inner
        self._backend = backend
        self.replay = inner.replay
        self.is_idle = inner.is_idle

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def offset(self) -> int:
        return self._inner.offset

    @property
    def note(self) -> bytes:
        return self._inner.note

    async def append(
        self,
        chunks: AsyncIterable[bytes] | BlockingSource,
        *,
        observe: Observer,
        note: Callable[[], bytes],
        size: int | None = None,
        last: bool = False,
    ) -> int:
        with self._backend.timed("append"):
            return await self._inner.append(chunks, observe=observe, note=note, size=size, last=last)

    async def commit(self, key: str) -> ObjectInfo:
        with self._backend.timed("commit"):
            return await self._inner.commit(key)

    async def abort(self) -> None:
        with self._backend.timed("abort"):
            await self._inner.abort()


_: type[StorageBackend] = MeteredBackend
