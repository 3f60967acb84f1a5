"""A lease: of all workers and replicas one does something, for as long as it says so twice a minute.

It saves work, or repetition. Nothing may rest on there being one only: whoever was held up for longer than `LEASE_S` takes itself
for the holder until it writes the next time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from registry.logs import log_event
from storage_backends.interface import ObjectInfo, ObjectMissing, PreconditionFailed, StorageBackend

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_S: Final = 90.0
RENEW_S: Final = LEASE_S / 3
RECORD_SIZE_MAX: Final = 4096
# Clocks that tell the store's time may be this far off.
_CLOCK_DOUBT_S: Final = 5.0


class LeaseTaken(Exception):
    """Somebody else holds it, or took it over."""


class RecordLease:
    """One record, `{"holder", "finished", "nonce", "state"}`, rewritten while it is held.

    Args:
        what: the holder does, for messages: "collects this storage".
        taken: what is raised when it is somebody else's.

    Attributes:
        state: JSON that is kept in the record, for the next holder too; None for none. Read by `acquire`, written by whatever
            writes the record. All in all a record has at most `RECORD_SIZE_MAX` bytes.
    """

    def __init__(
        self, backend: StorageBackend, key: str, *, what: str, taken: type[LeaseTaken] = LeaseTaken
    ) -> None:
        self.state: dict[str, Any] | None = None
        self._backend = backend
        self._key = key
        self._what = what
        self._taken = taken
        self._holder = secrets.token_hex(8)
        self._version = ""
        self._renewed = 0.0
        self._finished: float | None = None

    async def acquire(self) -> None:
        """Become the holder; who was it until now and could not give it up may as well.

        Raises:
            LeaseTaken: somebody else is.
        """
        holder, info = await self._read()
        is_other = holder not in ("", self._holder)
        if is_other and info is not None and self._backend.now() < info.modified + LEASE_S + _CLOCK_DOUBT_S:
            raise self._taken(f"another process {self._what} right now")
        self._version = "" if info is None else info.version
        await self._write(self._holder)

    async def finished(self) -> float | None:
        """When a holder was done last (`finish`), by the store's clock."""
        await self._read()
        return self._finished

    async def renew(self, *, after_s: float = RENEW_S) -> bool:
        """Keep it, and `state` with it, if that was not done for `after_s`; whether it was now.

        Raises:
            LeaseTaken: it was taken over, by somebody who thought us dead.
        """
        if self._now() - self._renewed < after_s:
            return False
        await self._write(self._holder)
        return True

    async def while_held(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something that may take long at any step, and keep the lease meanwhile. Where that cannot be done the work is cancelled.

        Raises:
            LeaseTaken: it was taken over.
            StorageError: nobody can tell whose it is.
        """
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait([task], timeout=RENEW_S))[0]:
                await self.renew(after_s=0)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def finish(self) -> None:
        """Give it up: what it was for is done."""
        self._finished = self._backend.now()
        await self._write("")

    async def give_up(self) -> None:
        """Give it up with the work not done: anybody may go on with it at once. Nothing is, where somebody has taken it over."""
        try:
            await asyncio.shield(self._write(""))
        except LeaseTaken:
            pass
        except Exception as error:  # noqa: BLE001 - it runs out by itself
            log_event(logger, logging.WARNING, "lease.kept", key=self._key, reason=str(error))

    async def _read(self) -> tuple[str, ObjectInfo | None]:
        try:
            content, info = await self._backend.read(self._key, size_max=RECORD_SIZE_MAX)
        except ObjectMissing:
            return "", None
        document = json.loads(content)
        self._finished, self.state = document["finished"], document.get("state")
        return document["holder"], info

    async def _write(self, holder: str) -> None:
        document: dict[str, Any] = {
            "holder": holder,
            "finished": self._finished,
            "nonce": secrets.token_hex(8),
        }
        if self.state is not None:
            document["state"] = self.state
        try:
            info = await self._backend.write(self._key, json.dumps(document).encode(), expect=self._version)
        except PreconditionFailed as error:
            raise self._taken(f"another process {self._what} now: it took this one for dead") from error
        self._version = info.version
        self._renewed = self._now()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
