"""Folders by descriptor: every step of a path opened by itself, and a symbolic link never followed.

Whoever changes the tree meanwhile can make a call fail; they cannot lead it elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kitclient.errors import ClientError
from kitclient.terminal import visible

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PathRefused(ClientError):
    """A path cannot be used: something is in the way, or must not be written through."""


class Folders:
    """The folders below a root that is open; the last chain is kept open, so that neighbours cost one call.

    Attributes:
        made: paths of the folders that were created here, outermost first.
    """

    def __init__(self, root: int) -> None:
        self.made: list[list[str]] = []
        self._root = root
        self._names: list[str] = []
        self._open: list[int] = []

    def at(self, components: Sequence[str], *, create: bool = False) -> int:
        """The open folder at `components`; valid until the next call.

        Raises:
            FileNotFoundError: it is not there.
            PathRefused: a component is a symbolic link, or no folder.
        """
        common = 0
        while common < min(len(components), len(self._names)) and components[common] == self._names[common]:
            common += 1
        while len(self._open) > common:
            os.close(self._open.pop())
            self._names.pop()
        for name in components[common:]:
            parent = self._open[-1] if self._open else self._root
            self._open.append(self._step(parent, name, create=create))
            self._names.append(name)
        return self._open[-1] if self._open else self._root

    def close(self) -> None:
        """Close all but the root. May be called again."""
        while self._open:
            os.close(self._open.pop())
        self._names.clear()

    def _step(self, parent: int, name: str, *, create: bool) -> int:
        try:
            return os.open(name, FOLDER_FLAGS, dir_fd=parent)
        except FileNotFoundError:
            if not create:
                raise
        except OSError as error:
            if error.errno not in {errno.ELOOP, errno.ENOTDIR}:
                raise
            path = "/".join([*self._names, name])
            found = kind_of(os.stat(name, dir_fd=parent, follow_symlinks=False))
            raise PathRefused(
                f"'{visible(path)}' is {found}, and a folder is wanted; links are not followed"
            ) from error
        os.mkdir(name, 0o755, dir_fd=parent)
        self.made.append([*self._names, name])
        return os.open(name, FOLDER_FLAGS, dir_fd=parent)


@contextmanager
def folders_below(root: int) -> Iterator[Folders]:
    """`Folders` of an open root, which stays open."""
    folders = Folders(root)
    try:
        yield folders
    finally:
        folders.close()


def kind_of(status: os.stat_result) -> str:
    """What a path is, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFLNK: "a symbolic link"}
    return kinds.get(stat.S_IFMT(status.st_mode), "a special file")


def identity_of(status: os.stat_result) -> tuple[int, int, int]:
    """Tells a file from every other, and from itself after a change: inode, size, time of the last change in ns."""
    return status.st_ino, status.st_size, status.st_mtime_ns
