"""Is this one object as it should be? Each check looks at an object and at what it refers to; nothing is written.

A check asks `Facts` for what is around its object: first a listing, which costs nothing and may be old, later the store itself
(registry/fsck.py). The judgement is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import NameInvalid, OciError, ServerError
from kitspec.interface import StoredManifest
from kitspec.manifest import Index, Manifest, parse_manifest, referrer_of
from kitspec.media_types import MANIFEST_TYPES
from kitspec.names import RepositoryName
from registry import layout
from registry.derived import Derived
from registry.fsck_findings import Finding, Kind
from registry.hash_state import Hasher
from registry.hosted import read_manifest_record
from registry.journal import Change
from registry.layout import InRepository
from registry.views import Pack
from storage_backends.file_stream import chunks_of
from storage_backends.interface import (
    ByteStream,
    LocalFile,
    ObjectDamaged,
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    PresignedUrl,
    StorageBackend,
    StorageUnavailable,
)
from storage_backends.threads import Threads

NOT_OURS: Final = (OciError, ValueError, LookupError, TypeError, AttributeError)
"""What a decoder of ours raises at a record that is not one of ours."""

# No record is larger but a table of members, which is read in pieces.
_RECORD_SIZE_MAX: Final = 16 * 1024 * 1024
# What a thread reads and hashes before it tells how far it is, and can be stopped.
_STRETCH_SIZE: Final = 32 * 1024 * 1024
_PIECE_SIZE: Final = 1024 * 1024
_CRC_SIZE: Final = 4
_TARS: Final = "cache/tars/"
_JOURNAL_ENTRY: Final = re.compile(r"journal/\d{8}/\d{2}/\d{4}\.\d{6}-[0-9a-f]+")
_API_KEY: Final = re.compile(rf"{layout.API_KEYS}[^/]+/[^/]+")
_MARK: Final = re.compile(rf"{layout.JOURNAL_MARKS}[^/]+")
# Whoever lists here takes every key for one of the registry's.
_LISTED: Final = re.compile(r"/_(?:tags|referrers|views|packs)/")

Findings = Sequence[Finding]


class Facts(Protocol):
    """What is around an object."""

    async def is_there(self, key: str) -> bool:
        """Whether a key of the same repository, or its entry in the catalogue, exists."""
        ...

    async def content_size(self, digest: Digest) -> int | None:
        """Bytes of stored content, whoever links it; None if there is none.

        Raises:
            ObjectDamaged: it is there, and nobody can tell.
        """
        ...

    async def is_derived(self, name: RepositoryName, digest: Digest) -> bool:
        """Whether the repository has something that was derived, under this digest."""
        ...


class StoreFacts:
    """As the store has it now: a request for each question."""

    def __init__(self, backend: StorageBackend) -> None:
        self._backend = backend

    async def is_there(self, key: str) -> bool:
        try:
            return await self._size(key) is not None
        except ObjectDamaged:
            return True

    async def content_size(self, digest: Digest) -> int | None:
        return await self._size(layout.blob_key(digest))

    async def is_derived(self, name: RepositoryName, digest: Digest) -> bool:
        return bool([info async for info in self._backend.list(layout.view_prefix(name, digest))])

    async def _size(self, key: str) -> int | None:
        try:
            return (await self._backend.stat(key)).size
        except ObjectMissing:
            return None


Check = Callable[[ObjectInfo, Facts], Awaitable[Findings]]


class _Wrong(Exception):
    """A record cannot be used, and why."""

    def __init__(self, kind: Kind, seen: str) -> None:
        super().__init__(seen)
        self.kind = kind
        self.seen = seen


class Checks:
    """
    Args:
        young: what was written after this, by the store's clock, is no garbage yet.
        allow_sparse: manifests may list what is not here.
        with_content: read content and tables, too.
        on_read: told of bytes of content that were read.
    """

    def __init__(
        self,
        backend: StorageBackend,
        threads: Threads,
        *,
        young: float,
        allow_sparse: bool,
        with_content: bool,
        on_read: Callable[[int], None],
    ) -> None:
        self._backend = backend
        self._threads = threads
        self._young = young
        self._allow_sparse = allow_sparse
        self._with_content = with_content
        self._on_read = on_read

    def of(self, key: str) -> Check:
        """What is to be checked of a key outside of the catalogue, the content and the repositories."""
        if key in {layout.COLLECTION, layout.TOKEN_KEYS} or _API_KEY.fullmatch(key):
            return self.json_record
        if _JOURNAL_ENTRY.fullmatch(key):
            return self.journal
        if _MARK.fullmatch(key):
            return self.nothing
        if key.startswith(layout.MEMBERS) and layout.digest_of(key) is not None:
            return self.table
        digest = layout.digest_of(key)
        if digest is not None and key == layout.tar_key(digest):
            return self.tar
        return self.foreign

    async def look(self, check: Check, info: ObjectInfo, facts: Facts) -> Findings:
        """What a check finds; nothing when its object is gone by now.

        Raises:
            StorageUnavailable: it is not this object that cannot be read: it is the store.
        """
        try:
            return await check(info, facts)
        except ObjectMissing:
            return ()
        except (StorageUnavailable, OSError) as error:
            if not isinstance(error, ObjectDamaged):
                await self._ask_anything()
            kind = Kind.CONTENT_UNREADABLE if info.key.startswith(layout.BLOBS) else Kind.RECORD_UNREADABLE
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return (Finding(kind, info.key, reason or "cannot be read", info.version),)

    async def _ask_anything(self) -> None:
        """Raises: StorageUnavailable: the store does not answer."""
        async for _ in self._backend.list(layout.CATALOG):
            break

    # ---- content

    async def content(self, info: ObjectInfo, _: Facts) -> Findings:
        """Whether content hashes to the digest in its key: all of it is read."""
        digest = layout.digest_of(info.key)
        assert digest is not None
        hasher = hashlib.new(digest.algorithm, usedforsecurity=False)
        async with self._backend.deliver(info.key) as delivery:
            assert not isinstance(delivery, PresignedUrl), "it was not asked for"
            size = await self._hash(delivery, hasher)
        if hasher.hexdigest() == digest.encoded:
            return ()
        seen = f"{size} bytes that hash to {digest.algorithm}:{hasher.hexdigest()}"
        return (Finding(Kind.CONTENT_DIGEST, info.key, seen, info.version),)

    async def _hash(self, delivery: LocalFile | ByteStream, hasher: Hasher) -> int:
        if isinstance(delivery, ByteStream):
            async for chunk in delivery.chunks:
                await self._threads.run(hasher.update, chunk)
                self._on_read(len(chunk))
            return delivery.size
        for start in range(delivery.span.start, delivery.span.stop, _STRETCH_SIZE):
            stop = min(start + _STRETCH_SIZE, delivery.span.stop)
            await self._threads.run(_hash_file, delivery.file.fileno(), start, stop, hasher)
            self._on_read(stop - start)
        return delivery.size

    async def content_name(self, info: ObjectInfo, _: Facts) -> Findings:
        return (Finding(Kind.CONTENT_NAME, info.key, "a name that is no digest", info.version),)

    async def unlinked(self, info: ObjectInfo, _: Facts) -> Findings:
        """Of content that no repository was seen to link. Whoever links old content touches it before (freshness.py): then it
        is young by now.
        """
        return self._garbage(Kind.CONTENT_UNLINKED, info, "no repository links it")

    # ---- the catalogue and the repositories

    async def catalog(self, info: ObjectInfo, _: Facts) -> Findings:
        try:
            is_legal = layout.catalog_key(layout.name_in_catalog(info.key)) == info.key
        except NameInvalid:
            is_legal = False
        return () if is_legal else (_at(info, Kind.CATALOG_NAME, "not the name of a repository"),)

    async def catalogued(self, info: ObjectInfo, facts: Facts) -> Findings:
        """Of one object of a repository that is there for its own sake."""
        part = layout.in_repository(info.key)
        assert part is not None
        if await facts.is_there(layout.catalog_key(part.name)):
            return ()
        return (_at(info, Kind.CATALOG_MISSING, f"no {layout.catalog_key(part.name)}"),)

    async def marked(self, info: ObjectInfo, facts: Facts) -> Findings:
        """Of one object that tells of something derived."""
        part = layout.in_repository(info.key)
        assert part is not None
        if await facts.is_there(layout.viewed_key(part.name)):
            return ()
        return (_at(info, Kind.VIEW_UNMARKED, f"no {layout.viewed_key(part.name)}"),)

    async def in_repository(self, info: ObjectInfo, facts: Facts) -> Findings:
        """Of any key below `layout.REPOSITORIES`."""
        part = layout.in_repository(info.key)
        if part is None or ":" in info.key:
            kind = Kind.KEY_IN_THE_WAY if _LISTED.search(info.key) else Kind.KEY_FOREIGN
            return (_at(info, kind, "a key that is none of the registry's"),)
        found: Findings = ()
        match part:
            case InRepository(kind="_blobs", digest=Digest() as digest):
                found = await self._link(digest, info, facts)
            case InRepository(kind="_manifests", digest=Digest() as digest):
                found = await self._manifest(part.name, digest, info, facts)
            case InRepository(kind="_tags"):
                found = await self._tag(part.name, info, facts)
            case InRepository(kind="_referrers", digest=Digest() as subject, other=Digest() as referrer):
                found = await self._referrer(part.name, subject, referrer, info, facts)
            case InRepository(kind="_views", digest=Digest() as digest, other=Digest() as source):
                found = await self._view(part.name, digest, source, info, facts)
            case InRepository(kind="_packs", digest=Digest() as digest):
                found = await self._pack(part.name, digest, info, facts)
            case _:  # _viewed
                pass
        return found

    async def _link(self, digest: Digest, info: ObjectInfo, facts: Facts) -> Findings:
        if await self._has_content(digest, facts):
            return ()
        return (_at(info, Kind.LINK_DANGLING, f"no {layout.blob_key(digest)}"),)

    async def _has_content(self, digest: Digest, facts: Facts) -> bool:
        try:
            return await facts.content_size(digest) is not None
        except ObjectDamaged:  # which has a finding of its own
            return True

    async def _tag(self, name: RepositoryName, info: ObjectInfo, facts: Facts) -> Findings:
        try:
            target = await self.tag_target(info.key)
        except NOT_OURS as error:
            return (_at(info, Kind.TAG_RECORD, _said(error)),)
        if await facts.is_there(layout.manifest_key(name, target)):
            return ()
        return (_at(info, Kind.TAG_DANGLING, f"it names {target}, which {name} does not have"),)

    async def tag_target(self, key: str) -> Digest:
        """Raises: ObjectMissing; OciError, ValueError, LookupError, TypeError: it is no tag's record."""
        return Digest((await self._json(key))["digest"])

    # ---- manifests

    async def read_manifest(
        self, name: RepositoryName, digest: Digest
    ) -> tuple[StoredManifest, Manifest | Index] | None:
        """A manifest, or None if it cannot be used, which is a finding of its own. Raises: ObjectMissing."""
        try:
            return await self._read_manifest(name, digest)
        except _Wrong:
            return None

    async def _read_manifest(
        self, name: RepositoryName, digest: Digest
    ) -> tuple[StoredManifest, Manifest | Index]:
        """Raises: ObjectMissing, _Wrong."""
        try:
            stored = await read_manifest_record(self._backend, layout.manifest_key(name, digest))
        except ServerError as error:
            raise _Wrong(Kind.MANIFEST_DIGEST, "its bytes hash to another digest") from error
        except ObjectDamaged as error:
            raise _Wrong(Kind.RECORD_UNREADABLE, str(error)) from error
        except (ObjectTooLarge, *NOT_OURS) as error:
            raise _Wrong(Kind.MANIFEST_RECORD, _said(error)) from error
        if stored.digest != digest:
            raise _Wrong(Kind.MANIFEST_KEY, f"the manifest {stored.digest}")
        try:
            return stored, parse_manifest(stored.content, stored.media_type)
        except NOT_OURS as error:
            raise _Wrong(Kind.MANIFEST_INVALID, _said(error)) from error

    async def _manifest(
        self, name: RepositoryName, digest: Digest, info: ObjectInfo, facts: Facts
    ) -> Findings:
        try:
            _stored, manifest = await self._read_manifest(name, digest)
        except _Wrong as wrong:
            return (_at(info, wrong.kind, wrong.seen),)
        look = self._child if isinstance(manifest, Index) else self._blob
        found = []
        for where, listed in manifest.references():
            size = await look(name, listed, facts)
            if size is None:
                kind = Kind.LISTED_SPARSE if self._allow_sparse else Kind.LISTED_MISSING
                found.append(_at(info, kind, f"{where} is {listed.digest}, which {name} does not have"))
            elif size != listed.size:
                seen = f"{where} gives {listed.digest} {listed.size} bytes; it has {size}"
                found.append(_at(info, Kind.LISTED_SIZE, seen))
        if manifest.subject is not None:
            entry = layout.referrer_key(name, manifest.subject.digest, digest)
            if not await facts.is_there(entry):
                found.append(_at(info, Kind.REFERRER_MISSING, f"no {entry}"))
        return found

    async def _blob(self, name: RepositoryName, listed: Descriptor, facts: Facts) -> int | None:
        """Bytes of what a manifest lists; None if the repository has no link to it."""
        if not await facts.is_there(layout.link_key(name, listed.digest)):
            return None
        # A link without content has a finding of its own, and so has content that is damaged.
        size = None
        with suppress(ObjectDamaged):
            size = await facts.content_size(listed.digest)
        return listed.size if size is None else size

    async def _child(self, name: RepositoryName, listed: Descriptor, facts: Facts) -> int | None:
        """Bytes of what an index lists: a manifest, or a blob where its type says so."""
        if await facts.is_there(layout.manifest_key(name, listed.digest)):
            child = await self.read_manifest(name, listed.digest)
            return listed.size if child is None else len(child[0].content)
        if listed.media_type in MANIFEST_TYPES:
            return None
        return await self._blob(name, listed, facts)

    async def _referrer(
        self, name: RepositoryName, subject: Digest, referrer: Digest, info: ObjectInfo, facts: Facts
    ) -> Findings:
        if not await facts.is_there(layout.manifest_key(name, referrer)):
            return self._garbage(Kind.REFERRER_ORPHAN, info, f"{name} has no manifest {referrer}")
        read = await self.read_manifest(name, referrer)
        if read is None:
            return ()
        stored, manifest = read
        if manifest.subject is None or manifest.subject.digest != subject:
            of = manifest.subject.digest if manifest.subject is not None else "nothing"
            return (_at(info, Kind.REFERRER_STALE, f"an entry of {subject}; the manifest's subject is {of}"),)
        try:
            entry = await self._json(info.key)
        except NOT_OURS as error:
            return (_at(info, Kind.REFERRER_STALE, _said(error)),)
        wanted = referrer_of(manifest, stored.digest, len(stored.content)).to_json()
        differing = sorted(field for field in entry | wanted if entry.get(field) != wanted.get(field))
        if not differing:
            return ()
        return (
            _at(info, Kind.REFERRER_STALE, f"it differs from its manifest in {', '.join(differing)[:200]!a}"),
        )

    # ---- what was derived

    async def _view(
        self, name: RepositoryName, digest: Digest, source: Digest, info: ObjectInfo, facts: Facts
    ) -> Findings:
        is_kept = await facts.is_there(layout.manifest_key(name, source)) or await facts.is_derived(
            name, source
        )
        if not is_kept:
            return self._garbage(Kind.VIEW_ORPHAN, info, f"its source {source} is gone")
        try:
            derived = Derived.from_bytes(await self._record(info.key))
        except NOT_OURS as error:
            return (_at(info, Kind.VIEW_DAMAGED, _said(error)),)
        if derived.of != source:
            return (_at(info, Kind.VIEW_DAMAGED, f"derived from {derived.of}, not from {source}"),)
        if derived.recipe is None and Digest.of(derived.content, digest.algorithm) != digest:
            return (_at(info, Kind.VIEW_DAMAGED, "a document that hashes to another digest"),)
        return ()

    async def _pack(self, name: RepositoryName, digest: Digest, info: ObjectInfo, facts: Facts) -> Findings:
        if not await facts.is_derived(name, digest):
            return self._garbage(Kind.PACK_ORPHAN, info, f"nothing is derived under {digest}")
        try:
            Pack.from_bytes(await self._record(info.key))
        except NOT_OURS as error:
            return (_at(info, Kind.PACK_DAMAGED, _said(error)),)
        return ()

    # ---- the rest

    async def table(self, info: ObjectInfo, facts: Facts) -> Findings:
        digest = layout.digest_of(info.key)
        assert digest is not None
        if not await self._has_content(digest, facts):
            return self._garbage(Kind.CACHE_ORPHAN, info, f"no {layout.blob_key(digest)}")
        if not self._with_content or await self._is_sealed(info.key):
            return ()
        return (_at(info, Kind.CACHE_DAMAGED, "a table with a wrong checksum"),)

    async def _is_sealed(self, key: str) -> bool:
        """Whether a table's last four bytes are the CRC-32 of the others (member_table.py)."""
        checksum, end = 0, b""
        async with self._backend.deliver(key) as delivery:
            assert not isinstance(delivery, PresignedUrl), "it was not asked for"
            async for chunk in chunks_of(delivery):
                piece = end + chunk
                checksum = zlib.crc32(memoryview(piece)[:-_CRC_SIZE], checksum)
                end = piece[-_CRC_SIZE:]
        return checksum.to_bytes(_CRC_SIZE, "little") == end

    async def tar(self, info: ObjectInfo, _: Facts) -> Findings:
        try:
            Digest((await self._record(info.key)).decode())
        except NOT_OURS:
            return (_at(info, Kind.CACHE_DAMAGED, "not a digest"),)
        return ()

    async def journal(self, info: ObjectInfo, _: Facts) -> Findings:
        try:
            for line in (await self._record(info.key)).splitlines():
                Change.from_json(json.loads(line))
        except NOT_OURS as error:
            return (_at(info, Kind.JOURNAL_DAMAGED, _said(error)),)
        return ()

    async def json_record(self, info: ObjectInfo, _: Facts) -> Findings:
        """Of a record whose reader says more of it; what it holds may be secret."""
        try:
            await self._json(info.key)
        except NOT_OURS:
            return (_at(info, Kind.RECORD_DAMAGED, "not a JSON object"),)
        return ()

    async def nothing(self, _: ObjectInfo, __: Facts) -> Findings:
        return ()

    async def foreign(self, info: ObjectInfo, _: Facts) -> Findings:
        return (_at(info, Kind.KEY_FOREIGN, "a key that is none of the registry's"),)

    async def _record(self, key: str) -> bytes:
        """Raises: ObjectMissing; ValueError: larger than any record of ours."""
        try:
            return (await self._backend.read(key, size_max=_RECORD_SIZE_MAX))[0]
        except ObjectTooLarge as error:
            raise ValueError(f"more than {_RECORD_SIZE_MAX} bytes") from error

    async def _json(self, key: str) -> dict[str, Any]:
        """Raises: ObjectMissing; ValueError: not a JSON object."""
        document = json.loads(await self._record(key))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")  # noqa: TRY004 - a document's fault, not the caller's
        return document

    def _garbage(self, kind: Kind, info: ObjectInfo, seen: str) -> Findings:
        if info.modified >= self._young:
            return ()
        return (Finding(kind, info.key, seen, info.version, info.size),)


def _at(info: ObjectInfo, kind: Kind, seen: str) -> Finding:
    return Finding(kind, info.key, seen, info.version)


def _said(error: Exception) -> str:
    """Why a record could not be decoded, in a few ASCII characters."""
    if isinstance(error, KeyError):
        return f"there is no {str(error)[:80]}"
    return ascii(str(error))[1:-1][:200]


def _hash_file(descriptor: int, start: int, stop: int, hasher: Hasher) -> None:
    """In a thread. Raises: StorageUnavailable: the file ends early."""
    while start < stop:
        piece = os.pread(descriptor, min(_PIECE_SIZE, stop - start), start)
        if not piece:
            raise StorageUnavailable("the content ended before its size")
        hasher.update(piece)
        start += len(piece)
