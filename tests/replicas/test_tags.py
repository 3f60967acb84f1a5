"""A tag is a linearizable register, whichever replica is asked (INV-03), also while replicas are killed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import ClientConnectorError, ClientError, ClientSession

from tests.replicas.cluster import Cluster, running
from tests.replicas.linearizability import Dropped, Effect, Read, Recorder, Wrote, check
from tests.replicas.round_robin import raw_session

pytestmark = [pytest.mark.s3, pytest.mark.timeout(1800)]

CLIENTS = 8
TAGS = ("v1", "v2", "latest", "nightly")
OPERATIONS = int(os.environ.get("OPERATIONS", "600"))
"""`make test-replicas` has 10 000."""
KILL_EVERY = min(400, OPERATIONS // 4)
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
REPOSITORY = "/v2/team/llm"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path / "logs", replicas=3, spares=2) as cluster:
        yield cluster


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with raw_session() as session:
        yield session


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def manifest_of(number: int) -> bytes:
    """One of several that list the same blob."""
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2}
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": "application/vnd.example.tags",
        "config": config,
        "layers": [config],
        "annotations": {"number": str(number)},
    }
    return json.dumps(document).encode()


MANIFESTS = {digest_of(content): content for content in map(manifest_of, range(4))}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """Does one thing after the other, each at a replica of its choice, and records what it saw.

    Attributes:
        answered: statuses, counted over all clients.
    """

    def __init__(
        self,
        name: str,
        cluster: Cluster,
        session: ClientSession,
        recorder: Recorder,
        answered: Counter[int],
    ) -> None:
        self._name = name
        self._cluster = cluster
        self._session = session
        self._recorder = recorder
        self._chance = random.Random(name)
        self._answered = answered

    async def act(self, actions: Sequence[Callable[[Client], Awaitable[None]]]) -> None:
        await self._chance.choice(actions)(self)

    async def get(self) -> None:
        tag, start = self._chance.choice(TAGS), self._recorder.now()
        answer = await self._ask("GET", tag, {})
        if answer is None:
            return
        if answer.status == 404:
            self._recorder.ended(tag, Read(None), start=start, client=self._name)
            return
        assert answer.status == 200, answer
        assert answer.headers["Docker-Content-Digest"] == digest_of(answer.body)
        self._recorder.ended(tag, Read(digest_of(answer.body)), start=start, client=self._name)

    async def put(self) -> None:
        tag, (digest, content) = self._chance.choice(TAGS), self._chance.choice(list(MANIFESTS.items()))
        await self._change("PUT", tag, {tag: Wrote(digest)}, content)

    async def put_several(self) -> None:
        """By digest, with `tag=`: each tag by itself is set at one moment."""
        tags, (digest, content) = self._chance.sample(TAGS, 2), self._chance.choice(list(MANIFESTS.items()))
        query = "&".join(f"tag={tag}" for tag in tags)
        answer = await self._change("PUT", f"{digest}?{query}", dict.fromkeys(tags, Wrote(digest)), content)
        assert answer is None or answer.headers["OCI-Tag"].split(", ") == tags

    async def delete(self) -> None:
        tag = self._chance.choice(TAGS)
        await self._change("DELETE", tag, {tag: Wrote(None)})

    async def delete_manifest(self) -> None:
        """The tags that name it go with it."""
        digest = self._chance.choice(list(MANIFESTS))
        await self._change("DELETE", digest, dict.fromkeys(TAGS, Dropped(digest)))

    async def _change(
        self, method: str, path: str, effects: dict[str, Effect], content: bytes = b""
    ) -> Answer | None:
        start = self._recorder.now()
        answer = await self._ask(method, path, effects, content)
        if answer is None:
            return None
        if answer.status == 404:
            # A tag that is not there was looked for; a manifest that is not there says nothing of tags.
            assert method == "DELETE", answer
            effects = {path: Read(None)} if path in TAGS else {}
        else:
            assert answer.status in {201, 202}, answer
        for tag, effect in effects.items():
            self._recorder.ended(tag, effect, start=start, client=self._name)
        return answer

    async def _ask(
        self, method: str, path: str, effects: dict[str, Effect], content: bytes = b""
    ) -> Answer | None:
        """None when there was no answer; what may have been done is recorded then."""
        start = self._recorder.now()
        url = self._chance.choice(self._cluster.urls)
        headers = {"Content-Type": MANIFEST_TYPE} if content else {}
        try:
            async with self._session.request(
                method, f"{url}{REPOSITORY}/manifests/{path}", data=content or None, headers=headers
            ) as answer:
                body = await answer.read()
                self._answered[answer.status] += 1
                return Answer(answer.status, dict(answer.headers), body)
        except ClientConnectorError:
            return None  # nothing was sent
        except (ClientError, ConnectionError, TimeoutError):
            self._answered[0] += 1
            for tag, effect in effects.items():
                self._recorder.lost(tag, effect, start=start, client=self._name)
            return None


async def push_config(cluster: Cluster, session: ClientSession) -> None:
    url = f"{cluster.url}{REPOSITORY}/blobs/uploads/?digest={digest_of(b'{}')}"
    headers = {"Content-Type": "application/octet-stream"}
    async with session.post(url, data=b"{}", headers=headers) as answer:
        assert answer.status == 201


async def recorded(
    cluster: Cluster,
    session: ClientSession,
    actions: Sequence[Callable[[Client], Awaitable[None]]],
    *,
    kill_every: int | None = None,
) -> tuple[Recorder, Counter[int]]:
    """`OPERATIONS` of `CLIENTS`, and the statuses that they got, where 0 stands for no answer.

    Args:
        kill_every: so many operations one replica is killed, and another one takes its place.
    """
    await push_config(cluster, session)
    recorder, answered = Recorder(), Counter[int]()
    chance = random.Random(0)

    async def work(name: str) -> None:
        client = Client(name, cluster, session, recorder, answered)
        while len(recorder.history) < OPERATIONS:
            await client.act(actions)

    async def kill() -> None:
        killed_at = 0
        while kill_every is not None and len(recorder.history) < OPERATIONS:
            if len(recorder.history) >= killed_at + kill_every:
                killed_at = len(recorder.history)
                place = chance.randrange(len(cluster))
                cluster.kill(place)
                await asyncio.to_thread(cluster.start, place)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(work(f"client {number}"))
        tasks.create_task(kill())
    return recorder, answered


PUTS_AND_DELETES = (*[Client.get] * 5, *[Client.put] * 3, Client.put_several, Client.delete)


async def test_tags_are_linearizable_across_replicas(cluster: Cluster, session: ClientSession) -> None:
    recorder, answered = await recorded(cluster, session, PUTS_AND_DELETES)

    assert set(answered) == {200, 201, 202, 404}
    await asyncio.to_thread(check, recorder.history)


async def test_tags_are_linearizable_while_replicas_are_killed(
    cluster: Cluster, session: ClientSession
) -> None:
    recorder, answered = await recorded(cluster, session, PUTS_AND_DELETES, kill_every=KILL_EVERY)

    assert answered[0] > 0
    await asyncio.to_thread(check, recorder.history)


async def test_tags_are_linearizable_while_manifests_are_deleted(
    cluster: Cluster, session: ClientSession
) -> None:
    recorder, answered = await recorded(cluster, session, (*PUTS_AND_DELETES, Client.delete_manifest))

    assert set(answered) == {200, 201, 202, 404}
    await asyncio.to_thread(check, recorder.history)
