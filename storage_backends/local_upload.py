"""An upload on disk: `data`, the bytes so far, and `state`, how many of them count and the caller's note.

    begin ──► uploads/<id>/state ──append──► data, then state ──commit──► link of data at the key, folder gone
                                                              └─abort───► folder gone

Whoever changes an upload holds the flock of its folder. Bytes in `data` beyond the offset in `state` are what a killed
append left: the next one overwrites them. `data` with two names was committed by somebody who then died: it has ended,
and must not be written again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import sys
import weakref
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import cycle
from typing import Final, Self

from storage_backends.checks import check_key, check_note
from storage_backends.interface import (
    BlockingSource,
    Leftover,
    ObjectInfo,
    Observer,
    StorageError,
    StorageUnavailable,
    Upload,
    UploadBusy,
    UploadInfo,
    UploadMissing,
)
from storage_backends.local_folder import (
    Folder,
    SyncFailed,
    in_its_place,
    opened,
    size_of,
    translated,
    try_lock,
    write_all,
)
from storage_backends.local_intake import BATCH_SIZE, Intake, drained, fill
from storage_backends.threads import Threads, uncancelled

_REPLAY_SIZE: Final = 1024 * 1024
# Less than this is written before anybody could miss the room.
_RESERVE_SIZE_MIN: Final = 4 * 1024 * 1024
# Without a kick the kernel lets dirty pages pile up, then stops the writer and makes the final fsync slow.
_WRITEBACK_SIZE: Final = 32 * 1024 * 1024
_SYNC_FILE_RANGE_WRITE: Final = 2
# Larger writes make the kernel take larger folios for its cache. In a virtual machine whose free memory goes back to its
# host those are the ones that went: a push of 1 GiB took 4.3 s of processor time by 1 MiB, 1.4 s by 256 KiB (ADR 12).
_WRITE_SIZE: Final = 256 * 1024
_STATE_SIZE_MAX: Final = 128 * 1024


def _start_writeback_call() -> Callable[[int, int, int], object]:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            call = ctypes.CDLL(None, use_errno=True).sync_file_range
            call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
            return lambda descriptor, offset, size: call(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)
    return lambda *_: None


# Advice only: that it fails means nothing, the fdatasync that follows is what counts.
_start_writeback = _start_writeback_call()


@dataclass(frozen=True, slots=True)
class State:
    offset: int
    note: bytes

    def to_bytes(self) -> bytes:
        return b"%d %08x\n" % (self.offset, self._checksum()) + self.note

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises: ValueError: torn by a power cut."""
        head, _, note = content.partition(b"\n")
        offset, _, checksum = head.partition(b" ")
        state = cls(int(offset), note)
        if int(checksum, 16) != state._checksum():
            raise ValueError("the checksum is of something else")
        return state

    def _checksum(self) -> int:
        return zlib.crc32(self.note, self.offset)


class Work:
    """An upload's folder and data, open and locked. Closed by `close`, or when nobody refers to it any more.

    Raises:
        UploadBusy: somebody else has it.
        UploadMissing: the upload has ended.
    """

    def __init__(self, folder: Folder, upload_id: str) -> None:
        self._folder = folder
        self._id = upload_id
        try:
            self.directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise missing(upload_id) from error
        descriptors = [self.directory]
        self.close = weakref.finalize(self, _close_all, descriptors)
        try:
            self._lock()
            self.data = self._open_data()
        except BaseException:
            self.close()
            raise
        descriptors.append(self.data)
        if os.fstat(self.data).st_nlink != 1:
            self.end()
            raise missing(upload_id)

    @property
    def path(self) -> str:
        return f"{self._folder.uploads}/{self._id}"

    def _lock(self) -> None:
        if not try_lock(self.directory):
            raise UploadBusy(f"somebody is appending to the upload {self._id}")

    def _open_data(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return os.open("data", flags, dir_fd=self.directory)
        except FileNotFoundError as error:
            raise missing(self._id) from error
        except PermissionError:
            # A commit died after it had made the file read-only, before it linked it.
            os.chmod("data", 0o600, dir_fd=self.directory)
            return os.open("data", flags, dir_fd=self.directory)

    def check(self, saved: State) -> None:
        """Raises: UploadBusy: somebody else has appended since `saved` was read."""
        if _read_state(self._folder, self._id) != saved:
            raise UploadBusy(f"somebody else has appended to the upload {self._id}")
        if os.fstat(self.data).st_size < saved.offset:
            raise StorageUnavailable(f"the disk has lost bytes of the upload {self._id}")

    def save(self, state: State) -> None:
        # The entry of the upload itself too: to begin one costs no fsync, it need not survive a power cut before this.
        with opened(self._folder.uploads, os.O_RDONLY | os.O_DIRECTORY) as above:
            with opened("state.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, folder=self.directory) as new:
                write_all(new, state.to_bytes())
                self._folder.sync(new)
            os.rename("state.new", "state", src_dir_fd=self.directory, dst_dir_fd=self.directory)
            self._folder.sync(self.directory)
            self._folder.sync(above)

    def end(self) -> None:
        """Remove the upload."""
        try:
            self._folder.trash(self.path)
        finally:
            self.close()


class Appending:
    """One append, seen from the threads that do it."""

    def __init__(self, work: Work, folder: Folder, saved: State, observe: Observer, size: int | None) -> None:
        self.work = work
        self._folder = folder
        self._start = self._offset = self._kicked = saved.offset
        self._observe = observe
        self._is_reserved = False
        try:
            os.ftruncate(work.data, self._start)
            if size is not None and size >= _RESERVE_SIZE_MIN:
                self._is_reserved = True
                os.posix_fallocate(work.data, self._start, size)
        except BaseException:
            self.undo()
            raise

    def write(self, batch: Sequence[bytes]) -> None:
        try:
            self._store(batch)
            for piece in batch:
                self._observe(piece)
        except BaseException:
            self.undo()
            raise

    def drain(self, source: BlockingSource, hashers: Threads) -> BaseException | None:
        """Store all that the source gives: while one buffer fills, the one before is hashed, and written in between.

        Returns:
            what stopped the source before its end; what it gave until then is stored.
        """
        views = [memoryview(bytearray(BATCH_SIZE)) for _ in range(2)]
        hashing: Future[None] | None = None
        try:
            for view in cycle(views):
                size, failure = fill(view, source)
                if hashing is not None:
                    hashing.result()
                hashing = hashers.begin(self._observe, view[:size])
                self._store([view[:size]])
                if failure is not None or size < len(view):
                    hashing.result()
                    return failure
        except BaseException:
            self.undo()
            raise
        raise AssertionError("a cycle has no end")

    def _store(self, batch: Sequence[bytes | memoryview]) -> None:
        with translated("the upload's bytes"):
            self._write(batch)
            if self._offset - self._kicked >= _WRITEBACK_SIZE:
                _start_writeback(self.work.data, self._kicked, self._offset - self._kicked)
                self._kicked = self._offset

    def _write(self, batch: Sequence[bytes | memoryview]) -> None:
        gathered: list[memoryview] = []
        size = 0
        for piece in batch:
            for start in range(0, len(piece), _WRITE_SIZE):
                gathered.append(memoryview(piece)[start : start + _WRITE_SIZE])
                size += len(gathered[-1])
                if size >= _WRITE_SIZE:
                    self._write_all(gathered)
                    gathered, size = [], 0
        if gathered:
            self._write_all(gathered)

    def _write_all(self, buffers: list[memoryview]) -> None:
        while buffers:
            written = os.pwritev(self.work.data, buffers, self._offset)
            self._offset += written
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if written:
                buffers[0] = buffers[0][written:]

    def finish(self, rest: Sequence[bytes], note: Callable[[], bytes], *, is_last: bool) -> State:
        """Write what is left; unless a commit follows, make all of it durable and close."""
        self.write(rest)
        try:
            state = State(self._offset, note())
            check_note(state.note)
            with translated("the upload's state"):
                if self._is_reserved:
                    os.ftruncate(self.work.data, self._offset)
                if not is_last:
                    self._folder.sync(self.work.data, is_data_only=True)
                    self.work.save(state)
                    self.work.close()
        except BaseException as error:
            if isinstance(error.__cause__, SyncFailed):
                self.work.end()  # nobody knows what is on the disk (D5)
            else:
                self.undo()
            raise
        return state

    def undo(self) -> None:
        """Give the room back; the upload stays where it was."""
        if self.work.close.alive:
            with contextlib.suppress(OSError):
                os.ftruncate(self.work.data, self._start)
            self.work.close()


@dataclass(frozen=True, slots=True)
class Pools:
    """Threads that sleep in fsync, that write and hash, and that wait for a source."""

    threads: Threads
    appenders: Threads
    sources: Threads


class LocalUpload:
    def __init__(self, folder: Folder, pools: Pools, upload_id: str, state: State) -> None:
        self._folder = folder
        self._threads = pools.threads
        self._appenders = pools.appenders
        self._sources = pools.sources
        self._id = upload_id
        self._state = state
        self._saved = state
        # Held from an append that said `last` until the commit: nobody may come between.
        self._work: Work | None = None

    @property
    def id(self) -> str:
        return self._id

    @property
    def offset(self) -> int:
        return self._state.offset

    @property
    def note(self) -> bytes:
        return self._state.note

    async def is_idle(self) -> bool:
        return await self._threads.run(self._is_idle)

    def _is_idle(self) -> bool:
        with translated(f"the upload {self._id}"):
            try:
                Work(self._folder, self._id).close()
            except UploadBusy:
                return False
            except UploadMissing:
                return True
            return True

    async def append(
        self,
        chunks: AsyncIterable[bytes] | BlockingSource,
        *,
        observe: Observer,
        note: Callable[[], bytes],
        size: int | None = None,
        last: bool = False,
    ) -> int:
        appending = await self._begin_append(observe, size)
        intake = Intake(self._appenders, appending.write)
        try:
            if isinstance(chunks, AsyncIterable):
                async for chunk in chunks:
                    await intake.put(chunk)
            else:
                await drained(self._sources, lambda: appending.drain(chunks, self._appenders), chunks)
        except BaseException:
            # What had arrived is kept before the error goes on, and it goes on also when that fails.
            with contextlib.suppress(StorageError):
                await uncancelled(
                    asyncio.ensure_future(self._end_append(appending, intake, note, is_last=False))
                )
            raise
        await uncancelled(asyncio.ensure_future(self._end_append(appending, intake, note, is_last=last)))
        return self.offset

    async def replay(self) -> AsyncIterator[bytes]:
        descriptor = await self._threads.run(self._open_to_replay)
        try:
            for start in range(0, self.offset, _REPLAY_SIZE):
                size = min(_REPLAY_SIZE, self.offset - start)
                with translated(f"the upload {self._id}"):
                    piece = await self._threads.run(os.pread, descriptor, size, start)
                if len(piece) != size:
                    raise StorageUnavailable(f"the upload {self._id} ends early, at {start + len(piece)}")
                yield piece
        finally:
            os.close(descriptor)

    async def commit(self, key: str) -> ObjectInfo:
        check_key(key)
        work, self._work = self._work, None
        return await self._threads.run(self._commit, key, work)

    async def abort(self) -> None:
        work, self._work = self._work, None
        await self._threads.run(self._abort, work)

    async def _begin_append(self, observe: Observer, size: int | None) -> Appending:
        work, self._work = self._work, None
        beginning = self._threads.submit(self._open_to_append, work, observe, size)
        try:
            return await uncancelled(beginning)
        except asyncio.CancelledError:
            if beginning.exception() is None:
                await self._threads.run(beginning.result().undo)
            raise

    async def _end_append(
        self, appending: Appending, intake: Intake, note: Callable[[], bytes], *, is_last: bool
    ) -> None:
        rest = await intake.finish()
        self._state = await self._appenders.run(appending.finish, rest, note, is_last=is_last)
        if is_last:
            self._work = appending.work
        else:
            self._saved = self._state

    def _open(self, work: Work | None) -> Work:
        if work is None:
            work = Work(self._folder, self._id)
            try:
                work.check(self._saved)
            except BaseException:
                work.close()
                raise
        return work

    def _open_to_append(self, work: Work | None, observe: Observer, size: int | None) -> Appending:
        with translated(f"the upload {self._id}"):
            return Appending(self._open(work), self._folder, self._state, observe, size)

    def _open_to_replay(self) -> int:
        with translated(f"the upload {self._id}"):
            try:
                return os.open(f"{self._folder.uploads}/{self._id}/data", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise missing(self._id) from error

    def _commit(self, key: str, held: Work | None) -> ObjectInfo:
        with translated(key), in_its_place(key):
            work = self._open(held)
            try:
                os.ftruncate(work.data, self.offset)
                status = self._folder.publish(work.data, work.directory, key)
            except SyncFailed:
                work.end()  # nobody knows what is on the disk (D5)
                raise
            except BaseException:
                if held is None:
                    work.close()
                self._work = held
                raise
            # Published: what can still go wrong leaves a folder that `Work` knows for an ended one.
            with contextlib.suppress(OSError):
                work.end()
        return object_info(key, status)

    def _abort(self, held: Work | None) -> None:
        with translated(f"the upload {self._id}"), contextlib.suppress(UploadMissing):
            (held or Work(self._folder, self._id)).end()


def begin(folder: Folder, upload_id: str, note: bytes) -> State:
    """Raises: ValueError: the id was used before."""
    check_note(note)
    state = State(0, note)
    with translated(f"the upload {upload_id}"), folder.temporary_folder() as (directory, path):
        with opened("data", os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder=directory):
            pass
        with opened("state", os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder=directory) as descriptor:
            write_all(descriptor, state.to_bytes())
        try:
            os.rename(path, f"{folder.uploads}/{upload_id}")
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                raise ValueError(f"the upload {upload_id} was begun before") from error
            raise
    return state


def resume(folder: Folder, upload_id: str) -> State:
    """Raises: UploadMissing."""
    with translated(f"the upload {upload_id}"):
        return _look(folder, upload_id)[0]


def look_at_all(folder: Folder) -> list[UploadInfo]:
    """Uploads under way."""
    found = []
    with translated("the uploads"):
        for upload_id in os.listdir(folder.uploads):
            with contextlib.suppress(UploadMissing):
                state, modified = _look(folder, upload_id)
                found.append(UploadInfo(upload_id, state.offset, modified))
    return found


def sweep(folder: Folder, *, before: float, dry_run: bool) -> list[Leftover]:
    """Remove what a power cut left of uploads that had just begun: a folder without a state that can be read.

    Args:
        before: a moment, by which nothing was changed in it any more.
    """
    with translated("the uploads"):
        found = [_sweep_one(folder, name, before, dry_run=dry_run) for name in os.listdir(folder.uploads)]
    return [leftover for leftover in found if leftover is not None]


def _sweep_one(folder: Folder, upload_id: str, before: float, *, dry_run: bool) -> Leftover | None:
    path = f"{folder.uploads}/{upload_id}"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        modified = os.stat(path).st_mtime
        if modified >= before or _is_readable(folder, upload_id):
            return None
        with opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
            if try_lock(descriptor):
                leftover = Leftover(folder.name_of(path), size_of(path), modified)
                if not dry_run:
                    folder.trash(path)
                return leftover
    return None


def _is_readable(folder: Folder, upload_id: str) -> bool:
    try:
        _read_state(folder, upload_id)
    except UploadMissing:
        return False
    return os.path.exists(f"{folder.uploads}/{upload_id}/data")


def _look(folder: Folder, upload_id: str) -> tuple[State, float]:
    path = f"{folder.uploads}/{upload_id}"
    try:
        data = os.stat(f"{path}/data")
        if data.st_nlink != 1:
            # Committed. Removed here, unless whoever commits it is just about to.
            with contextlib.suppress(UploadBusy):
                Work(folder, upload_id)
            raise missing(upload_id)
        modified = max(data.st_mtime, os.stat(f"{path}/state").st_mtime)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise missing(upload_id) from error
    return _read_state(folder, upload_id), modified


def _read_state(folder: Folder, upload_id: str) -> State:
    try:
        with opened(f"{folder.uploads}/{upload_id}/state", os.O_RDONLY) as descriptor:
            return State.from_bytes(os.read(descriptor, _STATE_SIZE_MAX))
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise missing(upload_id) from error


def object_info(key: str, status: os.stat_result) -> ObjectInfo:
    # A new version has a greater time and, while the old one is open, another inode: also with the same bytes.
    version = f"{status.st_mtime_ns:x}-{status.st_ino:x}"
    return ObjectInfo(key, status.st_size, version, status.st_mtime)


def missing(upload_id: str) -> UploadMissing:
    return UploadMissing(f"no upload {upload_id}: it ended, expired or never was")


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


_: type[Upload] = LocalUpload
