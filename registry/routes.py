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

from kitspec.errors import OciError
from registry.api import accounts, blobs, hub, listings, manifests, modelkits, operations, uploads
from registry.api.call import Call
from registry.auth.policy import Action
from registry.hub_paths import parse_hub_path

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
    DISCOVERY = enum.auto()
    FILES = enum.auto()
    FILE = enum.auto()
    KITFILE = enum.auto()
    ARCHIVE = enum.auto()
    TENSORS = enum.auto()
    TENSORS_OF_FILE = enum.auto()
    HUB = enum.auto()
    LIVE = enum.auto()
    READY = enum.auto()
    STARTED = enum.auto()
    METRICS = enum.auto()
    TOKEN = enum.auto()
    API_KEYS = enum.auto()
    API_KEY = enum.auto()


LABELS = {
    Endpoint.BASE: "base",
    Endpoint.CATALOG: "catalog",
    Endpoint.BLOB: "blob",
    Endpoint.UPLOADS: "blob_upload",
    Endpoint.UPLOAD: "blob_upload_chunk",
    Endpoint.MANIFEST: "manifest",
    Endpoint.TAGS: "tags",
    Endpoint.REFERRERS: "referrers",
    Endpoint.DISCOVERY: "discovery",
    Endpoint.FILES: "files",
    Endpoint.FILE: "file",
    Endpoint.KITFILE: "kitfile",
    Endpoint.ARCHIVE: "archive",
    Endpoint.TENSORS: "tensors",
    Endpoint.TENSORS_OF_FILE: "tensors",
    Endpoint.HUB: "hub",
    Endpoint.LIVE: "health",
    Endpoint.READY: "health",
    Endpoint.STARTED: "health",
    Endpoint.METRICS: "metrics",
    Endpoint.TOKEN: "token",
    Endpoint.API_KEYS: "api_keys",
    Endpoint.API_KEY: "api_keys",
}
"""`handler` in metrics and logs; Distribution's words where it has one."""

PROBES = frozenset({Endpoint.LIVE, Endpoint.READY, Endpoint.STARTED})
"""What is asked about this process, by whoever keeps it running."""


class Access(enum.Enum):
    """What a caller must be allowed to do: any of these. Decided in one place, before the handler; a handler may ask for more."""

    OPEN = ()
    BASE = (Action.ENTER,)
    CATALOG = (Action.LIST,)
    METRICS = (Action.MONITOR,)
    PULL = (Action.READ,)
    # Which of the two it is depends on whether the tag is there: api/manifests.py knows.
    PUSH = (Action.CREATE, Action.UPDATE)
    DELETE = (Action.DELETE,)


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
    # The same for everybody, and what docs/extension.md says: a client learns from it which token to ask for.
    Route("_oci", Endpoint.DISCOVERY, "GET", modelkits.discover, Access.OPEN),
    Route("_modelkit", Endpoint.FILES, "GET", modelkits.list_files, Access.PULL),
    Route("_modelkit", Endpoint.FILE, "GET", modelkits.get_file, Access.PULL),
    Route("_modelkit", Endpoint.KITFILE, "GET", modelkits.get_kitfile, Access.PULL),
    Route("_modelkit", Endpoint.ARCHIVE, "GET", modelkits.get_archive, Access.PULL),
    Route("_modelkit", Endpoint.TENSORS, "GET", modelkits.list_tensors, Access.PULL),
    Route("_modelkit", Endpoint.TENSORS_OF_FILE, "GET", modelkits.get_tensors, Access.PULL),
    # What is below a repository needs a read of it; what is below none (lists, who am I) is as the catalogue.
    Route("hub", Endpoint.HUB, "GET", hub.get_hub, Access.PULL),
    Route("hub", Endpoint.HUB, "POST", hub.post_hub, Access.PULL),
    Route("hub", Endpoint.HUB, "PUT", hub.refuse_write, Access.PULL),
    Route("hub", Endpoint.HUB, "PATCH", hub.refuse_write, Access.PULL),
    Route("hub", Endpoint.HUB, "DELETE", hub.refuse_write, Access.PULL),
    Route("ours", Endpoint.LIVE, "GET", operations.get_live, Access.OPEN),
    Route("ours", Endpoint.READY, "GET", operations.get_ready, Access.OPEN),
    Route("ours", Endpoint.STARTED, "GET", operations.get_started, Access.OPEN),
    Route("ours", Endpoint.METRICS, "GET", operations.get_metrics, Access.METRICS),
    # Credentials are shown to them, and checked by them: each says who it is for.
    Route("token", Endpoint.TOKEN, "GET", accounts.get_token, Access.OPEN),
    Route("token", Endpoint.TOKEN, "POST", accounts.post_token, Access.OPEN),
    Route("_modelkit", Endpoint.API_KEYS, "GET", accounts.list_api_keys, Access.BASE),
    Route("_modelkit", Endpoint.API_KEYS, "POST", accounts.create_api_key, Access.BASE),
    Route("_modelkit", Endpoint.API_KEY, "DELETE", accounts.delete_api_key, Access.BASE),
)

# GET answers HEAD too, everywhere.
_BY_METHOD = {(route.endpoint, route.method): route for route in ROUTES} | {
    (route.endpoint, "HEAD"): route for route in ROUTES if route.method == "GET"
}

_FIXED = {
    "/v2/": Endpoint.BASE,
    "/v2": Endpoint.BASE,
    "/v2/_catalog": Endpoint.CATALOG,
    "/v2/_oci/ext/discover": Endpoint.DISCOVERY,
    "/livez": Endpoint.LIVE,
    "/readyz": Endpoint.READY,
    "/startupz": Endpoint.STARTED,
    "/metrics": Endpoint.METRICS,
    "/v2/token": Endpoint.TOKEN,
    "/v2/_modelkit/apikeys": Endpoint.API_KEYS,
}

# `_modelkit` is no name of a repository.
_API_KEY = re.compile(r"/v2/_modelkit/apikeys/(?P<id>[0-9a-f]{1,64})", re.ASCII)

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

# No component of a name begins with `_`: the first `_modelkit` ends the name, whatever the file behind it is called.
_EXTENSION = re.compile(
    r"/v2/(?P<name>[^%]+?)/_modelkit/"
    r"(?P<what>files|kitfile|archive|tensors)/(?P<reference>[^/]+)(?:/(?P<path>.+))?"
)
_ENDPOINT_OF_EXTENSION = {
    ("files", False): Endpoint.FILES,
    ("files", True): Endpoint.FILE,
    ("kitfile", False): Endpoint.KITFILE,
    ("archive", False): Endpoint.ARCHIVE,
    ("tensors", False): Endpoint.TENSORS,
    ("tensors", True): Endpoint.TENSORS_OF_FILE,
}

# What is behind it is the Hub's, and parsed by registry/hub_paths.py.
_HUB_PREFIX = "/hf/"

# Longer paths cannot hold a legal name and reference; aiohttp's own bound, which a file's path may reach, is 8,190.
_PATH_LENGTH_MAX = 4096


@dataclass(frozen=True, slots=True)
class Target:
    """Where a path leads.

    Attributes:
        name: of the repository, unchecked; "" where there is none. For the hub as its parser reads it: "" where it cannot.
        argument: digest, reference or upload id, unescaped and unchecked; meaningless where the path has none.
        path: of a file in a ModelKit, unescaped and unchecked; or what follows `/hf/`, as it was sent.
    """

    endpoint: Endpoint
    name: str = ""
    argument: str = ""
    path: str = ""


def target_of(raw_path: str) -> Target | None:
    """Where a path leads, as it was sent and without its query; None when nowhere."""
    fixed = _FIXED.get(raw_path)
    if fixed is not None:
        return Target(fixed)
    if raw_path.startswith(_HUB_PREFIX):
        path = raw_path.removeprefix(_HUB_PREFIX)
        return Target(Endpoint.HUB, _hub_name(path), path=path)
    api_key = _API_KEY.fullmatch(raw_path)
    if api_key is not None:
        return Target(Endpoint.API_KEY, argument=api_key["id"])
    extension = _EXTENSION.fullmatch(raw_path)
    if extension is not None:
        return _extension_target(extension)
    return _named_target(raw_path)


def _hub_name(path: str) -> str:
    """The repository that a question of the hub's is about; "" for none, and for what the handler refuses."""
    try:
        asked = parse_hub_path(path)
        return "" if asked.operation in ("list", "whoami") else asked.name
    except OciError:
        return ""


def _named_target(raw_path: str) -> Target | None:
    if len(raw_path) > _PATH_LENGTH_MAX:
        return None
    match = _NAMED.fullmatch(raw_path)
    if match is None or match.lastgroup is None:
        return None
    name, group = match["name"], match.lastgroup
    if not _may_be_name(name):
        return None
    return Target(_ENDPOINT_OF_GROUP[group], name, unquote(match[group]))


def _extension_target(match: re.Match[str]) -> Target | None:
    path = match["path"]
    endpoint = _ENDPOINT_OF_EXTENSION.get((match["what"], path is not None))
    if endpoint is None or not _may_be_name(match["name"]):
        return None
    return Target(endpoint, match["name"], unquote(match["reference"]), unquote(path or ""))


def _may_be_name(text: str) -> bool:
    return "//" not in text and not text.startswith("/") and not text.endswith("/")


def route_of(endpoint: Endpoint, method: str) -> Route | None:
    return _BY_METHOD.get((endpoint, method))


def methods_of(endpoint: Endpoint) -> str:
    """For `Allow`."""
    return ", ".join(sorted(method for kind, method in _BY_METHOD if kind is endpoint))
