"""HostedRegistry: the registry's core, an OciRegistry over a storage backend.

Write order is the transaction: content before link, blobs before manifest, referrer entry before manifest, manifest
before tag. A crash at any point leaves at most garbage, never a torn artifact (docs/storage-layout.md).
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    Denied,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestTooLarge,
    ManifestUnknown,
    NameUnknown,
    OciError,
    RangeInvalid,
    ServerError,
    TagInvalid,
)
from kitspec.http_fields import ByteSpan
from kitspec.interface import StoredManifest
from kitspec.manifest import MANIFEST_SIZE_MAX, Index, Manifest, parse_manifest, referrer_of
from kitspec.media_types import MANIFEST_TYPES, is_index_type
from kitspec.names import RepositoryName, Tag, fallback_tag, view_of
from registry import layout
from registry.freshness import Freshness, Promise
from registry.journal import Change, Journal
from registry.records import RecordCache
from registry.referrer_index import ReferrerIndex
from registry.storage_errors import translated
from registry.upload_sessions import Chunks, UploadSession, UploadSessions
from storage_backends.file_stream import chunks_of
from storage_backends.interface import (
    ByteStream,
    Delivery,
    LocalFile,
    ObjectInfo,
    ObjectMissing,
    PreconditionFailed,
    PresignedUrl,
    Span,
    StorageBackend,
)

Versions = tuple[tuple[str, str], ...]
"""Keys of records with the versions they were read at."""

BLOB_MEDIA_TYPE = "application/octet-stream"

# Bytes per worker that remembered manifests may take; a typical manifest has 1 to 20 KB.
_MANIFEST_CACHE_SIZE_MAX = 16 * 1024 * 1024
_TAG_CACHE_SIZE_MAX = 4 * 1024 * 1024
_MANIFEST_RECORD_SIZE_MAX = 4 * 1024 * 1024 + 64 * 1024
_TAG_RECORD_SIZE_MAX = 16 * 1024

# security.md's L-11: an index of indexes of … deeper than this is no use to anybody.
INDEX_DEPTH_MAX = 8

# Of what a manifest lists; on a store far away each takes tens of milliseconds.
_LOOKS_AT_ONCE = 16

# A mount that names no source looks for one in this many repositories; more would make it dearer than an upload.
_MOUNT_SOURCES_MAX = 1000


@dataclass(frozen=True, slots=True)
class _ManifestRecord:
    """A manifest as it is kept: a line of JSON about it, then its bytes as received."""

    manifest: StoredManifest
    depth: int
    """0 for a manifest or an empty index, one more than its deepest child for an index."""

    def to_bytes(self) -> bytes:
        # The nonce makes every write of the same manifest a different record (design decision 1).
        head = {
            "mediaType": self.manifest.media_type,
            "digest": self.manifest.digest,
            "depth": self.depth,
            "nonce": secrets.token_hex(8),
        }
        return json.dumps(head).encode() + b"\n" + self.manifest.content

    @classmethod
    def from_bytes(cls, record: bytes) -> _ManifestRecord:
        head, _, content = record.partition(b"\n")
        document = json.loads(head)
        digest = Digest(document["digest"])
        # Never a body that differs from its digest (INV-04), whatever happened to the disk.
        if Digest.of(content, digest.algorithm) != digest:
            raise ServerError(f"manifest {digest} is damaged in the registry's storage")
        return cls(StoredManifest(content, document["mediaType"], digest), document["depth"])


@dataclass(frozen=True, slots=True)
class _Listed:
    """What the repository has of something that a manifest lists.

    Attributes:
        size: None if it has nothing.
        depth: that it adds to the tree.
    """

    size: int | None
    depth: int


@dataclass(frozen=True, slots=True)
class _Linked:
    """A blob that a repository may serve."""

    link: ObjectInfo
    blob: ObjectInfo

    @property
    def size(self) -> int:
        return self.blob.size


async def read_manifest_record(backend: StorageBackend, key: str) -> StoredManifest:
    """A manifest as it is stored.

    Raises:
        ObjectMissing: there is none.
        ServerError, ValueError, LookupError: it is damaged.
    """
    record, _ = await backend.read(key, size_max=_MANIFEST_RECORD_SIZE_MAX)
    return _ManifestRecord.from_bytes(record).manifest


async def _rests(promise: Promise, info: ObjectInfo) -> bool:
    """Whether something that was found is still there, and will be for as long as the promise says."""
    try:
        await promise.rest_on(info)
    except ObjectMissing:
        return False
    return True


class HostedBody:
    """A BlobBody over a delivery of the backend."""

    def __init__(self, chunks: AsyncIterator[bytes], size: int) -> None:
        self._chunks = chunks
        self.size = size

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks


class HostedUpload:
    """A BlobUpload: a session that links the blob into its repository when it ends."""

    def __init__(self, registry: HostedRegistry, name: RepositoryName, session: UploadSession) -> None:
        self._registry = registry
        self._name = name
        self._session = session

    @property
    def location(self) -> str:
        return self._session.id

    @property
    def offset(self) -> int:
        return self._session.offset

    async def check(self, *, at: int | None, size: int | None) -> None:
        """Raise what can be known to stop an `append` before its bytes are asked for."""
        self._session.check(at, size)

    async def append(
        self,
        chunks: Chunks,
        *,
        at: int | None = None,
        size: int | None = None,
        closing: Digest | None = None,
    ) -> int:
        return await self._session.append(chunks, at=at, size=size, closing=closing)

    async def commit(self, digest: Digest) -> Descriptor:
        """Raises: BlobUploadUnknown: also when the blob was deleted in that very moment: push it again."""
        promise = self._registry.freshness.promise()
        info = await self._session.commit(digest)
        try:
            await self._link(digest, info, promise)
        except ObjectMissing as error:
            raise BlobUploadUnknown(
                f"the blob {digest} was removed while it was pushed; push it again"
            ) from error
        return Descriptor(BLOB_MEDIA_TYPE, digest, info.size)

    async def _link(self, digest: Digest, info: ObjectInfo, promise: Promise) -> None:
        await self._registry.link_blob(self._name, digest, info, promise)

    async def cancel(self) -> None:
        await self._session.cancel()


class HostedRegistry:
    """What the specification asks of a registry, without HTTP.

    Args:
        allow_sparse: accept manifests whose blobs or children are not here.
        referrers_max: that one subject may have.
        freshness: keeps from collection what was said to be here.
        journal: learns of every write.
        on_manifest_lookup: told of each look-up, whether memory had the manifest.
    """

    def __init__(
        self,
        backend: StorageBackend,
        sessions: UploadSessions,
        *,
        allow_sparse: bool = False,
        referrers_max: int = 10_000,
        freshness: Freshness | None = None,
        journal: Journal | None = None,
        on_manifest_lookup: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.backend = backend
        self.sessions = sessions
        self.freshness = freshness or Freshness(backend, grace_s=None)
        self._journal = journal or Journal(backend, is_writable=False)
        self._allow_sparse = allow_sparse
        self._referrers = ReferrerIndex(backend, count_max=referrers_max)
        self._manifests: RecordCache[_ManifestRecord] = RecordCache(
            backend,
            _ManifestRecord.from_bytes,
            record_size_max=_MANIFEST_RECORD_SIZE_MAX,
            size_max=_MANIFEST_CACHE_SIZE_MAX,
            on_lookup=on_manifest_lookup,
        )
        self._tags: RecordCache[Digest] = RecordCache(
            backend, _tag_target, record_size_max=_TAG_RECORD_SIZE_MAX, size_max=_TAG_CACHE_SIZE_MAX
        )

    # Blobs

    async def stat_blob(self, name: RepositoryName, digest: Digest) -> Descriptor:
        with translated():
            info = await self._find_blob(name, digest)
        if info is None:
            raise _blob_unknown(name, digest)
        return Descriptor(BLOB_MEDIA_TYPE, digest, info.size)

    async def confirm_blob(self, name: RepositoryName, digest: Digest) -> Descriptor:
        """`stat_blob` for somebody who will not push the blob if it is here, and rely on it."""
        promise = self.freshness.promise()
        with translated():
            found = await self._find_link(name, digest)
            if found is None or not await _rests(promise, found.link):
                raise _blob_unknown(name, digest)
        return Descriptor(BLOB_MEDIA_TYPE, digest, found.size)

    @asynccontextmanager
    async def deliver_blob(
        self,
        name: RepositoryName,
        digest: Digest,
        choose: Callable[[int], ByteSpan | None],
        *,
        url_size_min: int | None = None,
    ) -> AsyncIterator[Delivery]:
        """A blob, or a span of it, in the form in which the backend can let it go.

        Args:
            choose: the span that is wanted, given the size of the blob; None for all of it. What it raises goes through.
            url_size_min: a blob of so many bytes may come as its PresignedUrl, whatever is chosen; None for never.

        Raises:
            BlobUnknown: the repository does not hold it.
        """

        def span_of(size: int) -> Span | None:
            wanted = choose(size)
            return Span(wanted.start, wanted.stop) if wanted is not None else None

        try:
            with translated():
                # The link is asked for every time: a blob that was deleted here may be remembered from elsewhere.
                await self.backend.stat(layout.link_key(name, digest))
                context = self.backend.deliver(layout.blob_key(digest), span_of, url_size_min=url_size_min)
                delivery = await context.__aenter__()
        except ObjectMissing as error:
            raise _blob_unknown(name, digest) from error
        try:
            yield delivery
        finally:
            await context.__aexit__(None, None, None)

    @asynccontextmanager
    async def open_blob(
        self, name: RepositoryName, digest: Digest, span: ByteSpan | None = None
    ) -> AsyncIterator[HostedBody]:
        def choose(size: int) -> ByteSpan | None:
            if span is None:
                return None
            if span.start >= size or span.stop <= span.start:
                raise RangeInvalid(f"bytes {span.start} to {span.stop} of {size}", size=size)
            return ByteSpan(span.start, min(span.stop, size))

        async with self.deliver_blob(name, digest, choose) as delivery:
            match delivery:
                case LocalFile() | ByteStream():
                    yield HostedBody(chunks_of(delivery), delivery.span.stop - delivery.span.start)
                case PresignedUrl():
                    raise ServerError("this backend hands out addresses only; the bytes cannot be read here")

    async def delete_blob(self, name: RepositoryName, digest: Digest) -> None:
        with translated():
            if await self._find_blob(name, digest) is None:
                raise _blob_unknown(name, digest)
            await self.backend.delete(layout.link_key(name, digest))
        await self._journal.append(Change("delete", name, digest))

    async def mount_blob(
        self,
        name: RepositoryName,
        digest: Digest,
        *,
        source: RepositoryName | None = None,
        may_read: Callable[[RepositoryName], Awaitable[bool]] | None = None,
    ) -> Descriptor | None:
        """
        Args:
            may_read: whether the blob may be taken from a repository, where no `source` is named; None for any.
        """
        promise = self.freshness.promise()
        with translated():
            if (found := await self._find_link(name, digest)) is not None:
                if not await _rests(promise, found.link):
                    return None
                await self._note_link("mount", name, digest, found.size, source)
                return Descriptor(BLOB_MEDIA_TYPE, digest, found.size)
            if source is not None:
                info = await self._find_blob(source, digest)
            elif await self._exists(layout.blob_key(digest)):
                info, source = await self._find_blob_anywhere(digest, may_read)
            else:
                info = None
            if info is None or not await _rests(promise, info):
                return None
            try:
                await self.link_blob(name, digest, info, promise, source=source)
            except ObjectMissing:
                return None  # it was removed meanwhile
            return Descriptor(BLOB_MEDIA_TYPE, digest, info.size)

    async def link_blob(
        self,
        name: RepositoryName,
        digest: Digest,
        blob: ObjectInfo,
        promise: Promise,
        *,
        source: RepositoryName | None = None,
    ) -> None:
        """Let this repository serve a blob that is stored.

        Args:
            promise: rests on `blob` already, which was fresh when it began or has been touched since.
            source: the repository that the blob was found in.

        Raises:
            ObjectMissing: the blob was removed.
        """
        with translated():
            await self._enter_catalog(name)
            key = layout.link_key(name, digest)
            await self._link(key, promise)
            # A link whose blob is gone is harmless, and may be somebody else's by now: it stays.
            await promise.renew(also=(key, blob.key))
        await self._note_link("push" if source is None else "mount", name, digest, blob.size, source)

    async def _link(self, key: str, promise: Promise) -> None:
        """Write a link, or keep the one that is there."""
        try:
            await promise.rest_on(await self.backend.stat(key))
        except ObjectMissing:
            await self.backend.write(key, b"")

    async def _note_link(
        self, action: str, name: RepositoryName, digest: Digest, size: int, source: RepositoryName | None
    ) -> None:
        """Also of a link that was there: this may be the request that is sent again because its answer was lost."""
        await self._journal.append(Change(action, name, digest, BLOB_MEDIA_TYPE, size, source=source))

    # Uploads

    async def begin_upload(
        self, name: RepositoryName, *, algorithm: str = "sha256", owner: str = ""
    ) -> HostedUpload:
        """
        Args:
            owner: the only one who can go on with it; "" for nobody in particular.
        """
        return self.upload_of(name, await self.sessions.begin(name, algorithm=algorithm, owner=owner))

    async def resume_upload(self, name: RepositoryName, location: str, *, owner: str = "") -> HostedUpload:
        return self.upload_of(name, await self.sessions.resume(name, location, owner=owner))

    async def get_upload(self, name: RepositoryName, location: str, *, owner: str = "") -> HostedUpload:
        """`resume_upload`, once an append that was cut off has ended, or soon."""
        return self.upload_of(name, await self.sessions.settled(name, location, owner=owner))

    def upload_of(self, name: RepositoryName, session: UploadSession) -> HostedUpload:
        """An upload as its users see it."""
        return HostedUpload(self, name, session)

    # Manifests

    async def get_manifest(self, name: RepositoryName, reference: Tag | Digest) -> StoredManifest:
        return (await self.find_manifest(name, reference))[0]

    async def find_manifest(
        self, name: RepositoryName, reference: Tag | Digest
    ) -> tuple[StoredManifest, Versions]:
        """`get_manifest`, with the versions of the records that the answer rests on."""
        with translated():
            try:
                if isinstance(reference, Tag):
                    return await self._find_tagged(layout.tag_key(name, reference), name)
                key = layout.manifest_key(name, reference)
                record, version = await self._manifests.get_versioned(key)
            except ObjectMissing as error:
                if not await self._exists(layout.catalog_key(name)):
                    raise _name_unknown(name) from error
                raise ManifestUnknown(f"no manifest {reference} in {name}") from error
        return record.manifest, ((key, version),)

    async def _find_tagged(self, tag_key: str, name: RepositoryName) -> tuple[StoredManifest, Versions]:
        """Raises: ObjectMissing: there is no such tag, or it names a manifest that was deleted."""
        before = ""
        while True:
            digest, tag_version = await self._tags.get_versioned(tag_key)
            key = layout.manifest_key(name, digest)
            try:
                record, version = await self._manifests.get_versioned(key)
            except ObjectMissing:
                # Moved, and then its old manifest deleted, between the two looks: there is a new one.
                if tag_version == before:
                    raise
                before = tag_version
                continue
            return record.manifest, ((tag_key, tag_version), (key, version))

    async def tag_target(self, name: RepositoryName, tag: Tag) -> Digest | None:
        """What a tag points at; None where there is no such tag."""
        try:
            with translated():
                return await self._tags.get(layout.tag_key(name, tag))
        except ObjectMissing:
            return None

    async def tags_of(self, name: RepositoryName, digest: Digest) -> list[Tag]:
        """The tags that point at a manifest."""
        prefix = layout.tags_prefix(name)
        with translated():
            tags = [Tag(info.key.removeprefix(prefix)) async for info in self.backend.list(prefix)]
        return [tag for tag in tags if await self.tag_target(name, tag) == digest]

    async def put_manifest(
        self,
        name: RepositoryName,
        content: bytes,
        media_type: str,
        *,
        expect: Digest | None = None,
        tags: tuple[Tag, ...] = (),
    ) -> Descriptor:
        if len(content) > MANIFEST_SIZE_MAX:
            raise ManifestTooLarge(
                f"a manifest of {len(content)} bytes; at most {MANIFEST_SIZE_MAX} are allowed"
            )
        manifest = parse_manifest(content, media_type)
        return await self.store_manifest(name, manifest, content, media_type, expect=expect, tags=tags)

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
        """`put_manifest` for a caller that has parsed `content` already.

        Args:
            may_move_tags: False: a tag that is there stays where it is.

        Raises:
            Denied: a tag would have to be moved; tags before it in `tags` are set.
        """
        for tag in tags:
            if view_of(tag) is not None:
                raise TagInvalid(
                    f"{tag} names a view of another tag (.only. or .as.), which is made on request; "
                    "push under another tag"
                )
        digest = Digest.of(content, expect.algorithm if expect is not None else "sha256")
        if expect is not None and digest != expect:
            raise DigestInvalid(f"the manifest hashes to {digest}, not to {expect}")
        promise = self.freshness.promise()
        with translated():
            depth = await self._check_references(name, manifest, promise)
            stored = StoredManifest(content, media_type, digest)
            subject, referrer = manifest.subject, referrer_of(manifest, digest, len(content))
            if subject is not None:
                await self._referrers.add(name, subject.digest, referrer)
            await self._enter_catalog(name)
            key = layout.manifest_key(name, digest)
            record = _ManifestRecord(stored, depth)

            async def write() -> None:
                await self._write_manifest(key, record, promise)
                if subject is not None:
                    await self._referrers.renew(name, subject.digest, referrer)

            await write()
            for tag in dict.fromkeys(tags):
                await self._set_tag(name, tag, digest, may_move=may_move_tags)
            if tags and not await self._exists(key):
                # Deleted before its tags were set; we are the later of the two.
                await write()
        change = Change("push", name, digest, media_type, len(content), tags=tuple(dict.fromkeys(tags)))
        await self._journal.append(change)
        return stored.descriptor

    async def _set_tag(self, name: RepositoryName, tag: Tag, digest: Digest, *, may_move: bool) -> None:
        key = layout.tag_key(name, tag)
        try:
            await self.backend.write(key, _tag_record(digest), expect=None if may_move else "")
        except PreconditionFailed as error:
            target: Digest | None = None
            with suppress(ObjectMissing):
                target = await self._tags.get(key)
            # The same push once more, because its answer was lost.
            if target != digest:
                raise tag_is_taken(name, tag) from error

    async def _write_manifest(self, key: str, record: _ManifestRecord, promise: Promise) -> None:
        """Raises: ManifestBlobUnknown: something that it lists was collected meanwhile; it is taken back."""
        written = await self.backend.write(key, record.to_bytes())
        try:
            await promise.renew()
        except ObjectMissing as error:
            with suppress(PreconditionFailed):  # pushed by others, too, who have checked it
                await self.backend.delete(key, expect=written.version)
            raise ManifestBlobUnknown(
                f"a blob that the manifest lists was removed while it was pushed; push it again: {error}"
            ) from error

    async def delete_manifest(self, name: RepositoryName, reference: Tag | Digest) -> None:
        with translated():
            try:
                if isinstance(reference, Tag):
                    await self.backend.stat(layout.tag_key(name, reference))
                    await self.backend.delete(layout.tag_key(name, reference))
                    change = Change("delete", name, tags=(reference,))
                else:
                    tags = await self._delete_manifest_by_digest(name, reference)
                    change = Change("delete", name, reference, tags=tags)
            except ObjectMissing as error:
                if not await self._exists(layout.catalog_key(name)):
                    raise _name_unknown(name) from error
                raise ManifestUnknown(f"no manifest {reference} in {name}") from error
        await self._journal.append(change)

    async def refresh(self, change: Change) -> None:
        """Look at what another worker has changed, where it is remembered, so that whoever asks next need not wait."""
        name = change.repository
        if change.digest is not None:
            await self._manifests.refresh(layout.manifest_key(name, change.digest))
        for tag in change.tags:
            await self._tags.refresh(layout.tag_key(name, Tag(tag)))

    def forget(self) -> None:
        """What is remembered of others' writes may be old, and nobody will say so."""
        self._manifests.forget_all()
        self._tags.forget_all()

    # Lists

    async def repositories(self, *, after: str = "") -> AsyncIterator[RepositoryName]:
        with translated():
            async for info in self.backend.list(layout.CATALOG, after=layout.catalog_after(after)):
                yield layout.name_in_catalog(info.key)

    async def tags(self, name: RepositoryName, *, after: str = "") -> AsyncIterator[Tag]:
        prefix = layout.tags_prefix(name)
        with translated():
            if not await self._exists(layout.catalog_key(name)):
                raise _name_unknown(name)
            async for info in self.backend.list(prefix, after=prefix + after if after else ""):
                yield Tag(info.key.removeprefix(prefix))

    async def referrers(
        self, name: RepositoryName, subject: Digest, *, artifact_type: str | None = None
    ) -> AsyncIterator[Descriptor]:
        seen: set[Digest] = set()
        with translated():
            async for referrer in self._referrers.entries(name, subject):
                seen.add(referrer.digest)
                if artifact_type in (None, referrer.artifact_type) and await self._exists(
                    layout.manifest_key(name, referrer.digest)
                ):
                    yield referrer
            async for referrer in self._fallback_referrers(name, subject):
                if referrer.digest not in seen and artifact_type in (None, referrer.artifact_type):
                    seen.add(referrer.digest)
                    yield referrer

    # Inside

    async def _exists(self, key: str) -> bool:
        try:
            await self.backend.stat(key)
        except ObjectMissing:
            return False
        return True

    async def _find_link(self, name: RepositoryName, digest: Digest) -> _Linked | None:
        try:
            link = await self.backend.stat(layout.link_key(name, digest))
            return _Linked(link, await self.backend.stat(layout.blob_key(digest)))
        except ObjectMissing:
            return None

    async def _find_blob(self, name: RepositoryName, digest: Digest) -> ObjectInfo | None:
        found = await self._find_link(name, digest)
        return None if found is None else found.blob

    async def _find_blob_anywhere(
        self, digest: Digest, may_read: Callable[[RepositoryName], Awaitable[bool]] | None
    ) -> tuple[ObjectInfo | None, RepositoryName | None]:
        looked_at = 0
        async for name in self.repositories():
            info = await self._find_blob(name, digest)
            if info is not None and (may_read is None or await may_read(name)):
                return info, name
            looked_at += 1
            if looked_at == _MOUNT_SOURCES_MAX:
                break
        return None, None

    async def _enter_catalog(self, name: RepositoryName) -> None:
        key = layout.catalog_key(name)
        if not await self._exists(key):
            await self.backend.write(key, b"")

    async def _check_references(
        self, name: RepositoryName, manifest: Manifest | Index, promise: Promise
    ) -> int:
        """Refuse a manifest that lists what is not here; the depth of its tree."""
        depth = 0
        references = list(manifest.references())
        find = self._find_child if isinstance(manifest, Index) else self._find_listed
        for begin in range(0, len(references), _LOOKS_AT_ONCE):
            some = references[begin : begin + _LOOKS_AT_ONCE]
            looks = await asyncio.gather(*(find(name, reference, promise) for _, reference in some))
            for (where, reference), found in zip(some, looks, strict=True):
                depth = max(depth, found.depth)
                self._check_reference(name, where, reference, found.size)
        if depth > INDEX_DEPTH_MAX:
            raise ManifestInvalid(f"indexes nested {depth} deep; at most {INDEX_DEPTH_MAX} are allowed")
        return depth

    def _check_reference(
        self, name: RepositoryName, where: str, reference: Descriptor, size: int | None
    ) -> None:
        if size is None and not self._allow_sparse:
            raise ManifestBlobUnknown(
                f"{where} names {reference.digest}, which {name} does not hold; push it first",
                detail={"digest": reference.digest},
            )
        if size is not None and size != reference.size:
            raise ManifestInvalid(
                f"{where} gives {reference.digest} a size of {reference.size} bytes; it has {size}",
                detail={"digest": reference.digest},
            )

    async def _find_listed(self, name: RepositoryName, blob: Descriptor, promise: Promise) -> _Listed:
        """What a manifest lists."""
        found = await self._find_link(name, blob.digest)
        is_here = found is not None and await _rests(promise, found.link)
        return _Listed(found.size if found is not None and is_here else None, depth=0)

    async def _find_child(self, name: RepositoryName, child: Descriptor, promise: Promise) -> _Listed:
        """What an index lists.

        Some clients (BuildKit's cache) list blobs in an index: they are accepted where a blob is what the type says.
        """
        key = layout.manifest_key(name, child.digest)
        try:
            record = await self._manifests.get(key)
        except ObjectMissing:
            if child.media_type in MANIFEST_TYPES:
                return _Listed(None, depth=1)
            return replace(await self._find_listed(name, child, promise), depth=1)
        depth = record.depth if is_index_type(record.manifest.media_type) else 0
        return _Listed(len(record.manifest.content), 1 + depth)

    async def _delete_manifest_by_digest(self, name: RepositoryName, digest: Digest) -> tuple[str, ...]:
        """Tags go with it; which."""
        key = layout.manifest_key(name, digest)
        record, version = await self._manifests.get_versioned(key)
        removed = await self._delete_tags_of(name, digest, is_gone=False)
        subject: Descriptor | None = None
        with suppress(OciError):  # what is not understood any more goes as well; its entry with a collection
            subject = parse_manifest(record.manifest.content, record.manifest.media_type).subject
        # As it is before the manifest goes: who pushes that again writes the entry anew, and it stays.
        entry = await self._referrers.seen(name, subject.digest, digest) if subject is not None else None
        try:
            await self.backend.delete(key, expect=version)
        except PreconditionFailed:
            return tuple(removed)  # pushed again while it was being deleted: the push came last
        # Set meanwhile: they would come back when the manifest does.
        removed += await self._delete_tags_of(name, digest, is_gone=True)
        if entry is not None:
            await self._referrers.remove(entry)
        return tuple(removed)

    async def _delete_tags_of(self, name: RepositoryName, digest: Digest, *, is_gone: bool) -> list[str]:
        """
        Args:
            is_gone: the manifest was deleted: tags stay when it is there again, which is so before a push sets one.
        """
        prefix = layout.tags_prefix(name)
        removed: list[str] = []
        for key in [info.key async for info in self.backend.list(prefix)]:
            try:
                target, version = await self._tags.get_versioned(key)
                if target != digest or (is_gone and await self._exists(layout.manifest_key(name, digest))):
                    continue
                await self.backend.delete(key, expect=version)
                removed.append(key.removeprefix(prefix))
            except (ObjectMissing, PreconditionFailed):
                continue  # moved or removed meanwhile: no longer ours to remove
        return removed

    async def _fallback_referrers(self, name: RepositoryName, subject: Digest) -> AsyncIterator[Descriptor]:
        """Manifests listed by the index that clients keep under the fallback tag."""
        try:
            listed = await self.get_manifest(name, fallback_tag(subject))
        except (ManifestUnknown, NameUnknown):
            return
        index = parse_manifest(listed.content, listed.media_type)
        if not isinstance(index, Index):
            return
        for descriptor in index.manifests:
            try:
                stored = await self.get_manifest(name, descriptor.digest)
            except ManifestUnknown:
                continue
            manifest = parse_manifest(stored.content, stored.media_type)
            if manifest.subject is not None and manifest.subject.digest == subject:
                yield referrer_of(manifest, stored.digest, len(stored.content))


def tag_is_taken(name: RepositoryName, tag: Tag) -> Denied:
    return Denied(
        f"{name}:{tag} is there, and you may create tags here but not update them; push under another tag",
        detail={"tag": tag},
    )


def _tag_record(target: Digest) -> bytes:
    return json.dumps({"digest": target, "nonce": secrets.token_hex(8)}).encode()


def _tag_target(record: bytes) -> Digest:
    return Digest(json.loads(record)["digest"])


def _blob_unknown(name: RepositoryName, digest: Digest) -> BlobUnknown:
    return BlobUnknown(f"no blob {digest} in {name}", detail={"digest": digest})


def _name_unknown(name: RepositoryName) -> NameUnknown:
    return NameUnknown(f"no repository {name} here", detail={"name": name})
