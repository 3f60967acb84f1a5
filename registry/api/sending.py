"""Content on its way out: conditions, ranges and the forms in which a backend lets bytes go, in one place."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import aclosing
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from aiohttp import web

from kitspec.http_fields import ByteSpan, format_content_range
from registry.api.call import Call
from registry.api.conditions import Verdict, span_of, verdict_of
from registry.connection import Connection
from registry.content import Content
from storage_backends.interface import ByteStream, Delivery, LocalFile, PresignedUrl

SENT = web.RequestKey("registry.sent", int)
"""Key of a request: bytes of its answer that aiohttp did not see: the kernel sent them from a file, or a thread wrote them."""

# What is less is sent before a thread has begun.
_DRAINED_SIZE_MIN = 256 * 1024


async def send_content(
    call: Call, content: Content, *, etag: str, media_type: str, headers: Mapping[str, str] | None = None
) -> web.StreamResponse:
    """GET and HEAD of what is made of pieces of layers, whole or a range.

    Args:
        etag: changes whenever a byte of the content does.
    """
    fields = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **(headers or {})}
    verdict = verdict_of(call.headers, etag)
    if verdict is not Verdict.GO_ON:
        return web.Response(status=verdict.value, headers=fields)
    if call.request.method == "HEAD":
        fields |= {"Content-Length": str(content.size), "Content-Type": media_type}
        return web.Response(headers=fields)
    wanted = span_of(call.headers, "GET", etag, content.size)
    span = wanted or ByteSpan(0, content.size)
    response = begin(fields, span, content.size, media_type=media_type, is_part=wanted is not None)
    async with aclosing(call.services.reader.deliveries(content, span.start, span.stop)) as deliveries:
        # Opened before the head is sent: where the store fails at once, that can still be said.
        delivery = await anext(deliveries, None)
        await response.prepare(call.request)
        while delivery is not None:
            await write_delivery(call, response, delivery)
            delivery = await anext(deliveries, None)
    await response.write_eof()
    return response


def begin(
    headers: Mapping[str, str], span: ByteSpan, size: int, *, media_type: str, is_part: bool
) -> web.StreamResponse:
    """The head of an answer with `span` of `size` bytes."""
    response = web.StreamResponse(status=206 if is_part else 200, headers=headers)
    response.headers["Content-Type"] = media_type
    response.content_length = span.size
    if is_part:
        response.headers["Content-Range"] = format_content_range(span, size)
    return response


def url_size_min(call: Call) -> int | None:
    """From which size on the client may be sent to the store for a blob; None for never (`storage.redirect`).

    The client repeats its request there, `Range` and all. The store knows other entity tags than ours: to a request that names
    one it would say 412, or ignore the range.
    """
    redirect = call.config.storage.redirect
    if redirect.disable or "If-Match" in call.headers or "If-Range" in call.headers:
        return None
    if redirect.networks or redirect.exceptnetworks:
        client = _address_of(call.request)
        is_wanted = not redirect.networks or _is_in(client, redirect.networks)
        if not is_wanted or _is_in(client, redirect.exceptnetworks):
            return None
    return redirect.minsize


def redirect_to(delivery: PresignedUrl, headers: Mapping[str, str]) -> web.Response:
    """Nobody between us and the client may keep it: it lets whoever has it read."""
    return web.Response(
        status=307, headers={**headers, "Location": delivery.url, "Cache-Control": "no-store"}
    )


def _address_of(request: web.BaseRequest) -> IPv4Address | IPv6Address | None:
    """Of the peer, or of the proxy in front of us; None where there is none."""
    if request.remote is None:
        return None
    address = ip_address(request.remote.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _is_in(address: IPv4Address | IPv6Address | None, networks: Iterable[IPv4Network | IPv6Network]) -> bool:
    return address is not None and any(address in network for network in networks)


async def write_delivery(call: Call, response: web.StreamResponse, delivery: Delivery) -> None:
    """The bytes of a delivery, behind a head that was sent."""
    match delivery:
        case LocalFile(file, span):
            transport = call.request.transport
            if transport is None:
                raise ConnectionResetError("the client is gone")
            if span.stop > span.start:
                loop, size = asyncio.get_running_loop(), span.stop - span.start
                call.request[SENT] = call.request.get(SENT, 0) + size
                await loop.sendfile(transport, file, span.start, size)
        case ByteStream():
            if not await _drain(call.request, delivery):
                async for chunk in delivery.chunks:
                    await response.write(chunk)
        case PresignedUrl():
            raise AssertionError("an address has no bytes to write")


async def _drain(request: web.BaseRequest, stream: ByteStream) -> bool:
    """Let a thread of the backend write a stream to the client; False where it cannot, and nothing of it was read."""
    connection = request.protocol
    size = stream.span.stop - stream.span.start
    if stream.drain_into is None or size < _DRAINED_SIZE_MIN or not isinstance(connection, Connection):
        return False
    async with connection.sink() as sink:
        if sink is None:
            return False
        try:
            return await stream.drain_into(sink)
        finally:
            request[SENT] = request.get(SENT, 0) + sink.sent
