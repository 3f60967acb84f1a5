"""An upload to a bucket: what its holder sees of it. The parts and the state are s3_parts.py's.

    begin ──► state ──append──► parts of a data object, then state ──commit──► parts sealed, completed; pointer at the key
                                                                   └─abort───► state gone, then parts

Nothing is copied or moved. The answer to a commit waits for small writes and one completion, that of the last object; for none
where the last append was told how much would come. A crash leaves garbage at most: parts or data objects that no state and no pointer
names. The state is there before the first of them is and until the pointer is, which is what the sweep (s3_sweep.py) goes by.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from storage_backends.checks import check_key, check_note
from storage_backends.interface import (
    BlockingSource,
    ObjectInfo,
    ObjectMissing,
    Observer,
    PreconditionFailed,
    Span,
    StorageError,
    StorageUnavailable,
    Upload,
    UploadBusy,
    UploadMissing,
)
from storage_backends.local_intake import BATCH_SIZE, QUEUE_SIZE_MAX, Intake, drained, fill
from storage_backends.s3_client import S3Client
from storage_backends.s3_errors import InTheWay, below
from storage_backends.s3_format import POINTER, Segment, pointer_to_bytes
from storage_backends.s3_memory import Blocks
from storage_backends.s3_parts import Appending, Holding, missing
from storage_backends.s3_records import Records
from storage_backends.s3_stream import SegmentStream
from storage_backends.threads import Threads, uncancelled

# Of those who commit, and delete, the same key at the same time.
_PUBLISH_TRIES = 8


@dataclass(frozen=True, slots=True)
class Workshop:
    """What the uploads of one backend share.

    Attributes:
        threads: for small requests.
        appenders: that hash, gather, and wait for a part that is on its way.
        senders: each sends a part.
        sources: that wait for a client's bytes, each for one client.
        readers: for content on its way out.
        content_prefix: of every key that has content.
        blocks: that parts are gathered in.
        busy: ids of the uploads that somebody in this process appends to or ends right now.
    """

    client: S3Client
    records: Records
    threads: Threads
    appenders: Threads
    senders: Threads
    sources: Threads
    readers: Threads
    part_size: int
    part_count_max: int
    segment_size: int | None
    content_prefix: str
    refuse_below_object: Callable[[str], None]
    busy: set[str] = field(default_factory=set)
    blocks: Blocks = field(default_factory=Blocks)

    def queue_size_max(self) -> int:
        """Bytes that may wait for the part that is being gathered."""
        return BATCH_SIZE if self.blocks.are_used_up else QUEUE_SIZE_MAX

    @contextlib.contextmanager
    def occupied(self, upload_id: str) -> Iterator[None]:
        """Raises: UploadBusy."""
        if upload_id in self.busy:
            raise UploadBusy(f"somebody is appending to the upload {upload_id}")
        self.busy.add(upload_id)
        try:
            yield
        finally:
            self.busy.discard(upload_id)


class S3Upload:
    """Other processes are told apart by the version of the state alone: to each of two that append at once it may seem that
    it is the only one. Whoever ends second is told UploadOvertaken, and none of its bytes count.
    """

    def __init__(self, workshop: Workshop, upload_id: str, holding: Holding) -> None:
        self._workshop = workshop
        self._id = upload_id
        self._holding = holding
        # From an append that said `last` until what follows: its bytes are not saved yet.
        self._pending: Appending | None = None
        self._see()

    def _see(self) -> None:
        self._offset = self._holding.saved.offset
        self._note = self._holding.saved.note

    @property
    def id(self) -> str:
        return self._id

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def note(self) -> bytes:
        return self._note

    async def is_idle(self) -> bool:
        return self._id not in self._workshop.busy

    async def append(
        self,
        chunks: AsyncIterable[bytes] | BlockingSource,
        *,
        observe: Observer,
        note: Callable[[], bytes],
        size: int | None = None,
        last: bool = False,
    ) -> int:
        with self._workshop.occupied(self._id):
            await self._workshop.threads.run(self._prepare)
            if self._holding.saved.is_closing:
                return await self._append_nothing(chunks)
            await self._append(chunks, observe, note, size=size, is_last=last)
        return self._offset

    def _prepare(self) -> None:
        self._save_pending()
        self._holding.check()

    def _save_pending(self) -> None:
        if self._pending is not None:
            self._pending.save(self._note)
            self._pending = None

    async def _append_nothing(self, chunks: AsyncIterable[bytes] | BlockingSource) -> int:
        """A commit that failed half-way can be repeated, and nothing else."""

        def more() -> BaseException | None:
            assert not isinstance(chunks, AsyncIterable)
            size, failure = fill(memoryview(bytearray(1)), chunks)
            return missing(self._id) if size else failure

        if not isinstance(chunks, AsyncIterable):
            await drained(self._workshop.sources, more, chunks)
            return self._offset
        async for chunk in chunks:
            if chunk:
                raise missing(self._id)
        return self._offset

    async def _append(
        self,
        chunks: AsyncIterable[bytes] | BlockingSource,
        observe: Observer,
        note: Callable[[], bytes],
        *,
        size: int | None,
        is_last: bool,
    ) -> None:
        appending = self._appending(observe, note, size=size if is_last else None)
        workshop = self._workshop
        intake = Intake(workshop.appenders, appending.write, queue_size_max=workshop.queue_size_max)
        try:
            if isinstance(chunks, AsyncIterable):
                async for chunk in chunks:
                    await intake.put(chunk)
            else:
                await drained(workshop.sources, lambda: appending.drain(chunks, workshop.appenders), chunks)
        except BaseException:
            # What had arrived is kept before the error goes on, and it goes on also when that fails.
            with contextlib.suppress(StorageError):
                await _whole(self._end_append(appending, intake, note, is_last=False))
            raise
        await _whole(self._end_append(appending, intake, note, is_last=is_last))

    def _appending(
        self, observe: Observer, note: Callable[[], bytes], *, size: int | None = None
    ) -> Appending:
        workshop = self._workshop
        return Appending(
            self._holding,
            workshop.senders,
            workshop.blocks,
            observe,
            note,
            part_size=workshop.part_size,
            part_count_max=workshop.part_count_max,
            segment_size=workshop.segment_size,
            size=size,
        )

    async def _end_append(
        self, appending: Appending, intake: Intake, note: Callable[[], bytes], *, is_last: bool
    ) -> None:
        try:
            rest = await intake.finish()
            await self._workshop.appenders.run(self._keep, appending, rest, note, is_last)
        except BaseException:
            await self._workshop.appenders.run(appending.wait)
            raise

    def _keep(
        self,
        appending: Appending,
        rest: Sequence[bytes],
        note: Callable[[], bytes],
        is_last: bool,  # noqa: FBT001 - by way of a thread
    ) -> None:
        appending.write(rest)
        kept = note()
        check_note(kept)
        if not is_last:
            appending.save(kept)
            self._see()
            return
        self._offset, self._note, self._pending = appending.offset, kept, appending

    async def replay(self) -> AsyncIterator[bytes]:
        """Costs the upload its place in a multipart upload: parts can be read only once they are an object."""
        with self._workshop.occupied(self._id):
            segments = await self._workshop.threads.run(self._readable)
        size = sum(segment.size for segment in segments)
        stream = SegmentStream(self._workshop.client, self._workshop.readers, segments, Span(0, size))
        try:
            async for chunk in stream.chunks():
                yield chunk
        finally:
            await stream.close()
        if self._holding.saved.rest:
            yield self._holding.saved.rest

    def _readable(self) -> tuple[Segment, ...]:
        self._prepare()
        holding = self._holding
        if holding.saved.is_closing:
            return holding.complete()
        holding.seal()
        if holding.saved.is_sealed:
            holding.unseal()
        return holding.saved.segments

    async def commit(self, key: str) -> ObjectInfo:
        check_key(key)
        # What is elsewhere is none to the sweep, which would take its bytes.
        if not key.startswith(self._workshop.content_prefix):
            raise ValueError(f"{key!r} is not below {self._workshop.content_prefix!r}, where content is kept")
        with self._workshop.occupied(self._id):
            return await self._workshop.threads.run(self._commit, key)

    def _commit(self, key: str) -> ObjectInfo:
        self._workshop.refuse_below_object(key)
        if not self._holding.saved.is_closing:
            # Kept until it is done: a commit that is repeated must not take what is saved for all that there is.
            (self._pending or self._appending(lambda _: None, lambda: self._note)).close(self._note)
            self._pending = None
        else:
            self._holding.check()
        try:
            info = self._publish(key, self._holding.complete())
        except InTheWay as error:
            raise below(key) from error
        # Whoever repeats this from here on finds the pointer.
        self._holding.end()
        return info

    def _publish(self, key: str, segments: tuple[Segment, ...]) -> ObjectInfo:
        """Make a pointer to the segments, or keep what is at the key, and leave it new."""
        records = self._workshop.records
        for _ in range(_PUBLISH_TRIES):
            # Another nonce each time: a pointer of ours that was deleted meanwhile had another version.
            stored, nonce = pointer_to_bytes(segments)
            try:
                version = records.write(key, stored, nonce, expect="")
            except PreconditionFailed:
                with contextlib.suppress(ObjectMissing, PreconditionFailed):
                    return self._kept(key, segments)
            else:
                return records.info_after(key, sum(segment.size for segment in segments), version)
        raise StorageUnavailable(f"{key} is written and deleted by others all the time")

    def _kept(self, key: str, segments: tuple[Segment, ...]) -> ObjectInfo:
        """Of an object that is there already, once it is as new as a touch makes it.

        Our own bytes go then, unless it is made of them: a commit that is repeated. Into the trash, for another process that repeats
        this commit at the same time may still publish them.

        Raises:
            ObjectMissing, PreconditionFailed: it was deleted or rewritten in that moment.
        """
        records = self._workshop.records
        found = records.look(key)
        is_ours = found.tail.kind == POINTER and records.segments(found) == segments
        info = records.touch(found)
        if not is_ours:
            with contextlib.suppress(StorageError):  # garbage then, which the sweep finds by itself
                records.put_in_trash(segments)
        return info

    async def abort(self) -> None:
        with self._workshop.occupied(self._id):
            await self._workshop.threads.run(self._abort)

    def _abort(self) -> None:
        """By whoever holds the upload, also one who was overtaken since: it is the upload that ends."""
        if self._pending is not None:
            self._pending.wait()
        with contextlib.suppress(UploadMissing):
            holding = Holding.resume(self._workshop.client, self._workshop.records, self._id)
            holding.abort()
            if self._pending is not None:
                self._pending.remove_tail(holding.saved)
        self._pending = None


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    await uncancelled(asyncio.ensure_future(work))


_: type[Upload] = S3Upload
