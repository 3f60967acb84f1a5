"""The journal: every write is in it before it is acknowledged; readers miss nothing; trimming takes nothing that is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kitspec.digest import Digest
from kitspec.errors import BlobUnknown, ManifestUnknown, Unavailable
from kitspec.media_types import OCI_MANIFEST
from kitspec.names import RepositoryName, Tag
from registry import layout
from registry.hosted import HostedRegistry
from registry.journal import SETTLED_S, Actor, Change, Follower, Journal, acting
from registry.upload_sessions import UploadSessions
from storage_backends.interface import ObjectInfo, StorageBackend, StorageUnavailable
from storage_backends.memory import MemoryBackend
from tests.contracts.registry_contract import REPOSITORY, manifest_of, push_blob

OTHER = RepositoryName("other/repository")


class Store(MemoryBackend):
    """A store whose clock and whose answers are the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self.fails: StorageUnavailable | None = None
        self.waits: asyncio.Event | None = None
        self.writes: list[str] = []
        self._lost = ""

    def now(self) -> float:
        return super().now() + self.passed

    def loses_answer_of(self, part: str) -> None:
        """Of the next write of a key with this part: it is done, and nobody is told. Of an entry of the journal: it is not."""
        self._lost = part

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        info = await super().write(key, content, expect=expect)
        self._lose(key)
        return info

    def _lose(self, key: str) -> None:
        if self._lost and self._lost in key:
            self._lost = ""
            raise StorageUnavailable("no answer")

    async def create(self, key: str, content: bytes) -> ObjectInfo:
        self._lose(key)
        self.writes.append(key)
        if self.waits is not None:
            await self.waits.wait()
        if self.fails is not None:
            raise self.fails
        return await super().create(key, content)


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    store = Store()
    await store.start()
    yield store
    await store.close()


def registry_on(store: StorageBackend, journal: Journal) -> HostedRegistry:
    sessions = UploadSessions(store, count_max=10, per_repository_max=10, size_max=None)
    return HostedRegistry(store, sessions, journal=journal)


async def changes_of(journal: Journal) -> list[Change]:
    return [change async for key in journal.entries() for change in await journal.read(key)]


def a_change(number: int = 0) -> Change:
    return Change("push", REPOSITORY, Digest.of(str(number).encode()), OCI_MANIFEST, 7, tags=("v1",))


async def test_every_write_is_in_it_in_order(store: Store) -> None:
    journal = Journal(store)
    registry = registry_on(store, journal)
    acting.set(Actor("ann", "192.0.2.7", "oras/1.3"))
    config, layer = await push_blob(registry, b"{}"), await push_blob(registry, b"layer")
    assert await registry.mount_blob(OTHER, layer.digest, source=REPOSITORY)
    tags = (Tag("v1"), Tag("v2"))
    stored = await registry.put_manifest(REPOSITORY, manifest_of(config, layer), OCI_MANIFEST, tags=tags)
    await registry.delete_manifest(REPOSITORY, Tag("v1"))
    await registry.delete_manifest(REPOSITORY, stored.digest)
    await registry.delete_blob(REPOSITORY, layer.digest)

    told = [
        (change.action, change.repository, change.digest, change.tags, change.source)
        for change in await changes_of(journal)
    ]
    assert told == [
        ("push", REPOSITORY, config.digest, (), None),
        ("push", REPOSITORY, layer.digest, (), None),
        ("mount", OTHER, layer.digest, (), REPOSITORY),
        ("push", REPOSITORY, stored.digest, ("v1", "v2"), None),
        ("delete", REPOSITORY, None, ("v1",), None),
        ("delete", REPOSITORY, stored.digest, ("v2",), None),
        ("delete", REPOSITORY, layer.digest, (), None),
    ]
    assert {change.actor for change in await changes_of(journal)} == {Actor("ann", "192.0.2.7", "oras/1.3")}


async def test_every_acknowledged_push_is_one_also_of_what_was_here_already(store: Store) -> None:
    journal = Journal(store)
    registry = registry_on(store, journal)
    layer, _ = [(await push_blob(registry, b"layer")).digest for _ in range(2)]
    for _ in range(2):
        assert await registry.mount_blob(OTHER, layer, source=REPOSITORY)
    told = [(change.action, change.repository, change.source) for change in await changes_of(journal)]
    assert told == [("push", REPOSITORY, None)] * 2 + [("mount", OTHER, REPOSITORY)] * 2


@pytest.mark.parametrize("lost", ["journal/", "/_blobs/"])
async def test_what_is_pushed_or_mounted_again_because_its_answer_was_lost_is_in_it(
    store: Store, lost: str
) -> None:
    """The write took effect and did not say so: whoever repeats the request finds it done."""
    journal = Journal(store)
    registry = registry_on(store, journal)

    store.loses_answer_of(lost)
    with pytest.raises(Unavailable):
        await push_blob(registry, b"layer")
    layer = await push_blob(registry, b"layer")
    store.loses_answer_of(lost)
    with pytest.raises(Unavailable):
        await registry.mount_blob(OTHER, layer.digest, source=REPOSITORY)
    await registry.mount_blob(OTHER, layer.digest, source=REPOSITORY)

    told = {(change.action, change.repository, change.digest) for change in await changes_of(journal)}
    assert told == {("push", REPOSITORY, layer.digest), ("mount", OTHER, layer.digest)}


async def test_a_manifest_that_is_pushed_again_is_in_it(store: Store) -> None:
    journal = Journal(store)
    registry = registry_on(store, journal)
    config = await push_blob(registry, b"{}")
    store.fails = StorageUnavailable("no answer")
    with pytest.raises(Unavailable):
        await registry.put_manifest(REPOSITORY, manifest_of(config), OCI_MANIFEST, tags=(Tag("v1"),))
    store.fails = None
    stored = await registry.put_manifest(REPOSITORY, manifest_of(config), OCI_MANIFEST, tags=(Tag("v1"),))
    last = (await changes_of(journal))[-1]
    assert (last.action, last.digest, last.tags) == ("push", stored.digest, ("v1",))


async def test_a_deletion_that_the_journal_did_not_take_is_not_acknowledged_and_is_logged(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """It was done, so whoever repeats it is told that nothing is there, and nobody that it was deleted."""
    journal = Journal(store)
    registry = registry_on(store, journal)
    config = await push_blob(registry, b"{}")
    stored = await registry.put_manifest(REPOSITORY, manifest_of(config), OCI_MANIFEST, tags=(Tag("v1"),))
    before = await changes_of(journal)

    store.fails = StorageUnavailable("no answer")
    with pytest.raises(Unavailable):
        await registry.delete_manifest(REPOSITORY, stored.digest)
    with pytest.raises(Unavailable):
        await registry.delete_blob(REPOSITORY, config.digest)
    store.fails = None

    with pytest.raises(ManifestUnknown):
        await registry.delete_manifest(REPOSITORY, stored.digest)
    with pytest.raises(BlobUnknown):
        await registry.delete_blob(REPOSITORY, config.digest)
    assert await changes_of(journal) == before
    lost = [vars(line)["fields"] for line in caplog.records if line.getMessage() == "journal.lost"]
    assert [(line["action"], line["digest"]) for line in lost] == [
        ("delete", stored.digest),
        ("delete", config.digest),
    ]


async def test_a_change_comes_back_as_it_was(store: Store) -> None:
    journal = Journal(store)
    change = Change("mount", OTHER, Digest.of(b"x"), "a/b", 0, ("t",), REPOSITORY, Actor("n", "a", "g"), "r")
    await journal.append(change)
    (read,) = await changes_of(journal)
    assert read == Change(**{name: getattr(change, name) for name in change.__slots__} | {"time": read.time})
    assert abs(read.time - change.time) < 0.001


async def test_what_is_not_in_the_journal_is_not_acknowledged(store: Store) -> None:
    registry = registry_on(store, Journal(store))
    config = await push_blob(registry, b"{}")
    store.fails = StorageUnavailable("no answer")
    with pytest.raises(Unavailable):
        await registry.put_manifest(REPOSITORY, manifest_of(config), OCI_MANIFEST, tags=(Tag("v1"),))
    with pytest.raises(Unavailable):
        await push_blob(registry, b"layer")


async def test_changes_that_come_while_an_entry_is_written_go_into_one(store: Store) -> None:
    journal = Journal(store)
    store.waits = asyncio.Event()
    first = asyncio.create_task(journal.append(a_change(0)))
    while not store.writes:
        await asyncio.sleep(0)
    others = [asyncio.create_task(journal.append(a_change(number))) for number in range(1, 20)]
    await asyncio.sleep(0)
    store.waits.set()
    await asyncio.gather(first, *others)
    assert len(store.writes) == 2
    digests = [change.digest for change in await changes_of(journal)]
    assert digests == [a_change(number).digest for number in range(20)]


async def test_one_that_is_cut_off_leaves_the_others_their_entry(store: Store) -> None:
    journal = Journal(store)
    store.waits = asyncio.Event()
    appends = [asyncio.create_task(journal.append(a_change(number))) for number in range(3)]
    while not store.writes:
        await asyncio.sleep(0)
    appends[0].cancel()
    store.waits.set()
    results = await asyncio.gather(*appends, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, type(None), type(None)]
    assert len(await changes_of(journal)) == 3


async def test_where_nothing_may_be_written_nothing_is(store: Store) -> None:
    await Journal(store, is_writable=False).append(a_change())
    assert store.writes == []


async def test_what_is_no_entry_is_passed_over(store: Store) -> None:
    journal = Journal(store)
    await store.write(f"{layout.JOURNAL}20000101/00/0000.000000-x", b"no entry")
    await journal.append(a_change())
    assert len(await changes_of(journal)) == 1


class Heard:
    """What a follower told."""

    def __init__(self, store: Store, **times: float) -> None:
        self.changes: list[Change] = []
        self.gaps = 0
        self.follower = Follower(
            Journal(store),
            on_change=self._hear,
            on_gap=self._gap,
            **({"interval_s": 0.01, "keep_s": 1000.0} | times),
        )

    async def _hear(self, change: Change) -> None:
        self.changes.append(change)

    def _gap(self) -> None:
        self.gaps += 1

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.changes) < count:
                await asyncio.sleep(0.005)


class TestFollowing:
    async def test_a_follower_hears_of_what_others_write_once(self, store: Store) -> None:
        heard = Heard(store)
        following = asyncio.create_task(heard.follower.run())
        journals = [Journal(store), Journal(store)]
        for number in range(10):
            await journals[number % 2].append(a_change(number))
        await heard.until(10)
        await journals[0].append(a_change(10))
        await heard.until(11)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert [change.digest for change in heard.changes] == [a_change(n).digest for n in range(11)]

    async def test_and_not_of_its_own(self, store: Store) -> None:
        heard = Heard(store)
        await heard.follower._journal.append(a_change(1))
        await Journal(store).append(a_change(2))
        await heard.follower._look("")
        assert [change.digest for change in heard.changes] == [a_change(2).digest]

    async def test_an_entry_that_comes_late_is_heard(self, store: Store) -> None:
        """Its writer began before others that were done first: its key stands before theirs."""
        heard = Heard(store)
        store.waits = asyncio.Event()
        late = asyncio.create_task(Journal(store).append(a_change(1)))
        while not store.writes:
            await asyncio.sleep(0)
        waits, store.waits = store.waits, None
        store.passed = SETTLED_S / 2
        await Journal(store).append(a_change(2))
        after = await heard.follower._look("")
        assert len(heard.changes) == 1
        waits.set()
        await late
        store.passed = SETTLED_S - 1
        await heard.follower._look(after)
        assert [change.digest for change in heard.changes] == [a_change(2).digest, a_change(1).digest]

    async def test_a_store_that_does_not_answer_is_asked_again(self, store: Store) -> None:
        heard = Heard(store)
        calls = 0

        async def failing_once(after: str) -> str:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise StorageUnavailable("no answer")
            return await Follower._look(heard.follower, after)

        heard.follower._look = failing_once  # type: ignore[method-assign]
        await Journal(store).append(a_change())
        following = asyncio.create_task(heard.follower.run())
        await heard.until(1)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    async def test_a_process_that_stood_still_forgets_what_it_knew(self, store: Store) -> None:
        heard = Heard(store, keep_s=0.0)
        following = asyncio.create_task(heard.follower.run())
        async with asyncio.timeout(5):
            while not heard.gaps:
                await asyncio.sleep(0.005)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


class TestReplicas:
    async def test_a_tag_that_was_moved_elsewhere_is_read_before_it_is_asked_for(self, store: Store) -> None:
        lookups: list[bool] = []
        here = HostedRegistry(
            store,
            UploadSessions(store, count_max=10, per_repository_max=10, size_max=None),
            on_manifest_lookup=lookups.append,
        )
        there = registry_on(store, Journal(store))
        config, layer = await push_blob(there, b"{}"), await push_blob(there, b"layer")
        await there.put_manifest(REPOSITORY, manifest_of(config), OCI_MANIFEST, tags=(Tag("v1"),))
        await here.get_manifest(REPOSITORY, Tag("v1"))
        moved = await there.put_manifest(
            REPOSITORY, manifest_of(config, layer), OCI_MANIFEST, tags=(Tag("v1"),)
        )
        for change in (await changes_of(Journal(store)))[-1:]:
            await here.refresh(change)
        assert (await here.get_manifest(REPOSITORY, Tag("v1"))).digest == moved.digest
        assert lookups[-1] is False  # a manifest that nobody asked for here is not fetched in advance
        here.forget()
        assert (await here.get_manifest(REPOSITORY, Tag("v1"))).digest == moved.digest

    async def test_what_was_deleted_elsewhere_is_forgotten(self, store: Store) -> None:
        here, there = registry_on(store, Journal(store)), registry_on(store, Journal(store))
        config = await push_blob(there, b"{}")
        stored = await there.put_manifest(REPOSITORY, manifest_of(config), OCI_MANIFEST, tags=(Tag("v1"),))
        await here.get_manifest(REPOSITORY, Tag("v1"))
        await there.delete_manifest(REPOSITORY, stored.digest)
        await here.refresh(Change("delete", REPOSITORY, stored.digest, tags=("v1",)))
        assert not here._manifests._entries
        assert not here._tags._entries


class TestTrimming:
    async def fill(self, store: Store) -> Journal:
        journal = Journal(store)
        for number in range(6):
            store.passed = number * 1000.0
            await journal.append(a_change(number))
        return journal

    async def kept(self, journal: Journal) -> list[Any]:
        return [change.digest for change in await changes_of(journal)]

    async def test_what_is_older_goes(self, store: Store) -> None:
        journal = await self.fill(store)
        assert await journal.trim(keep_s=2500.0) == 3
        assert await self.kept(journal) == [a_change(number).digest for number in (3, 4, 5)]

    async def test_a_dry_run_only_counts(self, store: Store) -> None:
        journal = await self.fill(store)
        assert await journal.trim(keep_s=2500.0, dry_run=True) == 3
        assert len(await self.kept(journal)) == 6

    async def test_what_is_not_settled_stays_whatever_is_asked(self, store: Store) -> None:
        journal = await self.fill(store)
        await journal.trim(keep_s=0.0)
        assert await self.kept(journal) == [a_change(5).digest]

    async def test_what_a_reader_has_not_read_stays(self, store: Store) -> None:
        journal = await self.fill(store)
        keys = [key async for key in journal.entries()]
        await journal.mark("audit", keys[1])
        await journal.mark("mail", keys[4])
        assert await journal.marked("audit") == keys[1]
        assert await journal.marked("nobody") is None
        await journal.trim(keep_s=500.0)
        assert await self.kept(journal) == [a_change(number).digest for number in range(1, 6)]

    async def test_a_mark_that_nobody_moves_any_more_holds_up_nothing(self, store: Store) -> None:
        journal = await self.fill(store)
        await journal.mark("gone", "")
        store.passed += 31 * 24 * 3600
        await journal.append(a_change(6))
        await journal.trim(keep_s=500.0)
        assert await self.kept(journal) == [a_change(6).digest]
