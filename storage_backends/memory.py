"""Objects in the memory of one process: the model that tests compare with, and a registry that forgets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from storage_backends.checks import check_key, check_note, check_prefix, check_upload_id, checked_span
from storage_backends.interface import (
    BlockingSource,
    ByteStream,
    Leftover,
    ObjectInfo,
    ObjectMissing,
    ObjectTooLarge,
    Observer,
    PreconditionFailed,
    SpanChoice,
    StorageBackend,
    Stray,
    Upload,
    UploadBusy,
    UploadInfo,
    UploadMissing,
)
from storage_backends.threads import Threads

_CHUNK_SIZE = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Object:
    content: bytes
    info: ObjectInfo


@dataclass(slots=True)
class _Content:
    """An upload's bytes, shared by all who took it up."""

    note: bytes
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    generation: int = 0
    modified: float = field(default_factory=time.time)
    is_busy: bool = False


class MemoryBackend:
    source_appends_max = 0

    def __init__(self) -> None:
        self._objects: dict[str, _Object] = {}
        self._uploads: dict[str, _Content] = {}
        self._versions = count(1)
        self._threads = Threads(2, "memory")

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        self._threads.close()

    async def probe(self) -> None:
        pass

    async def stat(self, key: str) -> ObjectInfo:
        return self._object(key).info

    def now(self) -> float:
        return time.time()

    def version_at_once(self, key: str) -> str | None:
        check_key(key)
        return self._objects[key].info.version if key in self._objects else ""

    async def read(self, key: str, *, size_max: int) -> tuple[bytes, ObjectInfo]:
        found = self._object(key)
        if found.info.size > size_max:
            raise ObjectTooLarge(f"{key} has {found.info.size} bytes, at most {size_max} were wanted")
        return found.content, found.info

    @asynccontextmanager
    async def deliver(
        self, key: str, span: SpanChoice = None, *, url_size_min: int | None = None
    ) -> AsyncIterator[ByteStream]:
        del url_size_min  # nobody else can read this memory
        found = self._object(key)
        wanted = checked_span(span, found.info.size)

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(wanted.start, wanted.stop, _CHUNK_SIZE):
                yield found.content[start : min(start + _CHUNK_SIZE, wanted.stop)]

        yield ByteStream(chunks(), wanted, found.info.size)

    async def write(self, key: str, content: bytes, *, expect: str | None = None) -> ObjectInfo:
        check_key(key)
        found = self._objects.get(key)
        version = "" if found is None else found.info.version
        if expect is not None and expect != version:
            raise PreconditionFailed(f"{key} is not the expected version")
        return self._put(key, bytes(content))

    async def create(self, key: str, content: bytes) -> ObjectInfo:
        return await self.write(key, content, expect="")

    async def touch(self, key: str) -> ObjectInfo:
        return self._put(key, self._object(key).content)

    async def delete(self, key: str, *, expect: str | None = None) -> None:
        check_key(key)
        found = self._objects.get(key)
        if found is None:
            return
        if expect is not None and expect != found.info.version:
            raise PreconditionFailed(f"{key} is not the expected version")
        del self._objects[key]

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[ObjectInfo]:
        check_prefix(prefix)
        for key in sorted(key for key in self._objects if key.startswith(prefix) and key > after):
            found = self._objects.get(key)
            if found is not None:
                yield found.info

    async def begin_upload(self, upload_id: str, *, note: bytes = b"") -> Upload:
        check_upload_id(upload_id)
        check_note(note)
        if upload_id in self._uploads:
            raise ValueError(f"the upload {upload_id} was begun before")
        self._uploads[upload_id] = _Content(note)
        return _MemoryUpload(self, upload_id, self._uploads[upload_id])

    async def resume_upload(self, upload_id: str) -> Upload:
        check_upload_id(upload_id)
        content = self._uploads.get(upload_id)
        if content is None:
            raise UploadMissing(f"no upload {upload_id}")
        return _MemoryUpload(self, upload_id, content)

    async def sweep(self, *, age_s: float, dry_run: bool = False) -> AsyncIterator[Leftover]:
        """What crashes is gone whole."""
        del age_s, dry_run
        leftovers: tuple[Leftover, ...] = ()
        for leftover in leftovers:
            yield leftover

    async def strays(self) -> AsyncIterator[Stray]:
        strays: tuple[Stray, ...] = ()
        for stray in strays:
            yield stray

    async def uploads(self) -> AsyncIterator[UploadInfo]:
        for upload_id, content in list(self._uploads.items()):
            yield UploadInfo(upload_id, content.size, content.modified)

    def _object(self, key: str) -> _Object:
        check_key(key)
        found = self._objects.get(key)
        if found is None:
            raise ObjectMissing(f"no object {key}")
        return found

    def _put(self, key: str, content: bytes) -> ObjectInfo:
        if any(f"{key[:index]}" in self._objects for index, byte in enumerate(key) if byte == "/"):
            raise ValueError(f"a component above {key} is an object")
        info = ObjectInfo(key, len(content), str(next(self._versions)), time.time())
        self._objects[key] = _Object(content, info)
        return info


class _MemoryUpload:
    """As this holder saw it when it was begun or taken up; who was overtaken by another holder is told `UploadBusy`."""

    def __init__(self, backend: MemoryBackend, upload_id: str, content: _Content) -> None:
        self._backend = backend
        self._id = upload_id
        self._content = content
        self._see()

    def _see(self) -> None:
        self._offset = self._content.size
        self._note = self._content.note
        self._generation = self._content.generation

    @property
    def id(self) -> str:
        return self._id

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def note(self) -> bytes:
        return self._note

    async def is_idle(self) -> bool:
        return not self._content.is_busy

    async def append(
        self,
        chunks: AsyncIterable[bytes] | BlockingSource,
        *,
        observe: Observer,
        note: Callable[[], bytes],
        size: int | None = None,
        last: bool = False,
    ) -> int:
        del size, last
        if not isinstance(chunks, AsyncIterable):
            raise TypeError("this backend takes no BlockingSource")
        self._claim()
        content = self._content
        content.is_busy = True
        pieces: list[bytes] = []
        try:
            async for chunk in chunks:
                pieces.append(bytes(chunk))
                await self._backend._threads.run(observe, pieces[-1])
        finally:
            content.is_busy = False
            kept = note()
            check_note(kept)
            content.note = kept
            content.pieces += pieces
            content.size += sum(map(len, pieces))
            content.generation += 1
            content.modified = time.time()
            self._see()
        return self._offset

    async def replay(self) -> AsyncIterator[bytes]:
        self._claim()
        for piece in list(self._content.pieces):
            yield piece
            await asyncio.sleep(0)

    async def commit(self, key: str) -> ObjectInfo:
        check_key(key)
        self._claim()
        existing = self._backend._objects.get(key)
        content = existing.content if existing else b"".join(self._content.pieces)
        info = self._backend._put(key, content)
        del self._backend._uploads[self._id]
        return info

    async def abort(self) -> None:
        if self._backend._uploads.get(self._id) is self._content:
            if self._content.is_busy:
                raise UploadBusy(f"somebody is appending to the upload {self._id}")
            del self._backend._uploads[self._id]

    def _claim(self) -> None:
        if self._backend._uploads.get(self._id) is not self._content:
            raise UploadMissing(f"no upload {self._id}")
        if self._content.is_busy or self._content.generation != self._generation:
            raise UploadBusy(f"somebody else is appending to the upload {self._id}")


_: type[StorageBackend] = MemoryBackend
__: type[Upload] = _MemoryUpload
