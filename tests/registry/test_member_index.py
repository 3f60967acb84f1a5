"""Tables are made once, kept, made again when they are gone or damaged; a store that fails is not a layer that is broken.

`WatchedBackend` and `store` also serve the tests of what reads layers.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import secrets
import zlib
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard

from kitspec.digest import Digest
from kitspec.errors import ManifestInvalid
from kitspec.media_types import Compression, LayerType, Packaging
from registry import layout, member_index
from registry.hash_state import begin
from registry.member_index import KEPT_SIZE_MIN, MemberIndexes
from registry.member_table import MemberTable, Refusal
from registry.pass_watchers import PLAIN_TAR, Watchers
from registry.stored_reader import read_span, reader_of
from registry.tar_indexer import walk_tar
from storage_backends.interface import (
    ByteStream,
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    Span,
    SpanChoice,
    StorageBackend,
    StorageUnavailable,
)
from storage_backends.local import LocalBackend
from storage_backends.memory import MemoryBackend
from tests.registry.kits import compressed, tar_of
from tests.registry.test_tar_indexer import HOSTILE


class WatchedBackend(MemoryBackend):
    """Memory that tells what was asked of it, waits when it is told to, and fails when it is told to.

    Attributes:
        read_size: bytes of blobs that were given out.
        asked: (action, key), in order.
        is_failing: whether to fail, given action and key.
        gate: blobs are not given out while it is closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read_size = 0
        self.asked: list[tuple[str, str]] = []
        self.is_failing: Callable[[str, str], bool] = lambda action, key: False
        self.gate = asyncio.Event()
        self.gate.set()
        self.is_waiting = asyncio.Event()
        self.written: asyncio.Queue[str] = asyncio.Queue()

    def note(self, action: str, key: str) -> None:
        self.asked.append((action, key))
        if self.is_failing(action, key):
            raise StorageUnavailable("not now")

    def count(self, action: str, prefix: str) -> int:
        return sum(one == action and key.startswith(prefix) for one, key in self.asked)

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        self.note("read", key)
        return await super().read(key, size_max=size_max)

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        self.note("write", key)
        info = await super().write(key, content, expect=expect)
        self.written.put_nowait(key)
        return info

    @asynccontextmanager
    async def deliver(
        self, key: str, span: SpanChoice = None, *, url_size_min: int | None = None
    ) -> AsyncIterator[ByteStream]:
        self.note("deliver", key)
        if not self.gate.is_set():
            self.is_waiting.set()
            await self.gate.wait()
        async with super().deliver(key, span, url_size_min=url_size_min) as delivery:
            yield ByteStream(self._counted(delivery.chunks), delivery.span, delivery.size)

    async def _counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            self.read_size += len(chunk)
            yield chunk


async def store(backend: StorageBackend, blob: bytes, algorithm: str = "sha256") -> Digest:
    """A blob under its digest."""
    digest = Digest.of(blob, algorithm)
    upload = await backend.begin_upload(secrets.token_hex(8))
    await upload.append(chunks_of(blob), observe=lambda _: None, note=bytes)
    await upload.commit(layout.blob_key(digest))
    return digest


async def chunks_of(content: bytes, size: int = 1 << 20) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


def layer_type(compression: Compression | None = None, packaging: Packaging = "tar") -> LayerType:
    return LayerType("model", packaging, compression)


TAR = layer_type()
FILES = {
    "m/a.bin": os.urandom(900_000),
    "m/b.bin": os.urandom(700_000),
    "m/empty": b"",
    "m/é": b"1",
    **{f"m/small/{number}": bytes([number]) * number for number in range(50)},
}
LAYER = tar_of(FILES)
assert len(LAYER) > KEPT_SIZE_MIN


@pytest.fixture
async def backend() -> AsyncIterator[WatchedBackend]:
    backend = WatchedBackend()
    yield backend
    await backend.close()


@pytest.fixture
async def indexes(backend: WatchedBackend) -> AsyncIterator[MemberIndexes]:
    async with MemberIndexes(backend) as indexes:
        yield indexes


def contents_of(table: MemberTable, layer: bytes) -> dict[str, bytes]:
    """The files, each with a digest that is right."""
    found = {}
    for member in table.members():
        if not member.is_folder:
            found[member.path] = layer[member.offset : member.offset + member.size]
            assert member.digest == Digest.of(found[member.path])
    return found


def keys_of_tables(backend: WatchedBackend) -> list[str]:
    return [key for key in backend._objects if key.startswith("cache/")]


# ---- made


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_a_table_is_made_of_every_form_of_a_layer(
    backend: WatchedBackend, indexes: MemberIndexes, compression: Compression | None
) -> None:
    digest = await store(backend, compressed(LAYER, compression))

    table = await indexes.hashed_table(digest, layer_type(compression))

    assert contents_of(table, LAYER) == FILES
    assert table.inflated_size == len(LAYER)
    assert table.diff_id == (Digest.of(LAYER) if compression else None)


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("content", [b"", b"raw", b"\x1f\x8bnot gzip at all"])
async def test_a_raw_layer_is_one_member_whatever_it_looks_like(
    backend: WatchedBackend,
    indexes: MemberIndexes,
    content: bytes,
    algorithm: str,
    compression: Compression | None,
) -> None:
    digest = await store(backend, compressed(content, compression), algorithm)

    table = await indexes.hashed_table(digest, layer_type(compression, "raw"))

    assert contents_of(table, content) == {"": content}
    assert table.diff_id == (Digest.of(content) if compression else None)


async def test_one_blob_has_a_table_for_each_way_it_is_called(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    blob = gzip.compress(LAYER, mtime=0)
    digest = await store(backend, blob)

    for _ in range(2):
        assert len(await indexes.table(digest, layer_type("gzip"))) == len(FILES) + 2
        assert contents_of(await indexes.table(digest, layer_type(None, "raw")), blob) == {"": blob}
        assert contents_of(await indexes.table(digest, layer_type("gzip", "raw")), LAYER) == {"": LAYER}
        with pytest.raises(ManifestInvalid, match="its media type says a plain tar, its bytes are gzip"):
            await indexes.table(digest, TAR)


async def test_a_plain_layer_is_walked_and_hashed_only_when_digests_are_wanted(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    layer = tar_of({"a": bytes(20_000_000), "b": b"1"})
    digest = await store(backend, layer)

    table = await indexes.table(digest, TAR)
    assert backend.read_size < 500_000
    found = table.find("b")
    assert found is not None
    member = await indexes.hashed_member(digest, TAR, found)

    assert member.digest == Digest.of(b"1")
    assert backend.read_size < 500_000
    assert not table.is_hashed


async def test_a_hashed_table_reads_each_byte_once_and_keeps_what_was_known(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, LAYER)
    table = await indexes.table(digest, TAR)
    found = table.find("m/a.bin")
    assert found is not None
    await indexes.hashed_member(digest, TAR, found)
    backend.read_size = 0

    hashed = await indexes.hashed_table(digest, TAR)

    assert contents_of(hashed, LAYER) == FILES
    assert backend.read_size <= len(LAYER) - len(FILES["m/a.bin"])


# ---- made once


async def test_however_many_ask_a_table_is_made_and_hashed_once(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, gzip.compress(LAYER, mtime=0))
    plain = await store(backend, LAYER)

    tables = await asyncio.gather(
        *(indexes.table(digest, layer_type("gzip")) for _ in range(50)),
        *(indexes.hashed_table(plain, TAR) for _ in range(50)),
    )
    read_size = backend.read_size

    assert len({id(table) for table in tables}) == 2
    assert read_size <= backend._objects[layout.blob_key(digest)].info.size + len(LAYER) + 300_000
    assert backend.count("write", layout.members_key(digest, layer_type("gzip"))) == 1
    assert backend.count("write", layout.members_key(plain, TAR)) == 2  # once walked, once hashed
    await asyncio.gather(*(indexes.hashed_table(plain, TAR) for _ in range(50)))
    assert backend.read_size == read_size


@pytest.mark.parametrize("which", ["table", "hashed_table"])
async def test_who_leaves_does_not_stop_the_others(
    backend: WatchedBackend, indexes: MemberIndexes, which: str
) -> None:
    digest = await store(backend, LAYER)
    if which == "hashed_table":
        await indexes.table(digest, TAR)
    ask = getattr(indexes, which)
    backend.gate.clear()
    first = asyncio.create_task(ask(digest, TAR))
    second = asyncio.create_task(ask(digest, TAR))
    await backend.is_waiting.wait()

    first.cancel()
    await asyncio.wait([first])
    backend.gate.set()
    table = await second

    assert first.cancelled()
    assert len(table) == len(FILES) + 2
    assert backend.count("write", layout.members_key(digest, TAR)) == (1 if which == "table" else 2)


async def test_when_all_have_left_it_is_still_made_for_the_next(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, LAYER)
    backend.gate.clear()
    asking = [asyncio.create_task(indexes.table(digest, TAR)) for _ in range(3)]
    await backend.is_waiting.wait()

    for task in asking:
        task.cancel()
    await asyncio.wait(asking)
    backend.gate.set()
    await indexes.table(digest, TAR)

    assert backend.count("write", layout.members_key(digest, TAR)) == 1


# ---- kept


async def test_a_table_is_kept_for_other_workers_and_after_a_restart(backend: WatchedBackend) -> None:
    plain, zipped = await store(backend, LAYER), await store(backend, gzip.compress(LAYER, mtime=0))
    async with MemberIndexes(backend) as indexes:
        expected = [
            (await indexes.hashed_table(plain, TAR)).to_bytes(),
            (await indexes.hashed_table(zipped, layer_type("gzip"))).to_bytes(),
        ]
    backend.read_size = 0

    async with MemberIndexes(backend) as indexes:
        found = [
            (await indexes.hashed_table(plain, TAR)).to_bytes(),
            (await indexes.hashed_table(zipped, layer_type("gzip"))).to_bytes(),
        ]

    assert found == expected
    assert backend.read_size == 0


async def test_what_another_worker_hashed_is_taken_over(backend: WatchedBackend) -> None:
    digest = await store(backend, LAYER)
    async with MemberIndexes(backend) as one, MemberIndexes(backend) as other:
        await one.table(digest, TAR)
        await other.table(digest, TAR)
        await one.hashed_table(digest, TAR)
        backend.read_size = 0

        assert (await other.hashed_table(digest, TAR)).is_hashed

    assert backend.read_size == 0


async def test_a_table_of_a_small_layer_is_not_worth_a_record(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, tar_of({"a": b"1"}))
    bad = await store(backend, b"no tar")

    await indexes.hashed_table(digest, TAR)
    with pytest.raises(ManifestInvalid):
        await indexes.table(bad, TAR)

    assert keys_of_tables(backend) == []


@pytest.mark.parametrize(
    "damage", ["deleted", "cut off", "a bit", "nothing left", "of another format", "too large"]
)
async def test_a_table_that_is_gone_or_damaged_is_made_again(
    backend: WatchedBackend, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = await store(backend, LAYER)
    async with MemberIndexes(backend) as indexes:
        expected = (await indexes.hashed_table(digest, TAR)).to_bytes()
    (key,) = keys_of_tables(backend)
    record, _ = await backend.read(key, size_max=1 << 30)
    match damage:
        case "deleted":
            await backend.delete(key)
        case "cut off":
            await backend.write(key, record[:-1])
        case "a bit":
            await backend.write(key, record[:500] + bytes([record[500] ^ 1]) + record[501:])
        case "nothing left":
            await backend.write(key, b"")
        case "of another format":
            body = record[:-4].replace(b'"format": 1', b'"format": 0')
            await backend.write(key, body + zlib.crc32(body).to_bytes(4, "little"))
        case _:
            monkeypatch.setattr(member_index, "_RECORD_SIZE_MAX", len(record) - 1)
            with pytest.raises(ObjectTooLarge):
                await backend.read(key, size_max=len(record) - 1)

    async with MemberIndexes(backend) as indexes:
        found = (await indexes.hashed_table(digest, TAR)).to_bytes()

    assert found == expected
    assert (await backend.read(key, size_max=1 << 30))[0] == expected


async def test_a_table_that_cannot_be_kept_is_given_all_the_same(
    backend: WatchedBackend, indexes: MemberIndexes, caplog: pytest.LogCaptureFixture
) -> None:
    digest = await store(backend, LAYER)
    backend.is_failing = lambda action, _: action == "write"

    table = await indexes.hashed_table(digest, TAR)

    assert contents_of(table, LAYER) == FILES
    assert "index.not_kept" in caplog.text


async def test_tables_that_memory_has_no_room_for_are_read_again(
    backend: WatchedBackend, indexes: MemberIndexes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member_index, "_MEMORY_SIZE_MAX", 1)
    layers = [tar_of({f"{number}": os.urandom(1_200_000)}) for number in range(3)]
    digests = [await store(backend, layer) for layer in layers]
    for digest in digests:
        await indexes.hashed_table(digest, TAR)
    backend.read_size = 0

    for _ in range(2):
        for digest, layer in zip(digests, layers, strict=True):
            table = await indexes.hashed_table(digest, TAR)
            assert await indexes.table(digest, TAR) is table  # the last is remembered, however large
            assert contents_of(table, layer)

    assert backend.read_size == 0
    assert indexes._weight == table.weight


async def test_the_weight_of_what_is_remembered_is_right_however_often_it_changes(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    for number in range(5):
        digest = await store(backend, tar_of({f"{number}": bytes(number)}))
        for _ in range(2):
            await indexes.hashed_table(digest, TAR)
            indexes.keep(digest, TAR, await indexes.table(digest, TAR))

    assert indexes._weight == sum(table.weight for table in indexes._remembered.values())


# ---- refused


@pytest.mark.parametrize(("layer", "said"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_a_hostile_layer_is_refused_with_its_reason(
    backend: WatchedBackend, indexes: MemberIndexes, layer: bytes, said: str, compression: Compression | None
) -> None:
    digest = await store(backend, compressed(layer, compression))

    for _ in range(2):
        with pytest.raises(ManifestInvalid, match="cannot be looked into") as caught:
            await indexes.table(digest, layer_type(compression))
        assert said in str(caught.value) or (compression and said in {"gzip", "zstd"})
        assert str(caught.value).isprintable()


async def test_T_30_a_bomb_is_refused_before_it_is_inflated(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    bomb = gzip.compress(tar_of({"zeros": bytes(300 << 20)}), mtime=0)
    digest = await store(backend, bomb)

    with pytest.raises(ManifestInvalid, match="inflate to more than 200 times as many"):
        await indexes.table(digest, layer_type("gzip"))


@pytest.mark.parametrize(
    ("blob", "kind", "said"),
    [
        (gzip.compress(LAYER), TAR, "says a plain tar, its bytes are gzip"),
        (zstandard.compress(LAYER), TAR, "says a plain tar, its bytes are zstd"),
        (
            b"\x50\x2a\x4d\x18\0\0\0\0" + zstandard.compress(LAYER),
            TAR,
            "says a plain tar, its bytes are zstd",
        ),
        (LAYER, layer_type("gzip"), "says gzip, its bytes are not compressed"),
        (LAYER, layer_type("zstd"), "says zstd, its bytes are not compressed"),
        (gzip.compress(LAYER), layer_type("zstd"), "says zstd, its bytes are gzip"),
        (zstandard.compress(LAYER), layer_type("gzip"), "says gzip, its bytes are zstd"),
        (b"BZh9" + LAYER, layer_type("gzip"), "not compressed, or in a way that nobody here knows"),
        (b"", layer_type("gzip"), "says gzip, its bytes are not compressed"),
        (b"\x1f", layer_type("gzip", "raw"), "says gzip, its bytes are not compressed"),
        (gzip.compress(LAYER)[:-9], layer_type("gzip"), "cut off"),
        (gzip.compress(LAYER) + b"more", layer_type("gzip"), "followed by something else"),
    ],
)
async def test_T_34_media_type_and_bytes_that_disagree_are_both_named(
    backend: WatchedBackend, indexes: MemberIndexes, blob: bytes, kind: LayerType, said: str
) -> None:
    digest = await store(backend, blob)

    with pytest.raises(ManifestInvalid) as caught:
        await indexes.table(digest, kind)

    assert said in str(caught.value)


async def test_a_zstd_layer_may_begin_with_a_skippable_frame(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, b"\x5f\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(LAYER))

    table = await indexes.table(digest, layer_type("zstd"))

    assert contents_of(table, LAYER) == FILES


async def test_a_refusal_is_kept_so_that_a_hostile_layer_is_not_tried_again(backend: WatchedBackend) -> None:
    digest = await store(backend, gzip.compress(LAYER[:-2000], mtime=0))
    async with MemberIndexes(backend) as indexes:
        with pytest.raises(ManifestInvalid, match="cut off"):
            await indexes.table(digest, layer_type("gzip"))
    (key,) = keys_of_tables(backend)
    assert isinstance(MemberTable.from_bytes((await backend.read(key, size_max=9999))[0]), Refusal)
    backend.read_size = 0

    async with MemberIndexes(backend) as indexes:
        for _ in range(2):
            with pytest.raises(ManifestInvalid, match="cut off"):
                await indexes.hashed_table(digest, layer_type("gzip"))

    assert backend.read_size == 0


# ---- a store that fails


def nth_fails(backend: WatchedBackend, number: int, action: str = "deliver") -> None:
    """Let the n-th action from now on fail, and none after it."""
    left = number

    def is_failing(asked: str, _: str) -> bool:
        nonlocal left
        left -= asked == action
        return asked == action and left == -1

    backend.is_failing = is_failing


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
async def test_a_store_that_fails_at_any_moment_is_no_refusal(
    backend: WatchedBackend, compression: Compression | None
) -> None:
    digest = await store(backend, compressed(LAYER, compression))
    kind = layer_type(compression)
    async with MemberIndexes(backend) as indexes:
        expected = (await indexes.hashed_table(digest, kind)).to_bytes()
    delivered = backend.count("deliver", "blobs/")
    assert delivered > 3

    for number in range(delivered):
        await backend.delete(layout.members_key(digest, kind))
        async with MemberIndexes(backend) as indexes:
            nth_fails(backend, number)
            with pytest.raises(StorageUnavailable, match="not now"):
                await indexes.hashed_table(digest, kind)
            assert (await indexes.hashed_table(digest, kind)).to_bytes() == expected


async def test_a_failure_is_told_to_all_who_ask_and_to_nobody_afterwards(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, LAYER)
    backend.is_failing = lambda action, _: action == "deliver"

    answers = await asyncio.gather(*(indexes.table(digest, TAR) for _ in range(5)), return_exceptions=True)
    backend.is_failing = lambda action, key: False

    assert {type(answer) for answer in answers} == {StorageUnavailable}
    assert len(await indexes.table(digest, TAR)) == len(FILES) + 2


async def test_a_store_that_cannot_read_tables_says_so(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, LAYER)
    nth_fails(backend, 0, "read")

    with pytest.raises(StorageUnavailable):
        await indexes.table(digest, TAR)

    assert await indexes.table(digest, TAR)


@pytest.mark.parametrize("kind", [TAR, layer_type("gzip"), layer_type(None, "raw")])
async def test_a_layer_that_is_not_stored_is_missing_until_it_is(
    backend: WatchedBackend, indexes: MemberIndexes, kind: LayerType
) -> None:
    blob = compressed(LAYER, kind.compression)

    with pytest.raises(ObjectMissing):
        await indexes.hashed_table(Digest.of(blob), kind)
    await store(backend, blob)

    assert len(await indexes.hashed_table(Digest.of(blob), kind))


async def test_a_layer_whose_end_the_store_has_lost_is_the_store_s_fault(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, LAYER)
    key = layout.blob_key(digest)
    whole = backend._objects[key]

    table = await indexes.table(digest, TAR)
    object.__setattr__(whole, "content", LAYER[:1_000_000])

    with pytest.raises(StorageUnavailable):
        await indexes.hashed_table(digest, TAR)
    assert not table.is_hashed


async def test_a_disk_that_fails_is_the_store_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(tmp_path, durable=False)
    await backend.start()
    digest = await store(backend, LAYER)

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    async with MemberIndexes(backend) as indexes:
        with monkeypatch.context() as patch:
            patch.setattr("registry.stored_reader.os.pread", fail)
            with pytest.raises(StorageUnavailable, match="Input/output error"):
                await indexes.table(digest, TAR)
        assert contents_of(await indexes.hashed_table(digest, TAR), LAYER) == FILES
    await backend.close()


# ---- in the background


async def until_written(backend: WatchedBackend, key: str, times: int = 1) -> None:
    async with asyncio.timeout(10):
        while times:
            times -= await backend.written.get() == key


async def test_what_was_pushed_is_walked_and_hashed_before_anybody_asks(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    plain, zipped = await store(backend, LAYER), await store(backend, gzip.compress(LAYER, mtime=0))

    indexes.make_soon([(plain, TAR), (zipped, layer_type("gzip"))])
    await until_written(backend, layout.members_key(plain, TAR), times=2)
    await until_written(backend, layout.members_key(zipped, layer_type("gzip")))
    read_size = backend.read_size

    assert (await indexes.hashed_table(plain, TAR)).is_hashed
    assert (await indexes.hashed_table(zipped, layer_type("gzip"))).is_hashed
    assert backend.read_size == read_size


async def test_what_cannot_be_indexed_does_not_keep_the_next_from_it(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    hostile = await store(backend, b"no tar" * 300_000)
    failing = await store(backend, tar_of({"x": os.urandom(1_100_000)}))
    good = await store(backend, LAYER)
    backend.is_failing = lambda action, key: key == layout.blob_key(failing)

    indexes.make_soon([(Digest.of(b"missing"), TAR), (hostile, TAR), (failing, TAR), (good, TAR)])

    await until_written(backend, layout.members_key(good, TAR), times=2)


async def test_a_disk_that_fails_does_not_stop_what_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(tmp_path, durable=False)
    await backend.start()
    failing, good = await store(backend, tar_of({"x": os.urandom(1_100_000)})), await store(backend, LAYER)
    pread, has_failed, is_kept = os.pread, asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def fail_first(descriptor: int, size: int, offset: int) -> bytes:
        if not has_failed.is_set():
            loop.call_soon_threadsafe(has_failed.set)
            raise OSError(5, "Input/output error")
        return pread(descriptor, size, offset)

    async with MemberIndexes(backend) as indexes:
        write = indexes._write

        async def noted(key: str, table: MemberTable | Refusal, size: int) -> None:
            await write(key, table, size)
            if key == layout.members_key(good, TAR):
                is_kept.set()

        monkeypatch.setattr(indexes, "_write", noted)
        monkeypatch.setattr("registry.stored_reader.os.pread", fail_first)
        indexes.make_soon([(failing, TAR)])
        async with asyncio.timeout(10):
            await has_failed.wait()
            indexes.make_soon([(good, TAR)])
            await is_kept.wait()
    await backend.close()


async def test_nothing_is_hashed_that_nobody_asked_for_while_something_is_pushed(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest, asked_for = await store(backend, LAYER), await store(backend, LARGE)
    with indexes.giving_way():
        with indexes.giving_way():
            indexes.make_soon([(digest, TAR)])
            await until_written(backend, layout.members_key(digest, TAR))
        assert (await indexes.hashed_table(asked_for, TAR)).is_hashed
        assert not (await indexes.table(digest, TAR)).is_hashed

    await until_written(backend, layout.members_key(digest, TAR))

    assert (await indexes.table(digest, TAR)).is_hashed


async def test_a_worker_that_closes_waits_for_no_push(backend: WatchedBackend) -> None:
    digest = await store(backend, LAYER)
    async with MemberIndexes(backend) as indexes:
        pushing = indexes.giving_way()
        pushing.__enter__()
        indexes.make_soon([(digest, TAR)])
        await until_written(backend, layout.members_key(digest, TAR))

    pushing.__exit__(None, None, None)


async def test_more_than_can_be_queued_is_left_until_somebody_asks(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    digest = await store(backend, LAYER)

    indexes.make_soon([(Digest.of(b"missing"), TAR)] * 2000 + [(digest, TAR)])

    assert len(await indexes.table(digest, TAR))


async def test_a_worker_that_closes_waits_for_no_large_layer(backend: WatchedBackend) -> None:
    digest = await store(backend, gzip.compress(os.urandom(20_000_000), 0))
    backend.gate.clear()

    async with MemberIndexes(backend) as indexes:
        indexes.make_soon([(digest, layer_type("gzip", "raw"))])
        await backend.is_waiting.wait()
        asking = asyncio.create_task(indexes.table(digest, layer_type("gzip", "raw")))
        await asyncio.sleep(0)
        backend.gate.set()
        deliveries = len(backend.asked)

    with pytest.raises(StorageUnavailable, match="closing"):
        await asking
    assert len(backend.asked) < deliveries + 40
    assert keys_of_tables(backend) == []


# ---- from the pass that stores


async def push(watchers: Watchers, parts: Iterable[bytes], *, digest: Digest) -> None:
    """What an upload session does with watchers, for an upload in these parts."""
    offset, hasher = 0, begin("sha256")
    for part in parts:
        async with watchers.watching("id", offset, hasher) as observe:
            for start in range(0, len(part), 70_000):
                observe(memoryview(bytearray(part))[start : start + 70_000])
        offset += len(part)
    assert hasher.hexdigest() == digest.encoded
    await watchers.committed("id", digest, offset)


LARGE = tar_of({"m/a": os.urandom(900_000), "m/b": os.urandom(900_000)})


@pytest.mark.parametrize("cuts", [[], [0], [1, 2, 3], [512, 900_000], list(range(0, len(LARGE), 100_000))])
async def test_an_upload_in_any_parts_leaves_its_table(
    backend: WatchedBackend, indexes: MemberIndexes, cuts: list[int]
) -> None:
    digest = await store(backend, LARGE)
    edges = [0, *cuts, len(LARGE)]

    await push(
        Watchers(indexes),
        [LARGE[start:stop] for start, stop in pairwise(edges)],
        digest=digest,
    )
    table = await indexes.table(digest, TAR)

    assert backend.read_size == 0
    assert table.to_bytes() == walk_tar(lambda at, size: LARGE[at : at + size], len(LARGE)).to_bytes()
    assert (
        keys_of_tables(backend) == []
    )  # a push waits for no record; it is written when the files are hashed
    await indexes.hashed_table(digest, TAR)
    assert keys_of_tables(backend) == [layout.members_key(digest, TAR)]


async def test_a_pass_keeps_tables_of_plain_tars_only(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    watchers = Watchers(indexes)
    for blob in (gzip.compress(LARGE), LARGE[:-1024], os.urandom(2_000_000), tar_of({"a": b"small"})):
        await push(watchers, [blob], digest=Digest.of(blob))

    assert not indexes._remembered
    assert not watchers._waiting
    assert PLAIN_TAR == TAR


async def test_an_upload_that_another_worker_took_part_in_has_no_table_and_every_byte_is_hashed(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    one, other = Watchers(indexes), Watchers(indexes)
    hasher = begin("sha256")
    edges = [0, 600_000, 1_200_000, len(LARGE)]
    for worker, (start, stop) in zip([one, other, one], pairwise(edges), strict=True):
        async with worker.watching("id", start, hasher) as observe:
            observe(LARGE[start:stop])

    await one.committed("id", Digest.of(LARGE), len(LARGE))
    await other.committed("id", Digest.of(LARGE), len(LARGE))

    assert hasher.hexdigest() == hashlib.sha256(LARGE).hexdigest()
    assert not indexes._remembered
    assert not one._waiting
    assert not other._waiting


async def test_an_append_that_breaks_off_leaves_no_table_of_half_a_layer(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    watchers = Watchers(indexes)
    breaking_off = watchers.watching("id", 0, begin("sha256"))
    observe = await breaking_off.__aenter__()
    observe(LARGE[:500_000])
    await breaking_off.__aexit__(ConnectionResetError, ConnectionResetError(), None)
    async with watchers.watching("id", 500_000, begin("sha256")) as observe:
        observe(LARGE[500_000:])

    await watchers.committed("id", Digest.of(LARGE), len(LARGE))

    assert not indexes._remembered


async def test_an_upload_begun_again_from_its_first_byte_is_watched_again(
    backend: WatchedBackend, indexes: MemberIndexes
) -> None:
    watchers = Watchers(indexes)
    async with watchers.watching("id", 0, None) as observe:
        observe(b"nothing of this was kept")

    await push(watchers, [LARGE], digest=Digest.of(LARGE))

    assert [*indexes._remembered] == [layout.members_key(Digest.of(LARGE), TAR)]


async def test_uploads_that_wait_are_bounded(indexes: MemberIndexes) -> None:
    watchers = Watchers(indexes)

    for number in range(1000):
        async with watchers.watching(f"{number}", 0, None) as observe:
            observe(LARGE[:1000])

    assert len(watchers._waiting) == 256


async def test_without_an_index_nothing_is_watched() -> None:
    watchers = Watchers(None)

    await push(watchers, [LARGE], digest=Digest.of(LARGE))

    assert not watchers._waiting


# ---- readers for threads


async def test_a_reader_reads_any_place_of_any_store(backend: WatchedBackend, tmp_path: Path) -> None:
    local = LocalBackend(tmp_path, durable=False)
    await local.start()
    for store_ in (backend, local):
        key = layout.blob_key(await store(store_, LAYER))
        async with reader_of(store_, key) as (read_at, size):
            assert size == len(LAYER)
            for start, count in ((0, 10), (1000, 300_000), (len(LAYER) - 5, 100), (len(LAYER), 1), (0, 0)):
                assert await asyncio.to_thread(read_at, start, count) == LAYER[start : start + count]
        assert await read_span(store_, key, Span(7, 600_000)) == LAYER[7:600_000]
        with pytest.raises(ObjectMissing):
            async with reader_of(store_, layout.blob_key(Digest.of(b"missing"))):
                pass
    await local.close()
