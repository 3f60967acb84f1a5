"""Collection: what no manifest refers to, and nobody was told of for the grace time, is removed. While everything serves.

    links of a repository     kept by a manifest of that repository; a younger one is kept in any case
    content                   kept by a link of any repository; likewise
    referrers, views, packs   kept by the manifests that they are about
    tables of members         kept by the layer that they are of

Each removal is of the version that was seen: whoever touched, wrote or linked meanwhile makes it fail, and the thing stays
(freshness.py, docs/adr/0016-collection.md). One collects at a time, by a lease, to save work: safety does not rest on it.
A store that cannot be read ends the run. One object that cannot be stays, and a manifest that cannot be read or understood
keeps all blobs of its repository. The backend sweeps nothing while something that may name bytes cannot be read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

from kitspec.digest import Digest
from kitspec.errors import OciError
from kitspec.manifest import parse_manifest
from kitspec.names import RepositoryName
from registry import layout
from registry.hosted import read_manifest_record
from registry.journal import Journal
from registry.layout import InRepository
from registry.lease import LeaseTaken, RecordLease
from registry.logs import log_event
from registry.upload_sessions import UploadSessions
from storage_backends.interface import (
    ObjectDamaged,
    ObjectInfo,
    ObjectMissing,
    PreconditionFailed,
    StorageBackend,
)

logger = logging.getLogger(__name__)

# Of one repository; each is at most 4 MiB.
_MANIFESTS_AT_ONCE: Final = 8


class CollectionBusy(LeaseTaken):
    """Somebody else collects, or took the collection over."""


@dataclass(slots=True)
class Collected:
    """What a run did, or, as a dry run, would do.

    Attributes:
        removed: how many of each kind.
        size: bytes of content that went.
        unreadable: manifests that keep all blobs of their repository, because nobody knows what they refer to; and other
            objects that stay because they are damaged.
        foreign: keys that are none of the registry's.
    """

    removed: dict[str, int] = field(default_factory=dict)
    size: int = 0
    repositories: int = 0
    manifests: int = 0
    unreadable: int = 0
    foreign: int = 0

    def count(self, kind: str, number: int = 1) -> None:
        self.removed[kind] = self.removed.get(kind, 0) + number

    def fields(self) -> dict[str, Any]:
        """For a line of the log."""
        return {
            "repositories": self.repositories,
            "manifests": self.manifests,
            "unreadable": self.unreadable,
            "foreign": self.foreign,
            "bytes": self.size,
            **self.removed,
        }


class CollectionObserver(Protocol):
    """Counts what collections do."""

    def collection_ended(self, outcome: str, removed: Mapping[str, int], size: int) -> None:
        """
        Args:
            outcome: "finished", "failed", "lost" (somebody took it over) or "stopped" (with the worker).
            removed: how many of each kind, also of a run that was not finished.
            size: bytes of content that went.
        """
        ...

    def collection_looked(self, *, finished: float | None, interval_s: float) -> None:
        """
        Args:
            finished: when anybody was done last, by the store's clock; None for never.
            interval_s: in which one is due.
        """
        ...


class _Unobserved:
    """Counts nothing."""

    def collection_ended(self, outcome: str, removed: Mapping[str, int], size: int) -> None:
        pass

    def collection_looked(self, *, finished: float | None, interval_s: float) -> None:
        pass


class Collector:
    """
    Args:
        grace_s: for how long what nothing refers to is kept. All who serve this storage must promise as much (freshness.py).
        upload_age_s: after which an upload that nobody adds to is ended.
        journal_keep_s: for how long the journal is kept.
        observer: told of runs that are not dry.
    """

    def __init__(
        self,
        backend: StorageBackend,
        sessions: UploadSessions,
        journal: Journal,
        *,
        grace_s: float,
        upload_age_s: float,
        journal_keep_s: float,
        observer: CollectionObserver | None = None,
    ) -> None:
        self._backend = backend
        self._sessions = sessions
        self._journal = journal
        self._grace_s = grace_s
        self._upload_age_s = upload_age_s
        self._journal_keep_s = journal_keep_s
        self._observer = observer or _Unobserved()

    async def run_when_due(self, *, interval_s: float) -> Collected | None:
        """`run`, unless somebody collects now or has done so within `interval_s`."""
        finished = await Lease(self._backend).finished()
        self._observer.collection_looked(finished=finished, interval_s=interval_s)
        if finished is not None and self._backend.now() < finished + interval_s:
            return None
        try:
            collected = await self.run()
        except CollectionBusy:
            return None
        self._observer.collection_looked(finished=self._backend.now(), interval_s=interval_s)
        return collected

    async def run(self, *, dry_run: bool = False) -> Collected:
        """Collect once.

        Args:
            dry_run: say what would be removed; nothing is written.

        Raises:
            CollectionBusy: somebody else collects, or took over; what was removed until then was garbage.
            StorageError: something could not be read; what was removed until then was garbage.
        """
        collected = Collected()
        if dry_run:
            await self._collect(collected, dry_run=True)
            return collected
        lease = await Lease.take(self._backend)
        outcome = "stopped"
        try:
            await lease.while_held(self._collect(collected, dry_run=False))
            await lease.finish()
            outcome = "finished"
        except Exception as error:
            outcome = "lost" if isinstance(error, CollectionBusy) else "failed"
            raise
        finally:
            if outcome != "finished":
                await lease.give_up()
            self._observer.collection_ended(outcome, collected.removed, collected.size)
        return collected

    async def _collect(self, collected: Collected, *, dry_run: bool) -> None:
        young = self._backend.now() - self._grace_s
        # A push that takes longer than the grace time: what it has pushed so far is waiting for its manifest.
        receives = await self._sessions.receiving(since=young)
        await _Run(self._backend, collected, dry_run=dry_run, young=young, receives=receives).collect()
        for upload in await self._sessions.expire(
            now=self._backend.now(), age_s=self._upload_age_s, dry_run=dry_run
        ):
            collected.count("uploads")
            log_event(logger, logging.INFO, "upload.expired", upload=upload, dry_run=dry_run)
        collected.count("journal", await self._journal.trim(keep_s=self._journal_keep_s, dry_run=dry_run))
        async for left in self._backend.sweep(age_s=self._grace_s, dry_run=dry_run):
            collected.count("leftovers")
            collected.size += left.size
            log_event(
                logger, logging.INFO, "leftover.removed", name=left.name, size=left.size, dry_run=dry_run
            )


class Lease(RecordLease):
    """Who collects."""

    def __init__(self, backend: StorageBackend) -> None:
        super().__init__(backend, layout.COLLECTION, what="collects this storage", taken=CollectionBusy)

    @classmethod
    async def take(cls, backend: StorageBackend) -> Self:
        """Raises: CollectionBusy."""
        lease = cls(backend)
        await lease.acquire()
        return lease


@dataclass(slots=True)
class _Repository:
    """What a listing shows of one repository, in the order in which it shows it: links before manifests."""

    name: RepositoryName
    links: list[tuple[Digest, ObjectInfo]] = field(default_factory=list)
    manifests: dict[Digest, ObjectInfo] = field(default_factory=dict)
    packs: list[tuple[Digest, ObjectInfo]] = field(default_factory=list)
    referrers: list[tuple[Digest, ObjectInfo]] = field(default_factory=list)
    views: list[tuple[Digest, Digest, ObjectInfo]] = field(default_factory=list)

    def add(self, part: InRepository, info: ObjectInfo) -> None:
        match part.kind, part.digest, part.other:
            case "_blobs", Digest() as digest, _:
                self.links.append((digest, info))
            case "_manifests", Digest() as digest, _:
                self.manifests[digest] = info
            case "_packs", Digest() as digest, _:
                self.packs.append((digest, info))
            case "_referrers", _, Digest() as referrer:
                self.referrers.append((referrer, info))
            case "_views", Digest() as digest, Digest() as source:
                self.views.append((digest, source, info))
            case _:  # a tag keeps nothing: what it names is kept by itself
                pass


class _Run:
    """
    Args:
        young: what was touched or written after this, by the store's clock, stays.
        receives: whether something is being uploaded to a repository.
    """

    def __init__(
        self,
        backend: StorageBackend,
        collected: Collected,
        *,
        dry_run: bool,
        young: float,
        receives: Callable[[RepositoryName], bool],
    ) -> None:
        self._backend = backend
        self._dry_run = dry_run
        self._young = young
        self._receives = receives
        self._collected = collected
        # 33 bytes and what Python adds for each blob that a repository has: 100 MB for a million.
        self._linked: set[bytes] = set()

    async def collect(self) -> None:
        """In this order: a link that comes after its repository was looked at has touched its content."""
        async for repository in self._repositories():
            await self._collect_repository(repository)
        async for info in self._backend.list(layout.BLOBS):
            digest = layout.digest_of(info.key)
            if digest is None:
                self._foreign(info.key)
            elif _packed(digest) not in self._linked and await self._remove("content", info):
                self._collected.size += info.size
        async for info in self._backend.list(layout.MEMBERS):
            digest = layout.digest_of(info.key)
            if digest is None:
                self._foreign(info.key)
            elif _packed(digest) not in self._linked and not await self._is_there(digest):
                await self._remove("tables", info)

    async def _repositories(self) -> AsyncIterator[_Repository]:
        """Keys of one repository stand together, its nested ones before or behind them."""
        current: _Repository | None = None
        async for info in self._backend.list(layout.REPOSITORIES):
            part = layout.in_repository(info.key)
            if part is None:
                self._foreign(info.key)
                continue
            if current is None or current.name != part.name:
                if current is not None:
                    yield current
                current = _Repository(part.name)
            current.add(part, info)
        if current is not None:
            yield current

    async def _collect_repository(self, repository: _Repository) -> None:
        self._collected.repositories += 1
        referred = await self._referred(repository)
        are_kept = referred is None or self._receives(repository.name)
        for digest, info in repository.links:
            if are_kept or digest in (referred or ()) or not await self._remove("links", info):
                self._linked.add(_packed(digest))
        for referrer, info in repository.referrers:
            if referrer not in repository.manifests:
                await self._remove("referrers", info)
        derived: set[Digest] = set()
        # A view of a view: its source is derived, from what is there or not.
        for digest, source, info in sorted(
            repository.views, key=lambda view: view[1] not in repository.manifests
        ):
            if source in repository.manifests or source in derived or not await self._remove("views", info):
                derived.add(digest)
        for digest, info in repository.packs:
            if digest not in derived:
                await self._remove("packs", info)

    async def _referred(self, repository: _Repository) -> set[Digest] | None:
        """What the manifests of a repository refer to; None when nobody can tell."""
        referred: set[Digest] = set()
        is_known = True
        manifests = list(repository.manifests.items())
        for begin in range(0, len(manifests), _MANIFESTS_AT_ONCE):
            some = manifests[begin : begin + _MANIFESTS_AT_ONCE]
            read = await asyncio.gather(*(self._references(info) for _, info in some), return_exceptions=True)
            for references in read:
                if isinstance(references, BaseException):
                    raise references
                if references is None:
                    is_known = False
                else:
                    referred.update(references)
        return referred if is_known else None

    async def _references(self, info: ObjectInfo) -> Sequence[Digest] | None:
        """What one manifest refers to; None when it cannot be told."""
        self._collected.manifests += 1
        try:
            stored = await read_manifest_record(self._backend, info.key)
            manifest = parse_manifest(stored.content, stored.media_type)
        except ObjectMissing:
            return ()  # deleted just now
        except (OciError, ObjectDamaged, ValueError, LookupError, TypeError) as error:
            self._unreadable("collection.manifest.unreadable", info, error)
            return None
        return [reference.digest for _, reference in manifest.references()]

    async def _remove(self, kind: str, info: ObjectInfo) -> bool:
        """Remove what is old, and still what it was; whether it is gone."""
        if info.modified >= self._young:
            return False
        if not self._dry_run:
            try:
                await self._backend.delete(info.key, expect=info.version)
            except PreconditionFailed:
                return False
            except ObjectDamaged as error:
                self._unreadable("collection.object.unreadable", info, error)
                return False
        self._collected.count(kind)
        log_event(
            logger,
            logging.INFO,
            "garbage.removed",
            kind=kind,
            key=info.key,
            size=info.size,
            dry_run=self._dry_run,
        )
        return True

    async def _is_there(self, digest: Digest) -> bool:
        try:
            await self._backend.stat(layout.blob_key(digest))
        except ObjectMissing:
            return False
        except ObjectDamaged:
            return True
        return True

    def _unreadable(self, event: str, info: ObjectInfo, error: Exception) -> None:
        self._collected.unreadable += 1
        log_event(logger, logging.WARNING, event, key=info.key, reason=str(error))

    def _foreign(self, key: str) -> None:
        self._collected.foreign += 1
        log_event(logger, logging.DEBUG, "collection.key.foreign", key=key)


def _packed(digest: Digest) -> bytes:
    return digest.algorithm.encode()[-1:] + bytes.fromhex(digest.encoded)
