"""Notifications: endpoints are told of every write, from the journal: after it was done, at least once, in order.

    journal/…                              what they are told of; nothing else is a queue
    journal-marks/notifications-<name>     up to where: the journal's trimming stops there
    journal-marks/notifications-<name>.lease   who delivers (lease.py), and exactly up to where

For each endpoint one worker of all replicas delivers, one event after the other; the next is sent when the endpoint has taken the last.
What it has not taken is tried again for ever, more and more slowly; other endpoints have readers of their own and wait for nobody.

**Order.** A write that was acknowledged before another began stands before it in the journal, as far as clocks agree, but a listing that
takes a moment may have passed its place when it comes, and show the later one alone. So what is younger than `SETTLED_S` is delivered up to
where the look before had come: whatever was acknowledged before that began is then there as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
from collections.abc import Mapping
from typing import Any, Final, Protocol, Self

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from registry import layout
from registry.config import Config
from registry.event_sinks import DeliveryFailed, Event, HttpSink, Place, Sink, events_of
from registry.journal import Change, Journal
from registry.lease import RENEW_S, LeaseTaken, RecordLease
from registry.logs import log_event
from registry.notifications_config import Endpoint
from storage_backends.interface import StorageBackend, StorageError

logger = logging.getLogger(__name__)

# Entries of one look; the rest has to wait for the next.
_ENTRIES_MAX: Final = 1000
# Whoever does not deliver looks so often whether somebody still does.
_ACQUIRE_INTERVAL_S: Final = RENEW_S
# What was delivered is noted at most so often: a write for each event would cost more than the event.
_NOTE_INTERVAL_S: Final = 1.0
_MARK_INTERVAL_S: Final = 60.0
_BACKOFF_MAX_S: Final = 300.0
# A lease's record holds no more; an event whose name fell out may come again after a crash.
_NOTED_MAX: Final = 200
_NAME_LENGTH: Final = 12


class DeliveryObserver(Protocol):
    """Counts what is delivered."""

    def events_waiting(self, endpoint: str, entries: int) -> None:
        """There are so many entries of the journal that the endpoint was not told of; of more than 1000 there are said to be 1000."""
        ...

    def event_sent(self, endpoint: str, status: int) -> None: ...

    def event_failed(self, endpoint: str, status: int | None) -> None:
        """An attempt failed.

        Args:
            status: None where there was no answer.
        """
        ...


class Cursor:
    """What one endpoint was told of: everything up to `after`, and of what is behind it the entries that were noted."""

    def __init__(self, after: str) -> None:
        self.after = after
        self._noted: dict[str, str] = {}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        cursor = cls(str(document["after"]))
        names, until = str(document["noted"]), str(document["until"])
        for start in range(0, len(names), _NAME_LENGTH):
            # Which of them is behind `after` cannot be told any more; that the last one is, can.
            cursor._noted[names[start : start + _NAME_LENGTH]] = until
        return cursor

    def to_json(self) -> dict[str, Any]:
        noted = list(self._noted)[-_NOTED_MAX:]
        return {
            "after": self.after,
            "until": max(self._noted.values(), default=self.after),
            "noted": "".join(noted),
        }

    def has(self, key: str) -> bool:
        return key <= self.after or _short_name(key) in self._noted

    def note(self, key: str) -> None:
        """The endpoint was told of this entry."""
        self._noted[_short_name(key)] = key

    def move(self, after: str) -> None:
        """The endpoint was told of everything up to here."""
        if after > self.after:
            self.after = after
            self._noted = {name: key for name, key in self._noted.items() if key > after}


class Deliverer:
    """Tells one endpoint. Each worker has one for each endpoint; all but one of them wait.

    Args:
        interval_s: between two looks.
    """

    def __init__(
        self,
        backend: StorageBackend,
        journal: Journal,
        endpoint: Endpoint,
        sink: Sink,
        *,
        place: Place,
        observer: DeliveryObserver,
        interval_s: float,
    ) -> None:
        self._journal = journal
        self._endpoint = endpoint
        self._sink = sink
        self._place = place
        self._observer = observer
        self._interval_s = interval_s
        self._reader = f"notifications-{endpoint.name}"
        self._lease = RecordLease(
            backend,
            layout.journal_mark_key(f"{self._reader}.lease"),
            what=f"notifies {endpoint.name}",
        )
        self._cursor = Cursor("")
        self._is_noted = True
        self._shown = ""  # the last key of the look before
        self._marked_at = float("-inf")
        self._marked = ""
        self._failures = 0

    @property
    def name(self) -> str:
        return self._endpoint.name

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._lease.acquire()
                await self._deliver_while_held()
            except LeaseTaken:
                pass
            except StorageError as error:
                log_event(
                    logger,
                    logging.WARNING,
                    "notifications.interrupted",
                    endpoint=self.name,
                    reason=str(error),
                )
            await asyncio.sleep(_ACQUIRE_INTERVAL_S * random.uniform(0.5, 1.0))  # noqa: S311 - no secret

    async def _deliver_while_held(self) -> None:
        """Raises: LeaseTaken, StorageError."""
        await self._take_up()
        try:
            while True:
                is_more = await self._look()
                await self._note()
                if not is_more:
                    await asyncio.sleep(self._interval_s)
        finally:
            self._observer.events_waiting(self.name, 0)
            self._lease.state = self._cursor.to_json()
            await self._lease.give_up()

    async def _take_up(self) -> None:
        """Go on where the last holder was, or begin with what comes from now on."""
        self._shown = ""
        if self._lease.state is not None:
            self._cursor = Cursor.from_json(self._lease.state)
            # A mark that is written again where nothing was delivered would keep the journal for ever.
            self._marked = self._cursor.after
            return
        marked = await self._journal.marked(self._reader)
        self._marked = marked or ""
        self._cursor = Cursor(self._journal.settled() if marked is None else marked)
        if marked is None:
            async for key in self._journal.entries(after=self._cursor.after):
                self._cursor.note(key)
        self._is_noted = False
        await self._note()

    async def _look(self) -> bool:
        """Deliver what is due; whether there is more to look at already."""
        settled = self._journal.settled()
        keys: list[str] = []
        shown = ""
        async for key in self._journal.entries(after=self._cursor.after):
            shown = key
            if not self._cursor.has(key):
                keys.append(key)
                if len(keys) == _ENTRIES_MAX:
                    break
        due = [key for key in keys if key <= max(settled, self._shown)]
        self._shown = shown
        for number, key in enumerate(due):
            self._observer.events_waiting(self.name, len(keys) - number)
            await self._deliver_entry(key)
            self._cursor.note(key)
            self._is_noted = False
            if key <= settled:
                self._cursor.move(key)
            await self._note()
        self._observer.events_waiting(self.name, len(keys) - len(due))
        is_more = len(keys) == _ENTRIES_MAX
        # Nothing will come in before `settled`, and what was there has been delivered.
        self._cursor.move(min(settled, keys[-1]) if is_more else settled)
        return is_more

    async def _deliver_entry(self, key: str) -> None:
        for change in await self._journal.read(key):
            for event in self._wanted(change, key):
                await self._deliver(event)

    def _wanted(self, change: Change, key: str) -> list[Event]:
        ignored = self._endpoint.ignored_media_types
        if change.action in self._endpoint.ignore.actions:
            return []
        events = events_of(change, instance=_writer_of(key), place=self._place)
        return [event for event in events if event.media_type not in ignored]

    async def _deliver(self, event: Event) -> None:
        """Tell the endpoint until it has taken the event.

        Raises:
            LeaseTaken, StorageError: somebody else goes on, or nobody can.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(DeliveryFailed),
            wait=self._wait_s,
            sleep=self._sleep,
            before_sleep=self._note_failure,
        )
        async for attempt in retrying:
            with attempt:
                await self._note()
                status = await self._sink.deliver(event)
                self._observer.event_sent(self.name, status)
        if self._failures:
            log_event(
                logger,
                logging.INFO,
                "notifications.recovered",
                endpoint=self.name,
                attempts=self._failures + 1,
            )
            self._failures = 0

    def _wait_s(self, state: RetryCallState) -> float:
        """At once until `threshold` attempts have failed, then after `backoff`, and twice as long each time."""
        late = state.attempt_number - self._endpoint.threshold
        backoff = self._endpoint.backoff
        return 0.0 if late < 0 else min(backoff * 2.0 ** min(late, 32), max(backoff, _BACKOFF_MAX_S))

    def _note_failure(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        assert isinstance(error, DeliveryFailed)
        self._failures = state.attempt_number
        self._observer.event_failed(self.name, error.status)
        log_event(
            logger,
            logging.WARNING,
            "notifications.failed",
            endpoint=self.name,
            reason=str(error),
            attempt=self._failures,
        )

    async def _sleep(self, seconds: float) -> None:
        """And keep the lease meanwhile."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        while (rest := ends - loop.time()) > 0:
            await asyncio.sleep(min(rest, RENEW_S))
            await self._note()

    async def _note(self) -> None:
        """Keep the lease, and with it what the endpoint was told of; the mark now and then.

        Raises:
            LeaseTaken, StorageError
        """
        self._lease.state = self._cursor.to_json()
        if await self._lease.renew(after_s=RENEW_S if self._is_noted else _NOTE_INTERVAL_S):
            self._is_noted = True
        now = asyncio.get_running_loop().time()
        if self._cursor.after != self._marked and now - self._marked_at >= _MARK_INTERVAL_S:
            await self._journal.mark(self._reader, self._cursor.after)
            self._marked, self._marked_at = self._cursor.after, now


class _Unobserved:
    """Counts nothing."""

    def events_waiting(self, endpoint: str, entries: int) -> None:
        pass

    def event_sent(self, endpoint: str, status: int) -> None:
        pass

    def event_failed(self, endpoint: str, status: int | None) -> None:
        pass


def make_deliverers(
    config: Config, backend: StorageBackend, journal: Journal, observer: DeliveryObserver | None = None
) -> list[Deliverer]:
    """One for each endpoint that is not disabled; each wants to `run`."""
    place = place_of(config)
    return [
        Deliverer(
            backend,
            journal,
            endpoint,
            HttpSink(endpoint, place),
            place=place,
            observer=observer or _Unobserved(),
            interval_s=config.journal.poll,
        )
        for endpoint in config.notifications.endpoints
        if not endpoint.disabled
    ]


def place_of(config: Config) -> Place:
    """Where events say that the registry is: what the operator says; no event has the `Host` of a request."""
    host = config.http.host
    if host is None:
        return Place("", config.http.addr)
    return Place(f"{host}{config.http.prefix}", host.partition("://")[2])


def _writer_of(key: str) -> str:
    """The worker that wrote an entry of the journal: another one after each start."""
    return key.rpartition("-")[2][:16]


def _short_name(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=_NAME_LENGTH // 2).hexdigest()
