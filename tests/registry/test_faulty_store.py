"""The registry on a store that is not well: what was acknowledged is there and was told, nothing else is, and nothing is left behind.

Clients push, mount, move tags, delete and read, through two workers and a proxy that fails as networks and stores do; they repeat what
has no answer. Collections run meanwhile. `SEEDS=100` tries more; a seed makes the same requests and faults, not the same race.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    ManifestBlobUnknown,
    ManifestUnknown,
    NameUnknown,
    OciError,
    Unavailable,
    UploadOutOfOrder,
)
from kitspec.media_types import OCI_MANIFEST
from kitspec.names import RepositoryName, Tag
from registry import lease
from registry.freshness import Freshness
from registry.fsck import Fsck, Severity
from registry.garbage import CollectionBusy, Collector
from registry.hosted import HostedRegistry
from registry.journal import Change, Journal
from registry.upload_sessions import UploadSessions
from storage_backends.interface import StorageBackend, StorageError, StorageUnavailable
from storage_backends.s3 import S3Backend
from storage_backends.s3_client import S3Settings
from tests.contracts.registry_contract import chunks_of, joined, manifest_of
from tests.replicas.cluster import Bucket
from tests.replicas.store import leftovers
from tests.storage_backends.s3_faults import Fault, Request, Rule, at_random, faulty
from tests.storage_backends.s3_server import Buckets, object_store

T = TypeVar("T")

SEEDS = int(os.environ.get("SEEDS", "2"))
MIB = 1024 * 1024
CLIENTS = 4
RUN_S = 7.0
# Old enough to be collected within a run. The store tells whole seconds, of which a quarter of this holds one.
GRACE_S = 4.0
# A request that has no answer for so long has found a fault that lasts, and none here does.
PATIENCE_S = 25.0

pytestmark = [pytest.mark.s3, pytest.mark.timeout(120)]

_WITHOUT_EFFECT = (Fault.SLOW_DOWN, Fault.CONFLICT, Fault.FAILS, Fault.CUT)
_IN_DOUBT = (Fault.LOSES_ANSWER, Fault.ERROR_IN_200, Fault.TRUNCATES)


class Broken(Exception):
    """The registry did what it must not."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an entry of the journal has to say of a write. Attributes: tags: of a deletion by digest they are left out."""

    action: str
    name: RepositoryName
    digest: Digest | None
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, change: Change) -> Told:
        is_by_digest = change.action == "delete" and change.digest is not None
        return cls(change.action, change.repository, change.digest, () if is_by_digest else change.tags)


@dataclass
class World:
    """What all clients share.

    Attributes:
        workers: any of which may be asked.
        contents: that are pushed.
        acknowledged: writes, each as often as it was.
        attempted: writes that may have been done.
        happened: how often what was out of the ordinary.
    """

    workers: list[HostedRegistry]
    contents: dict[Digest, bytes]
    acknowledged: Counter[Told] = field(default_factory=Counter)
    attempted: set[Told] = field(default_factory=set)
    happened: Counter[str] = field(default_factory=Counter)


class Client:
    """Writes to a repository of its own, one thing after the other, so that it knows what has to be there.

    Attributes:
        acknowledged_at: when the registry last said that it holds a blob.
        manifests, tags: that were acknowledged, and not deleted.
    """

    def __init__(self, number: int, world: World, chance: random.Random) -> None:
        self.name = RepositoryName(f"faulty/r{number}")
        self.acknowledged_at: dict[Digest, float] = {}
        self.manifests: dict[Digest, bytes] = {}
        self.tags: dict[Tag, Digest] = {}
        self._world = world
        self._chance = chance

    async def run(self, others: list[Client]) -> None:
        ends = time.monotonic() + RUN_S
        works: list[Callable[[], Awaitable[object]]] = [
            lambda: self.push(others),
            lambda: self.push(others),
            self.read,
            self.delete_tag,
            self.delete_manifest,
            self.delete_blob,
            self.abandon,
        ]
        while time.monotonic() < ends:
            await self._chance.choice(works)()

    async def push(self, others: list[Client]) -> None:
        """A manifest under a tag, with its blobs."""
        blobs = [await self._blob(digest, others) for digest in self._some_contents()]
        fields: dict[str, Any] = {"annotations": {"nonce": self._chance.randbytes(8).hex()}}
        if self.manifests and self._chance.random() < 0.3:
            subject, content = self._chance.choice(list(self.manifests.items()))
            fields["subject"] = {"mediaType": OCI_MANIFEST, "digest": subject, "size": len(content)}
        manifest = manifest_of(*blobs, **fields)
        tag, digest = Tag(self._chance.choice("abc")), Digest.of(manifest)
        written = Told("push", self.name, digest, (tag,))
        self._world.attempted.add(written)
        for _ in range(5):
            try:
                await self._ask(lambda at: at.put_manifest(self.name, manifest, OCI_MANIFEST, tags=(tag,)))
                break
            except ManifestBlobUnknown as error:
                # It may be: who was told long ago that a blob is here is promised nothing.
                said = min(self.acknowledged_at[blob.digest] for blob in blobs)
                if time.monotonic() - said < GRACE_S / 2:
                    raise Broken(f"a blob was lost that was acknowledged just now: {error}") from error
                self._world.happened["pushed again, it took too long"] += 1
                for blob in blobs:
                    await self._push_blob(blob.digest)
        else:
            raise Broken("a manifest was refused five times")
        self._world.acknowledged[written] += 1
        self.manifests[digest], self.tags[tag] = manifest, digest

    async def read(self) -> None:
        """What was acknowledged is there at any time, whole."""
        for tag, digest in self.tags.items():
            stored = await self._ask(lambda at, tag=tag: at.get_manifest(self.name, tag))  # type: ignore[misc]
            if (stored.digest, stored.content) != (digest, self.manifests[digest]):
                raise Broken(f"{self.name}:{tag} is {stored.digest}, not {digest}")
            for blob in _blobs_of(stored.content, self._world.contents):
                content = await self._ask(lambda at, blob=blob: self._read_blob(at, blob))  # type: ignore[misc]
                if content != self._world.contents[blob]:
                    raise Broken(f"{blob} has other bytes")

    async def delete_tag(self) -> None:
        if self.tags:
            tag = self._chance.choice(list(self.tags))
            await self._delete(
                Told("delete", self.name, None, (tag,)), lambda at: at.delete_manifest(self.name, tag)
            )
            del self.tags[tag]

    async def delete_manifest(self) -> None:
        if self.manifests:
            digest = self._chance.choice(list(self.manifests))
            await self._delete(
                Told("delete", self.name, digest), lambda at: at.delete_manifest(self.name, digest)
            )
            del self.manifests[digest]
            self.tags = {tag: target for tag, target in self.tags.items() if target != digest}

    async def delete_blob(self) -> None:
        """One that no manifest of the repository lists, and that no collection may have taken yet."""
        listed, fresh = self.listed(), time.monotonic() - GRACE_S / 2
        deletable = [one for one, at in self.acknowledged_at.items() if one not in listed and at > fresh]
        if deletable:
            digest = self._chance.choice(deletable)
            await self._delete(
                Told("delete", self.name, digest), lambda at: at.delete_blob(self.name, digest)
            )
            del self.acknowledged_at[digest]

    async def abandon(self) -> None:
        """A blob that no manifest will list, or an upload that nobody goes on with."""
        content = self._chance.randbytes(100)
        written = Told("push", self.name, Digest.of(content))
        self._world.attempted.add(written)
        with suppress(Unavailable):
            upload = await self._worker().begin_upload(self.name)
            await upload.append(chunks_of(content), at=0)
            if self._chance.random() < 0.7:
                await upload.commit(Digest.of(content))
                self._world.acknowledged[written] += 1

    def listed(self) -> set[Digest]:
        return {
            blob for manifest in self.manifests.values() for blob in _blobs_of(manifest, self._world.contents)
        }

    def _some_contents(self) -> list[Digest]:
        return self._chance.sample(list(self._world.contents), self._chance.randrange(1, 4))

    def _worker(self) -> HostedRegistry:
        return self._chance.choice(self._world.workers)

    async def _blob(self, digest: Digest, others: list[Client]) -> Descriptor:
        source, way = self._chance.choice(others), self._chance.choice(["push", "mount", "ask"])
        if way == "mount" and digest in source.acknowledged_at:
            written = Told("mount", self.name, digest)
            self._world.attempted.add(written)
            mounted = await self._ask(lambda at: at.mount_blob(self.name, digest, source=source.name))
            if mounted is not None:
                self._world.acknowledged[written] += 1
                return self._note(mounted)
        elif way == "ask":
            with suppress(BlobUnknown):
                return self._note(await self._ask(lambda at: at.confirm_blob(self.name, digest)))
        return await self._push_blob(digest)

    async def _push_blob(self, digest: Digest) -> Descriptor:
        content, written = self._world.contents[digest], Told("push", self.name, digest)
        cut, closes = self._chance.randrange(len(content)), self._chance.random() < 0.5
        location, is_closing = "", False
        self._world.attempted.add(written)

        async def go_on(at: HostedRegistry) -> Descriptor:
            nonlocal location, is_closing
            if not location:
                location, is_closing = (await at.begin_upload(self.name)).location, False
            try:
                upload = await at.get_upload(self.name, location)
                while (offset := upload.offset) < len(content):
                    chunk = content[offset : cut if offset < cut else None]
                    is_closing = closes and offset + len(chunk) == len(content)
                    await upload.append(
                        chunks_of(chunk), at=offset, size=len(chunk), closing=digest if is_closing else None
                    )
                is_closing = True
                return await upload.commit(digest)
            except UploadOutOfOrder as error:
                raise Unavailable(f"an effect came late: {error}") from error
            except BlobUploadUnknown as error:
                if not is_closing:
                    raise Broken("the upload is gone, and nobody has closed it") from error
                location = ""
                raise Unavailable("the upload was gone after its end") from error

        stored = await self._ask(go_on)
        self._world.acknowledged[written] += 1
        return self._note(stored)

    def _note(self, blob: Descriptor) -> Descriptor:
        self.acknowledged_at[blob.digest] = time.monotonic()
        return blob

    async def _delete(self, written: Told, delete: Callable[[HostedRegistry], Awaitable[None]]) -> None:
        self._world.attempted.add(written)
        is_again = False

        async def again(at: HostedRegistry) -> bool:
            """Whether it was acknowledged."""
            nonlocal is_again
            try:
                await delete(at)
            except (BlobUnknown, ManifestUnknown):
                if not is_again:
                    raise
                return False
            finally:
                is_again = True
            return True

        if await self._ask(again):
            self._world.acknowledged[written] += 1
        else:
            self._world.happened["deleted, and not acknowledged"] += 1

    async def _ask(self, request: Callable[[HostedRegistry], Awaitable[T]]) -> T:
        """Send a request until there is an answer."""
        ends = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await request(self._worker())
            except (Unavailable, StorageUnavailable) as error:
                self._world.happened["sent again"] += 1
                if time.monotonic() > ends:
                    raise Broken(f"no answer for {PATIENCE_S:g} s: {error}") from error
                await asyncio.sleep(self._chance.random() * 0.05)

    async def _read_blob(self, at: HostedRegistry, digest: Digest) -> bytes:
        async with at.open_blob(self.name, digest) as body:
            return await joined(body)


def _blobs_of(manifest: bytes, contents: dict[Digest, bytes]) -> list[Digest]:
    return [digest for digest in contents if digest.encode() in manifest]


def _rule(chance: random.Random) -> Rule:
    """How the store fails: in four ways, one after the other."""

    def seed() -> int:
        return chance.randrange(1 << 32)

    hangs = at_random(seed(), 0.005, (Fault.HANGS,))
    # Done, and nobody is told: a link, a tag, an entry of the journal, a deletion.
    loses = at_random(seed(), 0.5, (Fault.LOSES_ANSWER,))
    ways: list[Rule] = [
        at_random(seed(), 0.25, (*_WITHOUT_EFFECT, *_IN_DOUBT)),
        _each_nth(chance.randrange(2, 6), chance),
        _bursts(chance),
        lambda request: None if request.method in {"GET", "HEAD"} else hangs(request) or loses(request),
    ]
    chance.shuffle(ways)
    began = time.monotonic()

    def rule(request: Request) -> Fault | None:
        turn = int((time.monotonic() - began) / RUN_S * len(ways))
        return ways[turn % len(ways)](request)

    return rule


def _each_nth(number: int, chance: random.Random) -> Rule:
    count = 0

    def rule(_: Request) -> Fault | None:
        nonlocal count
        count += 1
        return (
            chance.choice((Fault.SLOW_DOWN, Fault.CUT, Fault.LOSES_ANSWER)) if count % number == 0 else None
        )

    return rule


def _bursts(chance: random.Random) -> Rule:
    """The store is well, and then does not answer for longer than anybody tries."""
    is_down, until, fault = False, 0.0, Fault.CUT

    def rule(_: Request) -> Fault | None:
        nonlocal is_down, until, fault
        if time.monotonic() > until:
            is_down = not is_down
            until = time.monotonic() + chance.uniform(0.1, 0.6)
            fault = chance.choice((Fault.SLOW_DOWN, Fault.CUT, Fault.FAILS, Fault.LOSES_ANSWER))
        return fault if is_down else None

    return rule


@pytest.fixture(scope="session")
def buckets() -> Iterator[Buckets]:
    with object_store() as buckets:
        yield buckets


@pytest.fixture(autouse=True)
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that could not be given up is in nobody's way for long."""
    monkeypatch.setattr(lease, "LEASE_S", 1.5)
    monkeypatch.setattr(lease, "RENEW_S", 0.5)
    monkeypatch.setattr(lease, "_CLOCK_DOUBT_S", 0.5)


@asynccontextmanager
async def opened(settings: S3Settings) -> AsyncIterator[S3Backend]:
    backend = S3Backend(settings)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


def _sessions(backend: StorageBackend) -> UploadSessions:
    return UploadSessions(backend, count_max=1000, per_repository_max=1000, size_max=None)


def _worker_on(backend: StorageBackend) -> HostedRegistry:
    freshness = Freshness(backend, grace_s=GRACE_S)
    return HostedRegistry(backend, _sessions(backend), freshness=freshness, journal=Journal(backend))


def _collector(backend: StorageBackend, *, grace_s: float = GRACE_S, upload_age_s: float = 60.0) -> Collector:
    return Collector(
        backend,
        _sessions(backend),
        Journal(backend),
        grace_s=grace_s,
        upload_age_s=upload_age_s,
        journal_keep_s=3600.0,
    )


async def _keep_collecting(backend: StorageBackend, world: World) -> None:
    while True:
        await asyncio.sleep(0.2)
        try:
            collected = await _collector(backend).run()
        except (StorageError, OciError, CollectionBusy) as error:
            world.happened[f"a collection ended with {type(error).__name__}"] += 1
        else:
            world.happened["collections"] += 1
            world.happened["objects collected"] += sum(collected.removed.values())


def _contents(chance: random.Random) -> dict[Digest, bytes]:
    """Most are small; some have several parts, or are several objects."""
    sizes = [chance.randrange(1, 100_000) for _ in range(10)] + [
        chance.randrange(5 * MIB, 11 * MIB) for _ in range(2)
    ]
    return {Digest.of(content): content for content in map(chance.randbytes, sizes)}


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_faults_lose_nothing_acknowledged_and_leave_nothing_behind(
    buckets: Buckets, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(seed)
    settings = replace(buckets.new(), segment_size=5 * MIB, trash_delay_s=0.0)
    assert settings.endpoint is not None
    async with faulty(settings.endpoint) as store:
        shaky = replace(settings, endpoint=store.url, retry_timeout_s=0.2, read_timeout_s=2.0)
        async with AsyncExitStack() as stack:
            backends = [await stack.enter_async_context(opened(shaky)) for _ in range(3)]
            world = World([_worker_on(backend) for backend in backends[:2]], _contents(chance))
            clients = [Client(number, world, random.Random(f"{seed} {number}")) for number in range(CLIENTS)]
            collecting = asyncio.create_task(_keep_collecting(backends[2], world))
            store.rule = _rule(chance)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for client in clients:
                        tasks.create_task(client.run(clients))
            finally:
                store.rule = lambda _: None
                collecting.cancel()
                await asyncio.gather(collecting, return_exceptions=True)
        faults = sum(fault is not None for _, fault in store.requests)
    async with opened(settings) as backend:
        registry = _worker_on(backend)
        world.workers = [registry]
        for client in clients:
            await _check(registry, client)
        await _check_journal(Journal(backend), world)
        await _check_errors(backend)
        await _delete_everything(registry, clients)
        left = await _collected(backend, settings)

    with capsys.disabled():
        happened = ", ".join(f"{count} {what}" for what, count in sorted(world.happened.items()))
        print(f"\nseed {seed}: {faults} of {len(store.requests)} requests to the store fail; {happened}")  # noqa: T201
    assert not left
    assert faults > 50
    assert world.happened["sent again"]


async def _check(registry: HostedRegistry, client: Client) -> None:
    """What was acknowledged is there, and no tag, manifest or referrer that was not."""
    await client.read()
    for digest, content in client.manifests.items():
        assert (await registry.get_manifest(client.name, digest)).content == content
    for blob in client.listed():
        await registry.stat_blob(client.name, blob)
    prefix = f"repositories/{client.name}/_manifests/sha256/"
    stored = {info.key.removeprefix(prefix) async for info in registry.backend.list(prefix)}
    assert stored == {digest.encoded for digest in client.manifests}
    with suppress(NameUnknown):  # nothing was pushed
        assert {tag async for tag in registry.tags(client.name)} == client.tags.keys()
    for subject in client.manifests:
        referrers = {one.digest async for one in registry.referrers(client.name, subject)}
        wanted = {digest for digest, content in client.manifests.items() if _refers_to(content, subject)}
        assert referrers == wanted


def _refers_to(manifest: bytes, subject: Digest) -> bool:
    return bool(json.loads(manifest).get("subject", {}).get("digest") == subject)


async def _check_journal(journal: Journal, world: World) -> None:
    told = Counter([Told.of(change) async for key in journal.entries() for change in await journal.read(key)])

    assert world.acknowledged <= told, f"not in the journal: {world.acknowledged - told}"
    assert told.keys() <= world.attempted


async def _check_errors(backend: StorageBackend) -> None:
    findings = [one async for one in Fsck(backend, grace_s=GRACE_S, pause_s=0.0).findings()]
    assert not [one for one in findings if one.severity is not Severity.GARBAGE]


async def _delete_everything(registry: HostedRegistry, clients: list[Client]) -> None:
    for client in clients:
        for digest in client.manifests:
            await registry.delete_manifest(client.name, digest)


async def _collected(backend: StorageBackend, settings: S3Settings) -> list[str]:
    """What two collections leave in the bucket, when nothing is young any more."""
    assert settings.endpoint is not None
    assert settings.access_key is not None
    assert settings.secret_key is not None
    bucket = Bucket(settings.endpoint, settings.bucket, settings.access_key, settings.secret_key)
    for _ in range(2):  # what the first has deleted lies in the trash for a second
        await asyncio.sleep(1.5)
        await _collector(backend, grace_s=0.0, upload_age_s=0.0).run()
    return await asyncio.to_thread(leftovers, bucket)
