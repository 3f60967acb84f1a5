"""What every StorageBackend promises. A backend's tests subclass StorageContract and supply `backend`."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import cast

import pytest

from storage_backends.interface import (
    BlockingSink,
    ByteStream,
    Delivery,
    LocalFile,
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    PreconditionFailed,
    Span,
    StorageBackend,
    Upload,
    UploadBusy,
    UploadMissing,
)

BAD_KEYS = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/./b",
    "a/..",
    "a b",
    "a\nb",
    "a\0b",
    "ä",
    "\ud800",
    "_store",
    "_store/tmp/x",
    "a" * 256,
    "/".join(["a" * 100] * 11),
)


class ChunksFail(Exception):
    pass


async def chunks_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def chunks_then_failure(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
    raise ChunksFail


class Stalled:
    """Chunks that stop coming after the first ones, until let go."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.stalls = asyncio.Event()
        self.go_on = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        self.stalls.set()
        await self.go_on.wait()


def ignore(piece: bytes) -> None:
    del piece


def said(note: bytes) -> Callable[[], bytes]:
    return lambda: note


async def append(upload: Upload, *pieces: bytes, note: bytes = b"", last: bool = False) -> int:
    return await upload.append(chunks_of(*pieces), observe=ignore, note=said(note), last=last)


async def store_content(
    backend: StorageBackend, key: str, content: bytes, upload_id: str = "store"
) -> ObjectInfo:
    upload = await backend.begin_upload(upload_id)
    await append(upload, content, last=True)
    return await upload.commit(key)


async def bytes_of(delivery: Delivery) -> bytes:
    match delivery:
        case ByteStream(chunks):
            return b"".join([chunk async for chunk in chunks])
        case LocalFile(file, span):
            file.seek(span.start)
            return file.read(span.stop - span.start)
        case _:
            raise AssertionError(f"no bytes here: {delivery}")


class Gathering:
    """A BlockingSink for tests: keeps what is written.

    Args:
        go_on: asked, in the writing thread, before each write; False is a client that is gone.
    """

    def __init__(self, *, go_on: Callable[[], bool] = lambda: True) -> None:
        self._pieces: list[bytes] = []
        self._go_on = go_on
        self.is_interrupted = threading.Event()

    @property
    def content(self) -> bytes:
        return b"".join(self._pieces)

    def write(self, content: memoryview, /) -> None:
        if self.is_interrupted.is_set() or not self._go_on():
            raise ConnectionResetError("the client is gone")
        self._pieces.append(bytes(content))

    def interrupt(self) -> None:
        self.is_interrupted.set()


async def content_of(backend: StorageBackend, key: str, span: Span | None = None) -> bytes:
    """What is delivered: read, and where the backend can write it to a sink itself, that way too."""
    async with backend.deliver(key, span) as delivery:
        content = await bytes_of(delivery)
    if isinstance(delivery, ByteStream) and delivery.drain_into is not None:
        assert await drained_from(backend, key, span) == content
    return content


async def drained_from(backend: StorageBackend, key: str, span: Span | None = None) -> bytes:
    sink = Gathering()
    async with backend.deliver(key, span) as delivery:
        await drain(delivery, sink)
    return sink.content


async def drain(delivery: Delivery, sink: BlockingSink) -> None:
    assert isinstance(delivery, ByteStream)
    assert delivery.drain_into is not None
    assert await delivery.drain_into(sink)


async def keys_of(backend: StorageBackend, prefix: str = "", after: str = "") -> list[str]:
    return [info.key async for info in backend.list(prefix, after=after)]


class StorageContract:
    # -- records

    async def test_a_record_is_read_as_it_was_written(self, backend: StorageBackend) -> None:
        written = await backend.write("a/b", b"content")

        content, info = await backend.read("a/b", size_max=7)

        assert content == b"content"
        assert info == written == await backend.stat("a/b")
        assert (info.key, info.size) == ("a/b", 7)

    @pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 4 * 1024 * 1024])
    async def test_a_record_of_any_size_is_read_whole(self, backend: StorageBackend, size: int) -> None:
        content = bytes(range(256)) * (size // 256) + bytes(size % 256)

        await backend.write("record", content)

        assert (await backend.read("record", size_max=size))[0] == content

    async def test_a_record_larger_than_allowed_is_not_read(self, backend: StorageBackend) -> None:
        await backend.write("a", b"12345")

        with pytest.raises(ObjectTooLarge):
            await backend.read("a", size_max=4)

    async def test_what_is_absent_is_missing(self, backend: StorageBackend) -> None:
        await backend.write("a/b", b"")

        for key in ("x", "a/x", "a", "a/b/c", "x/y/z"):
            with pytest.raises(ObjectMissing):
                await backend.stat(key)
            with pytest.raises(ObjectMissing):
                await backend.read(key, size_max=9)
            with pytest.raises(ObjectMissing):
                await backend.touch(key)
            with pytest.raises(ObjectMissing):
                async with backend.deliver(key):
                    pass
            assert backend.version_at_once(key) in {"", None}

    async def test_each_write_makes_another_version_also_of_the_same_bytes(
        self, backend: StorageBackend
    ) -> None:
        versions = [(await backend.write("a", b"same")).version for _ in range(50)]

        assert len(set(versions)) == 50
        assert (await backend.stat("a")).version == versions[-1]

    async def test_a_record_that_was_deleted_and_written_anew_has_another_version(
        self, backend: StorageBackend
    ) -> None:
        versions = []
        for _ in range(20):
            versions.append((await backend.write("a", b"same")).version)
            await backend.delete("a")

        assert len(set(versions)) == 20

    async def test_a_version_told_at_once_is_that_of_stat(self, backend: StorageBackend) -> None:
        info = await backend.write("a", b"1")

        assert backend.version_at_once("a") in {info.version, None}

        info = await backend.write("a", b"2")

        assert backend.version_at_once("a") in {info.version, None}

    async def test_a_write_that_expects_absence_is_refused_when_something_is_there(
        self, backend: StorageBackend
    ) -> None:
        await backend.write("a", b"1", expect="")

        with pytest.raises(PreconditionFailed):
            await backend.write("a", b"2", expect="")

        assert (await backend.read("a", size_max=9))[0] == b"1"

    async def test_a_record_is_created_once(self, backend: StorageBackend) -> None:
        created = await backend.create("a/b", b"1")

        with pytest.raises(PreconditionFailed):
            await backend.create("a/b", b"2")

        assert await backend.read("a/b", size_max=9) == (b"1", created)
        assert await keys_of(backend) == ["a/b"]

    async def test_a_record_is_not_created_where_one_was_written(self, backend: StorageBackend) -> None:
        written = await backend.write("a", b"1")

        with pytest.raises(PreconditionFailed):
            await backend.create("a", b"2")

        assert await backend.read("a", size_max=9) == (b"1", written)

    async def test_a_record_that_was_created_can_be_replaced_and_deleted(
        self, backend: StorageBackend
    ) -> None:
        created = await backend.create("a", b"1")
        replaced = await backend.write("a", b"2", expect=created.version)

        assert await backend.read("a", size_max=9) == (b"2", replaced)

        await backend.delete("a", expect=replaced.version)
        created = await backend.create("a", b"3")

        assert await backend.read("a", size_max=9) == (b"3", created)

    async def test_of_those_who_create_a_record_at_once_one_succeeds(self, backend: StorageBackend) -> None:
        contents = [b"%d" % number * 5000 for number in range(8)]

        outcomes = await asyncio.gather(
            *(backend.create("a", content) for content in contents), return_exceptions=True
        )

        created = [
            content
            for content, outcome in zip(contents, outcomes, strict=True)
            if isinstance(outcome, ObjectInfo)
        ]
        assert [(await backend.read("a", size_max=5000))[0]] == created
        assert sum(isinstance(outcome, PreconditionFailed) for outcome in outcomes) == 7

    async def test_a_write_that_expects_a_version_is_refused_when_it_is_another(
        self, backend: StorageBackend
    ) -> None:
        first = await backend.write("a", b"1")
        second = await backend.write("a", b"2", expect=first.version)

        with pytest.raises(PreconditionFailed):
            await backend.write("a", b"3", expect=first.version)
        with pytest.raises(PreconditionFailed):
            await backend.write("absent", b"3", expect=first.version)

        assert (await backend.read("a", size_max=9)) == (b"2", second)
        assert await keys_of(backend) == ["a"]

    async def test_a_delete_that_expects_another_version_removes_nothing(
        self, backend: StorageBackend
    ) -> None:
        first = await backend.write("a", b"1")
        second = await backend.write("a", b"2")

        with pytest.raises(PreconditionFailed):
            await backend.delete("a", expect=first.version)

        assert await backend.stat("a") == second
        await backend.delete("a", expect=second.version)
        with pytest.raises(ObjectMissing):
            await backend.stat("a")

    async def test_what_is_absent_may_be_deleted(self, backend: StorageBackend) -> None:
        await backend.write("a/b", b"")

        for key in ("x", "x/y", "a/x", "a/b/c"):
            await backend.delete(key)
            await backend.delete(key, expect="any")

        assert await keys_of(backend) == ["a/b"]

    async def test_increments_by_compare_and_set_are_never_lost(self, backend: StorageBackend) -> None:
        await backend.write("counter", b"0")

        async def increment(times: int) -> None:
            while times:
                content, info = await backend.read("counter", size_max=99)
                try:
                    await backend.write("counter", b"%d" % (int(content) + 1), expect=info.version)
                except PreconditionFailed:
                    continue
                times -= 1

        await asyncio.gather(*(increment(5) for _ in range(8)))

        assert (await backend.read("counter", size_max=99))[0] == b"40"

    async def test_of_many_who_create_a_record_one_succeeds(self, backend: StorageBackend) -> None:
        results = await asyncio.gather(
            *(backend.write("new/record", b"%d" % index, expect="") for index in range(8)),
            return_exceptions=True,
        )

        winners = [result for result in results if isinstance(result, ObjectInfo)]
        assert [type(result) for result in results if result not in winners] == [PreconditionFailed] * 7
        assert (await backend.read("new/record", size_max=9))[1] == winners[0]

    async def test_a_reader_sees_the_old_record_or_the_new_one(self, backend: StorageBackend) -> None:
        sizes = (3, 200_000)
        await backend.write("a", b"0" * sizes[0])

        async def rewrite() -> None:
            for index in range(1, 20):
                await backend.write("a", b"%d" % (index % 10) * sizes[index % 2])

        writing = asyncio.create_task(rewrite())
        while not writing.done():
            content, info = await backend.read("a", size_max=sizes[1])
            assert len(content) == info.size
            assert len(content) in sizes
            assert len(set(content)) == 1
            await asyncio.sleep(0)
        await writing

    # -- touching

    @pytest.mark.parametrize("size", [0, 7, 480, 70_000])
    async def test_a_touch_makes_another_version_of_the_same_bytes(
        self, backend: StorageBackend, size: int
    ) -> None:
        content = bytes(size)
        written = {
            "record": await backend.write("record", content),
            "content": await store_content(backend, "content", content),
        }

        for key, before in written.items():
            versions = [before.version] + [(await backend.touch(key)).version for _ in range(5)]
            touched = await backend.touch(key)

            assert len({*versions, touched.version}) == 7
            assert touched == await backend.stat(key)
            assert await backend.read(key, size_max=size) == (content, touched)
            assert await content_of(backend, key) == content

    async def test_a_touch_makes_an_object_as_new_as_a_write(self, backend: StorageBackend) -> None:
        await backend.write("record", b"1")
        await store_content(backend, "content", b"2")

        for key in ("record", "content"):
            began = backend.now()
            touched = await backend.touch(key)

            assert abs(touched.modified - began) < 3
            assert abs((await backend.stat(key)).modified - began) < 3

    async def test_what_was_touched_is_not_deleted_by_who_saw_it_before(
        self, backend: StorageBackend
    ) -> None:
        seen = {
            "record": await backend.write("record", b"1"),
            "content": await store_content(backend, "content", b"1"),
        }

        for key, before in seen.items():
            touched = await backend.touch(key)
            with pytest.raises(PreconditionFailed):
                await backend.delete(key, expect=before.version)

            assert await content_of(backend, key) == b"1"
            await backend.delete(key, expect=touched.version)
            with pytest.raises(ObjectMissing):
                await backend.touch(key)
        assert await keys_of(backend) == []

    async def test_of_touches_and_deletes_at_once_what_is_left_is_whole_or_gone(
        self, backend: StorageBackend
    ) -> None:
        for attempt in range(5):
            seen = await store_content(backend, "x", b"content", f"u{attempt}")

            *touches, deleted = await asyncio.gather(
                *(backend.touch("x") for _ in range(4)),
                backend.delete("x", expect=seen.version),
                return_exceptions=True,
            )

            if deleted is None:
                assert [type(touched) for touched in touches] == [ObjectMissing] * 4
                assert await keys_of(backend) == []
            else:
                assert isinstance(deleted, PreconditionFailed)
                assert await backend.stat("x") in touches
                assert await content_of(backend, "x") == b"content"

    async def test_the_clock_is_that_of_what_was_modified(self, backend: StorageBackend) -> None:
        before = backend.now()
        modified = (await backend.write("a", b"")).modified
        after = backend.now()

        assert before - 3 <= modified <= after + 3
        assert abs((await backend.stat("a")).modified - modified) < 3

    # -- keys

    @pytest.mark.parametrize("key", BAD_KEYS, ids=lambda key: ascii(key[:12] + key[255:260]))
    async def test_a_bad_key_is_refused_everywhere(self, backend: StorageBackend, key: str) -> None:
        upload = await backend.begin_upload("u")

        for call in (
            lambda: backend.stat(key),
            lambda: backend.read(key, size_max=1),
            lambda: backend.write(key, b""),
            lambda: backend.touch(key),
            lambda: backend.delete(key),
            lambda: upload.commit(key),
        ):
            with pytest.raises(ValueError, match="key"):
                await call()
        with pytest.raises(ValueError, match="key"):
            async with backend.deliver(key):
                pass
        with pytest.raises(ValueError, match="key"):
            backend.version_at_once(key)
        await upload.abort()

    async def test_a_component_may_have_255_bytes_and_a_key_1024(self, backend: StorageBackend) -> None:
        for key in ("a" * 255, "/".join(["b" * 204] * 5)):
            await backend.write(key, b"1")

            assert await keys_of(backend, key) == [key]

    @pytest.mark.parametrize("key", ["a/b", "a/b/c"])
    async def test_a_key_below_an_object_is_refused(self, backend: StorageBackend, key: str) -> None:
        await backend.write("a", b"")
        upload = await backend.begin_upload("u")

        with pytest.raises(ValueError, match="a/b"):
            await backend.write(key, b"")
        with pytest.raises(ValueError, match="a/b"):
            await upload.commit(key)

        await upload.abort()
        assert await keys_of(backend) == ["a"]

    # -- listing

    async def test_keys_are_listed_in_ascii_order_of_the_whole_key(self, backend: StorageBackend) -> None:
        keys = ["B", "a-b/c", "a.b", "a/b", "a/b-", "a/c/d", "a0", "ab", "sha256:ff", "x!", "x!y/_z", "~"]
        for key in keys:
            await backend.write(key, key.encode())

        infos = [info async for info in backend.list("")]

        assert [info.key for info in infos] == sorted(keys)
        assert infos == [await backend.stat(key) for key in sorted(keys)]

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("t/", ["t/a", "t/a-b", "t/a.b", "t/ab/c"]),
            ("t/a", ["t/a", "t/a-b", "t/a.b", "t/ab/c"]),
            ("t/ab", ["t/ab/c"]),
            ("t/ab/", ["t/ab/c"]),
            ("t/ab/c", ["t/ab/c"]),
            ("t/ab/cd", []),
            ("t/.", []),
            ("u", []),
            ("u/v/w/", []),
            ("t/a/", []),
        ],
    )
    async def test_a_prefix_may_end_inside_a_component(
        self, backend: StorageBackend, prefix: str, expected: list[str]
    ) -> None:
        for key in ("t/a", "t/a-b", "t/a.b", "t/ab/c", "s/a", "t0"):
            await backend.write(key, b"")

        assert await keys_of(backend, prefix) == expected

    @pytest.mark.parametrize("prefix", ["/", "a//", "../", "a/../", "./", "ä"])
    async def test_a_prefix_no_key_can_have_is_refused(self, backend: StorageBackend, prefix: str) -> None:
        with pytest.raises(ValueError, match="key"):
            await keys_of(backend, prefix)

    async def test_what_a_backend_keeps_for_itself_is_never_listed(self, backend: StorageBackend) -> None:
        await backend.begin_upload("open")
        await backend.write("a", b"")

        assert await keys_of(backend) == ["a"]
        for prefix in ("_", "_store", "_store/", "_store/uploads/", "_store/uploads/open/s"):
            assert await keys_of(backend, prefix) == []

    async def test_paging_by_after_shows_each_key_once(self, backend: StorageBackend) -> None:
        keys = sorted(["a-b", "a/b", "a/b0", "a/c/d", "a/c-d", "a0/b", "b"])
        for key in keys:
            await backend.write(key, b"")

        for after in [
            "",
            "a",
            "a-",
            "a/",
            "a/b",
            "a/bb",
            "a/c",
            "a/c/",
            "a/c/d",
            "a/c/z",
            "a/z",
            "b",
            "c",
            "~",
            "ä",
        ]:
            assert await keys_of(backend, after=after) == [key for key in keys if key > after]
            assert await keys_of(backend, "a/", after=after) == [
                key for key in keys if key > after and key.startswith("a/")
            ]

    async def test_a_listing_may_be_left_early(self, backend: StorageBackend) -> None:
        for index in range(100):
            await backend.write(f"k{index:03}", b"")

        listing = cast("AsyncIterator[ObjectInfo]", backend.list("")).__aiter__()
        first = await anext(listing)

        assert first.key == "k000"
        await listing.aclose()  # type: ignore[attr-defined]

    async def test_keys_removed_while_listing_do_not_end_it(self, backend: StorageBackend) -> None:
        for index in range(200):
            await backend.write(f"d{index // 10:02}/{index:03}", b"")
        seen = []

        async for info in backend.list(""):
            seen.append(info.key)
            index = int(info.key[-3:])
            if index % 2 == 0 and index < 198:
                await backend.delete(f"d{(index + 1) // 10:02}/{index + 1:03}")

        assert seen == sorted(set(seen))
        assert {f"d{index // 10:02}/{index:03}" for index in range(0, 200, 2)} <= set(seen)

    # -- content

    @pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 9 * 1024 * 1024 + 1])
    async def test_committed_content_is_delivered_whole(self, backend: StorageBackend, size: int) -> None:
        content = hashlib.sha256(b"seed").digest() * (size // 32) + bytes(size % 32)
        upload = await backend.begin_upload("u")
        pieces = [content[start : start + 300_000] for start in range(0, size, 300_000)]

        offset = await upload.append(chunks_of(*pieces), observe=ignore, note=said(b""), size=size, last=True)
        info = await upload.commit("blobs/x")

        assert offset == upload.offset == size
        assert info == await backend.stat("blobs/x")
        assert info.size == size
        assert await content_of(backend, "blobs/x") == content

    async def test_a_span_is_delivered_alone(self, backend: StorageBackend) -> None:
        await store_content(backend, "x", b"0123456789")

        for span in (Span(0, 10), Span(2, 5), Span(9, 10), Span(4, 4), Span(10, 10)):
            async with backend.deliver("x", span) as delivery:
                assert isinstance(delivery, LocalFile | ByteStream)
                assert (delivery.span, delivery.size) == (span, 10)
                assert await bytes_of(delivery) == b"0123456789"[span.start : span.stop]

    @pytest.mark.parametrize("span", [Span(0, 11), Span(-1, 3), Span(5, 4), Span(11, 11)], ids=str)
    async def test_a_span_outside_is_refused(self, backend: StorageBackend, span: Span) -> None:
        await store_content(backend, "x", b"0123456789")

        with pytest.raises(ValueError, match="10"):
            async with backend.deliver("x", span):
                pass

    async def test_content_deleted_while_it_is_delivered_is_delivered_whole(
        self, backend: StorageBackend
    ) -> None:
        await store_content(backend, "x", b"0123456789")

        async with backend.deliver("x") as delivery:
            await backend.delete("x")
            assert await bytes_of(delivery) == b"0123456789"

        with pytest.raises(ObjectMissing):
            await backend.stat("x")

    async def test_content_committed_again_after_a_delete_has_another_version(
        self, backend: StorageBackend
    ) -> None:
        first = await store_content(backend, "x", b"1", "u1")
        await backend.delete("x", expect=first.version)

        second = await store_content(backend, "x", b"1", "u2")

        assert second.version != first.version
        with pytest.raises(PreconditionFailed):
            await backend.delete("x", expect=first.version)

    # -- uploads

    async def test_an_uncommitted_upload_is_invisible(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u", note=b"first")
        await append(upload, b"content")

        assert await keys_of(backend) == []

    async def test_offset_note_and_bytes_are_kept_together(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u", note=b"first")
        assert (upload.id, upload.offset, upload.note) == ("u", 0, b"first")

        assert await append(upload, b"01", b"", b"234", note=b"second") == 5

        for holder in (upload, await backend.resume_upload("u")):
            assert (holder.id, holder.offset, holder.note) == ("u", 5, b"second")
            assert b"".join([piece async for piece in holder.replay()]) == b"01234"

    async def test_an_upload_grows_by_each_append_and_is_committed_whole(
        self, backend: StorageBackend
    ) -> None:
        await backend.begin_upload("u")
        for piece in (b"01", b"", b"234", b"5" * 2_000_000):
            await append(await backend.resume_upload("u"), piece)

        info = await (await backend.resume_upload("u")).commit("x")

        assert info.size == 2_000_005
        assert await content_of(backend, "x") == b"01234" + b"5" * 2_000_000

    async def test_pieces_are_observed_in_order_and_once_before_the_note_is_asked(
        self, backend: StorageBackend
    ) -> None:
        pieces = [b"%d" % index * (1 + index * 997 % 70_000) for index in range(150)]
        hasher = hashlib.sha256()
        upload = await backend.begin_upload("u")

        await upload.append(chunks_of(*pieces), observe=hasher.update, note=hasher.digest)

        assert upload.note == hashlib.sha256(b"".join(pieces)).digest()
        await upload.append(chunks_of(b"more"), observe=hasher.update, note=hasher.digest, last=True)
        assert upload.note == hashlib.sha256(b"".join(pieces) + b"more").digest()
        await upload.abort()

    async def test_thousands_of_tiny_pieces_are_kept(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u")

        await append(upload, *[b"%04d" % index for index in range(5000)], last=True)
        await upload.commit("x")

        assert await content_of(backend, "x") == b"".join(b"%04d" % index for index in range(5000))

    async def test_observers_run_off_the_event_loop(self, backend: StorageBackend) -> None:
        has_loop = []

        def observe(piece: bytes) -> None:
            del piece
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                has_loop.append(False)
            else:
                has_loop.append(True)

        upload = await backend.begin_upload("u")
        await upload.append(chunks_of(b"1", b"2"), observe=observe, note=said(b""))

        assert has_loop == [False, False]

    @pytest.mark.parametrize("size", [0, 5, 9_000_000])
    async def test_a_size_announced_wrongly_does_no_harm(self, backend: StorageBackend, size: int) -> None:
        content = b"x" * 6_000_000
        upload = await backend.begin_upload("u")

        await upload.append(chunks_of(content), observe=ignore, note=said(b""), size=size)

        assert (await backend.resume_upload("u")).offset == 6_000_000
        assert (await upload.commit("x")).size == 6_000_000
        assert await content_of(backend, "x") == content

    async def test_when_chunks_fail_what_had_arrived_is_kept(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u", note=b"old")
        hasher = hashlib.sha256()
        content = b"012" * 700_000

        with pytest.raises(ChunksFail):
            await upload.append(
                chunks_then_failure(b"first", content),
                observe=hasher.update,
                note=hasher.digest,
                size=90_000_000,
                last=True,
            )

        for holder in (upload, await backend.resume_upload("u")):
            assert (holder.offset, holder.note) == (2_100_005, hashlib.sha256(b"first" + content).digest())
        await append(upload, b"last", last=True)
        await upload.commit("x")
        assert await content_of(backend, "x") == b"first" + content + b"last"

    async def test_when_an_append_is_cancelled_what_had_arrived_is_kept(
        self, backend: StorageBackend
    ) -> None:
        upload = await backend.begin_upload("u", note=b"old")
        hasher = hashlib.sha256()
        stalled = Stalled(b"first", b"012" * 700_000)
        appending = asyncio.create_task(
            upload.append(stalled.chunks(), observe=hasher.update, note=hasher.digest, last=True)
        )
        await stalled.stalls.wait()

        appending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await appending

        for holder in (upload, await backend.resume_upload("u")):
            assert (holder.offset, holder.note) == (2_100_005, hasher.digest())
        await append(upload, b"last", last=True)
        await upload.commit("x")
        assert (await content_of(backend, "x")).endswith(b"012last")

    @pytest.mark.parametrize("turns", [0, 1, 2, 3, 5, 8, 13, 21, 34])
    async def test_an_append_cancelled_anywhere_is_kept_up_to_what_it_says(
        self, backend: StorageBackend, turns: int
    ) -> None:
        upload = await backend.begin_upload("u")
        pieces = [b"%07d" % index * 20_000 for index in range(30)]

        async def chunks() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield piece
                await asyncio.sleep(0)

        appending = asyncio.create_task(upload.append(chunks(), observe=ignore, note=said(b"")))
        for _ in range(turns):
            await asyncio.sleep(0)
        appending.cancel()
        await asyncio.wait([appending])

        resumed = await backend.resume_upload("u")
        assert resumed.offset == upload.offset
        kept = b"".join([piece async for piece in resumed.replay()])
        assert kept == b"".join(pieces)[: resumed.offset]
        assert await append(resumed, b"end") == len(kept) + 3

    async def test_a_second_appender_is_told_that_the_upload_is_busy(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u")
        other = await backend.resume_upload("u")
        stalled = Stalled(b"first")
        appending = asyncio.create_task(upload.append(stalled.chunks(), observe=ignore, note=said(b"")))
        await stalled.stalls.wait()

        for holder in (upload, other, await backend.resume_upload("u")):
            with pytest.raises(UploadBusy):
                await append(holder, b"second")
            with pytest.raises(UploadBusy):
                await holder.commit("x")
            with pytest.raises(UploadBusy):
                await holder.abort()

        stalled.go_on.set()
        assert await appending == 5
        assert await keys_of(backend) == []

    async def test_who_was_overtaken_by_another_appender_is_refused(self, backend: StorageBackend) -> None:
        first = await backend.begin_upload("u")
        second = await backend.resume_upload("u")
        await append(first, b"01", note=b"1")

        with pytest.raises(UploadBusy):
            await append(second, b"ab", note=b"2")
        with pytest.raises(UploadBusy):
            await second.commit("x")

        resumed = await backend.resume_upload("u")
        assert (resumed.offset, resumed.note) == (2, b"1")

    async def test_a_commit_ends_the_upload(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u")
        other = await backend.resume_upload("u")

        await upload.commit("x")

        for holder in (upload, other):
            with pytest.raises(UploadMissing):
                await holder.commit("x")
            with pytest.raises(UploadMissing):
                await append(holder, b"more")
            with pytest.raises(UploadMissing):
                async for _ in holder.replay():
                    pass
            await holder.abort()
        with pytest.raises(UploadMissing):
            await backend.resume_upload("u")
        assert [upload async for upload in backend.uploads()] == []
        assert await content_of(backend, "x") == b""

    async def test_of_two_commits_at_once_one_succeeds(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u")
        await append(upload, b"content", last=True)

        results = await asyncio.gather(upload.commit("x"), upload.commit("x"), return_exceptions=True)

        refused = [result for result in results if isinstance(result, UploadBusy | UploadMissing)]
        assert len(refused) == 1
        assert await content_of(backend, "x") == b"content"

    async def test_a_key_that_exists_keeps_its_object_and_the_upload_ends(
        self, backend: StorageBackend
    ) -> None:
        first = await store_content(backend, "x", b"content", "u1")

        second = await store_content(backend, "x", b"content", "u2")

        assert second == await backend.stat("x")
        assert (second.key, second.size) == (first.key, first.size)
        with pytest.raises(UploadMissing):
            await backend.resume_upload("u2")

    async def test_uploads_of_the_same_key_at_once_all_succeed(self, backend: StorageBackend) -> None:
        infos = await asyncio.gather(
            *(store_content(backend, "deep/er/x", b"content" * 1000, f"u{index}") for index in range(8))
        )

        assert await backend.stat("deep/er/x") in infos
        assert {(info.key, info.size) for info in infos} == {("deep/er/x", 7000)}
        assert await content_of(backend, "deep/er/x") == b"content" * 1000

    async def test_a_commit_of_what_is_there_leaves_it_new(self, backend: StorageBackend) -> None:
        before = await store_content(backend, "x", b"content", "u1")

        await store_content(backend, "x", b"content", "u2")

        with pytest.raises(PreconditionFailed):
            await backend.delete("x", expect=before.version)
        assert await content_of(backend, "x") == b"content"

    async def test_what_was_committed_stays_whatever_is_deleted_that_was_seen_before(
        self, backend: StorageBackend
    ) -> None:
        """A collector's delete and a client's upload of the same bytes: whichever comes first, the upload's answer is true."""
        content = b"content" * 10_000
        seen = await store_content(backend, "deep/er/x", content, "first")

        async def read() -> None:
            with suppress(ObjectMissing):
                assert await content_of(backend, "deep/er/x") == content

        for attempt in range(25):
            uploads = [await backend.begin_upload(f"u{attempt}-{index}") for index in range(2)]
            for upload in uploads:
                await append(upload, content, last=True)

            *committed, _, deleted = await asyncio.gather(
                *(upload.commit("deep/er/x") for upload in uploads),
                read(),
                backend.delete("deep/er/x", expect=seen.version),
                return_exceptions=True,
            )

            assert deleted is None or isinstance(deleted, PreconditionFailed)
            seen = await backend.stat("deep/er/x")
            assert seen in committed
            assert await content_of(backend, "deep/er/x") == content

    # -- sweeping

    @pytest.mark.parametrize("dry_run", [False, True])
    async def test_a_sweep_takes_nothing_of_a_store_that_lives(
        self, backend: StorageBackend, dry_run: bool
    ) -> None:
        await backend.write("record", b"record")
        await store_content(backend, "content", b"content")
        await store_content(backend, "content", b"content", "again")
        begun = await backend.begin_upload("begun", note=b"note")
        grown = await backend.begin_upload("grown")
        await append(grown, b"x" * 7_000_000)
        await append(grown, b"more")
        read_again = await backend.begin_upload("read-again")
        await append(read_again, b"y" * 7_000_000)
        _ = [piece async for piece in read_again.replay()]
        await append(read_again, b"more")
        complete = await backend.begin_upload("complete")
        await append(complete, b"z" * 7_000_000, last=True)

        _ = [leftover async for leftover in backend.sweep(age_s=0, dry_run=dry_run)]

        assert [info.key async for info in backend.list("")] == ["content", "record"]
        assert await content_of(backend, "content") == b"content"
        for upload, size in ((begun, 0), (grown, 7_000_004), (read_again, 7_000_004), (complete, 7_000_000)):
            await upload.commit(f"of/{upload.id}")
            assert len(await content_of(backend, f"of/{upload.id}")) == size

    async def test_sweeps_take_nothing_of_those_who_write_meanwhile(self, backend: StorageBackend) -> None:
        async def push(name: str) -> None:
            for index in range(4):
                content = f"{name}{index}".encode() * 300_000
                upload = await backend.begin_upload(f"{name}{index}")
                await append(upload, content[:1000])
                await append(upload, content[1000:], last=True)
                await upload.commit(f"{name}/{index}")
                await backend.touch(f"{name}/{index}")
                assert await content_of(backend, f"{name}/{index}") == content

        pushing = asyncio.gather(*(push(name) for name in ("a", "b", "c")))
        while not pushing.done():
            _ = [leftover async for leftover in backend.sweep(age_s=0)]
            await asyncio.sleep(0)
        await pushing

        for name in ("a", "b", "c"):
            for index in range(4):
                assert await content_of(backend, f"{name}/{index}") == f"{name}{index}".encode() * 300_000

    async def test_an_abort_ends_the_upload_and_may_be_repeated(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u")
        await append(upload, b"content", last=True)

        await upload.abort()
        await upload.abort()

        with pytest.raises(UploadMissing):
            await upload.commit("x")
        with pytest.raises(UploadMissing):
            await append(upload, b"more")
        with pytest.raises(UploadMissing):
            await backend.resume_upload("u")
        assert await keys_of(backend) == []

    async def test_an_upload_that_never_was_is_missing(self, backend: StorageBackend) -> None:
        with pytest.raises(UploadMissing):
            await backend.resume_upload("never")

    async def test_an_id_is_not_used_twice(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u", note=b"1")
        await append(upload, b"content", note=b"2")

        with pytest.raises(ValueError, match="u"):
            await backend.begin_upload("u")

        assert (await backend.resume_upload("u")).note == b"2"

    @pytest.mark.parametrize("upload_id", ["", ".", "..", "a/b", "a b", "ä", "a" * 65, "a\0"])
    async def test_a_bad_upload_id_is_refused(self, backend: StorageBackend, upload_id: str) -> None:
        with pytest.raises(ValueError, match="upload"):
            await backend.begin_upload(upload_id)
        with pytest.raises(ValueError, match="upload"):
            await backend.resume_upload(upload_id)

    async def test_a_note_of_64_kib_is_kept_and_a_larger_one_refused(self, backend: StorageBackend) -> None:
        upload = await backend.begin_upload("u", note=b"a" * 65_536)
        await append(upload, b"1", note=b"b" * 65_536)

        with pytest.raises(ValueError, match="note"):
            await append(upload, b"2", note=b"c" * 65_537)
        with pytest.raises(ValueError, match="note"):
            await backend.begin_upload("v", note=b"d" * 65_537)

        resumed = await backend.resume_upload("u")
        assert (resumed.offset, resumed.note) == (1, b"b" * 65_536)

    async def test_uploads_under_way_are_shown_with_their_age(self, backend: StorageBackend) -> None:
        before = (await backend.write("clock", b"")).modified
        for upload_id in ("u1", "u2", "u3"):
            await append(await backend.begin_upload(upload_id), upload_id.encode())
        await (await backend.resume_upload("u2")).abort()
        after = (await backend.write("clock", b"")).modified

        uploads = {upload.id: upload async for upload in backend.uploads()}

        assert set(uploads) == {"u1", "u3"}
        for upload in uploads.values():
            assert upload.offset == 2
            # Object stores tell whole seconds, file systems' clocks tick every few milliseconds.
            assert before - 2 <= upload.modified <= after + 2

    async def test_the_store_is_probed_without_a_trace(self, backend: StorageBackend) -> None:
        await backend.probe()

        assert await keys_of(backend) == []
