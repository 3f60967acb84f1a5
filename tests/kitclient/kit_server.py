"""A registry that serves the kits of a local store, with or without our extension, and counts what it sends.

It stands in for the real one where a test wants one that lies, breaks off, or has no extension. Its index of a layer is
made with the standard library's tar reader, not with ours.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard
from aiohttp import web

from kitclient.image_layout import LayoutRegistry
from kitclient.modelkit import ModelKit, read_modelkit
from kitclient.transfer import Place
from kitspec.digest import Digest
from kitspec.http_fields import RangeNotSatisfiable, format_content_range, format_next_link, parse_range
from kitspec.names import RepositoryName, Tag
from kitspec.path_glob import PathGlob
from kitspec.selection import EntryLayer, parse_filter, place_of, select_layers
from tests.kitclient.peer import Peer, serving

DISCOVERY = {"extensions": [{"name": "_modelkit", "endpoints": ["_modelkit/files", "_modelkit/tensors"]}]}


@dataclass
class KitServer:
    """Attributes that a test may set:

    discovery: status and body of the answer to the question which extensions there are.
    change_entry: what becomes of an entry of the list of files.
    change_page: what becomes of a page of it.
    change_content: what becomes of the bytes of a blob or a file.
    break_after: each body of a blob or a file breaks off after so many bytes.
    page_size: entries on a page.
    """

    store: LayoutRegistry
    root: Path
    discovery: tuple[int, str] = (200, json.dumps(DISCOVERY))
    change_entry: Callable[[dict[str, Any]], object] = lambda entry: entry
    change_page: Callable[[dict[str, Any]], object] = lambda page: page
    change_content: Callable[[bytes], bytes] = lambda content: content
    break_after: int | None = None
    page_size: int = 1000
    sent: list[tuple[str, int]] = field(default_factory=list)

    @property
    def content_sent(self) -> int:
        """Bytes of layers and files, without manifests, configs and lists."""
        return sum(size for _, size in self.sent)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path == "/v2/_oci/ext/discover":
            status, body = self.discovery
            return web.Response(status=status, text=body)
        name, kind, *rest = _split(path)
        repository = RepositoryName(name)
        if kind == "manifests":
            label = rest[0]
            stored = await self.store.get_manifest(repository, Digest(label) if ":" in label else Tag(label))
            return web.Response(body=stored.content, headers={"Content-Type": stored.media_type})
        if kind == "blobs":
            return await self._send(request, (self.root / "blobs" / rest[0].replace(":", "/")).read_bytes())
        kit = await read_modelkit(Place(self.store, repository), Digest(rest[0]))
        if len(rest) == 1:
            return self._list(request, kit)
        return await self._send(request, self._contents(kit)["/".join(rest[1:])])

    async def _send(self, request: web.Request, content: bytes) -> web.StreamResponse:
        content = self.change_content(content)
        status, headers = 200, {}
        if "Range" in request.headers:
            try:
                span = parse_range(request.headers["Range"], len(content))
            except RangeNotSatisfiable:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
            assert span is not None
            status, headers = 206, {"Content-Range": format_content_range(span, len(content))}
            content = content[span.start : span.stop]
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(content)
        await response.prepare(request)
        sent = content[: self.break_after]
        self.sent.append((request.path, len(sent)))
        await response.write(sent)
        if len(sent) < len(content):
            assert request.transport is not None
            request.transport.abort()
        return response

    def _list(self, request: web.Request, kit: ModelKit) -> web.Response:
        filters = [parse_filter(text) for text in request.query.getall("filter", [])]
        pairs = select_layers(kit.manifest, kit.kitfile, filters)
        entries = [entry for pair in pairs for entry in self._entries(pair)]
        if "path" in request.query:
            glob = PathGlob(request.query["path"])
            entries = [entry for entry in entries if glob.matches(entry["path"])]
        entries.sort(key=lambda entry: entry["path"].encode())
        start = int(request.query.get("last", 0))
        size = min(int(request.query["n"]), self.page_size)
        page = {"digest": kit.digest, "files": [self.change_entry(entry) for entry in entries[start:][:size]]}
        headers = {}
        if start + size < len(entries):
            following = request.rel_url.update_query({"last": str(start + size)})
            headers = {"Link": format_next_link(str(following))}
        return web.json_response(self.change_page(page), headers=headers)

    def _entries(self, pair: EntryLayer) -> list[dict[str, Any]]:
        about = {
            "layer": pair.layer.digest,
            "section": str(pair.section),
            "entry": pair.entry.name or pair.entry.path,
        }
        is_plain = pair.layer_type.compression is None
        entries = []
        for path, content, mode, offset in self._members(pair):
            entry: dict[str, Any] = {"path": path, "mode": f"{mode:04o}"}
            if content is None:
                entry |= {"type": "directory"}
            else:
                digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
                entry |= {"type": "file", "size": len(content), "digest": digest}
                entry |= {"offset": offset} if is_plain else {}
            entries.append(entry | about)
        return entries

    def _contents(self, kit: ModelKit) -> dict[str, bytes]:
        pairs = select_layers(kit.manifest, kit.kitfile)
        members = [member for pair in pairs for member in self._members(pair)]
        return {path: content for path, content, _, _ in members if content is not None}

    def _members(self, pair: EntryLayer) -> list[tuple[str, bytes | None, int, int]]:
        """Path, content, mode and offset in the inflated layer."""
        blob = (self.root / "blobs" / pair.layer.digest.replace(":", "/")).read_bytes()
        plain = _inflated(blob, pair.layer_type.compression)
        goes_to = place_of(pair)
        if pair.layer_type.packaging == "raw":
            return [(goes_to.path, plain, goes_to.mode, 0)]
        with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
            return [
                (
                    f"{goes_to.path}/{member.name}" if goes_to.path else member.name,
                    None if member.isdir() else plain[member.offset_data :][: member.size],
                    member.mode,
                    member.offset_data,
                )
                for member in archive
            ]


@asynccontextmanager
async def serving_kits(store: LayoutRegistry, root: Path) -> AsyncIterator[tuple[KitServer, Peer]]:
    server = KitServer(store, root)
    async with serving(server.answer) as peer:  # type: ignore[arg-type]
        yield server, peer


def _split(path: str) -> list[str]:
    """Name, kind and the rest of `/v2/<name>/blobs/…` and its like."""
    for kind in ("manifests", "blobs", "_modelkit/files"):
        name, found, rest = path.removeprefix("/v2/").partition(f"/{kind}/")
        if found:
            return [name, kind, *rest.split("/")]
    raise AssertionError(f"nobody asks for {path}")


def _inflated(blob: bytes, compression: str | None) -> bytes:
    if compression == "gzip":
        return gzip.decompress(blob)
    if compression == "zstd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(blob)
    return blob
