"""A layer's blob on its way to files: hashed, inflated and written, each byte once, while the next ones arrive.

Only regular files and folders come out, with mode 0644 or 0755 masked by the umask; no owner, no time, no attribute of
the archive's. What comes out is in a `LayerTree`; nobody sees it before the blob's digest was found right.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from kitclient.compression import LayerBroken, UnpackLimit, compression_of_bytes, inflater
from kitclient.ingest import WRITE_SIZE
from kitclient.pipeline import drain
from kitclient.progress import BlobProgress
from kitclient.staging import LayerTree
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import DigestInvalid, SizeInvalid
from kitspec.layer_tar import LayerTarReader, Member
from kitspec.media_types import LayerType

# Enough to tell how a stream is compressed.
_START_SIZE = 4


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer and what is to become of it.

    Attributes:
        path: of the file that a raw layer is; for a tar, the folder that its names are relative to, "" for the target.
        mode: of the file that a raw layer is.
        diff_id: digest of the inflated layer, where the kit says it.
    """

    descriptor: Descriptor
    layer_type: LayerType
    path: str = ""
    mode: int = 0o644
    diff_id: Digest | None = None

    @property
    def key(self) -> str:
        """Differs when anything differs that decides what comes out."""
        text = f"{self.descriptor.digest} {self.layer_type} {self.path} {self.mode:o} {self.diff_id}"
        return hashlib.sha256(text.encode()).hexdigest()[:40]


class _Sink(Protocol):
    def __init__(self, tree: LayerTree, plan: LayerPlan, limit: UnpackLimit) -> None: ...
    def write(self, piece: bytes) -> None: ...
    def end(self) -> None: ...
    def close(self) -> None: ...


async def extract(
    plan: LayerPlan,
    chunks: AsyncIterator[bytes],
    tree: LayerTree,
    *,
    limit: UnpackLimit,
    threads: Executor,
    progress: BlobProgress,
) -> None:
    """Write a layer into `tree`, which its caller keeps or drops.

    Args:
        chunks: the blob's bytes, unverified.
        threads: at least two at a time: one hashes while the other writes.

    Raises:
        DigestInvalid, SizeInvalid: the bytes are not the blob.
        LayerBroken, LayerTarInvalid, PathRefused: they are, and no layer may be like that.
    """
    extraction = _Extraction(plan, tree, limit)
    try:
        await drain(chunks, [extraction.hash, extraction.write], threads, progress)
        await asyncio.get_running_loop().run_in_executor(threads, extraction.finish)
    finally:
        extraction.close()


class _Extraction:
    def __init__(self, plan: LayerPlan, tree: LayerTree, limit: UnpackLimit) -> None:
        self._plan = plan
        self._limit = limit
        self._hasher = hashlib.new(plan.descriptor.digest.algorithm, usedforsecurity=False)
        self._inflater = inflater(plan.layer_type.compression)
        self._is_plain = plan.layer_type.compression is None
        wanted = plan.diff_id
        self._diff_hasher: hashlib._Hash | None = None
        if wanted is not None and not (
            self._is_plain and wanted.algorithm == plan.descriptor.digest.algorithm
        ):
            self._diff_hasher = hashlib.new(wanted.algorithm, usedforsecurity=False)
        kind: type[_Sink] = _RawFile if plan.layer_type.packaging == "raw" else _TarFiles
        self._sink = kind(tree, plan, limit)
        self._taken = 0
        self._given = 0
        self._start = b""
        self._is_checked = False

    def hash(self, batch: Iterable[bytes]) -> None:
        for chunk in batch:
            self._hasher.update(chunk)

    def write(self, batch: Iterable[bytes]) -> None:
        for chunk in batch:
            self._taken += len(chunk)
            if self._taken > self._plan.descriptor.size:
                raise SizeInvalid(f"more than the {self._plan.descriptor.size} bytes of the layer came")
            if self._is_checked:
                self._inflate(chunk)
                continue
            self._start += chunk
            if len(self._start) >= _START_SIZE:
                self._check_start()

    def _inflate(self, chunk: bytes) -> None:
        for piece in self._inflater.pieces(chunk):
            self._given += len(piece)
            self._limit.add_bytes(len(piece), self._given, self._taken)
            if self._diff_hasher is not None:
                self._diff_hasher.update(piece)
            self._sink.write(piece)

    def finish(self) -> None:
        if not self._is_checked:
            self._check_start()
        descriptor = self._plan.descriptor
        if self._taken != descriptor.size:
            raise SizeInvalid(f"{self._taken} bytes came of {descriptor.digest}, which has {descriptor.size}")
        actual = f"{descriptor.digest.algorithm}:{self._hasher.hexdigest()}"
        if actual != descriptor.digest:
            raise DigestInvalid(f"the content is {actual}, not {descriptor.digest}")
        self._inflater.end()
        self._sink.end()
        wanted = self._plan.diff_id
        if wanted is None:
            return
        if self._diff_hasher is not None:
            actual = f"{wanted.algorithm}:{self._diff_hasher.hexdigest()}"
        if actual != wanted:
            raise LayerBroken(f"{descriptor.digest} inflates to {actual}; the kit says {wanted}")

    def close(self) -> None:
        self._sink.close()

    def _check_start(self) -> None:
        """The media type and the first bytes must agree, or what follows would be a riddle."""
        self._is_checked = True
        wanted = self._plan.layer_type.compression
        # A raw file may be anything, a .gz too.
        if wanted is not None or self._plan.layer_type.packaging == "tar":
            found = compression_of_bytes(self._start)
            if found != wanted:
                raise LayerBroken(
                    f"the media type {self._plan.descriptor.media_type} says {wanted or 'plain tar'}; "
                    f"the bytes are {found or 'not compressed, or in another way'}"
                )
        self._inflate(self._start)


class _TarFiles:
    def __init__(self, tree: LayerTree, plan: LayerPlan, limit: UnpackLimit) -> None:
        self._tree = tree
        self._limit = limit
        self._reader = LayerTarReader()
        self._below = f"{plan.path}/" if plan.path else ""
        self._path = ""
        self._file = -1
        self._left = 0

    def write(self, piece: bytes) -> None:
        for event in self._reader.feed(piece):
            if isinstance(event, Member):
                self._begin(event)
            else:
                _write_all(self._file, event)
                self._left -= len(event)
            if not self._left:
                self.close()

    def end(self) -> None:
        self._reader.finish()

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            self._tree.close_file(self._path, file)

    def _begin(self, member: Member) -> None:
        self._limit.add_entry()
        self._path = self._below + member.path
        if member.is_directory:
            self._tree.make_folder(self._path)
        else:
            self._file = self._tree.create_file(self._path, safe_mode(member.mode))
            self._left = member.size


class _RawFile:
    def __init__(self, tree: LayerTree, plan: LayerPlan, limit: UnpackLimit) -> None:
        self._tree = tree
        self._path = plan.path
        self._mode = plan.mode
        self._limit = limit
        self._file = -1

    def write(self, piece: bytes) -> None:
        if self._file < 0:
            self._limit.add_entry()
            self._file = self._tree.create_file(self._path, safe_mode(self._mode))
        _write_all(self._file, memoryview(piece))

    def end(self) -> None:
        self.write(b"")
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            self._tree.close_file(self._path, file)


def safe_mode(mode: int) -> int:
    """0755 for what its owner may run, else 0644; the umask takes its share when the file is made."""
    return 0o755 if mode & 0o100 else 0o644


def _write_all(file: int, view: memoryview) -> None:
    while view:
        view = view[os.write(file, view[:WRITE_SIZE]) :]
