"""LayoutRegistry: what a registry can do, done by a folder that is an OCI image layout. The client's local store is one.

A layout knows one set of blobs, not one per repository: a blob that is here is here for every repository, and a mount
is free. It may be used by several processes at once. All file work happens in threads of its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial as bind
from pathlib import Path
from typing import Self, TypeVar

from kitclient.blob_stream import BlobSource, count
from kitclient.errors import StoreUnusable
from kitclient.ingest import Partial, new_partial, partial_of, resumed_partial
from kitclient.layout_folder import INGEST_KEPT_S, Change, Entry, ImageLayout, manifest_entry
from kitclient.pipeline import finished
from kitclient.progress import BlobProgress, Silence
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestTooLarge,
    ManifestUnknown,
    NameUnknown,
    RangeInvalid,
    Unsupported,
    UploadOutOfOrder,
)
from kitspec.http_fields import ByteSpan
from kitspec.interface import BlobBody, OciRegistry, StoredManifest
from kitspec.manifest import MANIFEST_SIZE_MAX, parse_manifest
from kitspec.media_types import MANIFEST_TYPES
from kitspec.names import RepositoryName, Tag

_T = TypeVar("_T")

# Large enough that a thread's turn costs nothing beside the copy, small enough for five transfers at once.
_BATCH_SIZE = 1024 * 1024
# Nothing tells one process that another has let a file go: ask again.
_CLAIM_POLL_S = 0.1


class LayoutRegistry:
    """The repositories of one host in an image layout.

    Args:
        root: the folder; made when it is not there.
        host: `host[:port]` whose repositories these are; `localhost` for what was packed without one.
    """

    def __init__(self, root: Path, host: str = "localhost", *, threads: int = 8) -> None:
        self.layout = ImageLayout(root)
        self.host = host
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    async def __aenter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="layout")
        try:
            await self._run(self.layout.create)
        except BaseException:
            self._pool.shutdown(wait=False)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._pool is not None
        # Nothing is under way any more: each operation waits for its own threads' work.
        self._pool.shutdown(wait=False)
        self._pool = None

    # ---- reading

    async def stat_blob(self, name: RepositoryName, digest: Digest) -> Descriptor:
        size = await self._run(bind(self.layout.blob_size, digest))
        if size is None:
            raise _blob_unknown(name, digest)
        return Descriptor("application/octet-stream", digest, size)

    @asynccontextmanager
    async def open_blob(
        self, name: RepositoryName, digest: Digest, span: ByteSpan | None = None
    ) -> AsyncIterator[BlobBody]:
        body = _FileBody(self, self.layout.blob_path(digest))
        try:
            try:
                size = await self._run(body.open)
            except FileNotFoundError as error:
                raise _blob_unknown(name, digest) from error
            if span is not None and not 0 <= span.start < min(size, span.stop):
                raise RangeInvalid(f"{span} does not begin inside the {size} bytes of {digest}", size=size)
            if span is not None:
                body.span = ByteSpan(span.start, min(span.stop, size))
            yield body
        finally:
            await body.close()

    async def get_manifest(self, name: RepositoryName, reference: Tag | Digest) -> StoredManifest:
        return await self._run(bind(self._get_manifest, name, reference))

    # ---- writing

    async def begin_upload(self, name: RepositoryName) -> LayoutUpload:
        return LayoutUpload(self, await self._run(bind(new_partial, self.layout, self._repository(name))))

    async def resume_upload(self, name: RepositoryName, location: str) -> LayoutUpload:
        partial = await self._run(bind(resumed_partial, self.layout, self._repository(name), location))
        return await LayoutUpload(self, partial).look()

    async def put_blob(
        self, name: RepositoryName, blob: Descriptor, read: BlobSource, progress: BlobProgress | None = None
    ) -> None:
        """Store a blob of known digest; go on where an earlier try, in this process or another, stopped.

        Waits while somebody else stores the same blob. What arrived stays for the next try, whatever ends this one,
        unless it is wrong.

        Raises:
            DigestInvalid: what `read` gave is not the blob; nothing of it is kept.
        """
        _ = name
        progress = progress or Silence()
        partial = partial_of(self.layout, blob.digest)
        while True:
            resumed: bool | None = False
            try:
                resumed = await self._claim(partial, blob)
                if resumed is None:
                    progress.advance(blob.size)
                else:
                    await self._fill(partial, blob, read, progress)
                return
            except DigestInvalid:
                # What an earlier life left was bad, perhaps by a power cut: once more from the beginning.
                if not resumed:
                    raise
                progress.advance(-blob.size)
            finally:
                await self._run(partial.release)

    async def mount_blob(
        self, name: RepositoryName, digest: Digest, *, source: RepositoryName | None = None
    ) -> Descriptor | None:
        _ = source
        try:
            return await self.stat_blob(name, digest)
        except BlobUnknown:
            return None

    async def put_manifest(
        self,
        name: RepositoryName,
        content: bytes,
        media_type: str,
        *,
        expect: Digest | None = None,
        tags: tuple[Tag, ...] = (),
    ) -> Descriptor:
        digest = Digest.of(content, expect.algorithm if expect is not None else "sha256")
        if expect is not None and digest != expect:
            raise DigestInvalid(f"the manifest hashes to {digest}, not to {expect}")
        if len(content) > MANIFEST_SIZE_MAX:
            raise ManifestTooLarge(f"a manifest of {len(content)} bytes; at most {MANIFEST_SIZE_MAX}")
        stored = StoredManifest(content, media_type, digest)
        await self._run(bind(self._put_manifest, name, stored, tags))
        return stored.descriptor

    # ---- deleting

    async def delete_blob(self, name: RepositoryName, digest: Digest) -> None:
        """Raises: BlobUnknown; Unsupported when a manifest of any repository needs the blob."""
        await self._run(bind(self._delete_blob, name, digest))

    async def delete_manifest(self, name: RepositoryName, reference: Tag | Digest) -> None:
        """By digest, what no other manifest needs goes from the disk too."""
        await self._run(bind(self._delete_manifest, name, reference))

    # ---- listing

    async def repositories(self, *, after: str = "") -> AsyncIterator[RepositoryName]:
        prefix = f"{self.host}/"
        entries = await self._run(self.layout.entries)
        names = {
            entry.repository.removeprefix(prefix) for entry in entries if entry.repository.startswith(prefix)
        }
        for name in sorted(names):
            if name > after:
                yield RepositoryName(name)

    async def tags(self, name: RepositoryName, *, after: str = "") -> AsyncIterator[Tag]:
        entries = await self._run(bind(self._entries_of, name))
        for tag in sorted(entry.tag for entry in entries if entry.tag is not None):
            if tag > after:
                yield tag

    async def manifests(self, name: RepositoryName) -> AsyncIterator[tuple[Descriptor, tuple[Tag, ...]]]:
        """Every manifest of a repository with its tags, the untagged ones too.

        Raises:
            NameUnknown: no such repository.
        """
        tags: dict[Digest, list[Tag]] = {}
        descriptors: dict[Digest, Descriptor] = {}
        for entry in await self._run(bind(self._entries_of, name)):
            descriptors[entry.digest] = Descriptor(entry.media_type, entry.digest, entry.size)
            tags.setdefault(entry.digest, []).extend([entry.tag] if entry.tag is not None else [])
        for digest, descriptor in descriptors.items():
            yield descriptor, tuple(sorted(tags[digest]))

    async def referrers(
        self, name: RepositoryName, subject: Digest, *, artifact_type: str | None = None
    ) -> AsyncIterator[Descriptor]:
        for descriptor in await self._run(bind(self._referrers, name, subject)):
            if artifact_type is None or descriptor.artifact_type == artifact_type:
                yield descriptor

    # ---- what runs in threads

    async def _run(self, work: Callable[[], _T]) -> _T:
        assert self._pool is not None, "use it as an async context manager"
        working = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            # A thread cannot be stopped: whoever is cancelled leaves when nothing of his is being done any more.
            await asyncio.wait([working])
            raise
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreUnusable(f"the local store {self.layout.root}: {error.strerror or error}") from error

    def _repository(self, name: RepositoryName) -> str:
        return f"{self.host}/{name}"

    def _entries_of(self, name: RepositoryName) -> list[Entry]:
        repository = self._repository(name)
        entries = [entry for entry in self.layout.entries() if entry.repository == repository]
        if not entries:
            raise NameUnknown(f"the local store has no {repository}")
        return entries

    def _get_manifest(self, name: RepositoryName, reference: Tag | Digest) -> StoredManifest:
        by_digest = isinstance(reference, Digest)
        entries = self._entries_of(name)
        for entry in entries:
            if (entry.digest if by_digest else entry.tag) == reference:
                return self._read_manifest(entry.digest, entry.media_type)
        if isinstance(reference, Digest):
            # Other tools list an index only, and not what it lists.
            for child, media_type in self._reachable(entries).items():
                if child == reference and media_type in MANIFEST_TYPES:
                    return self._read_manifest(child, media_type)
        raise ManifestUnknown(
            f"the local store has no {self._repository(name)}{'@' if by_digest else ':'}{reference}"
        )

    def _read_manifest(self, digest: Digest, media_type: str) -> StoredManifest:
        path = self.layout.blob_path(digest)
        try:
            with path.open("rb") as file:
                content = file.read(MANIFEST_SIZE_MAX + 1)
        except FileNotFoundError as error:
            raise ManifestUnknown(f"{path} is listed by index.json and missing; pull it again") from error
        if Digest.of(content, digest.algorithm) != digest:
            raise StoreUnusable(
                f"{path} is damaged: it does not hash to its name; remove it and pull it again"
            )
        return StoredManifest(content, media_type, digest)

    def _put_manifest(self, name: RepositoryName, stored: StoredManifest, tags: tuple[Tag, ...]) -> None:
        manifest = parse_manifest(stored.content, stored.media_type)
        with self.layout.change() as change:
            # Under the lock: what another process removes, it removes under the lock too.
            for where, reference in manifest.references():
                size = self.layout.blob_size(reference.digest)
                if size is None:
                    raise ManifestBlobUnknown(
                        f"{where} names {reference.digest}, which is not in the local store",
                        detail={"digest": reference.digest},
                    )
                if size != reference.size:
                    raise ManifestInvalid(
                        f"{where} gives {reference.digest} a size of {reference.size} bytes; it has {size}"
                    )
            if self.layout.blob_size(stored.digest) is None:
                self.layout.write_file(self.layout.blob_path(stored.digest), stored.content, mode=0o444)
            _point(change.entries, self._repository(name), stored.descriptor, tags)

    def _delete_manifest(self, name: RepositoryName, reference: Tag | Digest) -> None:
        repository = self._repository(name)
        with self.layout.change() as change:
            mine = [entry for entry in change.entries if entry.repository == repository]
            if isinstance(reference, Digest):
                gone = [entry for entry in mine if entry.digest == reference]
            else:
                gone = [entry for entry in mine if entry.tag == reference]
            if not gone:
                raise ManifestUnknown(f"the local store has no manifest {reference} in {repository}")
            for entry in gone:
                change.entries.remove(entry)
            if isinstance(reference, Digest):
                self._drop_unneeded(change, gone)
            else:
                _keep_untagged(change.entries, gone[0])

    def _drop_unneeded(self, change: Change, gone: list[Entry]) -> None:
        """Blobs that only `gone` needed, and old ones that a crash left without a manifest."""
        needed = self._reachable(change.entries)
        change.drop.update(self._reachable(gone), self.layout.blobs(older_than_s=INGEST_KEPT_S))
        change.drop.difference_update(needed)

    def _delete_blob(self, name: RepositoryName, digest: Digest) -> None:
        with self.layout.change() as change:
            if self.layout.blob_size(digest) is None:
                raise _blob_unknown(name, digest)
            if digest in self._reachable(change.entries):
                raise Unsupported(
                    f"a manifest in the local store needs {digest}; delete the manifest instead"
                )
            change.drop.add(digest)

    def _referrers(self, name: RepositoryName, subject: Digest) -> list[Descriptor]:
        try:
            entries = self._entries_of(name)
        except NameUnknown:
            return []
        found: dict[Digest, Descriptor] = {}
        for entry in entries:
            stored = self._read_manifest(entry.digest, entry.media_type)
            manifest = parse_manifest(stored.content, stored.media_type)
            if manifest.subject is not None and manifest.subject.digest == subject:
                found[entry.digest] = Descriptor(
                    media_type=entry.media_type,
                    digest=entry.digest,
                    size=len(stored.content),
                    artifact_type=manifest.referrer_artifact_type,
                    annotations=manifest.annotations,
                )
        return list(found.values())

    def _reachable(self, entries: Iterable[Entry]) -> dict[Digest, str]:
        """Digest and media type of everything that the manifests of `entries` need, themselves included."""
        reached: dict[Digest, str] = {}
        pending = [(entry.digest, entry.media_type) for entry in entries]
        while pending:
            digest, media_type = pending.pop()
            if digest in reached:
                continue
            reached[digest] = media_type
            if media_type in MANIFEST_TYPES and self.layout.blob_size(digest) is not None:
                stored = self._read_manifest(digest, media_type)
                manifest = parse_manifest(stored.content, media_type)
                pending += [(child.digest, child.media_type) for _, child in manifest.references()]
        return reached

    # ---- bytes on their way in

    async def _claim(self, partial: Partial, blob: Descriptor) -> bool | None:
        """Become the blob's one writer. None: it is here already; else whether an earlier try left something."""
        while await self._run(bind(self.layout.blob_size, blob.digest)) is None:
            try:
                await self._run(bind(partial.claim, create=True))
            except UploadOutOfOrder:
                await asyncio.sleep(_CLAIM_POLL_S)
                continue
            if await self._run(bind(self.layout.blob_size, blob.digest)) is not None:
                await self._run(partial.discard)
                break
            if partial.offset > blob.size:
                await self._run(partial.restart)
            return partial.offset > 0
        return None

    async def _fill(
        self, partial: Partial, blob: Descriptor, read: BlobSource, progress: BlobProgress
    ) -> None:
        progress.advance(partial.offset)
        if partial.offset < blob.size:
            async with read(partial.offset) as chunks:
                await self._write(partial, count(chunks, progress, at_most=blob.size - partial.offset))
        await self._run(bind(partial.commit, blob.digest))

    async def _write(self, partial: Partial, chunks: AsyncIterable[bytes]) -> None:
        """Write and hash in a thread while the next bytes arrive; what arrived is kept, however `chunks` ends."""
        loop = asyncio.get_running_loop()
        batch: list[bytes] = []
        size = 0
        writing: asyncio.Future[None] = loop.create_future()
        writing.set_result(None)
        try:
            async for chunk in chunks:
                batch.append(chunk)
                size += len(chunk)
                if size >= _BATCH_SIZE:
                    full, batch, size = batch, [], 0
                    await writing
                    writing = asyncio.ensure_future(self._run(bind(partial.write, full)))
        finally:
            await writing
            await self._run(bind(partial.write, batch))


class LayoutUpload:
    """A blob on its way into the layout whose digest its writer will say at the end."""

    def __init__(self, registry: LayoutRegistry, partial: Partial) -> None:
        self._registry = registry
        self._partial = partial
        self._busy = False

    @property
    def location(self) -> str:
        return self._partial.identity

    @property
    def offset(self) -> int:
        return self._partial.offset

    async def look(self) -> Self:
        """Learn the offset of an upload that another life of it began."""
        async with self._claimed():
            return self

    async def append(self, chunks: AsyncIterable[bytes], *, at: int | None = None) -> int:
        async with self._claimed():
            if at is not None and at != self.offset:
                raise UploadOutOfOrder(f"the upload ends at {self.offset}, not at {at}", offset=self.offset)
            await self._registry._write(self._partial, chunks)
        return self.offset

    async def append_made(self, pieces: Iterable[bytes], advance: Callable[[int], None]) -> int:
        """Add bytes that are made in the thread that writes them; the new offset.

        Args:
            pieces: not asked for more once the task is cancelled.
            advance: told in the event loop of every piece's size.
        """
        loop = asyncio.get_running_loop()
        is_stopped = threading.Event()

        def watched() -> Iterator[bytes]:
            for piece in pieces:
                if is_stopped.is_set():
                    return
                yield piece
                loop.call_soon_threadsafe(advance, len(piece))

        async with self._claimed():
            writing = asyncio.ensure_future(self._registry._run(bind(self._partial.write, watched())))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                is_stopped.set()
                await asyncio.wait([writing])
                raise
        return self.offset

    async def digest(self) -> Digest:
        """The sha256 digest of what has been appended; it was hashed on its way in."""
        return self._partial.digest()

    async def commit(self, digest: Digest) -> Descriptor:
        async with self._claimed():
            size = await self._registry._run(bind(self._partial.commit, digest))
        return Descriptor("application/octet-stream", digest, size)

    async def cancel(self) -> None:
        try:
            async with self._claimed():
                await self._registry._run(self._partial.discard)
        except BlobUploadUnknown:
            pass

    @asynccontextmanager
    async def _claimed(self) -> AsyncIterator[None]:
        if self._busy:
            raise UploadOutOfOrder("the upload is being written to", offset=self.offset)
        self._busy = True
        try:
            await self._registry._run(bind(self._partial.claim, create=False))
            yield
        finally:
            try:
                # Also after a claim that was cancelled: its thread may have had it.
                await self._registry._run(self._partial.release)
            finally:
                self._busy = False


class _FileBody:
    """A span of an open file; the next piece is read while the last one is being used."""

    def __init__(self, registry: LayoutRegistry, path: Path) -> None:
        self.span = ByteSpan(0, 0)
        self._registry = registry
        self._path = path
        self._file = -1
        self._reading: asyncio.Future[bytes] | None = None

    @property
    def size(self) -> int:
        return self.span.size

    def open(self) -> int:
        """Open the file; its size. Called in a thread: what it opens is kept here, though its caller be cancelled."""
        self._file = os.open(self._path, os.O_RDONLY)
        self.span = ByteSpan(0, os.fstat(self._file).st_size)
        return self.span.stop

    async def __aiter__(self) -> AsyncIterator[bytes]:
        position, stop = self.span.start, self.span.stop
        self._read(position)
        while position < stop:
            assert self._reading is not None
            piece = await self._reading
            if not piece:
                raise StoreUnusable("a blob of the local store was cut short while it was being read")
            position += len(piece)
            self._read(position)
            yield piece

    async def close(self) -> None:
        """Close the file, also when cancelled meanwhile."""
        await finished(self._close())

    async def _close(self) -> None:
        # Nobody may still be reading when the file's number goes to another file.
        if self._reading is not None:
            await asyncio.wait([self._reading])
        if self._file >= 0:
            await self._registry._run(bind(os.close, self._file))

    def _read(self, position: int) -> None:
        size = min(_BATCH_SIZE, self.span.stop - position)
        if size > 0:
            self._reading = asyncio.ensure_future(
                self._registry._run(bind(os.pread, self._file, size, position))
            )


def _point(entries: list[Entry], repository: str, manifest: Descriptor, tags: tuple[Tag, ...]) -> None:
    """List the manifest, and let the tags name it and nothing else."""
    moved = [entry for entry in entries if entry.repository == repository and entry.tag in tags]
    for entry in moved:
        entries.remove(entry)
    entries.extend(
        manifest_entry(repository, tag, manifest.digest, manifest.size, manifest.media_type)
        for tag in dict.fromkeys(tags)
    )
    for entry in moved:
        _keep_untagged(entries, entry)
    _keep_untagged(
        entries, manifest_entry(repository, None, manifest.digest, manifest.size, manifest.media_type)
    )
    listed = {entry.digest for entry in entries if entry.repository == repository and entry.tag is not None}
    entries[:] = [
        entry
        for entry in entries
        if entry.repository != repository or entry.tag is not None or entry.digest not in listed
    ]


def _keep_untagged(entries: list[Entry], entry: Entry) -> None:
    """A manifest that lost its last tag stays in its repository."""
    if not any(other.repository == entry.repository and other.digest == entry.digest for other in entries):
        entries.append(manifest_entry(entry.repository, None, entry.digest, entry.size, entry.media_type))


def _blob_unknown(name: RepositoryName, digest: Digest) -> BlobUnknown:
    return BlobUnknown(f"the local store has no blob {digest}, wanted for {name}")


_: type[OciRegistry] = LayoutRegistry
