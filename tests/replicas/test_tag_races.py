"""A manifest is deleted while its tags are read and set: the orders of single steps that test_tags.py met by chance, on purpose.

Replicas share nothing but the store, so one registry over a store that stops at a step stands for two of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from kitspec.digest import Digest
from kitspec.errors import ManifestUnknown
from kitspec.names import RepositoryName, Tag
from registry import layout
from registry.hosted import HostedRegistry
from registry.upload_sessions import UploadSessions
from storage_backends.interface import ObjectInfo
from storage_backends.memory import MemoryBackend

NAME = RepositoryName("team/llm")
V1, V2 = Tag("v1"), Tag("v2")
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"

Step = Callable[[], Awaitable[Any]]


class Stopping(MemoryBackend):
    """Does something else first, once, before a step at a key."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[tuple[str, str], Step] = {}

    def before(self, method: str, key: str, step: Step) -> None:
        self._before[method, key] = step

    async def _stop(self, method: str, key: str) -> None:
        step = self._before.pop((method, key), None)
        if step is not None:
            await step()

    async def stat(self, key: str) -> ObjectInfo:
        await self._stop("read", key)
        return await super().stat(key)

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        await self._stop("read", key)
        return await super().read(key, size_max=size_max)

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        await self._stop("write", key)
        return await super().write(key, content, expect=expect)

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        await self._stop("delete", key)
        await super().delete(key, expect=expect)


@pytest.fixture
async def store() -> AsyncIterator[Stopping]:
    store = Stopping()
    await store.start()
    yield store
    await store.close()


@pytest.fixture
def registry(store: Stopping) -> HostedRegistry:
    sessions = UploadSessions(store, count_max=10, per_repository_max=10, size_max=None)
    return HostedRegistry(store, sessions, allow_sparse=True)


def manifest_of(number: int) -> bytes:
    blob = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": Digest.of(b"{}"), "size": 2}
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": "application/vnd.example.tags",
        "config": blob,
        "layers": [blob],
        "annotations": {"number": str(number)},
    }
    return json.dumps(document).encode()


OLD, NEW = manifest_of(1), manifest_of(2)


async def push(registry: HostedRegistry, content: bytes, *tags: Tag) -> Digest:
    return (await registry.put_manifest(NAME, content, MANIFEST_TYPE, tags=tags)).digest


async def test_a_tag_that_moves_while_its_old_manifest_is_deleted_is_never_absent(
    registry: HostedRegistry, store: Stopping
) -> None:
    old = await push(registry, OLD, V1)

    async def move_and_delete() -> None:
        await push(registry, NEW, V1)
        await registry.delete_manifest(NAME, old)

    store.before("read", layout.manifest_key(NAME, old), move_and_delete)

    assert (await registry.get_manifest(NAME, V1)).content == NEW


async def test_a_push_that_is_acknowledged_after_its_manifest_was_deleted_is_there(
    registry: HostedRegistry, store: Stopping
) -> None:
    old = await push(registry, OLD, V1)

    async def delete() -> None:
        await registry.delete_manifest(NAME, old)

    store.before("write", layout.tag_key(NAME, V2), delete)
    await push(registry, OLD, V2)

    assert (await registry.get_manifest(NAME, V2)).content == OLD


async def test_a_tag_that_went_with_its_manifest_does_not_come_back_with_it(
    registry: HostedRegistry, store: Stopping
) -> None:
    """The push ends between the look of the delete at the tags and its end: either may have been first, but then it stays so."""
    old = await push(registry, OLD, V2)
    is_at_manifest, is_pushed = asyncio.Event(), asyncio.Event()
    deleting: list[asyncio.Task[None]] = []

    async def begin_to_delete() -> None:
        deleting.append(asyncio.create_task(registry.delete_manifest(NAME, old)))
        await is_at_manifest.wait()

    async def wait_for_the_push() -> None:
        is_at_manifest.set()
        await is_pushed.wait()

    store.before("write", layout.tag_key(NAME, V1), begin_to_delete)
    store.before("delete", layout.manifest_key(NAME, old), wait_for_the_push)
    await push(registry, OLD, V1)
    is_pushed.set()
    await deleting[0]
    was_there = await is_there(registry, V1)

    await push(registry, OLD, V2)

    assert await is_there(registry, V1) == was_there


async def is_there(registry: HostedRegistry, tag: Tag) -> bool:
    try:
        await registry.get_manifest(NAME, tag)
    except ManifestUnknown:
        return False
    return True
