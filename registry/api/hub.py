"""`/hf/…`: the read API of the Hugging Face Hub, for clients that know nothing else (`HF_ENDPOINT=http://host/hf`).

Described in docs/extension.md, "Hub". Reads only: what would write is refused with words that say so. Errors are the
registry's, and say in the Hub's headers which of the clients' exceptions they are.
"""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode

from aiohttp import web

from kitspec.errors import (
    BlobUnknown,
    FileUnknown,
    ManifestUnknown,
    NameInvalid,
    NameUnknown,
    OciError,
    QueryInvalid,
    RangeInvalid,
    Unsupported,
)
from kitspec.http_fields import format_next_link
from kitspec.names import RepositoryName
from kitspec.views import Kit
from registry.api.call import Call
from registry.api.sending import send_content
from registry.auth.layers import LayerScope
from registry.auth.policy import Action
from registry.body import pieces_of
from registry.hub import Hub, ListedKit, Snapshot, TaggedCommit
from registry.hub_info import (
    file_document,
    folder_document,
    info_document,
    kit_tags,
    last_commit_document,
    listed_document,
    moment_text,
)
from registry.hub_paths import HubPath, Operation, is_true, parse_hub_path, parse_paths_asked
from registry.hub_tree import HubFile, HubFolder, position_of

_ERROR_CODES: Final[tuple[tuple[type[OciError], str], ...]] = (
    (NameInvalid, "RepoNotFound"),
    (NameUnknown, "RepoNotFound"),
    (ManifestUnknown, "RevisionNotFound"),
    (FileUnknown, "EntryNotFound"),
    (BlobUnknown, "EntryNotFound"),
)
# What there is, and not for this caller: the clients' own words for it.
_REFUSED_CODES: Final[Mapping[int, str]] = {401: "RepoNotFound", 403: "GatedRepo"}
# Lines of a header that clients and proxies take are 8 KiB and more.
_MESSAGE_LENGTH_MAX: Final = 1024

_PATHS_BODY_SIZE_MAX: Final = 1024 * 1024
# Repositories that are looked at for one answer: clients go on by its Link.
_LOOKED_UP_MAX: Final = 1_000
_LISTED_DEFAULT: Final = 100
_NUMBER: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,255}", re.ASCII)

# A path as it was sent stays as it is; what else it might hold would end a Link too early.
_IN_PATH: Final = "/%:@!$&'()*+,;=~"

Answerer = Callable[[Call, HubPath], Awaitable[web.StreamResponse]]


async def get_hub(call: Call) -> web.StreamResponse:
    """GET and HEAD of anything below /hf/."""
    try:
        _refuse_when_off(call)
        path = parse_hub_path(call.path)
        if path.operation != "file":
            return await _ANSWERERS[path.operation](call, path)
        snapshot = await _snapshot(call, path)
        file = await _find(snapshot, path.path)
    except OciError as error:
        return _refusal(error)
    # Outside: what goes wrong behind the head of an answer is for the connection to show.
    return await _send_file(call, snapshot, file)


async def post_hub(call: Call) -> web.StreamResponse:
    """POST: paths-info is the one that reads."""
    path: HubPath | None = None
    with suppress(OciError):
        path = parse_hub_path(call.path)
    if path is None or path.operation != "paths-info":
        return await refuse_write(call)
    paths, is_expanded = parse_paths_asked(await _read_body(call), call.headers.get("Content-Type", ""))
    try:
        _refuse_when_off(call)
        snapshot = await _snapshot(call, path)
        entries = [entry async for entry in _entries_at(snapshot, paths)]
        return _entries_answer(snapshot, entries, is_expanded=is_expanded)
    except OciError as error:
        return _refusal(error)


async def refuse_write(call: Call) -> web.StreamResponse:
    """Everything that would change something.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        f"{call.request.method} is refused: this hub is read-only. Push ModelKits with kit or kitclient, to /v2/ of this registry",
        detail="GET, HEAD",
    )


# ---- one handler for each question


async def _answer_whoami(call: Call, path: HubPath) -> web.StreamResponse:
    """Where there are no accounts whatever token a client sends is nobody's in particular, who may read.

    Raises:
        CredentialsNeeded: there are accounts, and no credentials were sent.
    """
    _ = path
    call.services.guard.require(call.identity, (Action.ENTER,), "", ())
    name = call.identity.name or "anonymous"
    token = {"displayName": name, "role": "read"}
    return _json(
        {
            "type": "user",
            "id": name,
            "name": name,
            "fullname": name,
            "orgs": [],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


async def _answer_auth_check(call: Call, path: HubPath) -> web.StreamResponse:
    await _hub(call).main_commit(path.name)
    return _json({})


async def _answer_info(call: Call, path: HubPath) -> web.StreamResponse:
    snapshot = await _snapshot(call, path)

    async def read(file: HubFile, start: int, stop: int) -> bytes:
        return await call.services.reader.read(file.file.content, start, stop)

    document = await info_document(
        path, snapshot, read, with_blobs=is_true(call.query.one("blobs")), expand=_expanded_fields(call)
    )
    return _json(document, {"X-Repo-Commit": snapshot.commit})


async def _answer_tree(call: Call, path: HubPath) -> web.StreamResponse:
    """A page of a folder: `?recursive=&expand=&cursor=&limit=`."""
    snapshot = await _snapshot(call, path)
    folder = path.path.removesuffix("/")
    cursor = call.query.one("cursor") or ""
    size_max = _limit(call, call.config.limits.pagesize, call.config.catalog.maxentries)
    page: list[HubFile | HubFolder] = []
    link: dict[str, str] = {}
    entries = snapshot.tree.entries(folder, is_recursive=is_true(call.query.one("recursive")), after=cursor)
    async for entry in entries:
        if len(page) == size_max:
            link = _next_link(call, position_of(page[-1]))
            break
        page.append(entry)
    if folder and not page and not cursor:
        raise _no_entry(snapshot, f"no folder {folder[:200]!a} at this revision")
    return _entries_answer(snapshot, page, is_expanded=is_true(call.query.one("expand")), headers=link)


async def _answer_refs(call: Call, path: HubPath) -> web.StreamResponse:
    hub = _hub(call)
    main = await hub.main_commit(path.name)
    tagged = await hub.tagged_commits(path.name, count_max=call.config.tags.maxtags)
    document: dict[str, Any] = {
        "branches": [_ref("main", "refs/heads/main", main)] if main is not None else [],
        "tags": [_ref(ref.tag, f"refs/tags/{ref.tag}", ref.commit) for ref in tagged],
        "converts": [],
    }
    if call.query.one("include_prs") is not None:
        document["pullRequests"] = []
    return _json(document)


async def _answer_commits(call: Call, path: HubPath) -> web.StreamResponse:
    """What was tagged, the newest first, from the commit of the revision on."""
    snapshot = await _snapshot(call, path)
    tagged = await _hub(call).tagged_commits(path.name, count_max=call.config.tags.maxtags)
    tagged.sort(key=lambda ref: ref.modified, reverse=True)
    newest: dict[str, TaggedCommit] = {}
    for ref in tagged:
        newest.setdefault(ref.commit, ref)
    commits = list(newest)
    older = commits[commits.index(snapshot.commit) + 1 :] if snapshot.commit in newest else []
    listed = [_commit(snapshot.commit, moment_text(snapshot.modified), newest.get(snapshot.commit))]
    listed += [_commit(commit, moment_text(newest[commit].modified), newest[commit]) for commit in older]
    return _json(listed)


async def _answer_list(call: Call, path: HubPath) -> web.StreamResponse:
    """`?search=&author=&filter=&sort=&limit=`: kits that have a model; for datasets those that have datasets."""
    below = f"{path.endpoint}/" if path.endpoint else ""
    is_sorted = call.query.one("sort") in ("lastModified", "last_modified", "createdAt", "created_at")
    size_max = _limit(call, _LISTED_DEFAULT, call.config.catalog.maxentries)
    found: list[tuple[str, ListedKit]] = []
    looked_up = 0
    link: dict[str, str] = {}
    last = call.query.one("cursor") or ""

    def is_wanted(name: str) -> bool:
        return _is_wanted_id(call, name.removeprefix(below))

    def may_read(name: RepositoryName) -> bool:
        return call.reading(name).is_allowed

    async for kit in _hub(call).kits(below=below, after=last, may_read=may_read, is_wanted=is_wanted):
        if looked_up == _LOOKED_UP_MAX or (len(found) == size_max and not is_sorted):
            link = _next_link(call, last)
            break
        looked_up += 1
        last = kit if isinstance(kit, str) else kit.name
        if isinstance(kit, ListedKit) and _is_wanted_kit(call, path, kit.kit):
            found.append((last.removeprefix(below), kit))
    if is_sorted:
        if link:
            raise QueryInvalid(
                f"more than {_LOOKED_UP_MAX} repositories to sort; leave sort out, or search below a longer name"
            )
        found.sort(key=lambda pair: pair[1].modified, reverse=True)
    return _json([listed_document(path, kit, id_) for id_, kit in found[:size_max]], link)


async def _answer_paths_info(call: Call, path: HubPath) -> web.StreamResponse:
    _ = path
    raise Unsupported(f"{call.request.method} of paths-info; it is asked by POST", detail="POST")


_ANSWERERS: Final[Mapping[Operation, Answerer]] = {
    "auth-check": _answer_auth_check,
    "commits": _answer_commits,
    "info": _answer_info,
    "list": _answer_list,
    "paths-info": _answer_paths_info,
    "refs": _answer_refs,
    "tree": _answer_tree,
    "whoami": _answer_whoami,
}


# ---- files


async def _send_file(call: Call, snapshot: Snapshot, file: HubFile) -> web.StreamResponse:
    """`resolve` and `raw`: a file, whole or a range. Its entity tag becomes a file name in the clients' caches."""
    etag = file.digest.encoded
    headers = {
        "X-Repo-Commit": snapshot.commit,
        "X-Linked-ETag": f'"{etag}"',
        "X-Linked-Size": str(file.size),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(posixpath.basename(file.path), safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    return await send_content(
        call, file.file.content, etag=etag, media_type="application/octet-stream", headers=headers
    )


async def _find(snapshot: Snapshot, path: str) -> HubFile:
    file = await snapshot.tree.find(path)
    if file is None:
        raise _no_entry(snapshot, f"no file {path[:200]!a} at this revision")
    return file


async def _entries_at(snapshot: Snapshot, paths: Iterable[str]) -> AsyncIterator[HubFile | HubFolder]:
    """What there is of the paths that are asked for."""
    for path in dict.fromkeys(path.removesuffix("/") for path in paths):
        await asyncio.sleep(0)  # others get their turn
        file = await snapshot.tree.find(path)
        if file is not None:
            yield file
        elif path and await snapshot.tree.has_folder(path):
            yield HubFolder(path)


def _no_entry(snapshot: Snapshot, message: str) -> FileUnknown:
    # Clients remember that a file is not there, for the commit they are told.
    return FileUnknown(message, detail={"commit": snapshot.commit})


def _entries_answer(
    snapshot: Snapshot,
    entries: Sequence[HubFile | HubFolder],
    *,
    is_expanded: bool,
    headers: Mapping[str, str] | None = None,
) -> web.StreamResponse:
    more = {"lastCommit": last_commit_document(snapshot)} if is_expanded else {}
    documents = [
        (file_document(entry) if isinstance(entry, HubFile) else folder_document(entry, snapshot.commit))
        | more
        for entry in entries
    ]
    return _json(documents, {"X-Repo-Commit": snapshot.commit, **(headers or {})})


# ---- what is asked


def _hub(call: Call) -> Hub:
    services = call.services

    def scope_of(name: RepositoryName) -> LayerScope | None:
        return call.reading(name).layers

    root = call.config.hub.root
    return Hub(services.registry, services.kits, services.views, root=root, scope_of=scope_of)


async def _snapshot(call: Call, path: HubPath) -> Snapshot:
    return await _hub(call).snapshot(path.name, path.revision)


def _refuse_when_off(call: Call) -> None:
    if not call.config.hub.enabled:
        raise NameUnknown("the hub is switched off in this registry (hub.enabled)")


def _expanded_fields(call: Call) -> list[str]:
    return [*call.query.all("expand"), *call.query.all("expand[]")]


def _limit(call: Call, default: int, size_max: int) -> int:
    text = call.query.one("limit")
    if text is None:
        return min(default, size_max)
    if _NUMBER.fullmatch(text) is None or not int(text):
        raise QueryInvalid(f"limit={text[:40]!a}; wanted a whole number, 1 or more")
    return min(int(text), size_max)


def _is_wanted_id(call: Call, id_: str) -> bool:
    # Ids have one slash at most: what is deeper is found below a longer endpoint.
    search, author = call.query.one("search"), call.query.one("author")
    return (
        id_.count("/") <= 1
        and (search is None or search.lower() in id_)
        and (author is None or id_.startswith(f"{author.lower()}/"))
    )


def _is_wanted_kit(call: Call, path: HubPath, kit: Kit) -> bool:
    """A model is what has one, or has no datasets either; a dataset repository what has datasets."""
    has_datasets = bool(kit.kitfile.datasets)
    is_of_kind = has_datasets if path.kind == "dataset" else kit.kitfile.model is not None or not has_datasets
    return is_of_kind and set(call.query.all("filter")) <= set(kit_tags(kit))


async def _read_body(call: Call) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for piece in pieces_of(call.request):
        size += len(piece)
        if size > _PATHS_BODY_SIZE_MAX:
            raise QueryInvalid(
                f"a list of paths of more than {_PATHS_BODY_SIZE_MAX} bytes, which is what is allowed"
            )
        parts.append(piece)
    return b"".join(parts)


# ---- answers


def _ref(name: str, ref: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": commit}


def _commit(commit: str, moment: str, ref: TaggedCommit | None) -> dict[str, Any]:
    title = f"Tag {ref.tag}" if ref is not None else "Untagged"
    return {"id": commit, "title": title, "message": "", "date": moment, "authors": []}


def _next_link(call: Call, cursor: str) -> dict[str, str]:
    """Absolute, which clients need: at the public address, else at the one that the client has used."""
    kept = [
        pair
        for pair in parse_qsl(call.request.rel_url.raw_query_string, keep_blank_values=True)
        if pair[0] != "cursor"
    ]
    path = f"{call.config.http.prefix.rstrip('/')}/hf/{quote(call.path, safe=_IN_PATH)}?{urlencode([*kept, ('cursor', cursor)])}"
    origin, host = call.config.http.host, call.headers.get("Host", "")
    if origin is None and _HOST.fullmatch(host) is not None:
        origin = f"{call.request.scheme}://{host}"
    return {"Link": format_next_link(f"{origin or ''}{path}")}


def _json(document: object, headers: Mapping[str, str] | None = None) -> web.StreamResponse:
    # In ASCII, so that whatever text a card holds can be sent.
    body = json.dumps(document, separators=(",", ":")).encode()
    return web.Response(body=body, headers={"Content-Type": "application/json", **(headers or {})})


def error_headers(error: OciError) -> dict[str, str]:
    """What the Hub's clients go by."""
    message = error.message.encode("ascii", "backslashreplace").decode()
    headers = {"X-Error-Message": re.sub(r"[^\x20-\x7e]", " ", message)[:_MESSAGE_LENGTH_MAX]}
    code = _code_of(error) or _REFUSED_CODES.get(error.status)
    if code is not None:
        headers["X-Error-Code"] = code
    return headers


def _code_of(error: OciError) -> str | None:
    """Of what is not there."""
    return next((code for kind, code in _ERROR_CODES if isinstance(error, kind)), None)


def _refusal(error: OciError) -> web.StreamResponse:
    """An error as the Hub's clients tell them apart.

    Raises:
        OciError: it is not of those; it is left to the middleware, which knows headers of its own for some.
    """
    is_missing = _code_of(error) is not None
    if not is_missing and (error.status not in (400, 404) or isinstance(error, RangeInvalid)):
        raise error
    headers = {"Content-Type": "application/json", **error_headers(error)}
    if isinstance(error.detail, dict) and "commit" in error.detail:
        headers["X-Repo-Commit"] = error.detail["commit"]
    return web.Response(status=404 if is_missing else error.status, body=error.to_json(), headers=headers)
