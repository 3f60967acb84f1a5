"""Where an unpack works before anything is visible, and how what was verified gets its final names.

    .<target>.kitclient-<n>/   one folder per unpack under way; beside the target, or inside where that cannot be
        lock                   held while somebody works here; free as soon as they end, however they end
        <key>.part/            a layer that is being extracted
        <key>/                 a layer that was extracted whole and verified
        <key>.members          what the layer holds; written before <key>.part becomes <key>

Who unpacks to the same target next takes over a folder that nobody holds: a verified layer that is wanted again is not
fetched again, a placing that was cut short goes on, all else is removed. That holds while the machine is up: files are
not synced here, so after a power cut a layer is fetched again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from pathlib import Path
from typing import Self

from kitclient.folders import FOLDER_FLAGS, Folders, PathRefused, folders_below, identity_of, kind_of
from kitclient.terminal import visible

_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# More unpacks to one target at a time than this are a mistake.
_SLOTS = 64


class Existing(Enum):
    """What to do about a file that is there already."""

    REFUSE = auto()
    SKIP = auto()
    REPLACE = auto()


@dataclass(frozen=True, slots=True)
class Member:
    """A file or folder that a layer brought.

    Attributes:
        path: relative to the target, cleaned.
        identity: of the file, as `identity_of` gives it; tells ours from one that only has its name.
    """

    path: str
    is_folder: bool
    identity: tuple[int, int, int] = (0, 0, 0)


class LayerTree:
    """The files of a layer while it is extracted. Whoever makes them says when they are verified."""

    def __init__(self, staging_folder: int, key: str) -> None:
        self.key = key
        self.members: list[Member] = []
        self._parent = staging_folder
        _remove(staging_folder, f"{key}.part")
        os.mkdir(f"{key}.part", 0o755, dir_fd=staging_folder)
        self._root = os.open(f"{key}.part", FOLDER_FLAGS, dir_fd=staging_folder)
        self._folders = Folders(self._root)

    def make_folder(self, path: str) -> None:
        """A folder and those above it; that it is there already is fine."""
        self._folders.at(path.split("/"), create=True)
        self.members.append(Member(path, is_folder=True))

    def create_file(self, path: str, mode: int) -> int:
        """A new file, open for writing, until `close_file`.

        Raises:
            PathRefused: the layer has brought this path already, or a file where a folder is wanted.
        """
        *parents, name = path.split("/")
        try:
            return os.open(name, _FILE_FLAGS, mode, dir_fd=self._folders.at(parents, create=True))
        except FileExistsError as error:
            raise PathRefused(f"the layer holds '{visible(path)}' twice") from error

    def close_file(self, path: str, file: int) -> None:
        self.members.append(Member(path, is_folder=False, identity=identity_of(os.fstat(file))))
        os.close(file)

    def keep(self) -> None:
        """All of it is here and verified: this life places it, or another one."""
        self.close()
        lines = [_boot_id(), *([member.path, member.is_folder, *member.identity] for member in self.members)]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = os.open(f"{self.key}.members", _FILE_FLAGS, 0o600, dir_fd=self._parent)
        with os.fdopen(file, "wb") as writer:
            writer.write(content)
        os.rename(f"{self.key}.part", self.key, src_dir_fd=self._parent, dst_dir_fd=self._parent)

    def close(self) -> None:
        """Let go of the open folders. May be called again."""
        if self._root >= 0:
            self._folders.close()
            os.close(self._root)
            self._root = -1


class Staging:
    """One unpack's working folder. On the way out of the context it goes, whatever happened."""

    def __init__(self, target: Path) -> None:
        self._target_path = target
        self._target = -1
        self._folder = -1
        self._moved: set[tuple[str, str]] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._target = os.open(self._target_path, FOLDER_FLAGS)
            stack.callback(os.close, self._target)
            self._folder = _claim(self._target_path, self._target, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def free_bytes(self) -> int:
        """Room on the file system that is unpacked to."""
        room = os.fstatvfs(self._target)
        return room.f_bavail * room.f_frsize

    def keep_only(self, keys: Iterable[str]) -> None:
        """Remove what an earlier life left and nobody wants, or cannot be trusted."""
        wanted = {name for key in keys for name in (key, f"{key}.members")}
        for name in os.listdir(self._folder):  # noqa: PTH208  (a descriptor)
            if name != "lock" and name not in wanted:
                _remove(self._folder, name)

    def verified(self, key: str) -> list[Member] | None:
        """What an earlier life extracted under `key`, if every file is still as it was; else None, and it is removed."""
        members = self._recorded(key)
        if members is not None:
            with folders_below(self._target) as target, self._tree(key) as staged:
                moved = {member.path for member in members if _holds(target, member)}
                whole = all(member.path in moved or _holds(staged, member) for member in members)
            if whole:
                self._moved.update((key, path) for path in moved)
                return members
        _remove(self._folder, key)
        _remove(self._folder, f"{key}.members")
        return None

    def refuse_file(self, path: str) -> None:
        """See that no file is at `path` of the target.

        Raises:
            PathRefused: one is.
        """
        *parents, name = path.split("/")
        with folders_below(self._target) as target:
            try:
                found = os.stat(name, dir_fd=target.at(parents), follow_symlinks=False)
            except FileNotFoundError:
                return
        if stat.S_ISREG(found.st_mode):
            raise _exists(path)

    def layer(self, key: str) -> LayerTree:
        return LayerTree(self._folder, key)

    def place(self, layers: dict[str, list[Member]], existing: Existing) -> list[str]:
        """Give every file its final name; the paths that were there already and were left alone.

        What stands in the way is found before the first file moves; what fails afterwards is taken back.

        Raises:
            PathRefused: two layers bring one file, or something is in the way.
        """
        _check_apart(layers)
        with folders_below(self._target) as target:
            plan = {
                key: [
                    (member, _verdict(target, member, existing))
                    for member in members
                    if (key, member.path) not in self._moved
                ]
                for key, members in layers.items()
            }
        undo: list[tuple[str, str]] = []
        with folders_below(self._target) as target:
            try:
                for key, steps in plan.items():
                    with self._tree(key) as source:
                        _move_all(source, target, steps, key, undo)
            except BaseException:
                self._take_back(target, undo)
                raise
        return [
            member.path
            for steps in plan.values()
            for member, verdict in steps
            if verdict is Existing.SKIP and not member.is_folder
        ]

    def _recorded(self, key: str) -> list[Member] | None:
        try:
            os.stat(key, dir_fd=self._folder, follow_symlinks=False)
            file = os.open(f"{key}.members", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        with os.fdopen(file, "rb") as reader:
            boot_id, *lines = [json.loads(line) for line in reader]
        if boot_id != _boot_id() or not boot_id:
            return None
        return [
            Member(path, is_folder, (inode, size, changed)) for path, is_folder, inode, size, changed in lines
        ]

    def _tree(self, key: str) -> _Tree:
        return _Tree(self._folder, key)

    def _take_back(self, target: Folders, undo: list[tuple[str, str]]) -> None:
        for key, path in reversed(undo):
            *parents, name = path.split("/")
            with suppress(OSError, PathRefused), self._tree(key) as source:
                os.rename(
                    name, name, src_dir_fd=target.at(parents), dst_dir_fd=source.at(parents, create=True)
                )
        for *parents, name in reversed(target.made):
            with suppress(OSError, PathRefused):
                os.rmdir(name, dir_fd=target.at(parents))


class _Tree:
    """The folders of a layer that is staged."""

    def __init__(self, parent: int, key: str) -> None:
        self._root = os.open(key, FOLDER_FLAGS, dir_fd=parent)
        self._folders = Folders(self._root)

    def __enter__(self) -> Folders:
        return self._folders

    def __exit__(self, *_: object) -> None:
        self._folders.close()
        os.close(self._root)


def _check_apart(layers: dict[str, list[Member]]) -> None:
    """No file may come twice, nor be a folder of another layer."""
    files: set[str] = set()
    folders: set[str] = set()
    for members in layers.values():
        for member in members:
            if member.is_folder:
                folders.add(member.path)
            elif member.path in files:
                raise PathRefused(f"two layers hold the file '{visible(member.path)}'")
            else:
                files.add(member.path)
            folders.update(_above(member.path))
    for path in files & folders:
        raise PathRefused(f"one layer holds '{visible(path)}' as a file, another as a folder")


def _verdict(target: Folders, member: Member, existing: Existing) -> Existing:
    """What to do for one member: REPLACE moves it, also where nothing is; SKIP leaves what is there."""
    *parents, name = member.path.split("/")
    try:
        found = os.stat(name, dir_fd=target.at(parents), follow_symlinks=False)
    except FileNotFoundError:
        return Existing.REFUSE
    if member.is_folder != stat.S_ISDIR(found.st_mode) or not (
        member.is_folder or stat.S_ISREG(found.st_mode)
    ):
        wanted = "folder" if member.is_folder else "file"
        raise PathRefused(
            f"'{visible(member.path)}' is {kind_of(found)}; a {wanted} is to be there, and cannot replace it"
        )
    if not member.is_folder and existing is Existing.REFUSE:
        raise _exists(member.path)
    return existing


def _move_all(
    source: Folders,
    target: Folders,
    steps: list[tuple[Member, Existing]],
    key: str,
    undo: list[tuple[str, str]],
) -> None:
    moved_whole: set[str] = set()
    for member, verdict in steps:
        if not moved_whole.isdisjoint(_above(member.path)):
            continue
        *parents, name = member.path.split("/")
        into = target.at(parents, create=True)
        if member.is_folder:
            if _move_folder(source, into, parents, name):
                moved_whole.add(member.path)
                undo.append((key, member.path))
        elif verdict is Existing.REPLACE:
            os.rename(name, name, src_dir_fd=source.at(parents), dst_dir_fd=into)
        elif verdict is Existing.REFUSE:
            _move_new(source.at(parents), into, name, member.path)
            undo.append((key, member.path))


def _move_folder(source: Folders, into: int, parents: list[str], name: str) -> bool:
    """Move a folder with all that is in it where there is none yet; False where there is one."""
    try:
        found = os.stat(name, dir_fd=into, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(name, name, src_dir_fd=source.at(parents), dst_dir_fd=into)
        return True
    if not stat.S_ISDIR(found.st_mode):
        raise PathRefused(f"'{visible('/'.join([*parents, name]))}' has become {kind_of(found)} meanwhile")
    return False


def _move_new(source: int, into: int, name: str, path: str) -> None:
    """Move a file to a name that is free; a rename would silently replace what came there meanwhile."""
    try:
        os.link(name, name, src_dir_fd=source, dst_dir_fd=into, follow_symlinks=False)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
            raise
        # A file system without hard links.
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=into)
        return
    os.unlink(name, dir_fd=source)


def _holds(folders: Folders, member: Member) -> bool:
    """Whether the member itself, not only something of its name, is there."""
    *parents, name = member.path.split("/")
    try:
        found = os.stat(name, dir_fd=folders.at(parents), follow_symlinks=False)
    except (FileNotFoundError, PathRefused):
        return False
    if member.is_folder:
        return stat.S_ISDIR(found.st_mode)
    return stat.S_ISREG(found.st_mode) and identity_of(found) == member.identity


def _exists(path: str) -> PathRefused:
    return PathRefused(f"failed to unpack: path '{visible(path)}' already exists")


def _above(path: str) -> Iterator[str]:
    cut = path.rfind("/")
    while cut > 0:
        path = path[:cut]
        yield path
        cut = path.rfind("/")


def _claim(target_path: Path, target: int, stack: ExitStack) -> int:
    """A working folder that is ours alone, open; `stack` removes it."""
    refused: OSError | None = None
    for parent_path, prefix in ((target_path.parent, f".{target_path.name}"), (target_path, "")):
        with ExitStack() as attempt:
            parent = os.open(parent_path, FOLDER_FLAGS)
            attempt.callback(os.close, parent)
            if os.fstat(parent).st_dev != os.fstat(target).st_dev:
                continue
            try:
                folder = _claim_slot(parent, f"{prefix}.kitclient", attempt)
            except OSError as error:
                if error.errno not in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}:
                    raise
                refused = error
                continue
            stack.push(attempt.pop_all())
            return folder
    raise PathRefused(f"'{target_path}' cannot be written: {refused}") from refused


def _claim_slot(parent: int, prefix: str, stack: ExitStack) -> int:
    for number in range(_SLOTS):
        name = f"{prefix}-{number}"
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=parent)
        with suppress(FileNotFoundError, BlockingIOError), ExitStack() as attempt:
            folder = os.open(name, FOLDER_FLAGS, dir_fd=parent)
            attempt.callback(os.close, folder)
            if _lock(parent, name, folder, attempt):
                attempt.callback(_remove_slot, parent, name, folder)
                stack.push(attempt.pop_all())
                return folder
    raise PathRefused(f"{_SLOTS} others are unpacking to this folder")


def _lock(parent: int, name: str, folder: int, stack: ExitStack) -> bool:
    """Whether the slot is ours to use.

    Raises:
        BlockingIOError: somebody works in it.
        FileNotFoundError: its user is just removing it.
    """
    status = os.fstat(folder)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        # Somebody else's: what is in it cannot be trusted.
        return False
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    stack.callback(os.close, lock)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Both names must still be there: the last user may have removed them between our opening and our locking.
    here = os.stat(name, dir_fd=parent, follow_symlinks=False)
    return os.path.samestat(status, here) and os.fstat(lock).st_nlink > 0


def _remove_slot(parent: int, name: str, folder: int) -> None:
    for entry in os.listdir(folder):
        if entry != "lock":
            _remove(folder, entry)
    # The lock goes last, while it is held; who opened it meanwhile sees that it has no name any more.
    os.unlink("lock", dir_fd=folder)
    with suppress(OSError):
        os.rmdir(name, dir_fd=parent)


def _remove(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(name, dir_fd=folder)


@cache
def _boot_id() -> str:
    """Changes when the machine starts anew; empty where nobody tells, and then nothing is taken over."""
    with suppress(OSError):
        return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()[:16]
    return ""
