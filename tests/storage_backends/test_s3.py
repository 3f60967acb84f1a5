"""What S3Backend promises beyond the contract: several processes, stores and networks that are not well, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from kitspec.digest import Digest
from kitspec.errors import BlobUploadUnknown, UploadOutOfOrder
from kitspec.interface import OciRegistry
from kitspec.names import RepositoryName
from registry import layout
from registry.app import services_of
from registry.upload_sessions import UploadSessions
from storage_backends import s3, s3_parts, s3_sweep
from storage_backends.interface import (
    ByteStream,
    ObjectDamaged,
    ObjectInfo,
    ObjectMissing,
    PreconditionFailed,
    Span,
    StorageBackend,
    StorageUnavailable,
    UploadBusy,
    UploadMissing,
    UploadOvertaken,
)
from storage_backends.s3 import S3Backend
from storage_backends.s3_client import S3Client, S3Settings
from storage_backends.s3_delivery import _DRAINERS
from storage_backends.s3_format import (
    DATA,
    PROBES,
    TRASH,
    UPLOADS,
    Segment,
    data_id,
    mark_of_data,
    new_data_key,
    pointer_to_bytes,
    record_to_bytes,
    trash_to_bytes,
    upload_mark,
)
from storage_backends.s3_parts import segment_size_of
from storage_backends.s3_records import Records
from storage_backends.s3_sweep import _Run
from tests.contracts.registry_contract import RegistryContract
from tests.contracts.storage_contract import (
    Gathering,
    Stalled,
    StorageContract,
    append,
    bytes_of,
    chunks_of,
    content_of,
    drain,
    drained_from,
    ignore,
    keys_of,
    said,
    store_content,
)
from tests.registry.conftest import configured, served
from tests.registry.wire import Wire
from tests.storage_backends.s3_faults import Fault, FaultyStore, Request, at_random, faulty
from tests.storage_backends.s3_server import Buckets, object_store

pytestmark = pytest.mark.s3

MIB = 1024 * 1024


@pytest.fixture(scope="session")
def buckets() -> Iterator[Buckets]:
    with object_store() as buckets:
        yield buckets


@pytest.fixture
def settings(buckets: Buckets) -> S3Settings:
    """A bucket of the test's own."""
    return buckets.new()


@asynccontextmanager
async def opened(settings: S3Settings, **options: Any) -> AsyncIterator[S3Backend]:
    backend = S3Backend(settings, **options)
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()
        await backend.close()


@pytest.fixture
async def backend(settings: S3Settings) -> AsyncIterator[StorageBackend]:
    async with opened(settings) as backend:
        yield backend


@pytest.fixture
async def other(settings: S3Settings) -> AsyncIterator[StorageBackend]:
    """Another process on the same bucket, as far as the backend can tell."""
    async with opened(settings) as backend:
        yield backend


@pytest.fixture
async def store(settings: S3Settings) -> AsyncIterator[FaultyStore]:
    assert settings.endpoint is not None
    async with faulty(settings.endpoint) as store:
        yield store


@pytest.fixture
async def shaky(settings: S3Settings, store: FaultyStore) -> AsyncIterator[StorageBackend]:
    """A backend that reaches its store through a proxy that does as the test says."""
    async with opened(replace(settings, endpoint=store.url, retry_timeout_s=10)) as backend:
        yield backend
        store.rule = lambda _: None


@pytest.fixture
def client(settings: S3Settings) -> Iterator[S3Client]:
    """For what others do to the bucket. It blocks: call it in a thread."""
    client = S3Client(settings, connections=1)
    yield client
    client.close()


@pytest.fixture
def in_bucket(client: S3Client) -> Callable[[], Awaitable[list[str]]]:
    """All keys that the bucket has, those of the backend too."""

    async def keys() -> list[str]:
        entries, _ = await asyncio.to_thread(client.list, "")
        return [entry.key for entry in entries]

    return keys


async def swept(backend: StorageBackend, *, age_s: float = 0, dry_run: bool = False) -> list[str]:
    return [leftover.name async for leftover in backend.sweep(age_s=age_s, dry_run=dry_run)]


def puts_record(request: Request) -> bool:
    return request.method == "PUT" and not request.is_internal


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


class TestS3(StorageContract):
    pass


class TestS3ThroughFaults(StorageContract):
    """What may be sent again is, and nobody sees it."""

    @pytest.fixture
    async def backend(self, shaky: StorageBackend, store: FaultyStore) -> StorageBackend:
        no_effect = at_random(1, 0.06, (Fault.SLOW_DOWN, Fault.CONFLICT))
        doubtful = at_random(
            2, 0.06, (Fault.CUT, Fault.LOSES_ANSWER, Fault.TRUNCATES, Fault.ERROR_IN_200, Fault.FAILS)
        )

        def rule(request: Request) -> Fault | None:
            # A record that others write too may be left in doubt: the tests below are about that.
            return no_effect(request) or (None if puts_record(request) else doubtful(request))

        store.rule = rule
        return shaky


class TestRegistryOnS3(RegistryContract):
    """The settings reach the backend, and the registry keeps its promises on it."""

    @pytest.fixture
    async def registry(self, settings: S3Settings) -> AsyncIterator[OciRegistry]:
        async with services_of(configured({"s3": section_of(settings)})) as services:
            yield services.registry


def section_of(settings: S3Settings) -> dict[str, Any]:
    """The `storage.s3` section of a registry's configuration."""
    return {
        "bucket": settings.bucket,
        "regionendpoint": settings.endpoint,
        "rootdirectory": "/team/registry",
        "accesskey": settings.access_key,
        "secretkey": settings.secret_key,
        "chunksize": "5MiB",
    }


async def test_a_registry_streams_large_blobs_whole_and_in_ranges_to_many_at_once(
    settings: S3Settings,
) -> None:
    content = random_bytes(40 * MIB + 1)
    storage = {"s3": {**section_of(settings), "segmentsize": "32MiB"}, "redirect": {"disable": True}}
    async with served(configured(storage)) as url:
        wire = Wire(url)
        target = f"/v2/lib/a/blobs/{await wire.push_blob('lib/a', content)}"

        async def pull(start: int) -> bool:
            reply = await wire("GET", target, headers={"Range": f"bytes={start}-"})
            return (reply.status, reply.body) == (206, content[start:])

        assert (await wire("GET", target)).body == content
        assert (await wire("HEAD", target)).header("Content-Length") == str(len(content))
        starts = [*range(1, 34 * MIB, 3 * MIB), len(content) - 1, len(content) - 300_000]
        assert all(await asyncio.gather(*map(pull, starts)))


@pytest.mark.parametrize("way", ["PUT", "POST"])
async def test_a_blob_whose_digest_is_wrong_leaves_nothing_in_the_bucket(
    settings: S3Settings, client: S3Client, way: str
) -> None:
    storage = {"s3": {**section_of(settings), "segmentsize": "32MiB"}, "redirect": {"disable": True}}
    wrong = f"digest=sha256:{'0' * 64}"
    async with served(configured(storage)) as url:
        wire = Wire(url)
        path = "/v2/lib/a/blobs/uploads/" if way == "POST" else await wire.begin_upload("lib/a")

        reply = await wire(way, f"{path}?{wrong}", body=random_bytes(42 * MIB))

        assert reply.status == 400
    entries, _ = await asyncio.to_thread(client.list, "team/registry/_store/")
    assert entries == []


# -- what an object looks like


@pytest.mark.parametrize("size", [0, 1, 479, 512 - 32, 481, 1024 - 32, 5000])
async def test_a_listing_tells_what_stat_tells_of_records_and_content(
    backend: StorageBackend, size: int
) -> None:
    await backend.write("record", bytes(size))
    await store_content(backend, "content", bytes(size))

    infos = [info async for info in backend.list("")]

    assert infos == [await backend.stat("content"), await backend.stat("record")]
    assert [info.size for info in infos] == [size, size]


async def test_content_can_be_read_as_a_record_and_a_record_delivered(backend: StorageBackend) -> None:
    await backend.write("record", b"0123456789")
    await store_content(backend, "content", b"0123456789")

    for key in ("record", "content"):
        assert (await backend.read(key, size_max=10))[0] == b"0123456789"
        assert await content_of(backend, key, Span(2, 5)) == b"234"


async def test_everything_lies_below_the_prefix(
    settings: S3Settings, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    async with opened(replace(settings, prefix="team/registry/")) as backend:
        await backend.write("record", b"1")
        await store_content(backend, "content", b"2")
        assert await keys_of(backend) == ["content", "record"]
        assert await keys_of(backend, after="content") == ["record"]

    assert {key[:14] for key in await in_bucket()} == {"team/registry/"}


async def test_an_object_that_others_put_there_is_an_error_that_names_it(
    backend: StorageBackend, client: S3Client
) -> None:
    await asyncio.to_thread(client.put, "stray", b"x" * 99)

    with pytest.raises(
        ObjectDamaged, match="stray in the bucket is damaged, or was not written by"
    ) as refused:
        await backend.stat("stray")

    assert (refused.value.info.key, refused.value.info.size) == ("stray", 99)


@pytest.mark.parametrize("size", [0, 5, 512, 1024])
async def test_an_object_of_others_is_listed_with_the_size_that_it_has(
    backend: StorageBackend, client: S3Client, size: int
) -> None:
    await asyncio.to_thread(client.put, "stray", b"x" * size)

    assert [(info.key, info.size) async for info in backend.list("")] == [("stray", size)]


async def test_content_is_kept_below_its_prefix_only(settings: S3Settings) -> None:
    async with opened(settings, content_prefix="blobs/") as backend:
        upload = await backend.begin_upload("u")
        with pytest.raises(ValueError, match="'x' is not below 'blobs/', where content is kept"):
            await upload.commit("x")

        await upload.commit("blobs/x")


async def test_a_folder_that_comes_and_goes_below_a_store_over_files_disturbs_no_writer(
    backend: StorageBackend, client: S3Client
) -> None:
    records = Records(client)

    def come_and_go(name: str) -> None:
        for index in range(100):
            key = f"a/deep/folder/{name}-{index}"
            records.write(key, *record_to_bytes(b"1"), expect="")
            records.look(key)
            client.again(lambda key=key: client.delete(key))  # type: ignore[misc]

    await asyncio.gather(*(asyncio.to_thread(come_and_go, name) for name in ("a", "b", "c", "d")))

    assert await keys_of(backend) == []


# -- content


async def test_content_of_many_parts_and_several_objects_is_one(settings: S3Settings) -> None:
    content = random_bytes(23 * MIB)
    async with opened(settings, part_count_max=2) as backend:
        await store_content(backend, "x", content)

        assert (await backend.stat("x")).size == len(content)
        assert await content_of(backend, "x") == content
        for span in (Span(0, 1), Span(10 * MIB - 1, 10 * MIB + 1), Span(9 * MIB, 21 * MIB)):
            assert await content_of(backend, "x", span) == content[span.start : span.stop]


async def test_a_delete_an_abort_and_a_sweep_leave_nothing_in_the_bucket(
    settings: S3Settings, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    async with opened(replace(settings, trash_delay_s=0), part_count_max=2) as backend:
        await store_content(backend, "x", random_bytes(11 * MIB))
        await store_content(backend, "x", random_bytes(11 * MIB), "second")
        upload = await backend.begin_upload("u")
        await append(upload, random_bytes(6 * MIB))
        _ = [piece async for piece in upload.replay()]
        await append(upload, random_bytes(6 * MIB))

        await upload.abort()
        await backend.delete("x")
        assert await swept(backend) == []

    assert await in_bucket() == []


@pytest.mark.parametrize("sizes", [(3, 3, 3), (6, 1, 6), (11, 5, 0, 4), (16, 16)], ids=str)
async def test_each_append_and_the_commit_may_come_from_another_process(
    backend: StorageBackend, other: StorageBackend, sizes: tuple[int, ...]
) -> None:
    hasher = hashlib.sha256()
    await backend.begin_upload("u")

    for index, size in enumerate(sizes):
        upload = await (other, backend)[index % 2].resume_upload("u")
        piece = random_bytes(size * MIB + 17, index)
        await upload.append(chunks_of(piece), observe=hasher.update, note=hasher.digest)
    upload = await backend.resume_upload("u")
    await upload.commit("x")

    assert upload.note == hasher.digest() == hashlib.sha256(await content_of(other, "x")).digest()


async def test_an_upload_goes_on_after_it_was_read_again(backend: StorageBackend) -> None:
    content = random_bytes(21 * MIB)
    upload = await backend.begin_upload("u")
    await append(upload, content[: 7 * MIB])
    assert b"".join([piece async for piece in upload.replay()]) == content[: 7 * MIB]

    await append(upload, content[7 * MIB : 14 * MIB])
    await append(upload, content[14 * MIB :], last=True)
    assert b"".join([piece async for piece in upload.replay()]) == content
    await upload.commit("x")

    assert await content_of(backend, "x") == content


# -- content of several objects


@pytest.fixture
def in_segments(settings: S3Settings) -> S3Settings:
    return replace(settings, part_size=5 * MIB, segment_size=10 * MIB)


async def test_content_is_made_of_as_many_objects_as_the_settings_say(
    in_segments: S3Settings, client: S3Client
) -> None:
    content = random_bytes(33 * MIB)
    async with opened(in_segments) as backend:
        await store_content(backend, "x", content)

        assert await content_of(backend, "x") == content
        for span in (Span(0, 1), Span(10 * MIB - 1, 20 * MIB + 1), Span(29 * MIB, 33 * MIB)):
            assert await content_of(backend, "x", span) == content[span.start : span.stop]
    segments = await asyncio.to_thread(Records(client).segments_of, "x")
    assert [segment.size for segment in segments] == [10 * MIB, 10 * MIB, 10 * MIB, 3 * MIB]


@pytest.mark.parametrize(
    ("before", "size", "sizes"),
    [
        (0, 3, [3]),
        (0, 20, [5, 5, 5, 5]),
        (0, 21, [5, 5, 5, 5, 1]),
        (0, 33, [10, 5, 5, 5, 5, 3]),
        (13, 20, [10, 5, 5, 5, 5, 3]),
        (13, 0, [10, 3]),
    ],
    ids=str,
)
async def test_the_end_of_content_whose_size_is_known_is_put_in_small_objects(
    in_segments: S3Settings, client: S3Client, before: int, size: int, sizes: list[int]
) -> None:
    content = random_bytes((before + size) * MIB)
    first, last = content[: before * MIB], content[before * MIB :]
    hasher = hashlib.sha256()
    async with opened(in_segments) as backend:
        upload = await backend.begin_upload("u")
        await upload.append(chunks_of(first), observe=hasher.update, note=hasher.digest, size=len(first))
        await upload.append(
            chunks_of(last), observe=hasher.update, note=hasher.digest, size=len(last), last=True
        )
        assert upload.note == hasher.digest() == hashlib.sha256(content).digest()
        await upload.commit("x")

        assert await content_of(backend, "x") == content
    segments = await asyncio.to_thread(Records(client).segments_of, "x")
    assert [segment.size for segment in segments] == [size * MIB for size in sizes]
    assert await asyncio.to_thread(client.list_uploads, "") == ([], False)


@pytest.mark.parametrize("arrived", [9, 17, 24, 32], ids=str)
async def test_an_append_that_is_cut_off_keeps_what_had_come_of_the_end(
    in_segments: S3Settings, client: S3Client, arrived: int
) -> None:
    content = random_bytes(33 * MIB)

    async def cut_off() -> AsyncIterator[bytes]:
        async for chunk in chunks_of(content[: arrived * MIB]):
            yield chunk
        raise ConnectionResetError

    async with opened(in_segments) as backend, opened(in_segments) as other:
        upload = await backend.begin_upload("u")
        with pytest.raises(ConnectionResetError):
            await upload.append(cut_off(), observe=ignore, note=said(b"cut"), size=33 * MIB, last=True)

        resumed = await other.resume_upload("u")
        assert (resumed.offset, resumed.note) == (arrived * MIB, b"cut")
        rest = content[resumed.offset :]
        await resumed.append(chunks_of(rest), observe=ignore, note=said(b""), size=len(rest), last=True)
        await resumed.commit("x")

        assert await content_of(other, "x") == content
        await swept(other)
    entries, _ = await asyncio.to_thread(client.list, "")
    assert {entry.key for entry in entries} == await named_in_bucket(client)


async def test_an_object_before_the_end_that_could_not_be_completed_in_time_is_completed_with_it(
    in_segments: S3Settings, store: FaultyStore
) -> None:
    content = random_bytes(33 * MIB)
    refused = 0

    def rule(request: Request) -> Fault | None:
        nonlocal refused
        if not request.is_complete or refused == 2:
            return None
        refused += 1
        return Fault.REFUSES

    store.rule = rule
    async with opened(replace(in_segments, endpoint=store.url, retry_timeout_s=0)) as backend:
        upload = await backend.begin_upload("u")
        await upload.append(chunks_of(content), observe=ignore, note=said(b""), size=len(content), last=True)
        await upload.commit("x")

        assert refused == 2
        assert await content_of(backend, "x") == content


async def test_an_upload_that_is_cut_off_again_and_again_is_of_no_more_objects_than_it_may_be(
    in_segments: S3Settings, client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_parts, "_TAIL_BEFORE", 4)
    content = random_bytes(80 * MIB)

    async def cut_off(start: int) -> AsyncIterator[bytes]:
        async for chunk in chunks_of(content[start : start + 5 * MIB]):
            yield chunk
        raise ConnectionResetError

    async with opened(replace(in_segments, segment_size=64 * MIB)) as backend:
        await backend.begin_upload("u")
        for start in range(0, 70 * MIB, 5 * MIB):
            upload = await backend.resume_upload("u")
            assert upload.offset == start
            with pytest.raises(ConnectionResetError):
                await upload.append(cut_off(start), observe=ignore, note=said(b""), size=10 * MIB, last=True)
        upload = await backend.resume_upload("u")
        rest = content[70 * MIB :]
        await upload.append(chunks_of(rest), observe=ignore, note=said(b""), size=len(rest), last=True)
        await upload.commit("x")

        assert await content_of(backend, "x") == content
    segments = await asyncio.to_thread(Records(client).segments_of, "x")
    assert len(segments) <= 4 + 2


def test_what_the_largest_content_leaves_in_the_trash_can_be_read() -> None:
    segments = [Segment(new_data_key("u"), 10**12, f'"{"e" * 32}-10000"')] * (s3_parts._TAIL_BEFORE + 100)

    assert 10 * len(trash_to_bytes(segments)[0]) <= s3_sweep._TRASH_SIZE_MAX
    assert len(pointer_to_bytes(segments)[0]) <= s3._POINTER_SIZE_MAX


async def test_content_of_very_many_objects_that_was_deleted_is_swept(
    settings: S3Settings, client: S3Client, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    segments = tuple(Segment(new_data_key(f"u{index}"), 5 * MIB, "e" * 32) for index in range(9000))
    async with opened(replace(settings, trash_delay_s=0)) as backend:
        stored, nonce = pointer_to_bytes(segments)
        await asyncio.to_thread(Records(client).write, "x", stored, nonce, expect="")
        await asyncio.to_thread(client.put, segments[-1].key, b"x")
        await backend.delete("x")

        await swept(backend)

    assert await in_bucket() == []


def test_objects_grow_so_that_the_largest_blob_has_a_pointer_that_can_be_read() -> None:
    sizes = [segment_size_of(index, 64 * MIB) for index in range(700)]

    assert sizes[:65] == [64 * MIB] * 64 + [128 * MIB]
    assert sum(sizes) > 5 * 1024 * 1024 * MIB
    stored, _ = pointer_to_bytes([Segment(new_data_key("u"), 10**12, f'"{"e" * 32}-10000"')] * 700)
    assert len(stored) <= 256 * 1024


async def test_an_object_is_completed_while_the_bytes_of_the_next_arrive(
    in_segments: S3Settings, store: FaultyStore
) -> None:
    completed = asyncio.Event()

    def rule(request: Request) -> None:
        if request.is_complete:
            completed.set()

    async def chunks() -> AsyncIterator[bytes]:
        yield random_bytes(15 * MIB)
        await completed.wait()
        yield b"the end"

    store.rule = rule
    async with opened(replace(in_segments, endpoint=store.url)) as backend:
        upload = await backend.begin_upload("u")
        await upload.append(chunks(), observe=ignore, note=said(b""), last=True)
        await upload.commit("x")

        assert len(await content_of(backend, "x")) == 15 * MIB + 7


@pytest.mark.parametrize("sizes", [(10, 10, 10), (20, 1, 9), (5, 5, 5, 5), (33,)], ids=str)
async def test_objects_end_where_they_should_however_the_appends_fall(
    in_segments: S3Settings, client: S3Client, sizes: tuple[int, ...]
) -> None:
    hasher = hashlib.sha256()
    async with opened(in_segments) as backend, opened(in_segments) as other:
        await backend.begin_upload("u")
        for index, size in enumerate(sizes):
            upload = await (other, backend)[index % 2].resume_upload("u")
            piece = random_bytes(size * MIB, index)
            await upload.append(chunks_of(piece), observe=hasher.update, note=hasher.digest)
        upload = await other.resume_upload("u")
        await upload.commit("x")

        assert hashlib.sha256(await content_of(backend, "x")).digest() == hasher.digest() == upload.note
    segments = await asyncio.to_thread(Records(client).segments_of, "x")
    assert all(segment.size == 10 * MIB for segment in segments[:-1])


@pytest.mark.parametrize("is_size_known", [False, True], ids=["size-unknown", "size-known"])
@pytest.mark.parametrize("nth", range(26))
async def test_of_a_long_append_whose_writer_dies_what_is_kept_is_whole_and_can_be_gone_on_with(
    in_segments: S3Settings, store: FaultyStore, client: S3Client, nth: int, *, is_size_known: bool
) -> None:
    content = random_bytes(36 * MIB)
    hasher = hashlib.sha256()
    number = -1

    def rule(_: Request) -> Fault | None:
        nonlocal number
        number += 1
        return Fault.REFUSES if number >= nth else None

    async with opened(in_segments) as other:
        await other.begin_upload("u")
        async with opened(replace(in_segments, endpoint=store.url, retry_timeout_s=0.2)) as dying:
            number = -1
            store.rule = rule
            with contextlib.suppress(StorageUnavailable):
                upload = await dying.resume_upload("u")
                await upload.append(
                    chunks_of(content),
                    observe=hasher.update,
                    note=hasher.digest,
                    size=len(content),
                    last=is_size_known,
                )
                if is_size_known:
                    await upload.commit("x")
        try:
            resumed = await other.resume_upload("u")
        except UploadMissing:
            assert await content_of(other, "x") == content
            return
        # Of the end that is known nothing is kept before all of it is.
        assert resumed.offset in {0, 10 * MIB, 15 * MIB, 20 * MIB, 30 * MIB, len(content)}
        kept = content[: resumed.offset]
        assert resumed.note == (hashlib.sha256(kept).digest() if kept else b"")

        await append(resumed, content[resumed.offset :], last=True)
        await resumed.commit("x")

        assert await content_of(other, "x") == content
        await swept(other)
        entries, _ = await asyncio.to_thread(client.list, "")
        assert {entry.key for entry in entries} == await named_in_bucket(client)
        assert await asyncio.to_thread(client.list_uploads, "") == ([], False)


async def test_who_is_overtaken_between_two_objects_takes_nothing_from_who_overtook(
    in_segments: S3Settings, store: FaultyStore
) -> None:
    content = random_bytes(25 * MIB)
    stalled = Stalled(content[: 16 * MIB])
    completed = asyncio.Event()

    def rule(request: Request) -> None:
        if request.is_complete:
            completed.set()

    store.rule = rule
    async with opened(replace(in_segments, endpoint=store.url)) as slow, opened(in_segments) as fast:
        begun = await slow.begin_upload("u")
        appending = asyncio.create_task(
            begun.append(stalled.chunks(), observe=ignore, note=said(b"slow"), last=True)
        )
        await completed.wait()
        overtaking = await fast.resume_upload("u")
        assert (overtaking.offset, overtaking.note) == (10 * MIB, b"slow")
        await append(overtaking, content[10 * MIB :], note=b"fast", last=True)
        await overtaking.commit("x")
        stalled.go_on.set()

        with contextlib.suppress(StorageUnavailable):
            await appending
            with pytest.raises((UploadBusy, UploadMissing)):
                await begun.commit("y")
        assert await content_of(fast, "x") == content


async def test_an_abort_takes_the_objects_that_were_complete(
    in_segments: S3Settings, in_bucket: Callable[[], Awaitable[list[str]]], client: S3Client
) -> None:
    async with opened(in_segments) as backend:
        upload = await backend.begin_upload("u")
        await append(upload, random_bytes(36 * MIB))

        await upload.abort()

    assert await in_bucket() == []
    assert await asyncio.to_thread(client.list_uploads, "") == ([], False)


@pytest.mark.parametrize("size", [3, 20, 22, 33, 40])
@pytest.mark.parametrize("segment_size", [10 * MIB, 64 * MIB])
async def test_an_abort_takes_the_end_too_that_was_to_be_saved_with_the_commit(
    in_segments: S3Settings,
    in_bucket: Callable[[], Awaitable[list[str]]],
    client: S3Client,
    size: int,
    segment_size: int,
) -> None:
    content = random_bytes(size * MIB)
    async with opened(replace(in_segments, segment_size=segment_size)) as backend:
        upload = await backend.begin_upload("u")
        await upload.append(chunks_of(content), observe=ignore, note=said(b""), size=len(content), last=True)

        await upload.abort()
        await upload.abort()

    assert await in_bucket() == []
    assert await asyncio.to_thread(client.list_uploads, "") == ([], False)


async def test_who_aborts_after_others_went_on_takes_his_own_end_too(
    in_segments: S3Settings, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    content = random_bytes(20 * MIB)
    async with opened(in_segments) as backend, opened(in_segments) as other:
        upload = await backend.begin_upload("u")
        await upload.append(chunks_of(content), observe=ignore, note=said(b""), size=len(content), last=True)
        await append(await other.resume_upload("u"), content[: 7 * MIB])

        await upload.abort()

    assert await in_bucket() == []


@pytest.mark.parametrize("ending", ["commit", "abort"])
async def test_an_end_that_may_have_been_saved_is_kept_for_whoever_goes_on(
    in_segments: S3Settings, store: FaultyStore, ending: str
) -> None:
    """The save of a commit is done, and its answer lost for as long as anybody tries."""
    content = random_bytes(20 * MIB)

    def rule(request: Request) -> Fault | None:
        if not request.key.startswith(UPLOADS):
            return None
        return Fault.LOSES_ANSWER if request.method == "PUT" else Fault.FAILS

    async with (
        opened(in_segments) as other,
        opened(replace(in_segments, endpoint=store.url, retry_timeout_s=0.3)) as shaky,
    ):
        upload = await shaky.begin_upload("u")
        await upload.append(chunks_of(content), observe=ignore, note=said(b""), size=len(content), last=True)
        store.rule = rule
        with pytest.raises(StorageUnavailable):
            await upload.commit("x")
        store.rule = lambda _: None
        resumed = await other.resume_upload("u")
        assert resumed.offset == len(content)

        if ending == "commit":
            with pytest.raises(UploadBusy):
                await upload.commit("x")
        await resumed.commit("x")
        await upload.abort()

        assert await content_of(other, "x") == content


# -- several processes


async def test_of_two_processes_that_append_at_once_one_is_told_and_its_bytes_do_not_count(
    backend: StorageBackend, other: StorageBackend
) -> None:
    slow = await backend.begin_upload("u")
    await append(slow, b"begin", note=b"0")
    fast = await other.resume_upload("u")
    slow_bytes, fast_bytes = random_bytes(6 * MIB, 1), random_bytes(13 * MIB, 2)
    stalled = Stalled(slow_bytes)
    appending = asyncio.create_task(slow.append(stalled.chunks(), observe=ignore, note=said(b"slow")))
    await stalled.stalls.wait()

    results = await asyncio.gather(append(fast, fast_bytes, note=b"fast"), return_exceptions=True)
    if isinstance(
        results[0], UploadBusy
    ):  # the slow one had claimed part numbers first: take it up from there
        fast = await other.resume_upload("u")
        await append(fast, fast_bytes, note=b"fast")
    stalled.go_on.set()

    with pytest.raises(UploadOvertaken, match="ask for its offset"):
        await appending
    resumed = await backend.resume_upload("u")
    assert (resumed.offset, resumed.note) == (5 + len(fast_bytes), b"fast")
    await resumed.commit("x")
    assert await content_of(other, "x") == b"begin" + fast_bytes


@pytest.mark.parametrize("is_closing", [False, True])
@pytest.mark.parametrize("size", [100, 6 * MIB, 33 * MIB])
async def test_X_08_of_two_requests_to_one_upload_through_two_replicas_one_is_told_how_far_it_is(
    in_segments: S3Settings, size: int, is_closing: bool
) -> None:
    name, content = RepositoryName("lib/a"), random_bytes(size)
    begun = asyncio.Barrier(2)

    async def chunks() -> AsyncIterator[bytes]:
        await begun.wait()
        async for chunk in chunks_of(content):
            yield chunk

    async with opened(in_segments) as first, opened(in_segments) as second:
        replicas = [
            UploadSessions(backend, count_max=9, per_repository_max=9, size_max=None)
            for backend in (first, second)
        ]
        location = (await replicas[0].begin(name)).location
        closing = Digest.of(content) if is_closing else None

        async def send(replica: UploadSessions) -> int:
            session = await replica.resume(name, location)
            sent = await session.append(chunks(), size=size, closing=closing)
            if closing is not None:
                await session.commit(closing)
            return sent

        results = await asyncio.gather(*map(send, replicas), return_exceptions=True)

        refused = [result for result in results if result != size]
        if closing is None:
            assert (await replicas[0].resume(name, location)).offset == size
            (told,) = refused
            assert isinstance(told, UploadOutOfOrder)
            # Where many parts were to come, as soon as the other had claimed the first of them.
            assert told.offset in ({size} if size < 5 * MIB else {0, size})
        else:
            assert [type(each) for each in refused] in ([UploadOutOfOrder], [BlobUploadUnknown])
            assert await content_of(first, layout.blob_key(closing)) == content


async def test_an_appender_that_died_holds_up_nobody(backend: StorageBackend, settings: S3Settings) -> None:
    async with opened(settings) as dying:
        upload = await dying.begin_upload("u")
        await append(upload, b"kept", note=b"1")
        await append(upload, random_bytes(11 * MIB), note=b"2", last=True)

    resumed = await backend.resume_upload("u")
    assert (resumed.offset, resumed.note) == (4, b"1")
    await append(resumed, b" more", last=True)
    await resumed.commit("x")
    assert await content_of(backend, "x") == b"kept more"


@pytest.mark.parametrize("size", [0, 100, 6 * MIB])
async def test_a_commit_that_was_cut_off_is_repeated_by_another_process(
    shaky: StorageBackend, store: FaultyStore, other: StorageBackend, size: int
) -> None:
    content = random_bytes(size)
    upload = await shaky.begin_upload("u")
    await append(upload, content, last=True)
    store.rule = lambda request: Fault.REFUSES if puts_record(request) else None
    with pytest.raises(StorageUnavailable, match="AccessDenied"):
        await upload.commit("x")

    resumed = await other.resume_upload("u")
    assert resumed.offset == size
    assert await append(resumed) == size
    with pytest.raises(UploadMissing):
        await append(resumed, b"more")
    await resumed.commit("x")

    assert await content_of(other, "x") == content
    with pytest.raises(UploadMissing):
        await other.resume_upload("u")


@pytest.mark.parametrize("size", [100, 6 * MIB])
async def test_a_commit_that_failed_is_repeated_with_all_bytes_or_refused(
    shaky: StorageBackend, store: FaultyStore, size: int
) -> None:
    content = random_bytes(size)
    upload = await shaky.begin_upload("u")
    await append(upload, content, last=True)
    store.once(Fault.REFUSES, lambda request: request.method == "PUT")
    with pytest.raises(StorageUnavailable):
        await upload.commit("x")

    with contextlib.suppress(StorageUnavailable):
        await upload.commit("x")

    with contextlib.suppress(ObjectMissing):
        assert await content_of(shaky, "x") == content


async def test_an_abort_after_a_commit_was_published_takes_nothing_from_it(
    shaky: StorageBackend, store: FaultyStore, other: StorageBackend
) -> None:
    upload = await shaky.begin_upload("u")
    await append(upload, random_bytes(6 * MIB), last=True)
    store.rule = lambda request: (
        Fault.REFUSES if request.method == "DELETE" and request.key.startswith(UPLOADS) else None
    )
    await upload.commit("x")

    await (await other.resume_upload("u")).abort()

    assert await content_of(other, "x") == random_bytes(6 * MIB)


async def test_a_commit_that_is_repeated_after_its_content_was_deleted_brings_it_back_whole(
    shaky: StorageBackend, store: FaultyStore, settings: S3Settings
) -> None:
    upload = await shaky.begin_upload("u")
    await append(upload, b"content", last=True)
    store.rule = lambda request: (
        Fault.REFUSES if request.method == "DELETE" and request.key.startswith(UPLOADS) else None
    )
    await upload.commit("x")
    async with opened(replace(settings, trash_delay_s=0)) as other:
        await other.delete("x")
        assert await swept(other) == []

        await (await other.resume_upload("u")).commit("x")
        assert await swept(other) == []

        assert await content_of(other, "x") == b"content"
        with pytest.raises(UploadMissing):
            await other.resume_upload("u")


async def test_an_abort_that_was_cut_off_is_ended_by_whoever_finds_it(
    shaky: StorageBackend,
    store: FaultyStore,
    other: StorageBackend,
    in_bucket: Callable[[], Awaitable[list[str]]],
) -> None:
    upload = await shaky.begin_upload("u")
    await append(upload, random_bytes(6 * MIB))
    _ = [piece async for piece in upload.replay()]
    store.rule = lambda request: Fault.REFUSES if request.method == "DELETE" else None
    await upload.abort()
    assert [each.id async for each in other.uploads()] == ["u"]

    with pytest.raises(UploadMissing):
        await other.resume_upload("u")

    assert await in_bucket() == []


@pytest.mark.parametrize("is_expected", [True, False])
async def test_a_delete_of_content_that_is_touched_in_that_moment_takes_all_of_it_or_nothing(
    shaky: StorageBackend, store: FaultyStore, settings: S3Settings, is_expected: bool
) -> None:
    seen = await store_content(shaky, "x", b"content")
    async with opened(replace(settings, trash_delay_s=0)) as other:
        touched: list[asyncio.Future[ObjectInfo]] = []

        def rule(request: Request) -> Fault | None:
            if request.method != "DELETE":
                return None
            if not touched:
                touched.append(asyncio.ensure_future(other.touch("x")))
            return None if touched[0].done() else Fault.SLOW_DOWN

        store.rule = rule
        if is_expected:
            with pytest.raises(PreconditionFailed):
                await shaky.delete("x", expect=seen.version)
            assert await swept(other) == []
            assert await other.stat("x") == await touched[0]
            assert await content_of(other, "x") == b"content"
        else:
            await shaky.delete("x")
            with pytest.raises(ObjectMissing):
                await other.stat("x")


async def test_two_processes_that_commit_one_upload_publish_it_once(
    backend: StorageBackend, other: StorageBackend
) -> None:
    content = random_bytes(6 * MIB)
    await append(await backend.begin_upload("u"), content)
    holders = [await each.resume_upload("u") for each in (backend, other)]

    results = await asyncio.gather(*(holder.commit("x") for holder in holders), return_exceptions=True)

    assert sum(isinstance(result, UploadBusy | UploadMissing) for result in results) == 1
    assert await content_of(backend, "x") == content


# -- what is left behind


async def test_content_that_was_deleted_stays_for_its_readers_and_goes_with_a_sweep_after_that(
    settings: S3Settings, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    content = random_bytes(6 * MIB)
    async with opened(settings) as patient, opened(replace(settings, trash_delay_s=0)) as hasty:
        await store_content(patient, "x", content)

        async with patient.deliver("x") as delivery:
            await hasty.delete("x")
            assert await swept(patient) == []
            assert await bytes_of(delivery) == content
        data, trash = await in_bucket()
        assert (data[:12], trash[:13]) == ("_store/data/", "_store/trash/")

        assert await swept(hasty, dry_run=True) == []
        assert await in_bucket() == [data, trash]
        assert await swept(hasty) == []
        assert await in_bucket() == []


@pytest.fixture
async def narrow(settings: S3Settings) -> AsyncIterator[StorageBackend]:
    """A backend that keeps content in one place only, as a registry's does."""
    async with opened(settings, content_prefix="content/") as backend:
        yield backend


async def test_a_sweep_finds_what_nobody_names_and_leaves_what_is_not_ours(
    narrow: StorageBackend, client: S3Client, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    backend = narrow
    await store_content(backend, "content/x", b"content")
    lives = await backend.begin_upload("lives")
    await append(lives, random_bytes(6 * MIB))
    others = ["_store/data/ab/short", "_store/data/stray", "_store/later/x", "_store/uploads-x", "_storey"]
    for key in [*others, "_store/trash/x", "_store/probe/x", "_store/uploads/x.y", "elsewhere"]:
        await asyncio.to_thread(client.put, key, b"x" * 512)
    kept = sorted(await in_bucket())
    orphan, cut_off, probe = new_data_key("dead"), new_data_key("dead"), PROBES + "0" * 16 + "/a"
    await asyncio.to_thread(client.put, orphan, b"x" * 512)
    await asyncio.to_thread(client.put, probe, b"x")
    multipart = await asyncio.to_thread(client.create_upload, cut_off)
    await asyncio.to_thread(client.upload_part, cut_off, multipart, 1, b"x" * 99)
    leftovers = [probe, orphan, cut_off]

    assert await swept(backend, age_s=3600) == []
    assert await swept(backend, dry_run=True) == leftovers
    assert sorted(await in_bucket()) == sorted([*kept, orphan, probe])
    assert await swept(backend) == leftovers

    assert sorted(await in_bucket()) == kept
    multiparts, _ = await asyncio.to_thread(client.list_uploads, "")
    assert [mark_of_data(data_id(each.key) or b"") for each in multiparts] == [upload_mark("lives")]
    await lives.commit("content/lives")
    assert await content_of(backend, "content/lives") == random_bytes(6 * MIB)


async def test_leftovers_are_told_with_their_size_and_age(backend: StorageBackend, client: S3Client) -> None:
    orphan = new_data_key("dead")
    await asyncio.to_thread(client.put, orphan, b"x" * 777)

    (leftover,) = [leftover async for leftover in backend.sweep(age_s=0)]

    assert (leftover.name, leftover.size) == (orphan, 777)
    assert abs(leftover.modified - backend.now()) < 5


async def test_a_listing_of_multipart_uploads_is_read_to_its_end(
    client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = sorted(new_data_key(f"u{index}") for index in range(5))
    for key in keys:
        await asyncio.to_thread(client.create_upload, key)
    ask = client._client.list_multipart_uploads
    monkeypatch.setattr(
        client._client, "list_multipart_uploads", lambda **options: ask(**options, MaxUploads=2)
    )
    found: list[str] = []
    is_more = True

    while is_more:
        after = found[-1] if found else ""
        page, is_more = await asyncio.to_thread(client.list_uploads, DATA, after=after)
        found += [multipart.key for multipart in page]

    assert found == keys


async def test_an_upload_that_was_aborted_in_the_middle_of_a_commit_keeps_its_bytes_until_it_is_old(
    shaky: StorageBackend,
    store: FaultyStore,
    other: StorageBackend,
    in_bucket: Callable[[], Awaitable[list[str]]],
) -> None:
    upload = await shaky.begin_upload("u")
    await append(upload, b"content", last=True)
    aborted: list[asyncio.Future[None]] = []

    async def abort() -> None:
        await (await other.resume_upload("u")).abort()
        assert await swept(other, age_s=3600) == []

    def rule(request: Request) -> Fault | None:
        if puts_record(request) and not aborted:
            aborted.append(asyncio.ensure_future(abort()))
        return None if not aborted or aborted[0].done() else Fault.SLOW_DOWN

    store.rule = rule
    await upload.commit("x")
    await aborted[0]

    assert await content_of(other, "x") == b"content"
    await swept(other)
    assert len(await in_bucket()) == 2
    assert await content_of(other, "x") == b"content"


async def named_in_bucket(client: S3Client) -> set[str]:
    """What may be in the bucket when nothing is under way: objects, and the data that they name."""
    records = Records(client)
    entries, _ = await asyncio.to_thread(client.list, "")
    keys = [entry.key for entry in entries if not entry.key.startswith("_store/")]
    segments = [await asyncio.to_thread(records.segments_of, key) for key in keys]
    return {*keys, *(segment.key for some in segments for segment in some)}


@pytest.mark.parametrize("ending", ["commit", "abort"])
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("nth", range(18))
async def test_a_writer_that_dies_at_any_request_leaves_what_another_can_end_and_a_sweep_removes(  # noqa: PLR0917
    settings: S3Settings, store: FaultyStore, client: S3Client, nth: int, is_there: bool, ending: str
) -> None:
    content = random_bytes(11 * MIB)
    hasty = replace(settings, trash_delay_s=0)
    async with (
        opened(hasty) as other,
        opened(replace(hasty, endpoint=store.url, retry_timeout_s=0.2)) as dying,
    ):
        if is_there:
            await store_content(other, "x", content, "first")
        number = -1

        def rule(_: Request) -> Fault | None:
            nonlocal number
            number += 1
            return Fault.REFUSES if number >= nth else None

        store.rule = rule
        is_committed = False
        with contextlib.suppress(StorageUnavailable):
            upload = await dying.begin_upload("u")
            await append(upload, content[: 6 * MIB])
            await append(upload, content[6 * MIB :], last=True)
            await upload.commit("x")
            is_committed = True
        with contextlib.suppress(UploadMissing):
            upload = await other.resume_upload("u")
            await (upload.abort() if ending == "abort" else upload.commit("y"))

        would_go = await swept(other, dry_run=True)
        assert await swept(other) == would_go
        await swept(other)

        if is_there or is_committed:
            assert await content_of(other, "x") == content
        for key in await keys_of(other):
            assert content.startswith(await content_of(other, key))
        entries, _ = await asyncio.to_thread(client.list, "")
        assert {entry.key for entry in entries} == await named_in_bucket(client)
        assert await asyncio.to_thread(client.list_uploads, "") == ([], False)


@pytest.mark.parametrize("is_deleted_at", [None, "trash", "pointer"])
async def test_a_delete_that_dies_at_any_request_loses_nothing_and_leaves_nothing(
    shaky: StorageBackend,
    store: FaultyStore,
    settings: S3Settings,
    client: S3Client,
    is_deleted_at: str | None,
) -> None:
    await store_content(shaky, "x", b"content")
    store.rule = {
        None: lambda _: None,
        "trash": lambda request: Fault.REFUSES if request.key.startswith(TRASH) else None,
        "pointer": lambda request: Fault.REFUSES if request.method == "DELETE" else None,
    }[is_deleted_at]

    if is_deleted_at is None:
        await shaky.delete("x")
    else:
        with pytest.raises(StorageUnavailable):
            await shaky.delete("x")

    async with opened(replace(settings, trash_delay_s=0)) as other:
        await swept(other)
        if is_deleted_at is not None:
            assert await content_of(other, "x") == b"content"
        entries, _ = await asyncio.to_thread(client.list, "")
        assert {entry.key for entry in entries} == await named_in_bucket(client)
        assert len(entries) == (0 if is_deleted_at is None else 2)


async def test_a_pointer_that_somebody_removed_by_hand_leaves_bytes_that_a_sweep_finds(
    backend: StorageBackend, client: S3Client, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    await store_content(backend, "x", b"content")
    await asyncio.to_thread(client.delete, "x")
    (orphan,) = await in_bucket()

    assert await swept(backend) == [orphan]
    assert await in_bucket() == []


@pytest.mark.parametrize("nth", range(12))
async def test_a_sweep_whose_reads_fail_removes_nothing(
    store: FaultyStore,
    settings: S3Settings,
    client: S3Client,
    in_bucket: Callable[[], Awaitable[list[str]]],
    nth: int,
) -> None:
    """A store with something of each kind; the first nine requests of a sweep of it only read."""
    async with opened(replace(settings, trash_delay_s=0, endpoint=store.url)) as backend:
        for key in ("kept", "deleted"):
            await store_content(backend, key, b"content", key)
        await backend.delete("deleted")
        await append(await backend.begin_upload("u"), b"content")
        orphan = new_data_key("dead")
        await asyncio.to_thread(client.put, orphan, b"x")
        before = await in_bucket()
        number = -1

        def rule(_: Request) -> Fault | None:
            nonlocal number
            number += 1
            return Fault.REFUSES if number == nth else None

        store.rule = rule
        with pytest.raises(StorageUnavailable):
            await swept(backend)

        if nth < 10:
            assert await in_bucket() == before
        store.rule = lambda _: None
        await swept(backend)
        assert len(await in_bucket()) == 3
        assert await content_of(backend, "kept") == b"content"


SWEEP_STEPS = ("_look_for_old", "_spare_uploads", "_spare_pointers", "_spare_young_trash", "_empty_trash")


@pytest.mark.parametrize("delay_s", [0, 1200])
@pytest.mark.parametrize("step", SWEEP_STEPS)
async def test_whatever_others_do_between_two_steps_of_a_sweep_nothing_that_is_needed_goes(
    settings: S3Settings, monkeypatch: pytest.MonkeyPatch, step: str, delay_s: float
) -> None:
    content = random_bytes(6 * MIB)
    settings = replace(settings, trash_delay_s=delay_s)
    async with opened(settings) as backend, opened(settings) as other:
        for key in ("stays", "touched", "deleted", "pushed-again", "replaced"):
            await store_content(backend, key, content, key)
        uploads = {name: await other.begin_upload(name) for name in ("commits", "again", "replaces", "grows")}
        for upload in uploads.values():
            await append(upload, content, last=upload.id != "grows")
        late = await other.begin_upload("late")

        async def others() -> None:
            await other.touch("touched")
            await other.delete("deleted")
            await uploads["commits"].commit("committed")
            await uploads["again"].commit("pushed-again")
            await other.delete("replaced")
            await uploads["replaces"].commit("replaced")
            await append(uploads["grows"], content)
            await append(late, content, last=True)
            await late.commit("late")
            await store_content(other, "quick", content, "quick")

        proceed = getattr(_Run, step)

        async def interrupted(run: _Run) -> None:
            await others()
            await proceed(run)

        monkeypatch.setattr(_Run, step, interrupted)
        await swept(backend)
        monkeypatch.setattr(_Run, step, proceed)
        await uploads["grows"].commit("grown")
        await swept(backend)

        keys = await keys_of(other)
        assert keys == sorted(
            ["stays", "touched", "pushed-again", "replaced", "committed", "late", "quick", "grown"]
        )
        for key in keys:
            assert await content_of(other, key) == content * (2 if key == "grown" else 1)


# -- answers that are lost


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSES_ANSWER, Fault.FAILS, Fault.SLOW_DOWN], ids=str)
@pytest.mark.parametrize("expect", ["absent", "version", "anything"])
async def test_a_write_whose_answer_is_lost_is_done_once(
    shaky: StorageBackend, store: FaultyStore, fault: Fault, expect: str
) -> None:
    old = None if expect != "version" else (await shaky.write("a", b"old")).version
    store.once(fault, puts_record)

    written = await shaky.write("a", b"new", expect="" if expect == "absent" else old)

    assert store.count(fault) == 1
    assert await shaky.read("a", size_max=9) == (b"new", written)


async def test_a_store_that_does_its_work_and_never_answers_is_asked_what_it_did(
    settings: S3Settings, store: FaultyStore
) -> None:
    async with opened(replace(settings, endpoint=store.url, read_timeout_s=0.5)) as backend:
        store.once(Fault.HANGS, puts_record)
        written = await backend.write("a", b"new", expect="")
        store.once(Fault.HANGS, lambda request: request.is_complete)
        await store_content(backend, "content", random_bytes(6 * MIB))

        assert store.count(Fault.HANGS) == 2
        assert await backend.read("a", size_max=9) == (b"new", written)
        assert await content_of(backend, "content") == random_bytes(6 * MIB)


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSES_ANSWER], ids=str)
async def test_a_write_whose_answer_is_lost_while_others_write_is_left_in_doubt(
    shaky: StorageBackend, store: FaultyStore, other: StorageBackend, fault: Fault
) -> None:
    old = await shaky.write("a", b"old")
    rival: list[Any] = []

    def rule(request: Request) -> Fault | None:
        if puts_record(request) and not rival:
            rival.append(None)
            return fault
        if rival == [None] and request.method == "GET":
            rival[0] = asyncio.ensure_future(other.write("a", b"theirs"))
            return Fault.SLOW_DOWN
        return None if not rival or rival[0].done() else Fault.SLOW_DOWN

    store.rule = rule
    with pytest.raises(StorageUnavailable):
        await shaky.write("a", b"ours", expect=old.version)

    assert (await other.read("a", size_max=9)) == (b"theirs", await rival[0])


async def test_a_refused_write_is_refused_also_when_it_was_sent_twice(
    shaky: StorageBackend, store: FaultyStore
) -> None:
    await shaky.write("a", b"1")
    store.once(Fault.SLOW_DOWN, puts_record)

    with pytest.raises(PreconditionFailed):
        await shaky.write("a", b"2", expect="")

    assert (await shaky.read("a", size_max=9))[0] == b"1"


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSES_ANSWER, Fault.FAILS, Fault.SLOW_DOWN], ids=str)
async def test_a_touch_whose_answer_is_lost_is_done(
    shaky: StorageBackend, store: FaultyStore, fault: Fault
) -> None:
    before = await store_content(shaky, "x", b"content")
    store.once(fault, puts_record)

    touched = await shaky.touch("x")

    assert store.count(fault) == 1
    assert touched == await shaky.stat("x")
    assert touched.version != before.version
    assert await content_of(shaky, "x") == b"content"


@pytest.mark.parametrize("expect", [True, False])
@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOSES_ANSWER, Fault.SLOW_DOWN], ids=str)
async def test_a_delete_whose_answer_is_lost_is_done(
    shaky: StorageBackend, store: FaultyStore, fault: Fault, expect: bool
) -> None:
    written = await shaky.write("a", b"1")
    store.once(fault, lambda request: request.method == "DELETE")

    await shaky.delete("a", expect=written.version if expect else None)

    assert store.count(fault) == 1
    with pytest.raises(ObjectMissing):
        await shaky.stat("a")


@pytest.mark.parametrize("seed", range(2))
async def test_no_increment_that_was_acknowledged_is_lost_whatever_happens_to_answers(
    shaky: StorageBackend, store: FaultyStore, seed: int
) -> None:
    await shaky.write("counter", b"0")
    store.rule = at_random(seed, 0.2, (Fault.SLOW_DOWN, Fault.CONFLICT, Fault.CUT, Fault.LOSES_ANSWER))
    acknowledged = doubtful = 0

    async def increment(times: int) -> None:
        nonlocal acknowledged, doubtful
        for _ in range(times):
            content, info = await shaky.read("counter", size_max=99)
            try:
                await shaky.write("counter", b"%d" % (int(content) + 1), expect=info.version)
            except PreconditionFailed:
                continue
            except StorageUnavailable:
                doubtful += 1
            else:
                acknowledged += 1

    await asyncio.gather(*(increment(8) for _ in range(4)))

    store.rule = lambda _: None
    counted = int((await shaky.read("counter", size_max=99))[0])
    assert acknowledged <= counted <= acknowledged + doubtful


@pytest.mark.parametrize(
    "fault",
    [Fault.CUT, Fault.LOSES_ANSWER, Fault.ERROR_IN_200, Fault.SLOW_DOWN, Fault.FAILS],
    ids=str,
)
async def test_a_completion_whose_answer_is_lost_is_found_done(
    shaky: StorageBackend, store: FaultyStore, fault: Fault
) -> None:
    content = random_bytes(6 * MIB)
    upload = await shaky.begin_upload("u")
    await append(upload, content, last=True)
    store.once(fault, lambda request: request.is_complete)

    await upload.commit("x")

    assert store.count(fault) == 1
    assert await content_of(shaky, "x") == content


def reads_data(request: Request) -> bool:
    return request.method == "GET" and request.key.startswith("_store/data/")


@pytest.mark.parametrize("read", [content_of, drained_from], ids=["chunks", "drained"])
async def test_content_whose_connection_breaks_is_taken_up_where_it_broke(
    shaky: StorageBackend, store: FaultyStore, read: Callable[..., Awaitable[bytes]]
) -> None:
    content = random_bytes(6 * MIB)
    await store_content(shaky, "x", content)
    breaks = iter([Fault.TRUNCATES] * 3)
    store.rule = lambda request: next(breaks, None) if reads_data(request) else None

    assert await read(shaky, "x", Span(1, 6 * MIB)) == content[1:]

    assert store.count(Fault.TRUNCATES) == 3


@pytest.mark.parametrize("read", [content_of, drained_from], ids=["chunks", "drained"])
@pytest.mark.parametrize("turn", range(3))
async def test_segments_that_are_asked_for_ahead_are_taken_up_where_they_broke_too(
    in_segments: S3Settings, store: FaultyStore, read: Callable[..., Awaitable[bytes]], turn: int
) -> None:
    content = random_bytes(33 * MIB)
    faults = itertools.cycle([Fault.TRUNCATES, None, Fault.CUT])
    for _ in range(turn):
        next(faults)
    async with opened(replace(in_segments, endpoint=store.url)) as backend:
        await store_content(backend, "x", content)
        store.rule = lambda request: next(faults) if reads_data(request) else None

        assert await read(backend, "x", Span(7, 33 * MIB)) == content[7:]


@pytest.mark.parametrize("way", ["chunks", "drained"])
async def test_a_delivery_that_is_given_up_leaves_no_segment_that_was_asked_for_ahead(
    in_segments: S3Settings, way: str
) -> None:
    goes_on = iter([True, True, False])
    async with opened(in_segments) as backend:
        await store_content(backend, "x", random_bytes(20 * MIB))

        async with backend.deliver("x", Span(3 * MIB, 20 * MIB)) as delivery:
            assert isinstance(delivery, ByteStream)
            if way == "chunks":
                assert len(await anext(delivery.chunks)) == MIB
            else:
                with pytest.raises(ConnectionResetError):
                    await drain(delivery, Gathering(go_on=lambda: next(goes_on)))

        # That no connection is left open is looked at after each test.
        assert len(await content_of(backend, "x")) == 20 * MIB


@pytest.mark.parametrize("way", ["chunks", "drained"])
async def test_content_that_disappears_while_it_is_delivered_never_ends_cleanly(
    shaky: StorageBackend, store: FaultyStore, settings: S3Settings, way: str
) -> None:
    await store_content(shaky, "x", random_bytes(6 * MIB))
    store.once(Fault.TRUNCATES, reads_data)

    async with shaky.deliver("x") as delivery, opened(replace(settings, trash_delay_s=0)) as other:
        await other.delete("x")
        await swept(other)
        with pytest.raises(StorageUnavailable, match="removed while it was read"):
            await (bytes_of(delivery) if way == "chunks" else drain(delivery, Gathering()))


async def test_a_sink_gets_what_came_before_the_store_went_away_and_no_more(
    settings: S3Settings, store: FaultyStore
) -> None:
    content, sink = random_bytes(6 * MIB), Gathering()
    async with opened(replace(settings, endpoint=store.url, retry_timeout_s=0.2)) as backend:
        await store_content(backend, "x", content)
        faults = iter([Fault.TRUNCATES])
        store.rule = lambda request: next(faults, Fault.CUT) if reads_data(request) else None

        async with backend.deliver("x") as delivery:
            with pytest.raises(StorageUnavailable):
                await drain(delivery, sink)

    assert 0 < len(sink.content) <= 3 * MIB
    assert content.startswith(sink.content)


async def test_a_delivery_whose_sink_fails_raises_what_it_raised(backend: StorageBackend) -> None:
    await store_content(backend, "x", random_bytes(6 * MIB))
    goes_on = iter([True, False])

    async with backend.deliver("x") as delivery:
        with pytest.raises(ConnectionResetError, match="the client is gone"):
            await drain(delivery, Gathering(go_on=lambda: next(goes_on)))

    assert len(await content_of(backend, "x")) == 6 * MIB


async def test_sinks_that_wait_hold_threads_and_others_are_told_until_a_cancellation_lets_them_go(
    backend: StorageBackend,
) -> None:
    content = random_bytes(MIB)
    await store_content(backend, "x", content)
    is_waiting = threading.Semaphore(0)
    sinks = [Gathering() for _ in range(_DRAINERS)]

    def wait(sink: Gathering) -> bool:
        is_waiting.release()
        return not sink.is_interrupted.wait(20)

    async def deliver(sink: Gathering) -> None:
        sink._go_on = lambda: wait(sink)
        async with backend.deliver("x") as delivery:
            await drain(delivery, sink)

    deliveries = [asyncio.create_task(deliver(sink)) for sink in sinks]
    for _ in sinks:
        assert await asyncio.to_thread(is_waiting.acquire, timeout=20)

    async with backend.deliver("x") as delivery:
        assert isinstance(delivery, ByteStream)
        assert delivery.drain_into is not None
        assert await delivery.drain_into(Gathering()) is False
        assert await bytes_of(delivery) == content

    for task in deliveries:
        task.cancel()
    await asyncio.wait(deliveries)
    assert all(task.cancelled() for task in deliveries)
    assert await drained_from(backend, "x") == content


async def test_a_stream_that_was_drained_gives_its_connection_back(
    shaky: S3Backend, store: FaultyStore
) -> None:
    await store_content(shaky, "x", random_bytes(3 * MIB))
    connections = shaky._client._client._endpoint.http_session._manager.connection_from_url(store.url)
    before = connections.num_connections

    for _ in range(3):
        await drained_from(shaky, "x")

    assert connections.num_connections == before


async def test_content_whose_bytes_are_gone_is_an_error_and_not_absent(
    backend: StorageBackend, client: S3Client, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    await store_content(backend, "x", b"content")
    for key in await in_bucket():
        if key.startswith("_store/data/"):
            await asyncio.to_thread(client.delete, key)

    with pytest.raises(StorageUnavailable, match="gone from the store"):
        await content_of(backend, "x")


@pytest.mark.parametrize("nth", range(12))
async def test_an_upload_survives_the_loss_of_any_one_answer(
    shaky: StorageBackend, store: FaultyStore, nth: int
) -> None:
    content = random_bytes(12 * MIB)
    number = -1

    def rule(request: Request) -> Fault | None:
        nonlocal number
        number += 1
        return Fault.LOSES_ANSWER if number == nth else None

    store.rule = rule
    upload = await shaky.begin_upload("u")
    await append(upload, content[:MIB])
    await append(upload, content[MIB:], last=True)
    await upload.commit("x")

    assert store.count(Fault.LOSES_ANSWER) == 1
    assert await content_of(shaky, "x") == content


# -- refusals


@pytest.mark.parametrize(
    ("method", "condition", "promise"),
    [
        ("PUT", "If-None-Match", "a create where an object is"),
        ("PUT", "If-Match", "an overwrite of an old version"),
        ("DELETE", "If-Match", "a delete of an old version"),
    ],
)
async def test_a_store_that_ignores_a_condition_is_refused(
    settings: S3Settings, store: FaultyStore, method: str, condition: str, promise: str
) -> None:
    store.rule = lambda request: (
        Fault.IGNORES_CONDITION
        if request.method == method and condition in request.conditions and request.key.startswith(PROBES)
        else None
    )

    with pytest.raises(StorageUnavailable, match=promise):
        async with opened(replace(settings, endpoint=store.url)):
            pass


async def test_a_refused_start_leaves_nothing_in_the_bucket(
    settings: S3Settings, store: FaultyStore, in_bucket: Callable[[], Awaitable[list[str]]]
) -> None:
    store.rule = lambda _: Fault.IGNORES_CONDITION

    with pytest.raises(StorageUnavailable):
        async with opened(replace(settings, endpoint=store.url)):
            pass

    assert await in_bucket() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bucket": "not-there"}, "the bucket does not exist: create it"),
        (
            {"secret_key": "wrong-secret-of-ours"},
            "refuses us: .*SignatureDoesNotMatch.*check the credentials",
        ),
        ({"access_key": "nobody-we-know"}, "refuses us: "),
        ({"endpoint": "http://127.0.0.1:1"}, "cannot be reached"),
    ],
    ids=["bucket", "secret", "access key", "endpoint"],
)
async def test_a_start_that_fails_says_why_without_host_or_secret(
    settings: S3Settings, change: dict[str, str], reason: str
) -> None:
    wrong = replace(settings, retry_timeout_s=0.2, **change)  # type: ignore[arg-type]

    with pytest.raises(StorageUnavailable, match=reason) as refused:
        async with opened(wrong):
            pass

    for secret in (wrong.access_key, wrong.secret_key, "127.0.0.1"):
        assert secret is not None
        assert secret not in str(refused.value)
    assert "secret" not in repr(wrong).replace("secret_key", "")


async def test_a_store_that_is_away_for_longer_than_we_wait_is_unavailable(
    settings: S3Settings, store: FaultyStore
) -> None:
    async with opened(replace(settings, endpoint=store.url, retry_timeout_s=0.3)) as backend:
        store.rule = lambda _: Fault.SLOW_DOWN

        with pytest.raises(StorageUnavailable, match=r"busy: GetObject a was answered with SlowDown \(503\)"):
            await backend.stat("a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"part_size": 5 * MIB - 1}, "parts of"),
        ({"part_size": 33 * MIB}, "64 MiB"),
        ({"prefix": "a/../"}, "not a key"),
        ({"prefix": "a"}, "ends with a slash"),
        ({"prefix": "/"}, "not a key"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        S3Backend(replace(S3Settings("bucket"), **change))


async def test_a_key_that_is_too_long_with_its_prefix_is_refused(settings: S3Settings) -> None:
    async with opened(replace(settings, prefix="p/")) as backend:
        with pytest.raises(ValueError, match="too long"):
            await backend.write("/".join(["b" * 204] * 5), b"")
