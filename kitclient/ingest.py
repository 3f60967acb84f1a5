"""A blob on its way into an image layout: a partial file, its running hash, and the lock that makes it one writer's.

    ingest/sha256-<hex>          a blob whose digest is known: whoever wants it next goes on where this one stopped
    ingest/upload-<key>-<random> a blob whose digest its writer will know at the end; <key> stands for the repository
    ingest/<either>.lock         held while somebody writes; gone with its writer, however that ends

Plain blocking calls. The bytes become a blob only when they hash to the digest; otherwise the partial file goes.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from kitclient.layout_folder import ImageLayout, sync_folder
from kitspec.digest import Digest
from kitspec.errors import BlobUploadUnknown, DigestInvalid, UploadOutOfOrder

_READ_SIZE = 1024 * 1024
# Larger writes make for larger folios, which cost most in a virtual machine: docs/adr/0012-socket-bodies.md.
WRITE_SIZE = 256 * 1024
_WRITEBACK_SIZE = 32 * 1024 * 1024
# For a chunk each at a time, however many blobs are on their way.
_hashers = ThreadPoolExecutor(max(2, os.cpu_count() or 1), thread_name_prefix="hash")


def partial_of(layout: ImageLayout, digest: Digest) -> Partial:
    """The one partial file of a blob whose digest is known."""
    return Partial(layout, f"{digest.algorithm}-{digest.encoded}")


def new_partial(layout: ImageLayout, repository: str) -> Partial:
    """A new partial file for a blob of `repository` (`host/name`) whose digest will be known at the end."""
    partial = Partial(layout, f"{_upload_prefix(repository)}{secrets.token_hex(16)}")
    partial.create()
    return partial


def resumed_partial(layout: ImageLayout, repository: str, identity: str) -> Partial:
    """The partial file that `new_partial` made.

    Raises:
        BlobUploadUnknown: it ended or never was, or it belongs to another repository.
    """
    prefix, random = _upload_prefix(repository), identity[-32:]
    known = identity == prefix + random and random.isalnum() and (layout.ingest / identity).exists()
    if not known:
        raise BlobUploadUnknown(f"no upload {identity[:100]!a} in {repository}; it ended or never was")
    return Partial(layout, identity)


def _upload_prefix(repository: str) -> str:
    return f"upload-{hashlib.sha256(repository.encode()).hexdigest()[:16]}-"


class Partial:
    """One partial file: `claim`, write, then `commit`, `discard` or `release`; each from any thread."""

    def __init__(self, layout: ImageLayout, identity: str) -> None:
        self.identity = identity
        self.offset = 0
        self._layout = layout
        self._path = layout.ingest / identity
        # Not bound to a thread: the calls come from whichever thread of a pool is free.
        self._lock = FileLock(layout.ingest / f"{identity}.lock", timeout=0, thread_local=False)
        self._file = -1
        self._kicked = 0
        self._hasher = hashlib.sha256()
        self._is_hash_ahead = False
        # A cancelled task releases while its last write may still run in a thread.
        self._one_at_a_time = threading.RLock()

    def create(self) -> None:
        os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))

    def claim(self, *, create: bool) -> None:
        """Become the writer; what is there already is hashed, and `offset` says how much that is.

        Args:
            create: whether to begin the file when there is none.

        Raises:
            UploadOutOfOrder: somebody else is writing.
            BlobUploadUnknown: no such file, and it was not to be created.
        """
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UploadOutOfOrder(f"somebody else is writing {self.identity}", offset=self.offset) from error
        try:
            self._file = os.open(self._path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
            self._catch_up()
        except BaseException as error:
            self.release()
            if isinstance(error, FileNotFoundError):
                raise BlobUploadUnknown(f"no upload {self.identity}; it ended or never was") from error
            raise

    def write(self, chunks: Iterable[bytes]) -> None:
        """Add bytes at the end."""
        hashing: Future[None] | None = None
        with self._one_at_a_time:
            try:
                for chunk in chunks:
                    if hashing is not None:
                        hashing.result()
                    # Beside the write, and beside what makes the next chunk: all let the interpreter's lock go.
                    hashing = _hashers.submit(self._hasher.update, chunk)
                    self._write(memoryview(chunk))
            finally:
                if hashing is not None:
                    hashing.result()

    def _write(self, view: memoryview) -> None:
        # Until all of it is written the hash may be ahead of the file.
        self._is_hash_ahead = True
        while view:
            written = os.write(self._file, view[:WRITE_SIZE])
            self.offset += written
            view = view[written:]
        self._is_hash_ahead = False
        if self.offset - self._kicked >= _WRITEBACK_SIZE and hasattr(os, "posix_fadvise"):
            # Begins to write what is dirty and drops nothing of it: the fsync at the end has less to wait for.
            os.posix_fadvise(self._file, self._kicked, self.offset - self._kicked, os.POSIX_FADV_DONTNEED)
            self._kicked = self.offset

    def digest(self) -> Digest:
        """The sha256 digest of what is there."""
        return Digest(f"sha256:{self._hasher.hexdigest()}")

    def commit(self, digest: Digest) -> int:
        """Make the bytes the blob `digest`, durably, and end; the blob's size.

        Raises:
            DigestInvalid: they hash to something else; the file is gone, so that it poisons no later try.
        """
        actual = self.digest() if digest.algorithm == "sha256" else self._digest_again(digest.algorithm)
        if actual != digest:
            self.discard()
            raise DigestInvalid(
                f"the content is {actual}, not {digest}; the {self.offset} bytes were dropped"
            )
        target = self._layout.blob_path(digest)
        os.fchmod(self._file, os.fstat(self._file).st_mode & 0o444)
        os.fsync(self._file)
        self._path.replace(target)
        sync_folder(target.parent)
        size = self.offset
        self.release()
        return size

    def restart(self) -> None:
        """Begin again with no bytes."""
        with self._one_at_a_time:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            self._hasher = hashlib.sha256()
            self.offset = self._kicked = 0

    def discard(self) -> None:
        """Drop the bytes and end. May be called again."""
        self._path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let go and keep the bytes. May be called again."""
        with self._one_at_a_time:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            if self._lock.is_locked:
                # Unlinked while held: who locked the same inode in between finds it nameless and tries again.
                with suppress(OSError):
                    Path(self._lock.lock_file).unlink()
                self._lock.release()

    def _catch_up(self) -> None:
        """Hash what was written by another life of this upload."""
        size = os.fstat(self._file).st_size
        if size != self.offset or self._is_hash_ahead:
            self._hasher = hashlib.sha256()
            self._hash_into(self._hasher)
            self._is_hash_ahead = False
        self.offset = self._kicked = size
        os.lseek(self._file, size, os.SEEK_SET)

    def _digest_again(self, algorithm: str) -> Digest:
        hasher = hashlib.new(algorithm, usedforsecurity=False)
        self._hash_into(hasher)
        return Digest(f"{algorithm}:{hasher.hexdigest()}")

    def _hash_into(self, hasher: hashlib._Hash) -> None:
        position = 0
        while piece := os.pread(self._file, _READ_SIZE, position):
            hasher.update(piece)
            position += len(piece)
