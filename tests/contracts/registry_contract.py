"""What every OciRegistry promises. A registry's tests subclass RegistryContract and supply `registry`, an empty one.

A subclass may say that blobs are shared by all its repositories, as those of an image layout are.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any, ClassVar

import pytest

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    BlobUploadUnknown,
    DigestInvalid,
    ManifestBlobUnknown,
    ManifestInvalid,
    ManifestTooLarge,
    ManifestUnknown,
    NameUnknown,
    RangeInvalid,
    UploadOutOfOrder,
)
from kitspec.http_fields import ByteSpan
from kitspec.interface import OciRegistry
from kitspec.media_types import OCI_INDEX, OCI_MANIFEST
from kitspec.names import RepositoryName, Tag

REPOSITORY = RepositoryName("lib/a")
OTHER = RepositoryName("lib/b")
CONTENT = bytes(range(256)) * 40
UNKNOWN = Digest.of(b"never pushed")
CONFIG_TYPE = "application/vnd.example.config.v1+json"
LAYER_TYPE = "application/vnd.example.layer.v1.tar"


class ChunksFail(Exception):
    pass


async def chunks_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def chunks_then_failure(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    raise ChunksFail


async def joined(chunks: AsyncIterable[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def push_blob(registry: OciRegistry, content: bytes, name: RepositoryName = REPOSITORY) -> Descriptor:
    upload = await registry.begin_upload(name)
    await upload.append(chunks_of(content))
    return await upload.commit(Digest.of(content))


async def read_blob(
    registry: OciRegistry, digest: Digest, span: ByteSpan | None = None, name: RepositoryName = REPOSITORY
) -> bytes:
    async with registry.open_blob(name, digest, span) as body:
        content = await joined(body)
        assert body.size == len(content)
        return content


def manifest_of(config: Descriptor, *layers: Descriptor, **fields: Any) -> bytes:
    def listed(blob: Descriptor, media_type: str) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": blob.digest, "size": blob.size}

    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": listed(config, CONFIG_TYPE),
        "layers": [listed(layer, LAYER_TYPE) for layer in layers],
    }
    return json.dumps(document | fields).encode()


def index_of(*manifests: Descriptor) -> bytes:
    listed = [{"mediaType": one.media_type, "digest": one.digest, "size": one.size} for one in manifests]
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed}).encode()


async def push_manifest(
    registry: OciRegistry,
    *tags: str,
    name: RepositoryName = REPOSITORY,
    layer: bytes = CONTENT,
    **fields: Any,
) -> Descriptor:
    config, content = await push_blob(registry, b"{}", name), await push_blob(registry, layer, name)
    document = manifest_of(config, content, **fields)
    return await registry.put_manifest(name, document, OCI_MANIFEST, tags=tuple(Tag(tag) for tag in tags))


async def tags_of(registry: OciRegistry, name: RepositoryName = REPOSITORY, after: str = "") -> list[str]:
    return [tag async for tag in registry.tags(name, after=after)]


async def referrers_of(
    registry: OciRegistry, subject: Digest, artifact_type: str | None = None
) -> list[Descriptor]:
    return [one async for one in registry.referrers(REPOSITORY, subject, artifact_type=artifact_type)]


class RegistryContract:
    blobs_are_shared: ClassVar[bool] = False

    @pytest.fixture
    def registry(self) -> Iterable[OciRegistry]:
        raise NotImplementedError

    # ---- blobs

    async def test_a_pushed_blob_is_read_back_to_the_byte(self, registry):
        pushed = await push_blob(registry, CONTENT)

        assert pushed.digest == Digest.of(CONTENT)
        assert pushed.size == len(CONTENT)
        assert (await registry.stat_blob(REPOSITORY, pushed.digest)).size == len(CONTENT)
        assert await read_blob(registry, pushed.digest) == CONTENT

    async def test_an_empty_blob_is_a_blob(self, registry):
        upload = await registry.begin_upload(REPOSITORY)

        pushed = await upload.commit(Digest.of(b""))

        assert pushed.size == 0
        assert await read_blob(registry, pushed.digest) == b""

    @pytest.mark.parametrize("cut", [1, 255, 4096, len(CONTENT) - 1])
    async def test_cutting_into_chunks_never_changes_the_blob(self, registry, cut):
        upload = await registry.begin_upload(REPOSITORY)

        assert await upload.append(chunks_of(CONTENT[:cut], b""), at=0) == cut
        assert await upload.append(chunks_of(CONTENT[cut:]), at=cut) == len(CONTENT)
        await upload.commit(Digest.of(CONTENT))

        assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT

    async def test_a_blob_may_be_pushed_again(self, registry):
        first = await push_blob(registry, CONTENT)

        assert await push_blob(registry, CONTENT) == first
        assert await read_blob(registry, first.digest) == CONTENT

    async def test_the_closing_digest_chooses_the_algorithm(self, registry):
        digest = Digest.of(CONTENT, "sha512")
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT))

        await upload.commit(digest)

        assert await read_blob(registry, digest) == CONTENT

    async def test_an_unknown_blob_is_unknown(self, registry):
        await push_blob(registry, CONTENT)

        with pytest.raises(BlobUnknown):
            await registry.stat_blob(REPOSITORY, UNKNOWN)
        with pytest.raises(BlobUnknown):
            await read_blob(registry, UNKNOWN)
        with pytest.raises(BlobUnknown):
            await registry.delete_blob(REPOSITORY, UNKNOWN)

    async def test_a_blob_is_seen_in_its_own_repository_only(self, registry):
        if self.blobs_are_shared:
            pytest.skip("this registry's repositories share their blobs")
        pushed = await push_blob(registry, CONTENT)

        with pytest.raises(BlobUnknown):
            await registry.stat_blob(OTHER, pushed.digest)

    @pytest.mark.parametrize(
        ("start", "stop"), [(0, 1), (0, len(CONTENT)), (100, 300), (len(CONTENT) - 1, len(CONTENT))], ids=str
    )
    async def test_a_span_is_read_to_the_byte(self, registry, start, stop):
        pushed = await push_blob(registry, CONTENT)

        assert await read_blob(registry, pushed.digest, ByteSpan(start, stop)) == CONTENT[start:stop]

    async def test_a_span_that_passes_the_end_is_cut(self, registry):
        pushed = await push_blob(registry, CONTENT)

        assert await read_blob(registry, pushed.digest, ByteSpan(len(CONTENT) - 5, 10**9)) == CONTENT[-5:]

    @pytest.mark.parametrize("content", [CONTENT, b""], ids=["content", "empty"])
    async def test_a_span_that_begins_at_the_end_is_refused(self, registry, content):
        pushed = await push_blob(registry, content)

        with pytest.raises(RangeInvalid) as refusal:
            await read_blob(registry, pushed.digest, ByteSpan(len(content), len(content) + 10))

        assert refusal.value.size == len(content)

    async def test_a_body_need_not_be_read_to_its_end(self, registry):
        pushed = await push_blob(registry, CONTENT * 500)

        async with registry.open_blob(REPOSITORY, pushed.digest) as body:
            async for _ in body:
                break

        assert await read_blob(registry, pushed.digest) == CONTENT * 500

    # ---- uploads

    async def test_an_uncommitted_upload_is_invisible(self, registry):
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT))

        with pytest.raises(BlobUnknown):
            await registry.stat_blob(REPOSITORY, Digest.of(CONTENT))

        await upload.cancel()

    async def test_an_upload_is_taken_up_by_its_location(self, registry):
        begun = await registry.begin_upload(REPOSITORY)
        await begun.append(chunks_of(CONTENT[:5000]))

        upload = await registry.resume_upload(REPOSITORY, begun.location)

        assert upload.offset == 5000
        await upload.append(chunks_of(CONTENT[5000:]), at=5000)
        await upload.commit(Digest.of(CONTENT))
        assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT

    async def test_a_wrong_offset_is_refused_and_the_upload_lives_on(self, registry):
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT[:100]))

        for wrong in (0, 99, 101):
            with pytest.raises(UploadOutOfOrder):
                await upload.append(chunks_of(b"wrong"), at=wrong)

        await upload.append(chunks_of(CONTENT[100:]), at=100)
        assert (await upload.commit(Digest.of(CONTENT))).size == len(CONTENT)

    async def test_two_who_append_at_one_offset_do_not_both_win(self, registry):
        one = await registry.begin_upload(REPOSITORY)
        await one.append(chunks_of(b"12"))
        two = await registry.resume_upload(REPOSITORY, one.location)
        await one.append(chunks_of(b"34"), at=2)

        with pytest.raises(UploadOutOfOrder):
            await two.append(chunks_of(b"56"), at=2)

        three = await registry.resume_upload(REPOSITORY, one.location)
        assert (await three.commit(Digest.of(b"1234"))).size == 4

    async def test_somebody_else_is_appending(self, registry):
        one = await registry.begin_upload(REPOSITORY)
        await one.append(chunks_of(b"12"))
        two = await registry.resume_upload(REPOSITORY, one.location)
        may_go_on = asyncio.Event()
        is_reading = asyncio.Event()

        # More than a socket's buffers hold: who has handed it over knows that the other side has begun to append.
        begun = bytes(1 << 20)

        async def slow() -> AsyncIterator[bytes]:
            for _ in range(48):
                yield begun
            is_reading.set()
            await may_go_on.wait()
            yield b"56"

        appending = asyncio.create_task(one.append(slow()))
        await is_reading.wait()
        try:
            with pytest.raises(UploadOutOfOrder):
                await two.append(chunks_of(b"xx"), at=2)
        finally:
            may_go_on.set()
            await appending
        content = b"12" + begun * 48 + b"56"
        assert (await one.commit(Digest.of(content))).size == len(content)

    async def test_an_append_that_fails_leaves_what_arrived(self, registry):
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT[:1000]), at=0)

        with pytest.raises(ChunksFail):
            await upload.append(chunks_then_failure(CONTENT[1000:3000]))

        upload = await registry.resume_upload(REPOSITORY, upload.location)
        assert 1000 <= upload.offset <= 3000
        await upload.append(chunks_of(CONTENT[upload.offset :]), at=upload.offset)
        await upload.commit(Digest.of(CONTENT))
        assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT

    async def test_a_wrong_digest_ends_the_upload_and_stores_nothing(self, registry):
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT))

        with pytest.raises(DigestInvalid):
            await upload.commit(UNKNOWN)

        for digest in (UNKNOWN, Digest.of(CONTENT)):
            with pytest.raises(BlobUnknown):
                await registry.stat_blob(REPOSITORY, digest)
        with pytest.raises(BlobUploadUnknown):
            await registry.resume_upload(REPOSITORY, upload.location)

    async def test_a_cancelled_upload_is_gone(self, registry):
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT))

        await upload.cancel()
        await upload.cancel()

        with pytest.raises(BlobUploadUnknown):
            await upload.append(chunks_of(b"more"))
        with pytest.raises(BlobUploadUnknown):
            await upload.commit(Digest.of(CONTENT))
        with pytest.raises(BlobUploadUnknown):
            await registry.resume_upload(REPOSITORY, upload.location)

    async def test_cancelling_after_the_commit_harms_nothing(self, registry):
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT))
        await upload.commit(Digest.of(CONTENT))

        await upload.cancel()

        assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT
        with pytest.raises(BlobUploadUnknown):
            await registry.resume_upload(REPOSITORY, upload.location)

    async def test_an_upload_belongs_to_its_repository(self, registry):
        upload = await registry.begin_upload(REPOSITORY)
        await upload.append(chunks_of(CONTENT))

        with pytest.raises(BlobUploadUnknown):
            await registry.resume_upload(OTHER, upload.location)

        await upload.cancel()

    @pytest.mark.parametrize(
        "location", ["", "x", "../../etc/passwd", "a" * 300, "/v2/lib/a/blobs/uploads/x"]
    )
    async def test_an_upload_that_never_was_is_unknown(self, registry, location):
        with pytest.raises(BlobUploadUnknown):
            await registry.resume_upload(REPOSITORY, location)

    async def test_uploads_at_once_do_not_mix(self, registry):
        contents = [hashlib.sha256(bytes([number])).digest() * 3000 for number in range(8)]

        await asyncio.gather(*(push_blob(registry, content) for content in contents))

        for content in contents:
            assert await read_blob(registry, Digest.of(content)) == content

    # ---- mounts

    async def test_a_mounted_blob_is_readable(self, registry):
        pushed = await push_blob(registry, CONTENT)

        mounted = await registry.mount_blob(OTHER, pushed.digest, source=REPOSITORY)

        assert mounted is not None
        assert (mounted.digest, mounted.size) == (pushed.digest, pushed.size)
        assert await read_blob(registry, pushed.digest, name=OTHER) == CONTENT

    async def test_what_is_not_there_cannot_be_mounted(self, registry):
        await push_blob(registry, CONTENT)

        assert await registry.mount_blob(OTHER, UNKNOWN, source=REPOSITORY) is None
        assert await registry.mount_blob(OTHER, UNKNOWN) is None

    async def test_a_mount_that_succeeds_without_a_source_is_readable(self, registry):
        pushed = await push_blob(registry, CONTENT)

        mounted = await registry.mount_blob(OTHER, pushed.digest)

        if mounted is not None:
            assert await read_blob(registry, pushed.digest, name=OTHER) == CONTENT

    # ---- manifests

    async def test_a_manifest_is_read_back_to_the_byte_by_tag_and_by_digest(self, registry):
        config = await push_blob(registry, b"{}")
        content = manifest_of(config, note="unknown fields and  spaces stay")

        pushed = await registry.put_manifest(REPOSITORY, content, OCI_MANIFEST, tags=(Tag("v1"),))

        assert pushed == Descriptor(OCI_MANIFEST, Digest.of(content), len(content))
        for reference in (Tag("v1"), pushed.digest):
            stored = await registry.get_manifest(REPOSITORY, reference)
            assert (stored.content, stored.media_type, stored.digest) == (
                content,
                OCI_MANIFEST,
                pushed.digest,
            )

    async def test_a_manifest_without_media_type_or_layers_is_taken(self, registry):
        config = await push_blob(registry, b"{}")
        document = json.loads(manifest_of(config)) | {"layers": None}
        del document["mediaType"]
        content = json.dumps(document).encode()

        pushed = await registry.put_manifest(REPOSITORY, content, OCI_MANIFEST, tags=(Tag("v1"),))

        stored = await registry.get_manifest(REPOSITORY, pushed.digest)
        assert (stored.content, stored.media_type) == (content, OCI_MANIFEST)

    async def test_a_manifest_may_be_untagged(self, registry):
        pushed = await push_manifest(registry)

        assert (await registry.get_manifest(REPOSITORY, pushed.digest)).digest == pushed.digest
        assert await tags_of(registry) == []

    async def test_several_tags_name_one_manifest(self, registry):
        pushed = await push_manifest(registry, "v1", "V1", "latest", "v1")

        assert await tags_of(registry) == ["V1", "latest", "v1"]
        for tag in ("v1", "V1", "latest"):
            assert (await registry.get_manifest(REPOSITORY, Tag(tag))).digest == pushed.digest

    async def test_a_tag_moves_and_its_old_manifest_stays(self, registry):
        old = await push_manifest(registry, "v1", "old")
        new = await push_manifest(registry, "v1", layer=b"new")

        assert (await registry.get_manifest(REPOSITORY, Tag("v1"))).digest == new.digest
        assert (await registry.get_manifest(REPOSITORY, Tag("old"))).digest == old.digest
        assert (await registry.get_manifest(REPOSITORY, old.digest)).digest == old.digest

    async def test_a_manifest_may_be_pushed_again(self, registry):
        first = await push_manifest(registry, "v1")

        assert await push_manifest(registry, "v1") == first
        assert await push_manifest(registry, "v2") == first
        assert await tags_of(registry) == ["v1", "v2"]

    async def test_the_expected_digest_chooses_the_algorithm(self, registry):
        config = await push_blob(registry, b"{}")
        content = manifest_of(config)
        digest = Digest.of(content, "sha512")

        pushed = await registry.put_manifest(
            REPOSITORY, content, OCI_MANIFEST, expect=digest, tags=(Tag("v1"),)
        )

        assert pushed.digest == digest
        for reference in (digest, Tag("v1")):
            stored = await registry.get_manifest(REPOSITORY, reference)
            assert (stored.content, stored.digest) == (content, digest)

    async def test_a_manifest_that_is_not_the_expected_one_is_not_stored(self, registry):
        config = await push_blob(registry, b"{}")
        content = manifest_of(config)

        with pytest.raises(DigestInvalid):
            await registry.put_manifest(REPOSITORY, content, OCI_MANIFEST, expect=UNKNOWN, tags=(Tag("v1"),))

        await self.expect_no_manifest(registry, Digest.of(content), Tag("v1"))

    async def test_a_manifest_whose_blobs_are_missing_is_not_stored(self, registry):
        config = await push_blob(registry, b"{}")
        content = manifest_of(config, Descriptor(LAYER_TYPE, UNKNOWN, 12))

        with pytest.raises(ManifestBlobUnknown):
            await registry.put_manifest(REPOSITORY, content, OCI_MANIFEST, tags=(Tag("v1"),))

        await self.expect_no_manifest(registry, Digest.of(content), Tag("v1"))

    async def test_a_manifest_that_lies_about_a_size_is_not_stored(self, registry):
        config = await push_blob(registry, b"{}")
        content = manifest_of(Descriptor(CONFIG_TYPE, config.digest, 3))

        with pytest.raises(ManifestInvalid):
            await registry.put_manifest(REPOSITORY, content, OCI_MANIFEST, tags=(Tag("v1"),))

        await self.expect_no_manifest(registry, Digest.of(content), Tag("v1"))

    @pytest.mark.parametrize(
        ("content", "media_type"),
        [
            (b"", OCI_MANIFEST),
            (b"not json", OCI_MANIFEST),
            (b"[]", OCI_MANIFEST),
            (b'{"schemaVersion":1}', OCI_MANIFEST),
            (b'{"schemaVersion":2,"manifests":[]}', OCI_MANIFEST),
            (b'{"schemaVersion":2,"manifests":[]}', "text/plain"),
        ],
        ids=["empty", "text", "list", "schema 1", "an index", "unknown type"],
    )
    async def test_what_is_no_manifest_is_not_stored(self, registry, content, media_type):
        await push_blob(registry, b"{}")

        with pytest.raises(ManifestInvalid):
            await registry.put_manifest(REPOSITORY, content, media_type, tags=(Tag("v1"),))

        await self.expect_no_manifest(registry, Digest.of(content), Tag("v1"))

    async def test_a_manifest_over_4_mib_is_refused(self, registry):
        config = await push_blob(registry, b"{}")
        content = manifest_of(config, filling=["x" * 1000] * 4200)

        with pytest.raises(ManifestTooLarge):
            await registry.put_manifest(REPOSITORY, content, OCI_MANIFEST)

    async def test_a_manifest_of_just_under_4_mib_is_taken(self, registry):
        config = await push_blob(registry, b"{}")
        filling = ["x" * 1000] * 4100
        bare = len(manifest_of(config, filling=[*filling, ""]))
        content = manifest_of(config, filling=[*filling, "x" * (4 * 1024 * 1024 - bare)])

        pushed = await registry.put_manifest(REPOSITORY, content, OCI_MANIFEST)

        assert (await registry.get_manifest(REPOSITORY, pushed.digest)).content == content

    async def test_an_index_lists_manifests_that_are_there(self, registry):
        child = await push_manifest(registry)
        content = index_of(child)

        pushed = await registry.put_manifest(REPOSITORY, content, OCI_INDEX, tags=(Tag("all"),))

        stored = await registry.get_manifest(REPOSITORY, Tag("all"))
        assert (stored.content, stored.media_type, stored.digest) == (content, OCI_INDEX, pushed.digest)

    async def test_an_index_of_a_missing_manifest_is_not_stored(self, registry):
        await push_manifest(registry)
        content = index_of(Descriptor(OCI_MANIFEST, UNKNOWN, 12))

        with pytest.raises(ManifestBlobUnknown):
            await registry.put_manifest(REPOSITORY, content, OCI_INDEX, tags=(Tag("all"),))

        await self.expect_no_manifest(registry, Digest.of(content), Tag("all"))

    async def test_an_unknown_manifest_is_unknown(self, registry):
        pushed = await push_manifest(registry, "v1")

        await self.expect_no_manifest(registry, Tag("v2"), Tag("V1"), UNKNOWN, Digest.of(CONTENT))
        for reference in (Tag("v1"), pushed.digest):
            with pytest.raises((ManifestUnknown, NameUnknown)):
                await registry.get_manifest(OTHER, reference)

    # ---- deleting

    async def test_deleting_a_tag_leaves_the_manifest_and_its_other_tags(self, registry):
        pushed = await push_manifest(registry, "v1", "v2")

        await registry.delete_manifest(REPOSITORY, Tag("v1"))

        await self.expect_no_manifest(registry, Tag("v1"))
        assert await tags_of(registry) == ["v2"]
        assert (await registry.get_manifest(REPOSITORY, pushed.digest)).digest == pushed.digest

        await registry.delete_manifest(REPOSITORY, Tag("v2"))

        assert await tags_of(registry) == []
        assert (await registry.get_manifest(REPOSITORY, pushed.digest)).digest == pushed.digest

    async def test_deleting_a_digest_takes_its_tags_along(self, registry):
        pushed = await push_manifest(registry, "v1", "v2")
        other = await push_manifest(registry, "v3", layer=b"other")

        await registry.delete_manifest(REPOSITORY, pushed.digest)

        await self.expect_no_manifest(registry, Tag("v1"), Tag("v2"), pushed.digest)
        assert await tags_of(registry) == ["v3"]
        assert (await registry.get_manifest(REPOSITORY, other.digest)).digest == other.digest
        assert await read_blob(registry, Digest.of(b"other")) == b"other"

    async def test_deleting_in_one_repository_leaves_the_others(self, registry):
        pushed = await push_manifest(registry, "v1")
        await push_manifest(registry, "v1", name=OTHER)

        await registry.delete_manifest(REPOSITORY, pushed.digest)

        assert (await registry.get_manifest(OTHER, Tag("v1"))).digest == pushed.digest
        assert await read_blob(registry, Digest.of(CONTENT), name=OTHER) == CONTENT

    async def test_what_was_deleted_can_be_pushed_again(self, registry):
        pushed = await push_manifest(registry, "v1")
        await registry.delete_manifest(REPOSITORY, pushed.digest)

        assert await push_manifest(registry, "v1") == pushed

        assert (await registry.get_manifest(REPOSITORY, Tag("v1"))).digest == pushed.digest
        assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT

    async def test_what_is_not_there_cannot_be_deleted(self, registry):
        pushed = await push_manifest(registry, "v1")
        await registry.delete_manifest(REPOSITORY, Tag("v1"))

        for reference in (Tag("v1"), Tag("v2"), UNKNOWN):
            with pytest.raises(ManifestUnknown):
                await registry.delete_manifest(REPOSITORY, reference)
        with pytest.raises((ManifestUnknown, NameUnknown)):
            await registry.delete_manifest(OTHER, pushed.digest)

    async def test_a_deleted_blob_is_gone(self, registry):
        pushed = await push_blob(registry, CONTENT)

        await registry.delete_blob(REPOSITORY, pushed.digest)

        with pytest.raises(BlobUnknown):
            await registry.stat_blob(REPOSITORY, pushed.digest)
        with pytest.raises(BlobUnknown):
            await registry.delete_blob(REPOSITORY, pushed.digest)

    # ---- listing

    async def test_an_empty_registry_lists_nothing(self, registry):
        assert [name async for name in registry.repositories()] == []
        with pytest.raises(NameUnknown):
            await tags_of(registry)
        assert await referrers_of(registry, UNKNOWN) == []

    async def test_repositories_come_in_ascii_order_from_any_name_on(self, registry):
        names = ["a", "a-b", "a/b", "a/b-c", "a/b/c", "a0", "b"]
        for name in reversed(names):
            await push_manifest(registry, "v1", name=RepositoryName(name))

        assert [name async for name in registry.repositories()] == sorted(names)
        for position, name in enumerate(sorted(names)):
            after = [one async for one in registry.repositories(after=name)]
            assert after == sorted(names)[position + 1 :]

    async def test_tags_come_in_ascii_order_from_any_tag_on(self, registry):
        tags = sorted(["1", "A", "B", "_", "a", "v1", "v1-rc", "v1.0", "v10", "v2", "x" * 128])
        await push_manifest(registry, *reversed(tags))

        assert await tags_of(registry) == tags
        for position, tag in enumerate(tags):
            assert await tags_of(registry, after=tag) == tags[position + 1 :]

    async def test_referrers_are_the_manifests_with_that_subject(self, registry):
        subject = await push_manifest(registry, "v1")
        field = {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}
        signature = await push_manifest(
            registry, subject=field, artifactType="application/x.signature", annotations={"by": "me"}
        )
        plain = await push_manifest(registry, subject=field)

        found = {one.digest: one for one in await referrers_of(registry, subject.digest)}

        assert found.keys() == {signature.digest, plain.digest}
        assert found[signature.digest].artifact_type == "application/x.signature"
        assert found[signature.digest].annotations == {"by": "me"}
        assert found[signature.digest].size == signature.size
        assert found[plain.digest].artifact_type == CONFIG_TYPE

    async def test_referrers_are_chosen_by_artifact_type(self, registry):
        subject = await push_manifest(registry, "v1")
        field = {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}
        one = await push_manifest(registry, subject=field, artifactType="application/x.one")
        await push_manifest(registry, subject=field, artifactType="application/x.two")

        assert [
            found.digest for found in await referrers_of(registry, subject.digest, "application/x.one")
        ] == [one.digest]
        assert await referrers_of(registry, subject.digest, "application/x.three") == []

    async def test_a_subject_need_not_exist(self, registry):
        field = {"mediaType": OCI_MANIFEST, "digest": UNKNOWN, "size": 12}

        pushed = await push_manifest(registry, subject=field)

        assert [found.digest for found in await referrers_of(registry, UNKNOWN)] == [pushed.digest]

    async def test_a_deleted_manifest_refers_to_nothing(self, registry):
        subject = await push_manifest(registry, "v1")
        field = {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}
        pushed = await push_manifest(registry, subject=field)

        await registry.delete_manifest(REPOSITORY, pushed.digest)

        assert await referrers_of(registry, subject.digest) == []

    # ---- pieces

    async def expect_no_manifest(self, registry: OciRegistry, *references: Tag | Digest) -> None:
        for reference in references:
            with pytest.raises((ManifestUnknown, NameUnknown)):
                await registry.get_manifest(REPOSITORY, reference)
