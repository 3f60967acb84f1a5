"""The journal: every write of the registry, in the order of time, under keys of its own.

    journal/20261125/12/3640.123456-8f3a…     JSON lines: what one worker wrote in one moment

A change is appended when it is done and before it is acknowledged: what was acknowledged is in the journal, and what is there was
done. A push or mount that is acknowledged twice is there twice: nobody can tell whether its first answer arrived. Changes that come
while an entry is being written go into the next one together.

Keys carry the store's time, to which clocks agree within seconds, and an append that takes longer than `APPEND_MAX_S` fails. So
whoever has seen all keys up to a moment that is `SETTLED_S` ago has seen everything up to there: nothing will come in before it.
Readers follow with that overlap. An entry is removed when it is older than `keep_s`, and no reader that has left a mark still needs it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Self

from kitspec.digest import Digest
from kitspec.names import RepositoryName
from registry import layout
from registry.logs import log_event, request_id
from registry.storage_errors import translated
from storage_backends.interface import ObjectMissing, StorageBackend, StorageError, StorageUnavailable

logger = logging.getLogger(__name__)

APPEND_MAX_S: Final = 60.0
SETTLED_S: Final = APPEND_MAX_S + 30.0

_ENTRY_SIZE_MAX: Final = 16 * 1024 * 1024
# More would make an entry that is slow to read.
_LINES_MAX: Final = 1000
# A mark that nobody moved for so long is no reader's any more.
_MARK_AGE_MAX_S: Final = 30 * 24 * 3600.0
_MARK_SIZE_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class Actor:
    """Who is behind a request. Attributes: name: "" for nobody in particular."""

    name: str = ""
    address: str = ""
    agent: str = ""


acting: ContextVar[Actor] = ContextVar("acting", default=Actor())  # noqa: B039 - it cannot change
"""Who the current task works for."""


@dataclass(frozen=True, slots=True)
class Change:
    """One write.

    Attributes:
        action: "push", "mount" or "delete": Distribution's words in its notifications.
        digest: of the blob or manifest; None for a tag that was deleted.
        media_type: of a manifest; "application/octet-stream" for a blob.
        tags: that were set to the manifest, or deleted.
        source: the repository that a blob was mounted from.
        id, time: of the change; seconds since the epoch.
    """

    action: str
    repository: RepositoryName
    digest: Digest | None = None
    media_type: str = ""
    size: int | None = None
    tags: tuple[str, ...] = ()
    source: RepositoryName | None = None
    actor: Actor = field(default_factory=acting.get)
    request: str = field(default_factory=request_id.get)
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    time: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        document = {
            "id": self.id,
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds"),
            "action": self.action,
            "repository": self.repository,
            "digest": self.digest,
            "mediaType": self.media_type,
            "size": self.size,
            "tags": list(self.tags),
            "source": self.source,
            "actor": self.actor.name,
            "address": self.actor.address,
            "agent": self.actor.agent,
            "request": self.request,
        }
        return {name: value for name, value in document.items() if value not in (None, "", [])}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        return cls(
            action=document["action"],
            repository=RepositoryName(document["repository"]),
            digest=Digest(document["digest"]) if "digest" in document else None,
            media_type=document.get("mediaType", ""),
            size=document.get("size"),
            tags=tuple(document.get("tags", ())),
            source=RepositoryName(document["source"]) if "source" in document else None,
            actor=Actor(document.get("actor", ""), document.get("address", ""), document.get("agent", "")),
            request=document.get("request", ""),
            id=document["id"],
            time=datetime.fromisoformat(document["time"]).timestamp(),
        )


class Batch:
    """Changes that will be written together."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.written: asyncio.Task[None] | None = None


class Journal:
    """One for each worker.

    Args:
        is_writable: False where nothing may be written: nothing happens then that could be told.
    """

    def __init__(self, backend: StorageBackend, *, is_writable: bool = True) -> None:
        self._backend = backend
        self._is_writable = is_writable
        self._lock = asyncio.Lock()
        self._next: Batch | None = None
        self._origin = secrets.token_hex(8)
        self._count = 0

    async def append(self, change: Change) -> None:
        """Keep a change that was done; it is durable when this returns.

        Raises:
            Unavailable, StorageFull: it is not: the change must not be acknowledged. It is logged (`journal.lost`): a deletion cannot
                be repeated, so nobody will tell of it again.
        """
        if not self._is_writable:
            return
        if self._next is None or len(self._next.changes) >= _LINES_MAX:
            self._next = Batch()
            self._next.written = asyncio.create_task(self._write(self._next), name="journal")
        batch = self._next
        batch.changes.append(change)
        assert batch.written is not None
        # Whoever is cut off leaves the others their entry.
        with translated():
            await asyncio.shield(batch.written)

    async def _write(self, batch: Batch) -> None:
        try:
            async with asyncio.timeout(APPEND_MAX_S), self._lock:
                if self._next is batch:
                    self._next = None
                self._count += 1
                key = f"{_key_at(self._backend.now())}{self._origin}{self._count:x}"
                lines = [json.dumps(change.to_json()) for change in batch.changes]
                await self._backend.create(key, "\n".join(lines).encode())
        except TimeoutError as error:
            _log_lost(batch, error)
            raise StorageUnavailable(f"the journal could not be written for {APPEND_MAX_S:g} s") from error
        except StorageError as error:
            _log_lost(batch, error)
            raise
        finally:
            if self._next is batch:
                self._next = None

    def is_own(self, key: str) -> bool:
        """Whether this worker wrote an entry."""
        return key.rpartition("-")[2].startswith(self._origin)

    async def entries(self, *, after: str = "") -> AsyncIterator[str]:
        """Keys of the entries behind `after`, oldest first."""
        async for info in self._backend.list(layout.JOURNAL, after=after):
            yield info.key

    async def read(self, key: str) -> Sequence[Change]:
        """The changes of an entry; none if it was trimmed, or is none of ours."""
        try:
            content, _ = await self._backend.read(key, size_max=_ENTRY_SIZE_MAX)
            return [Change.from_json(json.loads(line)) for line in content.splitlines()]
        except ObjectMissing:
            return ()
        except (ValueError, LookupError, TypeError) as error:
            log_event(logger, logging.WARNING, "journal.entry.unreadable", key=key, reason=str(error))
            return ()

    def settled(self) -> str:
        """A key behind which every entry will stand that is not there yet."""
        return _key_at(self._backend.now() - SETTLED_S)

    async def trim(self, *, keep_s: float, dry_run: bool = False) -> int:
        """Remove entries that are older than `keep_s` and that no reader still needs; how many.

        A reader that leaves a mark (`mark`) keeps what is behind it, for 30 days since it was last moved.
        """
        now = self._backend.now()
        end = _key_at(now - max(keep_s, SETTLED_S))
        async for info in self._backend.list(layout.JOURNAL_MARKS):
            if info.modified < now - _MARK_AGE_MAX_S:
                continue
            try:
                content, _ = await self._backend.read(info.key, size_max=_MARK_SIZE_MAX)
            except ObjectMissing:
                continue
            end = min(end, content.decode("ascii", "replace"))
        count = 0
        async for info in self._backend.list(layout.JOURNAL):
            if info.key >= end:
                break
            if not dry_run:
                await self._backend.delete(info.key, expect=info.version)
            count += 1
        return count

    async def mark(self, reader: str, key: str) -> None:
        """Note that a reader, who goes on after restarts and wherever it runs, has done with everything up to `key`."""
        await self._backend.write(layout.journal_mark_key(reader), key.encode())

    async def marked(self, reader: str) -> str | None:
        """Where a reader goes on; None for one that begins."""
        try:
            content, _ = await self._backend.read(layout.journal_mark_key(reader), size_max=_MARK_SIZE_MAX)
        except ObjectMissing:
            return None
        return content.decode()


class Follower:
    """Sees the changes of all other workers and replicas, soon, at least those since it began; some of them twice.

    Args:
        on_change: told of each.
        on_gap: called when changes may have been missed: this process stood still for longer than the journal is kept.
        interval_s: between two looks.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        on_change: Callable[[Change], Awaitable[None]],
        on_gap: Callable[[], None],
        interval_s: float,
        keep_s: float,
    ) -> None:
        self._journal = journal
        self._on_change = on_change
        self._on_gap = on_gap
        self._interval_s = interval_s
        self._keep_s = keep_s
        self._seen: set[str] = set()

    async def run(self) -> None:
        """Until it is cancelled."""
        after = self._journal.settled()
        looked = time.monotonic()
        while True:
            try:
                after = await self._look(after)
                if time.monotonic() - looked > self._keep_s / 2:
                    self._on_gap()
                looked = time.monotonic()
            except StorageError as error:
                log_event(logger, logging.WARNING, "journal.follow.failed", reason=str(error))
            await asyncio.sleep(self._interval_s)

    async def _look(self, after: str) -> str:
        settled = self._journal.settled()
        async for key in self._journal.entries(after=after):
            if key in self._seen or self._journal.is_own(key):
                continue
            for change in await self._journal.read(key):
                await self._on_change(change)
            self._seen.add(key)
        self._seen = {key for key in self._seen if key > settled}
        return max(after, settled)


def _log_lost(batch: Batch, error: Exception) -> None:
    """Of changes that were done, and that the journal does not tell of, or does without our knowing it."""
    for change in batch.changes:
        log_event(
            logger,
            logging.WARNING,
            "journal.lost",
            action=change.action,
            repository=change.repository,
            digest=change.digest,
            tags=" ".join(change.tags),
            request=change.request,
            reason=str(error) or "it took too long",
        )


def _key_at(moment: float) -> str:
    """What keys of entries of this moment begin with."""
    at = datetime.fromtimestamp(moment, UTC)
    return f"{layout.JOURNAL}{at:%Y%m%d/%H/%M%S.%f}-"
