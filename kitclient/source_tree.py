"""The files of a folder that belong into a layer, and their bytes as they were when they were listed.

Symbolic links and special files are left out with a word about it; nothing here waits for a FIFO. A file that changes
between the listing and the last byte is an error: a layer must not hold a mixture.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kitclient.compression import PIECE_SIZE
from kitclient.errors import ClientError
from kitclient.folders import identity_of
from kitclient.ignore import IgnoreRules
from kitclient.terminal import visible
from kitspec.kitfile import FILE_NAMES

IGNORE_FILE_NAME = ".kitignore"

# What file managers leave behind; kit has skipped it since 1.15, in any case of letters.
_LITTER = {
    ".ds_store",
    ".appledouble",
    ".lsoverride",
    ".spotlight-v100",
    ".trashes",
    "thumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "ehthumbs.db",
}


class SourceInvalid(ClientError):
    """A file or folder cannot be packed as it is, or changed while it was packed."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One entry of a layer.

    Attributes:
        name: relative to the context folder, cleaned.
        mode: permission bits with setuid, setgid and sticky.
        size: bytes; 0 for a folder.
        identity: as `identity_of` gives it.
    """

    name: str
    is_folder: bool
    mode: int
    size: int
    modified_ns: int
    identity: tuple[int, int, int]


@dataclass
class SourceTree:
    """A context folder and what is to be left out of it.

    Args:
        root: the context folder.
        layer_paths: of every entry of the Kitfile, cleaned: a file below one entry stays out of the layers around it.
        rules: of `.kitignore`.
        skip_litter: leave out what file managers leave behind; kit 1.7 packs it.
        warn: called with a sentence about each thing that is left out and might be missed.
    """

    root: Path
    layer_paths: Iterable[str]
    rules: IgnoreRules
    skip_litter: bool = True
    warn: Callable[[str], None] = field(default=lambda _: None)

    def files(self, layer_path: str) -> list[SourceFile]:
        """The entries of the layer at `layer_path`, cleaned: folders above it, itself, what is in it, in kit's order.

        Raises:
            SourceInvalid: it does not exist, cannot be read, or a name in it is not UTF-8.
        """
        try:
            return list(self._files(layer_path))
        except OSError as error:
            raise SourceInvalid(f"cannot read {error.filename}: {error.strerror}") from error

    def read(self, file: SourceFile) -> Iterator[bytes]:
        """The file's bytes, exactly as many as were announced.

        Raises:
            SourceInvalid: it has changed since it was listed, or changes now.
        """
        path = self.root / file.name
        try:
            # O_NONBLOCK: what has become a FIFO meanwhile must not hold us.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise SourceInvalid(
                f"cannot read {path}, which was there a moment ago: {error.strerror}"
            ) from error
        try:
            left = file.size
            self._check(path, file, descriptor)
            while left and (piece := os.read(descriptor, min(left, PIECE_SIZE))):
                left -= len(piece)
                yield piece
            self._check(path, file, descriptor)
            if left:
                raise SourceInvalid(f"{path} has shrunk while it was packed")
        except OSError as error:
            raise SourceInvalid(f"cannot read {path}: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def _check(self, path: Path, file: SourceFile, descriptor: int) -> None:
        if identity_of(os.fstat(descriptor)) != file.identity:
            raise SourceInvalid(
                f"{path} has changed while it was packed; pack again when nobody writes to it"
            )

    def _files(self, layer_path: str) -> Iterator[SourceFile]:
        parents = _parents(layer_path)
        for parent in parents:
            entry = self._entry(parent, os.lstat(self.root / parent))
            if entry is None or not entry.is_folder:
                return
            if self.rules.ignores(parent):
                if not self.rules.may_take_back:
                    return
            else:
                yield entry
        status = os.lstat(self.root / layer_path)
        if layer_path == ".":
            yield from self._folder("", layer_path)
            return
        entry = self._entry(layer_path, status)
        if entry is None:
            return
        if self.rules.ignores(layer_path):
            self.warn(f"layer path {visible(layer_path)} is ignored by {IGNORE_FILE_NAME}")
            if not self.rules.may_take_back:
                return
        else:
            yield entry
        if entry.is_folder:
            yield from self._folder(layer_path, layer_path)

    def _folder(self, top: str, layer_path: str) -> Iterator[SourceFile]:
        """What is below `top`, depth first, each folder in the order of its names' bytes."""
        elsewhere = {
            path
            for path in self.layer_paths
            if path not in {".", layer_path} and not _is_within(layer_path, path)
        }
        pending = [self._listing(top)]
        while pending:
            for entry in pending[-1]:
                name = entry.path
                if name in elsewhere or (self.skip_litter and entry.name.lower() in _LITTER):
                    continue
                ignored = self.rules.ignores(name)
                if ignored and not (self.rules.may_take_back and entry.is_dir(follow_symlinks=False)):
                    continue
                file = self._entry(name, entry.stat(follow_symlinks=False))
                if file is None:
                    continue
                if not ignored:
                    yield file
                if file.is_folder:
                    pending.append(self._listing(name))
                    break
            else:
                pending.pop()

    def _listing(self, folder: str) -> Iterator[_Entry]:
        with os.scandir(self.root / folder) as found:
            entries = [_Entry(f"{folder}/{entry.name}" if folder else entry.name, entry) for entry in found]
        for entry in entries:
            if not entry.name.isascii() and not _is_utf8(entry.name):
                raise SourceInvalid(
                    f"the name {os.fsencode(entry.path)!r} is not UTF-8, and a layer cannot hold it"
                )
        return iter(sorted(entries, key=_Entry.order))

    def _entry(self, name: str, status: os.stat_result) -> SourceFile | None:
        is_folder = stat.S_ISDIR(status.st_mode)
        if not is_folder and not stat.S_ISREG(status.st_mode):
            kind = "symlink" if stat.S_ISLNK(status.st_mode) else "special file"
            self.warn(f"Skipping {kind} {visible(name)} ({kind}s are not supported)")
            return None
        size = 0 if is_folder else status.st_size
        return SourceFile(
            name, is_folder, stat.S_IMODE(status.st_mode), size, status.st_mtime_ns, identity_of(status)
        )


@dataclass(frozen=True, slots=True)
class _Entry:
    path: str
    found: os.DirEntry[str]

    @property
    def name(self) -> str:
        return self.found.name

    def order(self) -> bytes:
        return self.found.name.encode()

    def is_dir(self, *, follow_symlinks: bool) -> bool:
        return self.found.is_dir(follow_symlinks=follow_symlinks)

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        return self.found.stat(follow_symlinks=follow_symlinks)


def ignore_rules(root: Path) -> IgnoreRules:
    """Of the context folder's `.kitignore`, with the names that are never packed.

    Raises:
        IgnoreInvalid: a pattern is not one.
        SourceInvalid: the file cannot be read.
    """
    try:
        lines = (root / IGNORE_FILE_NAME).read_text("utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    except (OSError, UnicodeDecodeError) as error:
        raise SourceInvalid(f"cannot read {root / IGNORE_FILE_NAME}: {error}") from error
    return IgnoreRules([*lines, *FILE_NAMES, IGNORE_FILE_NAME])


def _parents(path: str) -> list[str]:
    components = path.split("/")
    return ["/".join(components[:count]) for count in range(1, len(components))]


def _is_within(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
