"""A folder that several processes change at once: each change whole, and durable when it returns.

    <root>/<key>                      objects; content 0444, records 0644
    <root>/_store/layout              version of this layout
    <root>/_store/locks/<00..ff>      flock: who changes a record whose key hashes to this
    <root>/_store/uploads/<id>/       an upload, see local_upload.py; flock on the folder: who appends to it
    <root>/_store/tmp/<random>        not yet there, or no longer; flock: whoever made it is still at work

Blocking calls only: everything here runs in threads. Errors are OSErrors; `translated` makes them StorageErrors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from storage_backends.checks import INTERNAL
from storage_backends.interface import Leftover, StorageError, StorageFull, StorageUnavailable

LAYOUT_VERSION: Final = 1
# Far longer than any change takes; whoever waits longer meets a disk that hangs, and should say so.
_LOCK_WAIT_S: Final = 30.0
# Another process that starts may remove a temporary name in the instant before it is locked.
_ATTEMPTS: Final = 8
# Folders known to be durable; forgotten all at once when there are this many, so that memory stays bounded.
_SETTLED_MAX: Final = 65_536

# EFBIG is a file system's or a ulimit's way to say that no more goes in.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class SyncFailed(OSError):
    """fsync failed: what was written may or may not be on the disk, and asking again would not tell (D5)."""


@contextmanager
def translated(what: str) -> Iterator[None]:
    """The border between the operating system's errors and ours. Messages name `what`, never a folder."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(what, error) from error


@contextmanager
def in_its_place(key: str) -> Iterator[None]:
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as error:
        raise ValueError(f"{key}: another key is a part of it, or it of another") from error


def storage_error(what: str, error: OSError) -> StorageError:
    if error.errno in _FULL:
        return StorageFull(f"{what}: no room ({_name(error)})")
    return StorageUnavailable(f"{what}: {error.strerror or 'failed'} ({_name(error)})")


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown error")


class Folder:
    """
    Args:
        root: an absolute path.
        is_durable: whether to wait for the disk; without, a power cut may lose or tear what was acknowledged.
    """

    def __init__(self, root: Path, *, is_durable: bool) -> None:
        self.root = str(root)
        self.uploads = f"{root}/{INTERNAL}/uploads"
        self.sync_failure: str | None = None
        self._is_durable = is_durable
        self._internal = f"{root}/{INTERNAL}"
        self._locks = f"{root}/{INTERNAL}/locks"
        self._temporary = f"{root}/{INTERNAL}/tmp"  # noqa: S108 (of our own)
        self._settled: set[str] = set()

    def open(self) -> None:
        """Create what is missing, refuse what is not ours or too new, remove what the dead left behind.

        Raises:
            StorageUnavailable: with what to do about it.
        """
        try:
            os.makedirs(self.root, exist_ok=True)
            self._refuse_foreign()
            for folder in (self._internal, self._locks, self._temporary, self.uploads):
                self.settle(folder)
            self._check_layout()
            self.sync_folder(os.path.dirname(self.root))
            self.sweep(before=math.inf)
            self._check_links()
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageUnavailable("the storage folder is not a folder; choose another") from error
        except PermissionError as error:
            raise StorageUnavailable(
                f"the storage folder cannot be written by user {os.geteuid()}; change its owner or choose another"
            ) from error

    def _refuse_foreign(self) -> None:
        with os.scandir(self.root) as entries:
            names = {entry.name for entry in entries}
        # A fresh disk has lost+found; names with a dot are marks of tools.
        foreign = sorted(name for name in names if name != "lost+found" and not name.startswith("."))
        if INTERNAL not in names and foreign:
            raise StorageUnavailable(
                f"the storage folder holds other things ({foreign[0]!r}) and no storage; choose an empty one"
            )

    def _check_layout(self) -> None:
        path = f"{self._internal}/layout"
        try:
            with open(path, "rb") as file:
                found = file.read(32).strip()
        except FileNotFoundError:
            self.replace(path, b"%d\n" % LAYOUT_VERSION, newer_than=0, is_new=True)
            return
        if not found.isdigit() or int(found) > LAYOUT_VERSION:
            raise StorageUnavailable(
                f"the storage folder has layout {found.decode('ascii', 'replace')!r}, this version reads up to "
                f"{LAYOUT_VERSION}; run the version that wrote it, or a newer one"
            )

    def _check_links(self) -> None:
        with self.temporary() as (_, path):
            linked = f"{path}.link"
            try:
                os.link(path, linked)
            except OSError as error:
                raise StorageUnavailable(
                    f"the storage folder's file system has no hard links ({_name(error)}); choose another"
                ) from error
            os.unlink(linked)

    def sweep(self, *, before: float, dry_run: bool = False) -> list[Leftover]:
        """Remove what processes that are gone left in tmp/ before a moment: what nobody holds the lock of."""
        with os.scandir(self._temporary) as entries:
            paths = [entry.path for entry in entries]
        return [
            left for path in paths if (left := self._sweep_one(path, before, dry_run=dry_run)) is not None
        ]

    def _sweep_one(self, path: str, before: float, *, dry_run: bool) -> Leftover | None:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            if status.st_mtime >= before:
                return None
            left = Leftover(self.name_of(path), size_of(path), status.st_mtime)
            if stat.S_ISLNK(status.st_mode):
                if not dry_run:
                    os.unlink(path)
                return left
            # Without O_NONBLOCK a stray FIFO would keep us here.
            with opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
                if try_lock(descriptor):
                    if not dry_run:
                        remove(path)
                    return left
        return None

    def name_of(self, path: str) -> str:
        """What may be told of a path below the root."""
        return os.path.relpath(path, self.root)

    def settle(self, folder: str) -> None:
        """Make sure `folder` exists and will after a power cut: every new entry above it is made durable too (D2).

        A folder that another process has just made is synced once more: nothing says that it got that far.
        """
        if folder in self._settled or folder == self.root:
            return
        above = os.path.dirname(folder)
        self.settle(above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o755)
        self.sync_folder(above)
        if len(self._settled) >= _SETTLED_MAX:
            self._settled.clear()
        self._settled.add(folder)

    def unsettle(self) -> None:
        """Somebody removed folders behind our back: make sure of each again."""
        self._settled.clear()

    @contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Only one thread of all processes is in here for `key`.

        flock belongs to the open file, and each caller opens its own: so it keeps threads apart as well as processes.
        """
        name = f"{self._locks}/{zlib.crc32(key.encode()) & 0xFF:02x}"
        with opened(name, os.O_RDWR | os.O_CREAT) as descriptor:
            wait_s, deadline = 0.0002, time.monotonic() + _LOCK_WAIT_S
            while not try_lock(descriptor):
                # flock itself has no limit of time; a thread may sleep.
                if time.monotonic() > deadline:
                    raise StorageUnavailable(f"{key} was locked for {_LOCK_WAIT_S:.0f} s by others")
                time.sleep(wait_s)
                wait_s = min(wait_s * 2, 0.01)
            yield

    @contextmanager
    def temporary(self) -> Iterator[tuple[int, str]]:
        """A new file on the same file system (D1), open, its lock held; removed at the end if it is still there."""
        for _ in range(_ATTEMPTS):
            path = f"{self._temporary}/{secrets.token_hex(8)}"
            with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as descriptor:
                try:
                    if try_lock(descriptor) and os.fstat(descriptor).st_nlink:
                        yield descriptor, path
                        return
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
        raise StorageUnavailable("temporary files vanish as soon as they are made")

    @contextmanager
    def temporary_folder(self) -> Iterator[tuple[int, str]]:
        """As `temporary`, a folder."""
        for _ in range(_ATTEMPTS):
            path = f"{self._temporary}/{secrets.token_hex(8)}"
            os.mkdir(path, 0o755)
            try:
                with opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
                    if try_lock(descriptor) and os.fstat(descriptor).st_nlink:
                        yield descriptor, path
                        return
            except FileNotFoundError:
                continue
            finally:
                remove(path)
        raise StorageUnavailable("temporary folders vanish as soon as they are made")

    def replace(self, path: str, content: bytes, *, newer_than: int, is_new: bool) -> os.stat_result:
        """Put a file with `content` at `path`, whole and durable, its time (ns) being greater than `newer_than`.

        Two fsyncs, of the file and of its folder (D2); of the folder only when there are no bytes that could be missing
        behind the name. That the temporary name is gone need not be durable: what a power cut brings back there, the next
        start removes.
        """
        with self._written(content, newer_than=newer_than) as (descriptor, temporary):
            if content:
                self.sync(descriptor)
            self._named(os.rename, temporary, path)
            try:
                self.sync_folder(os.path.dirname(path))
            except SyncFailed:
                if is_new:
                    os.unlink(path)  # never serve what failed to become durable (D5)
                raise
            return os.fstat(descriptor)

    def create(self, path: str, content: bytes) -> os.stat_result:
        """Put a file with `content` where none is, whole for whoever looks, and durable when this returns.

        The name comes before the fsyncs, of the file and of its folder. So the first commits both in the file system's journal
        and the second finds nothing to wait for; and a power cut before that may leave a name with torn bytes.

        Raises:
            FileExistsError: something is there.
        """
        with self._written(content, newer_than=0) as (descriptor, temporary):
            self._named(os.link, temporary, path)
            try:
                self.sync(descriptor)
                self.sync_folder(os.path.dirname(path))
            except SyncFailed:
                os.unlink(path)  # as above
                raise
            return os.fstat(descriptor)

    @contextmanager
    def _written(self, content: bytes, *, newer_than: int) -> Iterator[tuple[int, str]]:
        """A temporary file with `content` that needs nothing but its name."""
        with self.temporary() as (descriptor, path):
            write_all(descriptor, content)
            os.fchmod(descriptor, 0o644)
            modified = max(time.time_ns(), newer_than + 1)
            os.utime(descriptor, ns=(modified, modified))
            yield descriptor, path

    def _named(self, give: Callable[[str, str], None], temporary: str, path: str) -> None:
        """Give a temporary file its name, in a folder that is durable."""
        self.settle(os.path.dirname(path))
        try:
            give(temporary, path)
        except FileNotFoundError:
            self.unsettle()
            self.settle(os.path.dirname(path))
            give(temporary, path)

    def publish(self, data: int, directory: int, key: str) -> os.stat_result:
        """Give the file `data` in `directory` the name of `key` too, durably; what is there already stays (D6), freshened.

        Two fsyncs, of the file and of the folder of `path` (D2): also when the name was there, for whoever gave it may
        not have come as far as its fsync.

        Returns: of the file that is now there.
        """
        os.fchmod(data, 0o444)
        # Now, to the nanosecond: the kernel's own "now" stands still for milliseconds, in which a file may come and go.
        now = time.time_ns()
        os.utime(data, ns=(now, now))
        self.sync(data)
        path = f"{self.root}/{key}"
        above = os.path.dirname(path)
        self.settle(above)
        is_new = self._link_or_freshen(data, directory, key)
        try:
            self.sync_folder(above)
            return os.lstat(path)
        except BaseException:
            if is_new:
                os.unlink(path)  # never serve what failed to become durable (D5)
            raise

    def _link_or_freshen(self, data: int, directory: int, key: str) -> bool:
        """Whether the name is new. Who deletes what was there when we began has either done so or is refused."""
        path = f"{self.root}/{key}"
        for _ in range(_ATTEMPTS):
            try:
                os.link("data", path, src_dir_fd=directory)
            except FileNotFoundError:
                self.unsettle()
                self.settle(os.path.dirname(path))
            except FileExistsError:
                with self.locked(key), contextlib.suppress(FileNotFoundError):
                    self._check_same_size(data, path)
                    freshen(path, os.lstat(path))
                    return False
            else:
                return True
        raise StorageUnavailable(f"{key} appears and vanishes all the time")

    def _check_same_size(self, data: int, path: str) -> None:
        found, expected = os.lstat(path).st_size, os.fstat(data).st_size
        if found != expected:
            raise StorageUnavailable(
                f"{os.path.basename(path)} holds {found} bytes, not the {expected} it should"
            )

    def trash(self, path: str) -> None:
        """Make `path`, a folder whose lock the caller holds, vanish at once; then remove it piece by piece."""
        grave = f"{self._temporary}/{secrets.token_hex(8)}"
        try:
            os.rename(path, grave)
        except OSError:
            remove(path)  # a full disk may have no room for a name
        else:
            remove(grave)

    def sync(self, descriptor: int, *, is_data_only: bool = False) -> None:
        """Raises: SyncFailed."""
        if not self._is_durable:
            return
        try:
            (os.fdatasync if is_data_only else os.fsync)(descriptor)
        except OSError as error:
            # A full disk is no broken disk: it recovers by itself (INV-17). Anything else needs a human (D5).
            if error.errno not in _FULL:
                self.sync_failure = f"fsync failed with {_name(error)}"
            raise SyncFailed(error.errno, error.strerror) from error

    def sync_folder(self, path: str) -> None:
        """Without it a crash can keep a file and lose its name (D2).

        Concurrent calls are not grouped here (D8): the journal of ext4 and XFS commits them together already.
        """
        if self._is_durable:
            with opened(path, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
                self.sync(descriptor)

    def check_room(self, reserve: Callable[[int], int]) -> None:
        """Raises: StorageFull: less is free than `reserve` says of the size of the file system."""
        status = os.statvfs(self.root)
        free, wanted = status.f_bavail * status.f_frsize, reserve(status.f_blocks * status.f_frsize)
        if free < wanted:
            raise StorageFull(f"{free} bytes are free, {wanted} are kept in reserve")

    def probe(self) -> None:
        """Write, sync, read and remove a file.

        Raises:
            StorageUnavailable: that failed, or an fsync did since the start (D5).
        """
        if self.sync_failure is not None:
            raise StorageUnavailable(f"{self.sync_failure} since the start; check the disk, then restart")
        expected = secrets.token_bytes(64)
        with self.temporary() as (descriptor, _):
            write_all(descriptor, expected)
            self.sync(descriptor)
            if os.pread(descriptor, 64, 0) != expected:
                raise StorageUnavailable("the disk gave back other bytes than were written")


def refuse_no_store(root: Path) -> None:
    """Raises: StorageUnavailable: there is no folder of ours at `root`, or one of a newer layout."""
    try:
        found = int((root / INTERNAL / "layout").read_bytes())
    except (OSError, ValueError) as error:
        raise StorageUnavailable(
            f"no storage of a registry here: {INTERNAL}/layout cannot be read ({type(error).__name__})"
        ) from error
    if found > LAYOUT_VERSION:
        raise StorageUnavailable(
            f"layout {found}, this version reads up to {LAYOUT_VERSION}: run the version that wrote it, or a newer one"
        )


def freshen(path: str, before: os.stat_result) -> os.stat_result:
    """Give a file whose lock is held a time that is later than the one it had: another version."""
    modified = max(time.time_ns(), before.st_mtime_ns + 1)
    os.utime(path, ns=(modified, modified), follow_symlinks=False)
    return os.lstat(path)


@contextmanager
def opened(path: str, flags: int, *, folder: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_all(descriptor: int, content: bytes) -> None:
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]


def size_of(path: str) -> int:
    """Bytes of a file, or of all files in a folder. Raises: FileNotFoundError."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        with os.scandir(path) as entries:
            return sum(size_of(entry.path) for entry in entries)
    return os.lstat(path).st_size


def remove(path: str) -> None:
    """Remove a file or a folder with what is in it; gone already is fine."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
