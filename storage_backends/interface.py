"""Bytes under keys: what every storage backend promises.

Two kinds of objects. *Records* are small, written whole, and may be compared and set. *Content* is large, arrives
through an upload, is immutable once committed, and leaves as a `Delivery`.

Keys are ASCII, `/`-separated, without empty, `.` or `..` components; no key may be another key plus `/…`
(an object store could not keep both as files). Nothing here knows what the keys mean.

Every method may raise `StorageUnavailable` (the store failed; a later try may help) and every writing one `StorageFull`.

    StorageError
    ├── ObjectMissing          no such key
    ├── ObjectTooLarge         a record larger than the caller allowed
    ├── PreconditionFailed     the record is not the expected version
    ├── UploadMissing          the upload ended, expired or never was
    ├── UploadBusy             somebody else is appending to it
    ├── UploadOvertaken        somebody else has appended to it meanwhile
    ├── StorageFull            no room; make some
    └── StorageUnavailable     the store failed; a later try may help
        └── ObjectDamaged      one object cannot be read; the store is well, and no later try will help
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol


class StorageError(Exception):
    """Root of what a backend raises. Messages name keys, never folders, hosts or secrets."""


class ObjectMissing(StorageError):
    pass


class ObjectTooLarge(StorageError):
    pass


class PreconditionFailed(StorageError):
    pass


class UploadMissing(StorageError):
    pass


class UploadBusy(StorageError):
    pass


class UploadOvertaken(StorageError):
    """What was appended does not count, though it was read: it has to be sent again from the offset that is there by now."""


class StorageFull(StorageError):
    pass


class StorageUnavailable(StorageError):
    pass


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` up to but without `stop`."""

    start: int
    stop: int


SpanChoice = Span | Callable[[int], Span | None] | None
"""A stretch of an object, or what chooses it once the object's size is known; None is all of it."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What is known of an object without reading it.

    Attributes:
        key: where it is.
        size: bytes.
        version: opaque; differs after every write of the key, also of the same bytes. Compare for equality only.
        modified: seconds since the epoch, by the store's clock; of what was written a moment ago right to a few seconds. It is
            no part of what makes two equal: the version is.
    """

    key: str
    size: int
    version: str
    modified: float = field(compare=False)


class ObjectDamaged(StorageUnavailable):
    """An object is not as the backend writes it: damaged, or put there by somebody else.

    Attributes:
        info: what is known of it; its size is what the store has of it.
    """

    def __init__(self, message: str, info: ObjectInfo) -> None:
        super().__init__(message)
        self.info = info


@dataclass(frozen=True, slots=True)
class UploadInfo:
    """An upload that is under way.

    Attributes:
        modified: seconds since the epoch of its last append or of its beginning, by the store's clock.
    """

    id: str
    offset: int
    modified: float


@dataclass(frozen=True, slots=True)
class Leftover:
    """Something that a crashed writer left behind.

    Attributes:
        name: for the log, within the store; never a path of the machine.
        modified: seconds since the epoch, by the store's clock.
    """

    name: str
    size: int
    modified: float


@dataclass(frozen=True, slots=True)
class Stray:
    """Something that no reader of keys is shown, and the backend cannot use.

    Attributes:
        name: within the store.
        damage: why it cannot be read, of what is the backend's own; "" of what is not.
    """

    name: str
    damage: str = ""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """The bytes are `span` of an open file of this machine, whose content never changes.

    The file is open, and stays readable even if its key is deleted, until the delivery's context ends, which closes it.
    Its position means nothing: read at offsets, or let the kernel send it.
    """

    file: BinaryIO
    span: Span
    size: int


@dataclass(frozen=True, slots=True)
class PresignedUrl:
    """The whole object is at `url`, for a while; whoever wants a stretch of it asks there for a range.

    Attributes:
        url: lets anybody read; a secret until it is handed over.
    """

    url: str = field(repr=False)
    size: int


class BlockingSink(Protocol):
    """Where a thread can put bytes by itself, for a backend that reads them in that thread."""

    def write(self, content: memoryview, /) -> None:
        """Wait until all of `content` is taken; it may be overwritten then. Raises what stops it from being taken."""
        ...

    def interrupt(self) -> None:
        """Make a `write` that waits, or is still to come, raise. From any thread."""
        ...


@dataclass(frozen=True, slots=True)
class ByteStream:
    """The bytes are `chunks`, to be read once, inside the delivery's context.

    A stream that ends early raises `StorageUnavailable`: it never ends cleanly.

    Attributes:
        drain_into: puts the bytes into a sink from a thread of the backend's, in the place of `chunks`, and raises what the
            sink raises too. Before the first byte it may say False: no thread is free for that, so take the chunks.
    """

    chunks: AsyncIterator[bytes]
    span: Span
    size: int
    drain_into: Callable[[BlockingSink], Awaitable[bool]] | None = None


Delivery = LocalFile | PresignedUrl | ByteStream
"""How content can leave, `size` being that of the whole object. Closed: the HTTP edge matches on it in one place."""

Observer = Callable[[bytes | memoryview], None]
"""Sees appended bytes in order, each once, off the event loop: to hash them in the pass that stores them.

What it is shown is valid only during the call.
"""


class BlockingSource(Protocol):
    """Bytes that a thread can wait for by itself, for a backend that stores them from that thread."""

    def read_into(self, buffer: memoryview, /) -> int:
        """Wait for bytes and put them into `buffer`; how many, 0 at the end. Raises what stops them from coming."""
        ...

    def interrupt(self) -> None:
        """Make a `read_into` that waits, or is still to come, raise. From any thread."""
        ...


class Upload(Protocol):
    """Content on its way in. One appender at a time, whichever process it is in."""

    @property
    def id(self) -> str: ...

    @property
    def offset(self) -> int:
        """Bytes kept: what a crash of the process leaves, and after an `append` that returned, a power cut too."""
        ...

    @property
    def note(self) -> bytes:
        """What the caller left with the bytes up to `offset`; opaque to the backend."""
        ...

    async def is_idle(self) -> bool:
        """Whether nobody is appending right now, in whichever process; a backend that cannot tell says yes."""
        ...

    async def append(
        self,
        chunks: AsyncIterable[bytes] | BlockingSource,
        *,
        observe: Observer,
        note: Callable[[], bytes],
        size: int | None = None,
        last: bool = False,
    ) -> int:
        """Add `chunks` at the end and return the new offset; bytes, offset and note are kept together.

        When `chunks` raises or the task is cancelled, what had arrived is kept, note and all, before the error goes on.
        When storing fails, the upload stays at the offset it had before.

        Args:
            chunks: a BlockingSource only where the backend's `source_appends_max` allows one more.
            observe: called with every piece in order before `note` is.
            note: called after the last byte was observed; at most 64 KiB.
            size: bytes to come, if that is known: room is reserved, and a full store is found at once.
            last: a commit follows at once: a backend may leave to it what makes the bytes durable.

        Raises:
            UploadBusy: another append is under way; nothing of `chunks` was read.
            UploadOvertaken: somebody else was faster, whom nobody knew of when this began.
            UploadMissing: the upload has ended.
            StorageFull: nothing was kept of these chunks.
        """
        ...

    def replay(self) -> AsyncIterator[bytes]:
        """The bytes up to `offset` once more, to hash them again."""
        ...

    async def commit(self, key: str) -> ObjectInfo:
        """Make the bytes visible at `key`, whole and durable, or not at all; the upload has then ended.

        When `key` exists already it keeps its bytes, which the caller knows to be the same, is made as new as `touch` makes
        it, and the upload ends too. When it is deleted in that moment, the upload's own bytes are published.

        Raises:
            ValueError: this backend keeps no content at such a key.
            UploadBusy: an append is under way.
            UploadMissing: the upload has ended.
        """
        ...

    async def abort(self) -> None:
        """Forget the bytes. May be called again, and after commit.

        Raises:
            UploadBusy: an append is under way.
        """
        ...


class StorageBackend(Protocol):
    @property
    def source_appends_max(self) -> int:
        """Appends from a BlockingSource that may run at once; 0 where only chunks are taken."""
        ...

    async def start(self) -> None:
        """Open the store, create what is missing, refuse what cannot be served.

        Raises:
            StorageUnavailable: it cannot be used; the message says why and what to do.
        """
        ...

    async def close(self) -> None:
        """Let go of threads, files and connections. May be called again."""
        ...

    async def probe(self) -> None:
        """Prove that the store can be written and read right now; leaves nothing behind.

        Raises:
            StorageFull, StorageUnavailable: it cannot.
        """
        ...

    async def stat(self, key: str) -> ObjectInfo:
        """Raises: ObjectMissing."""
        ...

    def now(self) -> float:
        """Seconds since the epoch by the store's clock, the one that `modified` is told by; right to a few seconds.

        Does not wait.
        """
        ...

    def version_at_once(self, key: str) -> str | None:
        """The version of the object at `key` if that can be told without waiting: "" for absent, None for cannot tell.

        Costs a few microseconds. A backend that would have to ask over a network answers None.
        """
        ...

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        """A record, whole, with the version that was read.

        Raises:
            ObjectMissing: no such key.
            ObjectTooLarge: it has more than `size_max` bytes.
        """
        ...

    def deliver(
        self, key: str, span: SpanChoice = None, *, url_size_min: int | None = None
    ) -> AbstractAsyncContextManager[Delivery]:
        """Content at `key`, or `span` of it, ready to leave.

        A backend may remember where content is: what another process removed may be delivered for a minute after that.
        Whether it is there is for `stat` to say.

        Args:
            span: must lie inside the object. Its choice is called once, and what it raises goes through.
            url_size_min: an object of so many bytes may come as its PresignedUrl, whatever `span`; None for never.

        Raises:
            ObjectMissing: no such key.
        """
        ...

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        """Write a record: atomically, durably, replacing what was there.

        Args:
            expect: the version that must be there, "" for absent, None for whatever is there.

        Raises:
            PreconditionFailed: something else is there; nothing was written.
        """
        ...

    async def create(self, key: str, content: bytes) -> ObjectInfo:
        """Write a record under a key that was never used: whole for whoever reads it, durable when this returns.

        Cheaper than `write` where it is dear to wait for a disk, for of a call that did not return a power cut may leave a
        torn record: it is for logs, whose readers can tell.

        Raises:
            PreconditionFailed: something is there; nothing was written.
        """
        ...

    async def touch(self, key: str) -> ObjectInfo:
        """Make an object, a record or content, as new as if it was written now.

        Its bytes stay; its version and `modified` change, so that whoever deletes it with the version from before is refused.

        Raises:
            ObjectMissing: no such key.
        """
        ...

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        """Remove an object; absent is fine.

        Args:
            expect: the version that must be there.

        Raises:
            PreconditionFailed: another version is there; nothing was removed.
        """
        ...

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        """Objects whose keys start with `prefix` and are greater than `after`, in ASCII order of the whole key.

        What `ObjectDamaged` would be raised of is among them, with a size that means little.
        What is written or removed meanwhile may or may not be seen; what stays is seen once.
        """
        ...

    async def begin_upload(self, upload_id: str, *, note: bytes = b"") -> Upload:
        """Begin an upload under an id that was never used before.

        Args:
            upload_id: 1 to 64 of `[A-Za-z0-9_-]`.
        """
        ...

    async def resume_upload(self, upload_id: str) -> Upload:
        """Take an upload up, in whichever process it was begun.

        Raises:
            UploadMissing: it ended, expired or never was.
        """
        ...

    def sweep(self, *, age_s: float, dry_run: bool = False) -> AsyncIterator[Leftover]:
        """Remove what crashed writers left behind and nobody can reach, if it is older than `age_s`; each as it goes.

        Never what an object or an upload under way needs, whoever writes meanwhile. A read that fails ends it, with nothing
        more removed.

        Args:
            dry_run: say what would go, and remove nothing.

        Raises:
            ObjectDamaged: what may name bytes that are needed cannot be read; its `info` names it.
        """
        ...

    def strays(self) -> AsyncIterator[Stray]:
        """What else there is in the store: under names that no key has, or where the backend keeps what is its own."""
        ...

    def uploads(self) -> AsyncIterator[UploadInfo]:
        """All uploads under way, in no order, for their expiry; one whose state is damaged as one without bytes."""
        ...
