"""Objects in a bucket of an object store that speaks S3. Any number of processes, on any number of machines, may share it.

Nothing but the bucket is shared: a record is compared and set by conditional writes. What an object looks like is told in
s3_format.py, the life of an upload in s3_upload.py, what becomes of an answer that was lost in s3_records.py, and why in
docs/adr/0015-s3.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar, cast

from storage_backends import s3_probe
from storage_backends.checks import (
    INTERNAL,
    KEY_SIZE_MAX,
    check_key,
    check_prefix,
    check_upload_id,
    checked_span,
)
from storage_backends.interface import (
    ByteStream,
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    Span,
    StorageBackend,
    StorageUnavailable,
    Upload,
    UploadInfo,
)
from storage_backends.s3_client import Listed, S3Client, S3Settings
from storage_backends.s3_errors import InTheWay, below
from storage_backends.s3_format import POINTER, TAIL_SIZE, UPLOADS, Found, may_be_pointer, record_to_bytes
from storage_backends.s3_parts import PART_COUNT_MAX, PART_SIZE_MAX, PART_SIZE_MIN, Holding
from storage_backends.s3_records import Records
from storage_backends.s3_stream import SegmentStream
from storage_backends.s3_upload import S3Upload, Workshop
from storage_backends.threads import Threads

__all__ = ["S3Backend", "S3Settings"]

T = TypeVar("T")

# Each mostly waits for an answer. boto3 makes some 900 requests a second in one process, whatever the number.
_THREADS: Final = 16
_APPENDERS: Final = 16
_SENDERS: Final = 24
_READERS: Final = 24
# Folders known not to be objects; a key of a registry has five.
_FOLDERS_MAX: Final = 10_000
# Greater than every key of ours and smaller than every other that comes behind them.
_BEHIND_INTERNAL: Final = f"{INTERNAL}/~"
# Pointers are small; one to a TiB has 4 segments.
_POINTER_SIZE_MAX: Final = 64 * 1024


class S3Backend:
    """
    Args:
        part_count_max: parts of one object; fewer in tests.

    Raises:
        ValueError: the settings are wrong.
    """

    source_appends_max = 0

    def __init__(self, settings: S3Settings, *, part_count_max: int = PART_COUNT_MAX) -> None:
        _check(settings)
        self._settings = settings
        self._part_count_max = part_count_max
        self._threads = Threads(_THREADS, "s3")
        self._appenders = Threads(_APPENDERS, "s3-append")
        self._senders = Threads(_SENDERS, "s3-part")
        self._readers = Threads(_READERS, "s3-read")
        self._folders: dict[str, None] = {}
        self._opened: Workshop | None = None

    @property
    def _workshop(self) -> Workshop:
        assert self._opened is not None, "start comes first"
        return self._opened

    @property
    def _client(self) -> S3Client:
        return self._workshop.client

    @property
    def _records(self) -> Records:
        return self._workshop.records

    async def start(self) -> None:
        """Raises: StorageUnavailable: also when the store breaks a promise that several processes need."""
        self._opened = await self._threads.run(self._open)
        await self._threads.run(s3_probe.check_promises, self._client)

    def _open(self) -> Workshop:
        # Half a second of reading tables, the first time.
        client = S3Client(self._settings, connections=_THREADS + _SENDERS + 4 * _READERS)
        return Workshop(
            client,
            Records(client),
            self._threads,
            self._appenders,
            self._senders,
            self._readers,
            part_size=self._settings.part_size,
            part_count_max=self._part_count_max,
            refuse_below_object=self._refuse_below_object,
        )

    async def close(self) -> None:
        if self._opened is not None:
            self._opened.client.close()
        for threads in (self._appenders, self._senders, self._readers, self._threads):
            threads.close()

    async def probe(self) -> None:
        await self._threads.run(s3_probe.probe, self._client)

    async def stat(self, key: str) -> ObjectInfo:
        check_key(key)
        return (await self._threads.run(self._records.look, key)).info

    def version_at_once(self, key: str) -> str | None:
        check_key(key)
        return None

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        check_key(key)
        stored_size_max = max(size_max + TAIL_SIZE, _POINTER_SIZE_MAX)
        read = await self._threads.run(self._records.read, key, stored_size_max)
        if read is None:
            raise ObjectTooLarge(f"{key} has more than the {size_max} bytes that were wanted")
        stored, found = read
        if found.tail.size > size_max:
            raise ObjectTooLarge(f"{key} has {found.tail.size} bytes, at most {size_max} were wanted")
        if found.tail.kind == POINTER:
            async with self._delivered(found, Span(0, found.tail.size)) as delivery:
                return b"".join([chunk async for chunk in delivery.chunks]), found.info
        return stored[:-TAIL_SIZE], found.info

    @asynccontextmanager
    async def deliver(self, key: str, span: Span | None = None) -> AsyncIterator[ByteStream]:
        check_key(key)
        found = await self._threads.run(self._records.look, key)
        async with self._delivered(found, checked_span(span, found.tail.size)) as delivery:
            yield delivery

    @asynccontextmanager
    async def _delivered(self, found: Found, span: Span) -> AsyncIterator[ByteStream]:
        segments = await self._threads.run(self._records.segments, found)
        stream = SegmentStream(self._client, self._readers, segments, span)
        try:
            try:
                await stream.begin()
            except ObjectMissing as error:
                await self._readers.run(self._refuse_damaged, found)
                raise ObjectMissing(f"no object {found.key}") from error
            yield ByteStream(stream.chunks(), span, found.tail.size)
        finally:
            await stream.close()

    def _refuse_damaged(self, found: Found) -> None:
        """Content whose pointer was deleted meanwhile may be gone; other content may not."""
        if self._records.look(found.key).version == found.version:
            raise StorageUnavailable(f"the content of {found.key} is gone from the store: restore it")

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        """Content that is replaced by a record stays in the bucket as garbage."""
        check_key(key)
        return await self._threads.run(self._write, key, content, expect)

    def _write(self, key: str, content: bytes, expect: str | None) -> ObjectInfo:
        self._refuse_below_object(key)
        stored, nonce = record_to_bytes(content)
        try:
            version = self._records.write(key, stored, nonce, expect=expect)
        except InTheWay as error:
            raise below(key) from error
        self._folders.pop(key, None)
        return self._records.info_after(key, len(content), version)

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        check_key(key)
        await self._threads.run(self._delete, key, expect)

    def _delete(self, key: str, expect: str | None) -> None:
        self._records.delete_data(self._records.delete(key, expect=expect) or ())

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """A request for each 1000 keys, and one for each of them that is content."""
        check_prefix(prefix)
        if prefix.startswith(f"{INTERNAL}/"):
            return
        is_more = True
        while is_more:
            page, is_more = await self._threads.run(self._page, prefix, after)
            shown = [listed for listed in page if not listed.key.startswith(f"{INTERNAL}/")]
            after = page[-1].key if page else after
            if len(shown) < len(page) and after.startswith(f"{INTERNAL}/"):
                after = _BEHIND_INTERNAL
            for info in await self._infos_of(shown):
                yield info

    def _page(self, prefix: str, after: str) -> tuple[Sequence[Listed], bool]:
        return self._client.again(lambda: self._client.list(prefix, after=after))

    async def _infos_of(self, page: Sequence[Listed]) -> Sequence[ObjectInfo]:
        """In the order of the page; what is gone by now is left out."""
        asked = [listed for listed in page if may_be_pointer(listed.size)]
        told = iter(await self._of_all(self._records.info_of, asked))
        infos = (next(told) if may_be_pointer(each.size) else self._records.info_of(each) for each in page)
        return [info for info in infos if info is not None]

    async def _of_all(self, call: Callable[[Listed], T], page: Sequence[Listed]) -> Sequence[T]:
        """What `call` tells of each, several at a time; all have ended when one has failed."""
        calls = (self._threads.run(call, listed) for listed in page)
        results = await asyncio.gather(*calls, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return cast("list[T]", results)

    async def begin_upload(self, upload_id: str, *, note: bytes = b"") -> Upload:
        check_upload_id(upload_id)
        holding = await self._threads.run(Holding.begin, self._client, self._records, upload_id, note)
        return S3Upload(self._workshop, upload_id, holding)

    async def resume_upload(self, upload_id: str) -> Upload:
        check_upload_id(upload_id)
        holding = await self._threads.run(Holding.resume, self._client, self._records, upload_id)
        return S3Upload(self._workshop, upload_id, holding)

    async def uploads(self) -> AsyncIterator[UploadInfo]:
        """A request for each 1000 uploads, and one for each of them."""
        after, is_more = "", True
        while is_more:
            page, is_more = await self._threads.run(self._page, UPLOADS, after)
            after = page[-1].key if page else after
            for found in await self._of_all(self._look_if_there, page):
                if found is not None:
                    yield UploadInfo(found.key.removeprefix(UPLOADS), found.tail.size, found.modified)

    def _look_if_there(self, listed: Listed) -> Found | None:
        try:
            return self._records.look(listed.key)
        except ObjectMissing:
            return None

    def _refuse_below_object(self, key: str) -> None:
        """A request for each folder that this process has not seen yet: a store need not mind, a file system would.

        Raises:
            ValueError: a folder of the key is an object, or the key is too long below the prefix.
        """
        if len(self._settings.prefix) + len(key) > KEY_SIZE_MAX:
            raise ValueError(f"the key is too long for the bucket, with its prefix: {key!r}")
        for folder in _folders_of(key):
            if folder in self._folders:
                continue
            if self._records.exists(folder):
                raise below(key)
            self._folders[folder] = None
            if len(self._folders) > _FOLDERS_MAX:
                self._folders.clear()


def _folders_of(key: str) -> Iterator[str]:
    return (key[:index] for index, character in enumerate(key) if character == "/")


def _check(settings: S3Settings) -> None:
    if not PART_SIZE_MIN <= settings.part_size <= PART_SIZE_MAX:
        raise ValueError(
            f"parts of {settings.part_size} bytes; wanted {PART_SIZE_MIN} to {PART_SIZE_MAX}, so that S3 takes them and "
            "an upload keeps to 64 MiB of memory"
        )
    if settings.prefix:
        check_key(settings.prefix.removesuffix("/"))
        if not settings.prefix.endswith("/"):
            raise ValueError(f"a prefix ends with a slash, not so {settings.prefix!r}")


_: type[StorageBackend] = S3Backend
