"""fsck: each planted corruption is found, and nothing else; a healthy store has none, also while it is written to.

The rows are told on any backend, through its interface alone: what is planted is what a disk, a bug or a hand could leave.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kitspec.digest import Digest
from kitspec.errors import NameUnknown
from kitspec.names import RepositoryName, Tag
from registry import app, cli, layout
from registry.fsck import Checked, Finding, Fsck, Kind, Severity
from registry.garbage import Collector
from registry.journal import Journal
from registry.upload_sessions import UploadSessions
from storage_backends.interface import StorageBackend, StorageUnavailable
from storage_backends.local import LocalBackend
from storage_backends.memory import MemoryBackend
from storage_backends.s3 import S3Backend, S3Settings
from storage_backends.s3_format import pointer_to_bytes
from tests.registry.conftest import configured, served
from tests.registry.kits import tar_of, whole_kit
from tests.registry.wire import OCI_MANIFEST, Wire, descriptor, encode, image, index
from tests.storage_backends.s3_server import Buckets, object_store

KIT, IMAGE, OTHER = RepositoryName("team/kit"), RepositoryName("team"), RepositoryName("team/other")
LARGE = hashlib.shake_256(b"large").digest(1_200_000)
SHARED = b"a layer of two repositories"
ORPHAN = b"nobody links this"
NOBODY = Digest.of(b"never pushed")
Objects = Mapping[str, bytes]


# ---- a healthy store, made once, by the server itself


async def populate(backend: StorageBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kits, images, an index, referrers, tags, views, tables, the journal, a collection, an upload that goes on."""
    monkeypatch.setattr(app, "make_backend", lambda _: backend)
    async with served(configured({"inmemory": {}})) as url:
        wire = Wire(url)
        kit = whole_kit("gzip")
        kit.add("dataset", "large", tar_of({"large/large.bin": LARGE}), name="large")
        await kit.push(wire, KIT, "v1")
        for view in ("v1.only.model", "v1.as.image", "v1.as.modelpack", "v1.only.docs.as.image"):
            reply = await wire("GET", f"/v2/{KIT}/manifests/{view}")
            assert reply.status == 200, reply.body
        for name in (IMAGE, OTHER):
            await push_image(wire, name)
        await wire.push_blob(IMAGE, b"by another algorithm", "sha512")
        await wire.begin_upload(IMAGE)
    sessions = UploadSessions(backend, count_max=10, per_repository_max=10, size_max=None)
    journal = Journal(backend)
    await journal.mark("reader", journal.settled())
    await Collector(backend, sessions, journal, grace_s=1e6, upload_age_s=1e6, journal_keep_s=1e6).run()
    await backend.write(layout.TOKEN_KEYS, b'{"keys": []}')
    await backend.write(layout.api_key_key("ab" * 32, "id"), b"{}")


async def push_image(wire: Wire, name: RepositoryName) -> None:
    """An image under two tags, an index with a child that has no tag, a signature, and a signature of that."""
    await wire.push_blob(name, b"{}")
    await wire.push_blob(name, SHARED)
    layers = [descriptor(SHARED, "application/vnd.oci.image.layer.v1.tar")]
    first = image(layers=layers)
    digest = await wire.push_manifest(name, "v1", first)
    await wire.push_manifest(name, "latest", first)
    child = image(layers=layers, annotations={"child": "yes"})
    await wire.push_manifest(name, Digest.of(encode(child)), child)
    await wire.push_manifest(name, "all", index([listed(first), listed(child)]))
    signature = image(subject=listed(first), artifactType="example/signature", layers=layers)
    assert Digest.of(encode(first)) == digest
    await wire.push_manifest(name, Digest.of(encode(signature)), signature)
    second = image(subject=listed(signature), artifactType="example/witness", layers=layers)
    await wire.push_manifest(name, Digest.of(encode(second)), second)


def listed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return descriptor(encode(manifest), OCI_MANIFEST)


def healthy_objects() -> Objects:
    """In a thread: a fixture of a module has no event loop."""
    backend = MemoryBackend()
    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(populate(backend, monkeypatch))
    return {key: found.content for key, found in backend._objects.items()}


@pytest.fixture(scope="module")
def objects() -> Objects:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(healthy_objects).result()


@pytest.fixture(scope="module")
def buckets() -> Iterator[Buckets]:
    with object_store() as buckets:
        yield buckets


@pytest.fixture
def bucket(buckets: Buckets) -> S3Settings:
    return buckets.new()


@pytest.fixture(params=["memory", "local", pytest.param("s3", marks=pytest.mark.s3)])
def openings(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], StorageBackend]:
    """Opens the same empty store each time, as other processes do."""
    if request.param == "memory":
        backend = MemoryBackend()
        return lambda: backend
    if request.param == "local":
        return lambda: LocalBackend(tmp_path / "registry", durable=False)
    bucket = request.getfixturevalue("bucket")
    return lambda: S3Backend(bucket, content_prefix=layout.BLOBS)


@pytest.fixture
async def backend(openings: Callable[[], StorageBackend]) -> AsyncIterator[StorageBackend]:
    backend = openings()
    await backend.start()
    yield backend
    await backend.close()


class Site:
    """A healthy store, to plant something in."""

    def __init__(self, backend: StorageBackend, objects: Objects) -> None:
        self.backend = backend
        self.objects = objects

    @classmethod
    async def filled(cls, backend: StorageBackend, objects: Objects) -> Site:
        site = cls(backend, objects)
        await asyncio.gather(*(site.add(key, content) for key, content in objects.items()))
        return site

    def keys(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    def key(self, prefix: str) -> str:
        """The first key that begins so."""
        return self.keys(prefix)[0]

    async def change(self, key: str, change: Callable[[bytes], bytes]) -> str:
        return await self.add(key, change(self.objects[key]))

    async def remove(self, key: str) -> str:
        await self.backend.delete(key)
        return key

    async def add(self, key: str, content: bytes) -> str:
        if layout.digest_of(key) is not None and key.startswith(layout.BLOBS):
            await self.backend.delete(key)
            await store_content(self.backend, key, content, secrets.token_hex(8))
        else:
            await self.backend.write(key, content)
        return key

    async def fsck(self, **options: Any) -> list[Finding]:
        return await findings_of(Fsck(self.backend, **{"grace_s": -2.0, "pause_s": 0.0} | options))


async def store_content(backend: StorageBackend, key: str, content: bytes, upload_id: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield content

    upload = await backend.begin_upload(upload_id)
    await upload.append(chunks(), observe=lambda _: None, note=lambda: b"")
    await upload.commit(key)


async def findings_of(fsck: Fsck) -> list[Finding]:
    async with aclosing(fsck.findings()) as findings:
        return [finding async for finding in findings]


@pytest.fixture
async def site(backend: StorageBackend, objects: Objects) -> Site:
    return await Site.filled(backend, objects)


# ---- what is planted, each with all that is to be found


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def tags(name: RepositoryName, tag: str) -> str:
    return layout.tag_key(name, Tag(tag))


def manifest_of(site: Site, name: RepositoryName, tag: str) -> str:
    """Key of the manifest that a tag names."""
    return layout.manifest_key(name, Digest(json.loads(site.objects[tags(name, tag)])["digest"]))


def listed_by(site: Site, manifest: str) -> list[str]:
    """Keys of the content that a manifest lists, its config first."""
    document = json.loads(site.objects[manifest].partition(b"\n")[2])
    return [layout.blob_key(Digest(one["digest"])) for one in (document["config"], *document["layers"])]


def record_of(content: bytes, **head: Any) -> bytes:
    fields = {"mediaType": OCI_MANIFEST, "digest": Digest.of(content), "depth": 0, "nonce": "n"} | head
    return encode(fields) + b"\n" + content


Found = set[tuple[Kind, str]]
Plant = Callable[[Site], Awaitable[Found]]
PLANTS: dict[str, Plant] = {}


def plant(function: Plant) -> Plant:
    PLANTS[function.__name__] = function
    return function


@plant
async def a_bit_of_content_flips(site: Site) -> Found:
    manifest = manifest_of(site, KIT, "v1")
    key = await site.change(listed_by(site, manifest)[3], flipped)
    return {(Kind.CONTENT_DIGEST, key), (Kind.MANIFEST_AFFECTED, manifest)}


@plant
async def content_is_cut_short(site: Site) -> Found:
    manifest = manifest_of(site, KIT, "v1")
    key = await site.change(listed_by(site, manifest)[3], lambda content: content[:-1])
    return {(Kind.CONTENT_DIGEST, key), (Kind.LISTED_SIZE, manifest), (Kind.MANIFEST_AFFECTED, manifest)}


@plant
async def content_has_more_bytes(site: Site) -> Found:
    manifest = manifest_of(site, KIT, "v1")
    key = await site.change(listed_by(site, manifest)[1], lambda content: content + b"x")
    return {(Kind.CONTENT_DIGEST, key), (Kind.LISTED_SIZE, manifest), (Kind.MANIFEST_AFFECTED, manifest)}


@plant
async def content_of_another_algorithm_flips(site: Site) -> Found:
    return {(Kind.CONTENT_DIGEST, await site.change(site.key("blobs/sha512/"), flipped))}


@plant
async def content_is_empty(site: Site) -> Found:
    return {(Kind.CONTENT_DIGEST, await site.change(site.key("blobs/sha512/"), lambda _: b""))}


@plant
async def content_of_one_repository_is_gone(site: Site) -> Found:
    manifest = manifest_of(site, KIT, "v1")
    digest = layout.digest_of(await site.remove(listed_by(site, manifest)[3]))
    assert digest is not None
    return {(Kind.LINK_DANGLING, layout.link_key(KIT, digest)), (Kind.MANIFEST_AFFECTED, manifest)}


@plant
async def B_214_content_of_two_repositories_is_missing_in_a_restored_backup(site: Site) -> Found:
    digest = Digest.of(SHARED)
    await site.remove(layout.blob_key(digest))
    return {
        found
        for name in (IMAGE, OTHER)
        for found in {
            (Kind.LINK_DANGLING, layout.link_key(name, digest)),
            *(
                (Kind.MANIFEST_AFFECTED, key)
                for key in site.keys(f"repositories/{name}/_manifests/")
                if key != manifest_of(site, name, "all")
            ),
        }
    }


@plant
async def the_table_of_a_layer_outlives_it(site: Site) -> Found:
    key = f"cache/members/sha256/{NOBODY.encoded[:2]}/{NOBODY.encoded}.tar"
    return {(Kind.CACHE_ORPHAN, await site.add(key, site.objects[site.key("cache/members/")]))}


@plant
async def a_table_is_damaged(site: Site) -> Found:
    return {(Kind.CACHE_DAMAGED, await site.change(site.key("cache/members/"), flipped))}


@plant
async def a_table_is_cut_short(site: Site) -> Found:
    return {(Kind.CACHE_DAMAGED, await site.change(site.key("cache/members/"), lambda table: table[:3]))}


@plant
async def the_digest_of_a_layer_that_is_written_anew_is_damaged(site: Site) -> Found:
    return {(Kind.CACHE_DAMAGED, await site.add(layout.tar_key(NOBODY), b"\xff"))}


@plant
async def a_file_in_blobs_is_no_digest(site: Site) -> Found:
    keys = ["blobs/notes.txt", "blobs/sha256/zz/short", f"blobs/sha256/00/{NOBODY.encoded}"]
    keys.append(f"blobs/copy/{layout.blob_key(NOBODY).removeprefix(layout.BLOBS)}")
    return {(Kind.CONTENT_NAME, await site.add(key, b"?")) for key in keys}


@plant
async def nobody_links_content(site: Site) -> Found:
    return {(Kind.CONTENT_UNLINKED, await site.add(layout.blob_key(Digest.of(ORPHAN)), ORPHAN))}


@plant
async def a_link_has_no_content(site: Site) -> Found:
    return {(Kind.LINK_DANGLING, await site.add(layout.link_key(KIT, NOBODY), b""))}


@plant
async def a_link_is_gone(site: Site) -> Found:
    await site.remove(layout.link_key(OTHER, Digest.of(SHARED)))
    listing = set(site.keys(f"repositories/{OTHER}/_manifests/")) - {manifest_of(site, OTHER, "all")}
    return {(Kind.LISTED_MISSING, key) for key in listing}


@plant
async def the_only_link_is_gone(site: Site) -> Found:
    manifest = manifest_of(site, KIT, "v1")
    content = listed_by(site, manifest)[3]
    digest = layout.digest_of(content)
    assert digest is not None
    await site.remove(layout.link_key(KIT, digest))
    return {(Kind.LISTED_MISSING, manifest), (Kind.CONTENT_UNLINKED, content)}


@plant
async def a_child_of_an_index_is_gone(site: Site) -> Found:
    named = {manifest_of(site, IMAGE, tag) for tag in ("v1", "all")}
    child = next(
        key
        for key in site.keys(f"repositories/{IMAGE}/_manifests/")
        if key not in named and b"child" in site.objects[key]
    )
    await site.remove(child)
    return {(Kind.LISTED_MISSING, manifest_of(site, IMAGE, "all"))}


@plant
async def an_index_says_another_size(site: Site) -> Found:
    child = json.loads(site.objects[manifest_of(site, IMAGE, "all")].partition(b"\n")[2])["manifests"][0]
    content = encode(index([child | {"size": child["size"] + 1}]))
    key = layout.manifest_key(IMAGE, Digest.of(content))
    media_type = "application/vnd.oci.image.index.v1+json"
    return {(Kind.LISTED_SIZE, await site.add(key, record_of(content, mediaType=media_type, depth=1)))}


@plant
async def the_head_of_a_manifest_is_damaged(site: Site) -> Found:
    return {
        (Kind.MANIFEST_RECORD, await site.change(manifest_of(site, KIT, "v1"), lambda record: record[9:]))
    }


@plant
async def the_record_of_a_manifest_is_empty(site: Site) -> Found:
    return {(Kind.MANIFEST_RECORD, await site.change(manifest_of(site, KIT, "v1"), lambda _: b""))}


@plant
async def the_record_of_a_manifest_is_too_large(site: Site) -> Found:
    key = manifest_of(site, KIT, "v1")
    return {(Kind.MANIFEST_RECORD, await site.change(key, lambda record: record + bytes(5 * 1024 * 1024)))}


@plant
async def a_bit_of_a_manifest_flips(site: Site) -> Found:
    return {(Kind.MANIFEST_DIGEST, await site.change(manifest_of(site, KIT, "v1"), flipped))}


@plant
async def a_manifest_stands_at_the_key_of_another(site: Site) -> Found:
    other = site.objects[manifest_of(site, IMAGE, "v1")]
    return {(Kind.MANIFEST_KEY, await site.change(manifest_of(site, KIT, "v1"), lambda _: other))}


@plant
async def a_manifest_is_none(site: Site) -> Found:
    keys = {layout.manifest_key(KIT, Digest.of(content)): content for content in (b"{}", b"[1", b"\xff")}
    odd = layout.manifest_key(KIT, Digest.of(b"odd"))
    keys_and_records = {key: record_of(content) for key, content in keys.items()}
    keys_and_records[odd] = record_of(b"odd", mediaType=7)
    return {(Kind.MANIFEST_INVALID, await site.add(key, record)) for key, record in keys_and_records.items()}


@plant
async def a_tag_is_damaged(site: Site) -> Found:
    records = {"a": b"", "b": b"[]", "c": b"{}", "d": b'{"digest": 7}', "e": b'{"digest": "sha256:short"}'}
    return {(Kind.TAG_RECORD, await site.add(tags(KIT, tag), record)) for tag, record in records.items()}


@plant
async def a_tag_names_a_manifest_that_is_not_there(site: Site) -> Found:
    return {(Kind.TAG_DANGLING, await site.add(tags(KIT, "v2"), encode({"digest": NOBODY, "nonce": "n"})))}


@plant
async def a_tag_names_a_manifest_of_another_repository(site: Site) -> Found:
    record = site.objects[tags(KIT, "v1")]
    return {(Kind.TAG_DANGLING, await site.add(tags(IMAGE, "v2"), record))}


@plant
async def the_manifest_of_tags_is_gone(site: Site) -> Found:
    await site.remove(manifest_of(site, KIT, "v1"))
    views = site.keys(f"repositories/{KIT}/_views/")
    return {(Kind.TAG_DANGLING, tags(KIT, "v1")), *((Kind.VIEW_ORPHAN, key) for key in views)}


def entries(site: Site, name: RepositoryName) -> list[tuple[str, Digest, str]]:
    """Keys of referrers' entries, each with its subject and the key of its manifest."""
    found = []
    for key in site.keys(f"repositories/{name}/_referrers/"):
        part = layout.in_repository(key)
        assert part is not None
        assert part.digest is not None
        assert part.other is not None
        found.append((key, part.digest, layout.manifest_key(name, part.other)))
    return found


@plant
async def the_entry_of_a_referrer_is_gone(site: Site) -> Found:
    key, _, manifest = entries(site, IMAGE)[0]
    await site.remove(key)
    return {(Kind.REFERRER_MISSING, manifest)}


@plant
async def the_entry_of_a_referrer_is_stale(site: Site) -> Found:
    key, _, _ = entries(site, IMAGE)[0]
    document = json.loads(site.objects[key])
    return {(Kind.REFERRER_STALE, await site.add(key, encode(document | {"annotations": {"old": "1"}})))}


@plant
async def the_entry_of_a_referrer_is_damaged(site: Site) -> Found:
    return {
        (Kind.REFERRER_STALE, await site.change(key, lambda _: b"[]")) for key, _, _ in entries(site, IMAGE)
    }


@plant
async def an_entry_stands_under_the_wrong_subject(site: Site) -> Found:
    key, _, manifest = entries(site, IMAGE)[0]
    part = layout.in_repository(manifest)
    assert part is not None
    assert part.digest is not None
    wrong = layout.referrer_key(IMAGE, NOBODY, part.digest)
    return {(Kind.REFERRER_STALE, await site.add(wrong, site.objects[key]))}


@plant
async def an_entry_has_no_manifest(site: Site) -> Found:
    key, subject, _ = entries(site, IMAGE)[0]
    stray = layout.referrer_key(IMAGE, subject, NOBODY)
    return {(Kind.REFERRER_ORPHAN, await site.add(stray, site.objects[key]))}


@plant
async def a_repository_is_not_in_the_catalogue(site: Site) -> Found:
    await site.remove(layout.catalog_key(KIT))
    return {(Kind.CATALOG_MISSING, site.key(f"repositories/{KIT}/_blobs/"))}


@plant
async def the_catalogue_has_a_name_that_is_none(site: Site) -> Found:
    return {(Kind.CATALOG_NAME, await site.add(key, b"")) for key in ("catalog/Bad!", "catalog/team/kit")}


@plant
async def what_was_derived_has_lost_its_source(site: Site) -> Found:
    key = layout.view_key(KIT, Digest.of(b"view"), NOBODY)
    record = encode({"of": NOBODY, "mediaType": OCI_MANIFEST, "nonce": "n"}) + b"\nview"
    return {(Kind.VIEW_ORPHAN, await site.add(key, record))}


@plant
async def what_was_derived_is_damaged(site: Site) -> Found:
    keys = [key for key in site.keys(f"repositories/{KIT}/_views/") if b"recipe" not in site.objects[key]]
    changes: tuple[Callable[[bytes], bytes], ...] = (
        flipped,
        lambda record: record[5:],
        lambda record: re.sub(rb'"of": "[^"]*"', b'"of": "%s"' % NOBODY.encode(), record),
        lambda _: b"",
    )
    return {
        (Kind.VIEW_DAMAGED, await site.change(key, change))
        for key, change in zip(keys, changes, strict=False)
    }


@plant
async def nothing_says_that_something_was_derived(site: Site) -> Found:
    await site.remove(layout.viewed_key(KIT))
    return {(Kind.VIEW_UNMARKED, site.key(f"repositories/{KIT}/_views/"))}


@plant
async def a_pack_is_damaged(site: Site) -> Found:
    return {(Kind.PACK_DAMAGED, await site.change(site.key(f"repositories/{KIT}/_packs/"), lambda _: b"{}"))}


@plant
async def a_pack_has_lost_its_document(site: Site) -> Found:
    record = site.objects[site.key(f"repositories/{KIT}/_packs/")]
    return {(Kind.PACK_ORPHAN, await site.add(layout.pack_key(KIT, NOBODY), record))}


@plant
async def an_entry_of_the_journal_is_damaged(site: Site) -> Found:
    first, second = site.keys(layout.JOURNAL)[:2]
    return {
        (Kind.JOURNAL_DAMAGED, await site.change(first, lambda record: record[:-2])),
        (Kind.JOURNAL_DAMAGED, await site.change(second, lambda _: b"{}")),
    }


@plant
async def a_record_of_the_registry_itself_is_damaged(site: Site) -> Found:
    keys = (layout.COLLECTION, layout.TOKEN_KEYS, site.key(layout.API_KEYS))
    return {(Kind.RECORD_DAMAGED, await site.change(key, lambda _: b"[secret")) for key in keys}


@plant
async def there_are_keys_of_nobody(site: Site) -> Found:
    keys = [
        "notes.txt",
        "blobs-of-old/x",
        "zzz/x",
        "cache/members/x",
        "cache/tars/x",
        "journal/x",
        "maintenance/x",
        f"repositories/BAD/_blobs/sha256/{NOBODY.encoded}",
        f"repositories/{KIT}/_blobs/sha256/short",
        f"repositories/{KIT}/_other/x",
        "repositories/stray",
    ]
    return {(Kind.KEY_FOREIGN, await site.add(key, b"?")) for key in keys}


@plant
async def there_are_keys_that_would_be_taken_for_ours(site: Site) -> Found:
    keys = [
        f"repositories/{KIT}/_tags/.hidden",
        f"repositories/{KIT}/_tags/a/b",
        f"repositories/{KIT}/_packs/sha256/short",
        f"repositories/{KIT}/_views/sha256/{NOBODY.encoded}/x",
        f"repositories/{KIT}/_referrers/sha256/{NOBODY.encoded}/{NOBODY}",
    ]
    return {(Kind.KEY_IN_THE_WAY, await site.add(key, b"?")) for key in keys}


@pytest.mark.parametrize("row", PLANTS)
async def test_INV_23_what_is_planted_is_found_and_nothing_else(site: Site, row: str) -> None:
    expected = await PLANTS[row](site)

    found = await site.fsck()

    assert {(finding.kind, finding.key) for finding in found} == expected
    assert len(found) == len(expected)
    assert not any("secret" in finding.to_line() for finding in found)


def test_there_is_a_test_for_every_kind() -> None:
    folder = Path(__file__).parent
    text = "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("test_fsck.py", "test_fsck_bucket.py")
    )

    assert not {kind.name for kind in Kind if f"Kind.{kind.name}" not in text}


async def test_a_healthy_store_has_no_fault(site: Site) -> None:
    fsck = Fsck(site.backend, grace_s=-2.0, pause_s=0.0)

    assert await findings_of(fsck) == []

    blobs = [content for key, content in site.objects.items() if key.startswith(layout.BLOBS)]
    size = sum(map(len, blobs))
    assert fsck.checked == Checked(
        repositories=3,
        manifests=len([key for key in site.objects if "/_manifests/" in key]),
        tags=7,
        blobs=len(blobs),
        size=size,
        hashed=size,
    )


# ---- what depends on more than what is stored


async def test_garbage_is_what_is_older_than_the_grace_time(site: Site) -> None:
    await nobody_links_content(site)
    await an_entry_has_no_manifest(site)
    await what_was_derived_has_lost_its_source(site)

    assert await site.fsck(grace_s=3600.0) == []
    assert {finding.severity for finding in await site.fsck()} == {Severity.GARBAGE}


async def test_what_a_sparse_manifest_lists_and_is_not_here_is_a_note(site: Site) -> None:
    expected = await a_link_is_gone(site)

    found = await site.fsck(allow_sparse=True)

    assert {finding.key for finding in found} == {key for _, key in expected}
    assert {finding.kind for finding in found} == {Kind.LISTED_SPARSE}


async def test_without_content_only_its_bytes_are_not_looked_at(site: Site) -> None:
    await content_of_another_algorithm_flips(site)
    await a_table_is_damaged(site)
    expected = await a_link_has_no_content(site)
    fsck = Fsck(site.backend, grace_s=-2.0, pause_s=0.0, with_content=False)

    assert {(finding.kind, finding.key) for finding in await findings_of(fsck)} == expected
    assert fsck.checked.hashed == 0


async def test_one_repository_is_looked_at_alone(site: Site) -> None:
    await B_214_content_of_two_repositories_is_missing_in_a_restored_backup(site)
    await there_are_keys_of_nobody(site)
    expected = await a_bit_of_content_flips(site)
    fsck = Fsck(site.backend, grace_s=-2.0, pause_s=0.0, names=[KIT, KIT])

    found = await findings_of(fsck)

    foreign = {f"repositories/{KIT}/_blobs/sha256/short", f"repositories/{KIT}/_other/x"}
    assert {(finding.kind, finding.key) for finding in found} == expected | {
        (Kind.KEY_FOREIGN, key) for key in foreign
    }
    assert fsck.checked.repositories == 1
    assert fsck.checked.blobs == len(site.keys(f"repositories/{KIT}/_blobs/"))


async def test_a_repository_that_is_not_there_is_said(site: Site) -> None:
    with pytest.raises(NameUnknown, match="no repository team/none here"):
        await site.fsck(names=[RepositoryName("team/none")])


async def test_a_repository_without_anything_in_it_is_healthy(site: Site) -> None:
    await site.add("catalog/empty!", b"")

    assert await site.fsck() == []
    assert await site.fsck(names=[RepositoryName("empty")]) == []


class Failing:
    """A backend some of whose objects cannot be read; told of every call that writes."""

    def __init__(
        self, inner: StorageBackend, *, unreadable: str | None = None, is_away: bool = False
    ) -> None:
        self._inner = inner
        self._unreadable = unreadable
        self.is_away = is_away
        self.read_whole: list[str] = []

    def __getattr__(self, name: str) -> Any:
        assert name in {"stat", "now", "strays"}, f"fsck called {name}"
        return getattr(self._inner, name)

    def _check(self, key: str) -> None:
        if self.is_away or key == self._unreadable:
            raise StorageUnavailable(f"{key}: Input/output error (EIO)")

    async def read(self, key: str, *, size_max: int) -> Any:
        self._check(key)
        self.read_whole.append(key)
        return await self._inner.read(key, size_max=size_max)

    @asynccontextmanager
    async def deliver(self, key: str) -> AsyncIterator[Any]:
        self._check(key)
        async with self._inner.deliver(key) as delivery:
            yield delivery

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Any]:
        self._check(prefix)
        async for info in self._inner.list(prefix, after=after):
            yield info

    async def sweep(self, *, age_s: float, dry_run: bool = False) -> AsyncIterator[Any]:
        assert dry_run
        async for left in self._inner.sweep(age_s=age_s, dry_run=dry_run):
            yield left


async def test_nothing_is_written_and_no_content_is_held_in_memory(site: Site) -> None:
    await nobody_links_content(site)
    await a_bit_of_content_flips(site)
    watched: Any = Failing(site.backend)

    assert await findings_of(Fsck(watched, grace_s=0.0, pause_s=0.0))
    assert watched.read_whole
    assert not [key for key in watched.read_whole if key.startswith((layout.BLOBS, layout.MEMBERS))]


@pytest.mark.parametrize(
    ("prefix", "kinds"),
    [
        ("blobs/sha512/", {Kind.CONTENT_UNREADABLE}),
        (f"repositories/{KIT}/_tags/", {Kind.RECORD_UNREADABLE}),
        (f"repositories/{KIT}/_manifests/", {Kind.RECORD_UNREADABLE}),
        ("cache/members/", {Kind.RECORD_UNREADABLE}),
    ],
)
async def test_one_object_that_cannot_be_read_is_a_finding(site: Site, prefix: str, kinds: set[Kind]) -> None:
    key = site.key(prefix)
    failing: Any = Failing(site.backend, unreadable=key)

    found = await findings_of(Fsck(failing, grace_s=0.0, pause_s=0.0))

    assert {(finding.kind, finding.key) for finding in found} == {(kind, key) for kind in kinds}
    assert found[0].seen.endswith("Input/output error (EIO)")


async def test_a_store_that_cannot_be_read_ends_it(site: Site) -> None:
    failing: Any = Failing(site.backend)
    fsck = Fsck(failing, grace_s=0.0, pause_s=0.0, on_progress=lambda _: setattr(failing, "is_away", True))

    with pytest.raises(StorageUnavailable):
        await findings_of(fsck)


@pytest.mark.s3
@pytest.mark.parametrize("kind", [Kind.CONTENT_UNREADABLE, Kind.CONTENT_DIGEST])
async def test_content_that_is_lost_or_damaged_behind_its_pointer_is_found(
    kind: Kind, bucket: S3Settings, objects: Objects
) -> None:
    backend = S3Backend(bucket)
    await backend.start()
    site = await Site.filled(backend, objects)
    manifest = manifest_of(site, KIT, "v1")
    key = listed_by(site, manifest)[3]

    def plant() -> None:
        (segment,) = backend._records.segments(backend._records.look(key))
        if kind is Kind.CONTENT_UNREADABLE:
            backend._client.delete(segment.key)
        else:
            pointed = backend._client.put(segment.key, flipped(site.objects[key]))
            stored, _ = pointer_to_bytes([dataclasses.replace(segment, version=pointed)])
            backend._client.put(key, stored)

    await asyncio.to_thread(plant)
    found = await site.fsck()
    await backend.close()

    assert {(finding.kind, finding.key) for finding in found} == {
        (kind, key),
        (Kind.MANIFEST_AFFECTED, manifest),
    }


# ---- while everything is written


async def test_what_is_mended_before_the_second_look_is_no_finding(site: Site) -> None:
    manifest = manifest_of(site, KIT, "v1")
    digest = layout.digest_of(listed_by(site, manifest)[3])
    assert digest is not None
    link = await site.remove(layout.link_key(KIT, digest))

    class Mended(Failing):
        async def stat(self, key: str) -> Any:
            if key == link:
                await self._inner.write(link, b"")
            return await self._inner.stat(key)

    backend: Any = Mended(site.backend)

    assert await findings_of(Fsck(backend, grace_s=3600.0, pause_s=0.0)) == []


async def test_what_is_written_between_two_looks_is_looked_at_once_more(site: Site) -> None:
    expected = await a_tag_names_a_manifest_that_is_not_there(site)
    ((_, tag),) = expected
    looks: list[str] = []

    class Moved(Failing):
        async def stat(self, key: str) -> Any:
            if key == tag:
                looks.append(key)
                if len(looks) == 2:
                    await self._inner.touch(key)
            return await self._inner.stat(key)

    backend: Any = Moved(site.backend)

    assert {
        (finding.kind, finding.key)
        for finding in await findings_of(Fsck(backend, grace_s=3600.0, pause_s=0.0))
    } == expected
    assert len(looks) == 3


async def keep_busy(wire: Wire, name: RepositoryName, number: int, done: asyncio.Event) -> int:
    """Push, move tags, sign, look at views and delete, until it is enough; how many rounds."""
    rounds = 0
    while not done.is_set():
        own = f"{number} {rounds}".encode()
        await wire.push_blob(name, own)
        await wire.push_blob(name, b"{}")
        layers = [descriptor(own, "application/vnd.oci.image.layer.v1.tar")]
        manifest = image(layers=layers, annotations={"of": own.decode()})
        digest = await wire.push_manifest(name, f"own{number}", manifest)
        await wire.push_manifest(name, "shared", manifest)
        signature = image(layers=layers, subject=listed(manifest))
        signed = await wire.push_manifest(name, Digest.of(encode(signature)), signature)
        await wire.push_manifest(name, f"all{number}", index([listed(manifest)]))
        kit = whole_kit()
        kit.annotations["of"] = own.decode()
        kit_digest = await kit.push(wire, name, f"kit{number}")
        assert (await wire("GET", f"/v2/{name}/manifests/kit{number}.only.docs.as.modelpack")).status == 200
        for target in (f"all{number}", kit_digest, signed, digest):
            reference = Digest.of(encode(index([listed(manifest)]))) if target == f"all{number}" else target
            assert (await wire("DELETE", f"/v2/{name}/manifests/{reference}")).status == 202
        assert (await wire("DELETE", f"/v2/{name}/blobs/{Digest.of(own)}")).status == 202
        rounds += 1
    return rounds


async def test_B_213_nothing_is_found_while_everything_is_written(
    site: Site, openings: Callable[[], StorageBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "make_backend", lambda _: openings())
    done = asyncio.Event()
    async with served(configured({"inmemory": {}})) as url, asyncio.TaskGroup() as group:
        busy = [
            group.create_task(keep_busy(Wire(url), name, number, done))
            for number, name in enumerate((IMAGE, OTHER, KIT, IMAGE))
        ]
        found = []
        for _ in range(5 if isinstance(site.backend, S3Backend) else 20):
            found += await findings_of(Fsck(site.backend, grace_s=60.0, pause_s=0.05))
        done.set()

    assert found == []
    assert all(task.result() for task in busy)


# ---- from a shell


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["fsck", *arguments])


@pytest.fixture
def folder(tmp_path: Path, objects: Objects) -> Path:
    """A healthy store in a folder, with what a crashed writer left."""
    root = tmp_path / "store"

    async def fill() -> None:
        backend = LocalBackend(root, durable=False)
        await backend.start()
        await Site.filled(backend, objects)
        await backend.close()

    asyncio.run(fill())
    (root / "_store" / "tmp" / "left").write_bytes(b"by a crash")
    os.utime(root / "_store" / "tmp" / "left", (1e9, 1e9))
    return root


def tree(root: Path) -> str:
    """Of names, times and bytes of everything."""
    whole = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        whole.update(f"{path} {path.lstat().st_mtime_ns} {path.lstat().st_mode} ".encode() + content)
    return whole.hexdigest()


def test_a_healthy_folder_is_status_0_and_is_not_changed(folder: Path) -> None:
    before = tree(folder)

    result = run("--storage", str(folder))

    assert result.exit_code == 0, result.output
    garbage, summary = result.stdout.splitlines()
    assert garbage == f"garbage: 1 {Kind.LEFTOVER.word}, 10 bytes"
    assert re.fullmatch(
        r"0 errors, 0 warnings in 3 repositories, \d+ manifests, 7 tags, \d+ blobs of (\d+) bytes; \1 bytes were read",
        summary,
    )
    assert tree(folder) == before


def test_an_error_is_a_line_and_status_1(folder: Path) -> None:
    (folder / "repositories" / KIT / "_tags" / "v2").write_text(json.dumps({"digest": NOBODY}))
    before = tree(folder)

    result = run("--storage", str(folder), "--no-content")

    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == (
        f"error tag-dangling repositories/{KIT}/_tags/v2: it names {NOBODY}, which {KIT} does not have; "
        "wanted a manifest of its repository: push the manifest again, or delete the tag"
    )
    assert "1 errors, 0 warnings" in result.stdout
    assert tree(folder) == before


def test_a_warning_is_a_line_and_status_0(folder: Path) -> None:
    (folder / "notes.txt").write_text("?")

    result = run("--storage", str(folder), "--no-content")

    assert result.exit_code == 0
    assert result.stdout.startswith(
        "warning key-foreign notes.txt: a key that is none of the registry's; wanted "
    )


def test_json_is_an_object_for_each_finding_and_a_summary(folder: Path) -> None:
    orphan = folder / layout.blob_key(Digest.of(ORPHAN))
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(ORPHAN)
    os.utime(orphan, (1e9, 1e9))

    result = run("--storage", str(folder), "--json")

    *findings, last = map(json.loads, result.stdout.splitlines())
    assert result.exit_code == 0
    assert {(finding["severity"], finding["kind"]) for finding in findings} == {
        ("garbage", "content-unlinked"),
        ("garbage", "leftover"),
    }
    assert all(
        finding.keys() == {"severity", "kind", "key", "seen", "wanted", "remedy"} for finding in findings
    )
    assert last["summary"]["garbage"] == 2
    assert last["summary"]["garbageBytes"] == len(ORPHAN) + len(b"by a crash")
    assert last["summary"]["kinds"] == {"content-unlinked": 1, "leftover": 1}
    assert last["summary"]["error"] == 0


def test_garbage_is_what_is_older_than_grace(folder: Path) -> None:
    orphan = folder / layout.blob_key(Digest.of(ORPHAN))
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(ORPHAN)
    os.utime(orphan, (1e9, 1e9))

    assert "1 content-unlinked" in run("--storage", str(folder), "--grace", "24h").stdout
    assert "content-unlinked" not in run("--storage", str(folder), "--grace", "500000h").stdout


def test_repositories_are_chosen_by_name(folder: Path) -> None:
    (folder / "repositories" / KIT / "_tags" / "v2").write_text("")
    (folder / "repositories" / OTHER / "_tags" / "v2").write_text("")

    result = run("--storage", str(folder), "--repository", OTHER, "--repository", IMAGE)

    assert result.exit_code == 1
    assert "1 errors, 0 warnings in 2 repositories" in result.stdout
    assert f"repositories/{OTHER}/_tags/v2" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--repository", "team/none"], 2, "no repository team/none here"),
        (["--repository", "NONE"], 2, "not a repository name: 'NONE'"),
        (["--grace", "soon"], 2, "should be a duration"),
        (["--storage", "ftp://x/y"], 2, "is not a folder"),
    ],
)
def test_wrong_usage_is_status_2(folder: Path, arguments: list[str], status: int, said: str) -> None:
    result = run("--storage", str(folder), *arguments)

    assert result.exit_code == status
    assert said in result.stderr


def test_a_folder_that_holds_no_storage_is_refused_and_not_made_one(tmp_path: Path) -> None:
    result = run("--storage", str(tmp_path / "none"))

    assert result.exit_code == 1
    assert f"{tmp_path / 'none'}: no storage of a registry here" in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_folder_of_a_newer_version_is_refused(folder: Path) -> None:
    (folder / "_store" / "layout").write_text("99\n")

    result = run("--storage", str(folder))

    assert result.exit_code == 1
    assert "run the version that wrote it, or a newer one" in result.stderr


def test_INV_24_a_restored_backup_without_empty_folders_is_healthy(folder: Path) -> None:
    (folder / "_store" / "tmp" / "left").unlink()
    (folder / "_store" / "tmp").rmdir()

    result = run("--storage", str(folder))

    assert result.exit_code == 0
    assert result.stdout.startswith(f"warning {Kind.LEFTOVERS_UNKNOWN.word} _store: ")
