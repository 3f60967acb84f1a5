"""What only a bucket can have: objects that our backend did not write, planted past it. fsck names each and goes on; a collection goes
on too, removes nothing that could be needed, and tells which object holds up its sweep.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from click.testing import CliRunner

from kitspec.digest import Digest
from registry import cli, layout
from registry.fsck import Kind
from registry.garbage import Collected, Collector
from registry.journal import Journal
from registry.upload_sessions import UploadSessions
from storage_backends.interface import ObjectDamaged, PreconditionFailed
from storage_backends.s3 import S3Backend
from storage_backends.s3_client import S3Settings
from storage_backends.s3_format import (
    TAIL_SIZE,
    TRASH,
    UPLOAD,
    UPLOADS,
    Tail,
    new_data_key,
    record_to_bytes,
)
from tests.registry.test_fsck import (
    IMAGE,
    KIT,
    SHARED,
    Found,
    Objects,
    Site,
    healthy_objects,
    listed_by,
    manifest_of,
    tags,
)
from tests.storage_backends.s3_server import Buckets, object_store

pytestmark = pytest.mark.s3

FOREIGN = b"somebody else's "


@pytest.fixture(scope="module")
def buckets() -> Iterator[Buckets]:
    with object_store() as buckets:
        yield buckets


@pytest.fixture
def bucket(buckets: Buckets) -> S3Settings:
    return buckets.new()


@pytest.fixture(scope="module")
def objects() -> Objects:
    return healthy_objects()


@pytest.fixture
async def backend(bucket: S3Settings) -> AsyncIterator[S3Backend]:
    backend = S3Backend(bucket, content_prefix=layout.BLOBS)
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
async def site(backend: S3Backend, objects: Objects) -> Site:
    return await Site.filled(backend, objects)


class Past:
    """The bucket, past the backend. It blocks."""

    def __init__(self, settings: S3Settings, backend: S3Backend) -> None:
        self._client = backend._client._client
        self._bucket = settings.bucket

    def put(self, key: str, content: bytes) -> str:
        self._client.put_object(Bucket=self._bucket, Key=key, Body=content)
        return key

    def get(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
        return content

    def change(self, key: str, change: Callable[[bytes], bytes]) -> str:
        return self.put(key, change(self.get(key)))

    def keys(self) -> set[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket)
        return {entry["Key"] for page in pages for entry in page.get("Contents", ())}


def flip(index: int) -> Callable[[bytes], bytes]:
    """A bit of one byte, counted from the end where negative."""

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[index] ^= 1
        return bytes(changed)

    return change


def internal(kind: bytes, content: bytes) -> bytes:
    return content + Tail(kind, len(content), bytes(16)).to_bytes()


Plant = Callable[[Past, Site], Found]
PLANTS: dict[str, Plant] = {}
# Those that hold up the sweep: it cannot know what they name.
HOLD_UP: set[str] = set()


def plant(function: Plant) -> Plant:
    PLANTS[function.__name__] = function
    return function


def holds_up_the_sweep(function: Plant) -> Plant:
    HOLD_UP.add(function.__name__)
    return plant(function)


@plant
def files_of_others(past: Past, _: Site) -> Found:
    keys = ["README.txt", f"repositories/{KIT}/notes.bin", "catalogue/x", "_storey"]
    found = {(Kind.KEY_FOREIGN, past.put(key, FOREIGN[:5])) for key in keys}
    # Of a size that a pointer might have.
    return found | {(Kind.KEY_FOREIGN, past.put(f"{key}2", FOREIGN * 64)) for key in keys}


@plant
def folders_that_a_console_made(past: Past, _: Site) -> Found:
    keys = ["folder/", f"repositories/{KIT}/_tags/", "blobs/sha256/00/", "_store/", "_store/uploads/"]
    return {(Kind.KEY_FOREIGN, past.put(key, b"")) for key in keys}


@plant
def files_of_others_in_the_place_of_the_backend(past: Past, _: Site) -> Found:
    keys = ["data/zz", "data/ab/short", "other/zz", "trash/notes.txt", "uploads/a.txt", "probe/x", "notes"]
    return {(Kind.KEY_FOREIGN, past.put(f"_store/{key}", FOREIGN)) for key in keys}


@plant
def the_end_of_a_tag_is_damaged(past: Past, _: Site) -> Found:
    return {(Kind.RECORD_UNREADABLE, past.change(tags(KIT, "v1"), flip(-TAIL_SIZE)))}


@plant
def a_tag_is_overwritten(past: Past, _: Site) -> Found:
    return {(Kind.RECORD_UNREADABLE, past.put(tags(KIT, "v1"), FOREIGN * 32))}


@plant
def the_end_of_a_manifest_is_damaged(past: Past, site: Site) -> Found:
    manifest = manifest_of(site, KIT, "v1")
    return {(Kind.RECORD_UNREADABLE, past.change(manifest, flip(-TAIL_SIZE)))}


@plant
def the_end_of_an_entry_of_the_journal_is_damaged(past: Past, site: Site) -> Found:
    return {(Kind.RECORD_UNREADABLE, past.change(site.key(layout.JOURNAL), flip(-TAIL_SIZE)))}


def affected(site: Site, kind: Kind, content: str) -> Found:
    """What is found when content that one manifest lists is damaged."""
    return {(kind, content), (Kind.MANIFEST_AFFECTED, manifest_of(site, KIT, "v1"))}


def a_layer(site: Site) -> str:
    return listed_by(site, manifest_of(site, KIT, "v1"))[3]


@holds_up_the_sweep
def the_end_of_a_pointer_is_damaged(past: Past, site: Site) -> Found:
    key = past.change(a_layer(site), flip(-TAIL_SIZE))
    return affected(site, Kind.CONTENT_UNREADABLE, key) | {(Kind.LEFTOVERS_UNKNOWN, key)}


@holds_up_the_sweep
def the_json_of_a_pointer_is_damaged(past: Past, site: Site) -> Found:
    key = past.change(a_layer(site), flip(0))
    return affected(site, Kind.CONTENT_UNREADABLE, key) | {(Kind.LEFTOVERS_UNKNOWN, key)}


@holds_up_the_sweep
def a_pointer_is_cut_by_a_byte(past: Past, site: Site) -> Found:
    key = past.change(a_layer(site), lambda stored: stored[:-1])
    return affected(site, Kind.CONTENT_UNREADABLE, key) | {(Kind.LEFTOVERS_UNKNOWN, key)}


@holds_up_the_sweep
def a_pointer_is_empty(past: Past, site: Site) -> Found:
    key = past.put(a_layer(site), b"")
    return affected(site, Kind.CONTENT_UNREADABLE, key) | {(Kind.LEFTOVERS_UNKNOWN, key)}


@holds_up_the_sweep
def a_file_of_others_lies_beside_the_content(past: Past, _: Site) -> Found:
    key = past.put("blobs/sha256/notes.txt", FOREIGN)
    return {(Kind.CONTENT_NAME, key), (Kind.LEFTOVERS_UNKNOWN, key)}


TRASHED = TRASH + "0" * 32


@holds_up_the_sweep
def the_end_of_a_record_in_the_trash_is_damaged(past: Past, _: Site) -> Found:
    past.put(TRASHED, FOREIGN * 10)
    return {(Kind.INTERNAL_DAMAGED, TRASHED), (Kind.LEFTOVERS_UNKNOWN, TRASHED)}


@holds_up_the_sweep
def the_json_of_a_record_in_the_trash_is_damaged(past: Past, _: Site) -> Found:
    past.put(TRASHED, record_to_bytes(b'{"date": []}')[0])
    return {(Kind.INTERNAL_DAMAGED, TRASHED), (Kind.LEFTOVERS_UNKNOWN, TRASHED)}


@holds_up_the_sweep
def a_record_in_the_trash_names_what_is_no_data(past: Past, _: Site) -> Found:
    past.put(TRASHED, record_to_bytes(json.dumps({"data": [new_data_key("u") + "g"]}).encode())[0])
    return {(Kind.INTERNAL_DAMAGED, TRASHED), (Kind.LEFTOVERS_UNKNOWN, TRASHED)}


UPLOADING = UPLOADS + "0" * 44


@holds_up_the_sweep
def the_end_of_the_state_of_an_upload_is_damaged(past: Past, _: Site) -> Found:
    past.put(UPLOADING, FOREIGN * 10)
    return {(Kind.INTERNAL_DAMAGED, UPLOADING), (Kind.LEFTOVERS_UNKNOWN, UPLOADING)}


@holds_up_the_sweep
def the_json_of_the_state_of_an_upload_is_damaged(past: Past, _: Site) -> Found:
    past.put(UPLOADING, internal(UPLOAD, b'{"x": 1}\n'))
    return {(Kind.INTERNAL_DAMAGED, UPLOADING), (Kind.LEFTOVERS_UNKNOWN, UPLOADING)}


@pytest.fixture
def past(bucket: S3Settings, backend: S3Backend) -> Past:
    return Past(bucket, backend)


async def collect(backend: S3Backend, *, grace_s: float) -> Collected:
    sessions = UploadSessions(backend, count_max=10, per_repository_max=10, size_max=None)
    return await Collector(
        backend, sessions, Journal(backend), grace_s=grace_s, upload_age_s=1e6, journal_keep_s=1e6
    ).run()


@pytest.mark.parametrize("row", PLANTS)
async def test_INV_23_what_is_planted_past_the_backend_is_found_and_nothing_else(
    site: Site, past: Past, row: str
) -> None:
    expected = await asyncio.to_thread(PLANTS[row], past, site)

    found = await site.fsck()

    assert {(finding.kind, finding.key) for finding in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("row", PLANTS)
async def test_a_collection_leaves_what_is_planted_past_the_backend_and_all_that_it_may_name(
    site: Site, backend: S3Backend, past: Past, row: str
) -> None:
    planted = {key for _, key in await asyncio.to_thread(PLANTS[row], past, site)}
    leftover = await asyncio.to_thread(past.put, new_data_key("nobody"), b"left by a crash")
    before = await asyncio.to_thread(past.keys)

    # Old enough is everything.
    if row in HOLD_UP:
        with pytest.raises(ObjectDamaged) as refused:
            await collect(backend, grace_s=-2.0)
        assert refused.value.info.key in planted
        assert refused.value.info.key in str(refused.value)
    else:
        await collect(backend, grace_s=-2.0)

    unlisted = {key for key in site.objects if "sha512" in key}
    gone = before - await asyncio.to_thread(past.keys) - unlisted
    assert gone == (set() if row in HOLD_UP else {leftover})


async def test_what_cannot_be_read_holds_up_no_sweep_any_more_once_it_is_removed(
    site: Site, backend: S3Backend, past: Past
) -> None:
    """As docs/operations.md says."""
    await asyncio.to_thread(the_json_of_a_record_in_the_trash_is_damaged, past, site)
    await asyncio.to_thread(the_end_of_the_state_of_an_upload_is_damaged, past, site)
    leftover = await asyncio.to_thread(past.put, new_data_key("0" * 44), b"of the upload")

    for key in (TRASHED, UPLOADING):
        await asyncio.to_thread(backend._client.delete, key)
    await collect(backend, grace_s=-2.0)

    assert leftover not in await asyncio.to_thread(past.keys)
    assert await site.fsck() == []


async def test_a_damaged_record_that_names_no_bytes_can_be_removed(site: Site, past: Past) -> None:
    keys = [tags(KIT, "v1"), site.key(layout.JOURNAL)]
    for key in keys:
        await asyncio.to_thread(past.change, key, flip(-TAIL_SIZE))
    pointer = await asyncio.to_thread(past.change, a_layer(site), flip(-TAIL_SIZE))

    with pytest.raises(PreconditionFailed):
        await site.backend.delete(keys[0], expect="another")
    for key in keys:
        await site.backend.delete(key)
    with pytest.raises(ObjectDamaged):
        await site.backend.delete(pointer)

    assert not await asyncio.to_thread(past.keys) & set(keys)


async def test_an_upload_whose_state_is_damaged_disturbs_no_other(site: Site, past: Past) -> None:
    sessions = UploadSessions(site.backend, count_max=10, per_repository_max=10, size_max=None)
    begun = await sessions.begin(IMAGE)
    await asyncio.to_thread(the_end_of_the_state_of_an_upload_is_damaged, past, site)

    assert {upload.id for upload in await sessions.under_way()} >= {begun.id}
    assert "0" * 44 not in await sessions.expire(now=site.backend.now() + 1e6, age_s=0)


async def test_folders_and_files_of_others_are_no_tags(site: Site, past: Past) -> None:
    await asyncio.to_thread(past.put, f"repositories/{KIT}/_tags/", b"")

    listed = [info.key async for info in site.backend.list(f"repositories/{KIT}/_tags/")]

    assert listed == site.keys(f"repositories/{KIT}/_tags/")


async def test_B_214_damaged_content_of_two_repositories_is_named_with_all_that_lists_it(
    site: Site, past: Past
) -> None:
    key = await asyncio.to_thread(past.change, layout.blob_key(Digest.of(SHARED)), flip(-TAIL_SIZE))

    found = await site.fsck()

    assert [finding.key for finding in found if finding.kind is Kind.CONTENT_UNREADABLE] == [key]
    assert {finding.kind for finding in found} == {
        Kind.CONTENT_UNREADABLE,
        Kind.MANIFEST_AFFECTED,
        Kind.LEFTOVERS_UNKNOWN,
    }


def test_the_commands_name_what_was_planted_and_do_not_crash(
    bucket: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bucket.endpoint is not None
    assert bucket.access_key is not None
    assert bucket.secret_key is not None
    content = b"content"
    key = layout.blob_key(Digest.of(content))

    async def fill() -> None:
        backend = S3Backend(bucket, content_prefix=layout.BLOBS)
        await backend.start()
        past = Past(bucket, backend)
        await Site.filled(backend, {key: content})
        await asyncio.to_thread(past.change, key, flip(0))
        await asyncio.to_thread(past.put, "README.txt", b"hello")
        await backend.close()

    asyncio.run(fill())
    monkeypatch.setenv("MODELREG_STORAGE_S3_BUCKET", bucket.bucket)
    monkeypatch.setenv("MODELREG_STORAGE_S3_REGIONENDPOINT", bucket.endpoint)
    monkeypatch.setenv("MODELREG_STORAGE_S3_ACCESSKEY", bucket.access_key)
    monkeypatch.setenv("MODELREG_STORAGE_S3_SECRETKEY", bucket.secret_key)

    checked = CliRunner().invoke(cli.main, ["fsck"])
    assert checked.exit_code == 1, checked.output
    assert f"error content-unreadable {key}: " in checked.stdout
    assert "warning key-foreign README.txt: " in checked.stdout

    collected = CliRunner().invoke(cli.main, ["garbage-collect"])
    assert collected.exit_code == 1
    assert key in collected.stderr
