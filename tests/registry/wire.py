"""A registry seen from the wire: every byte of the request is the test's own, nothing is normalised on the way.

One request on one connection. A test that pipelines, stalls or breaks off speaks through `Wire.converse` instead.
"""

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
from collections.abc import AsyncIterable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kitspec.digest import Digest

REPLY_TIMEOUT_S = 30
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SIGNED = "application/vnd.docker.distribution.manifest.v1+prettyjws"

_CODES = frozenset(
    [
        "BLOB_UNKNOWN",
        "BLOB_UPLOAD_INVALID",
        "BLOB_UPLOAD_UNKNOWN",
        "DIGEST_INVALID",
        "FILE_UNKNOWN",
        "MANIFEST_BLOB_UNKNOWN",
        "MANIFEST_INVALID",
        "MANIFEST_UNKNOWN",
        "NAME_INVALID",
        "NAME_UNKNOWN",
        "RANGE_INVALID",
        "SIZE_INVALID",
        "TAG_INVALID",
        "UNAUTHORIZED",
        "DENIED",
        "UNSUPPORTED",
        "TOOMANYREQUESTS",
    ]
)
# What an answer must never hold: a stack trace, a file of the server, a module of ours.
_TELLTALE = re.compile(
    rb"Traceback|File \"|\.py\b|/tmp/|/var/|/home/|/root/|site-packages|object at 0x|"
    + re.escape(os.fsencode(Path(__file__).parents[2]))
)

Body = bytes | Iterable[bytes] | AsyncIterable[bytes]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def codes(self) -> list[str]:
        return [error["code"] for error in self.json()["errors"]]

    def header(self, name: str) -> str:
        """The one value of a field; a test fails where there is none or more than one."""
        values = self.headers.get_all(name) or []
        assert len(values) == 1, f"{name} is there {len(values)} times"
        return values[0]


class Wire:
    """Speaks to the server at `url`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.host, self.port = parts.hostname, parts.port

    async def __call__(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: Body = b""
    ) -> Reply:
        """One request; bytes go with their length, anything else is sent in chunks."""
        fields = {"Host": f"{self.host}:{self.port}", "Connection": "close", **(headers or {})}
        names = {name.lower() for name in fields}
        if isinstance(body, bytes):
            if (body or method in {"POST", "PUT", "PATCH"}) and "content-length" not in names:
                fields["Content-Length"] = str(len(body))
        else:
            fields["Transfer-Encoding"] = "chunked"
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in fields.items()
        )
        answer = await self.converse(_sent(head.encode("latin-1") + b"\r\n", body))
        return parse_reply(answer, method)

    async def converse(self, parts: Iterable[bytes] | AsyncIterable[bytes]) -> bytes:
        """Send `parts`, and everything that comes back until the server closes.

        A server may answer and close before it has read all: what is left is then not sent.
        """
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                sending = asyncio.create_task(_send(writer, parts))
                answer = await _read_all(reader)
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                return answer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def first_answer(self, request: bytes) -> bytes:
        """What comes back before anything more is sent, up to the end of the first header; then the peer is gone."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                writer.write(request)
                return await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def until_held(self, upload: str, held: str) -> None:
        """Wait until an upload whose peer is gone says it holds `held`; what arrived is being written meanwhile."""
        async with asyncio.timeout(10):
            while (reply := await self("GET", upload)).headers["Range"] != held:
                assert reply.status == 204
                await asyncio.sleep(0.02)

    async def push_blob(self, name: str, content: bytes, algorithm: str = "sha256") -> Digest:
        digest = Digest.of(content, algorithm)
        reply = await self("POST", f"/v2/{name}/blobs/uploads/?digest={digest}", body=content)
        assert reply.status == 201, reply.body
        return digest

    async def begin_upload(self, name: str) -> str:
        """The path of a new upload."""
        reply = await self("POST", f"/v2/{name}/blobs/uploads/")
        assert reply.status == 202, reply.body
        return path_of(reply.header("Location"))

    async def put_manifest(
        self, name: str, reference: str, manifest: Mapping[str, Any] | bytes, media_type: str | None = None
    ) -> Reply:
        content = manifest if isinstance(manifest, bytes) else encode(manifest)
        if media_type is None:
            assert not isinstance(manifest, bytes)
            media_type = str(manifest["mediaType"])
        target = f"/v2/{name}/manifests/{reference}"
        return await self("PUT", target, headers={"Content-Type": media_type}, body=content)

    async def push_manifest(self, name: str, reference: str, manifest: Mapping[str, Any]) -> Digest:
        """Push a manifest that must be taken."""
        reply = await self.put_manifest(name, reference, manifest)
        assert reply.status == 201, reply.body
        return Digest(reply.header("Docker-Content-Digest"))

    async def push_image(self, name: str, tag: str = "v1", **more: object) -> tuple[dict[str, Any], Digest]:
        """A config `{}`, one layer of 1,000 bytes and a manifest, the base that most tests start from."""
        manifest = image(**more)
        await self.push_blob(name, b"{}")
        await self.push_blob(name, LAYER)
        return manifest, await self.push_manifest(name, tag, manifest)


class WireWith(Wire):
    """`Wire`, with the same fields in every request, credentials for instance."""

    def __init__(self, wire: Wire, fields: Mapping[str, str]) -> None:
        self.host, self.port = wire.host, wire.port
        self._fields = fields

    async def __call__(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: Body = b""
    ) -> Reply:
        return await super().__call__(method, target, headers={**self._fields, **(headers or {})}, body=body)


LAYER = bytes(range(250)) * 4


def encode(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def descriptor(content: bytes, media_type: str, **more: object) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(content)), "size": len(content), **more}


def image(**more: object) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(b"{}", OCI_CONFIG),
        "layers": [descriptor(LAYER, OCI_LAYER)],
        **more,
    }


def index(manifests: Iterable[Mapping[str, Any]] = (), **more: object) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(manifests), **more}


def path_of(location: str) -> str:
    """Path and query of a `Location`, which may be absolute or relative."""
    parts = urlsplit(location)
    return parts.path + (f"?{parts.query}" if parts.query else "")


def next_target(reply: Reply) -> str | None:
    """Where `Link` says the list goes on."""
    link = reply.headers.get("Link")
    if link is None:
        return None
    match = re.fullmatch(r'<([^<>]+)>; ?rel="?next"?', link)
    assert match is not None, link
    return path_of(match[1])


def assert_refused(reply: Reply, *statuses: int, code: str | None = None) -> None:
    """A 4xx of `statuses` with an errors document of the specification that gives nothing of the server away."""
    assert reply.status in statuses, (reply.status, reply.body[:500])
    assert reply.status < 500
    assert_discreet(reply)
    assert reply.header("Content-Type").startswith("application/json")
    assert len(reply.codes) >= 1
    for found in reply.codes:
        assert found in _CODES
    if code is not None:
        assert reply.codes[0] == code, reply.body


def assert_refused_by_parser(answer: bytes, *statuses: int) -> None:
    """What is not HTTP is answered by the HTTP parser: a 4xx, discreet, and the connection is closed (it was, we have all)."""
    reply = parse_reply(answer, "GET")
    assert reply.status in statuses, answer[:500]
    assert_discreet(reply)


def assert_discreet(reply: Reply) -> None:
    assert reply.status < 500, reply.body[:500]
    assert _TELLTALE.search(reply.body) is None, reply.body[:500]


def parse_reply(answer: bytes, method: str) -> Reply:
    """The first reply of what a server sent."""
    assert answer, "the server closed without an answer"
    response = http.client.HTTPResponse(_Heard(answer), method=method)  # type: ignore[arg-type]
    response.begin()
    return Reply(response.status, response.headers, response.read())


class _Heard:
    """Bytes, where http.client wants a socket."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._content)


async def _sent(head: bytes, body: Body) -> AsyncIterable[bytes]:
    yield head
    if isinstance(body, bytes):
        yield body
        return
    async for chunk in _each(body):
        yield b"%x\r\n%b\r\n" % (len(chunk), chunk)
    yield b"0\r\n\r\n"


async def _each(parts: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncIterable[bytes]:
    if isinstance(parts, AsyncIterable):
        async for part in parts:
            yield part
    else:
        for part in parts:
            yield part


async def _send(writer: asyncio.StreamWriter, parts: Iterable[bytes] | AsyncIterable[bytes]) -> None:
    async for part in _each(parts):
        writer.write(part)
        await writer.drain()


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    received = bytearray()
    try:
        while part := await reader.read(1 << 16):
            received += part
    except ConnectionError:
        pass  # closed with our bytes unread; what the server said before that counts
    return bytes(received)
