"""Which request goes where: the specification's endpoints as one table.

Paths are matched from the right, on the characters as sent: a repository may be called `lib/blobs/uploads`, and what
decides on access sees the same name as what serves it. Names never need escapes, so an escape in a name is no match.

Source: distribution-spec 1.1.1, "Endpoints", and end-13, end-14 of its main branch.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import unquote

from aiohttp import web

from registry.api import blobs, listings, manifests, operations, uploads
from registry.api.call import Call

Handler = Callable[[Call], Awaitable[web.StreamResponse]]


class Endpoint(enum.Enum):
    """The kinds of paths."""

    BASE = enum.auto()
    CATALOG = enum.auto()
    BLOB = enum.auto()
    UPLOADS = enum.auto()
    UPLOAD = enum.auto()
    MANIFEST = enum.auto()
    TAGS = enum.auto()
    REFERRERS = enum.auto()
    LIVE = enum.auto()
    READY = enum.auto()
    STARTED = enum.auto()
    METRICS = enum.auto()


LABELS = {
    Endpoint.BASE: "base",
    Endpoint.CATALOG: "catalog",
    Endpoint.BLOB: "blob",
    Endpoint.UPLOADS: "blob_upload",
    Endpoint.UPLOAD: "blob_upload_chunk",
    Endpoint.MANIFEST: "manifest",
    Endpoint.TAGS: "tags",
    Endpoint.REFERRERS: "referrers",
    Endpoint.LIVE: "health",
    Endpoint.READY: "health",
    Endpoint.STARTED: "health",
    Endpoint.METRICS: "metrics",
}
"""`handler` in metrics and logs; Distribution's words where it has one."""


class Access(enum.Enum):
    """What a caller must be allowed to do. Policy is decided in one place, before the handler."""

    OPEN = "open"
    BASE = "base"
    CATALOG = "catalog"
    PULL = "pull"
    PUSH = "push"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Route:
    spec: str
    endpoint: Endpoint
    method: str
    handler: Handler
    access: Access


ROUTES = (
    Route("end-1", Endpoint.BASE, "GET", operations.get_base, Access.BASE),
    Route("end-2", Endpoint.BLOB, "GET", blobs.get_blob, Access.PULL),
    Route("end-10", Endpoint.BLOB, "DELETE", blobs.delete_blob, Access.DELETE),
    Route("end-3", Endpoint.MANIFEST, "GET", manifests.get_manifest, Access.PULL),
    Route("end-7", Endpoint.MANIFEST, "PUT", manifests.put_manifest, Access.PUSH),
    Route("end-9", Endpoint.MANIFEST, "DELETE", manifests.delete_manifest, Access.DELETE),
    Route("end-4, end-11", Endpoint.UPLOADS, "POST", uploads.begin_upload, Access.PUSH),
    Route("end-5", Endpoint.UPLOAD, "PATCH", uploads.append_to_upload, Access.PUSH),
    Route("end-6", Endpoint.UPLOAD, "PUT", uploads.finish_upload, Access.PUSH),
    Route("end-13", Endpoint.UPLOAD, "GET", uploads.get_upload, Access.PUSH),
    Route("end-14", Endpoint.UPLOAD, "DELETE", uploads.cancel_upload, Access.PUSH),
    Route("end-8", Endpoint.TAGS, "GET", listings.list_tags, Access.PULL),
    Route("end-12", Endpoint.REFERRERS, "GET", listings.list_referrers, Access.PULL),
    Route("_catalog", Endpoint.CATALOG, "GET", listings.list_repositories, Access.CATALOG),
    Route("ours", Endpoint.LIVE, "GET", operations.get_live, Access.OPEN),
    Route("ours", Endpoint.READY, "GET", operations.get_ready, Access.OPEN),
    Route("ours", Endpoint.STARTED, "GET", operations.get_started, Access.OPEN),
    Route("ours", Endpoint.METRICS, "GET", operations.get_metrics, Access.OPEN),
)

# GET answers HEAD too, everywhere.
_BY_METHOD = {(route.endpoint, route.method): route for route in ROUTES} | {
    (route.endpoint, "HEAD"): route for route in ROUTES if route.method == "GET"
}

_FIXED = {
    "/v2/": Endpoint.BASE,
    "/v2": Endpoint.BASE,
    "/v2/_catalog": Endpoint.CATALOG,
    "/livez": Endpoint.LIVE,
    "/readyz": Endpoint.READY,
    "/startupz": Endpoint.STARTED,
    "/metrics": Endpoint.METRICS,
}

# Any characters but an escape in the name; the strict check, with its error, is RepositoryName's.
_NAMED = re.compile(
    r"/v2/(?P<name>[^%]+)/(?:"
    r"blobs/uploads/(?P<upload>[^/]+)"
    r"|(?P<uploads>blobs/uploads/)"
    r"|blobs/(?P<blob>[^/]+)"
    r"|manifests/(?P<manifest>[^/]+)"
    r"|(?P<tags>tags/list)"
    r"|referrers/(?P<referrers>[^/]+)"
    r")"
)
_ENDPOINT_OF_GROUP = {
    "upload": Endpoint.UPLOAD,
    "uploads": Endpoint.UPLOADS,
    "blob": Endpoint.BLOB,
    "manifest": Endpoint.MANIFEST,
    "tags": Endpoint.TAGS,
    "referrers": Endpoint.REFERRERS,
}

# Longer paths cannot hold a legal name and reference; aiohttp's own bound is 8,190.
_PATH_LENGTH_MAX = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """Where a path leads.

    Attributes:
        name: of the repository, unchecked; "" where there is none.
        argument: digest, reference or upload id, unescaped and unchecked; meaningless where the path has none.
    """

    endpoint: Endpoint
    name: str = ""
    argument: str = ""


def target_of(raw_path: str) -> Target | None:
    """Where a path leads, as it was sent and without its query; None when nowhere."""
    fixed = _FIXED.get(raw_path)
    if fixed is not None:
        return Target(fixed)
    if len(raw_path) > _PATH_LENGTH_MAX:
        return None
    match = _NAMED.fullmatch(raw_path)
    if match is None or match.lastgroup is None:
        return None
    name, group = match["name"], match.lastgroup
    if "//" in name or name.startswith("/") or name.endswith("/"):
        return None
    return Target(_ENDPOINT_OF_GROUP[group], name, unquote(match[group]))


def route_of(endpoint: Endpoint, method: str) -> Route | None:
    return _BY_METHOD.get((endpoint, method))


def methods_of(endpoint: Endpoint) -> str:
    """For `Allow`."""
    return ", ".join(sorted(method for kind, method in _BY_METHOD if kind is endpoint))
