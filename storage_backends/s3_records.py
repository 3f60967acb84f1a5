"""Records in a bucket: looked at, compared and set, deleted. Every call runs in the thread that calls.

An answer that was lost leaves open whether the write was done, and the object itself tells: it carries the nonce of its
writer. So a conditional write is decided by reading before it is tried again, and never takes its own effect for somebody
else's. Where reading cannot decide either, StorageUnavailable is raised: the caller knows that nobody knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

from storage_backends.interface import (
    ObjectDamaged,
    ObjectInfo,
    ObjectMissing,
    PreconditionFailed,
    StorageError,
    StorageUnavailable,
)
from storage_backends.s3_client import Body, Listed, S3Client
from storage_backends.s3_errors import InTheWay, TryAgain
from storage_backends.s3_format import (
    POINTER,
    POINTER_STEP,
    TAIL_SIZE,
    Found,
    Malformed,
    Segment,
    Tail,
    may_be_pointer,
    new_trash_key,
    pointer_from_bytes,
    renewed,
    trash_to_bytes,
)

T = TypeVar("T")

# Of a store's clock (whole seconds) and of what two of its machines may differ by. A write that is older than the
# beginning of ours by this much was there before it.
_CLOCK_DOUBT_S: Final = 3.0
# A gateway over a file system removes a folder with its last object. Who writes into it at that moment is told that a folder
# is in the way (versitygw 1.8: 1 write in 100 when four threads write and delete in one folder).
_IN_THE_WAY_TRIES: Final = 5
# Of an object that others rewrite between our two requests for it.
_REWRITTEN_TRIES: Final = 8


class Records:
    def __init__(self, client: S3Client) -> None:
        self._client = client

    def look(self, key: str) -> Found:
        """One request: the end of the object.

        Raises:
            ObjectMissing: no such key.
            ObjectDamaged: it is not one of ours.
        """
        return self._client.again(lambda: self._look(key))

    def _look(self, key: str) -> Found:
        body = self._client.get(key, span=f"bytes=-{POINTER_STEP}")
        return _found(key, body, body.read())

    def exists(self, key: str) -> bool:
        try:
            self.look(key)
        except ObjectMissing:
            return False
        return True

    def read(self, key: str, stored_size_max: int) -> tuple[bytes, Found] | None:
        """An object, whole, tail and all; None if it has more than `stored_size_max` bytes.

        Raises:
            ObjectMissing: no such key.
            ObjectDamaged: it is not one of ours.
        """
        return self._client.again(lambda: self._read(key, stored_size_max))

    def _read(self, key: str, stored_size_max: int) -> tuple[bytes, Found] | None:
        body = self._client.get(key)
        try:
            if body.object_size > stored_size_max:
                return None
            stored = body.read()
        finally:
            body.close()
        return stored, _found(key, body, stored)

    def read_own(self, key: str, stored_size_max: int, decode: Callable[[bytes], T]) -> tuple[T, Found]:
        """What `decode` makes of an object of the backend's own. Raises: ObjectMissing, ObjectDamaged."""
        read = self.read(key, stored_size_max)
        if read is None:
            raise ObjectDamaged(f"{key} in the bucket is larger than it can be", self.look(key).info)
        stored, found = read
        return _decoded(found, decode, stored), found

    def segments(self, found: Found) -> tuple[Segment, ...]:
        """Where the bytes are: of content where its pointer says, of a record in itself.

        Raises:
            ObjectMissing, PreconditionFailed: the pointer was rewritten meanwhile.
            ObjectDamaged: it is none of ours.
        """
        if found.tail.kind != POINTER:
            return (Segment(found.key, found.tail.size, found.version),)
        return _decoded(found, pointer_from_bytes, self._whole(found))

    def segments_of(self, key: str) -> tuple[Segment, ...]:
        """Where the bytes of content are now; none if there is no content at `key`."""
        for _ in range(_REWRITTEN_TRIES):
            with suppress(PreconditionFailed):
                try:
                    found = self.look(key)
                    return self.segments(found) if found.tail.kind == POINTER else ()
                except ObjectMissing:
                    return ()
        raise StorageUnavailable(f"{key} is rewritten by others all the time")

    def _whole(self, found: Found) -> bytes:
        """All that is stored of an object that was looked at.

        Raises:
            ObjectMissing, PreconditionFailed: it was rewritten meanwhile.
        """
        if found.stored_size == len(found.end):
            return found.end
        return self._client.again(lambda: self._client.get(found.key, expect=found.version).read())

    def info_of(self, listed: Listed) -> ObjectInfo | None:
        """What `look` would tell of an object that was listed, asking only where that is needed; None if it is gone.

        Of one that is none of ours what the listing tells.
        """
        if may_be_pointer(listed.size):
            try:
                return self.look(listed.key).info
            except ObjectMissing:
                return None
            except ObjectDamaged as error:
                return error.info
        size = listed.size - TAIL_SIZE if listed.size >= TAIL_SIZE else listed.size
        return ObjectInfo(listed.key, size, listed.version, listed.modified)

    def write(self, key: str, stored: bytes, nonce: bytes, *, expect: str | None = None) -> str:
        """Write an object; its version.

        Raises:
            PreconditionFailed: it is not the version `expect`; nothing was written.
            InTheWay: the key is below an object.
            StorageUnavailable: it may have been written.
        """
        began = time.monotonic()
        is_doubtful = False
        for attempt in self._client.tries(TryAgain):
            with attempt:
                if is_doubtful:
                    before = self._before(key, nonce, began) if expect is None else self._peek(key)
                    if before is not None and before.tail.nonce == nonce:
                        return before.version
                    if expect is None:
                        expect = "" if before is None else before.version
                try:
                    return self._client.put(key, stored, expect=expect)
                except TryAgain as error:
                    is_doubtful = is_doubtful or error.is_done is None
                    raise
                except InTheWay as error:
                    if attempt.retry_state.attempt_number < _IN_THE_WAY_TRIES:
                        raise TryAgain(str(error), is_done=False) from error
                    raise
                except PreconditionFailed as error:
                    if is_doubtful:
                        return self._own(key, nonce, error)
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _peek(self, key: str) -> Found | None:
        try:
            return self._look(key)
        except ObjectMissing:
            return None

    def _before(self, key: str, nonce: bytes, began: float) -> Found | None:
        """What a write without a condition, whose answer was lost, finds: its own object, or what was there before it.

        Raises:
            StorageUnavailable: somebody else has written meanwhile. Was that before us or after? Writing once more could
                undo what came after.
        """
        found = self._peek(key)
        if found is None or found.tail.nonce == nonce:
            return found
        # By the store's clock alone: ours may be wrong.
        if found.modified > found.asked - (time.monotonic() - began) - _CLOCK_DOUBT_S:
            raise StorageUnavailable(f"{key} was written by others while the answer to our write was lost")
        return found

    def _own(self, key: str, nonce: bytes, refusal: PreconditionFailed) -> str:
        """The version, when it was our own write that the condition met after an answer was lost."""
        found = self._peek(key)
        if found is not None and found.tail.nonce == nonce:
            return found.version
        raise StorageUnavailable(f"{key}: an answer was lost, and others have written since") from refusal

    def info_after(self, key: str, size: int, version: str) -> ObjectInfo:
        """Of what was just written. S3 does not say when that was, and its clock is known."""
        return ObjectInfo(key, size, version, self._client.now())

    def touch(self, found: Found) -> ObjectInfo:
        """Give an object that was looked at another version, whatever is stored in it.

        When somebody else has written it since, it is new already.

        Raises:
            ObjectMissing: it was deleted.
        """
        try:
            stored, nonce = renewed(self._whole(found))
            version = self.write(found.key, stored, nonce, expect=found.version)
        except PreconditionFailed:
            return self.look(found.key).info
        return self.info_after(found.key, found.tail.size, version)

    def delete(self, key: str, *, expect: str | None = None) -> None:
        """Remove an object; the bytes that it points to go into the trash.

        Raises:
            PreconditionFailed: it is not the version `expect`.
        """
        for _ in range(_REWRITTEN_TRIES):
            with suppress(ObjectMissing):
                found = self.look(key)
                if expect is not None and found.version != expect:
                    raise PreconditionFailed(f"{key} is not the expected version")
                try:
                    self._delete_found(found)
                except PreconditionFailed:
                    if expect is None:
                        continue
                    # An answer may have been lost: was it we who removed it?
                    self.look(key)
                    raise
            return
        raise StorageUnavailable(f"{key} is rewritten by others all the time")

    def _delete_found(self, found: Found) -> None:
        """Raises: ObjectMissing, PreconditionFailed: it was rewritten meanwhile."""
        if found.tail.kind == POINTER:
            # Before the pointer goes: the bytes are never without somebody who names them, however we end.
            # When it stays after all, the sweep sees that the pointer names them too, and throws the record away alone.
            self.put_in_trash(self.segments(found))
        self.delete_version(found.key, found.version)

    def put_in_trash(self, segments: Sequence[Segment]) -> None:
        """Let bytes be removed after `trash_delay_s` (s3_sweep.py), unless a pointer names them then."""
        if segments:
            self.write(new_trash_key(), *trash_to_bytes(segments), expect="")

    def delete_data(self, segments: Sequence[Segment]) -> None:
        """Remove bytes that no pointer ever named. They are garbage where that fails."""
        for segment in segments:
            with suppress(StorageError):
                self._client.again(lambda key=segment.key: self._client.delete(key))  # type: ignore[misc]

    def delete_version(self, key: str, version: str) -> None:
        """Remove an object, whatever it is. Raises: PreconditionFailed: it was rewritten meanwhile."""
        self._client.again(lambda: self._delete_version(key, version))

    def _delete_version(self, key: str, version: str) -> None:
        try:
            self._client.delete(key, expect=version)
        except ObjectMissing:
            return  # the second try of what the first one did


def _decoded(found: Found, decode: Callable[[bytes], T], stored: bytes) -> T:
    """What `decode` makes of an object, whole. Raises: ObjectDamaged."""
    try:
        return decode(stored)
    except Malformed as error:
        info = ObjectInfo(found.key, found.stored_size, found.version, found.modified)
        raise _damaged(info, error) from error


def _found(key: str, body: Body, end: bytes) -> Found:
    """
    Args:
        end: the last bytes of the object, or all of it.

    Raises:
        ObjectDamaged: it is none of ours.
    """
    try:
        tail = Tail.from_bytes(end)
    except Malformed as error:
        info = ObjectInfo(key, body.object_size, body.version, body.modified)
        raise _damaged(info, error) from error
    return Found(key, tail, body.version, body.modified, body.asked, body.object_size, end)


def _damaged(info: ObjectInfo, error: Malformed) -> ObjectDamaged:
    return ObjectDamaged(
        f"{info.key} in the bucket is damaged, or was not written by this program: {error}", info
    )
