"""From the bytes of a layer to the files in it: of the whole layer, or of a span.

`read_layer` sees the whole blob and checks it against its descriptor, and so against the manifest. `read_run` sees a
span, and can only check each file against the digest that a list of the kit's files says. Either way nothing is proved
before the function has returned: a sink keeps back, or can take back, what it was given.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from concurrent.futures import Executor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Protocol, Self

from kitclient.compression import LayerBroken, UnpackLimit, compression_of_bytes, inflater
from kitclient.kit_files import KitFile
from kitclient.pipeline import drain
from kitclient.progress import BlobProgress
from kitclient.terminal import visible
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import DigestInvalid, SizeInvalid
from kitspec.http_fields import ByteSpan
from kitspec.interface import BlobBody
from kitspec.layer_tar import LayerTarReader, Member
from kitspec.media_types import LayerType

OpenSpan = Callable[[], AbstractAsyncContextManager[BlobBody]]

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


class FileSink(Protocol):
    """What becomes of files. Its calls come one after the other, from whichever thread; they may block."""

    def folder(self, path: str, mode: int) -> None:
        """A folder, perhaps not for the first time."""

    def begin(self, path: str, mode: int, offset: int | None) -> None:
        """A file; its content follows.

        Args:
            offset: of the content in the blob; None where the blob is compressed.
        """

    def write(self, piece: bytes | memoryview) -> None:
        """More of the content of the file that began last; good until the next call."""

    def end(self) -> None:
        """The file is whole."""

    def close(self) -> None:
        """No more calls come, however the reading ended."""


@dataclass(frozen=True, slots=True)
class FileRun:
    """Files whose contents lie one behind the other in one stream of bytes, in that order, perhaps with gaps.

    Attributes:
        files: `offset` counts in that stream. A folder, and a file of no bytes, need none of it.
    """

    files: tuple[KitFile, ...]

    @classmethod
    def alone(cls, file: KitFile) -> Self:
        """A file that is a stream of its own, wherever it is in its layer."""
        return cls((replace(file, offset=0),))

    @property
    def span(self) -> ByteSpan:
        """The bytes of the stream that hold them all."""
        ends = [(file.offset or 0, (file.offset or 0) + file.size) for file in self.files if file.size]
        return ByteSpan(
            min((start for start, _ in ends), default=0), max((stop for _, stop in ends), default=0)
        )


async def read_layer(
    plan: LayerPlan,
    chunks: AsyncIterable[bytes],
    sink: FileSink,
    *,
    limit: UnpackLimit,
    threads: Executor,
    progress: BlobProgress,
) -> None:
    """Give every file of a layer to `sink`.

    Args:
        chunks: the blob's bytes, unverified.
        limit: asked how far a compressed layer may grow; what is written is the sink's to count.
        threads: at least two at a time: one hashes while the other reads.

    Raises:
        DigestInvalid, SizeInvalid: the bytes are not the blob.
        LayerBroken, LayerTarInvalid: they are, and no layer may be like that.
    """
    reading = _LayerReading(plan, sink, limit)
    try:
        await drain(chunks, [reading.hash, reading.read], threads, progress)
        await asyncio.get_running_loop().run_in_executor(threads, reading.finish)
    finally:
        sink.close()


async def read_run(
    run: FileRun, open_span: OpenSpan, sink: FileSink, *, threads: Executor, progress: BlobProgress
) -> None:
    """Give the files of a run to `sink`.

    Args:
        open_span: gives the bytes of `run.span`, unverified; asked only if there are any.
        threads: at least two at a time: one hashes while the other writes.

    Raises:
        DigestInvalid, SizeInvalid: a file's bytes are not those that its digest is of.
    """
    cutters = [_Cutter(run, _Verifier(run)), _Cutter(run, sink)]
    workers = [cutter.cut for cutter in cutters]
    try:
        if not run.span.size:
            await drain(_nothing(), workers, threads, progress)
            return
        async with open_span() as body:
            if body.size != run.span.size:
                raise SizeInvalid(f"{body.size} bytes are there of {run.span.size} that are wanted")
            await drain(body, workers, threads, progress)
        for cutter in cutters:
            cutter.check_end()
    finally:
        sink.close()


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield


class _LayerReading:
    def __init__(self, plan: LayerPlan, sink: FileSink, limit: UnpackLimit) -> None:
        self._plan = plan
        self._limit = limit
        self._hasher = hashlib.new(plan.descriptor.digest.algorithm, usedforsecurity=False)
        self._inflater = inflater(plan.layer_type.compression)
        is_plain = plan.layer_type.compression is None
        wanted = plan.diff_id
        self._diff_hasher: hashlib._Hash | None = None
        if wanted is not None and not (is_plain and wanted.algorithm == plan.descriptor.digest.algorithm):
            self._diff_hasher = hashlib.new(wanted.algorithm, usedforsecurity=False)
        kind: type[_RawContent | _TarContent] = (
            _RawContent if plan.layer_type.packaging == "raw" else _TarContent
        )
        self._content = kind(plan, sink, is_plain=is_plain)
        self._taken = 0
        self._given = 0
        self._start = b""
        self._is_checked = False

    def hash(self, batch: Iterable[bytes]) -> None:
        for chunk in batch:
            self._hasher.update(chunk)

    def read(self, batch: Iterable[bytes]) -> None:
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
        self._content.end()
        wanted = self._plan.diff_id
        if wanted is None:
            return
        if self._diff_hasher is not None:
            actual = f"{wanted.algorithm}:{self._diff_hasher.hexdigest()}"
        if actual != wanted:
            raise LayerBroken(f"{descriptor.digest} inflates to {actual}; the kit says {wanted}")

    def _inflate(self, chunk: bytes) -> None:
        for piece in self._inflater.pieces(chunk):
            self._given += len(piece)
            self._limit.add_bytes(0, self._given, self._taken)
            if self._diff_hasher is not None:
                self._diff_hasher.update(piece)
            self._content.take(piece)

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


class _TarContent:
    def __init__(self, plan: LayerPlan, sink: FileSink, *, is_plain: bool) -> None:
        self._sink = sink
        self._is_plain = is_plain
        self._reader = LayerTarReader()
        self._below = f"{plan.path}/" if plan.path else ""
        self._left = 0

    def take(self, piece: bytes) -> None:
        for event in self._reader.feed(piece):
            if isinstance(event, Member):
                self._begin(event)
            else:
                self._sink.write(event)
                self._left -= len(event)
                if not self._left:
                    self._sink.end()

    def end(self) -> None:
        self._reader.finish()

    def _begin(self, member: Member) -> None:
        path = self._below + member.path
        if member.is_directory:
            self._sink.folder(path, member.mode)
            return
        self._sink.begin(path, member.mode, member.offset if self._is_plain else None)
        self._left = member.size
        if not member.size:
            self._sink.end()


class _RawContent:
    def __init__(self, plan: LayerPlan, sink: FileSink, *, is_plain: bool) -> None:
        self._sink = sink
        self._path = plan.path
        self._mode = plan.mode
        self._offset = 0 if is_plain else None
        self._has_begun = False

    def take(self, piece: bytes) -> None:
        if not self._has_begun:
            self._sink.begin(self._path, self._mode, self._offset)
            self._has_begun = True
        self._sink.write(piece)

    def end(self) -> None:
        self.take(b"")
        self._sink.end()


class _Cutter:
    """Cuts the bytes of a run's span into its files."""

    def __init__(self, run: FileRun, sink: FileSink) -> None:
        self._sink = sink
        self._files = iter(run.files)
        self._span = run.span
        self._position = run.span.start
        self._file: KitFile | None = None
        self._left = 0
        self._has_begun = False

    def cut(self, batch: Iterable[bytes]) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._next_file()
        for chunk in batch:
            view = memoryview(chunk)
            while view and self._file is not None:
                gap = min(len(view), max(0, (self._file.offset or 0) - self._position))
                piece = view[gap : gap + self._left]
                view = view[gap + len(piece) :]
                self._position += gap + len(piece)
                self._take(piece)

    def check_end(self) -> None:
        if self._file is not None:
            raise SizeInvalid(
                f"{self._position - self._span.start} of {self._span.size} bytes came; "
                f"'{visible(self._file.path)}' is cut off"
            )

    def _take(self, piece: memoryview) -> None:
        if piece:
            self._sink.write(piece)
        self._left -= len(piece)
        if not self._left:
            self._sink.end()
            self._next_file()

    def _next_file(self) -> None:
        """Begin the next file that has bytes; what has none is over at once."""
        for file in self._files:
            if file.is_folder:
                self._sink.folder(file.path, file.mode)
                continue
            self._sink.begin(file.path, file.mode, file.offset)
            if file.size:
                self._file, self._left = file, file.size
                return
            self._sink.end()
        self._file = None


class _Verifier:
    """Hashes the files of a run, and compares."""

    def __init__(self, run: FileRun) -> None:
        self._files = (file for file in run.files if not file.is_folder)
        self._path = ""
        self._wanted = ""
        self._hasher = hashlib.sha256()

    def folder(self, path: str, mode: int) -> None:
        pass

    def begin(self, path: str, mode: int, offset: int | None) -> None:
        _ = path, mode, offset
        file = next(self._files)
        assert file.digest is not None
        self._path, self._wanted = file.path, file.digest
        self._hasher = hashlib.new(file.digest.algorithm, usedforsecurity=False)

    def write(self, piece: bytes | memoryview) -> None:
        self._hasher.update(piece)

    def end(self) -> None:
        actual = f"{self._wanted.partition(':')[0]}:{self._hasher.hexdigest()}"
        if actual != self._wanted:
            raise DigestInvalid(
                f"the content of '{visible(self._path)}' is {actual}, not {self._wanted} as the list of files says"
            )

    def close(self) -> None:
        pass


_: type[FileSink] = _Verifier
