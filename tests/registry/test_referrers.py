"""Deleting what refers: also while it is pushed again, where a manifest is, the list of its subject has it."""

from __future__ import annotations

import asyncio
import json

import pytest

from kitspec.digest import Digest
from kitspec.errors import ManifestUnknown
from kitspec.media_types import OCI_MANIFEST
from kitspec.names import Tag
from registry import layout
from registry.freshness import Freshness
from registry.hosted import HostedRegistry
from registry.upload_sessions import UploadSessions
from storage_backends.interface import StorageBackend
from storage_backends.memory import MemoryBackend
from tests.contracts.registry_contract import REPOSITORY, manifest_of, push_blob, referrers_of
from tests.registry.test_garbage import Watched

SUBJECT = Digest.of(b"what is signed")


class Stop:
    """Stands before call number `at`, until it is let go."""

    def __init__(self, at: int) -> None:
        self._left = at
        self.is_reached = asyncio.Event()
        self.go = asyncio.Event()

    async def __call__(self, _: str) -> None:
        self._left -= 1
        if self._left == -1:
            self.is_reached.set()
            await self.go.wait()


def registry_on(backend: StorageBackend) -> HostedRegistry:
    sessions = UploadSessions(backend, count_max=10, per_repository_max=10, size_max=None)
    return HostedRegistry(backend, sessions, freshness=Freshness(backend, grace_s=1000.0))


async def _reached_or_done(stop: Stop, work: asyncio.Task[object]) -> bool:
    """Whether the work stands at its stop; else it is done."""
    reaching = asyncio.create_task(stop.is_reached.wait())
    await asyncio.wait({reaching, work}, return_when=asyncio.FIRST_COMPLETED)
    reaching.cancel()
    return not work.done()


async def _race(push_stops_at: int, delete_stops_at: int, tags: tuple[Tag, ...]) -> tuple[bool, bool]:
    """Push up to a call, delete up to a call, push to the end, delete to the end; whether each of them was stopped."""
    store = MemoryBackend()
    plain = registry_on(store)
    config = await push_blob(plain, b"{}")
    subject = {"mediaType": OCI_MANIFEST, "digest": SUBJECT, "size": 14}
    manifest = manifest_of(config, subject=subject)
    digest = (await plain.put_manifest(REPOSITORY, manifest, OCI_MANIFEST)).digest

    at_push, at_delete = Stop(push_stops_at), Stop(delete_stops_at)
    pusher = registry_on(Watched(store, at_push))
    deleter = registry_on(Watched(store, at_delete))
    pushing = asyncio.create_task(pusher.put_manifest(REPOSITORY, manifest, OCI_MANIFEST, tags=tags))
    push_stood = await _reached_or_done(at_push, pushing)
    deleting = asyncio.create_task(deleter.delete_manifest(REPOSITORY, digest))
    delete_stood = await _reached_or_done(at_delete, deleting)
    at_push.go.set()
    await pushing
    at_delete.go.set()
    await deleting

    try:
        await plain.get_manifest(REPOSITORY, digest)
    except ManifestUnknown:
        assert await referrers_of(plain, SUBJECT) == []
    else:
        found = [one.digest for one in await referrers_of(plain, SUBJECT)]
        assert found == [digest], f"push stood at call {push_stops_at}, delete at call {delete_stops_at}"
    await store.close()
    return push_stood, delete_stood


@pytest.mark.parametrize("tags", [(), (Tag("v1"),)], ids=["by digest", "by tag"])
async def test_a_push_and_a_delete_at_any_moment_of_each_other_lose_no_entry(tags: tuple[Tag, ...]) -> None:
    push_stops_at, delete_stops_at, push_stood = 0, 0, True
    while push_stood:
        delete_stops_at, delete_stood = 0, True
        while delete_stood:
            push_stood, delete_stood = await _race(push_stops_at, delete_stops_at, tags)
            delete_stops_at += 1
        push_stops_at += 1
    assert push_stops_at > 5
    assert delete_stops_at > 5


async def test_a_manifest_that_is_not_understood_any_more_can_be_deleted() -> None:
    store = MemoryBackend()
    registry = registry_on(store)
    await push_blob(registry, b"{}")
    digest = Digest.of(b"of another time")
    head = {"mediaType": OCI_MANIFEST, "digest": digest, "depth": 0}
    record = json.dumps(head).encode() + b"\nof another time"
    await store.write(layout.manifest_key(REPOSITORY, digest), record)

    await registry.delete_manifest(REPOSITORY, digest)

    with pytest.raises(ManifestUnknown):
        await registry.get_manifest(REPOSITORY, digest)
