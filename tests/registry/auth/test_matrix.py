"""Everybody at every door: each role, each route, each way of saying who one is.

Complete by construction: a route without a row here fails, and so does a row without a route; the same for what the hub
is asked, and for the methods that no route has. What is expected is written down by hand, and not derived from the table
of routes.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlencode

import pytest

from kitspec.digest import Digest
from registry.hub_paths import Operation, parse_hub_path
from registry.routes import ROUTES, Access, Endpoint, target_of
from tests.registry.auth.world import (
    ANONYMOUS,
    EVERYBODY,
    LIMITED_SCHEMES,
    SCHEMES,
    USERS,
    World,
    password_of,
    world,
)
from tests.registry.kits import Kit, whole_kit
from tests.registry.wire import OCI_MANIFEST, Reply, encode, path_of

NAME = "team/kit"
SLICE = "v1.only.model.docs"

READERS = {"reader", "writer", "creator", "updater", "deleter", "admin"}
MODEL_READERS = {"serving", "borrower"}
LAYER_READERS = {*MODEL_READERS, "documenter"}
PUSHERS = {"writer", "creator", "updater", "pusher", "admin"}
DELETERS = {"deleter", "admin"}
KNOWN = set(EVERYBODY) - {ANONYMOUS}
# Those that the object store is asked by, where a request costs ten times as much.
OF_THE_ISSUE = (ANONYMOUS, "reader", "writer", "creator", "deleter", "admin", "serving", "borrower")

Ask = Callable[["Visit"], Awaitable[Reply]]


@dataclass
class Visit:
    """One request of one user."""

    world: World
    user: str
    kit: Kit
    asks_head: bool = False

    async def __call__(self, method: str, target: str, **more: Any) -> Reply:
        method = "HEAD" if self.asks_head and method == "GET" else method
        return await self.world.ask(self.user, method, target, **more)

    @property
    def admin(self) -> Any:
        return self.world.as_user("admin")


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        allowed: roles that are let in.
        statuses: of an answer to who is.
        refusal: of an answer to who is known and is not; without credentials it is 401, always.
    """

    ask: Ask
    allowed: set[str]
    statuses: tuple[int, ...] = (200,)
    refusal: int = 403


def plain(method: str, target: str, **more: Any) -> Ask:
    async def ask(visit: Visit) -> Reply:
        return await visit(method, target, **more)

    return ask


def of_kit(method: str, target: Callable[[Kit], str]) -> Ask:
    async def ask(visit: Visit) -> Reply:
        return await visit(method, target(visit.kit))

    return ask


def layer(kind: str) -> Callable[[Kit], str]:
    return lambda kit: (
        f"/v2/{NAME}/blobs/{next(Digest.of(blob) for found, _, blob, _ in kit.layers if found == kind)}"
    )


async def delete_a_blob(visit: Visit) -> Reply:
    digest = await visit.admin.push_blob(NAME, secrets.token_bytes(8))
    return await visit("DELETE", f"/v2/{NAME}/blobs/{digest}")


async def push_a_new_tag(visit: Visit) -> Reply:
    return await _push(visit, f"new-{secrets.token_hex(8)}")


async def move_a_tag(visit: Visit) -> Reply:
    tag = f"old-{secrets.token_hex(8)}"
    await visit.admin.push_manifest(NAME, tag, visit.kit.manifest)
    return await _push(visit, tag)


async def push_by_digest(visit: Visit) -> Reply:
    content = encode({**visit.kit.manifest, "annotations": {"n": secrets.token_hex(8)}})
    return await _put(visit, str(Digest.of(content)), content)


async def _push(visit: Visit, reference: str) -> Reply:
    return await _put(
        visit, reference, encode({**visit.kit.manifest, "annotations": {"n": secrets.token_hex(8)}})
    )


async def _put(visit: Visit, reference: str, content: bytes) -> Reply:
    headers = {"Content-Type": OCI_MANIFEST}
    return await visit("PUT", f"/v2/{NAME}/manifests/{reference}", headers=headers, body=content)


async def delete_a_tag(visit: Visit) -> Reply:
    tag = f"old-{secrets.token_hex(8)}"
    await visit.admin.push_manifest(NAME, tag, visit.kit.manifest)
    return await visit("DELETE", f"/v2/{NAME}/manifests/{tag}")


async def delete_a_manifest(visit: Visit) -> Reply:
    manifest = {**visit.kit.manifest, "annotations": {"n": secrets.token_hex(8)}}
    digest = await visit.admin.push_manifest(NAME, str(Digest.of(encode(manifest))), manifest)
    return await visit("DELETE", f"/v2/{NAME}/manifests/{digest}")


async def mount_a_blob(visit: Visit) -> Reply:
    """From a repository that everybody may read."""
    digest = await visit.admin.push_blob("public/kit", secrets.token_bytes(8))
    return await visit("POST", f"/v2/{NAME}/blobs/uploads/?mount={digest}&from=public/kit")


async def push_a_blob(visit: Visit) -> Reply:
    content = secrets.token_bytes(8)
    return await visit("POST", f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(content)}", body=content)


def upload(method: str) -> Ask:
    """Of the user's own; of somebody else's, for who cannot begin one."""

    async def ask(visit: Visit) -> Reply:
        begun = await visit("POST", f"/v2/{NAME}/blobs/uploads/")
        if begun.status != 202:
            begun = await visit.admin("POST", f"/v2/{NAME}/blobs/uploads/")
        path = path_of(begun.header("Location"))
        content = secrets.token_bytes(8)
        if method == "PUT":
            return await visit("PUT", f"{path}?digest={Digest.of(content)}", body=content)
        return await visit(method, path, body=content if method == "PATCH" else b"")

    return ask


async def delete_an_api_key(visit: Visit) -> Reply:
    return await visit("DELETE", f"/v2/_modelkit/apikeys/{'0' * 32}")


async def get_a_token(visit: Visit) -> Reply:
    return await visit("GET", f"/v2/token?service=registry.example&scope=repository:{NAME}:pull")


async def post_for_a_token(visit: Visit) -> Reply:
    """The password is in the form: nobody in particular has none that is right."""
    form = {"grant_type": "password", "username": visit.user, "password": password_of(visit.user)}
    content = urlencode({"service": "registry.example", "client_id": "matrix", **form}).encode()
    return await visit.world.wire("POST", "/v2/token", headers=FORM, body=content)


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
HUB_API = f"/hf/api/models/{NAME}"
# Several questions, which differ in what they need, are one route.
OF_HUB = {
    HUB_API: READERS | LAYER_READERS,
    f"{HUB_API}/revision/v1": READERS | LAYER_READERS,
    f"{HUB_API}/tree/main": READERS | LAYER_READERS,
    f"{HUB_API}/refs": READERS | LAYER_READERS,
    f"{HUB_API}/commits/main": READERS | LAYER_READERS,
    f"{HUB_API}/auth-check": READERS | LAYER_READERS,
    f"/hf/{NAME}/resolve/v1.only.datasets/data/train.csv": READERS,
    "/hf/api/models": set(EVERYBODY),
    "/hf/api/whoami-v2": KNOWN,
}
PATHS_INFO = f"{HUB_API}/paths-info/v1"

# Several rows of a route where what is asked for makes a difference.
ROWS: dict[tuple[Endpoint, str], list[Row]] = {
    (Endpoint.BASE, "GET"): [Row(plain("GET", "/v2/"), KNOWN)],
    (Endpoint.CATALOG, "GET"): [Row(plain("GET", "/v2/_catalog"), set(EVERYBODY))],
    (Endpoint.BLOB, "GET"): [
        Row(of_kit("GET", layer("model")), READERS | MODEL_READERS),
        Row(of_kit("GET", layer("docs")), READERS | LAYER_READERS),
        Row(of_kit("GET", layer("dataset")), READERS),
        Row(of_kit("GET", lambda kit: f"/v2/{NAME}/blobs/{Digest.of(kit.config)}"), READERS | {"documenter"}),
        Row(plain("GET", f"/v2/{NAME}/blobs/{Digest.of(b'absent')}"), READERS, (404,)),
    ],
    (Endpoint.BLOB, "DELETE"): [Row(delete_a_blob, DELETERS, (202,))],
    (Endpoint.MANIFEST, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/manifests/v1"), READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/{SLICE}"), READERS | MODEL_READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/v1.only.docs"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/v1.only.docs.as.image"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/v1.only.datasets"), READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/v1.as.modelpack"), READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/v1?filter=docs"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/v1?filter=datasets"), READERS),
        Row(of_kit("GET", lambda kit: f"/v2/{NAME}/manifests/{Digest.of(encode(kit.manifest))}"), READERS),
    ],
    (Endpoint.MANIFEST, "PUT"): [
        Row(push_a_new_tag, {"writer", "creator", "pusher", "admin"}, (201,)),
        Row(move_a_tag, {"writer", "updater", "pusher", "admin"}, (201,)),
        Row(push_by_digest, PUSHERS, (201,)),
    ],
    (Endpoint.MANIFEST, "DELETE"): [
        Row(delete_a_tag, DELETERS, (202,)),
        Row(delete_a_manifest, DELETERS, (202,)),
    ],
    (Endpoint.UPLOADS, "POST"): [
        Row(plain("POST", f"/v2/{NAME}/blobs/uploads/"), PUSHERS, (202,)),
        Row(push_a_blob, PUSHERS, (201,)),
        Row(mount_a_blob, PUSHERS, (201,)),
    ],
    (Endpoint.UPLOAD, "PATCH"): [Row(upload("PATCH"), PUSHERS, (202,))],
    (Endpoint.UPLOAD, "PUT"): [Row(upload("PUT"), PUSHERS, (201,))],
    (Endpoint.UPLOAD, "GET"): [Row(upload("GET"), PUSHERS, (204,))],
    (Endpoint.UPLOAD, "DELETE"): [Row(upload("DELETE"), PUSHERS, (204,))],
    (Endpoint.TAGS, "GET"): [Row(plain("GET", f"/v2/{NAME}/tags/list"), READERS | LAYER_READERS)],
    (Endpoint.REFERRERS, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/referrers/{Digest.of(b'')}"), READERS | LAYER_READERS)
    ],
    (Endpoint.DISCOVERY, "GET"): [Row(plain("GET", "/v2/_oci/ext/discover"), set(EVERYBODY))],
    (Endpoint.FILES, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/_modelkit/files/v1"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/files/v1.only.datasets"), READERS),
    ],
    (Endpoint.FILE, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/_modelkit/files/v1/docs/README.md"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/files/v1.only.datasets/data/train.csv"), READERS),
    ],
    (Endpoint.KITFILE, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/_modelkit/kitfile/v1"), READERS | {"documenter"}),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/kitfile/v1.only.docs"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/kitfile/v1.only.model"), READERS | LAYER_READERS),
    ],
    (Endpoint.ARCHIVE, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/_modelkit/archive/v1"), READERS),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/archive/v1?filter=docs"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/archive/v1?path=docs/**"), READERS),
    ],
    (Endpoint.TENSORS, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/_modelkit/tensors/v1"), READERS | LAYER_READERS),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/tensors/v1.only.datasets"), READERS),
    ],
    (Endpoint.TENSORS_OF_FILE, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/_modelkit/tensors/v1/x.gguf"), READERS | LAYER_READERS, (404,)),
        Row(plain("GET", f"/v2/{NAME}/_modelkit/tensors/v1.only.datasets/x.gguf"), READERS, (404,)),
    ],
    (Endpoint.HUB, "GET"): [
        *(Row(plain("GET", path), allowed) for path, allowed in OF_HUB.items()),
        Row(plain("GET", "/hf/nothing/here"), set(EVERYBODY), (404,)),
    ],
    (Endpoint.HUB, "POST"): [
        Row(plain("POST", PATHS_INFO, headers=FORM, body=b"paths=x"), READERS | LAYER_READERS)
    ],
    (Endpoint.HUB, "PUT"): [Row(plain("PUT", f"{HUB_API}"), READERS | LAYER_READERS, (405,))],
    (Endpoint.HUB, "PATCH"): [Row(plain("PATCH", f"{HUB_API}"), READERS | LAYER_READERS, (405,))],
    (Endpoint.HUB, "DELETE"): [Row(plain("DELETE", f"{HUB_API}"), READERS | LAYER_READERS, (405,))],
    (Endpoint.LIVE, "GET"): [Row(plain("GET", "/livez"), set(EVERYBODY))],
    (Endpoint.READY, "GET"): [Row(plain("GET", "/readyz"), set(EVERYBODY))],
    (Endpoint.STARTED, "GET"): [Row(plain("GET", "/startupz"), set(EVERYBODY))],
    (Endpoint.METRICS, "GET"): [Row(plain("GET", "/metrics"), {"admin"})],
    (Endpoint.API_KEYS, "GET"): [Row(plain("GET", "/v2/_modelkit/apikeys"), KNOWN)],
    (Endpoint.API_KEYS, "POST"): [
        Row(plain("POST", "/v2/_modelkit/apikeys", headers=JSON, body=b"{}"), KNOWN, (201,))
    ],
    (Endpoint.API_KEY, "DELETE"): [Row(delete_an_api_key, KNOWN, (404,))],
    (Endpoint.TOKEN, "GET"): [Row(get_a_token, set(EVERYBODY), refusal=401)],
    (Endpoint.TOKEN, "POST"): [Row(post_for_a_token, KNOWN)],
}
# Made with the password only, whoever asks.
WITH_PASSWORD = {(Endpoint.API_KEYS, "GET"), (Endpoint.API_KEYS, "POST"), (Endpoint.API_KEY, "DELETE")}
# A token is exchanged for none: who has one shows something better.
NOT_WITH_A_TOKEN = {(Endpoint.TOKEN, "GET")}
# One path of each kind, and every method that there is: what the table has not is answered to nobody.
PATHS = {
    Endpoint.BASE: "/v2/",
    Endpoint.CATALOG: "/v2/_catalog",
    Endpoint.BLOB: f"/v2/{NAME}/blobs/{Digest.of(b'')}",
    Endpoint.UPLOADS: f"/v2/{NAME}/blobs/uploads/",
    Endpoint.UPLOAD: f"/v2/{NAME}/blobs/uploads/{'0' * 32}",
    Endpoint.MANIFEST: f"/v2/{NAME}/manifests/v1",
    Endpoint.TAGS: f"/v2/{NAME}/tags/list",
    Endpoint.REFERRERS: f"/v2/{NAME}/referrers/{Digest.of(b'')}",
    Endpoint.DISCOVERY: "/v2/_oci/ext/discover",
    Endpoint.FILES: f"/v2/{NAME}/_modelkit/files/v1",
    Endpoint.FILE: f"/v2/{NAME}/_modelkit/files/v1/docs/README.md",
    Endpoint.KITFILE: f"/v2/{NAME}/_modelkit/kitfile/v1",
    Endpoint.ARCHIVE: f"/v2/{NAME}/_modelkit/archive/v1",
    Endpoint.TENSORS: f"/v2/{NAME}/_modelkit/tensors/v1",
    Endpoint.TENSORS_OF_FILE: f"/v2/{NAME}/_modelkit/tensors/v1/x.gguf",
    Endpoint.HUB: HUB_API,
    Endpoint.LIVE: "/livez",
    Endpoint.READY: "/readyz",
    Endpoint.STARTED: "/startupz",
    Endpoint.METRICS: "/metrics",
    Endpoint.TOKEN: "/v2/token",
    Endpoint.API_KEYS: "/v2/_modelkit/apikeys",
    Endpoint.API_KEY: f"/v2/_modelkit/apikeys/{'0' * 32}",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "PURGE", "QUERY")


def test_every_route_has_a_row_and_every_row_a_route() -> None:
    routed = {(route.endpoint, route.method) for route in ROUTES}

    assert ROWS.keys() == routed
    assert len(ROUTES) == len(routed)


def test_every_kind_of_path_has_one_here() -> None:
    assert {endpoint: found.endpoint for endpoint, path in PATHS.items() if (found := target_of(path))} == {
        endpoint: endpoint for endpoint in Endpoint
    }


def test_everything_that_the_hub_can_be_asked_has_a_row() -> None:
    asked = {parse_hub_path(path.removeprefix("/hf/")).operation for path in (*OF_HUB, PATHS_INFO)}

    assert asked == set(get_args(Operation))


async def faults(world: World, users: Sequence[str]) -> list[str]:
    """Where the answer is another than the rows say; every row is asked by all users, and what answers GET by HEAD, too."""
    kit = whole_kit()
    admin = world.as_user("admin")
    await kit.push(admin, NAME)
    await admin.push_manifest(NAME, "main", kit.manifest)  # for the hub, whatever else is pushed meanwhile
    found = []
    # Reads first: what the hub says of a repository with many tags takes it long on an object store.
    for (endpoint, method), rows in sorted(ROWS.items(), key=lambda item: item[0][1] != "GET"):
        for number, row in enumerate(rows):
            allowed = _allowed(row, (endpoint, method), world.scheme)

            async def ask(
                user: str, row: Row = row, allowed: set[str] = allowed, method: str = method
            ) -> list[str]:
                wanted = row.statuses if user in allowed else (401 if user == ANONYMOUS else row.refusal,)
                replies = [
                    await row.ask(Visit(world, user, kit, asks_head))
                    for asks_head in ((False, True) if method == "GET" else (False,))
                ]
                return [fault for reply in replies if (fault := fault_of(reply, wanted))]

            for user, faults in zip(users, await asyncio.gather(*map(ask, users)), strict=True):
                found += [f"{endpoint.name} {method} {number} by {user}: {fault}" for fault in faults]
    return found


def _allowed(row: Row, route: tuple[Endpoint, str], scheme: str) -> set[str]:
    if route in WITH_PASSWORD and scheme != "basic":
        return set()
    return {ANONYMOUS} if route in NOT_WITH_A_TOKEN and scheme == "bearer" else row.allowed


def fault_of(reply: Reply, wanted: tuple[int, ...]) -> str | None:
    if reply.status not in wanted:
        return f"{reply.status} {reply.body[:200]!r}; wanted {wanted}"
    if reply.status == 401 and not reply.headers.get("WWW-Authenticate"):
        return "401 without a challenge"
    if (
        reply.headers.get_content_type() == "text/html"
        or reply.headers.get("X-Content-Type-Options") != "nosniff"
    ):
        return f"what a browser may run: {reply.headers.items()}"
    return None


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_V_13_U_01_everybody_may_do_at_every_route_what_the_policy_says_and_nothing_else(
    storage: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    async with world(storage, tmp_path, scheme=scheme, has_tokens=True) as registry:
        assert not await faults(registry, EVERYBODY)


@pytest.mark.parametrize("scheme", LIMITED_SCHEMES)
async def test_V_13_with_credentials_for_pushes_alone_one_pushes_where_one_may_and_nothing_else(
    storage: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    access = {(route.endpoint, route.method): route.access for route in ROUTES}
    rows = [
        (route, row, access[route] is Access.PUSH)
        for route, rows in ROWS.items()
        for row in rows
        if access[route] in (Access.PULL, Access.PUSH, Access.DELETE)
    ]
    kit, found = whole_kit(), []
    async with world(storage, tmp_path, scheme=scheme, scopes=[f"repository:{NAME}:push"]) as registry:
        await kit.push(registry.as_user("admin"), NAME)
        for (endpoint, method), row, is_push in rows:
            for user in set(USERS) - {"admin"}:
                reply = await row.ask(Visit(registry, user, kit))
                wanted = row.statuses if is_push and user in row.allowed else (401, 403)
                if is_push and user in row.allowed and row.ask is mount_a_blob:
                    wanted = (202,)  # the credentials are not for reading where it is
                if fault := fault_of(reply, wanted):
                    found.append(f"{endpoint.name} {method} by {user}: {fault}")

    assert not found


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_V_13_a_method_that_is_not_in_the_table_is_answered_to_nobody(
    storage: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    async with world(storage, tmp_path, scheme=scheme, has_tokens=True) as registry:
        await whole_kit().push(registry.as_user("admin"), NAME)
        for endpoint, path in PATHS.items():
            routed = {route.method for route in ROUTES if route.endpoint is endpoint}
            routed |= {"HEAD"} if "GET" in routed else set()
            for method in sorted(set(METHODS) - routed):
                for user in EVERYBODY:
                    reply = await registry.ask(user, method, path)
                    assert reply.status == 405, (method, path, user, reply.body)
                    assert reply.header("Allow") == ", ".join(sorted(routed))
        assert (await registry.ask("reader", "GET", f"/v2/{NAME}/manifests/v1")).status == 200


@pytest.mark.s3
@pytest.mark.timeout(600)  # some 3,000 requests
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_on_an_object_store_everybody_may_do_the_same(
    s3_storage: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    async with world(s3_storage, tmp_path, scheme=scheme, has_tokens=True) as registry:
        assert not await faults(registry, OF_THE_ISSUE)
