"""copy: what arrives, in which order, and what an interruption costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from kitclient.image_layout import LayoutRegistry
from kitclient.progress import BlobProgress
from kitclient.transfer import Place, copy
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import BlobUnknown, ManifestBlobUnknown, ManifestUnknown, SizeInvalid
from kitspec.http_fields import ByteSpan
from kitspec.media_types import OCI_INDEX, OCI_MANIFEST
from kitspec.names import RepositoryName, Tag
from tests.contracts.registry_contract import (
    CONTENT,
    REPOSITORY,
    chunks_of,
    index_of,
    manifest_of,
    push_blob,
    push_manifest,
    read_blob,
    tags_of,
)

OTHER = RepositoryName("other/name")


class Record:
    """Progress as it was told."""

    def __init__(self) -> None:
        self.moved: dict[Digest, int] = {}
        self.outcomes: dict[Digest, str] = {}

    def begin(self, descriptor: Descriptor) -> BlobProgress:
        assert descriptor.digest not in self.moved
        self.moved[descriptor.digest] = 0
        return _Line(self, descriptor.digest)


class _Line:
    def __init__(self, record: Record, digest: Digest) -> None:
        self._record, self._digest = record, digest

    def advance(self, count: int) -> None:
        self._record.moved[self._digest] += count

    def end(self, outcome: str) -> None:
        assert self._digest not in self._record.outcomes
        self._record.outcomes[self._digest] = outcome


class Watched(LayoutRegistry):
    """A layout that tells what is read from it and written to it, and can break off."""

    def __init__(self, root: Path, host: str = "localhost") -> None:
        super().__init__(root, host)
        self.events: list[str] = []
        self.read: list[tuple[Digest, int]] = []
        self.break_after: int | None = None

    @asynccontextmanager
    async def open_blob(self, name, digest, span: ByteSpan | None = None):
        self.read.append((digest, span.start if span else 0))
        async with super().open_blob(name, digest, span) as body:
            yield body if self.break_after is None else _Breaking(body, self.break_after)

    async def put_blob(self, name, blob, read, progress=None) -> None:
        await super().put_blob(name, blob, read, progress)
        self.events.append(f"blob {blob.digest}")

    async def put_manifest(self, name, content, media_type, *, expect=None, tags=()):
        self.events.append(f"manifest {expect} {' '.join(tags)}".strip())
        return await super().put_manifest(name, content, media_type, expect=expect, tags=tags)


class Broken(Exception):
    pass


class _Breaking:
    def __init__(self, body, after: int) -> None:
        self._body, self._left, self.size = body, after, body.size

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._body:
            yield piece[: self._left]
            self._left -= len(piece)
            if self._left <= 0:
                raise Broken


@pytest.fixture
async def layouts(tmp_path: Path) -> AsyncIterator[tuple[Watched, Watched]]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(Watched(tmp_path / "one", "one.example"))
        two = await stack.enter_async_context(Watched(tmp_path / "two"))
        yield one, two


async def test_everything_arrives_blobs_first_and_tags_last(layouts):
    source, target = layouts
    pushed = await push_manifest(source, "v1")
    record = Record()

    copied = await copy(
        Place(source, REPOSITORY), Tag("v1"), Place(target, OTHER), tags=(Tag("a"), Tag("b")), progress=record
    )

    assert copied == pushed
    assert (await target.get_manifest(OTHER, Tag("b"))).digest == pushed.digest
    assert await tags_of(target, OTHER) == ["a", "b"]
    assert await read_blob(target, Digest.of(CONTENT), name=OTHER) == CONTENT
    assert target.events[-1] == f"manifest {pushed.digest} a b"
    assert all(event.startswith("blob ") for event in target.events[:-1])
    assert record.moved == {Digest.of(b"{}"): 2, Digest.of(CONTENT): len(CONTENT)}
    assert set(record.outcomes.values()) == {"done"}


async def test_what_is_there_is_left_alone(layouts):
    source, target = layouts
    await push_manifest(source, "v1")
    await push_blob(target, CONTENT)
    record = Record()

    await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY), progress=record)

    assert [digest for digest, _ in source.read] == [Digest.of(b"{}")]
    assert record.outcomes == {Digest.of(b"{}"): "done", Digest.of(CONTENT): "exists"}
    assert record.moved[Digest.of(CONTENT)] == len(CONTENT)


async def test_an_index_arrives_with_all_below_it_children_first(layouts):
    source, target = layouts
    first, second = await push_manifest(source), await push_manifest(source, layer=b"second")
    inner = await source.put_manifest(REPOSITORY, index_of(first, second), OCI_INDEX)
    outer = await source.put_manifest(REPOSITORY, index_of(inner, first), OCI_INDEX, tags=(Tag("all"),))

    await copy(Place(source, REPOSITORY), Tag("all"), Place(target, REPOSITORY), tags=(Tag("all"),))

    order = [event.split()[1] for event in target.events if event.startswith("manifest")]
    assert order == [first.digest, second.digest, inner.digest, outer.digest]
    assert await read_blob(target, Digest.of(b"second")) == b"second"


async def test_inside_one_registry_blobs_are_mounted(tmp_path):
    async with Watched(tmp_path) as registry:
        pushed = await push_manifest(registry, "v1")
        record = Record()

        await copy(Place(registry, REPOSITORY), pushed.digest, Place(registry, OTHER), progress=record)

        assert registry.read == []
        assert (await registry.get_manifest(OTHER, pushed.digest)).digest == pushed.digest


async def test_a_missing_source_is_an_error(layouts):
    source, target = layouts
    await push_manifest(source, "v1")

    with pytest.raises(ManifestUnknown):
        await copy(Place(source, REPOSITORY), Tag("v2"), Place(target, REPOSITORY))

    assert target.events == []


async def test_an_interrupted_copy_goes_on_where_it_stopped(layouts):
    source, target = layouts
    content = CONTENT * 400
    await push_manifest(source, "v1", layer=content)
    source.break_after = 3_000_000

    with pytest.raises(Broken):
        await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY), tags=(Tag("v1"),))
    assert [name async for name in target.repositories()] == []
    source.break_after = None
    source.read.clear()
    record = Record()
    await copy(
        Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY), tags=(Tag("v1"),), progress=record
    )

    offsets = dict(source.read)
    assert offsets[Digest.of(content)] >= 2_000_000
    assert record.moved[Digest.of(content)] == len(content)
    assert await read_blob(target, Digest.of(content)) == content


async def test_a_partial_file_that_went_bad_is_replaced(layouts):
    """As after a power cut, which may keep a file's length and lose its bytes."""
    source, target = layouts
    await push_manifest(source, "v1")
    partial = target.layout.ingest / f"sha256-{Digest.of(CONTENT).encoded}"
    partial.write_bytes(bytes(5000))

    await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY))

    assert await read_blob(target, Digest.of(CONTENT)) == CONTENT
    assert [offset for digest, offset in source.read if digest == Digest.of(CONTENT)] == [5000, 0]
    assert not partial.exists()


@pytest.mark.parametrize("junk", [len(CONTENT), len(CONTENT) + 1, 10 * len(CONTENT)])
async def test_a_partial_file_that_is_too_long_is_replaced(layouts, junk):
    source, target = layouts
    await push_manifest(source, "v1")
    (target.layout.ingest / f"sha256-{Digest.of(CONTENT).encoded}").write_bytes(bytes(junk))

    await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY))

    assert await read_blob(target, Digest.of(CONTENT)) == CONTENT


async def test_a_size_that_the_manifest_lies_about_is_refused(tmp_path):
    class Lying(Watched):
        async def get_manifest(self, name, reference):
            stored = await super().get_manifest(name, reference)
            blob = Descriptor("x", Digest.of(b"{}"), 3)
            return type(stored)(manifest_of(blob), OCI_MANIFEST, stored.digest)

    async with Lying(tmp_path / "one", "one.example") as source, LayoutRegistry(tmp_path / "two") as target:
        await push_manifest(source, "v1")

        with pytest.raises(SizeInvalid):
            await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY))


async def test_blobs_that_somebody_removes_meanwhile_are_copied_again(layouts):
    source, target = layouts
    await push_manifest(source, "v1")
    put = target.put_manifest

    async def put_after_a_removal(*arguments, **options):
        target.put_manifest = put
        await target.delete_blob(REPOSITORY, Digest.of(CONTENT))
        return await put(*arguments, **options)

    target.put_manifest = put_after_a_removal

    await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY), tags=(Tag("v1"),))

    assert await read_blob(target, Digest.of(CONTENT)) == CONTENT


async def test_blobs_that_vanish_again_and_again_are_an_error(layouts):
    source, target = layouts
    await push_manifest(source, "v1")
    put = target.put_manifest

    async def put_after_a_removal(*arguments, **options):
        await target.delete_blob(REPOSITORY, Digest.of(CONTENT))
        return await put(*arguments, **options)

    target.put_manifest = put_after_a_removal

    with pytest.raises(ManifestBlobUnknown):
        await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY))


async def test_no_more_blobs_than_allowed_are_under_way(layouts):
    source, target = layouts
    under_way = most = 0
    config = await push_blob(source, b"{}")
    layers = [await push_blob(source, bytes([number]) * 1000) for number in range(12)]
    await source.put_manifest(REPOSITORY, manifest_of(config, *layers), OCI_MANIFEST, tags=(Tag("v1"),))
    put = target.put_blob

    async def counted(*arguments) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await put(*arguments)
        under_way -= 1

    target.put_blob = counted

    await copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY), concurrency=3)

    assert most == 3


async def test_two_copies_of_one_artifact_at_once_read_each_blob_once(layouts):
    source, target = layouts
    await push_manifest(source, "v1", layer=CONTENT * 100)

    await asyncio.gather(
        *(
            copy(Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY), tags=(Tag(tag),))
            for tag in "abc"
        )
    )

    assert sorted(source.read) == sorted([(Digest.of(b"{}"), 0), (Digest.of(CONTENT * 100), 0)])
    assert await tags_of(target) == ["a", "b", "c"]


async def test_a_cancelled_copy_leaves_nothing_open_and_can_be_repeated(layouts):
    source, target = layouts
    content = CONTENT * 1000
    await push_manifest(source, "v1", layer=content)
    places = Place(source, REPOSITORY), Tag("v1"), Place(target, REPOSITORY)
    for _ in range(5):
        copying = asyncio.create_task(copy(*places, tags=(Tag("v1"),)))
        for _ in range(20):
            await asyncio.sleep(0)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying

    await copy(*places, tags=(Tag("v1"),))

    assert await read_blob(target, Digest.of(content)) == content


async def test_any_registry_can_be_a_target(layouts):
    """One without `put_blob`: only what the interface promises is used."""
    source, target = layouts
    pushed = await push_manifest(source, "v1")

    class Plain:
        def __getattr__(self, name: str):
            if name in {"put_blob", "host"}:
                raise AttributeError(name)
            return getattr(target, name)

    await copy(Place(source, REPOSITORY), Tag("v1"), Place(Plain(), REPOSITORY), tags=(Tag("v1"),))

    assert (await target.get_manifest(REPOSITORY, Tag("v1"))).digest == pushed.digest


# ---- what deleting leaves in a layout


def blobs_in(registry: LayoutRegistry) -> set[str]:
    return {path.name for path in (registry.layout.root / "blobs" / "sha256").iterdir()}


async def test_deleting_a_manifest_removes_what_nobody_else_needs(layouts):
    registry, _ = layouts
    one = await push_manifest(registry, "one", layer=b"only in one")
    await push_manifest(registry, "two", layer=b"only in two", name=OTHER)
    unfinished = await push_blob(registry, b"of a copy that is under way")

    await registry.delete_manifest(REPOSITORY, one.digest)

    left = blobs_in(registry)
    assert Digest.of(b"only in one").encoded not in left
    assert one.digest.encoded not in left
    assert {Digest.of(blob).encoded for blob in (b"{}", b"only in two")} | {unfinished.digest.encoded} <= left


async def test_what_another_tools_entry_needs_is_kept(layouts):
    registry, _ = layouts
    one = await push_manifest(registry, "one", layer=b"shared")

    def append() -> None:
        with registry.layout.change() as change:
            change.entries.append(foreign_entry(one))

    await asyncio.to_thread(append)

    await registry.delete_manifest(REPOSITORY, one.digest)

    assert Digest.of(b"shared").encoded in blobs_in(registry)
    entries = await asyncio.to_thread(registry.layout.entries)
    assert [entry.document for entry in entries] == [foreign_entry(one).document]


def foreign_entry(manifest: Descriptor):
    from kitclient.layout_folder import Entry

    annotations = {"org.opencontainers.image.ref.name": "v1", "x": "y"}
    document = {
        "mediaType": manifest.media_type,
        "digest": str(manifest.digest),
        "size": manifest.size,
        "annotations": annotations,
    }
    return Entry("", None, manifest.digest, manifest.size, manifest.media_type, document)


async def test_a_blob_in_use_cannot_be_deleted(layouts):
    from kitspec.errors import Unsupported

    registry, _ = layouts
    await push_manifest(registry, "v1")

    with pytest.raises(Unsupported):
        await registry.delete_blob(REPOSITORY, Digest.of(CONTENT))

    assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT


async def test_hosts_keep_apart_in_one_folder(tmp_path):
    async with (
        LayoutRegistry(tmp_path, "a.example:5000") as one,
        LayoutRegistry(tmp_path, "a.example") as two,
    ):
        await push_manifest(one, "v1")
        await push_manifest(two, "v2", layer=b"two")

        assert await tags_of(one) == ["v1"]
        assert await tags_of(two) == ["v2"]
        with pytest.raises(ManifestUnknown):
            await two.get_manifest(REPOSITORY, Tag("v1"))


async def test_a_damaged_blob_is_not_taken_for_a_manifest(layouts):
    from kitclient.errors import StoreUnusable

    registry, _ = layouts
    pushed = await push_manifest(registry, "v1")
    path = registry.layout.blob_path(pushed.digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"2", b"3", 1))

    with pytest.raises(StoreUnusable, match="damaged"):
        await registry.get_manifest(REPOSITORY, Tag("v1"))


async def test_an_upload_counts_and_hashes_as_it_goes(layouts):
    registry, _ = layouts
    upload = await registry.begin_upload(REPOSITORY)

    await upload.append(chunks_of(CONTENT[:7000], CONTENT[7000:]))

    assert await upload.digest() == Digest.of(CONTENT)
    with pytest.raises(BlobUnknown):
        await registry.stat_blob(REPOSITORY, Digest.of(CONTENT))
    await upload.cancel()
