"""The index of every layer: remembered, read from the store, or made from the layer. A cache, to be deleted at any time.

What is in a layer is learned in the pass that stores it where that costs nothing (registry/tar_indexer.py), else from the
stored layer when the first view asks: a plain tar is walked from header to header, a compressed layer inflated once. What each
file hashes to is found out after a kit was pushed, by threads that give way to everybody; who asks before pays for the files
that are asked for. However many ask at once, it is done once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Self, TypeVar

from kitspec.digest import Digest
from kitspec.errors import ContentInvalid, ManifestInvalid
from kitspec.media_types import LayerType
from registry import layout
from registry.background import kept_up
from registry.inflate import InflateLimits, Inflation
from registry.logs import log_event
from registry.member_table import MemberTable, Refusal, TableBuilder, TableDamaged, TableMember
from registry.stored_reader import ReadAt, reader_of
from registry.tar_indexer import TarIndexer, walk_tar
from storage_backends.interface import (
    ObjectMissing,
    ObjectTooLarge,
    StorageBackend,
    StorageError,
    StorageUnavailable,
)
from storage_backends.threads import Threads

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Of one worker, all tables together, unless the one that was asked for last is larger; some 100 bytes for each member.
_MEMORY_SIZE_MAX: Final = 32 * 1024 * 1024
# A million members with long paths; a larger record is none of ours.
_RECORD_SIZE_MAX: Final = 512 * 1024 * 1024
# Making one keeps a core busy.
_BUILDS_AT_ONCE: Final = 2
_READ_SIZE: Final = 1024 * 1024
_QUEUE_MAX: Final = 1000
# Made from memory in less time than two fsyncs take: not worth a record.
KEPT_SIZE_MIN: Final = 1024 * 1024

_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    # A skippable frame (RFC 8878, 3.1.2), with which pzstd begins.
    **{bytes((first, 0x2A, 0x4D, 0x18)): "zstd" for first in range(0x50, 0x60)},
}


class MemberIndexes:
    """The tables of one worker. An async context manager: it has threads and a task."""

    def __init__(self, backend: StorageBackend) -> None:
        self._backend = backend
        self._threads = Threads(_BUILDS_AT_ONCE, "index")
        self._patient_threads = Threads(1, "index-patient")
        self._remembered: OrderedDict[str, MemberTable | Refusal] = OrderedDict()
        self._weight = 0
        self._making: dict[str, asyncio.Task[MemberTable | Refusal]] = {}
        self._hashing: dict[str, asyncio.Task[MemberTable]] = {}
        self._queue: asyncio.Queue[tuple[Digest, LayerType]] = asyncio.Queue(_QUEUE_MAX)
        self._is_closing = False
        self._pushes = 0
        self._calm = threading.Event()  # while nobody pushes
        self._calm.set()

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(kept_up(self._make_queued, "index layers"), name="index layers")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_closing = True
        self._calm.set()
        self._worker.cancel()
        await asyncio.gather(
            self._worker, *self._making.values(), *self._hashing.values(), return_exceptions=True
        )
        self._threads.close()
        self._patient_threads.close()

    async def table(self, layer: Digest, layer_type: LayerType) -> MemberTable:
        """The members of a stored layer.

        Raises:
            ManifestInvalid: nobody can look into it; the message says why.
            ObjectMissing: it is not stored.
        """
        if layer_type.packaging == "raw" and layer_type.compression is None and layer.algorithm == "sha256":
            info = await self._backend.stat(layout.blob_key(layer))
            return _raw_builder(info.size, layer).build(inflated_size=info.size)
        key = layout.members_key(layer, layer_type)
        found = self._remembered.get(key)
        if found is not None:
            self._remembered.move_to_end(key)
        else:
            found = await _shared(self._making, key, lambda: self._read_or_make(key, layer, layer_type))
        if isinstance(found, Refusal):
            raise ManifestInvalid(f"the layer {layer} cannot be looked into: {found.message}")
        return found

    async def table_made_again(self, layer: Digest, layer_type: LayerType) -> MemberTable:
        """`table`, when the one that is kept has proved to be damaged."""
        key = layout.members_key(layer, layer_type)
        forgotten = self._remembered.pop(key, None)
        self._weight -= forgotten.weight if forgotten is not None else 0
        await self._backend.delete(key)
        return await self.table(layer, layer_type)

    async def hashed_table(self, layer: Digest, layer_type: LayerType) -> MemberTable:
        """The members of a stored layer, every file with its digest. Raises as `table`."""
        table = await self.table(layer, layer_type)
        if table.is_hashed:
            return table
        key = layout.members_key(layer, layer_type)
        return await _shared(self._hashing, key, lambda: self._hash_all(key, layer, table))

    async def hashed_member(self, layer: Digest, layer_type: LayerType, member: TableMember) -> TableMember:
        """A file of a layer with its digest: only that file is read. Raises as `table`."""
        if member.digest is not None or member.is_folder:
            return member
        table = await self.table(layer, layer_type)
        known = table.find(member.path)
        assert known is not None
        if known.digest is None:
            async with reader_of(self._backend, layout.blob_key(layer)) as (read_at, _):
                sha256 = await self._threads.run(self._hash, read_at, member)
            table.set_digest(member.path, sha256)
        found = table.find(member.path)
        assert found is not None
        return found

    async def _hash_all(
        self, key: str, layer: Digest, table: MemberTable, *, is_patient: bool = False
    ) -> MemberTable:
        threads = self._patient_threads if is_patient else self._threads
        known = await self._read(key)
        if isinstance(known, MemberTable) and known.is_hashed:
            self._remember(key, known)  # by another worker
            return known
        async with reader_of(self._backend, layout.blob_key(layer)) as (read_at, size):
            for members in _runs(await threads.run(table.unhashed)):
                digests = await threads.run(self._hash_run, read_at, members, is_patient=is_patient)
                for member, sha256 in zip(members, digests, strict=True):
                    table.set_digest(member.path, sha256)
        await self._write(key, table, size)
        return table

    def _hash_run(self, read_at: ReadAt, members: Sequence[TableMember], *, is_patient: bool) -> list[bytes]:
        """In a thread. Small members that stand together are read together."""
        if is_patient:
            self._calm.wait()
        if len(members) == 1:
            return [self._hash(read_at, members[0], is_patient=is_patient)]
        start, stop = members[0].offset, members[-1].offset + members[-1].size
        content = memoryview(b"".join(self._pieces(read_at, start, stop)))
        return [
            hashlib.sha256(content[member.offset - start :][: member.size]).digest() for member in members
        ]

    def _hash(self, read_at: ReadAt, member: TableMember, *, is_patient: bool = False) -> bytes:
        """In a thread."""
        hasher = hashlib.sha256()
        for piece in self._pieces(read_at, member.offset, member.offset + member.size):
            if is_patient:
                self._calm.wait()
            hasher.update(piece)
        return hasher.digest()

    def keep(self, layer: Digest, layer_type: LayerType, table: MemberTable) -> None:
        """Take a table that the storing pass has made; written when all of its files are hashed."""
        self._remember(layout.members_key(layer, layer_type), table)

    @contextmanager
    def giving_way(self) -> Iterator[None]:
        """Something is pushed meanwhile: nothing is hashed that nobody has asked for.

        The lowest priority is not enough: a thread that has to wait for its turn may hold the interpreter's lock.
        """
        self._pushes += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._pushes -= 1
            if not self._pushes:
                self._calm.set()

    def make_soon(self, layers: list[tuple[Digest, LayerType]]) -> None:
        """Complete the tables of layers that were just pushed; what is too much is left until somebody asks."""
        for layer in layers:
            with suppress(asyncio.QueueFull):
                self._queue.put_nowait(layer)

    async def _make_queued(self) -> None:
        await self._patient_threads.run(_give_way)
        while True:
            layer, layer_type = await self._queue.get()
            with suppress(ManifestInvalid, StorageError):
                table = await self.table(layer, layer_type)
                if not table.is_hashed:
                    key = layout.members_key(layer, layer_type)
                    await self._hash_all(key, layer, table, is_patient=True)

    async def _read_or_make(self, key: str, layer: Digest, layer_type: LayerType) -> MemberTable | Refusal:
        found = await self._read(key)
        if found is not None:
            self._remember(key, found)
            return found
        async with reader_of(self._backend, layout.blob_key(layer)) as (read_at, size):
            made = await self._threads.run(self._make, read_at, size, layer_type)
        self._remember(key, made)
        await self._write(key, made, size)
        return made

    async def _read(self, key: str) -> MemberTable | Refusal | None:
        with suppress(ObjectMissing, ObjectTooLarge, TableDamaged):
            content, _ = await self._backend.read(key, size_max=_RECORD_SIZE_MAX)
            return MemberTable.from_bytes(content)
        return None

    async def _write(self, key: str, table: MemberTable | Refusal, layer_size: int) -> None:
        if layer_size < KEPT_SIZE_MIN:
            return
        try:
            await self._backend.write(key, table.to_bytes())
        except StorageError as error:
            # It is made again next time.
            log_event(logger, logging.WARNING, "index.not_kept", key=key, reason=str(error))

    def _remember(self, key: str, table: MemberTable | Refusal) -> None:
        known = self._remembered.pop(key, None)
        self._weight += table.weight - (known.weight if known is not None else 0)
        self._remembered[key] = table
        while self._weight > _MEMORY_SIZE_MAX and len(self._remembered) > 1:
            _, forgotten = self._remembered.popitem(last=False)
            self._weight -= forgotten.weight

    def _make(self, read_at: ReadAt, size: int, layer_type: LayerType) -> MemberTable | Refusal:
        """In a thread."""
        try:
            _check_magic(read_at(0, 4), layer_type)
            if layer_type.compression is None and layer_type.packaging == "tar":
                return walk_tar(read_at, size)
            if layer_type.compression is None:
                return self._made_of(self._pieces(read_at, 0, size), layer_type, None)
            inflation = Inflation(layer_type.compression, read_at, size, limits=InflateLimits())
            return self._made_of(inflation.pieces(), layer_type, inflation)
        except ContentInvalid as error:
            return Refusal(str(error))

    def _made_of(
        self, pieces: Iterator[bytes], layer_type: LayerType, inflation: Inflation | None
    ) -> MemberTable:
        indexer = TarIndexer(hash_members=True) if layer_type.packaging == "tar" else None
        hasher = hashlib.sha256() if inflation is not None or indexer is None else None
        size = 0
        for piece in pieces:
            if self._is_closing:
                raise StorageUnavailable("the server is closing")
            size += len(piece)
            if hasher is not None:
                hasher.update(piece)
            if indexer is not None:
                indexer.feed(piece)
        digest = None if hasher is None else Digest(f"sha256:{hasher.hexdigest()}")
        if indexer is None:
            assert digest is not None
            builder = _raw_builder(size, digest)
        else:
            builder = indexer.finish()
        return builder.build(
            inflated_size=size,
            diff_id=digest if inflation is not None else None,
            checkpoints=inflation.checkpoints() if inflation is not None else b"",
        )

    def _pieces(self, read_at: ReadAt, start: int, stop: int) -> Iterator[bytes]:
        while start < stop:
            if self._is_closing:
                raise StorageUnavailable("the server is closing")
            piece = read_at(start, min(_READ_SIZE, stop - start))
            if not piece:
                raise StorageUnavailable("stored content ended before its size")
            start += len(piece)
            yield piece


async def _shared(
    tasks: dict[str, asyncio.Task[T]], key: str, work: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """What the one task for `key` gives, which is begun when there is none."""

    def ended(task: asyncio.Task[T]) -> None:
        tasks.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, also when whoever asked has left

    task = tasks.get(key)
    if task is None:
        task = tasks[key] = asyncio.create_task(work(), name=f"index {key}")
        task.add_done_callback(ended)
    # Whoever asked first may leave: the others, and the next one, still want it.
    return await asyncio.shield(task)


def _give_way() -> None:
    """Let this thread run when nobody else wants to."""
    if sys.platform == "linux":
        # Of the thread, not of the process: Linux counts them alike.
        with suppress(OSError):  # some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)


_LOWEST_PRIORITY = 19


def _runs(members: Sequence[TableMember]) -> Iterator[list[TableMember]]:
    """Members in the order of the layer, put together with those that lie within one read of the first."""
    run: list[TableMember] = []
    for member in members:
        if run and member.offset + member.size - run[0].offset > _READ_SIZE:
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def _raw_builder(size: int, digest: Digest) -> TableBuilder:
    """Of the one file that a raw layer is."""
    builder = TableBuilder()
    builder.add(
        "", is_folder=False, mode=0o644, start=0, offset=0, size=size, sha256=bytes.fromhex(digest.encoded)
    )
    return builder


def _check_magic(start: bytes, layer_type: LayerType) -> None:
    """The media type and the first bytes must agree; a raw file that is not compressed may be anything.

    Raises:
        ContentInvalid: they do not.
    """
    wanted = layer_type.compression
    if wanted is None and layer_type.packaging == "raw":
        return
    found = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    if found != wanted:
        raise ContentInvalid(
            f"its media type says {wanted or 'a plain tar'}, its bytes are "
            f"{found or 'not compressed, or in a way that nobody here knows'}"
        )
