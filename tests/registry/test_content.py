"""What is made of pieces is cut and read like the bytes that it stands for, and no layer is inflated more often than needed."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.media_types import Compression
from registry import layout
from registry.content import Content, Literal, Piece, Segment
from registry.content_reader import ContentReader
from registry.member_index import MemberIndexes
from storage_backends.interface import (
    ByteStream,
    LocalFile,
    ObjectMissing,
    StorageBackend,
    StorageUnavailable,
)
from storage_backends.local import LocalBackend
from tests.registry.kits import compressed, tar_of
from tests.registry.test_member_index import WatchedBackend, layer_type, nth_fails, store

# ---- cutting

LAYERS = {Digest.of(bytes([number])): bytes(range(number, number + 40)) for number in range(3)}


@st.composite
def pieces(draw: st.DrawFn) -> Piece:
    layer = draw(st.sampled_from(sorted(LAYERS)))
    start = draw(st.integers(0, 40))
    return Piece(layer, layer_type(), start, draw(st.integers(start, 40)))


SEGMENTS = st.lists(st.binary(max_size=9).map(Literal) | pieces(), max_size=8)


def bytes_of(segments: Sequence[Segment]) -> bytes:
    return b"".join(
        segment.content
        if isinstance(segment, Literal)
        else LAYERS[segment.layer][segment.start : segment.stop]
        for segment in segments
    )


@st.composite
def spans(draw: st.DrawFn, size: int) -> tuple[int, int]:
    start = draw(st.integers(0, size))
    return start, draw(st.integers(start, size))


@given(SEGMENTS, st.data())
def test_a_cut_of_a_content_is_the_slice_of_its_bytes(segments: list[Segment], data: st.DataObject) -> None:
    content, whole = Content(segments), bytes_of(segments)
    start, stop = data.draw(spans(len(whole)))

    cut = list(content.cut(start, stop))

    assert content.size == len(whole)
    assert bytes_of(cut) == whole[start:stop]
    assert all(segment.size for segment in cut)


@given(SEGMENTS, st.data())
def test_a_part_of_a_content_is_a_content(segments: list[Segment], data: st.DataObject) -> None:
    content, whole = Content(segments), bytes_of(segments)
    for _ in range(3):
        start, stop = data.draw(spans(content.size))
        content, whole = content.part(start, stop), whole[start:stop]

    assert content.size == len(whole)
    assert bytes_of(list(content.cut(0, content.size))) == whole


@pytest.mark.parametrize("segments", [[], [Literal(b"")], [Piece(Digest.of(b"\0"), layer_type(), 7, 7)]])
def test_a_content_of_nothing_is_empty(segments: list[Segment]) -> None:
    content = Content(segments)

    assert content.size == 0
    assert list(content.cut(0, 0)) == []
    assert content.part(0, 0).size == 0


def test_a_piece_that_is_not_asked_for_is_not_named() -> None:
    content = Content([Literal(b"ab"), Piece(Digest.of(b"\0"), layer_type(), 5, 9), Literal(b"cd")])

    assert list(content.cut(0, 2)) == [Literal(b"ab")]
    assert list(content.cut(2, 6)) == [Piece(Digest.of(b"\0"), layer_type(), 5, 9)]
    assert list(content.cut(6, 8)) == [Literal(b"cd")]
    assert list(content.cut(1, 7)) == [
        Literal(b"b"), Piece(Digest.of(b"\0"), layer_type(), 5, 9), Literal(b"c"),
    ]  # fmt: skip


# ---- reading

FILES = {f"f{number:02}": os.urandom(30_000 + number) for number in range(40)}
LAYER = tar_of(FILES)


@pytest.fixture(params=["memory", "local"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StorageBackend]:
    backend: StorageBackend = (
        WatchedBackend() if request.param == "memory" else LocalBackend(tmp_path, durable=False)
    )
    await backend.start()
    yield backend
    await backend.close()


@pytest.fixture
async def watched() -> AsyncIterator[WatchedBackend]:
    backend = WatchedBackend()
    yield backend
    await backend.close()


class Reading:
    """A reader over a backend that has the layer in a form."""

    def __init__(self, backend: StorageBackend, compression: Compression | None, blob: bytes) -> None:
        self.backend = backend
        self.type = layer_type(compression)
        self.blob = blob
        self.digest = Digest.of(blob)
        self.indexes = MemberIndexes(backend)
        self.reader = ContentReader(backend, self.indexes)

    async def __aenter__(self) -> Self:
        await store(self.backend, self.blob)
        await self.indexes.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.reader.close()
        await self.indexes.__aexit__()

    def piece(self, start: int, stop: int) -> Piece:
        return Piece(self.digest, self.type, start, stop)


def reading(backend: StorageBackend, compression: Compression | None = None, layer: bytes = LAYER) -> Reading:
    return Reading(backend, compression, compressed(layer, compression))


ALL_FORMS = pytest.mark.parametrize("compression", [None, "gzip", "zstd"])


@ALL_FORMS
async def test_pieces_in_any_order_are_read_as_they_are_asked_for(
    backend: StorageBackend, compression: Compression | None
) -> None:
    chance = random.Random(1)
    async with reading(backend, compression) as read:
        for _ in range(20):
            edges = [sorted(chance.choices(range(len(LAYER)), k=2)) for _ in range(chance.randrange(6))]
            segments: list[Segment] = [
                segment for start, stop in edges for segment in (read.piece(start, stop), Literal(b"between"))
            ]
            expected = b"".join(LAYER[start:stop] + b"between" for start, stop in edges)
            content = Content(segments)
            start, stop = sorted(chance.choices(range(len(expected) + 1), k=2))

            assert await read.reader.read(content, 0, content.size) == expected
            assert await read.reader.read(content, start, stop) == expected[start:stop]
            assert await read.reader.digest(content) == Digest.of(expected)


async def test_pieces_of_several_layers_take_turns(backend: StorageBackend) -> None:
    async with (
        reading(backend) as plain,
        reading(backend, "gzip") as zipped,
        reading(backend, "zstd") as zstd,
    ):
        steps = [(one, at) for at in range(0, 300_000, 7_777) for one in (plain, zipped, zstd, plain)]
        content = Content([one.piece(at, at + 5_000) for one, at in steps])

        found = await plain.reader.read(content, 0, content.size)

    assert found == b"".join(LAYER[at : at + 5_000] for _, at in steps)


@ALL_FORMS
async def test_each_piece_comes_in_a_delivery_of_its_size(
    backend: StorageBackend, compression: Compression | None
) -> None:
    async with reading(backend, compression) as read:
        content = Content([Literal(b"head"), read.piece(0, 1000), Literal(b"-"), read.piece(90_000, 100_000)])
        sizes, kinds = [], []
        async with aclosing(read.reader.deliveries(content, 2, content.size - 1)) as deliveries:
            async for delivery in deliveries:
                assert isinstance(delivery, LocalFile | ByteStream)
                sizes.append(delivery.span.stop - delivery.span.start)
                kinds.append(type(delivery))
                if isinstance(delivery, ByteStream):
                    assert sum([len(chunk) async for chunk in delivery.chunks]) == sizes[-1]

    assert sizes == [2, 1000, 1, 9_999]
    sends_files = isinstance(backend, LocalBackend) and compression is None
    assert (LocalFile in kinds) == sends_files


async def test_plain_pieces_of_one_layer_leave_by_one_opened_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(tmp_path, durable=False)
    await backend.start()
    async with reading(backend) as read:
        opened = []
        deliver = backend.deliver
        monkeypatch.setattr(backend, "deliver", lambda *given: opened.append(given) or deliver(*given))
        content = Content(
            [
                segment
                for at in range(0, 900_000, 1000)
                for segment in (Literal(b"x"), read.piece(at, at + 500))
            ]
        )

        assert len(await read.reader.read(content, 0, content.size)) == content.size
    await backend.close()

    assert len(opened) == 1


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_pieces_that_stand_in_order_are_inflated_in_one_go(
    watched: WatchedBackend, compression: Compression
) -> None:
    async with reading(watched, compression) as read:
        await read.indexes.table(read.digest, read.type)
        content = Content([read.piece(at, at + 100) for at in range(0, len(LAYER) - 100, 1000)])
        watched.read_size = 0

        found = await read.reader.read(content, 0, content.size)

    assert found == b"".join(LAYER[at : at + 100] for at in range(0, len(LAYER) - 100, 1000))
    assert watched.read_size <= len(read.blob)


async def test_a_far_piece_of_a_compressed_layer_is_begun_at_its_own_checkpoint(
    watched: WatchedBackend,
) -> None:
    layer = tar_of({"a": random.Random(2).randbytes(1 << 20) * 60, "b": b"the end"})
    async with reading(watched, "gzip", layer) as read:
        table = await read.indexes.table(read.digest, read.type)
        last = table.find("b")
        assert last is not None
        content = Content([read.piece(0, 10), read.piece(last.offset, last.offset + last.size)])
        watched.read_size = 0

        assert await read.reader.read(content, 10, content.size) == b"the end"
        alone = watched.read_size
        assert await read.reader.read(content, 0, content.size) == layer[:10] + b"the end"

    assert alone < len(read.blob) / 2
    assert watched.read_size < len(read.blob)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
async def test_checkpoints_that_are_of_no_use_are_made_again(
    watched: WatchedBackend, compression: Compression
) -> None:
    layer = tar_of({"a": random.Random(5).randbytes(3_000_000), "b": b"the end"})
    async with reading(watched, compression, layer) as read:
        table = await read.indexes.table(read.digest, read.type)
        key = layout.members_key(read.digest, read.type)
        table.checkpoints = b"checkpoints of another version, or none at all"
        await watched.write(key, table.to_bytes())
        content = Content([read.piece(2_000_000, len(layer))])

        for _ in range(2):
            assert await read.reader.read(content, 0, content.size) == layer[2_000_000:]

        again = await read.indexes.table(read.digest, read.type)
        assert again.checkpoints != table.checkpoints
        assert (await watched.read(key, size_max=1 << 20))[0] == again.to_bytes()


@ALL_FORMS
async def test_a_reader_that_leaves_early_leaves_nothing_open(
    backend: StorageBackend, compression: Compression | None
) -> None:
    async with reading(backend, compression) as read:
        content = Content([read.piece(0, 500_000), read.piece(600_000, 700_000)])
        async with aclosing(read.reader.chunks(content)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                assert chunk
                break
        async with aclosing(read.reader.deliveries(content, 0, content.size)) as deliveries:
            async for _ in deliveries:
                break


async def test_a_reader_that_is_cancelled_leaves_nothing_open(watched: WatchedBackend) -> None:
    async with reading(watched, "gzip") as read:
        await read.indexes.table(read.digest, read.type)
        content = Content([read.piece(0, len(LAYER))])
        watched.gate.clear()
        task = asyncio.create_task(read.reader.read(content, 0, content.size))
        await watched.is_waiting.wait()

        task.cancel()
        watched.gate.set()
        await asyncio.wait([task])

        assert task.cancelled()
        assert await read.reader.read(content, 0, 10) == LAYER[:10]


@ALL_FORMS
async def test_a_layer_that_is_gone_is_missing(
    backend: StorageBackend, compression: Compression | None
) -> None:
    async with reading(backend, compression) as read:
        await backend.delete(layout.blob_key(read.digest))
        content = Content([Literal(b"x"), read.piece(0, 10)])

        assert await read.reader.read(content, 0, 1) == b"x"
        with pytest.raises(ObjectMissing):
            await read.reader.read(content, 0, 2)


@ALL_FORMS
async def test_a_store_that_fails_while_reading_is_told_and_the_next_reader_reads(
    watched: WatchedBackend, compression: Compression | None
) -> None:
    async with reading(watched, compression) as read:
        await read.indexes.table(read.digest, read.type)
        content = Content([read.piece(0, len(LAYER))])
        before = watched.count("deliver", "blobs/")
        assert await read.reader.read(content, 0, content.size) == LAYER
        for number in range(watched.count("deliver", "blobs/") - before):
            nth_fails(watched, number)
            with pytest.raises(StorageUnavailable):
                await read.reader.read(content, 0, content.size)
            assert await read.reader.read(content, 0, content.size) == LAYER


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([None, "gzip", "zstd"]), st.data())
def test_whatever_is_cut_out_of_a_layer_is_its_bytes(
    compression: Compression | None, data: st.DataObject
) -> None:
    edges = data.draw(st.lists(spans(len(LAYER)), max_size=6))

    async def found() -> bytes:
        backend = WatchedBackend()
        async with reading(backend, compression) as read:
            content = Content([read.piece(start, stop) for start, stop in edges])
            whole = await read.reader.read(content, 0, content.size)
        await backend.close()
        return whole

    assert asyncio.run(found()) == b"".join(LAYER[start:stop] for start, stop in edges)
