"""A registry that breaks off, is busy, or forgets: what is tried again, when, and from where. No time is spent."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from kitclient.errors import RegistryUnreachable, ServerMisbehaved
from kitclient.remote import RemoteRegistry
from kitclient.transport import RetryPolicy
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import (
    BlobUnknown,
    DigestInvalid,
    ManifestInvalid,
    RangeInvalid,
    TooManyRequests,
    Unavailable,
)
from kitspec.http_fields import ByteSpan, parse_range
from kitspec.media_types import OCI_MANIFEST
from kitspec.names import Tag
from tests.contracts.registry_contract import CONTENT, REPOSITORY, UNKNOWN, manifest_of, read_blob
from tests.kitclient.peer import Answer, Pauses, client, serving

DIGEST = Digest.of(CONTENT)
MANIFEST = manifest_of(Descriptor("application/x", UNKNOWN, 2))


def failing(times: int, failure: web.Response, then: Answer) -> Answer:
    left = times

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal left
        if left:
            left -= 1
            return web.Response(status=failure.status, headers=failure.headers)
        return await then(request)

    return answer


async def manifest(request: web.Request) -> web.Response:
    _ = request
    return web.Response(body=MANIFEST, headers={"Content-Type": OCI_MANIFEST})


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_what_may_pass_is_asked_again_after_a_growing_jittered_wait(status):
    pauses = Pauses()
    answer = failing(5, web.Response(status=status), manifest)
    async with serving(answer) as peer, client(peer, pauses=pauses) as registry:
        stored = await registry.get_manifest(REPOSITORY, Tag("v1"))

    assert stored.content == MANIFEST
    assert len(pauses.seconds) == 5
    for seconds, longest in zip(pauses.seconds, [0.25, 0.5, 1.0, 2.0, 3.0], strict=True):
        assert longest / 2 <= seconds <= longest


async def test_after_five_retries_the_last_answer_is_the_error():
    pauses = Pauses()
    answer = failing(100, web.Response(status=503), manifest)
    async with serving(answer) as peer, client(peer, pauses=pauses) as registry:
        with pytest.raises(Unavailable):
            await registry.get_manifest(REPOSITORY, Tag("v1"))

        assert len(peer.requests) == 6


@pytest.mark.parametrize("status", [400, 403, 404, 405, 413])
async def test_what_will_not_pass_is_asked_once(status):
    answer = failing(100, web.Response(status=status), manifest)
    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(Exception, match=r"127\.0\.0\.1"):
            await registry.get_manifest(REPOSITORY, Tag("v1"))

        assert len(peer.requests) == 1


async def test_retry_after_is_honoured():
    pauses = Pauses()
    answer = failing(2, web.Response(status=429, headers={"Retry-After": "7"}), manifest)
    async with serving(answer) as peer, client(peer, pauses=pauses) as registry:
        await registry.get_manifest(REPOSITORY, Tag("v1"))

    assert pauses.seconds == [7.0, 7.0]


@pytest.mark.parametrize("value", ["3600", "99999999999999999"])
async def test_a_rest_that_is_too_long_is_not_waited_for(value):
    pauses = Pauses()
    answer = failing(1, web.Response(status=429, headers={"Retry-After": value}), manifest)
    async with serving(answer) as peer, client(peer, pauses=pauses) as registry:
        with pytest.raises(TooManyRequests):
            await registry.get_manifest(REPOSITORY, Tag("v1"))

    assert pauses.seconds == []


async def test_a_registry_that_is_not_there_is_asked_again_and_then_named():
    pauses = Pauses()
    async with serving(manifest) as peer:
        host = peer.host
    async with RemoteRegistry(host, plain_http=True, retry=RetryPolicy(sleep=pauses.sleep)) as registry:
        with pytest.raises(RegistryUnreachable, match=host):
            await registry.get_manifest(REPOSITORY, Tag("v1"))

    assert len(pauses.seconds) == 5


# ---- downloads


def breaking(content: bytes, *, after: int, ranges: bool = True) -> Answer:
    """Serves at most `after` bytes of `content`, or of the range asked for, and breaks off."""

    async def answer(request: web.Request) -> web.StreamResponse:
        span = parse_range(request.headers.get("Range", ""), len(content)) if ranges else None
        start, stop = (span.start, span.stop) if span is not None else (0, len(content))
        headers = {"Content-Length": str(stop - start)}
        if span is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        response = web.StreamResponse(status=206 if span is not None else 200, headers=headers)
        await response.prepare(request)
        await response.write(content[start : min(stop, start + after)])
        if stop - start > after:
            assert request.transport is not None
            request.transport.close()
        return response

    return answer


async def test_a_broken_download_goes_on_where_it_broke():
    pauses = Pauses()
    answer = breaking(CONTENT, after=4000)
    async with serving(answer) as peer, client(peer, pauses=pauses) as registry:
        assert await read_blob(registry, DIGEST) == CONTENT

        assert [request.headers.get("Range") for request in peer.requests] == [
            None,
            "bytes=4000-10239",
            "bytes=8000-10239",
        ]
    assert len(pauses.seconds) == 2


async def test_a_broken_span_goes_on_where_it_broke():
    async with serving(breaking(CONTENT, after=4000)) as peer, client(peer) as registry:
        assert await read_blob(registry, DIGEST, ByteSpan(100, 9000)) == CONTENT[100:9000]


@pytest.mark.parametrize("span", [None, ByteSpan(5, 900)])
async def test_a_server_that_knows_no_ranges_is_read_past(span):
    calls = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        return await breaking(CONTENT, after=500 if calls == 1 else 10**6, ranges=False)(request)

    async with serving(answer) as peer, client(peer) as registry:
        content = await read_blob(registry, DIGEST, span)

    assert content == (CONTENT if span is None else CONTENT[span.start : span.stop])


async def test_a_download_that_makes_no_progress_ends():
    async with serving(breaking(CONTENT, after=0)) as peer, client(peer) as registry:
        with pytest.raises(RegistryUnreachable):
            await read_blob(registry, DIGEST)

        assert len(peer.requests) == 6


async def test_other_bytes_than_those_asked_for_are_refused():
    async def answer(request: web.Request) -> web.Response:
        _ = request
        return web.Response(status=206, body=CONTENT, headers={"Content-Range": "bytes 0-10239/10240"})

    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved, match="other bytes"):
            await read_blob(registry, DIGEST, ByteSpan(10, 20))


async def test_a_range_past_the_end_says_the_size():
    async def answer(request: web.Request) -> web.Response:
        _ = request
        return web.Response(status=416, headers={"Content-Range": "bytes */77"})

    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(RangeInvalid) as refusal:
            await read_blob(registry, DIGEST, ByteSpan(100, 200))

    assert refusal.value.size == 77


# ---- uploads


class UploadServer:
    """One upload session, with a fault at a time of the test's choosing."""

    def __init__(self, *, location: str = "/v2/lib/a/blobs/uploads/1") -> None:
        self.kept = b""
        self.stored: dict[str, bytes] = {}
        self.sessions = 0
        self.location = location
        self.faults: list[str] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:  # noqa: PLR0911 (a table)
        fault = self.faults.pop(0) if self.faults and request.method in {"PATCH", "PUT"} else ""
        headers = {"Location": self.location}
        match request.method:
            case "HEAD":
                return web.Response(status=404)
            case "POST":
                self.sessions += 1
                self.kept = b""
                return web.Response(status=202, headers=headers)
            case "GET" if not self.sessions:
                return web.Response(status=404)
            case "GET":
                return web.Response(
                    status=204, headers=headers | {"Range": f"0-{max(0, len(self.kept) - 1)}"}
                )
            case "PATCH":
                return await self.patch(request, fault, headers)
            case "PUT":
                return await self.put(request, fault)
        return web.Response(status=204)

    async def patch(self, request: web.Request, fault: str, headers: dict[str, str]) -> web.StreamResponse:
        start = int(request.headers["Content-Range"].partition("-")[0])
        if fault == "break":
            self.kept += await request.content.readexactly(3)
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        body = await request.read()
        if fault == "busy":
            return web.Response(status=503)
        if fault == "forget":
            self.sessions, self.kept = 0, b""
            return web.Response(status=404)
        if start != len(self.kept):
            return web.Response(status=416, headers=headers | {"Range": f"0-{len(self.kept) - 1}"})
        self.kept += body
        if fault == "lost reply":
            assert request.transport is not None
            request.transport.close()
        status = 201 if fault == "ecr" else 202
        return web.Response(status=status, headers=headers | {"Range": f"0-{len(self.kept) - 1}"})

    async def put(self, request: web.Request, fault: str) -> web.StreamResponse:
        content = self.kept + await request.read()
        if fault == "busy":
            return web.Response(status=503)
        if Digest.of(content) != request.query["digest"]:
            return web.json_response({"errors": [{"code": "DIGEST_INVALID", "message": "no"}]}, status=400)
        self.stored[request.query["digest"]] = content
        return web.Response(status=201)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("kitclient.remote_upload.CHUNK_SIZE", 4000)


async def put(registry: RemoteRegistry, content: bytes, digest: Digest | None = None) -> list[int]:
    """Push; the offsets at which the content was read."""
    offsets: list[int] = []

    @asynccontextmanager
    async def read(offset: int):
        async def chunks():
            for position in range(offset, len(content), 1000):
                yield content[position : position + 1000]

        offsets.append(offset)
        yield chunks()

    blob = Descriptor("application/x", digest or Digest.of(content), len(content))
    await registry.put_blob(REPOSITORY, blob, read)
    return offsets


async def test_a_small_blob_goes_in_one_request_and_again_when_it_must():
    server = UploadServer()
    server.faults = ["busy", "busy"]
    async with serving(server) as peer, client(peer) as registry:
        await put(registry, CONTENT)

    assert server.stored == {DIGEST: CONTENT}
    assert [request.method for request in peer.requests] == ["POST", "PUT"] * 3


@pytest.mark.parametrize("fault", ["", "break", "busy", "lost reply", "forget", "ecr"])
@pytest.mark.parametrize("moment", [0, 1, 2])
async def test_a_large_blob_goes_on_after_any_fault(small_chunks, fault, moment):
    server = UploadServer()
    server.faults = [""] * moment + [fault]
    async with serving(server) as peer, client(peer) as registry:
        offsets = await put(registry, CONTENT)

    assert server.stored == {DIGEST: CONTENT}
    if fault == "break":
        assert 4000 * moment + 3 in offsets
    if fault == "lost reply":
        assert len(offsets) == 3


async def test_a_registry_may_want_larger_chunks(small_chunks):
    server = UploadServer()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await server(request)
        if request.method == "POST":
            response.headers["OCI-Chunk-Min-Length"] = "7000"
        return response

    async with serving(answer) as peer, client(peer) as registry:
        await put(registry, CONTENT)

    ranges = [request.headers["Content-Range"] for request in peer.requests if request.method == "PATCH"]
    assert ranges == ["0-6999", "7000-10239"]


async def test_a_later_process_goes_on_with_a_noted_upload(small_chunks, tmp_path):
    server = UploadServer()
    server.faults = ["", "break", *["busy"] * 20]
    async with serving(server) as peer:
        async with client(peer, uploads=tmp_path / "uploads") as registry:
            with pytest.raises(Unavailable):
                await put(registry, CONTENT)
        server.faults = []
        async with client(peer, uploads=tmp_path / "uploads") as registry:
            offsets = await put(registry, CONTENT)

    assert server.stored == {DIGEST: CONTENT}
    assert offsets[0] == 4003
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_a_noted_upload_with_other_bytes_is_begun_anew(small_chunks, tmp_path):
    server = UploadServer()
    server.faults = ["", *["busy"] * 20]
    async with serving(server) as peer:
        async with client(peer, uploads=tmp_path) as registry:
            with pytest.raises(Unavailable):
                await put(registry, CONTENT)
        server.faults = []
        server.kept = b"x" * len(server.kept)
        async with client(peer, uploads=tmp_path) as registry:
            await put(registry, CONTENT)

    assert server.stored == {DIGEST: CONTENT}


async def test_wrong_content_is_refused_once_and_for_all(small_chunks):
    server = UploadServer()
    async with serving(server) as peer, client(peer) as registry:
        with pytest.raises(DigestInvalid):
            await put(registry, CONTENT, UNKNOWN)

        assert server.sessions == 1
        assert server.stored == {}


async def test_a_session_that_is_forgotten_again_and_again_ends(small_chunks):
    server = UploadServer()
    server.faults = ["forget"] * 100
    async with serving(server) as peer, client(peer) as registry:
        with pytest.raises(Exception, match="404"):
            await put(registry, CONTENT)

        assert len(peer.requests) < 30


async def test_a_source_that_fails_is_not_taken_for_a_broken_connection():
    @asynccontextmanager
    async def read(offset: int):
        _ = offset

        async def chunks():
            yield CONTENT[:10]
            raise BlobUnknown("the source has lost it")

        yield chunks()

    server = UploadServer()
    async with serving(server) as peer, client(peer) as registry:
        with pytest.raises(BlobUnknown, match="lost it"):
            await registry.put_blob(REPOSITORY, Descriptor("application/x", DIGEST, len(CONTENT)), read)


async def test_an_answer_that_names_another_digest_is_refused():
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=201, headers={"Docker-Content-Digest": str(UNKNOWN)})

    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved):
            await registry.put_manifest(REPOSITORY, MANIFEST, OCI_MANIFEST, tags=(Tag("v1"),))


async def test_what_is_no_manifest_is_not_even_sent():
    async with serving(manifest) as peer, client(peer) as registry:
        with pytest.raises(ManifestInvalid):
            await registry.put_manifest(REPOSITORY, b"{}", OCI_MANIFEST)

        assert peer.requests == []
