"""What a push and a pull ask of the object store, beside what CNCF Distribution asks of the same one.

The figures of docs/operations.md ("What a push and a pull cost") are printed by

    COMPARE=1 VERSITYGW=… pytest -s tests/replicas/test_requests.py

Without COMPARE Distribution is not asked: 3 GiB by way of a proxy in Python take it minutes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Final

import pytest
from aiohttp import ClientSession

from bench.servers import OURS_ON_S3, Candidate, Place, distribution_on_s3, running
from tests.replicas.round_robin import raw_session
from tests.storage_backends.s3_relay import Relay, cost_of, relay
from tests.storage_backends.s3_server import Buckets, object_store

pytestmark = [pytest.mark.s3, pytest.mark.timeout(900)]

MIB: Final = 1024 * 1024
LAYER_COUNT: Final = 10
QUIET_S: Final = 1.0
CHUNK_SIZE: Final = 1 * MIB
MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE: Final = "application/vnd.kitops.modelkit.config.v1+json"
LAYER_TYPE: Final = "application/vnd.kitops.modelkit.model.v1.tar"

# Nothing but what was asked for: no probes, no follower, no collection meanwhile.
QUIET: Final = {
    "MODELREG_HEALTH_STORAGEDRIVER_ENABLED": "false",
    "MODELREG_JOURNAL_POLL": "1h",
    "MODELREG_STORAGE_MAINTENANCE_GARBAGECOLLECTION_ENABLED": "false",
    "MODELREG_STORAGE_MAINTENANCE_UPLOADPURGING_ENABLED": "false",
}

_FILE_SIZE: Final = 100 * MIB
_END: Final = bytes(2 * tarfile.BLOCKSIZE)
LAYER_SIZE: Final = tarfile.BLOCKSIZE + _FILE_SIZE + len(_END)


@cache
def random_file() -> bytes:
    return os.urandom(_FILE_SIZE)


@dataclass(frozen=True, slots=True)
class Layer:
    """A tar of one file of 100 MiB, whose name tells it from all others."""

    head: bytes
    digest: str

    @classmethod
    def make(cls, name: str) -> Layer:
        member = tarfile.TarInfo(name)
        member.size = _FILE_SIZE
        head = member.tobuf(tarfile.USTAR_FORMAT)
        hasher = hashlib.sha256(head)
        hasher.update(random_file())
        hasher.update(_END)
        return cls(head, f"sha256:{hasher.hexdigest()}")

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self.head
        for start in range(0, _FILE_SIZE, CHUNK_SIZE):
            yield random_file()[start : start + CHUNK_SIZE]
        yield _END


@dataclass(frozen=True, slots=True)
class Kit:
    """What is pushed: a config, ten layers, a manifest."""

    config: bytes
    layers: tuple[Layer, ...]

    @classmethod
    def make(cls, name: str) -> Kit:
        config = json.dumps({"manifestVersion": "1.0.0", "package": {"name": name}}).encode()
        return cls(config, tuple(Layer.make(f"{name}-{number}.bin") for number in range(LAYER_COUNT)))

    @property
    def manifest(self) -> bytes:
        layers = [
            {"mediaType": LAYER_TYPE, "digest": each.digest, "size": LAYER_SIZE} for each in self.layers
        ]
        config = {"mediaType": CONFIG_TYPE, "digest": digest_of(self.config), "size": len(self.config)}
        document = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers}
        return json.dumps(document).encode()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Client:
    """Pushes and pulls as others' clients do."""

    def __init__(self, session: ClientSession, url: str, repository: str) -> None:
        self._session = session
        self._origin = url
        self._url = f"{url}/v2/{repository}"

    async def push(self, kit: Kit, *, by_patch: bool) -> None:
        """
        Args:
            by_patch: POST, PATCH and PUT, as docker and crane do; else POST and PUT, as containerd and oras.
        """
        await self._push_blob(digest_of(kit.config), len(kit.config), kit.config, by_patch=by_patch)
        for layer in kit.layers:
            await self._push_blob(layer.digest, LAYER_SIZE, layer, by_patch=by_patch)
        await self._ask("HEAD", f"{self._url}/manifests/v1", 404, 200, headers={"Accept": MANIFEST_TYPE})
        headers = {"Content-Type": MANIFEST_TYPE}
        await self._ask("PUT", f"{self._url}/manifests/v1", 201, data=kit.manifest, headers=headers)

    async def _push_blob(self, digest: str, size: int, content: bytes | Layer, *, by_patch: bool) -> None:
        if await self._ask("HEAD", f"{self._url}/blobs/{digest}", 200, 404) == 200:
            return
        body = content.chunks() if isinstance(content, Layer) else content
        location = await self._begin()
        if by_patch:
            location = await self._continue(location, body)
            await self._ask("PUT", with_digest(location, digest), 201)
        else:
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            await self._ask("PUT", with_digest(location, digest), 201, data=body, headers=headers)

    async def _begin(self) -> str:
        async with self._session.post(f"{self._url}/blobs/uploads/") as answer:
            assert answer.status == 202, await answer.text()
            return self._absolute(answer.headers["Location"])

    async def _continue(self, location: str, body: AsyncIterator[bytes] | bytes) -> str:
        headers = {"Content-Type": "application/octet-stream"}
        async with self._session.patch(location, data=body, headers=headers) as answer:
            assert answer.status == 202, await answer.text()
            return self._absolute(answer.headers["Location"])

    def _absolute(self, location: str) -> str:
        return location if "://" in location else self._origin + location

    async def pull(self, kit: Kit) -> None:
        accept = {"Accept": MANIFEST_TYPE}
        await self._ask("HEAD", f"{self._url}/manifests/v1", 200, headers=accept)
        async with self._session.get(
            f"{self._url}/manifests/{digest_of(kit.manifest)}", headers=accept
        ) as answer:
            assert await answer.read() == kit.manifest
        for digest in (digest_of(kit.config), *(layer.digest for layer in kit.layers)):
            await self._pull_blob(digest)

    async def _pull_blob(self, digest: str) -> None:
        hasher = hashlib.sha256()
        async with self._session.get(f"{self._url}/blobs/{digest}") as answer:
            assert answer.status == 200, await answer.text()
            async for chunk in answer.content.iter_any():
                hasher.update(chunk)
        assert f"sha256:{hasher.hexdigest()}" == digest

    async def _ask(
        self,
        method: str,
        url: str,
        *statuses: int,
        data: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> int:
        async with self._session.request(method, url, data=data, headers=headers) as answer:
            assert answer.status in statuses, f"{method} {url}: {answer.status} {await answer.text()}"
            return answer.status


def with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


class Step(Enum):
    PUSH = "push, POST + PATCH + PUT (docker, crane)"
    AFTER_PUSH = "after it, of its own accord"
    PUSH_AGAIN = "push of the same again"
    PUSH_BY_PUT = "push, POST + PUT (containerd, oras)"
    PULL_REDIRECTED = "pull, redirected"
    PULL_STREAMED = "pull, streamed"


Counts = Mapping[Step, Counter[str]]


@pytest.fixture
def endpoint() -> Iterator[tuple[Buckets, Relay]]:
    with object_store() as buckets:
        endpoint = buckets.new().endpoint
        assert endpoint is not None
        with relay(endpoint) as store:
            yield buckets, store


def measured(
    candidate: Candidate, buckets: Buckets, store: Relay, kits: tuple[Kit, Kit], scratch: Path
) -> Counts:
    """What each step asks of a store that nobody else uses; the table is printed."""
    bucket = buckets.new()
    assert bucket.access_key is not None
    assert bucket.secret_key is not None
    keys = {"AWS_ACCESS_KEY_ID": bucket.access_key, "AWS_SECRET_ACCESS_KEY": bucket.secret_key}
    place = Place(scratch, {"endpoint": store.url, "bucket": bucket.bucket}, QUIET | keys)
    counts: dict[Step, Counter[str]] = {}
    with running(candidate, place, 1, streams=False) as server:
        asyncio.run(measure_pushes(server.url, store, kits, counts))
    for step, streams in ((Step.PULL_REDIRECTED, False), (Step.PULL_STREAMED, True)):
        with running(candidate, place, 1, streams=streams) as server:
            counts[step] = asyncio.run(measure_pull(server.url, store, kits[0]))
    for step, counted in counts.items():
        sys.stdout.write(line_of(candidate.name, step, counted))
    return counts


async def measure_pushes(
    url: str, store: Relay, kits: tuple[Kit, Kit], counts: dict[Step, Counter[str]]
) -> None:
    async with raw_session() as session:
        one, two = Client(session, url, "team/one"), Client(session, url, "team/two")
        counts[Step.PUSH], counts[Step.AFTER_PUSH] = await counted(store, one.push(kits[0], by_patch=True))
        counts[Step.PUSH_AGAIN], _ = await counted(store, one.push(kits[0], by_patch=True))
        counts[Step.PUSH_BY_PUT], _ = await counted(store, two.push(kits[1], by_patch=False))


async def measure_pull(url: str, store: Relay, kit: Kit) -> Counter[str]:
    async with raw_session() as session:
        asked, _ = await counted(store, Client(session, url, "team/one").pull(kit))
        return asked


async def counted(store: Relay, work: Awaitable[None]) -> tuple[Counter[str], Counter[str]]:
    """What is asked of the store until the work is done, and what the registry asks of its own accord after it."""
    await settled(store)
    store.take()
    await work
    asked = store.take()
    await settled(store)
    return asked, store.take()


async def settled(store: Relay) -> None:
    """Return when the store has not been asked anything for a while: what is still to come tells nobody."""
    before = -1
    while before != store.counted.total():
        before = store.counted.total()
        await asyncio.sleep(QUIET_S)


def line_of(name: str, step: Step, counted: Counter[str]) -> str:
    cost = cost_of(counted)
    operations = ", ".join(f"{count} {operation}" for operation, count in sorted(counted.items()))
    return (
        f"{name:16} {step.value:42} {cost.requests:5} requests: {cost.writes} PUT, POST, LIST, {cost.reads} GET, HEAD, "
        f"{cost.deletes} DELETE; ${cost.usd:.6f}  ({operations})\n"
    )


# What docs/operations.md tells, and a few for what chance decides: folders of keys that a process has not met yet, a new hour.
# Whoever makes it fewer lowers both.
MOST: Final = {
    Step.PUSH: 353 + 7,
    Step.AFTER_PUSH: 1053 + 7,
    Step.PUSH_AGAIN: 72 + 3,
    Step.PUSH_BY_PUT: 311 + 7,
    Step.PULL_REDIRECTED: 36,
    Step.PULL_STREAMED: 36,
}
# Distribution looks into nothing that it stores.
COMPARED: Final = [step for step in Step if step is not Step.AFTER_PUSH]


def test_the_store_is_asked_no_more_than_documented_and_less_than_distribution_asks(
    endpoint: tuple[Buckets, Relay], tmp_path: Path
) -> None:
    kits = Kit.make("one"), Kit.make("two")

    ours = measured(Candidate("ours", OURS_ON_S3), *endpoint, kits, tmp_path)

    for step in Step:
        assert cost_of(ours[step]).requests <= MOST[step], (step, ours[step])
    if "COMPARE" not in os.environ:
        return
    candidate = distribution_on_s3()
    assert candidate is not None, "CNCF Distribution is built with Go, which is not installed"
    theirs = measured(candidate, *endpoint, kits, tmp_path)
    for step in COMPARED:
        assert cost_of(ours[step]).requests < cost_of(theirs[step]).requests, step
        assert cost_of(ours[step]).usd < cost_of(theirs[step]).usd, step
