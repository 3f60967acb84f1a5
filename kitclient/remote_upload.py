"""Uploads to a registry over HTTP: the session of the specification, and a whole blob by way of one.

A blob of up to 100 MiB goes in one PUT; a larger one in PATCHes of 100 MiB, as kit sends them: what an interruption
can cost is bounded on every registry, and proxies that limit a body let it through. After a break the registry is
asked how much it has. Where a session stands can be noted in a folder, so that a later process goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import aiohttp
from yarl import URL

from kitclient.blob_stream import BlobSource
from kitclient.errors import (
    AuthorizationRenewed,
    ClientError,
    RegistryUnreachable,
    ServerMisbehaved,
    TransportRefused,
)
from kitclient.origin import follow, is_same_origin
from kitclient.progress import BlobProgress, Silence
from kitclient.transport import Transport, parse_upload_offset
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUploadUnknown,
    DigestInvalid,
    OciError,
    RequestTimeout,
    ServerError,
    SizeInvalid,
    TooManyRequests,
    Unavailable,
    UploadOutOfOrder,
)
from kitspec.names import RepositoryName

CHUNK_SIZE = 100 * 1024 * 1024
# A stream whose caller wants its offset checked is sent in pieces that are held in memory.
_PIECE_SIZE = 8 * 1024 * 1024
_CHUNK_MIN_MAX = 1024 * 1024 * 1024
# These take no chunked upload, or a broken one (ECR answers 201 to a PATCH): a blob goes in one request.
_WHOLE_ONLY = re.compile(
    r"(?:.*\.)?(?:ghcr\.io|gcr\.io|pkg\.dev|amazonaws\.com|amazonaws\.com\.cn)", re.ASCII
)
_IDLE_TIMEOUT_S = 60.0
# The closing PUT may make a registry copy or hash the whole blob.
_COMMIT_TIMEOUT_S = 900.0
_PASSING = (RequestTimeout, TooManyRequests, Unavailable, ServerError, RegistryUnreachable)


class RemoteUpload:
    """An upload session."""

    def __init__(
        self, transport: Transport, name: RepositoryName, scope: str, url: URL, *, chunk_min: int = 0
    ) -> None:
        self._transport = transport
        self._name = name
        self._scope = scope
        self._url = url
        self._offset = 0
        self.chunk_min = chunk_min
        self._ended = False

    @classmethod
    async def begin(cls, transport: Transport, name: RepositoryName, scope: str) -> Self:
        url = transport.url(f"/v2/{name}/blobs/uploads/")
        async with transport.request("POST", url, scope=scope) as answer:
            upload = cls.of_answer(transport, name, scope, answer)
        if upload is None:
            raise ServerMisbehaved(f"{transport.host} began an upload without saying where")
        return upload

    @classmethod
    def of_answer(
        cls, transport: Transport, name: RepositoryName, scope: str, answer: aiohttp.ClientResponse
    ) -> Self | None:
        """The session that a 202 speaks of."""
        if answer.status != 202 or "Location" not in answer.headers:
            return None
        url = follow(answer.url, answer.headers["Location"], origin=transport.origin, what="upload location")
        text = answer.headers.get("OCI-Chunk-Min-Length", "")
        chunk_min = int(text) if re.fullmatch("[0-9]{1,18}", text, re.ASCII) else 0
        return cls(transport, name, scope, url, chunk_min=min(chunk_min, _CHUNK_MIN_MAX))

    @classmethod
    async def resume(cls, transport: Transport, name: RepositoryName, scope: str, location: str) -> Self:
        try:
            url = follow(transport.origin, location, origin=transport.origin, what="upload location")
        except ServerMisbehaved as error:
            raise BlobUploadUnknown("not the location of an upload") from error
        ours = is_same_origin(url, transport.origin)
        if ours and not url.path.startswith(f"/v2/{name}/blobs/uploads/"):
            raise BlobUploadUnknown(f"not an upload of {name}: {url.path[:300]!a}")
        upload = cls(transport, name, scope, url)
        await upload.ask_offset()
        return upload

    @property
    def location(self) -> str:
        return str(self._url)

    @property
    def offset(self) -> int:
        return self._offset

    async def ask_offset(self) -> int:
        """How much the registry has, by its own word."""
        async with self._transport.request(
            "GET", self._url, scope=self._scope, missing=(BlobUploadUnknown,)
        ) as answer:
            self._note(answer)
            self._offset = parse_upload_offset(answer.headers.get("Range", "")) or 0
        return self._offset

    async def append(self, chunks: AsyncIterable[bytes], *, at: int | None = None) -> int:
        if self._ended:
            raise BlobUploadUnknown("the upload has ended")
        if at is not None and at != self._offset:
            raise UploadOutOfOrder(f"the upload ends at {self._offset}, not at {at}", offset=self._offset)
        is_known = False
        try:
            if at is None:
                await self.patch(chunks)
            else:
                async for piece in _pieces(chunks, max(_PIECE_SIZE, self.chunk_min)):
                    await self._append_piece(piece)
            is_known = True
        finally:
            if not is_known:
                with contextlib.suppress(OciError, ClientError):
                    await self.ask_offset()
        return self._offset

    async def _append_piece(self, piece: bytes) -> None:
        """A piece that is held in memory: what of it has not arrived is sent again, as often as the policy allows.

        Raises:
            UploadOutOfOrder: somebody else appends, too; whose bytes those are is not to be guessed.
        """
        start, end = self._offset, self._offset + len(piece)
        tries = 0
        while self._offset < end:
            rest = piece[self._offset - start :]
            try:
                await self.patch(_once(rest), size=len(rest))
            except _PASSING as error:
                tries += 1
                await _pause(self._transport, error, tries)
                await self.ask_offset()
                if not start <= self._offset <= end:
                    raise

    async def patch(self, chunks: AsyncIterable[bytes], *, size: int | None = None) -> None:
        """One PATCH, tried once.

        Args:
            size: of `chunks`; with it the registry checks where they begin.
        """
        headers = {"Content-Type": "application/octet-stream"}
        if size is not None:
            headers["Content-Length"] = str(size)
            headers["Content-Range"] = f"{self._offset}-{self._offset + size - 1}"
        async with self._sending("PATCH", self._url, headers, chunks, _IDLE_TIMEOUT_S) as (answer, feed):
            self._note(answer)
            reached = parse_upload_offset(answer.headers.get("Range", ""))
            if reached is not None and reached not in {0, self._offset + feed.count}:
                self._offset = reached
                raise UploadOutOfOrder("the registry has not kept the whole chunk", offset=reached)
            self._offset += feed.count

    async def commit(self, digest: Digest) -> Descriptor:
        if self._ended:
            raise BlobUploadUnknown("the upload has ended")
        try:
            async with self._transport.request(
                "PUT",
                _with_digest(self._url, digest),
                scope=self._scope,
                headers={"Content-Length": "0"},
                missing=(BlobUploadUnknown,),
                idle_s=_COMMIT_TIMEOUT_S,
            ) as answer:
                check_created(self._transport, answer, digest)
        except DigestInvalid:
            # Some registries keep the session: nobody can use it any more.
            await self.cancel()
            raise
        self._ended = True
        return Descriptor("application/octet-stream", digest, self._offset)

    async def put_whole(self, chunks: AsyncIterable[bytes], blob: Descriptor) -> None:
        """The only request of a session: all bytes and the digest; tried once."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
        url = _with_digest(self._url, blob.digest)
        async with self._sending("PUT", url, headers, chunks, _COMMIT_TIMEOUT_S) as (answer, _):
            check_created(self._transport, answer, blob.digest)

    async def cancel(self) -> None:
        if not self._ended:
            self._ended = True
            with contextlib.suppress(OciError, ClientError):
                async with self._transport.request("DELETE", self._url, scope=self._scope, retry=False):
                    pass

    @asynccontextmanager
    async def _sending(
        self, method: str, url: URL, headers: dict[str, str], chunks: AsyncIterable[bytes], idle_s: float
    ) -> AsyncIterator[tuple[aiohttp.ClientResponse, _Feed]]:
        """A request with a body; an error of `chunks` comes out as itself, and a peer that stops reading as a timeout."""
        feed = _Feed(chunks)
        try:
            async with asyncio.timeout(_IDLE_TIMEOUT_S) as limit:
                feed.limit, feed.idle_s = limit, idle_s
                async with self._transport.request(
                    method,
                    url,
                    scope=self._scope,
                    headers=headers,
                    body=feed.body,
                    missing=(BlobUploadUnknown,),
                    retry=False,
                    idle_s=idle_s,
                ) as answer:
                    feed.limit = None
                    yield answer, feed
        except TimeoutError as error:
            raise RegistryUnreachable(f"{self._transport.host} stopped taking what is sent") from error
        except RegistryUnreachable:
            if feed.error is not None:
                raise feed.error from None
            raise

    def _note(self, answer: aiohttp.ClientResponse) -> None:
        """Some registries give a session a new address after each request."""
        if "Location" in answer.headers and answer.status != 201:
            self._url = follow(
                answer.url, answer.headers["Location"], origin=self._transport.origin, what="upload location"
            )


class UploadNotes:
    """Where begun uploads go on, kept in a folder between processes; in None, nowhere.

    A location may hold a registry's session state, so the files are for their owner only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    async def read(self, host: str, name: RepositoryName, digest: Digest) -> str | None:
        path = self._path(host, name, digest)
        return None if path is None else await asyncio.to_thread(_read_note, path)

    async def write(self, host: str, name: RepositoryName, digest: Digest, location: str) -> None:
        path = self._path(host, name, digest)
        if path is not None:
            await asyncio.to_thread(_write_note, path, location)

    async def forget(self, host: str, name: RepositoryName, digest: Digest) -> None:
        path = self._path(host, name, digest)
        if path is not None:
            await asyncio.to_thread(path.unlink, missing_ok=True)

    def _path(self, host: str, name: RepositoryName, digest: Digest) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / hashlib.sha256(f"{host}/{name}@{digest}".encode()).hexdigest()


class BlobPush:
    """One blob of known digest on its way to a registry, with as many tries as the policy allows without progress."""

    def __init__(
        self,
        transport: Transport,
        name: RepositoryName,
        scope: str,
        blob: Descriptor,
        read: BlobSource,
        *,
        progress: BlobProgress | None,
        notes: UploadNotes,
    ) -> None:
        self._transport = transport
        self._name = name
        self._scope = scope
        self._blob = blob
        self._read = read
        self._progress = progress or Silence()
        self._notes = notes
        self._reported = 0
        self._tries = 0

    async def run(self) -> None:
        """Store the blob.

        Raises:
            DigestInvalid: what `read` gives is not the blob.
            OciError, ClientError: what the last try met.
        """
        whole = self._blob.size <= CHUNK_SIZE or _WHOLE_ONLY.fullmatch(self._transport.host.partition(":")[0])
        if whole:
            await self._push_whole()
        else:
            await self._push_chunks()

    async def _push_whole(self) -> None:
        upload: RemoteUpload | None = None
        while True:
            try:
                if upload is None:
                    upload = await self._begin()
                async with self._read(0) as chunks:
                    await upload.put_whole(self._counted(chunks, self._blob.size), self._blob)
                return
            except AuthorizationRenewed as error:
                await self._pause(error)
                # Who refused the request has most likely taken nothing of it, and then the session is good.
                upload = upload if upload is not None and await self._is_empty(upload) else None
                self._report(0)
            except (*_PASSING, BlobUploadUnknown) as error:
                await self._pause(error)
                upload = None
                self._report(0)

    async def _is_empty(self, upload: RemoteUpload) -> bool:
        try:
            return await upload.ask_offset() == 0
        except (OciError, ClientError):
            return False

    async def _push_chunks(self) -> None:
        upload, is_resumed = await self._resume()
        while True:
            try:
                while upload.offset < self._blob.size:
                    await self._send_chunk(upload)
                await upload.commit(self._blob.digest)
                await self._forget()
                return
            except DigestInvalid:
                await self._forget()
                if not is_resumed:
                    raise
                # What an earlier process had sent was not ours after all: from the beginning, once.
                upload, is_resumed = await self._begin(), False
                self._report(0)
            except BlobUploadUnknown as error:
                await self._forget()
                await self._pause(error)
                upload, is_resumed = await self._begin(), False
                self._report(0)

    async def _send_chunk(self, upload: RemoteUpload) -> None:
        """One chunk; what may pass is waited for, and the registry asked where to go on."""
        before = upload.offset
        size = min(max(CHUNK_SIZE, upload.chunk_min), self._blob.size - before)
        try:
            async with self._read(before) as chunks:
                await upload.patch(self._counted(chunks, size), size=size)
            await self._notes.write(self._transport.host, self._name, self._blob.digest, upload.location)
        except UploadOutOfOrder as error:
            await upload.ask_offset()
            if upload.offset == before:
                await self._pause(error)
        except _PASSING as error:
            await self._pause(error)
            await upload.ask_offset()
        if upload.offset > self._blob.size:
            await upload.cancel()
            raise BlobUploadUnknown(f"{self._transport.host} has more of the upload than was sent")
        if upload.offset > before:
            self._tries = 0
        self._report(upload.offset)

    async def _begin(self) -> RemoteUpload:
        return await RemoteUpload.begin(self._transport, self._name, self._scope)

    async def _resume(self) -> tuple[RemoteUpload, bool]:
        """The session that was noted, if the registry still knows it; else a new one. And which it is."""
        location = await self._notes.read(self._transport.host, self._name, self._blob.digest)
        if location is not None:
            try:
                upload = await RemoteUpload.resume(self._transport, self._name, self._scope, location)
                if 0 < upload.offset <= self._blob.size:
                    self._report(upload.offset)
                    return upload, True
            except (OciError, ServerMisbehaved):
                pass
            await self._forget()
        upload = await self._begin()
        await self._notes.write(self._transport.host, self._name, self._blob.digest, upload.location)
        return upload, False

    async def _forget(self) -> None:
        await self._notes.forget(self._transport.host, self._name, self._blob.digest)

    async def _pause(self, error: OciError | ClientError) -> None:
        """Wait before the next try, or give up."""
        self._tries += 1
        await _pause(self._transport, error, self._tries)

    async def _counted(self, chunks: AsyncIterable[bytes], size: int) -> AsyncIterator[bytes]:
        """The first `size` bytes of `chunks`, reported."""
        left = size
        async for chunk in chunks:
            piece = chunk[:left]
            left -= len(piece)
            self._report(self._reported + len(piece))
            if piece:
                yield piece
            if not left:
                return
        if left:
            raise SizeInvalid(f"the source of {self._blob.digest} ended {left} bytes too early")

    def _report(self, reached: int) -> None:
        if reached != self._reported:
            self._progress.advance(reached - self._reported)
            self._reported = reached


async def _pause(transport: Transport, error: OciError | ClientError, tries: int) -> None:
    """Wait after the `tries`-th try, or raise its error: it was the last, or another would fare no better."""
    if tries >= transport.retry.tries or isinstance(error, TransportRefused):
        raise error
    if not isinstance(error, AuthorizationRenewed):  # which is over already
        await transport.retry.sleep(transport.retry.pause_s(tries))


class _Feed:
    """A body's chunks on their way to the HTTP library, which must not swallow their errors, nor wait for ever."""

    def __init__(self, chunks: AsyncIterable[bytes]) -> None:
        self._chunks = chunks
        self._is_started = False
        self.count = 0
        self.error: Exception | None = None
        self.limit: asyncio.Timeout | None = None
        self.idle_s = _IDLE_TIMEOUT_S

    def body(self) -> AsyncIterator[bytes]:
        if self._is_started:
            # Asked for again, with a new token. What is gone cannot be sent again here, but by whoever asks first what
            # the registry has.
            raise AuthorizationRenewed(
                "the registry asked for another authorization while a body was being sent"
            )
        self._is_started = True
        return self._run()

    async def _run(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                self._wait_at_most(_IDLE_TIMEOUT_S)
                self.count += len(chunk)
                yield chunk
        except Exception as error:
            # Whatever it is: the library would make a broken connection of it.
            self.error = error
            raise
        self._wait_at_most(self.idle_s)

    def _wait_at_most(self, seconds: float) -> None:
        if self.limit is not None:
            self.limit.reschedule(asyncio.get_running_loop().time() + seconds)


def check_created(transport: Transport, answer: aiohttp.ClientResponse, digest: Digest) -> None:
    """Raises ServerMisbehaved unless the answer says that the blob was stored, and no other."""
    said = answer.headers.get("Docker-Content-Digest", "")
    if answer.status != 201 or (said.startswith(f"{digest.algorithm}:") and said != digest):
        raise ServerMisbehaved(f"{transport.host} answered {answer.status} {said[:160]} to the blob {digest}")


def _with_digest(url: URL, digest: Digest) -> URL:
    """The location, to the byte as the registry gave it, with the digest added."""
    return URL(f"{url}{'&' if url.raw_query_string else '?'}digest={digest}", encoded=True)


async def _once(piece: bytes) -> AsyncIterator[bytes]:
    yield piece


async def _pieces(chunks: AsyncIterable[bytes], size: int) -> AsyncIterator[bytes]:
    """The same bytes in pieces of at least `size`, the last one excepted."""
    batch = bytearray()
    async for chunk in chunks:
        batch += chunk
        if len(batch) >= size:
            yield bytes(batch)
            batch.clear()
    if batch:
        yield bytes(batch)


def _read_note(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _write_note(path: Path, location: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{secrets.token_hex(8)}")
    with os.fdopen(
        os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(location)
    temporary.replace(path)
