"""copy: push, pull and everything between two registries, wherever they are.

Blobs first, those that are there already left alone; then manifests from the leaves up; the tags last: at no moment
does the target list what it does not hold. What is on its way may be interrupted and goes on at the next copy, on both
sides, where the target can (`put_blob` of RemoteRegistry and of LayoutRegistry).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from kitclient.blob_stream import BlobSource, count
from kitclient.errors import ServerMisbehaved
from kitclient.progress import BlobProgress, Outcome, Progress, Silence
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import BlobUnknown, ManifestBlobUnknown, SizeInvalid
from kitspec.http_fields import ByteSpan
from kitspec.interface import OciRegistry, RegistryReader, StoredManifest
from kitspec.manifest import Manifest, parse_manifest
from kitspec.media_types import MANIFEST_TYPES
from kitspec.names import RepositoryName, Tag

# What a hostile registry may make us do: reference/limits of docs/threat-model.md.
DEPTH_MAX = 32
MANIFEST_COUNT_MAX = 10_000
BLOB_COUNT_MAX = 10_000


@runtime_checkable
class TakesBlobs(Protocol):
    """A target that stores blobs of known digest by itself, and can go on with what an earlier copy began."""

    async def put_blob(
        self, name: RepositoryName, blob: Descriptor, read: BlobSource, progress: BlobProgress | None = None
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A repository of a registry."""

    registry: OciRegistry
    name: RepositoryName


@dataclass(slots=True)
class _Plan:
    """What a manifest needs. Manifests with children before their parents."""

    manifests: list[StoredManifest] = field(default_factory=list)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)


async def copy(
    source: Place,
    reference: Tag | Digest,
    target: Place,
    *,
    tags: tuple[Tag, ...] = (),
    concurrency: int = 5,
    progress: Progress | None = None,
) -> Descriptor:
    """Copy a manifest and all that it lists; the descriptor of what was copied.

    Args:
        reference: what to copy. An index is copied with everything below it.
        tags: what the copy is to be called, in the order in which they are set; none leaves it untagged.
        concurrency: blobs under way at once.

    Raises:
        OciError, ClientError: the first that cannot be overcome; what is half there is gone on with by the next copy.
    """
    plan = await _plan(source, reference)
    for last_round in (False, False, True):
        await _copy_blobs(source, target, plan, concurrency, progress or Silence())
        try:
            for manifest in plan.manifests[:-1]:
                await target.registry.put_manifest(
                    target.name, manifest.content, manifest.media_type, expect=manifest.digest
                )
            top = plan.manifests[-1]
            return await target.registry.put_manifest(
                target.name, top.content, top.media_type, expect=top.digest, tags=tags
            )
        except ManifestBlobUnknown:
            if last_round:
                raise
    raise AssertionError


async def _plan(source: Place, reference: Tag | Digest) -> _Plan:
    plan, visited = _Plan(), set[Digest]()

    async def visit(stored: StoredManifest, depth: int) -> None:
        visited.add(stored.digest)
        if depth > DEPTH_MAX or len(visited) > MANIFEST_COUNT_MAX:
            raise ServerMisbehaved(
                f"more than {DEPTH_MAX} levels or {MANIFEST_COUNT_MAX} manifests below {reference}"
            )
        manifest = parse_manifest(stored.content, stored.media_type)
        for _, child in manifest.references():
            # Some indexes list blobs (BuildKit's cache): a manifest is what its type says is one.
            if isinstance(manifest, Manifest) or child.media_type not in MANIFEST_TYPES:
                plan.blobs[child.digest] = child
            elif child.digest not in visited:
                await visit(await _child(source, child), depth + 1)
        if len(plan.blobs) > BLOB_COUNT_MAX:
            raise ServerMisbehaved(f"{reference} lists more than {BLOB_COUNT_MAX} blobs")
        plan.manifests.append(stored)

    await visit(await source.registry.get_manifest(source.name, reference), 0)
    return plan


async def _child(source: Place, child: Descriptor) -> StoredManifest:
    stored = await source.registry.get_manifest(source.name, child.digest)
    if len(stored.content) != child.size:
        raise SizeInvalid(f"{child.digest} has {len(stored.content)} bytes, and its index says {child.size}")
    return StoredManifest(stored.content, child.media_type, stored.digest)


async def _copy_blobs(
    source: Place, target: Place, plan: _Plan, concurrency: int, progress: Progress
) -> None:
    turns = asyncio.Semaphore(concurrency)

    async def copy_one(blob: Descriptor) -> None:
        async with turns:
            await copy_blob(source, blob, target, progress)

    try:
        async with asyncio.TaskGroup() as group:
            # Large ones first: the last to end should not be the last to begin.
            for blob in sorted(plan.blobs.values(), key=lambda blob: -blob.size):
                group.create_task(copy_one(blob))
    except BaseExceptionGroup as errors:
        # One cause is enough for a user, and the first is what stopped the others.
        raise errors.exceptions[0] from None


async def copy_blob(source: Place, blob: Descriptor, target: Place, progress: Progress) -> None:
    """One blob, unless it is there; by mount where both places are in one registry."""
    bar = progress.begin(blob)
    outcome: Outcome = "failed"
    try:
        try:
            there = await target.registry.stat_blob(target.name, blob.digest)
        except BlobUnknown:
            outcome = await _transfer(source, blob, target, bar)
        else:
            if there.size != blob.size:
                raise SizeInvalid(
                    f"{blob.digest} has {there.size} bytes at the target, and {blob.size} in its manifest"
                )
            bar.advance(blob.size)
            outcome = "exists"
    finally:
        bar.end(outcome)


async def _transfer(source: Place, blob: Descriptor, target: Place, bar: BlobProgress) -> Outcome:
    same_registry = source.registry is target.registry or (
        getattr(source.registry, "host", "") == getattr(target.registry, "host", None)
        and type(source.registry) is type(target.registry)
    )
    if (
        same_registry
        and await target.registry.mount_blob(target.name, blob.digest, source=source.name) is not None
    ):
        bar.advance(blob.size)
        return "mounted"
    read = source_of(source.registry, source.name, blob)
    if isinstance(target.registry, TakesBlobs):
        await target.registry.put_blob(target.name, blob, read, bar)
    else:
        upload = await target.registry.begin_upload(target.name)
        async with read(0) as chunks:
            await upload.append(count(chunks, bar, at_most=blob.size))
        await upload.commit(blob.digest)
    return "done"


def source_of(registry: RegistryReader, name: RepositoryName, blob: Descriptor) -> BlobSource:
    """How to read a blob from any offset, its size checked."""

    @asynccontextmanager
    async def read(offset: int) -> AsyncIterator[AsyncIterable[bytes]]:
        span = ByteSpan(offset, blob.size) if offset else None
        async with registry.open_blob(name, blob.digest, span) as body:
            if body.size != blob.size - offset:
                raise SizeInvalid(
                    f"{blob.digest} has {body.size + offset} bytes at its source, and {blob.size} in its manifest"
                )
            yield body

    return read
