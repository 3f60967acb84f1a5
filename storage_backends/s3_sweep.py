"""What nobody needs in a bucket any more: bytes that crashed writers left, and what has lain in the trash for long enough.

Bytes are needed by an upload, by a pointer, or by whoever reads what was deleted a moment ago. So a run looks, in this order, for

    1  what may go       data objects and multipart uploads that are old; data that old records in the trash name
    2  uploads           what bears the mark of one that is there is spared
    3  pointers          what one of them names is spared; all that is below the prefix of content is asked
    4  the trash again   what a young record names is spared

and then removes the rest. Why nothing goes that is needed, whoever writes meanwhile: every data object is made while the state
of its upload is there, and a commit removes the state only when the pointer is written. Let something that was found in 1 be
needed at the end. If the state of its upload is seen in 2, it is spared. Else the upload had ended before 2 began, so its pointer
was written before 3 began; nobody makes one to the same bytes later, for that takes the state (a touch writes the same key). If
the pointer is seen in 3, the bytes are spared. Else it was deleted, and whoever deletes a pointer writes into the trash first: the
record was there before 4 began. It is young, and the bytes are spared, or it has waited for as long as readers may.

The other order would lose bytes: of an upload that is committed between looking at pointers and looking at uploads, neither is seen.

What cannot be read may name what is needed: it ends the run. What is below none of these prefixes, or has no name that we give,
names nothing.

Time alone guards those who go on with an upload that others have ended under their feet. After an abort in the middle of a commit
the state stays until it is old. When two processes commit the same upload, and what the first one published is deleted before
the second one publishes, the bytes are in the trash. Both have minutes, for what takes seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from storage_backends.checks import is_key, is_upload_id
from storage_backends.interface import Leftover, ObjectMissing, UploadMissing
from storage_backends.s3_client import Listed, Multipart, S3Client
from storage_backends.s3_format import (
    DATA,
    PROBES,
    TRASH,
    UPLOADS,
    data_id,
    data_key,
    is_probe_key,
    is_trash_key,
    mark_of_data,
    trash_from_bytes,
    upload_mark,
)
from storage_backends.s3_listing import pages
from storage_backends.s3_parts import Holding
from storage_backends.s3_records import Records
from storage_backends.threads import Threads

T = TypeVar("T")
U = TypeVar("U")

# Requests at once, of the threads that serve others meanwhile.
_AT_ONCE: Final = 6
# A record of the trash names the segments of one object: some 1100 at most (s3_parts.py), 83 bytes each. One that is larger than
# this would end every sweep, so there is room for what had more before that was so.
_TRASH_SIZE_MAX: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Moments by the store's clock; what was modified before them is old enough to go.

    Attributes:
        leftovers: of what writers left.
        trash: of what waits for its readers.
    """

    leftovers: float
    trash: float


async def sweep(
    client: S3Client,
    records: Records,
    threads: Threads,
    limits: Limits,
    *,
    content_prefix: str,
    dry_run: bool,
) -> AsyncGenerator[Leftover, None]:
    """See `StorageBackend.sweep`. What goes out of the trash is not shown: it is no leftover, its deletion was."""
    run = _Run(client, records, threads, limits, content_prefix=content_prefix, is_dry=dry_run)
    for step in (run.probes, run.aborted_uploads, run.nobodys):
        async with aclosing(step()) as leftovers:
            async for leftover in leftovers:
                yield leftover


class _Run:
    def __init__(
        self,
        client: S3Client,
        records: Records,
        threads: Threads,
        limits: Limits,
        *,
        content_prefix: str,
        is_dry: bool,
    ) -> None:
        self._client = client
        self._records = records
        self._threads = threads
        self._limits = limits
        self._content_prefix = content_prefix
        self._is_dry = is_dry
        # Ids of data objects that may go, those in the trash apart. 32 bytes and what Python adds, for each object that is old:
        # 107 MB for a million (tracemalloc).
        self._old: set[bytes] = set()
        self._trashed: set[bytes] = set()
        self._multiparts: list[Multipart] = []
        self._aborted: set[str] = set()
        self._due_trash: list[str] = []

    async def probes(self) -> AsyncGenerator[Leftover, None]:
        """What a start left that was killed."""
        for listed in await self._old_ones(PROBES, is_probe_key):
            await self._delete(listed.key)
            yield _leftover(listed)

    async def aborted_uploads(self) -> AsyncGenerator[Leftover, None]:
        """The states of uploads whose abort was cut off, or had to wait; their bytes are nobody's then."""
        for listed in await self._old_ones(UPLOADS, _is_upload_key):
            if await self._threads.run(self._is_aborted, listed.key.removeprefix(UPLOADS)):
                await self._delete(listed.key)
                self._aborted.add(listed.key)
                yield _leftover(listed)

    async def _old_ones(self, prefix: str, is_ours: Callable[[str], bool]) -> list[Listed]:
        return [
            listed
            async for page in self._pages(prefix)
            for listed in page
            if listed.modified < self._limits.leftovers and is_ours(listed.key)
        ]

    def _is_aborted(self, upload_id: str) -> bool:
        try:
            return Holding.read(self._client, self._records, upload_id).saved.is_aborted
        except UploadMissing:
            return False

    async def nobodys(self) -> AsyncGenerator[Leftover, None]:
        """Bytes that nobody names."""
        await self._look_for_old()
        await self._spare_uploads()
        await self._spare_pointers()
        await self._spare_young_trash()
        for old in sorted(self._old):
            leftover = await self._remove_data(data_key(old))
            if leftover is not None:
                yield leftover
        for multipart in self._multiparts:
            if await self._remove_multipart(multipart):
                yield Leftover(multipart.key, 0, multipart.begun)
        await self._empty_trash()

    async def _look_for_old(self) -> None:
        async for page in self._pages(DATA):
            self._old.update(
                found
                for listed in page
                if listed.modified < self._limits.leftovers and (found := data_id(listed.key)) is not None
            )
        async for key, data in self._trash(self._is_due):
            self._due_trash.append(key)
            self._trashed.update(data)
        self._old -= self._trashed
        self._multiparts = await self._threads.run(self._old_multiparts)

    def _old_multiparts(self) -> list[Multipart]:
        found: list[Multipart] = []
        after, is_more = "", True
        while is_more:
            page, is_more = self._client.again(partial(self._client.list_uploads, DATA, after=after))
            after = page[-1].key if page else after
            found += (
                multipart
                for multipart in page
                if multipart.begun < self._limits.leftovers and data_id(multipart.key) is not None
            )
        return found

    async def _spare_uploads(self) -> None:
        marks: set[bytes] = set()
        async for page in self._pages(UPLOADS):
            marks.update(
                upload_mark(listed.key.removeprefix(UPLOADS))
                for listed in page
                if listed.key not in self._aborted  # in a dry run they are still there
            )
        self._old = {old for old in self._old if mark_of_data(old) not in marks}
        self._trashed = {old for old in self._trashed if mark_of_data(old) not in marks}
        self._multiparts = [
            multipart
            for multipart in self._multiparts
            if (found := data_id(multipart.key)) is not None and mark_of_data(found) not in marks
        ]

    async def _spare_pointers(self) -> None:
        async for page in self._pages(self._content_prefix):
            asked = [listed.key for listed in page if is_key(listed.key)]
            async for segments in self._of_all(self._records.segments_of, asked):
                self._spare(segment.key for segment in segments)

    async def _spare_young_trash(self) -> None:
        async for _, data in self._trash(lambda listed: not self._is_due(listed)):
            self._old.difference_update(data)
            self._trashed.difference_update(data)

    def _spare(self, keys: Iterable[str]) -> None:
        found = {each for key in keys if (each := data_id(key)) is not None}
        self._old -= found
        self._trashed -= found

    async def _empty_trash(self) -> None:
        """Also of the records whose bytes were spared: the upload or the pointer that names them answers for them now."""
        for old in sorted(self._trashed):
            await self._delete(data_key(old))
        for key in self._due_trash:
            await self._delete(key)

    async def _trash(self, wanted: Callable[[Listed], bool]) -> AsyncIterator[tuple[str, set[bytes]]]:
        """Records in the trash, and the ids of the data that they name."""
        async for page in self._pages(TRASH):
            keys = [listed.key for listed in page if is_trash_key(listed.key) and wanted(listed)]
            async for key, named in self._of_all(self._read_trash, keys):
                yield key, set(named)

    def _is_due(self, listed: Listed) -> bool:
        return listed.modified < self._limits.trash

    def _read_trash(self, key: str) -> tuple[str, tuple[bytes, ...]]:
        try:
            return key, read_trash(self._records, key)
        except ObjectMissing:  # another sweep has emptied it
            return key, ()

    async def _remove_data(self, key: str) -> Leftover | None:
        try:
            listed = await self._threads.run(self._client.again, lambda: self._client.head(key))
        except ObjectMissing:
            return None
        await self._delete(key)
        return _leftover(listed)

    async def _remove_multipart(self, multipart: Multipart) -> bool:
        if not self._is_dry:
            try:
                await self._threads.run(
                    self._client.again, lambda: self._client.abort_upload(multipart.key, multipart.id)
                )
            except UploadMissing:
                return False
        return True

    async def _delete(self, key: str) -> None:
        if not self._is_dry:
            await self._threads.run(self._client.again, lambda: self._client.delete(key))

    def _pages(self, prefix: str) -> AsyncIterator[Sequence[Listed]]:
        return pages(self._client, self._threads, prefix)

    async def _of_all(self, call: Callable[[T], U], items: Sequence[T]) -> AsyncIterator[U]:
        """What `call` tells of each, in order, a few at a time."""
        for start in range(0, len(items), _AT_ONCE):
            some = items[start : start + _AT_ONCE]
            told = await asyncio.gather(
                *(self._threads.run(call, item) for item in some), return_exceptions=True
            )
            for each in told:
                if isinstance(each, BaseException):
                    raise each
                yield each


def read_trash(records: Records, key: str) -> tuple[bytes, ...]:
    """The ids of the data that a record in the trash names. Raises: ObjectMissing, ObjectDamaged."""
    return records.read_own(key, _TRASH_SIZE_MAX, trash_from_bytes)[0]


def _is_upload_key(key: str) -> bool:
    return is_upload_id(key.removeprefix(UPLOADS))


def _leftover(listed: Listed) -> Leftover:
    return Leftover(listed.key, listed.size, listed.modified)
