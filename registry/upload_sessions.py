"""Uploads: hash while receiving, know the offset, end as a blob or as nothing.

    begin ──► OPEN ──append──► OPEN ──commit(right digest)──► a blob
                │                └────commit(wrong digest)──► gone
                └──cancel, or no append for `age_s`─────────► gone

What a session knows (its repository, the state of its hash) is kept by the backend beside the bytes, as the upload's
note, so any worker can go on where another stopped. sha256 is hashed in the pass that stores the bytes; another
algorithm is too when the session knew of it before the first byte, else the bytes are read once more at the end.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Self

from kitspec.digest import Digest
from kitspec.errors import BlobTooLarge, BlobUploadUnknown, DigestInvalid, TooManyRequests, UploadOutOfOrder
from kitspec.names import RepositoryName
from registry import hash_state, layout
from registry.logs import log_event
from registry.member_index import MemberIndexes
from registry.pass_watchers import Watchers
from registry.storage_errors import translated
from storage_backends.interface import (
    BlockingSource,
    ObjectDamaged,
    ObjectInfo,
    StorageBackend,
    Upload,
    UploadBusy,
    UploadMissing,
    UploadOvertaken,
)

logger = logging.getLogger(__name__)

Chunks = AsyncIterable[bytes] | BlockingSource
"""Bytes on their way in, as they come from the event loop or from a socket that a thread reads."""

_MARK_LENGTH = 12
_SECRET_LENGTH = 32
# Names of repositories that a worker remembers by their marks.
_NAMES_MAX = 10_000

# The append of a client that was cut off ends a moment later: its bytes are being made durable, for the very client
# that is back already and would go on.
_BUSY_WAIT_S = 5.0
_BUSY_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Note:
    """What is kept beside an upload's bytes."""

    repository: str
    algorithm: str
    state: bytes
    """Of the hash over all bytes so far; empty where it cannot be kept."""
    owner: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps(
            {
                "repository": self.repository,
                "algorithm": self.algorithm,
                "state": base64.b64encode(self.state).decode(),
                "owner": self.owner,
            }
        ).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        document = json.loads(content)
        state = base64.b64decode(document["state"])
        return cls(document["repository"], document["algorithm"], state, document.get("owner", ""))


class UploadSession:
    """One upload of one repository, as this request sees it."""

    def __init__(
        self, backend: StorageBackend, upload: Upload, watchers: Watchers, *, size_max: int | None
    ) -> None:
        self._backend = backend
        self._watchers = watchers
        self._size_max = size_max
        self._take(upload)

    def _take(self, upload: Upload) -> None:
        self._upload = upload
        note = _Note.from_bytes(upload.note)
        self.repository, self.owner = note.repository, note.owner
        self._algorithm = note.algorithm
        if upload.offset == 0:
            self._hasher: hash_state.Hasher | None = hash_state.begin(note.algorithm)
        else:
            self._hasher = hash_state.take_up(note.state) if note.state else None

    @property
    def id(self) -> str:
        return self._upload.id

    @property
    def location(self) -> str:
        return self._upload.id

    @property
    def offset(self) -> int:
        return self._upload.offset

    async def is_idle(self) -> bool:
        with translated():
            return await self._upload.is_idle()

    async def append(
        self,
        chunks: Chunks,
        *,
        at: int | None = None,
        size: int | None = None,
        closing: Digest | None = None,
    ) -> int:
        """Add bytes at the end; the new offset. What arrived before `chunks` failed is kept.

        Args:
            at: the offset the client believes in.
            size: bytes to come, if known.
            closing: these bytes are the last, and this digest is what they should make.

        Raises:
            UploadOutOfOrder: `at` is not the offset, or another request is appending and goes on doing so.
            BlobUploadUnknown: the upload has ended.
            BlobTooLarge: more than the registry allows; the upload stays as it was or as far as it had come.
        """
        deadline = asyncio.get_running_loop().time() + _BUSY_WAIT_S
        while True:
            self.check(at, size)
            if closing is not None and self.offset == 0 and closing.algorithm != self._algorithm:
                self._algorithm = closing.algorithm
                self._hasher = hash_state.begin(closing.algorithm)
            try:
                return await self._append(chunks, size=size, is_last=closing is not None)
            except UploadBusy as error:
                if asyncio.get_running_loop().time() >= deadline:
                    raise self._busy() from error
            except (UploadOvertaken, UploadMissing) as error:
                # Also a part of it may be missing, for others have gone on: is it there?
                await self._reload()
                raise self._busy() from error
            await asyncio.sleep(_BUSY_POLL_S)
            await self._reload()

    def check(self, at: int | None, size: int | None) -> None:
        """Raises: UploadOutOfOrder, BlobTooLarge: as `append`, by what is known before its bytes come."""
        if at is not None and at != self.offset:
            raise UploadOutOfOrder(
                f"the chunk begins at {at}, the upload holds {self.offset} bytes", offset=self.offset
            )
        if self._size_max is not None and size is not None and self.offset + size > self._size_max:
            raise BlobTooLarge(f"a blob of {self.offset + size} bytes; at most {self._size_max} are allowed")

    async def _append(self, chunks: Chunks, *, size: int | None, is_last: bool) -> int:
        if self._size_max is not None:
            rest = self._size_max - self.offset
            if isinstance(chunks, AsyncIterable):
                chunks = _bounded(chunks, rest, self._size_max)
            else:
                chunks = _BoundedSource(chunks, rest, self._size_max)
        async with self._watchers.watching(self.id, self.offset, self._hasher) as observe:
            with translated():
                return await self._upload.append(
                    chunks, observe=observe, note=self._note, size=size, last=is_last
                )

    async def _reload(self) -> None:
        try:
            with translated():
                self._take(await self._backend.resume_upload(self.id))
        except UploadMissing as error:
            raise _unknown(self.id) from error

    def _busy(self) -> UploadOutOfOrder:
        return UploadOutOfOrder("another request is writing to this upload", offset=self.offset)

    async def commit(self, digest: Digest) -> ObjectInfo:
        """Check the digest and publish the bytes under it.

        Raises:
            DigestInvalid: the bytes hash to something else; the upload is gone.
            UploadOutOfOrder: another request has appended since.
            BlobUploadUnknown: the upload has ended.
        """
        try:
            with translated():
                if await self._hash(digest.algorithm) != digest.encoded:
                    await self._upload.abort()
                    raise DigestInvalid(
                        f"the {self.offset} bytes received do not hash to {digest}; the upload is discarded"
                    )
                info = await self._upload.commit(layout.blob_key(digest))
            await self._watchers.committed(self.id, digest, info.size)
            return info
        except (UploadBusy, UploadOvertaken) as error:
            await self._reload()
            raise self._busy() from error
        except UploadMissing as error:
            raise _unknown(self.id) from error

    async def cancel(self) -> None:
        """Forget the upload and its bytes.

        Raises:
            UploadOutOfOrder: another request is appending; the upload goes on.
        """
        try:
            with translated():
                await self._upload.abort()
        except UploadBusy as error:
            raise self._busy() from error

    async def _hash(self, algorithm: str) -> str:
        if self._hasher is not None and self._algorithm == algorithm:
            return self._hasher.hexdigest()
        hasher = hash_state.begin(algorithm)
        async for piece in self._upload.replay():
            # Rare (sha512 after unannounced chunks): a piece is small enough to be hashed here.
            hasher.update(piece)
        return hasher.hexdigest()

    def _note(self) -> bytes:
        kept = self._hasher.keep() if isinstance(self._hasher, hash_state.KeepableSha256) else b""
        return _Note(self.repository, self._algorithm, kept, self.owner).to_bytes()


@dataclass(frozen=True, slots=True)
class OpenUpload:
    """An upload that is under way, in whichever worker. Attributes: size: bytes that are kept of it."""

    id: str
    repository: RepositoryName
    size: int


class UploadSessions:
    """The uploads of all repositories.

    Args:
        count_max: uploads that may be open at once; one more is refused with 429.
        per_repository_max: the same for one repository.
        per_owner_max: the same for one user, whatever the repository; None for any.
        size_max: bytes of a blob, or None for no limit.
        indexes: learn what is in the blobs that are stored.
    """

    def __init__(
        self,
        backend: StorageBackend,
        *,
        count_max: int,
        per_repository_max: int,
        size_max: int | None,
        per_owner_max: int | None = None,
        indexes: MemberIndexes | None = None,
    ) -> None:
        self._backend = backend
        self._watchers = Watchers(indexes)
        self._count_max = count_max
        self._per_repository_max = per_repository_max
        self._per_owner_max = per_owner_max
        self._size_max = size_max
        # Uploads by the part of their id that stands for the repository, and by that which stands for the owner: those of the
        # last count, and those begun since.
        self._open: Counter[str] = Counter()
        self._open_by_owner: Counter[str] = Counter()
        self._names: dict[str, RepositoryName] = {}

    async def begin(
        self, name: RepositoryName, *, algorithm: str = "sha256", owner: str = ""
    ) -> UploadSession:
        """A new upload.

        Args:
            owner: nobody else can go on with it; "" is everybody who has no name either.

        Raises:
            TooManyRequests: too many are open.
        """
        mark, owner_mark = self._marked(name), _mark_of(owner) if owner else ""
        note = _Note(name, algorithm, b"", owner)
        with translated():
            if self._refusal(name, owner) is not None:
                ids = [upload.id async for upload in self._backend.uploads()]
                self._open = Counter(id_[:_MARK_LENGTH] for id_ in ids)
                self._open_by_owner = Counter(id_[_MARK_LENGTH:-_SECRET_LENGTH] for id_ in ids)
            if (refusal := self._refusal(name, owner)) is not None:
                raise refusal
            upload_id = mark + owner_mark + secrets.token_hex(_SECRET_LENGTH // 2)
            upload = await self._backend.begin_upload(upload_id, note=note.to_bytes())
            self._open[mark] += 1
            self._open_by_owner[owner_mark] += 1
        return UploadSession(self._backend, upload, self._watchers, size_max=self._size_max)

    def _refusal(self, name: RepositoryName, owner: str) -> TooManyRequests | None:
        """By what was counted last."""
        in_repository, in_all = self._open[_mark_of(name)], self._open.total()
        if in_repository >= self._per_repository_max or in_all >= self._count_max:
            return TooManyRequests(
                f"{in_repository} uploads are open in {name} and {in_all} in all; "
                f"{self._per_repository_max} and {self._count_max} are allowed: {_TRY_LATER}",
                detail={"open": in_repository, "allowed": self._per_repository_max},
            )
        if owner and self._per_owner_max is not None:
            of_owner = self._open_by_owner[_mark_of(owner)]
            if of_owner >= self._per_owner_max:
                return TooManyRequests(
                    f"{of_owner} uploads of the user {owner} are open; {self._per_owner_max} are allowed: {_TRY_LATER}",
                    detail={"open": of_owner, "allowed": self._per_owner_max},
                )
        return None

    def _marked(self, name: RepositoryName) -> str:
        """The mark of a repository, which is remembered as its."""
        mark = _mark_of(name)
        if len(self._names) >= _NAMES_MAX:
            self._names.clear()
        self._names[mark] = name
        return mark

    async def under_way(self) -> list[OpenUpload]:
        """What is open in all repositories: a look at each upload, and a read for each repository that was not heard of yet."""
        found: list[OpenUpload] = []
        with translated():
            async for upload in self._backend.uploads():
                name = self._names.get(upload.id[:_MARK_LENGTH])
                try:
                    if name is None:
                        note = _Note.from_bytes((await self._backend.resume_upload(upload.id)).note)
                        name = RepositoryName(note.repository)
                        self._marked(name)
                except UploadMissing:
                    continue  # ended meanwhile
                except ObjectDamaged:
                    continue  # nobody can go on with it
                found.append(OpenUpload(upload.id, name, upload.offset))
        return found

    async def resume(self, name: RepositoryName, upload_id: str, *, owner: str = "") -> UploadSession:
        """An upload of this repository and this owner, whichever worker began it.

        Raises:
            BlobUploadUnknown: it ended, expired, never was, or is another repository's or another owner's.
        """
        try:
            with translated():
                upload = await self._backend.resume_upload(upload_id)
        except (UploadMissing, ValueError) as error:
            raise _unknown(upload_id) from error
        session = UploadSession(self._backend, upload, self._watchers, size_max=self._size_max)
        if session.repository != name or session.owner != owner:
            raise _unknown(upload_id)
        return session

    async def settled(self, name: RepositoryName, upload_id: str, *, owner: str = "") -> UploadSession:
        """`resume` for a client that asks how far the upload has come: an append that was cut off may end first.

        Raises:
            BlobUploadUnknown: as `resume`.
        """
        deadline = asyncio.get_running_loop().time() + _BUSY_WAIT_S
        session = await self.resume(name, upload_id, owner=owner)
        while (  # noqa: ASYNC110 - who appends may be another process, which sends no event
            not await session.is_idle() and asyncio.get_running_loop().time() < deadline
        ):
            await asyncio.sleep(_BUSY_POLL_S)
        return await self.resume(name, upload_id, owner=owner)

    async def receiving(self, *, since: float) -> Callable[[RepositoryName], bool]:
        """Which repositories something was added to an upload of since then, by the store's clock, that is not done yet."""
        marks = {
            upload.id[:_MARK_LENGTH] async for upload in self._backend.uploads() if upload.modified >= since
        }
        return lambda name: _mark_of(name) in marks

    async def expire(self, *, now: float, age_s: float, dry_run: bool = False) -> list[str]:
        """End the uploads that nobody has added to for `age_s` seconds; their ids.

        Args:
            now: seconds since the epoch, by the store's clock.
        """
        stale = [upload.id async for upload in self._backend.uploads() if upload.modified < now - age_s]
        expired: list[str] = []
        for upload_id in stale:
            try:
                if not dry_run:
                    await (await self._backend.resume_upload(upload_id)).abort()
            except (UploadMissing, UploadBusy):
                continue
            except ObjectDamaged as error:
                log_event(logger, logging.WARNING, "upload.unreadable", upload=upload_id, reason=str(error))
                continue
            expired.append(upload_id)
        return expired


_TRY_LATER = "finish or cancel some, or try again later"


def _mark_of(name: str) -> str:
    """Stands for the repository at the head of its uploads' ids, and behind it for the user, so that they can be counted by their
    ids alone.
    """
    return Digest.of(name.encode()).encoded[:_MARK_LENGTH]


def _unknown(upload_id: str) -> BlobUploadUnknown:
    return BlobUploadUnknown(
        f"no upload {upload_id[:64]!a} in this repository: it ended, expired or never was"
    )


async def _bounded(chunks: AsyncIterable[bytes], rest: int, size_max: int) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        rest -= len(chunk)
        if rest < 0:
            raise _too_large(size_max)
        yield chunk


class _BoundedSource:
    """A source that raises BlobTooLarge once it has given more than `rest` bytes."""

    def __init__(self, source: BlockingSource, rest: int, size_max: int) -> None:
        self._source = source
        self._rest = rest
        self._size_max = size_max
        self.interrupt = source.interrupt

    def read_into(self, buffer: memoryview, /) -> int:
        # One byte more is asked for than may come: it tells the end from too much.
        count = self._source.read_into(buffer[: self._rest + 1])
        if count > self._rest:
            raise _too_large(self._size_max)
        self._rest -= count
        return count


def _too_large(size_max: int) -> BlobTooLarge:
    return BlobTooLarge(f"the blob is larger than the {size_max} bytes that are allowed")
