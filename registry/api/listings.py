"""end-8, end-12 and _catalog: lists, page by page."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from urllib.parse import quote, urlencode

from aiohttp import web

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import ManifestUnknown, QueryInvalid
from kitspec.http_fields import format_next_link
from kitspec.media_types import OCI_INDEX
from kitspec.names import RepositoryName
from registry.api.call import Call
from registry.auth.layers import LayerScope

_NUMBER = re.compile(r"[0-9]{1,1000}", re.ASCII)


async def list_tags(call: Call) -> web.StreamResponse:
    """GET tags/list?n=&last="""
    size_max = page_size(call, call.config.tags.maxtags)
    tags, is_more = await _page(call.registry.tags(call.name, after=call.query.one("last") or ""), size_max)
    return _listing({"name": call.name, "tags": tags}, _next(call, tags, size_max, is_more=is_more))


async def list_repositories(call: Call) -> web.StreamResponse:
    """GET _catalog?n=&last="""
    size_max = page_size(call, call.config.catalog.maxentries)
    names, is_more = await _page(_readable_names(call, after=call.query.one("last") or ""), size_max)
    return _listing({"repositories": names}, _next(call, names, size_max, is_more=is_more))


async def list_referrers(call: Call) -> web.StreamResponse:
    """GET referrers/<digest>?artifactType=; an index, empty where nothing refers to the digest.

    Of several artifact types each is wanted.
    """
    subject = Digest(call.argument)
    artifact_types = call.query.all("artifactType")
    last = call.query.one("last") or ""
    found = [
        referrer
        async for referrer in call.registry.referrers(call.name, subject)
        if referrer.digest > last and (not artifact_types or referrer.artifact_type in artifact_types)
    ]
    if call.layers is not None:
        found = [referrer for referrer in found if await _is_readable(call, referrer, call.layers)]
    manifests: list[bytes] = []
    size, link = 0, None
    for referrer in sorted(found, key=lambda referrer: referrer.digest):
        text = json.dumps(referrer.to_json(), ensure_ascii=False, separators=(",", ":")).encode()
        size += len(text) + 1
        if manifests and size > call.config.limits.referrerspagesize:
            query = urlencode([("last", last), *(("artifactType", text) for text in artifact_types)])
            link = f"{call.url(f'/v2/{call.name}/referrers/{subject}')}?{query}"
            break
        manifests.append(text)
        last = referrer.digest
    headers = {"Content-Type": OCI_INDEX}
    if link is not None:
        headers["Link"] = format_next_link(link)
    if artifact_types:
        headers["OCI-Filters-Applied"] = "artifactType"
    head = b'{"schemaVersion":2,"mediaType":"' + OCI_INDEX.encode() + b'","manifests":['
    return web.Response(body=head + b",".join(manifests) + b"]}", headers=headers)


async def _is_readable(call: Call, referrer: Descriptor, scope: LayerScope) -> bool:
    try:
        stored, _ = await call.services.kits.find_manifest(call.name, referrer.digest)
    except ManifestUnknown:
        return False
    return await call.services.layers.may_read_manifest(call.name, stored, scope)


async def _readable_names(call: Call, *, after: str) -> AsyncIterator[RepositoryName]:
    async for name in call.registry.repositories(after=after):
        if call.reading(name).is_allowed:
            yield name


def page_size(call: Call, size_max: int) -> int:
    """`n`, clamped: a client that asks for more gets a full page and a link."""
    text = call.query.one("n")
    if text is None:
        return min(call.config.limits.pagesize, size_max)
    if _NUMBER.fullmatch(text) is None:
        raise QueryInvalid(f"n={text[:40]!a}; wanted a whole number, 0 or more")
    return size_max if len(text.lstrip("0")) > 9 else min(int(text), size_max)


async def _page(items: AsyncIterator[str], size_max: int) -> tuple[list[str], bool]:
    """At most `size_max` items, and whether there are more."""
    page: list[str] = []
    async for item in items:
        if len(page) == size_max:
            return page, True
        page.append(item)
    return page, False


def _next(call: Call, page: list[str], size_max: int, *, is_more: bool) -> str | None:
    # n=0 asks for nothing: no page follows it (distribution-spec 1.1.1, "Listing Tags").
    if not is_more or not page:
        return None
    return call.page_url(f"n={size_max}&last={quote(page[-1], safe='')}")


def _listing(document: dict[str, object], link: str | None) -> web.StreamResponse:
    headers = {"Content-Type": "application/json"}
    if link is not None:
        headers["Link"] = format_next_link(link)
    return web.Response(body=json.dumps(document).encode(), headers=headers)
