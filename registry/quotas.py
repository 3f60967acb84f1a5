"""How much a namespace may hold: bytes of blobs and of open uploads, and tags, of all repositories that a pattern matches.

In one worker nothing is exceeded: what is counted (`namespaces.py`) is reserved before it is received. All together exceed a
quota by what others stored since the journal was read last (`journal.poll`) and received since the uploads were listed last, and,
until they end, by what requests at other workers are receiving. What is too much then is refused when it has come, or is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import BlobUploadUnknown, Denied, DigestInvalid, OciError
from kitspec.manifest import Index, Manifest
from kitspec.names import RepositoryName, Tag
from registry import layout
from registry.config import Quota
from registry.freshness import Promise
from registry.hosted import HostedRegistry, HostedUpload
from registry.journal import Change
from registry.namespaces import Namespace, Usage, is_old
from registry.storage_errors import translated
from registry.upload_sessions import Chunks, UploadSession, UploadSessions
from storage_backends.interface import BlockingSource, ObjectInfo, StorageBackend


class Reservation:
    """Room that one append has in the namespaces of its repository, until it is settled."""

    def __init__(
        self, namespaces: Sequence[Namespace], name: RepositoryName, upload_id: str, offset: int
    ) -> None:
        self._namespaces = namespaces
        self._name = name
        self._upload_id = upload_id
        self._size = 0
        for namespace in namespaces:
            namespace.begin_append(upload_id, offset)

    async def grow(self, size: int) -> None:
        """Raises: Denied: there is no room for so many bytes more."""
        grown: list[Namespace] = []
        try:
            for namespace in self._namespaces:
                async with namespace.lock:
                    await namespace.reserve(self._name, self._upload_id, size)
                grown.append(namespace)
        except BaseException:
            self._shrink(grown, size)
            raise
        self._size += size

    def grow_at_once(self, size: int) -> bool:
        """`grow` without waiting, from any thread; False: it has to be asked for."""
        grown: list[Namespace] = []
        for namespace in self._namespaces:
            if not namespace.reserve_at_once(self._upload_id, size):
                self._shrink(grown, size)
                return False
            grown.append(namespace)
        self._size += size
        return True

    def settle(self, offset: int | None) -> None:
        """The append is over.

        Args:
            offset: of the upload; None if that has ended.
        """
        for namespace in self._namespaces:
            namespace.settle(self._upload_id, self._size, offset)

    def _shrink(self, namespaces: Sequence[Namespace], size: int) -> None:
        for namespace in namespaces:
            namespace.give_back(self._upload_id, size)

    def counting(self, chunks: Chunks) -> Chunks:
        """The same bytes, each piece reserved before it is stored."""
        if isinstance(chunks, AsyncIterable):
            return self._counted(chunks)
        return _CountedSource(chunks, self)

    async def _counted(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            if not self.grow_at_once(len(chunk)):
                await self.grow(len(chunk))
            yield chunk


class _CountedSource:
    """A source whose bytes are reserved as they come; the thread that reads them waits while they have to be counted."""

    def __init__(self, source: BlockingSource, reservation: Reservation) -> None:
        self._source = source
        self._reservation = reservation
        self._loop = asyncio.get_running_loop()
        self.interrupt = source.interrupt

    def read_into(self, buffer: memoryview, /) -> int:
        count = self._source.read_into(buffer)
        if not self._reservation.grow_at_once(count):
            asyncio.run_coroutine_threadsafe(self._reservation.grow(count), self._loop).result()
        return count


class QuotaUpload(HostedUpload):
    """A HostedUpload whose bytes count from when they are announced, and that is gone when it was refused (INV-17).

    Args:
        namespaces: whose bytes are limited.
    """

    def __init__(
        self,
        registry: QuotaRegistry,
        name: RepositoryName,
        session: UploadSession,
        namespaces: Sequence[Namespace],
    ) -> None:
        super().__init__(registry, name, session)
        self._quotas = registry
        self._namespaces = namespaces
        self._has_ended = False

    async def check(self, *, at: int | None, size: int | None) -> None:
        """Raises: Denied: as `append`."""
        await super().check(at=at, size=size)
        async with self._appending(size or 0):
            pass

    async def append(
        self,
        chunks: Chunks,
        *,
        at: int | None = None,
        size: int | None = None,
        closing: Digest | None = None,
    ) -> int:
        """Raises: Denied: there is no room for the bytes; the upload has ended, and those that had come are removed."""
        # What does not go on where the upload is will be refused, and need not have room.
        is_next = at is None or at == self.offset
        async with self._appending(size if size is not None and is_next else 0) as reservation:
            if size is None:
                chunks = reservation.counting(chunks)
            return await super().append(chunks, at=at, size=size, closing=closing)

    @asynccontextmanager
    async def _appending(self, size: int) -> AsyncIterator[Reservation]:
        reservation = Reservation(self._namespaces, self._name, self.location, self.offset)
        began = time.monotonic()
        try:
            await reservation.grow(size)
            yield reservation
            if is_old(began):
                # Others may have received as much, which did not show before it was kept, as this did not.
                for namespace in self._namespaces:
                    namespace.forget_uploads()
                await self._quotas.admit_upload(self._name, self.location, self.offset)
        except Denied:
            await self._discard()
            raise
        except BlobUploadUnknown:
            self._has_ended = True
            raise
        finally:
            reservation.settle(None if self._has_ended else self.offset)

    async def commit(self, digest: Digest) -> Descriptor:
        """Raises: Denied: the namespace holds too much by now; the upload has ended, and its bytes are removed."""
        try:
            await self._quotas.admit_upload(self._name, self.location, self.offset, digest=digest)
            return await super().commit(digest)
        except Denied:
            await self._discard()
            raise
        except (DigestInvalid, BlobUploadUnknown):
            self._end()
            raise

    async def cancel(self) -> None:
        await super().cancel()
        self._end()

    async def _link(self, digest: Digest, info: ObjectInfo, promise: Promise) -> None:
        await self._quotas.link_upload(self._name, digest, info, promise, upload_id=self.location)

    async def _discard(self) -> None:
        # What cannot be removed now goes when it expires, and counts until then.
        with contextlib.suppress(OciError):
            await self.cancel()

    def _end(self) -> None:
        self._has_ended = True
        for namespace in self._namespaces:
            namespace.settle(self.location, 0, None)


class QuotaRegistry(HostedRegistry):
    """A HostedRegistry that refuses what would exceed a quota.

    Args:
        quotas: all that match a repository hold for it.
    """

    def __init__(
        self,
        backend: StorageBackend,
        sessions: UploadSessions,
        *,
        quotas: Sequence[Quota],
        **named: Any,  # noqa: ANN401 - its base's
    ) -> None:
        super().__init__(backend, sessions, **named)
        self._namespaces = [Namespace(quota, backend, sessions) for quota in quotas]

    def namespaces_of(self, name: RepositoryName) -> list[Namespace]:
        """Those that a repository is in; always in the same order, in which they may be locked."""
        return [namespace for namespace in self._namespaces if namespace.holds(name)]

    def upload_of(self, name: RepositoryName, session: UploadSession) -> HostedUpload:
        namespaces = [namespace for namespace in self.namespaces_of(name) if namespace.quota.size is not None]
        return (
            QuotaUpload(self, name, session, namespaces) if namespaces else super().upload_of(name, session)
        )

    async def admit_upload(
        self, name: RepositoryName, upload_id: str, size: int, *, digest: Digest | None = None
    ) -> None:
        """
        Args:
            digest: what it is about to become.

        Raises:
            Denied: the bytes of an upload are too many to be kept, by what is held beside them.
        """
        async with self._locked(name) as held:
            if digest is not None and await self._has(layout.link_key(name, digest)):
                return
            for namespace in held:
                await namespace.admit(name, Usage(size=size), besides=upload_id)

    async def link_upload(
        self, name: RepositoryName, digest: Digest, blob: ObjectInfo, promise: Promise, *, upload_id: str
    ) -> None:
        """`link_blob` for what an upload has become, whose bytes counted before."""
        async with self._changing(name) as namespaces:
            for namespace in namespaces:
                namespace.settle(upload_id, 0, None)
            await super().link_blob(name, digest, blob, promise)

    async def link_blob(
        self,
        name: RepositoryName,
        digest: Digest,
        blob: ObjectInfo,
        promise: Promise,
        *,
        source: RepositoryName | None = None,
    ) -> None:
        """Raises: Denied: the blob of another repository would be too much here."""
        async with self._changing(name) as namespaces:
            if namespaces and not await self._has(layout.link_key(name, digest)):
                await self._admit(namespaces, name, Usage(size=blob.size))
            await super().link_blob(name, digest, blob, promise, source=source)

    async def store_manifest(
        self,
        name: RepositoryName,
        manifest: Manifest | Index,
        content: bytes,
        media_type: str,
        *,
        expect: Digest | None,
        tags: tuple[Tag, ...],
        may_move_tags: bool = True,
    ) -> Descriptor:
        """Raises: Denied: also when there would be too many tags; nothing is stored then."""
        async with self._changing(name) as namespaces:
            if namespaces and tags:
                keys = {layout.tag_key(name, tag) for tag in tags}
                new = [key for key in keys if not await self._has(key)]
                await self._admit(namespaces, name, Usage(tags=len(new)))
            return await super().store_manifest(
                name,
                manifest,
                content,
                media_type,
                expect=expect,
                tags=tags,
                may_move_tags=may_move_tags,
            )

    async def delete_blob(self, name: RepositoryName, digest: Digest) -> None:
        async with self._changing(name):
            await super().delete_blob(name, digest)

    async def delete_manifest(self, name: RepositoryName, reference: Tag | Digest) -> None:
        async with self._changing(name):
            await super().delete_manifest(name, reference)

    async def refresh(self, change: Change) -> None:
        for namespace in self._namespaces:
            namespace.changed(change.repository)
        await super().refresh(change)

    def forget(self) -> None:
        for namespace in self._namespaces:
            namespace.forget()
        super().forget()

    @asynccontextmanager
    async def _locked(self, name: RepositoryName) -> AsyncIterator[list[Namespace]]:
        """Nothing is linked or tagged in the namespaces of a repository but by the block."""
        namespaces = self.namespaces_of(name)
        async with AsyncExitStack() as stack:
            for namespace in namespaces:
                await stack.enter_async_context(namespace.lock)
            yield namespaces

    @asynccontextmanager
    async def _changing(self, name: RepositoryName) -> AsyncIterator[list[Namespace]]:
        """One change at a time in the namespaces of a repository, which is counted anew after it."""
        async with self._locked(name) as namespaces:
            try:
                yield namespaces
            finally:
                for namespace in namespaces:
                    namespace.changed(name)

    async def _admit(self, namespaces: list[Namespace], name: RepositoryName, added: Usage) -> None:
        for namespace in namespaces:
            await namespace.admit(name, added)

    async def _has(self, key: str) -> bool:
        with translated():
            return await self._exists(key)
