"""An upload's state in the bucket, and the parts that an append makes of its bytes. All in the threads that call.

Nothing is locked. The state is one object, changed by compare-and-set: whoever was overtaken learns it at his next write, and
who died holds up nobody. Two rules keep those who do not know of each other from harm:

- Part numbers are claimed, by writing into the state that they are taken, before they are used. A slow appender that was
  overtaken goes on writing parts of its own, never over another's.
- A multipart upload is completed only after the list of its parts was written into the state for good: as sealed, or with another
  one behind it. So it is completed with one list, however many try, and a second try that finds it done finds the right object.

Content is several objects where there is a limit to the size of one. Each is completed while the bytes of the next arrive, so that
a store for which that is work has little left to do at the end. What had arrived until then is kept, too, when it is. Where it
is known what is still to come, the last objects are small, and the very last ones, the tail, are put in one request each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from storage_backends.checks import check_note
from storage_backends.interface import (
    BlockingSource,
    ObjectMissing,
    Observer,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
    UploadBusy,
    UploadMissing,
    UploadOvertaken,
)
from storage_backends.local_intake import fill
from storage_backends.s3_client import Part, Pieces, S3Client
from storage_backends.s3_format import UPLOADS, Segment, Target, UploadState, new_data_key
from storage_backends.s3_memory import MEMORY_MAX, Blocks, Gathered
from storage_backends.s3_records import Records
from storage_backends.threads import Threads

T = TypeVar("T")

# What S3 asks of every part but the last.
PART_SIZE_MIN: Final = 5 * 1024 * 1024
# With one part on its way and one being filled, this is the most that keeps to MEMORY_MAX.
PART_SIZE_MAX: Final = 32 * 1024 * 1024
_IN_FLIGHT_MAX: Final = 3
# Parts of one size. Of 16 MiB, then 32 MiB: 281 GiB in the 10 000 parts of one object; what is larger is several objects.
_GROWS_EVERY: Final = 2000
PART_COUNT_MAX: Final = 10_000
# One small write for so many parts, 1 GiB of them at least; an appender that dies wastes no more numbers.
_CLAIM: Final = 64

# Objects of one size. Of 64 MiB, then 128 MiB: a TiB is 512 of them, and its pointer 70 KB.
_SEGMENT_GROWS_EVERY: Final = 64

# Objects of the tail, each as large as a part. While so many arrive, what is before them has time to be completed.
_TAIL_COUNT_MAX: Final = 4
# Behind so many objects content has no tail: it becomes parts of one more target, which whoever is cut off goes on with. The
# largest content has 700; only a client that announces an end and is cut off before it, again and again, gets here, each time
# with another object of 5 MiB. So a pointer, a state and a record in the trash stay small, whatever clients do.
_TAIL_BEFORE: Final = 1000

# A list of 10 000 parts has 600 KB, a note 64 KiB; the rest is smaller than a part.
_STATE_SIZE_MAX: Final = 64 * 1024 * 1024


def part_size_of(number: int, first_size: int) -> int:
    """How large the part of this number is made."""
    return min(PART_SIZE_MAX, first_size << ((number - 1) // _GROWS_EVERY))


def segment_size_of(index: int, first_size: int) -> int:
    """How large the object of this index is made, when content is several."""
    return first_size << (index // _SEGMENT_GROWS_EVERY)


def in_flight_max(part_size: int) -> int:
    """Parts on their way while one more is filled."""
    return max(1, min(_IN_FLIGHT_MAX, MEMORY_MAX // part_size - 1))


class Holding:
    """An upload as one holder knows it: its state when he last read or wrote it."""

    def __init__(
        self, client: S3Client, records: Records, upload_id: str, saved: UploadState, version: str
    ) -> None:
        self._client = client
        self.records = records
        self._id = upload_id
        self._key = UPLOADS + upload_id
        self.saved = saved
        self._version = version

    @classmethod
    def begin(cls, client: S3Client, records: Records, upload_id: str, note: bytes) -> Holding:
        """Raises: ValueError: the id was used before."""
        check_note(note)
        state = UploadState(note)
        try:
            version = records.write(UPLOADS + upload_id, *state.to_bytes(), expect="")
        except PreconditionFailed as error:
            raise ValueError(f"the upload {upload_id} was begun before") from error
        return cls(client, records, upload_id, state, version)

    @classmethod
    def resume(cls, client: S3Client, records: Records, upload_id: str) -> Holding:
        """Raises: UploadMissing: it has ended; what is left of it is removed."""
        holding = cls.read(client, records, upload_id)
        if holding.saved.is_aborted:
            holding.abort()
            raise missing(upload_id)
        return holding

    @classmethod
    def read(cls, client: S3Client, records: Records, upload_id: str) -> Holding:
        """Also what was aborted. Raises: UploadMissing, ObjectDamaged."""
        try:
            state, found = records.read_own(UPLOADS + upload_id, _STATE_SIZE_MAX, UploadState.from_bytes)
        except ObjectMissing as error:
            raise missing(upload_id) from error
        return cls(client, records, upload_id, state, found.version)

    def check(self) -> None:
        """Raises: UploadBusy: somebody else has written; UploadMissing."""
        if self._current() != self._version:
            raise self._overtaken()

    def save(self, state: UploadState) -> None:
        """Raises: UploadBusy, UploadMissing: somebody else was faster; nothing was written."""
        try:
            self._version = self.records.write(self._key, *state.to_bytes(), expect=self._version)
        except PreconditionFailed as error:
            self._current()
            raise self._overtaken() from error
        self.saved = state

    def create_target(self) -> Target:
        key = new_data_key(self._id)
        return Target(key, self._client.again(lambda: self._client.create_upload(key)))

    def upload_part(self, target: Target, number: int, content: Pieces) -> Part:
        return self._client.again(
            lambda: self._client.upload_part(target.key, target.multipart, number, content)
        )

    def put_data(self, content: Pieces) -> Segment:
        """Content that is smaller than a part, in one request."""
        key = new_data_key(self._id)
        return Segment(key, len(content), self._client.again(lambda: self._client.put(key, content)))

    def complete(self) -> tuple[Segment, ...]:
        """All segments, once the sealed targets are complete. May be repeated, also by others.

        Raises:
            UploadMissing: the upload was aborted.
        """
        assert self.saved.is_sealed or not self.saved.targets
        # One without parts is of an appender that died before its first had arrived: nothing can be made of it, and the sweep takes it.
        filled = [target for target in self.saved.targets if target.parts]
        return (*self.saved.segments, *(self.complete_target(target) for target in filled))

    def complete_target(self, target: Target) -> Segment:
        """Of one whose parts are in the state for good."""
        try:
            version = self._client.again(
                lambda: self._client.complete_upload(target.key, target.multipart, target.parts)
            )
        except UploadMissing as error:
            version = self._completed_version(target, error)
        return Segment(target.key, target.size, version)

    def _completed_version(self, target: Target, error: UploadMissing) -> str:
        """Of what an earlier try, whose answer was lost, or another holder has completed."""
        try:
            done = self._client.again(lambda: self._client.head(target.key))
        except ObjectMissing:
            raise missing(self._id) from error
        if done.size != target.size:
            raise StorageUnavailable(
                f"the upload {self._id} has {done.size} of {target.size} bytes"
            ) from error
        return done.version

    def seal(self) -> None:
        """Let the targets be completed with the parts that they have."""
        if self.saved.targets and not self.saved.is_sealed:
            self.save(replace(self.saved, is_sealed=True))

    def unseal(self) -> None:
        """Complete what is sealed, so that more can be appended."""
        segments = self.complete()
        self.save(replace(self.saved, segments=segments, targets=(), is_sealed=False))

    def end(self) -> None:
        """Forget the state."""
        with suppress(
            StorageError
        ):  # it says that the upload has ended, or is closing; whoever expires it tries again
            self._client.again(lambda: self._client.delete(self._key))

    def abort(self) -> None:
        """End the upload. May be repeated.

        It is written down before a byte is removed: a store that answers the same to a delete of what is there and of what
        is gone cannot tell whether the upload was ours to abort, or somebody has published it.

        Raises:
            UploadBusy, UploadMissing: somebody else was faster.
        """
        if not self.saved.is_aborted:
            self.save(replace(self.saved, is_aborted=True))
        for target in self.saved.targets:
            with suppress(StorageError):
                self._client.again(
                    lambda target=target: self._client.abort_upload(target.key, target.multipart)  # type: ignore[misc]
                )
        # Whoever appends may have completed them by now; the last one too, where an end comes behind it.
        full = [Segment(target.key, target.size, "") for target in self.saved.targets]
        if self.saved.is_closing:
            # A commit has begun, and may be about to publish the content. The sweep removes nothing of an upload whose state is
            # there; it takes the state itself when no commit can be under way any more.
            return
        self.records.delete_data((*self.saved.segments, *full))
        self.end()

    def stored(self) -> UploadState:
        """As it is by now. Raises: UploadMissing."""
        return self.read(self._client, self.records, self._id).saved

    def _current(self) -> str:
        """Raises: UploadMissing."""
        try:
            return self.records.look(self._key).version
        except ObjectMissing as error:
            raise missing(self._id) from error

    def _overtaken(self) -> UploadBusy:
        return UploadBusy(f"somebody else is appending to the upload {self._id}")


class Appending:
    """One append: bytes become parts as they come, and count when the state that lists them is saved.

    Args:
        note: what is kept with the bytes that were observed so far.
        segment_size: of the first objects that content is made of, when it is several; None when it is to be one.
        size: how many bytes there will be, when they are the last of the content and that is known.
    """

    def __init__(
        self,
        holding: Holding,
        pool: Threads,
        blocks: Blocks,
        observe: Observer,
        note: Callable[[], bytes],
        *,
        part_size: int,
        part_count_max: int,
        segment_size: int | None,
        size: int | None = None,
    ) -> None:
        self._holding = holding
        self._pool = pool
        self._observe = observe
        self._note = note
        self._part_size = part_size
        self._part_count_max = part_count_max
        self._segment_size = segment_size
        self._blocks = blocks
        self._gathered = Gathered(blocks)
        self._gathered.add(memoryview(holding.saved.rest))
        self._hashing: Future[None] | None = None
        # Of each target, by its key.
        self._parts: dict[str, list[Future[Part]]] = {}
        self._in_flight: deque[Future[Any]] = deque()
        self._offset = holding.saved.offset
        self._stop = None if segment_size is None or size is None else self._offset + size
        # Objects of one request each, behind all targets.
        self._tail: list[Future[Segment]] = []
        targets = holding.saved.targets
        self._target_size = targets[-1].size if targets else 0
        self._number = self._number_stop = targets[-1].number_next if targets else part_count_max + 1
        # What is to be kept with the bytes up to the end of a target that we filled, until the next one is there.
        self._note_at_end: bytes | None = None
        self._ending: Future[None] | None = None
        self._completed: dict[str, Segment] = {}

    @property
    def offset(self) -> int:
        return self._offset

    def write(self, batch: Sequence[bytes]) -> None:
        """Raises: UploadOvertaken: by now bytes are read that cannot be given back."""
        for piece in batch:
            rest = memoryview(piece)
            while rest:
                room = self._room()
                taken = rest[: len(room)]
                room[: len(taken)] = taken
                self._observe(room[: len(taken)])
                self._grow(len(taken))
                rest = rest[len(taken) :]

    def drain(self, source: BlockingSource, hashers: Threads) -> BaseException | None:
        """Take all that the source gives: while one block fills, the one before is hashed.

        Returns:
            what stopped the source before its end; what it gave until then was taken.

        Raises:
            UploadOvertaken: see `write`.
        """
        while True:
            room = self._room()
            size, failure = fill(room, source)
            self._wait_for_hash()
            # With the part it is of: the block must not go back and be filled anew before it is hashed.
            self._hashing = hashers.begin(self._hash, room[:size], self._gathered)
            self._grow(size)
            if failure is not None or size < len(room):
                self._wait_for_hash()
                return failure

    def _wait_for_hash(self) -> None:
        if self._hashing is not None:
            self._hashing.result()

    def _hash(self, piece: memoryview, _part: Gathered) -> None:
        self._observe(piece)

    def _room(self) -> memoryview:
        """Where the next bytes go; waits for a part of ours that is on its way, where memory is scarce."""
        while self._in_flight and self._blocks.are_used_up:
            self._in_flight.popleft().result()
        return self._gathered.room()[: max(1, self._current_part_size() - len(self._gathered))]

    def _grow(self, size: int) -> None:
        self._gathered.grow(size)
        self._offset += size
        if len(self._gathered) >= self._current_part_size():
            try:
                self._flush()
            except UploadBusy as error:
                raise _overtaken(error) from error
            if not self._tail and self._target_is_full():
                self._wait_for_hash()
                self._note_at_end = self._note()
                self._number = self._number_stop = self._part_count_max + 1

    def _target_is_full(self) -> bool:
        if self._number > self._part_count_max:
            return True
        if self._segment_size is None:
            return False
        saved = self._holding.saved
        index = len(saved.segments) + len(saved.targets) - 1
        return self._target_size >= segment_size_of(index, self._segment_size) or self._is_tail_from(
            self._offset
        )

    def _is_tail_from(self, offset: int) -> bool:
        saved = self._holding.saved
        return (
            self._stop is not None
            and self._stop - offset <= _TAIL_COUNT_MAX * self._part_size
            and len(saved.segments) + len(saved.targets) < _TAIL_BEFORE
        )

    def _is_in_tail(self) -> bool:
        """Whether the bytes that are gathered go behind all targets."""
        if self._tail:
            return True
        is_between = self._number > self._part_count_max
        return is_between and self._is_tail_from(self._offset - len(self._gathered))

    def _current_part_size(self) -> int:
        if self._blocks.are_used_up:
            return PART_SIZE_MIN
        number = self._number if self._number <= self._part_count_max else 1
        return part_size_of(number, self._part_size)

    def _flush(self) -> None:
        if self._is_in_tail():
            self._flush_to_tail()
        else:
            self._flush_to_target()

    def _flush_to_target(self) -> None:
        number = self._next_number()
        target = self._holding.saved.targets[-1]
        self._target_size += len(self._gathered)
        part = self._send(partial(self._holding.upload_part, target, number))
        self._parts.setdefault(target.key, []).append(part)

    def _flush_to_tail(self) -> None:
        if not self._tail:
            self._end_targets()
        self._tail.append(self._send(self._holding.put_data))

    def _send(self, send: Callable[[Pieces], T]) -> Future[T]:
        while len(self._in_flight) >= in_flight_max(len(self._gathered)):
            self._in_flight.popleft().result()
        sending = self._pool.begin(send, self._gathered)
        self._in_flight.append(sending)
        self._gathered = Gathered(self._blocks)
        return sending

    def _next_number(self) -> int:
        if self._number == self._number_stop:
            self._claim()
        self._number += 1
        return self._number - 1

    def _claim(self) -> None:
        """Take the next part numbers; they stay taken, whatever becomes of us."""
        self._wait_for_end()
        if self._holding.saved.is_sealed:
            self._holding.unseal()
        targets = self._holding.saved.targets
        is_new = not targets or self._number > self._part_count_max
        if is_new:
            targets = (*targets, self._holding.create_target())
            self._number, self._target_size = 1, 0
        stop = min(self._number + _CLAIM, self._part_count_max + 1)
        claimed = replace(targets[-1], number_next=stop)
        self._holding.save(replace(self._holding.saved, targets=(*targets[:-1], claimed)))
        self._number_stop = stop
        if is_new and len(targets) > 1:
            self._ending = self._pool.begin(self._end, targets[-2].key, self._note_at_end)
            self._note_at_end = None

    def _end_targets(self) -> None:
        """Complete them while the tail arrives."""
        self._wait_for_end()
        saved = self._holding.saved
        if saved.is_sealed:
            self._holding.unseal()
        elif saved.targets:
            key = saved.targets[-1].key
            self._ending = self._pool.begin(self._end, key, self._note_at_end, is_sealed=True)
            self._note_at_end = None

    def _end(self, key: str, note: bytes | None, *, is_sealed: bool = False) -> None:
        """Keep what has arrived up to the end of a target, and complete that, while more arrives for what is behind it.

        Nobody else writes the state meanwhile: who wants to waits for us.

        Args:
            note: None when it was kept before.
            is_sealed: no other target will be behind it.

        Raises:
            UploadBusy, UploadMissing: somebody else was faster.
        """
        saved = replace(self._holding.saved, is_sealed=is_sealed)
        if note is not None:
            targets = tuple(
                self._with_parts(target) if target.key == key else target for target in saved.targets
            )
            saved = self._settled(replace(saved, note=note, rest=b"", targets=targets))
        if saved != self._holding.saved:
            self._holding.save(saved)
        full = next(target for target in self._holding.saved.targets if target.key == key)
        with suppress(StorageError):  # it is tried again with the last one
            self._completed[key] = self._holding.complete_target(full)

    def _with_parts(self, target: Target) -> Target:
        """The target with the parts of ours that it does not list yet."""
        listed = {part.number for part in target.parts}
        arrived = [part.result() for part in self._parts.get(target.key, ())]
        return replace(
            target, parts=(*target.parts, *(part for part in arrived if part.number not in listed))
        )

    def _settled(self, state: UploadState) -> UploadState:
        """The same with what is complete by now as segments."""
        segments, targets = list(state.segments), list(state.targets)
        while targets and targets[0].key in self._completed:
            segments.append(self._completed[targets.pop(0).key])
        return replace(state, segments=tuple(segments), targets=tuple(targets))

    def _wait_for_end(self) -> None:
        """Raises: UploadBusy, UploadMissing, StorageUnavailable: what has arrived up to the end of a target is not kept."""
        if self._ending is not None:
            self._ending.result()

    def wait(self) -> None:
        """Wait until nothing is on its way any more."""
        wait(self._in_flight)
        self._in_flight.clear()
        if self._ending is not None:
            wait([self._ending])

    def save(self, note: bytes) -> None:
        """Keep what has arrived.

        Raises:
            UploadOvertaken: somebody else was faster.
        """
        check_note(note)
        try:
            if len(self._gathered) >= PART_SIZE_MIN:
                self._flush()
            self._save(self._state(note))
        except UploadBusy as error:
            raise _overtaken(error) from error
        finally:
            self.wait()

    def close(self, note: bytes) -> None:
        """Keep all that has arrived as content that can be completed, and let nobody append any more.

        Raises:
            UploadBusy, UploadMissing: somebody else was faster.
        """
        if self._gathered:
            saved = self._holding.saved
            if self._tail or saved.is_sealed or not saved.targets:
                self._flush_to_tail()
            else:
                self._flush_to_target()
        self.wait()
        self._save(replace(self._state(note), is_sealed=True, is_closing=True))

    def _save(self, state: UploadState) -> None:
        try:
            self._holding.save(state)
        except (UploadBusy, UploadMissing):
            # Where the upload has ended nobody can tell whether somebody published them: the sweep can.
            with suppress(StorageError):
                self.remove_tail(self._holding.stored())
            raise

    def remove_tail(self, state: UploadState) -> None:
        """Remove the objects of the end, unless the upload has them: an earlier save may have been done, its answer lost.

        Args:
            state: read after our last save. Whoever went on from one of ours has kept what it names.
        """
        arrived = [sent.result() for sent in self._tail if sent.exception() is None]
        self._holding.records.delete_data([segment for segment in arrived if segment not in state.segments])

    def _state(self, note: bytes) -> UploadState:
        """With all that has arrived."""
        self._wait_for_end()
        if not self._tail:
            return self._state_of_targets(note)
        if self._settled(self._holding.saved).targets:
            self._holding.unseal()
        state = self._state_of_targets(note)
        tail = [sent.result() for sent in self._tail]
        return replace(state, segments=(*state.segments, *tail), is_sealed=False)

    def _state_of_targets(self, note: bytes) -> UploadState:
        saved = self._holding.saved
        targets = list(saved.targets)
        if targets and targets[-1].key in self._parts:
            # Numbers that were claimed and not used are given back.
            targets[-1] = replace(targets[-1], number_next=self._number)
        targets = [self._with_parts(target) for target in targets]
        return self._settled(replace(saved, note=note, targets=tuple(targets), rest=bytes(self._gathered)))


def missing(upload_id: str) -> UploadMissing:
    return UploadMissing(f"no upload {upload_id}: it ended, expired or never was")


def _overtaken(error: UploadBusy) -> UploadOvertaken:
    return UploadOvertaken(f"{error}: ask for its offset and go on from there")
