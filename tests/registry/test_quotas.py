"""Quotas: what is refused, with which numbers, and that what was counted is what is there."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kitspec.digest import Digest
from kitspec.errors import Denied
from kitspec.names import RepositoryName, Tag
from registry.config import Config, Quota
from registry.config_sources import ConfigInvalid
from registry.journal import Change
from registry.quotas import QuotaRegistry
from registry.upload_sessions import UploadSessions
from storage_backends.memory import MemoryBackend

LLM, OTHER, FREE = (RepositoryName(text) for text in ("team/llm", "team/other", "free/llm"))
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
async def backend() -> AsyncIterator[MemoryBackend]:
    backend = MemoryBackend()
    await backend.start()
    yield backend
    await backend.close()


def registry(backend: MemoryBackend, **quota: Any) -> QuotaRegistry:
    """A worker on `backend`: what several have in common is the store."""
    quotas = [Quota.model_validate({"repositories": "team/**", **quota})]
    sessions = UploadSessions(backend, count_max=100, per_repository_max=100, size_max=None)
    return QuotaRegistry(backend, sessions, allow_sparse=True, quotas=quotas)


async def push(worker: QuotaRegistry, name: RepositoryName, content: bytes) -> Digest:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    digest = Digest.of(content)
    upload = await worker.begin_upload(name)
    await upload.append(chunks())
    await upload.commit(digest)
    return digest


async def tag(worker: QuotaRegistry, name: RepositoryName, *tags: str) -> Digest:
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": str(Digest.of(b"{}")), "size": 2}
    content = json.dumps(
        {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": empty, "layers": []}
    ).encode()
    names = tuple(Tag(text) for text in tags)
    return (await worker.put_manifest(name, content, MANIFEST_TYPE, tags=names)).digest


async def test_INV_17_a_blob_too_many_is_denied_with_the_numbers(backend: MemoryBackend) -> None:
    worker = registry(backend, size=10)
    await push(worker, LLM, b"123456")

    with pytest.raises(Denied) as denied:
        await push(worker, OTHER, b"abcde")

    assert denied.value.status == 403
    assert "may hold 10 bytes and hold 6; 5 more are too many: delete" in str(denied.value)
    assert denied.value.detail == {"quota": 10, "used": 6, "requested": 5}


async def test_a_quota_can_be_used_to_the_last_byte_and_other_repositories_are_free(
    backend: MemoryBackend,
) -> None:
    worker = registry(backend, size=10)

    await push(worker, LLM, b"123456")
    await push(worker, LLM, b"1234")
    await push(worker, FREE, b"x" * 100)


async def test_what_is_there_already_can_be_pushed_again(backend: MemoryBackend) -> None:
    worker = registry(backend, size=6)
    await push(worker, LLM, b"123456")

    await push(worker, LLM, b"123456")


async def test_a_mount_counts_as_a_push_does(backend: MemoryBackend) -> None:
    worker = registry(backend, size=6)
    digest = await push(worker, FREE, b"1234567")

    with pytest.raises(Denied):
        await worker.mount_blob(LLM, digest, source=FREE)


async def test_a_tag_too_many_is_denied_and_nothing_is_stored(backend: MemoryBackend) -> None:
    worker = registry(backend, tags=2)
    await tag(worker, LLM, "v1")

    with pytest.raises(Denied, match="may have 2 tags and have 1; 2 more are too many"):
        await tag(worker, OTHER, "v2", "v3")
    await tag(worker, LLM, "v1", "v2")

    assert [str(found) async for found in worker.tags(LLM)] == ["v1", "v2"]


async def test_deleting_makes_room(backend: MemoryBackend) -> None:
    worker = registry(backend, size=6, tags=1)
    digest = await push(worker, LLM, b"123456")
    await tag(worker, LLM, "v1")

    await worker.delete_blob(LLM, digest)
    await worker.delete_manifest(LLM, Tag("v1"))

    await push(worker, LLM, b"654321")
    await tag(worker, LLM, "v2")


async def test_INV_14_a_worker_that_begins_counts_what_is_there(backend: MemoryBackend) -> None:
    await push(registry(backend, size=6), LLM, b"1234")

    with pytest.raises(Denied, match="hold 4; 3 more"):
        await push(registry(backend, size=6), LLM, b"abc")


async def test_what_the_journal_tells_of_another_worker_counts(backend: MemoryBackend) -> None:
    one, two = registry(backend, size=6), registry(backend, size=6)
    await push(one, LLM, b"1")
    await push(two, OTHER, b"1234")
    await one.refresh(Change("push", OTHER))

    with pytest.raises(Denied, match="hold 5; 2 more"):
        await push(one, LLM, b"ab")


async def test_nobody_is_refused_for_what_another_has_deleted_and_nobody_told_of(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.quotas.RECOUNT_S", -1.0)
    one, two = registry(backend, size=6), registry(backend, size=6)
    digest = await push(one, LLM, b"1234")
    await push(one, OTHER, b"12")
    await two.delete_blob(LLM, digest)

    await push(one, OTHER, b"abcd")


async def test_pushes_at_once_exceed_nothing_in_one_worker(backend: MemoryBackend) -> None:
    worker = registry(backend, size=10)

    results = await asyncio.gather(
        *(push(worker, LLM, bytes([number]) * 3) for number in range(8)), return_exceptions=True
    )

    assert sum(isinstance(result, Digest) for result in results) == 3
    assert sum(isinstance(result, Denied) for result in results) == 5


@pytest.mark.parametrize(
    "quota",
    [
        {"repositories": "team/**"},
        {"repositories": "", "tags": 1},
        {"repositories": "../x", "tags": 1},
        {"repositories": "team/**", "size": 0},
        {"repositories": "team/**", "tags": 0},
        {"tags": 1},
    ],
)
def test_a_quota_that_says_nothing_is_refused(quota: dict[str, Any]) -> None:
    with pytest.raises((ConfigInvalid, ValueError), match="quotas"):
        Config.model_validate({"quotas": [quota]})
