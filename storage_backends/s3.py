"""Objects in a bucket of an object store that speaks S3. Any number of processes, on any number of machines, may share it.

Nothing but the bucket is shared: a record is compared and set by conditional writes. What an object looks like is told in
s3_format.py, the life of an upload in s3_upload.py, what becomes of an answer that was lost in s3_records.py, and why in
docs/adr/0015-s3.md.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Final, TypeVar, cast

from storage_backends import s3_probe, s3_strays, s3_sweep
from storage_backends.checks import (
    INTERNAL,
    KEY_SIZE_MAX,
    check_key,
    check_prefix,
    check_upload_id,
    is_key,
    is_upload_id,
)
from storage_backends.interface import (
    ByteStream,
    Leftover,
    ObjectDamaged,
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    PreconditionFailed,
    PresignedUrl,
    SpanChoice,
    StorageBackend,
    Stray,
    Upload,
    UploadInfo,
)
from storage_backends.s3_client import Listed, S3Client, S3Settings
from storage_backends.s3_delivery import Deliveries
from storage_backends.s3_errors import InTheWay, below
from storage_backends.s3_format import POINTER, TAIL_SIZE, UPLOADS, may_be_pointer, record_to_bytes
from storage_backends.s3_listing import pages
from storage_backends.s3_parts import PART_COUNT_MAX, PART_SIZE_MAX, PART_SIZE_MIN, Holding
from storage_backends.s3_records import Records
from storage_backends.s3_upload import S3Upload, Workshop
from storage_backends.threads import Threads

__all__ = ["S3Backend", "S3Settings"]

T = TypeVar("T")

# Each mostly waits for an answer. boto3 makes some 900 requests a second in one process, whatever the number.
_THREADS: Final = 16
_APPENDERS: Final = 16
_SENDERS: Final = 24
_READERS: Final = 24
# Clients may be slow. Others than these come by way of the event loop.
_SOURCES: Final = 16
# Folders known not to be objects; a key of a registry has five.
_FOLDERS_MAX: Final = 10_000
# A pointer to the largest content: 700 objects (s3_parts.py).
_POINTER_SIZE_MAX: Final = 256 * 1024


class S3Backend:
    """
    Args:
        content_prefix: of every key that uploads are committed to. A sweep looks there alone for what may name bytes, and
            ends when it cannot read something there.
        part_count_max: parts of one object; fewer in tests.

    Raises:
        ValueError: the settings are wrong.
    """

    source_appends_max = _SOURCES

    def __init__(
        self, settings: S3Settings, *, content_prefix: str = "", part_count_max: int = PART_COUNT_MAX
    ) -> None:
        _check(settings)
        self._settings = settings
        self._content_prefix = content_prefix
        self._part_count_max = part_count_max
        self._threads = Threads(_THREADS, "s3")
        self._appenders = Threads(_APPENDERS, "s3-append")
        self._senders = Threads(_SENDERS, "s3-part")
        self._sources = Threads(_SOURCES, "s3-source")
        self._readers = Threads(_READERS, "s3-read")
        self._folders: dict[str, None] = {}
        self._opened: Workshop | None = None
        self._outgoing: Deliveries | None = None

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

    @property
    def _deliveries(self) -> Deliveries:
        assert self._outgoing is not None, "start comes first"
        return self._outgoing

    async def start(self) -> None:
        """Raises: StorageUnavailable: also when the store breaks a promise that several processes need."""
        self._opened = await self._threads.run(self._open)
        self._outgoing = Deliveries(self._client, self._records, self._threads, self._readers, self._settings)
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
            self._sources,
            self._readers,
            part_size=self._settings.part_size,
            part_count_max=self._part_count_max,
            segment_size=self._settings.segment_size,
            content_prefix=self._content_prefix,
            refuse_below_object=self._refuse_below_object,
        )

    async def close(self) -> None:
        if self._opened is not None:
            self._opened.client.close()
        for threads in (self._appenders, self._senders, self._sources, self._readers, self._threads):
            threads.close()
        if self._outgoing is not None:
            self._outgoing.close()

    async def probe(self) -> None:
        await self._threads.run(s3_probe.probe, self._client)

    async def stat(self, key: str) -> ObjectInfo:
        check_key(key)
        return (await self._threads.run(self._records.look, key)).info

    def now(self) -> float:
        return self._client.now()

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
            return await self._deliveries.read(found), found.info
        return stored[:-TAIL_SIZE], found.info

    def deliver(
        self, key: str, span: SpanChoice = None, *, url_size_min: int | None = None
    ) -> AbstractAsyncContextManager[ByteStream | PresignedUrl]:
        check_key(key)
        return self._deliveries.deliver(key, span, url_size_min)

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        """Content that is replaced by a record stays in the bucket as garbage."""
        check_key(key)
        try:
            return await self._threads.run(self._write, key, content, expect)
        finally:
            self._deliveries.forget(key)

    def _write(self, key: str, content: bytes, expect: str | None) -> ObjectInfo:
        self._refuse_below_object(key)
        stored, nonce = record_to_bytes(content)
        try:
            version = self._records.write(key, stored, nonce, expect=expect)
        except InTheWay as error:
            raise below(key) from error
        self._folders.pop(key, None)
        return self._records.info_after(key, len(content), version)

    async def create(self, key: str, content: bytes) -> ObjectInfo:
        return await self.write(key, content, expect="")

    async def touch(self, key: str) -> ObjectInfo:
        check_key(key)
        return await self._threads.run(lambda: self._records.touch(self._records.look(key)))

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        """The bytes of content are read for `trash_delay_s` more by those who have begun to, and go with the next sweep."""
        check_key(key)
        try:
            await self._threads.run(self._delete, key, expect)
        finally:
            self._deliveries.forget(key)

    def _delete(self, key: str, expect: str | None) -> None:
        try:
            self._records.delete(key, expect=expect)
        except ObjectDamaged as error:
            # Elsewhere it can be removed: there it names no bytes.
            if key.startswith(self._content_prefix):
                raise
            if expect not in {None, error.info.version}:
                raise PreconditionFailed(f"{key} is not the expected version") from error
            self._records.delete_version(key, error.info.version)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """A request for each 1000 keys, and one for each of them that is content."""
        check_prefix(prefix)
        if prefix.startswith(f"{INTERNAL}/"):
            return
        async with aclosing(self._pages(prefix, after)) as listing:
            async for page in listing:
                for info in await self._infos_of(page):
                    yield info

    def _pages(self, prefix: str, after: str = "") -> AsyncGenerator[Sequence[Listed], None]:
        return pages(self._client, self._threads, prefix, after)

    async def _infos_of(self, page: Sequence[Listed]) -> Sequence[ObjectInfo]:
        """In the order of the page; what is gone by now is left out, and what has a name that is no key."""
        keys = [listed for listed in page if is_key(listed.key)]
        asked = [listed for listed in keys if may_be_pointer(listed.size)]
        told = iter(await self._of_all(self._records.info_of, asked))
        infos = (next(told) if may_be_pointer(each.size) else self._records.info_of(each) for each in keys)
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

    async def sweep(self, *, age_s: float, dry_run: bool = False) -> AsyncIterator[Leftover]:
        """A request for each 1000 objects that are content, and one for each of them: as many as to list it.

        It empties the trash too.
        """
        limits = s3_sweep.Limits(
            leftovers=self._moment_before(age_s), trash=self._moment_before(self._settings.trash_delay_s)
        )
        sweeping = s3_sweep.sweep(
            self._client,
            self._records,
            self._threads,
            limits,
            content_prefix=self._content_prefix,
            dry_run=dry_run,
        )
        async with aclosing(sweeping) as leftovers:
            async for leftover in leftovers:
                yield leftover

    async def strays(self) -> AsyncIterator[Stray]:
        """A request for each 1000 objects, and one for each upload and each record in the trash."""
        async with aclosing(s3_strays.strays(self._client, self._records, self._threads)) as strays:
            async for stray in strays:
                yield stray

    def _moment_before(self, age_s: float) -> float:
        """What is older than `age_s` was modified before this. Without an age it is everything: the store tells whole seconds."""
        return self.now() - age_s if age_s > 0 else math.inf

    async def uploads(self) -> AsyncIterator[UploadInfo]:
        """A request for each 1000 uploads, and one for each of them."""
        async with aclosing(self._pages(UPLOADS)) as listing:
            async for page in listing:
                states = [listed for listed in page if is_upload_id(listed.key.removeprefix(UPLOADS))]
                for info in await self._of_all(self._upload_at, states):
                    if info is not None:
                        yield info

    def _upload_at(self, listed: Listed) -> UploadInfo | None:
        upload_id = listed.key.removeprefix(UPLOADS)
        try:
            found = self._records.look(listed.key)
        except ObjectMissing:
            return None
        except ObjectDamaged as error:
            return UploadInfo(upload_id, 0, error.info.modified)
        return UploadInfo(upload_id, found.tail.size, found.modified)

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
