"""An upload's state in the bucket, and the parts that an append makes of its bytes. All in the threads that call.

Nothing is locked. The state is one object, changed by compare-and-set: whoever was overtaken learns it at his next write, and
who died holds up nobody. Two rules keep those who do not know of each other from harm:

- Part numbers are claimed, by writing into the state that they are taken, before they are used. A slow appender that was
  overtaken goes on writing parts of its own, never over another's.
- A multipart upload is completed only after the list of its parts was written into the state as sealed. So it is completed
  with one list, however many try, and a second try that finds it done finds the right object.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import replace
from typing import Final

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
)
from storage_backends.local_intake import fill
from storage_backends.s3_client import Part, Pieces, S3Client
from storage_backends.s3_format import UPLOADS, Segment, Target, UploadState, new_data_key
from storage_backends.s3_memory import MEMORY_MAX, Blocks, Gathered
from storage_backends.s3_records import Records
from storage_backends.threads import Threads

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

# A list of 10 000 parts has 600 KB, a note 64 KiB; the rest is smaller than a part.
_STATE_SIZE_MAX: Final = 64 * 1024 * 1024


def part_size_of(number: int, first_size: int) -> int:
    """How large the part of this number is made."""
    return min(PART_SIZE_MAX, first_size << ((number - 1) // _GROWS_EVERY))


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
        """Also what was aborted. Raises: UploadMissing."""
        try:
            read = records.read(UPLOADS + upload_id, _STATE_SIZE_MAX)
        except ObjectMissing as error:
            raise missing(upload_id) from error
        if read is None:
            raise StorageUnavailable(f"the state of the upload {upload_id} is larger than it can be")
        stored, found = read
        return cls(client, records, upload_id, UploadState.from_bytes(stored), found.version)

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
        return (*self.saved.segments, *(self._complete(target) for target in filled))

    def _complete(self, target: Target) -> Segment:
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
        if self.saved.is_closing:
            # A commit has begun, and may be about to publish the content. The sweep removes nothing of an upload whose state is
            # there; it takes the state itself when no commit can be under way any more.
            return
        self.records.delete_data(self.saved.segments)
        self.end()

    def _current(self) -> str:
        """Raises: UploadMissing."""
        try:
            return self.records.look(self._key).version
        except ObjectMissing as error:
            raise missing(self._id) from error

    def _overtaken(self) -> UploadBusy:
        return UploadBusy(f"somebody else is appending to the upload {self._id}")


class Appending:
    """One append: bytes become parts as they come, and count when the state that lists them is saved."""

    def __init__(
        self,
        holding: Holding,
        pool: Threads,
        blocks: Blocks,
        observe: Observer,
        *,
        part_size: int,
        part_count_max: int,
    ) -> None:
        self._holding = holding
        self._pool = pool
        self._observe = observe
        self._part_size = part_size
        self._part_count_max = part_count_max
        self._blocks = blocks
        self._gathered = Gathered(blocks)
        self._gathered.add(memoryview(holding.saved.rest))
        self._parts: list[tuple[int, Future[Part]]] = []
        self._in_flight: deque[Future[Part]] = deque()
        self._new_size = 0
        targets = holding.saved.targets
        self._number = self._number_stop = targets[-1].number_next if targets else part_count_max + 1

    @property
    def offset(self) -> int:
        return self._holding.saved.offset + self._new_size

    def write(self, batch: Sequence[bytes]) -> None:
        """Raises: StorageUnavailable: somebody else was faster; by now bytes are read that cannot be given back."""
        for piece in batch:
            self._observe(piece)
            rest = memoryview(piece)
            while rest:
                room = self._room()
                taken = rest[: len(room)]
                room[: len(taken)] = taken
                self._grow(len(taken))
                rest = rest[len(taken) :]

    def drain(self, source: BlockingSource, hashers: Threads) -> BaseException | None:
        """Take all that the source gives: while one block fills, the one before is hashed.

        Returns:
            what stopped the source before its end; what it gave until then was taken.

        Raises:
            StorageUnavailable: see `write`.
        """
        hashing: Future[None] | None = None
        while True:
            room = self._room()
            size, failure = fill(room, source)
            if hashing is not None:
                hashing.result()
            # With the part it is of: the block must not go back and be filled anew before it is hashed.
            hashing = hashers.begin(self._hash, room[:size], self._gathered)
            self._grow(size)
            if failure is not None or size < len(room):
                hashing.result()
                return failure

    def _hash(self, piece: memoryview, _part: Gathered) -> None:
        self._observe(piece)

    def _room(self) -> memoryview:
        """Where the next bytes go; waits for a part of ours that is on its way, where memory is scarce."""
        while self._in_flight and self._blocks.are_used_up:
            self._in_flight.popleft().result()
        return self._gathered.room()[: max(1, self._current_part_size() - len(self._gathered))]

    def _grow(self, size: int) -> None:
        self._gathered.grow(size)
        self._new_size += size
        if len(self._gathered) >= self._current_part_size():
            try:
                self._flush()
            except UploadBusy as error:
                raise StorageUnavailable(f"{error}: ask for its offset and go on from there") from error

    def _current_part_size(self) -> int:
        if self._blocks.are_used_up:
            return PART_SIZE_MIN
        number = self._number if self._number <= self._part_count_max else 1
        return part_size_of(number, self._part_size)

    def _flush(self) -> None:
        number = self._next_number()
        targets = self._holding.saved.targets
        while len(self._in_flight) >= in_flight_max(len(self._gathered)):
            self._in_flight.popleft().result()
        part = self._pool.begin(self._holding.upload_part, targets[-1], number, self._gathered)
        self._in_flight.append(part)
        self._parts.append((len(targets) - 1, part))
        self._gathered = Gathered(self._blocks)

    def _next_number(self) -> int:
        if self._number == self._number_stop:
            self._claim()
        self._number += 1
        return self._number - 1

    def _claim(self) -> None:
        """Take the next part numbers; they stay taken, whatever becomes of us."""
        if self._holding.saved.is_sealed:
            self._holding.unseal()
        targets = self._holding.saved.targets
        if not targets or self._number > self._part_count_max:
            targets = (*targets, self._holding.create_target())
            self._number = 1
        stop = min(self._number + _CLAIM, self._part_count_max + 1)
        claimed = replace(targets[-1], number_next=stop)
        self._holding.save(replace(self._holding.saved, targets=(*targets[:-1], claimed)))
        self._number_stop = stop

    def wait(self) -> None:
        """Wait until nothing is on its way any more."""
        wait(self._in_flight)
        self._in_flight.clear()

    def save(self, note: bytes) -> None:
        """Keep what has arrived.

        Raises:
            StorageUnavailable: also when somebody else was faster.
        """
        check_note(note)
        try:
            if len(self._gathered) >= PART_SIZE_MIN:
                self._flush()
            self._holding.save(self._state(note))
        except UploadBusy as error:
            raise StorageUnavailable(f"{error}: ask for its offset and go on from there") from error
        finally:
            self.wait()

    def close(self, note: bytes) -> None:
        """Keep all that has arrived as content that can be completed, and let nobody append any more.

        Raises:
            UploadBusy, UploadMissing: somebody else was faster.
        """
        if self._holding.saved.is_sealed:
            self._holding.unseal()
        if self._holding.saved.targets and self._gathered:
            self._flush()
        self.wait()
        own = [self._holding.put_data(self._gathered)] if self._gathered else []
        state = self._state(note)
        closing = replace(state, segments=(*state.segments, *own), rest=b"", is_sealed=True, is_closing=True)
        try:
            self._holding.save(closing)
        except (UploadBusy, UploadMissing):
            self._holding.records.delete_data(own)
            raise

    def _state(self, note: bytes) -> UploadState:
        saved = self._holding.saved
        targets = []
        for index, target in enumerate(saved.targets):
            added = tuple(part.result() for of, part in self._parts if of == index)
            targets.append(replace(target, parts=target.parts + added))
        if self._parts:
            # Numbers that were claimed and not used are given back.
            targets[-1] = replace(targets[-1], number_next=self._number)
        return replace(saved, note=note, targets=tuple(targets), rest=bytes(self._gathered))


def missing(upload_id: str) -> UploadMissing:
    return UploadMissing(f"no upload {upload_id}: it ended, expired or never was")
