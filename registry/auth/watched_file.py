"""A file of the operator's that may change while we serve: users, keys, certificates.

What counts is its content: an editor that writes in place, a rename over it, and the swap of a symlink by which Kubernetes
updates a mounted secret are all the same. What cannot be read or parsed changes nothing: what was read last stays in
force, and an alert says so until the file is sound again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from registry.logs import log_event

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_INTERVAL_S: Final = 1.0
# A file that was written so shortly ago may be written once more without its times showing it.
_FRESH_NS: Final = 2_000_000_000

_Signature = tuple[int, int, int, int, int]


class FileUnusable(Exception):
    """A file cannot be read, or not be understood; the message says which, and why."""


class SourceObserver(Protocol):
    """Told how a source of users or keys is doing; `registry.metrics.Metrics` is one."""

    def auth_source(self, source: str, *, is_stale: bool) -> None: ...


class WatchedFile(Generic[T]):
    """The meaning of a file, as of a second ago.

    Args:
        source: what the file is, for logs and metrics: "htpasswd".
        parse: makes the meaning of the content; raises ValueError, whose message goes to the log, where it cannot.
        size_max: bytes; a larger file is unusable.
    """

    def __init__(
        self, path: Path, source: str, parse: Callable[[bytes], T], *, size_max: int, observer: SourceObserver
    ) -> None:
        self._path = path
        self._source = source
        self._parse = parse
        self._size_max = size_max
        self._observer = observer
        self._signature: _Signature | None = None
        self._content: bytes | None = None
        self._value: T | None = None
        self._problem = ""

    @property
    def value(self) -> T:
        """What the file meant when it was sound last. Between `start` and the end of the process."""
        assert self._value is not None
        return self._value

    async def start(self) -> None:
        """Read the file.

        Raises:
            FileUnusable: it is not sound: there is nothing yet that could stay in force.
        """
        await asyncio.to_thread(self._read)
        self._observer.auth_source(self._source, is_stale=False)

    async def watch(self) -> None:
        """Follow the file until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """See whether the file has changed, and take it over if so."""
        before = self._content
        try:
            await asyncio.to_thread(self._read)
        except FileUnusable as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log_event(
                    logger,
                    logging.ERROR,
                    "auth.source.unusable",
                    source=self._source,
                    problem=self._problem,
                    effect="what was read before stays in force",
                )
            self._observer.auth_source(self._source, is_stale=True)
            return
        if self._problem or self._content is not before:
            self._problem = ""
            log_event(logger, logging.INFO, "auth.source.read", source=self._source, path=str(self._path))
        self._observer.auth_source(self._source, is_stale=False)

    def _read(self) -> None:
        """Take the file over if it is another one than before. Blocks."""
        try:
            with self._path.open("rb") as file:
                signature = _signature_of(os.fstat(file.fileno()))
                if signature == self._signature:
                    return
                content = file.read(self._size_max + 1)
        except OSError as error:
            raise FileUnusable(f"{self._path}: cannot be read: {error.strerror}") from error
        if len(content) > self._size_max:
            raise FileUnusable(f"{self._path}: more than {self._size_max} bytes")
        if content != self._content:
            try:
                value = self._parse(content)
            except ValueError as error:
                raise FileUnusable(f"{self._path}: {error}") from error
            self._content, self._value = content, value
        self._signature = signature if time.time_ns() - signature[-1] > _FRESH_NS else None


def _signature_of(status: os.stat_result) -> _Signature:
    times = max(status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, times)
