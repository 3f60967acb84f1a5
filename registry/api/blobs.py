"""end-2 and end-10: blobs on their way out."""

from __future__ import annotations

from aiohttp import web

from kitspec.digest import Digest
from kitspec.errors import BlobUnknown, Unsupported
from kitspec.http_fields import ByteSpan
from registry.api.call import Call
from registry.api.conditions import Verdict, span_of, verdict_of
from registry.api.sending import begin, redirect_to, send_content, url_size_min, write_delivery
from registry.hosted import BLOB_MEDIA_TYPE
from storage_backends.interface import ByteStream, LocalFile, PresignedUrl


async def get_blob(call: Call) -> web.StreamResponse:
    """GET and HEAD of a blob, whole or a range; also of one that only a view has."""
    digest = Digest(call.argument)
    if call.layers is not None:
        await call.services.layers.require_blob(call.name, digest, call.layers)
    try:
        return await _stored_blob(call, digest)
    except BlobUnknown:
        found = await call.services.views.find_blob(call.name, digest)
    headers = {"Docker-Content-Digest": digest}
    return await send_content(call, found, etag=digest, media_type=BLOB_MEDIA_TYPE, headers=headers)


async def _stored_blob(call: Call, digest: Digest) -> web.StreamResponse:
    headers = {
        "Docker-Content-Digest": digest,
        "ETag": f'"{digest}"',
        "Accept-Ranges": "bytes",
    }
    if call.request.method == "HEAD":
        blob = await call.registry.confirm_blob(call.name, digest)
        verdict = verdict_of(call.headers, digest)
        if verdict is not Verdict.GO_ON:
            return web.Response(status=verdict.value, headers=headers)
        headers["Content-Length"] = str(blob.size)
        return web.Response(headers=headers | {"Content-Type": BLOB_MEDIA_TYPE})

    verdict = Verdict.GO_ON
    wanted: ByteSpan | None = None

    def choose(size: int) -> ByteSpan | None:
        nonlocal verdict, wanted
        verdict = verdict_of(call.headers, digest)
        wanted = span_of(call.headers, "GET", digest, size) if verdict is Verdict.GO_ON else None
        return wanted

    size_min = url_size_min(call)
    async with call.registry.deliver_blob(call.name, digest, choose, url_size_min=size_min) as delivery:
        if verdict is not Verdict.GO_ON:
            return web.Response(status=verdict.value, headers=headers)
        if isinstance(delivery, PresignedUrl):
            return redirect_to(delivery, {"Docker-Content-Digest": digest})
        return await _send(call, delivery, headers, is_part=wanted is not None)


async def delete_blob(call: Call) -> web.StreamResponse:
    """DELETE of a blob from this repository; other repositories keep it."""
    refuse_when_deletes_are_off(call)
    await call.registry.delete_blob(call.name, Digest(call.argument))
    return web.Response(status=202, headers={"Content-Length": "0"})


def refuse_when_deletes_are_off(call: Call) -> None:
    """
    Raises:
        Unsupported: `storage.delete.enabled` is off.
    """
    if not call.config.storage.delete.enabled:
        raise Unsupported("deleting is switched off in this registry (storage.delete.enabled)")


async def _send(
    call: Call, delivery: LocalFile | ByteStream, headers: dict[str, str], *, is_part: bool
) -> web.StreamResponse:
    span = ByteSpan(delivery.span.start, delivery.span.stop)
    response = begin(headers, span, delivery.size, media_type=BLOB_MEDIA_TYPE, is_part=is_part)
    await response.prepare(call.request)
    await write_delivery(call, response, delivery)
    await response.write_eof()
    return response
