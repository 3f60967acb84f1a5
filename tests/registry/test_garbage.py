"""Collection: what goes, what stays, and that nothing that somebody was told of goes, whoever does what meanwhile.

The rows G-01 to G-12 are those of our threat model's table of races.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import BlobUnknown, ManifestBlobUnknown, OciError, Unavailable
from kitspec.media_types import OCI_INDEX, OCI_MANIFEST
from kitspec.names import RepositoryName, Tag
from registry import layout, lease
from registry.derived import Derived, DerivedRecords
from registry.freshness import Freshness
from registry.garbage import Collected, CollectionBusy, CollectionObserver, Collector, Lease
from registry.hosted import HostedRegistry
from registry.journal import Journal
from registry.upload_sessions import UploadSessions
from storage_backends.interface import ObjectMissing, StorageBackend, StorageUnavailable
from storage_backends.local import LocalBackend
from tests.contracts.registry_contract import (
    REPOSITORY,
    chunks_of,
    index_of,
    manifest_of,
    push_blob,
    read_blob,
)

GRACE_S = 100.0
OTHER = RepositoryName("other/repository")


class Watched:
    """A backend that tells of every call before it is made."""

    def __init__(self, inner: StorageBackend, before: Callable[[str], Awaitable[None]]) -> None:
        self._inner = inner
        self._before = before
        self.now = inner.now

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)

        async def watched(*args: Any, **options: Any) -> Any:
            await self._before(name)
            return await call(*args, **options)

        return watched

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Any]:
        await self._before("list")
        async for info in self._inner.list(prefix, after=after):
            yield info
            await self._before("listed")

    async def uploads(self) -> AsyncIterator[Any]:
        await self._before("uploads")
        async for upload in self._inner.uploads():
            yield upload

    async def sweep(self, *, age_s: float, dry_run: bool = False) -> AsyncIterator[Any]:
        await self._before("sweep")
        async for left in self._inner.sweep(age_s=age_s, dry_run=dry_run):
            yield left


class Site:
    """A registry on a folder, whose records can be made older than they are."""

    def __init__(self, root: Path, backend: LocalBackend) -> None:
        self.root = root
        self.backend = backend
        self.registry = self.registry_on(backend)

    def registry_on(self, backend: StorageBackend, *, grace_s: float = GRACE_S) -> HostedRegistry:
        sessions = UploadSessions(backend, count_max=100, per_repository_max=100, size_max=None)
        return HostedRegistry(
            backend, sessions, freshness=Freshness(backend, grace_s=grace_s), journal=Journal(backend)
        )

    def collector(
        self,
        backend: StorageBackend | None = None,
        observer: CollectionObserver | None = None,
        **changed: float,
    ) -> Collector:
        backend = backend or self.backend
        times = {"grace_s": GRACE_S, "upload_age_s": 1000.0, "journal_keep_s": 1e6, **changed}
        sessions = UploadSessions(backend, count_max=100, per_repository_max=100, size_max=None)
        return Collector(backend, sessions, Journal(backend), observer=observer, **times)

    async def collect(self, backend: StorageBackend | None = None, **changed: float) -> Collected:
        return await self.collector(backend, **changed).run()

    async def grow_old(self, seconds: float = 10 * GRACE_S) -> None:
        await asyncio.to_thread(self._grow_old, seconds)

    def _grow_old(self, seconds: float) -> None:
        for path in self.root.rglob("*"):
            if path.is_file() and "locks" not in path.parts:
                at = time.time() - seconds
                os.utime(path, (at, at))

    def stored(self) -> list[str]:
        """Of everything but the journal and the backend's own."""
        keys = [path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()]
        return sorted(key for key in keys if not key.startswith(("_store/", "journal/", "maintenance/")))

    def digest(self) -> str:
        """Of the whole tree: names, times and bytes."""
        whole = hashlib.sha256()
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and "locks" not in path.parts:
                whole.update(f"{path} {path.stat().st_mtime_ns} ".encode() + path.read_bytes())
        return whole.hexdigest()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    backend = LocalBackend(tmp_path / "registry", durable=False)
    await backend.start()
    yield Site(tmp_path / "registry", backend)
    await backend.close()


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "_CLOCK_DOUBT_S", 0.0)


async def push_kit(registry: HostedRegistry, *, name: RepositoryName = REPOSITORY) -> Digest:
    config = await push_blob(registry, b"{}", name)
    layer = await push_blob(registry, b"the layer", name)
    return (await put_v1(registry, config, layer, name=name)).digest


async def put_v1(
    registry: HostedRegistry, *blobs: Descriptor, name: RepositoryName = REPOSITORY
) -> Descriptor:
    return await registry.put_manifest(name, manifest_of(*blobs), OCI_MANIFEST, tags=(Tag("v1"),))


LAYER = Digest.of(b"the layer")


async def assert_whole(registry: HostedRegistry, name: RepositoryName = REPOSITORY) -> None:
    """The kit under v1 and everything that it lists are here."""
    await registry.get_manifest(name, Tag("v1"))
    assert await read_blob(registry, Digest.of(b"{}"), name=name) == b"{}"
    assert await read_blob(registry, LAYER, name=name) == b"the layer"


class TestWhatGoes:
    async def test_a_blob_that_no_manifest_lists_goes_when_it_is_old(self, site: Site) -> None:
        await push_blob(site.registry, b"orphan")
        await site.grow_old()
        collected = await site.collect()
        assert collected.removed["links"] == collected.removed["content"] == 1
        assert collected.size == len(b"orphan")
        assert site.stored() == ["catalog/" + REPOSITORY + "!"]

    async def test_and_stays_while_it_is_young(self, site: Site) -> None:
        blob = await push_blob(site.registry, b"orphan")
        await site.grow_old(GRACE_S / 2)
        assert not (await site.collect()).removed.get("content")
        assert await read_blob(site.registry, blob.digest) == b"orphan"

    async def test_what_a_manifest_lists_stays_however_old(self, site: Site) -> None:
        await push_kit(site.registry)
        await site.grow_old(1e7)
        await site.collect()
        await assert_whole(site.registry)

    async def test_without_its_manifest_everything_goes(self, site: Site) -> None:
        digest = await push_kit(site.registry)
        await site.registry.delete_manifest(REPOSITORY, digest)
        await site.grow_old()
        await site.collect()
        assert site.stored() == ["catalog/" + REPOSITORY + "!"]

    async def test_content_stays_as_long_as_one_repository_needs_it(self, site: Site) -> None:
        digest = await push_kit(site.registry)
        await push_kit(site.registry, name=OTHER)
        await site.registry.delete_manifest(REPOSITORY, digest)
        await site.grow_old()
        collected = await site.collect()
        assert collected.removed["links"] == 2
        assert not collected.removed.get("content")
        await assert_whole(site.registry, OTHER)
        with pytest.raises(BlobUnknown):
            await site.registry.stat_blob(REPOSITORY, LAYER)

    async def test_what_the_children_of_an_index_list_stays(self, site: Site) -> None:
        digest = await push_kit(site.registry)
        child = (await site.registry.get_manifest(REPOSITORY, digest)).descriptor
        await site.registry.put_manifest(REPOSITORY, index_of(child), OCI_INDEX, tags=(Tag("all"),))
        await site.registry.delete_manifest(REPOSITORY, Tag("v1"))
        await site.grow_old()
        assert not (await site.collect()).removed.get("content")
        assert await read_blob(site.registry, LAYER) == b"the layer"

    async def test_entries_of_referrers_without_their_manifest_go(self, site: Site) -> None:
        digest = await push_kit(site.registry)
        subject = (await site.registry.get_manifest(REPOSITORY, digest)).descriptor
        stray = layout.referrer_key(REPOSITORY, subject.digest, Digest.of(b"never pushed"))
        await site.backend.write(stray, b"{}")
        await site.grow_old()
        assert (await site.collect()).removed["referrers"] == 1
        assert stray not in site.stored()

    async def test_what_was_derived_goes_with_its_source(self, site: Site) -> None:
        digest = await push_kit(site.registry)
        records = DerivedRecords(site.backend, Freshness(site.backend, grace_s=GRACE_S))
        view, config = Digest.of(b"view"), Digest.of(b"config")
        await records.put(REPOSITORY, view, Derived(digest, OCI_MANIFEST, b"view"))
        await records.put(REPOSITORY, config, Derived(view, "application/json", b"config"))
        await site.backend.write(layout.pack_key(REPOSITORY, view), b"{}")
        await site.grow_old()
        await site.collect()
        assert await records.get(REPOSITORY, view) is not None
        await site.registry.delete_manifest(REPOSITORY, digest)
        collected = await site.collect()
        assert (collected.removed["views"], collected.removed["packs"]) == (2, 1)

    async def test_tables_of_layers_that_are_gone_go(self, site: Site) -> None:
        blob = await push_blob(site.registry, b"orphan")
        table = f"cache/members/sha256/{blob.digest.encoded[:2]}/{blob.digest.encoded}.tar"
        await site.backend.write(table, b"table")
        await site.grow_old()
        collected = await site.collect()
        assert collected.removed["tables"] == 1
        assert table not in site.stored()

    async def test_abandoned_uploads_are_ended(self, site: Site) -> None:
        upload = await site.registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(b"some"))
        await site.grow_old(2000)
        assert (await site.collect()).removed["uploads"] == 1
        with pytest.raises(OciError):
            await site.registry.resume_upload(REPOSITORY, upload.location)

    async def test_keys_of_others_stay_and_are_counted(self, site: Site) -> None:
        await push_kit(site.registry)
        foreign = [
            "repositories/BAD/_blobs/sha256/x",
            "repositories/team/_blobs/sha256/short",
            "repositories/team/_other/thing",
            "blobs/sha256/ab/not-a-digest",
            "cache/members/sha256/zz/what.tar",
        ]
        for key in foreign:
            await asyncio.to_thread(_plant, site.root / key)
        await site.grow_old()
        collected = await site.collect()
        assert collected.foreign == len(foreign)
        assert set(foreign) <= set(site.stored())


def _plant(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"theirs")


class TestRaces:
    async def test_g01_a_blob_that_was_just_pushed_waits_for_its_manifest(self, site: Site) -> None:
        config = await push_blob(site.registry, b"{}")
        layer = await push_blob(site.registry, b"the layer")
        await site.collect()
        await put_v1(site.registry, config, layer)
        await assert_whole(site.registry)

    async def test_g02_an_old_orphan_that_a_client_was_told_of_stays(self, site: Site) -> None:
        config = await push_blob(site.registry, b"{}")
        layer = await push_blob(site.registry, b"the layer")
        await site.grow_old()
        for blob in (config, layer):
            await site.registry.confirm_blob(REPOSITORY, blob.digest)
        await site.collect()
        await put_v1(site.registry, config, layer)
        await assert_whole(site.registry)

    async def test_g03_an_old_orphan_that_was_mounted_stays(self, site: Site) -> None:
        config = await push_blob(site.registry, b"{}")
        layer = await push_blob(site.registry, b"the layer")
        await site.grow_old()
        for blob in (config, layer):
            assert await site.registry.mount_blob(OTHER, blob.digest, source=REPOSITORY)
        collected = await site.collect()
        assert collected.removed["links"] == 2  # where they were mounted from
        await put_v1(site.registry, config, layer, name=OTHER)
        await assert_whole(site.registry, OTHER)

    async def test_an_old_orphan_that_is_pushed_again_stays(self, site: Site) -> None:
        config = await push_blob(site.registry, b"{}")
        layer = await push_blob(site.registry, b"the layer")
        await site.grow_old()
        await push_blob(site.registry, b"{}")
        await push_blob(site.registry, b"the layer")
        await site.collect()
        await put_v1(site.registry, config, layer)
        await assert_whole(site.registry)

    @pytest.mark.parametrize("how", ["push", "head", "mount", "manifest only"])
    async def test_g04_a_push_at_any_moment_of_a_collection_loses_nothing(self, site: Site, how: str) -> None:
        """The collection stands still before its n-th call while the whole push runs, for every n."""
        point = 0
        while True:
            await push_blob(site.registry, b"{}")
            await push_blob(site.registry, b"the layer")
            await push_blob(site.registry, b"{}", OTHER)
            await push_blob(site.registry, b"the layer", OTHER)
            await site.grow_old()
            was_pushed = await _collect_and_push_at(site, how, point)
            if not was_pushed:
                break
            await site.grow_old()
            await site.collect()
            assert (await site.registry.get_manifest(REPOSITORY, was_pushed)).digest == was_pushed
            await assert_whole(site.registry)
            await site.registry.delete_manifest(REPOSITORY, was_pushed)
            point += 1
        assert point > 15

    async def test_g05_a_collection_that_dies_anywhere_is_taken_up_by_the_next(self, site: Site) -> None:
        point, is_through = 0, False
        while not is_through:
            await push_blob(site.registry, b"orphan")
            await push_kit(site.registry, name=OTHER)
            await site.grow_old()
            countdown = point

            async def die(call: str) -> None:
                nonlocal countdown
                countdown -= 1
                if countdown < 0:
                    raise StorageUnavailable(f"dead before {call}")

            is_through = True
            try:
                await site.collect(Watched(site.backend, die))  # type: ignore[arg-type]
            except StorageUnavailable:
                is_through = False
            await site.grow_old()  # its lease, too
            await site.collect()
            assert [key for key in site.stored() if REPOSITORY in key] == [f"catalog/{REPOSITORY}!"]
            with pytest.raises(BlobUnknown):
                await site.registry.stat_blob(REPOSITORY, Digest.of(b"orphan"))
            assert await read_blob(site.registry, LAYER, name=OTHER) == b"the layer"
            point += 1
        assert point > 15

    async def test_g06_a_manifest_that_cannot_be_read_ends_the_run(self, site: Site) -> None:
        await push_blob(site.registry, b"orphan", RepositoryName("zzz"))
        await push_kit(site.registry)
        await site.grow_old()
        before = site.stored()

        async def fail(call: str) -> None:
            if call == "read":
                raise StorageUnavailable("no answer")

        await Lease(site.backend).finished()
        lease_read = False

        async def fail_late(call: str) -> None:
            nonlocal lease_read
            if call == "read" and not lease_read:
                lease_read = True  # the lease's own
            elif call == "read":
                await fail(call)

        with pytest.raises(StorageUnavailable):
            await site.collect(Watched(site.backend, fail_late))  # type: ignore[arg-type]
        assert site.stored() == before

    @pytest.mark.parametrize(
        "damage",
        [b"no record at all", b'{"mediaType": "application/x", "digest": "sha256:00", "depth": 0}\n{}'],
        ids=["broken", "unknown"],
    )
    async def test_g07_a_manifest_that_nobody_understands_keeps_the_blobs_of_its_repository(
        self, site: Site, damage: bytes
    ) -> None:
        digest = await push_kit(site.registry)
        await push_blob(site.registry, b"orphan", OTHER)
        await site.backend.write(layout.manifest_key(REPOSITORY, digest), damage)
        await site.grow_old()
        collected = await site.collect()
        assert collected.unreadable == 1
        assert await read_blob(site.registry, LAYER) == b"the layer"
        assert collected.removed["content"] == 1  # the other repository's

    async def test_g10_only_one_collects(self, site: Site) -> None:
        holder = await Lease.take(site.backend)
        with pytest.raises(CollectionBusy):
            await site.collect()
        await holder.finish()
        await site.collect()

    async def test_g10_a_dead_holder_is_taken_over_and_learns_of_it(self, site: Site) -> None:
        dead = await Lease.take(site.backend)
        await site.grow_old()
        await site.collect()
        dead._renewed = -1e6
        with pytest.raises(CollectionBusy):
            await dead.renew()

    async def test_g10_a_holder_says_that_it_lives_however_long_a_step_takes(
        self, site: Site, short_lease: None
    ) -> None:
        await push_blob(site.registry, b"orphan")
        await site.grow_old()
        looked: list[bool] = []

        async def look_later(call: str) -> None:
            if call == "sweep":
                await asyncio.sleep(1.5 * lease.LEASE_S)
                with pytest.raises(CollectionBusy):
                    await site.collect()
                looked.append(True)

        collected = await site.collect(Watched(site.backend, look_later))
        assert looked
        assert collected.removed["content"] == 1
        assert await Lease(site.backend).finished() is not None

    async def test_g10_one_that_was_taken_over_stops(self, site: Site, short_lease: None) -> None:
        await push_blob(site.registry, b"orphan")
        await site.grow_old()
        before = site.stored()
        was_stopped = asyncio.Event()

        async def be_taken_over(call: str) -> None:
            if call == "listed":
                await site.backend.write(layout.COLLECTION, b'{"holder": "another", "finished": null}')
                try:
                    await asyncio.sleep(60)
                finally:
                    was_stopped.set()

        async with asyncio.timeout(5):
            with pytest.raises(CollectionBusy):
                await site.collect(Watched(site.backend, be_taken_over))
        assert was_stopped.is_set()
        assert site.stored() == before
        with pytest.raises(CollectionBusy):  # its record is left alone
            await Lease.take(site.backend)

    async def test_g10_one_that_cannot_say_that_it_lives_stops(self, site: Site, short_lease: None) -> None:
        written = 0

        async def stand_still(call: str) -> None:
            nonlocal written
            written += call == "write"
            if call == "write" and written > 1:
                raise StorageUnavailable("no answer")
            if call == "sweep":
                await asyncio.sleep(60)

        async with asyncio.timeout(5):
            with pytest.raises(StorageUnavailable):
                await site.collect(Watched(site.backend, stand_still))

    async def test_g11_a_repository_that_is_pushed_to_keeps_its_blobs(self, site: Site) -> None:
        await push_blob(site.registry, b"the first layer")
        await site.grow_old()
        upload = await site.registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(b"the second layer, which takes long"))
        assert not (await site.collect()).removed.get("links")
        await upload.cancel()
        assert (await site.collect()).removed["links"] == 1

    async def test_g12_a_dry_run_says_the_same_and_changes_nothing(self, site: Site) -> None:
        digest = await push_kit(site.registry)
        await push_blob(site.registry, b"orphan", OTHER)
        await site.registry.delete_manifest(REPOSITORY, digest)
        await site.grow_old()
        before = site.digest()
        told = await site.collector().run(dry_run=True)
        assert site.digest() == before
        done = await site.collect()
        assert told.removed == done.removed
        assert (told.size, told.manifests) == (done.size, done.manifests)


async def _collect_and_push_at(site: Site, how: str, point: int) -> Digest | None:
    """Run a collection; before its call number `point`, push. None if it made fewer calls."""
    pushed: list[Digest] = []
    calls = 0

    async def push(_: str) -> None:
        nonlocal calls
        calls += 1
        if calls == point + 1:
            pushed.append(await _push(site.registry, how))

    await site.collect(Watched(site.backend, push))  # type: ignore[arg-type]
    return pushed[0] if pushed else None


async def _push(registry: HostedRegistry, how: str) -> Digest:
    """As a client does that pushes only what it is not told to be here."""
    blobs = []
    for content in (b"{}", b"the layer"):
        digest = Digest.of(content)
        blob = None
        if how == "head":
            with suppress(BlobUnknown):
                blob = await registry.confirm_blob(REPOSITORY, digest)
        elif how == "mount":
            blob = await registry.mount_blob(REPOSITORY, digest, source=OTHER)
        elif how == "manifest only":
            with suppress(BlobUnknown):
                blob = await registry.stat_blob(REPOSITORY, digest)
        blobs.append(blob or await push_blob(registry, content))
    try:
        stored = await put_v1(registry, *blobs)
    except ManifestBlobUnknown:
        # Only a client that asked nobody may be told so.
        assert how == "manifest only"
        return await _push(registry, "push")
    return stored.digest


class TestSlowRequests:
    """A request that takes longer than a quarter of the grace time looks once more."""

    async def test_what_was_removed_meanwhile_is_found_out_and_the_manifest_taken_back(
        self, site: Site
    ) -> None:
        config = await push_blob(site.registry, b"{}")
        layer = await push_blob(site.registry, b"the layer")

        async def remove_the_layer(call: str) -> None:
            if call == "write":
                with suppress(ObjectMissing):
                    await site.backend.delete(layout.link_key(REPOSITORY, layer.digest))

        slow = site.registry_on(Watched(site.backend, remove_the_layer), grace_s=0.0)  # type: ignore[arg-type]
        with pytest.raises(ManifestBlobUnknown, match="push it again"):
            await put_v1(slow, config, layer)
        assert [key for key in site.stored() if "_manifests" in key or "_tags" in key] == []

    async def test_what_is_still_there_is_kept_by_it(self, site: Site) -> None:
        slow = site.registry_on(site.backend, grace_s=0.0)
        await push_kit(slow)
        await assert_whole(slow)


class TestTheStore:
    async def test_what_cannot_be_touched_is_not_said_to_be_here(self, site: Site) -> None:
        blob = await push_blob(site.registry, b"orphan")
        await site.grow_old()

        async def fail(call: str) -> None:
            if call == "touch":
                raise StorageUnavailable("no answer")

        failing = site.registry_on(Watched(site.backend, fail))  # type: ignore[arg-type]
        with pytest.raises(Unavailable):
            await failing.confirm_blob(REPOSITORY, blob.digest)

    async def test_a_schedule_runs_once_in_an_interval_however_many_look(self, site: Site) -> None:
        runs = [await site.collector().run_when_due(interval_s=3600) for _ in range(3)]
        assert [run is not None for run in runs] == [True, False, False]
        await site.grow_old(7200)
        # When a run was finished is in the record, not in its age.
        assert await site.collector().run_when_due(interval_s=3600) is None
        assert await site.collector().run_when_due(interval_s=0.0) is not None


class Counting:
    """What an observer is told."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, dict[str, int], int]] = []
        self.looked: list[float | None] = []

    def collection_ended(self, outcome: str, removed: Mapping[str, int], size: int) -> None:
        self.ended.append((outcome, {kind: count for kind, count in removed.items() if count}, size))

    def collection_looked(self, *, finished: float | None, interval_s: float) -> None:
        assert interval_s == 3600
        self.looked.append(finished)


class TestCounting:
    async def test_what_was_removed_is_told_and_when(self, site: Site) -> None:
        counting = Counting()
        await push_blob(site.registry, b"orphan")
        await site.grow_old()
        began = site.backend.now()

        for _ in range(2):
            await site.collector(observer=counting).run_when_due(interval_s=3600)

        assert counting.ended == [("finished", {"links": 1, "content": 1}, len(b"orphan"))]
        before, *after = counting.looked
        assert before is None
        assert [finished is not None and finished >= began for finished in after] == [True, True]

    async def test_also_what_a_run_removed_before_it_failed(self, site: Site) -> None:
        counting = Counting()
        await push_blob(site.registry, b"orphan")
        await site.grow_old()

        async def fail(call: str) -> None:
            if call == "sweep":
                raise StorageUnavailable("no answer")

        with pytest.raises(StorageUnavailable):
            await site.collector(Watched(site.backend, fail), counting).run_when_due(interval_s=3600)

        assert counting.ended == [("failed", {"links": 1, "content": 1}, len(b"orphan"))]
        assert counting.looked == [None]

    async def test_and_a_run_that_was_taken_over(self, site: Site, short_lease: None) -> None:
        counting = Counting()

        async def be_taken_over(call: str) -> None:
            if call == "sweep":
                await site.backend.write(layout.COLLECTION, b'{"holder": "another", "finished": null}')
                await asyncio.sleep(60)

        assert (
            await site.collector(Watched(site.backend, be_taken_over), counting).run_when_due(interval_s=3600)
            is None
        )
        assert [outcome for outcome, *_ in counting.ended] == ["lost"]

    async def test_a_dry_run_counts_nothing(self, site: Site) -> None:
        counting = Counting()
        await push_blob(site.registry, b"orphan")
        await site.grow_old()

        await site.collector(observer=counting).run(dry_run=True)

        assert counting.ended == []
