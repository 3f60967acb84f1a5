"""The audit log: who did what, in which repository, from where; one line of JSON each, in a file or on standard output.

    push, mount, delete     from the journal, with its words: the line is written before the change is acknowledged
    apikey.created, apikey.revoked
                            keys of users: by whom, and which; before that is acknowledged, too
    denied                  a request that was answered with 403
    login, login.refused    credentials that were checked; those that were remembered are not

As with zot's `log.audit`, each process tells of what it did itself. The journal, which all replicas share, is the record that is kept with
the data; a line that is missing here, because of a crash or a full disk, is found there by the change's `id`. Nothing here can fail a
request: what was done is done.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from registry.journal import Batch, Journal, acting
from registry.logs import RateGate, log_event, request_id
from storage_backends.interface import StorageBackend

if TYPE_CHECKING:
    from registry.auth.authenticator import LoginObserver

logger = logging.getLogger(__name__)

STANDARD_OUTPUT: Final = Path("stdout")
# A disk that takes longer holds up pushes no more; its lines are written when it can.
_WRITE_WAIT_S: Final = 10.0
# Lines that wait for such a disk: 5 MB or so.
_WAITING_MAX: Final = 10_000
_REFUSALS_PER_SECOND: Final = 50
_TEXT_LENGTH_MAX: Final = 1024
_METHOD_LENGTH_MAX: Final = 20

_login: ContextVar[tuple[str, bool] | None] = ContextVar("audited_login", default=None)
"""The method of the credentials that the current request had checked, and whether they were good."""


class AuditFile:
    """Lines at the end of a file, which may be renamed at any time, as logrotate does: then a new one is begun. Blocks.

    Args:
        path: `STANDARD_OUTPUT` for that.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None

    def begin(self) -> None:
        """Raises: OSError."""
        if self._path == STANDARD_OUTPUT:
            self._file = os.fdopen(1, "wb", buffering=0, closefd=False)
        else:
            self._path.touch(mode=0o600)  # of the owner alone: names and addresses are in it
            self._file = self._path.open("ab", buffering=0)

    def append(self, lines: Sequence[str]) -> None:
        """Whole lines in one write, so that those of several workers do not mix.

        Raises:
            OSError: they are not all there.
        """
        if self._file is None or self._is_another():
            self.close()
            self.begin()
        assert self._file is not None
        rest = memoryview("".join(f"{line}\n" for line in lines).encode())
        while rest:
            rest = rest[self._file.write(rest) or 0 :]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _is_another(self) -> bool:
        """Whether another file has the name by now, or none."""
        assert self._file is not None
        if self._path == STANDARD_OUTPUT:
            return False
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True


class AuditLog:
    """One for each worker; `open_audit` makes it."""

    def __init__(self, file: AuditFile) -> None:
        self._file = file
        self._lines: list[str] = []
        self._writing: asyncio.Task[None] | None = None
        self._gate = RateGate(_REFUSALS_PER_SECOND)
        self._lost = 0

    def request_begins(self) -> None:
        """What the current task serves from here is another request, of the same connection perhaps."""
        _login.set(None)

    def request_ends(self, method: str, path: str, status: int) -> None:
        """Record what a request tried in vain, and with what credentials it came.

        Args:
            path: as the client wrote it, without the query: that may hold a secret.
        """
        login = _login.get()
        request = _who() | {
            "method": method[:_METHOD_LENGTH_MAX],
            "path": path[:_TEXT_LENGTH_MAX],
        }
        now = {"time": _timestamp(time.time())}
        if login is not None:
            scheme, is_good = login
            if is_good:
                self.record(now | {"action": "login", "scheme": scheme} | request)
            else:
                self.record_refusal(now | {"action": "login.refused", "scheme": scheme} | request)
        if status == 403:
            self.record_refusal(now | {"action": "denied"} | request)

    async def tell(self, action: str, **details: object) -> None:
        """Record what the current request did and will acknowledge, that is no change of a repository; returns as `written`."""
        self.record({"time": _timestamp(time.time()), "action": action} | details | _who())
        await self.written()

    def record(self, document: dict[str, Any]) -> None:
        """Write a line soon; what is empty is left out."""
        if len(self._lines) >= _WAITING_MAX:
            self._lost += 1
            return
        self._lines.append(json.dumps({name: value for name, value in document.items() if value != ""}))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write(), name="audit")

    def record_refusal(self, document: dict[str, Any]) -> None:
        """The same; but of a flood only some, with how many were left out."""
        if self._gate.admit(time.time()):
            suppressed = self._gate.take_held()
            self.record(document | ({"suppressed": suppressed} if suppressed else {}))

    async def written(self) -> None:
        """Wait until what was recorded is written, or cannot be; not longer than ten seconds."""
        if self._writing is None:
            return
        try:
            async with asyncio.timeout(_WRITE_WAIT_S):
                await asyncio.shield(self._writing)
        except TimeoutError:
            log_event(logger, logging.ERROR, "audit.late", lines=len(self._lines))

    async def _write(self) -> None:
        while self._lines:
            lines, self._lines = self._lines, []
            lost, self._lost = self._lost, 0
            try:
                await asyncio.to_thread(self._file.append, lines)
            except OSError as error:
                lost += len(lines)
                reason = error.strerror or str(error)
                log_event(logger, logging.ERROR, "audit.lost", lines=lost, reason=reason)
            else:
                if lost:
                    log_event(logger, logging.ERROR, "audit.lost", lines=lost, reason="too many waited")
        self._writing = None


@asynccontextmanager
async def open_audit(path: Path | None) -> AsyncIterator[AuditLog | None]:
    """None where none is configured.

    Raises:
        OSError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    file = AuditFile(path)
    await asyncio.to_thread(file.begin)
    audit = AuditLog(file)
    try:
        yield audit
    finally:
        await audit.written()
        await asyncio.to_thread(file.close)


class AuditedJournal(Journal):
    """A journal whose entries are in the audit log, too, before what they tell is acknowledged.

    So are those that could not be written: what they tell was done.
    """

    def __init__(self, backend: StorageBackend, audit: AuditLog) -> None:
        super().__init__(backend)
        self._audit = audit

    async def _write(self, batch: Batch) -> None:
        try:
            await super()._write(batch)
        finally:
            for change in batch.changes:
                self._audit.record(change.to_json())
            await self._audit.written()


class AuditedLogins:
    """Notes what the credentials of a request were, for `AuditLog.request_ends`, and tells the observer that it stands before."""

    def __init__(self, observer: LoginObserver) -> None:
        self._observer = observer

    def login(self, method: str, *, is_good: bool) -> None:
        _login.set((method, is_good))
        self._observer.login(method, is_good=is_good)

    def auth_source(self, source: str, *, is_stale: bool) -> None:
        self._observer.auth_source(source, is_stale=is_stale)


def _who() -> dict[str, Any]:
    """Who is behind the current request."""
    actor = acting.get()
    return {
        "actor": actor.name,
        "address": actor.address,
        "agent": actor.agent[:_TEXT_LENGTH_MAX],
        "request": request_id.get(),
    }


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
