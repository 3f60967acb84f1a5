"""end-4, 5, 6, 11, 13 and 14: blobs on their way in."""

from __future__ import annotations

import time

from aiohttp import web

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest, check_algorithm
from kitspec.errors import DigestInvalid, SizeInvalid, UploadOutOfOrder
from kitspec.http_fields import ByteSpan, format_upload_range, parse_upload_range
from kitspec.names import RepositoryName
from registry.api.call import Call
from registry.auth.policy import Action
from registry.hosted import HostedUpload


async def begin_upload(call: Call) -> web.StreamResponse:
    """POST: mount a blob, take a whole blob in one request, or open an upload."""
    mount = call.query.one("mount")
    if mount is not None and (blob := await _mount(call, Digest(mount), mount_source(call))) is not None:
        return _created(call, blob.digest)
    whole = call.query.one("digest")
    digest = Digest(whole) if whole is not None and mount is None else None
    announced = call.query.one("digest-algorithm")
    algorithm = check_algorithm("sha256" if announced is None else announced)
    upload = await call.registry.begin_upload(call.name, algorithm=algorithm, owner=call.identity.name)
    if digest is None:
        return _accepted(call, upload)
    try:
        await _append(call, upload, closing=digest)
        await _commit(call, upload, digest)
    except BaseException:
        # The client never learned the upload's id, so nobody could resume it.
        await upload.cancel()
        raise
    return _created(call, digest)


async def append_to_upload(call: Call) -> web.StreamResponse:
    """PATCH: a chunk with `Content-Range`, or a stream without."""
    upload = await _resumed(call)
    await _append(call, upload)
    return _accepted(call, upload)


async def finish_upload(call: Call) -> web.StreamResponse:
    """PUT: the last bytes, if any, and the digest of the whole."""
    text = call.query.one("digest")
    if text is None:
        raise DigestInvalid("the closing PUT needs the blob's digest: …?digest=sha256:…")
    digest = Digest(text)
    upload = await _resumed(call)
    if call.body_size() != 0 or "Content-Range" in call.headers:
        await _append(call, upload, closing=digest)
    await _commit(call, upload, digest)
    return _created(call, digest)


async def get_upload(call: Call) -> web.StreamResponse:
    """GET: how far the upload has come."""
    upload = await call.registry.get_upload(call.name, call.argument, owner=call.identity.name)
    return web.Response(status=204, headers=_progress(call, upload))


async def cancel_upload(call: Call) -> web.StreamResponse:
    """DELETE: forget the upload."""
    upload = await _resumed(call)
    await upload.cancel()
    return web.Response(status=204)


def mount_source(call: Call) -> RepositoryName | None:
    """`from=` of a mount: the one value that is decided on and used; None where there is none."""
    source = call.query.one("from")
    return RepositoryName(source) if source is not None and call.query.one("mount") is not None else None


async def _mount(call: Call, digest: Digest, source: RepositoryName | None) -> Descriptor | None:
    """A blob of another repository that the caller may read; what they may not read is as if it were not there (A-10)."""

    async def may_read(name: RepositoryName) -> bool:
        decision = call.services.guard.decide(call.identity, Action.READ, name)
        if not decision.is_allowed or decision.layers is None:
            return decision.is_allowed
        return await call.services.layers.may_read_blob(name, digest, decision.layers)

    if source is not None and not await may_read(source):
        return None
    return await call.registry.mount_blob(call.name, digest, source=source, may_read=may_read)


async def _resumed(call: Call) -> HostedUpload:
    return await call.registry.resume_upload(call.name, call.argument, owner=call.identity.name)


async def _append(call: Call, upload: HostedUpload, *, closing: Digest | None = None) -> None:
    size = call.body_size()
    span = _declared_span(call)
    if span is not None and size is not None and span.size != size:
        raise SizeInvalid(f"Content-Range holds {span.size} bytes, Content-Length says {size}")
    before = upload.offset
    start = span.start if span is not None else None
    await upload.check(at=start, size=size)
    call.services.metrics.upload_started()
    try:
        async with call.upload() as chunks:
            await upload.append(chunks, at=start, size=size, closing=closing)
    finally:
        call.services.metrics.upload_ended()
    received = upload.offset - before
    if span is not None and received != span.size:
        raise SizeInvalid(f"Content-Range holds {span.size} bytes, {received} arrived and are kept")


async def _commit(call: Call, upload: HostedUpload, digest: Digest) -> None:
    started = time.perf_counter()
    await upload.commit(digest)
    call.services.metrics.upload_committed(time.perf_counter() - started)


def _declared_span(call: Call) -> ByteSpan | None:
    field = call.headers.get("Content-Range")
    if field is None:
        return None
    try:
        return parse_upload_range(field)
    except ValueError as error:
        raise UploadOutOfOrder(str(error)) from error


def _path(call: Call, upload: HostedUpload) -> str:
    # No query: some clients drop it.
    return call.url(f"/v2/{call.name}/blobs/uploads/{upload.location}")


def _progress(call: Call, upload: HostedUpload) -> dict[str, str]:
    return {
        "Location": _path(call, upload),
        "Range": format_upload_range(upload.offset),
        "Docker-Upload-UUID": upload.location,
    }


def _accepted(call: Call, upload: HostedUpload) -> web.StreamResponse:
    return web.Response(status=202, headers=_progress(call, upload) | {"Content-Length": "0"})


def _created(call: Call, digest: Digest) -> web.StreamResponse:
    return web.Response(
        status=201,
        headers={
            "Location": call.url(f"/v2/{call.name}/blobs/{digest}"),
            "Docker-Content-Digest": digest,
            "Content-Length": "0",
        },
    )
