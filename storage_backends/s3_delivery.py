"""Content on its way out of a bucket: as a URL that the store answers, from memory, or streamed.

Where content is, is remembered for a while, and small content with it: its pointer is not asked for again by every reader. That is
safe because the bytes of what was deleted stay in the bucket for `trash_delay_s`, which is longer than what is remembered, and
longer than any URL that is handed out. Nothing here tells whether an object exists: who decides what to write asks the store.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

from storage_backends.checks import checked_span
from storage_backends.interface import (
    BlockingSink,
    ByteStream,
    ObjectMissing,
    PreconditionFailed,
    PresignedUrl,
    Span,
    SpanChoice,
    StorageUnavailable,
)
from storage_backends.s3_client import S3Client, S3Settings
from storage_backends.s3_format import POINTER, Found, Segment
from storage_backends.s3_records import Records
from storage_backends.s3_stream import Drainers, SegmentStream
from storage_backends.threads import Threads

# Configurations of models and images are smaller; what is larger costs its bytes more than a request.
_SMALL_SIZE_MAX: Final = 64 * 1024
# Bytes per process of what is remembered, small content included.
_MEMORY_MAX: Final = 4 * 1024 * 1024
# Of an entry without segments and content, and of each segment (measured with tracemalloc).
_PLACE_WEIGHT: Final = 900
_SEGMENT_WEIGHT: Final = 300
# At most a minute, and never so long that a URL made of it could outlive the bytes.
_REMEMBER_S_MAX: Final = 60.0
_REMEMBER_SHARE: Final = 4
# Of what others rewrite while it is read: they touch a pointer every few hours, a record seldom.
_TRIES: Final = 8
# Clients may be slow. Others than these get their bytes by way of the event loop.
_DRAINERS: Final = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object's bytes are.

    Attributes:
        is_whole: the first and only segment is an object that holds exactly these bytes.
        content: the bytes themselves, if they were read.
    """

    key: str
    segments: tuple[Segment, ...]
    size: int
    is_whole: bool
    content: bytes | None = None

    @property
    def weight(self) -> int:
        return _PLACE_WEIGHT + _SEGMENT_WEIGHT * len(self.segments) + len(self.content or b"")


class Places:
    """What is remembered, the least recently used forgotten first.

    Args:
        remember_s: for how long; 0 for not at all.
    """

    def __init__(self, remember_s: float, *, weight_max: int = _MEMORY_MAX) -> None:
        self._remember_s = remember_s
        self._weight_max = weight_max
        self._weight = 0
        self._places: OrderedDict[str, tuple[float, Place]] = OrderedDict()

    def get(self, key: str) -> Place | None:
        if key not in self._places:
            return None
        until, place = self._places[key]
        if _now() >= until:
            self.forget(key)
            return None
        self._places.move_to_end(key)
        return place

    def add(self, place: Place, *, seen: float) -> None:
        """
        Args:
            seen: when the store was asked, as `_now` tells.
        """
        self.forget(place.key)
        if self._remember_s == 0 or place.weight > self._weight_max:
            return
        self._places[place.key] = (seen + self._remember_s, place)
        self._weight += place.weight
        while self._weight > self._weight_max:
            self.forget(next(iter(self._places)))

    def fill(self, place: Place, content: bytes) -> None:
        """Keep the bytes of a place that is remembered, for as long as it is."""
        if (entry := self._places.get(place.key)) is not None and entry[1] is place:
            self.add(replace(place, content=content), seen=entry[0] - self._remember_s)

    def forget(self, key: str) -> None:
        entry = self._places.pop(key, None)
        if entry is not None:
            self._weight -= entry[1].weight


class Deliveries:
    """
    Args:
        threads: for small requests.
        readers: for content.
    """

    def __init__(
        self, client: S3Client, records: Records, threads: Threads, readers: Threads, settings: S3Settings
    ) -> None:
        self._client = client
        self._records = records
        self._threads = threads
        self._readers = readers
        self._drainers = Drainers(_DRAINERS)
        remember_s = min(_REMEMBER_S_MAX, settings.trash_delay_s / _REMEMBER_SHARE)
        self._places = Places(remember_s)
        # Whoever holds a URL reads until it expires, also when the content is deleted the moment after.
        self._url_life_s = int(min(settings.url_life_s, settings.trash_delay_s - remember_s))

    def close(self) -> None:
        self._drainers.close()

    def forget(self, key: str) -> None:
        """Ask the store the next time: something else is at `key`, or nothing."""
        self._places.forget(key)

    @asynccontextmanager
    async def deliver(
        self, key: str, choice: SpanChoice, url_size_min: int | None
    ) -> AsyncIterator[ByteStream | PresignedUrl]:
        """See `StorageBackend.deliver`."""
        delivery, stream = await self._begin(key, choice, url_size_min)
        try:
            yield delivery
        finally:
            if stream is not None:
                await stream.close()

    async def read(self, found: Found) -> bytes:
        """The bytes of an object that was just looked at, whole: for little."""
        place = await self._threads.run(self._place_of, found)
        return await self._read_whole(place)

    async def _begin(
        self, key: str, choice: SpanChoice, url_size_min: int | None
    ) -> tuple[ByteStream | PresignedUrl, SegmentStream | None]:
        if (remembered := self._places.get(key)) is not None:
            with suppress(ObjectMissing):
                return await self._open(remembered, choice, url_size_min)
        for _ in range(_TRIES):
            with suppress(PreconditionFailed):
                return await self._look_and_open(key, choice, url_size_min)
        raise StorageUnavailable(f"{key} is rewritten by others all the time")

    async def _look_and_open(
        self, key: str, choice: SpanChoice, url_size_min: int | None
    ) -> tuple[ByteStream | PresignedUrl, SegmentStream | None]:
        """Raises: PreconditionFailed: it was rewritten between two requests."""
        seen = _now()
        place = await self._threads.run(self._look, key)
        # Records change, and are small.
        if place.is_whole or len(place.segments) != 1:
            self._places.add(place, seen=seen)
        try:
            return await self._open(place, choice, url_size_min)
        except ObjectMissing as error:
            self._places.forget(key)
            await self._threads.run(self._refuse_damaged, place)
            raise ObjectMissing(f"no object {key}") from error

    async def _open(
        self, place: Place, choice: SpanChoice, url_size_min: int | None
    ) -> tuple[ByteStream | PresignedUrl, SegmentStream | None]:
        """Raises: ObjectMissing: the bytes are not there."""
        span = checked_span(choice, place.size)
        if self._goes_as_url(place, url_size_min):
            # In a thread: where credentials are a role's, they may have to be fetched.
            url = await self._threads.run(self._client.url_of, place.segments[0].key, self._url_life_s)
            return PresignedUrl(url, place.size), None
        if place.size <= _SMALL_SIZE_MAX:
            content = place.content
            if content is None:
                content = await self._read_whole(place)
                self._places.fill(place, content)
            return ByteStream(_once(content[span.start : span.stop]), span, place.size), None
        stream = SegmentStream(self._client, self._readers, place.segments, span)
        try:
            await stream.begin()
        except BaseException:
            await stream.close()
            raise

        async def drain_into(sink: BlockingSink) -> bool:
            return await self._drainers.drain(stream, sink)

        return ByteStream(stream.chunks(), span, place.size, drain_into), stream

    def _goes_as_url(self, place: Place, size_min: int | None) -> bool:
        return size_min is not None and place.size >= size_min and place.is_whole and self._url_life_s > 0

    async def _read_whole(self, place: Place) -> bytes:
        stream = SegmentStream(self._client, self._readers, place.segments, Span(0, place.size))
        try:
            await stream.begin()
            return b"".join([chunk async for chunk in stream.chunks()])
        finally:
            await stream.close()

    def _look(self, key: str) -> Place:
        """Raises: ObjectMissing, PreconditionFailed."""
        return self._place_of(self._records.look(key))

    def _place_of(self, found: Found) -> Place:
        segments = self._records.segments(found)
        is_whole = found.tail.kind == POINTER and len(segments) == 1
        return Place(found.key, segments, found.tail.size, is_whole)

    def _refuse_damaged(self, place: Place) -> None:
        """Content whose pointer was deleted meanwhile may be gone; other content may not."""
        with suppress(ObjectMissing):
            if self._look(place.key).segments == place.segments:
                raise StorageUnavailable(f"the content of {place.key} is gone from the store: restore it")


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _once(content: bytes) -> AsyncIterator[bytes]:
    if content:
        yield content
