"""Objects as files below a folder of this machine. Several processes may share the folder; NFS is not such a folder.

What is written where is told in local_folder.py, the life of an upload in local_upload.py. Durability follows one rule:
the bytes first, then the name, then the folder that holds the name, and only then the answer (docs/adr/0006).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

from storage_backends import local_upload
from storage_backends.checks import check_key, check_prefix, check_upload_id, checked_span
from storage_backends.interface import (
    Leftover,
    LocalFile,
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    PreconditionFailed,
    SpanChoice,
    StorageBackend,
    StorageError,
    StorageUnavailable,
    Stray,
    Upload,
    UploadInfo,
)
from storage_backends.local_folder import Folder, freshen, in_its_place, storage_error, translated
from storage_backends.local_listing import Entry, walk
from storage_backends.local_upload import LocalUpload, Pools, State, object_info
from storage_backends.threads import Threads

# Mostly asleep in fsync.
_THREADS: Final = 16
# Busy: they write and hash. A few more than processors, for those that wait for the disk.
_APPENDERS: Final = (os.cpu_count() or 1) + 4
# Copied out of the page cache in less time than a thread takes to start.
_INLINE_READ_SIZE_MAX: Final = 64 * 1024
_PAGE_MIN, _PAGE_MAX = 32, 1024
# Of an object that is opened: no link is followed, and a stray FIFO does not keep us waiting.
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# Nothing; a component above is an object; a symbolic link; a socket.
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
# Linux; elsewhere every read of a record waits, in a thread.
_NO_WAIT: Final = getattr(os, "RWF_NOWAIT", -1)


# Each holds a thread and 2 MiB while its client sends, however slowly.
_SOURCES: Final = 32


class LocalBackend:
    """
    Args:
        root: created when missing.
        durable: whether to wait for the disk before answering. Without, a power cut loses or tears what was
            acknowledged; a crash of the process still does not.
        reserve: given the bytes of the file system, how many of them new uploads leave free.
    """

    source_appends_max = _SOURCES

    def __init__(
        self, root: Path, *, durable: bool = True, reserve: Callable[[int], int] = lambda _: 0
    ) -> None:
        self._folder = Folder(root.absolute(), is_durable=durable)
        self._reserve = reserve
        self._threads = Threads(_THREADS, "storage")
        self._appenders = Threads(_APPENDERS, "storage-append")
        self._sources = Threads(self.source_appends_max, "storage-source")

    @property
    def _pools(self) -> Pools:
        return Pools(self._threads, self._appenders, self._sources)

    async def start(self) -> None:
        with translated("the storage folder"):
            await self._threads.run(self._folder.open)
        await self.probe()

    async def close(self) -> None:
        self._appenders.close()
        self._threads.close()

    async def probe(self) -> None:
        with translated("the storage folder"):
            await self._threads.run(self._folder.probe)

    async def stat(self, key: str) -> ObjectInfo:
        return self._stat(key)

    def now(self) -> float:
        return time.time()

    def version_at_once(self, key: str) -> str | None:
        try:
            return self._stat(key).version
        except ObjectMissing:
            return ""
        except StorageUnavailable:
            return None

    def _stat(self, key: str) -> ObjectInfo:
        """In the event loop: 5 us, and one disk access when the inode is not cached. By way of a thread it is 70 to
        210 us, always (measured, docs/adr/0006), and every GET of a manifest comes by here.
        """
        try:
            status = os.stat(self._path(key), follow_symlinks=False)
        except OSError as error:
            raise _not_read(key, error) from error
        if not stat.S_ISREG(status.st_mode):
            raise ObjectMissing(f"no object {key}")
        return object_info(key, status)

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        path = self._path(key)
        try:
            # 15 us instead of 100 to 250 by way of a thread; says EAGAIN instead of waiting for a disk.
            return _read(key, path, size_max, _INLINE_READ_SIZE_MAX)
        except BlockingIOError:
            with translated(key):
                return await self._threads.run(_read, key, path, size_max, None)

    @asynccontextmanager
    async def deliver(
        self, key: str, span: SpanChoice = None, *, url_size_min: int | None = None
    ) -> AsyncIterator[LocalFile]:
        del url_size_min  # the folder is ours alone
        with _opened_object(key, self._path(key)) as (file, status):
            yield LocalFile(file, checked_span(span, status.st_size), status.st_size)

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        return await self._threads.run(self._write, key, self._path(key), content, expect)

    async def create(self, key: str, content: bytes) -> ObjectInfo:
        return await self._threads.run(self._create, key, self._path(key), content)

    async def touch(self, key: str) -> ObjectInfo:
        return await self._threads.run(self._touch, key, self._path(key))

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        await self._threads.run(self._delete, key, self._path(key), expect)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        entries = walk(self._folder.root, prefix, after)
        size = _PAGE_MIN
        while page := await self._threads.run(_page, entries, size):
            for key, status in page:
                yield object_info(key, status)
            size = min(size * 2, _PAGE_MAX)

    async def begin_upload(self, upload_id: str, *, note: bytes = b"") -> Upload:
        """Raises StorageFull, too, when the reserve is reached: deleting and collecting need room to work in."""
        check_upload_id(upload_id)
        state = await self._threads.run(self._begin, upload_id, note)
        return LocalUpload(self._folder, self._pools, upload_id, state)

    def _begin(self, upload_id: str, note: bytes) -> State:
        with translated("the storage folder"):
            self._folder.check_room(self._reserve)
        return local_upload.begin(self._folder, upload_id, note)

    async def resume_upload(self, upload_id: str) -> Upload:
        check_upload_id(upload_id)
        state = await self._threads.run(local_upload.resume, self._folder, upload_id)
        return LocalUpload(self._folder, self._pools, upload_id, state)

    async def sweep(self, *, age_s: float, dry_run: bool = False) -> AsyncIterator[Leftover]:
        for leftover in await self._threads.run(self._sweep, time.time() - age_s, dry_run):
            yield leftover

    def _sweep(self, before: float, dry_run: bool) -> Sequence[Leftover]:  # noqa: FBT001 - by way of a thread
        with translated("the storage folder"):
            return [
                *self._folder.sweep(before=before, dry_run=dry_run),
                *local_upload.sweep(self._folder, before=before, dry_run=dry_run),
            ]

    async def strays(self) -> AsyncIterator[Stray]:
        """Nothing: what is no key is passed over here, and takes nothing from anybody."""
        strays: tuple[Stray, ...] = ()
        for stray in strays:
            yield stray

    async def uploads(self) -> AsyncIterator[UploadInfo]:
        for upload in await self._threads.run(local_upload.look_at_all, self._folder):
            yield upload

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self._folder.root}/{key}"

    def _write(self, key: str, path: str, content: bytes, expect: str | None) -> ObjectInfo:
        with translated(key), in_its_place(key), self._folder.locked(key):
            before = _record_status(path)
            version = "" if before is None else object_info(key, before).version
            if expect is not None and expect != version:
                raise PreconditionFailed(f"{key} is not the expected version")
            newer_than = 0 if before is None else before.st_mtime_ns
            after = self._folder.replace(path, content, newer_than=newer_than, is_new=before is None)
        return object_info(key, after)

    def _create(self, key: str, path: str, content: bytes) -> ObjectInfo:
        with translated(key), in_its_place(key):
            try:
                return object_info(key, self._folder.create(path, content))
            except FileExistsError as error:
                raise PreconditionFailed(f"{key} is there already") from error

    def _touch(self, key: str, path: str) -> ObjectInfo:
        """Not synced: the bytes are durable already. What a power cut takes back is an age, for the sake of something that was not
        written yet; whoever goes on with that after it asks once more.
        """
        with translated(key), self._folder.locked(key):
            before = _record_status(path)
            if before is None:
                raise ObjectMissing(f"no object {key}")
            return object_info(key, freshen(path, before))

    def _delete(self, key: str, path: str, expect: str | None) -> None:
        with translated(key), self._folder.locked(key):
            before = _record_status(path)
            if before is not None:
                if expect is not None and expect != object_info(key, before).version:
                    raise PreconditionFailed(f"{key} is not the expected version")
                os.unlink(path)
            # Also when it was gone: whoever removed it may have died before this.
            with suppress(FileNotFoundError, NotADirectoryError):
                self._folder.sync_folder(os.path.dirname(path))


def _record_status(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _read(key: str, path: str, size_max: int, inline_size_max: int | None) -> tuple[bytes, ObjectInfo]:
    """
    Args:
        inline_size_max: None to wait for the disk, else the size up to which not to.

    Raises:
        BlockingIOError: it would have to wait, or the record is larger.
    """
    with _opened_object(key, path) as (file, status):
        if status.st_size > size_max:
            raise ObjectTooLarge(f"{key} has {status.st_size} bytes, at most {size_max} were wanted")
        if inline_size_max is not None and status.st_size > inline_size_max:
            raise BlockingIOError
        content = bytearray(status.st_size)
        if content:
            try:
                size = os.preadv(file.fileno(), [content], 0, 0 if inline_size_max is None else _NO_WAIT)
            except OSError as error:
                if inline_size_max is not None:
                    raise BlockingIOError from error  # not cached, or a file system that cannot tell
                raise
            if size != len(content):
                if inline_size_max is not None:
                    raise BlockingIOError
                raise StorageUnavailable(f"{key} ends at {size} of {len(content)} bytes")
    return bytes(content), object_info(key, status)


@contextmanager
def _opened_object(key: str, path: str) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError as error:
        raise _not_read(key, error) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ObjectMissing(f"no object {key}")
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        yield file, status


def _not_read(key: str, error: OSError) -> StorageError:
    return ObjectMissing(f"no object {key}") if error.errno in _NOT_THERE else storage_error(key, error)


def _page(entries: Iterator[Entry], size: int) -> list[Entry]:
    with translated("the storage folder"):
        return list(islice(entries, size))


_: type[StorageBackend] = LocalBackend
