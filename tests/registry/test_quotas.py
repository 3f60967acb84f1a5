"""Quotas: what is refused, with which numbers, and that what was counted is what is there. On every kind of store."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.errors import BlobUploadUnknown, Denied, DigestInvalid, Unavailable, UploadOutOfOrder
from kitspec.names import RepositoryName, Tag
from registry import layout
from registry.config import Config, Quota
from registry.config_sources import ConfigInvalid
from registry.hosted import HostedUpload
from registry.journal import Change
from registry.namespaces import UploadedBytes
from registry.quotas import QuotaRegistry
from registry.upload_sessions import UploadSessions
from storage_backends.interface import ObjectInfo, StorageBackend, StorageUnavailable
from storage_backends.local import LocalBackend
from storage_backends.memory import MemoryBackend
from storage_backends.s3 import S3Backend
from tests.registry.conftest import Serve, configured, served
from tests.registry.wire import Wire, assert_refused
from tests.storage_backends.s3_server import Buckets, object_store

LLM, OTHER, FREE = (RepositoryName(text) for text in ("team/llm", "team/other", "free/llm"))
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture(scope="module")
def buckets() -> Iterator[Buckets]:
    with object_store() as buckets:
        yield buckets


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.s3)])
def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], StorageBackend]:
    if request.param == "memory":
        return MemoryBackend
    if request.param == "local":
        return lambda: LocalBackend(tmp_path / "registry", durable=False)
    bucket = request.getfixturevalue("buckets").new()
    return lambda: S3Backend(bucket)


@pytest.fixture
async def backend(opening: Callable[[], StorageBackend]) -> AsyncIterator[StorageBackend]:
    backend = opening()
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
def is_counted_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker counted is old at once, as it is after some seconds."""
    monkeypatch.setattr("registry.namespaces.RECOUNT_S", -1.0)
    monkeypatch.setattr("registry.namespaces._LISTING_SHARE", 0)


def registry(backend: StorageBackend, **quota: Any) -> QuotaRegistry:
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


async def test_INV_17_a_blob_too_many_is_denied_with_the_numbers(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)
    await push(worker, LLM, b"123456")

    with pytest.raises(Denied) as denied:
        await push(worker, OTHER, b"abcde")

    assert denied.value.status == 403
    assert "may hold 10 bytes and hold 6; 5 more are too many: delete" in str(denied.value)
    assert denied.value.detail == {"quota": 10, "used": 6, "uploading": 0, "requested": 5}


async def test_a_quota_can_be_used_to_the_last_byte_and_other_repositories_are_free(
    backend: StorageBackend,
) -> None:
    worker = registry(backend, size=10)

    await push(worker, LLM, b"123456")
    await push(worker, LLM, b"1234")
    await push(worker, FREE, b"x" * 100)


async def test_what_is_pushed_again_counts_once(backend: StorageBackend) -> None:
    worker = registry(backend, size=12)

    await push(worker, LLM, b"123456")
    await push(worker, LLM, b"123456")
    await push(worker, LLM, b"654321")


async def test_a_mount_counts_as_a_push_does(backend: StorageBackend) -> None:
    worker = registry(backend, size=6)
    digest = await push(worker, FREE, b"1234567")

    with pytest.raises(Denied):
        await worker.mount_blob(LLM, digest, source=FREE)


async def test_a_tag_too_many_is_denied_and_nothing_is_stored(backend: StorageBackend) -> None:
    worker = registry(backend, tags=2)
    await tag(worker, LLM, "v1")

    with pytest.raises(Denied, match="may have 2 tags and have 1; 2 more are too many"):
        await tag(worker, OTHER, "v2", "v3")
    await tag(worker, LLM, "v1", "v2")

    assert [str(found) async for found in worker.tags(LLM)] == ["v1", "v2"]


async def test_deleting_makes_room(backend: StorageBackend) -> None:
    worker = registry(backend, size=6, tags=1)
    digest = await push(worker, LLM, b"123456")
    await tag(worker, LLM, "v1")

    await worker.delete_blob(LLM, digest)
    await worker.delete_manifest(LLM, Tag("v1"))

    await push(worker, LLM, b"654321")
    await tag(worker, LLM, "v2")


async def test_INV_14_a_worker_that_begins_counts_what_is_there(backend: StorageBackend) -> None:
    await push(registry(backend, size=6), LLM, b"1234")

    with pytest.raises(Denied, match="hold 4; 3 more"):
        await push(registry(backend, size=6), LLM, b"abc")


@pytest.mark.parametrize("fails_at", range(4))
async def test_INV_14_a_count_that_failed_half_way_is_made_again(
    backend: StorageBackend, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """The catalogue, the links and the tags of the first repository, and the links of the second."""
    await push(registry(backend, size=6), LLM, b"123")
    await push(registry(backend, size=6), OTHER, b"456")
    worker, calls = registry(backend, size=6), iter(range(100))
    whole = type(backend).list

    def failing(self: StorageBackend, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        if next(calls) == fails_at:
            raise StorageUnavailable("gone for a moment")
        return whole(self, prefix, after=after)

    monkeypatch.setattr(type(backend), "list", failing)
    with pytest.raises(Unavailable):
        await push(worker, LLM, b"1")

    with pytest.raises(Denied, match="hold 6; 1 more"):
        await push(worker, LLM, b"1")


async def test_what_the_journal_tells_of_another_worker_counts(backend: StorageBackend) -> None:
    one, two = registry(backend, size=6), registry(backend, size=6)
    await push(one, LLM, b"1")
    await push(two, OTHER, b"1234")
    await one.refresh(Change("push", OTHER))

    with pytest.raises(Denied, match="hold 5; 2 more"):
        await push(one, LLM, b"ab")


@pytest.mark.usefixtures("is_counted_each_time")
async def test_nobody_is_refused_for_what_another_has_deleted_and_nobody_told_of(
    backend: StorageBackend,
) -> None:
    one, two = registry(backend, size=6), registry(backend, size=6)
    digest = await push(one, LLM, b"1234")
    await push(one, OTHER, b"12")
    await two.delete_blob(LLM, digest)

    await push(one, OTHER, b"abcd")


async def test_pushes_at_once_exceed_nothing_in_one_worker(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)

    results = await asyncio.gather(
        *(push(worker, LLM, bytes([number]) * 3) for number in range(8)), return_exceptions=True
    )

    assert sum(isinstance(result, Digest) for result in results) == 3
    assert sum(isinstance(result, Denied) for result in results) == 5


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def opened(worker: QuotaRegistry, name: RepositoryName, *pieces: bytes) -> HostedUpload:
    """An upload that has received something, and is not closed."""
    upload = await worker.begin_upload(name)
    await upload.append(chunks(*pieces))
    return upload


async def received(backend: StorageBackend) -> int:
    """Bytes that open uploads take up."""
    return sum([upload.offset async for upload in backend.uploads()])


async def stored(backend: StorageBackend) -> int:
    """Bytes of content, whoever may read it."""
    return sum([info.size async for info in backend.list(layout.BLOBS)])


async def test_what_an_open_upload_has_received_counts_with_the_numbers(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)
    await push(worker, LLM, b"1")
    await opened(worker, LLM, b"12345")

    with pytest.raises(Denied) as denied:
        await push(worker, OTHER, b"abcde")

    assert "may hold 10 bytes and hold 6, 5 of them in open uploads; 5 more are too many" in str(denied.value)
    assert "finish or cancel uploads" in str(denied.value)
    assert denied.value.detail == {"quota": 10, "used": 6, "uploading": 5, "requested": 5}
    await push(worker, FREE, b"x" * 100)


async def test_a_hundred_open_uploads_hold_no_more_than_the_quota(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)

    results = await asyncio.gather(
        *(opened(worker, LLM, b"1", b"2", b"3") for _ in range(100)), return_exceptions=True
    )

    assert all(isinstance(result, HostedUpload | Denied) for result in results)
    assert 0 < await received(backend) <= 10


async def test_what_is_announced_counts_before_it_has_come(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)
    goes_on, has_begun = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        has_begun.set()
        await goes_on.wait()
        yield b"12345678"

    upload = await worker.begin_upload(LLM)
    appending = asyncio.create_task(upload.append(slow(), size=8))
    await has_begun.wait()
    with pytest.raises(Denied, match="hold 8, 8 of them in open uploads; 3 more"):
        await push(worker, OTHER, b"abc")
    goes_on.set()
    await appending
    await upload.commit(Digest.of(b"12345678"))

    await push(worker, OTHER, b"ab")


async def test_what_was_announced_and_never_came_is_given_back(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)

    async def cut_off() -> AsyncIterator[bytes]:
        yield b"12"
        raise ConnectionResetError

    upload = await worker.begin_upload(LLM)
    with pytest.raises(ConnectionResetError):
        await upload.append(cut_off(), size=10)

    await push(worker, OTHER, b"12345678")


async def test_what_is_refused_for_another_reason_is_given_back(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)
    upload = await worker.begin_upload(LLM)

    with pytest.raises(UploadOutOfOrder):
        await upload.append(chunks(b"12345678"), at=3, size=8)
    with pytest.raises(UploadOutOfOrder):
        await upload.append(chunks(b"x" * 100), at=3, size=100)  # nor is it the end of the upload
    await upload.append(chunks(b"12345678"), size=8)
    with pytest.raises(DigestInvalid):
        await upload.commit(Digest.of(b"something else"))

    await push(worker, OTHER, b"1234567890")


async def test_a_cancelled_upload_gives_back_at_once(backend: StorageBackend) -> None:
    worker = registry(backend, size=10)
    upload = await opened(worker, LLM, b"12345678")

    await upload.cancel()

    await push(worker, OTHER, b"1234567890")


@pytest.mark.usefixtures("is_counted_each_time")
async def test_open_uploads_of_another_worker_count_and_expired_ones_give_back(
    backend: StorageBackend,
) -> None:
    """Also in a repository that this worker never heard of, and that is in no catalogue."""
    one, two = registry(backend, size=10), registry(backend, size=10)
    await opened(one, LLM, b"12345678")

    with pytest.raises(Denied, match="hold 8, 8 of them in open uploads; 3 more"):
        await push(two, OTHER, b"abc")
    await one.sessions.expire(now=backend.now() + 100, age_s=10)

    await push(two, OTHER, b"1234567890")


async def test_where_bytes_are_not_limited_nothing_is_counted_on_their_way(backend: StorageBackend) -> None:
    for worker, name in ((registry(backend, tags=1), LLM), (registry(backend, size=1), FREE)):
        assert type(await worker.begin_upload(name)) is HostedUpload


@pytest.mark.usefixtures("is_counted_each_time")
async def test_uploads_outside_the_namespace_do_not_count(backend: StorageBackend) -> None:
    one, two = registry(backend, size=10), registry(backend, size=10)
    await opened(one, FREE, b"x" * 100)

    await push(two, LLM, b"1234567890")


@pytest.mark.parametrize("is_announced", [True, False])
async def test_INV_17_the_bytes_of_a_refused_blob_are_freed_at_once(
    backend: StorageBackend, is_announced: bool
) -> None:
    worker = registry(backend, size=10)
    upload = await opened(worker, LLM, b"123456")

    with pytest.raises(Denied):
        await upload.append(chunks(b"abc", b"def"), size=6 if is_announced else None)

    assert await received(backend) == await stored(backend) == 0
    with pytest.raises(BlobUploadUnknown):
        await worker.resume_upload(LLM, upload.location)
    await push(worker, LLM, b"1234567890")


async def both_received(first: HostedUpload, second: HostedUpload) -> list[int | BaseException]:
    """Eight bytes of each, at the same time, so that none of them sees the other's in the store."""
    both_have_begun = asyncio.Barrier(2)

    async def together(content: bytes) -> AsyncIterator[bytes]:
        await both_have_begun.wait()
        yield content

    return await asyncio.gather(
        first.append(together(b"12345678"), size=8),
        second.append(together(b"abcdefgh"), size=8),
        return_exceptions=True,
    )


async def test_INV_17_what_workers_took_in_at_once_is_refused_when_it_is_closed_and_freed(
    backend: StorageBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = registry(backend, size=10), registry(backend, size=10)
    first, second = await one.begin_upload(LLM), await two.begin_upload(OTHER)
    assert await both_received(first, second) == [8, 8]
    monkeypatch.setattr("registry.namespaces.RECOUNT_S", -1.0)
    one.forget()
    two.forget()

    with pytest.raises(Denied, match="hold 8, 8 of them in open uploads; 8 more"):
        await first.commit(Digest.of(b"12345678"))
    await second.commit(Digest.of(b"abcdefgh"))

    assert await received(backend) == 0
    assert await stored(backend) == 8


@pytest.mark.usefixtures("is_counted_each_time")
async def test_INV_17_what_workers_took_in_for_long_is_refused_when_it_has_come_and_freed(
    backend: StorageBackend,
) -> None:
    """Also if nobody ever closes it."""
    one, two = registry(backend, size=10), registry(backend, size=10)
    first, second = await one.begin_upload(LLM), await two.begin_upload(OTHER)

    results = await both_received(first, second)

    # Each may have seen the other's; that none did cannot be.
    assert any(isinstance(result, Denied) for result in results)
    assert await received(backend) <= 8


async def test_a_link_that_is_there_may_be_closed_again_though_the_quota_became_smaller(
    backend: StorageBackend,
) -> None:
    before = registry(backend, size=100)
    await push(before, LLM, b"1234567890")
    upload = await opened(before, LLM, b"1234567890")
    now = registry(backend, size=5)

    await (await now.resume_upload(LLM, upload.location)).commit(Digest.of(b"1234567890"))

    upload = await opened(before, LLM, b"abcdefghij")
    with pytest.raises(Denied):
        await (await now.resume_upload(LLM, upload.location)).commit(Digest.of(b"abcdefghij"))
    assert await received(backend) == 0


async def test_nothing_is_left_counted_when_all_is_over(backend: StorageBackend) -> None:
    worker = registry(backend, size=40, tags=5)
    names = (LLM, OTHER)

    async def one(number: int) -> None:
        upload = await worker.begin_upload(names[number % 2])
        content = bytes([number]) * (number % 7)
        with contextlib.suppress(Denied, DigestInvalid, UploadOutOfOrder):
            await upload.append(chunks(content), size=len(content) if number % 3 else None)
            if number % 5 == 0:
                await upload.cancel()
                return
            await upload.commit(Digest.of(content if number % 4 else b"else"))

    await asyncio.gather(*(one(number) for number in range(40)))

    for namespace in worker.namespaces_of(LLM):
        assert namespace._uploaded.total == await received(backend) == 0


Step = tuple[str, int, int]


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["begin", "reserve", "give back", "settle", "end", "list"]),
            st.integers(0, 3),
            st.integers(0, 20),
        )
    )
)
def test_bytes_in_flight_are_those_of_offsets_and_of_reservations(steps: list[Step]) -> None:
    uploaded = UploadedBytes()
    reserved: dict[str, int] = {}
    for step, number, size in steps:
        upload = str(number)
        match step:
            case "begin":
                uploaded.begin(upload, size)
                reserved.setdefault(upload, 0)
            case "reserve" if upload in reserved:
                before = uploaded.total
                assert uploaded.reserve(upload, size, total_max=50) == (size == 0 or before + size <= 50)
                reserved[upload] += uploaded.total - before
            case "give back" if upload in reserved:
                uploaded.give_back(upload, reserved[upload])
                reserved[upload] = 0
            case "settle" | "end" if upload in reserved:
                uploaded.settle(upload, reserved.pop(upload), size if step == "settle" else None)
            case "list":
                uploaded.begin_listing()
                uploaded.take_list({upload: size})
        assert uploaded.total == sum(uploaded._offsets.values()) + sum(reserved.values())


def test_an_upload_that_ends_while_it_is_listed_has_ended() -> None:
    uploaded = UploadedBytes()
    uploaded.begin("a", 0)
    uploaded.begin("b", 0)
    uploaded.begin_listing()
    uploaded.settle("a", 0, None)
    uploaded.settle("b", 0, 7)

    uploaded.take_list({"a": 5, "b": 0, "c": 1})

    assert (uploaded.of("a"), uploaded.of("b"), uploaded.of("c"), uploaded.total) == (0, 7, 1, 8)


def test_what_a_store_shows_of_an_append_that_goes_on_does_not_count_twice() -> None:
    uploaded = UploadedBytes()
    uploaded.begin("a", 3)
    uploaded.reserve("a", 10, total_max=100)
    uploaded.begin_listing()

    uploaded.take_list({"a": 8})

    assert uploaded.total == 13


QUOTA = [{"repositories": "lib/**", "size": "1MB"}]


async def refuses_what_is_too_much(wire: Wire) -> None:
    """By every way in; and the registry goes on as if nothing had been sent."""
    held = await wire.push_blob("lib/a", bytes(400_000))
    large = bytes(700_000)
    digest = Digest.of(large)
    pieces = [large[start : start + 50_000] for start in range(0, len(large), 50_000)]
    for body in (large, pieces):
        upload = await wire.begin_upload("lib/a")
        assert_refused(await wire("PATCH", upload, body=body), 403, code="DENIED")
        assert_refused(await wire("GET", upload), 404, code="BLOB_UPLOAD_UNKNOWN")
        upload = await wire.begin_upload("lib/a")
        assert_refused(await wire("PUT", f"{upload}?digest={digest}", body=body), 403, code="DENIED")
        assert_refused(await wire("GET", upload), 404, code="BLOB_UPLOAD_UNKNOWN")
        target = f"/v2/lib/a/blobs/uploads/?digest={digest}"
        assert_refused(await wire("POST", target, body=body), 403, code="DENIED")
    await wire.push_blob("free/a", large)
    mount = f"/v2/lib/a/blobs/uploads/?mount={digest}&from=free/a"
    assert_refused(await wire("POST", mount), 403, code="DENIED")

    assert (await wire("GET", f"/v2/lib/a/blobs/{held}")).body == bytes(400_000)
    assert (await wire("HEAD", f"/v2/lib/a/blobs/{digest}")).status == 404
    await wire.push_blob("lib/b", bytes(600_000))


async def test_INV_17_what_is_too_much_is_403_and_gone_by_every_way_in(serve: Serve) -> None:
    async with serve(quotas=QUOTA) as url:
        await refuses_what_is_too_much(Wire(url))


@pytest.mark.s3
async def test_INV_17_what_is_too_much_is_403_and_gone_by_every_way_into_s3(buckets: Buckets) -> None:
    bucket = buckets.new()
    section = {
        "bucket": bucket.bucket,
        "regionendpoint": bucket.endpoint,
        "accesskey": bucket.access_key,
        "secretkey": bucket.secret_key,
    }
    async with served(configured({"s3": section}, quotas=QUOTA)) as url:
        await refuses_what_is_too_much(Wire(url))


@pytest.mark.parametrize("is_announced", [True, False])
async def test_pushes_at_once_over_http_hold_no_more_than_the_quota(serve: Serve, is_announced: bool) -> None:
    """From as many threads as read bodies, and by way of the event loop."""
    async with serve(quotas=QUOTA) as url:
        wire = Wire(url)
        uploads = [await wire.begin_upload(f"lib/{number % 3}") for number in range(24)]
        body = bytes(600_000) if is_announced else [bytes(20_000)] * 30

        replies = await asyncio.gather(*(wire("PATCH", upload, body=body) for upload in uploads))

        taken = [reply for reply in replies if reply.status == 202]
        assert len(taken) <= 1
        for reply in replies:
            if reply.status != 202:
                assert_refused(reply, 403, code="DENIED")
        open_still = [await wire("GET", upload) for upload in uploads]
        assert [reply.status for reply in open_still].count(204) == len(taken)
        await wire.push_blob("lib/a", bytes(1_000_000 - 600_000 * len(taken)))


async def test_what_is_announced_and_too_much_is_403_before_it_is_sent(serve: Serve) -> None:
    async with serve(quotas=QUOTA) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        fields = "Host: x\r\nConnection: close\r\nContent-Length: 1000001\r\nExpect: 100-continue\r\n"

        answer = await wire.first_answer(f"PATCH {upload} HTTP/1.1\r\n{fields}\r\n".encode())

        assert answer.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    "quota",
    [
        {"repositories": "team/**"},
        {"repositories": "", "tags": 1},
        {"repositories": "../x", "tags": 1},
        {"repositories": "Team/**", "tags": 1},
        {"repositories": "a//b", "tags": 1},
        {"repositories": "{a,b}/**", "tags": 1},
        {"repositories": "team/**", "size": 0},
        {"repositories": "team/**", "tags": 0},
        {"tags": 1},
    ],
)
def test_a_quota_that_says_nothing_or_of_nothing_is_refused(quota: dict[str, Any]) -> None:
    with pytest.raises((ConfigInvalid, ValueError), match="quotas"):
        Config.model_validate({"quotas": [quota]})
