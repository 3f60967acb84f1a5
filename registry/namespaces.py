"""What the repositories that a quota is about hold: blobs and tags, and what their open uploads have received.

The store is counted, not remembered: a repository when it is first asked about, and again after each change that this worker
makes or that the journal tells of; the open uploads every few seconds, while something is uploaded. So no counter can go
wrong (INV-14). Who is refused was counted anew at most `RECOUNT_S` ago.

An append shows in the store when it ends. Until then the worker that receives it counts it: as many bytes as were announced from
the beginning, or each piece as it comes. A blob counts in each repository that holds it; manifests do not count.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from kitspec.digest import Digest
from kitspec.errors import Denied
from kitspec.names import RepositoryName
from kitspec.path_glob import PathGlob
from registry import layout
from registry.config import Quota
from registry.storage_errors import translated
from registry.upload_sessions import UploadSessions
from storage_backends.interface import ObjectMissing, StorageBackend

RECOUNT_S: Final = 5.0
# Open uploads are listed for no more than a tenth of the time: an object store is asked about each of them.
_LISTING_SHARE: Final = 10
# Sizes of blobs that a worker remembers: a megabyte or so for each ten thousand.
_SIZES_MAX: Final = 100_000


def is_old(moment: float) -> bool:
    """Whether what was seen at this moment of the monotonic clock has to be looked at again."""
    return time.monotonic() - moment > RECOUNT_S


@dataclass(frozen=True, slots=True)
class Usage:
    """What is held. Attributes: size: bytes of blobs; tags: how many; uploading: bytes of uploads that are open."""

    size: int = 0
    tags: int = 0
    uploading: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.size + other.size, self.tags + other.tags, self.uploading + other.uploading)


class UploadedBytes:
    """What the open uploads of a namespace have received, and what appends of this worker are about to. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offsets: dict[str, int] = {}
        self._reserved: Counter[str] = Counter()
        # What became of uploads while they are being listed: the list may be from before.
        self._news: dict[str, int | None] | None = None
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    def of(self, upload_id: str) -> int:
        with self._lock:
            return self._offsets.get(upload_id, 0) + self._reserved[upload_id]

    def begin(self, upload_id: str, offset: int) -> None:
        """An append begins: what the store says of the upload from now on may have its bytes in it."""
        with self._lock:
            self._reserved[upload_id] += 0
            self._keep(upload_id, offset)

    def reserve(self, upload_id: str, size: int, *, total_max: int) -> bool:
        """Let an append have so many bytes, unless there would be more than `total_max` in all; whether it may."""
        with self._lock:
            if size == 0:
                return True
            if self._total + size > total_max:
                return False
            self._reserved[upload_id] += size
            self._total += size
            return True

    def give_back(self, upload_id: str, size: int) -> None:
        """Take back a `reserve`; the append goes on."""
        with self._lock:
            self._reserved[upload_id] -= size
            self._total -= size

    def settle(self, upload_id: str, reserved: int, offset: int | None) -> None:
        """An append is over, or the upload is.

        Args:
            reserved: by it; 0 for none.
            offset: of the upload now; None if that has ended.
        """
        with self._lock:
            self._total -= reserved
            self._reserved[upload_id] -= reserved
            if not self._reserved[upload_id]:
                del self._reserved[upload_id]
            if offset is None:
                self._total -= self._offsets.pop(upload_id, 0)
            else:
                self._keep(upload_id, offset)
            if self._news is not None:
                self._news[upload_id] = self._offsets.get(upload_id)

    def _keep(self, upload_id: str, offset: int) -> None:
        # Another append may have come further, and an upload never goes back.
        before = self._offsets.get(upload_id, 0)
        self._offsets[upload_id] = max(before, offset)
        self._total += self._offsets[upload_id] - before

    def begin_listing(self) -> None:
        with self._lock:
            self._news = {}

    def take_list(self, listed: Mapping[str, int]) -> None:
        """What the store says of each open upload.

        Args:
            listed: since `begin_listing`.
        """
        with self._lock:
            offsets = dict(listed)
            # Some stores show what an append that goes on has received: that is reserved.
            offsets |= {upload_id: self._offsets.get(upload_id, 0) for upload_id in self._reserved}
            for upload_id, offset in (self._news or {}).items():
                if offset is None:
                    offsets.pop(upload_id, None)
                else:
                    offsets[upload_id] = offset
            self._news = None
            self._offsets = offsets
            self._total = sum(offsets.values()) + self._reserved.total()


class Namespace:
    """The repositories that one quota is about, and what they hold.

    Attributes:
        lock: held by whoever asks, or changes what links and tags there are.
    """

    def __init__(self, quota: Quota, backend: StorageBackend, sessions: UploadSessions) -> None:
        self.quota = quota
        self.lock = asyncio.Lock()
        self._backend = backend
        self._sessions = sessions
        self._glob = PathGlob(quota.repositories)
        self._counted: dict[RepositoryName, Usage] = {}
        self._stale: set[RepositoryName] = set()
        self._sizes: dict[Digest, int] = {}
        self._recounted_at: float | None = None
        self._stored = Usage()
        self._uploaded = UploadedBytes()
        self._listing_due = 0.0

    def holds(self, name: RepositoryName) -> bool:
        return self._glob.matches(name)

    def changed(self, name: RepositoryName) -> None:
        """What was counted of a repository is true no more."""
        if self.holds(name):
            self._stale.add(name)

    def forget(self) -> None:
        """Count everything anew when somebody asks."""
        self._recounted_at = None
        self.forget_uploads()

    def forget_uploads(self) -> None:
        """List the open uploads anew when somebody asks."""
        self._listing_due = 0.0

    async def admit(self, name: RepositoryName, added: Usage, *, besides: str = "") -> None:
        """
        Args:
            besides: an upload whose bytes are what is added.

        Raises:
            Denied: with so much more, the namespace would hold more than it may.
        """
        await self._decide(lambda: self._refusal(name, added, besides))

    def begin_append(self, upload_id: str, offset: int) -> None:
        """An append to an upload at this offset begins. `settle` ends it."""
        self._uploaded.begin(upload_id, offset)

    async def reserve(self, name: RepositoryName, upload_id: str, size: int) -> None:
        """Let an append have so many bytes.

        Raises:
            Denied: with so much more, the namespace would hold more than it may.
        """

        def refuse() -> Denied | None:
            return None if self._reserve(upload_id, size) else self._too_large(name, self._held(), size)

        await self._decide(refuse)

    def reserve_at_once(self, upload_id: str, size: int) -> bool:
        """`reserve`, from any thread, where nothing has to be counted for that; False: ask `reserve`."""
        return time.monotonic() < self._listing_due and self._reserve(upload_id, size)

    def give_back(self, upload_id: str, size: int) -> None:
        self._uploaded.give_back(upload_id, size)

    def settle(self, upload_id: str, reserved: int, offset: int | None) -> None:
        self._uploaded.settle(upload_id, reserved, offset)

    def _reserve(self, upload_id: str, size: int) -> bool:
        quota = self.quota.size
        return quota is None or self._uploaded.reserve(upload_id, size, total_max=quota - self._stored.size)

    async def _decide(self, refuse: Callable[[], Denied | None]) -> None:
        """Raises: Denied: what `refuse` says, also of what was counted anew."""
        await self._count()
        if refuse() is None:
            return
        if self._recounted_at is None or is_old(self._recounted_at):
            self.forget()
        await self._count()
        if (refusal := refuse()) is not None:
            raise refusal

    def _held(self, besides: str = "") -> Usage:
        uploading = self._uploaded.total
        if besides:
            uploading -= self._uploaded.of(besides)
        return self._stored + Usage(size=uploading, uploading=uploading)

    def _refusal(self, name: RepositoryName, added: Usage, besides: str) -> Denied | None:
        quota, held = self.quota, self._held(besides)
        if quota.size is not None and added.size and held.size + added.size > quota.size:
            return self._too_large(name, held, added.size)
        if quota.tags is not None and added.tags and held.tags + added.tags > quota.tags:
            return Denied(
                f"{self._about(name)} may have {quota.tags} tags and have {held.tags}; {added.tags} more are too many: "
                "delete what is not needed, or ask the operator for a larger quota",
                detail={"quota": quota.tags, "used": held.tags, "requested": added.tags},
            )
        return None

    def _too_large(self, name: RepositoryName, held: Usage, added: int) -> Denied:
        of_uploads = f", {held.uploading} of them in open uploads" if held.uploading else ""
        end_uploads = "finish or cancel uploads, " if held.uploading else ""
        return Denied(
            f"{self._about(name)} may hold {self.quota.size} bytes and hold {held.size}{of_uploads}; "
            f"{added} more are too many: delete what is not needed, {end_uploads}or ask the operator for a larger quota",
            detail={
                "quota": self.quota.size,
                "used": held.size,
                "uploading": held.uploading,
                "requested": added,
            },
        )

    def _about(self, name: RepositoryName) -> str:
        return f"{name} is one of {self.quota.repositories!r}, which together"

    async def _count(self) -> None:
        """Count what has changed."""
        try:
            with translated():
                await self._count_stored()
                if self.quota.size is not None and time.monotonic() >= self._listing_due:
                    await self._list_uploads()
        except BaseException:
            self.forget()  # half a count would be taken for a whole one
            raise

    async def _count_stored(self) -> None:
        if self._recounted_at is None:
            self._recounted_at = time.monotonic()
            self._counted.clear()
            async for info in self._backend.list(layout.CATALOG):
                self.changed(layout.name_in_catalog(info.key))
        while self._stale:
            name = self._stale.pop()  # before it is counted: what changes meanwhile puts it back
            self._counted[name] = await self._count_repository(name)
        self._stored = sum(self._counted.values(), Usage())

    async def _list_uploads(self) -> None:
        began = time.monotonic()
        self._uploaded.begin_listing()
        uploads = await self._sessions.under_way()
        self._uploaded.take_list(
            {upload.id: upload.size for upload in uploads if self.holds(upload.repository)}
        )
        now = time.monotonic()
        self._listing_due = now + max(RECOUNT_S, _LISTING_SHARE * (now - began))

    async def _count_repository(self, name: RepositoryName) -> Usage:
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
