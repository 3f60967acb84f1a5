"""How much a namespace may hold: bytes of blobs and tags, of all repositories that a pattern matches together.

The store is counted, not remembered: a repository is counted when it is first asked about, and again after each change that
this worker makes or that the journal tells of. So no counter can go wrong (INV-14). Who is refused was counted anew at
most `RECOUNT_S` ago. In one worker nothing is exceeded; all together exceed a quota by no more than what the others
stored since the journal was read last (`journal.poll`).

A blob counts in each repository that holds it. Manifests do not count, nor what an upload has before it is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import Denied
from kitspec.manifest import Index, Manifest
from kitspec.names import RepositoryName, Tag
from kitspec.path_glob import PathGlob
from registry import layout
from registry.config import Quota
from registry.freshness import Promise
from registry.hosted import HostedRegistry
from registry.journal import Change
from registry.storage_errors import translated
from registry.upload_sessions import UploadSessions
from storage_backends.interface import ObjectInfo, ObjectMissing, StorageBackend

RECOUNT_S: Final = 5.0
# Sizes of blobs that a worker remembers: a megabyte or so for each ten thousand.
_SIZES_MAX: Final = 100_000


@dataclass(frozen=True, slots=True)
class Usage:
    """What is held. Attributes: size: bytes of blobs; tags: how many."""

    size: int = 0
    tags: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.size + other.size, self.tags + other.tags)


class Namespace:
    """The repositories that one quota is about, and what they hold."""

    def __init__(self, quota: Quota, backend: StorageBackend) -> None:
        self.quota = quota
        self.lock = asyncio.Lock()
        self._backend = backend
        self._glob = PathGlob(quota.repositories)
        self._counted: dict[RepositoryName, Usage] = {}
        self._stale: set[RepositoryName] = set()
        self._sizes: dict[Digest, int] = {}
        self._recounted_at: float | None = None

    def holds(self, name: RepositoryName) -> bool:
        return self._glob.matches(name)

    def changed(self, name: RepositoryName) -> None:
        """What was counted of a repository is true no more."""
        if self.holds(name):
            self._stale.add(name)

    def forget(self) -> None:
        self._recounted_at = None

    async def admit(self, name: RepositoryName, added: Usage) -> None:
        """Raises: Denied: with so much more, the namespace would hold more than it may."""
        if self._refusal(name, await self._usage(), added) is None:
            return
        if self._recounted_at is None or time.monotonic() - self._recounted_at > RECOUNT_S:
            self.forget()
        if (refusal := self._refusal(name, await self._usage(), added)) is not None:
            raise refusal

    def _refusal(self, name: RepositoryName, held: Usage, added: Usage) -> Denied | None:
        quota, wanted = self.quota, held + added
        about = f"{name} is one of {quota.repositories!r}, which together"
        advice = "delete what is not needed, or ask the operator for a larger quota"
        if quota.size is not None and added.size and wanted.size > quota.size:
            return Denied(
                f"{about} may hold {quota.size} bytes and hold {held.size}; {added.size} more are too many: {advice}",
                detail={"quota": quota.size, "used": held.size, "requested": added.size},
            )
        if quota.tags is not None and added.tags and wanted.tags > quota.tags:
            return Denied(
                f"{about} may have {quota.tags} tags and have {held.tags}; {added.tags} more are too many: {advice}",
                detail={"quota": quota.tags, "used": held.tags, "requested": added.tags},
            )
        return None

    async def _usage(self) -> Usage:
        if self._recounted_at is None:
            self._recounted_at = time.monotonic()
            self._counted.clear()
            async for info in self._backend.list(layout.CATALOG):
                self.changed(layout.name_in_catalog(info.key))
        while self._stale:
            name = self._stale.pop()  # before it is counted: what changes meanwhile puts it back
            self._counted[name] = await self._count(name)
        return sum(self._counted.values(), Usage())

    async def _count(self, name: RepositoryName) -> Usage:
        prefix = f"repositories/{name}/_blobs/"
        size = 0
        async for info in self._backend.list(prefix):
            algorithm, _, encoded = info.key.removeprefix(prefix).partition("/")
            size += await self._size_of(Digest(f"{algorithm}:{encoded}"))
        tags = 0
        async for _ in self._backend.list(layout.tags_prefix(name)):
            tags += 1
        return Usage(size, tags)

    async def _size_of(self, digest: Digest) -> int:
        size = self._sizes.get(digest)
        if size is None:
            try:
                size = (await self._backend.stat(layout.blob_key(digest))).size
            except ObjectMissing:
                return 0  # a link whose content was removed
            if len(self._sizes) >= _SIZES_MAX:
                self._sizes.clear()
            self._sizes[digest] = size
        return size


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
        self._namespaces = [Namespace(quota, backend) for quota in quotas]

    async def link_blob(
        self,
        name: RepositoryName,
        digest: Digest,
        blob: ObjectInfo,
        promise: Promise,
        *,
        source: RepositoryName | None = None,
    ) -> None:
        """Raises: Denied: the blob is stored, but not linked: it goes with the next collection."""
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
    async def _changing(self, name: RepositoryName) -> AsyncIterator[list[Namespace]]:
        """One change at a time in the namespaces of a repository: they are always locked in the same order."""
        namespaces = [namespace for namespace in self._namespaces if namespace.holds(name)]
        async with AsyncExitStack() as stack:
            for namespace in namespaces:
                await stack.enter_async_context(namespace.lock)
            try:
                yield namespaces
            finally:
                for namespace in namespaces:
                    namespace.changed(name)

    async def _admit(self, namespaces: list[Namespace], name: RepositoryName, added: Usage) -> None:
        with translated():
            for namespace in namespaces:
                await namespace.admit(name, added)

    async def _has(self, key: str) -> bool:
        with translated():
            return await self._exists(key)
