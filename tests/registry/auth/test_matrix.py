"""Everybody at every door: each role, each route, each way of saying who one is.

Complete by construction: a route without a row here fails, and so does a row without a route. What is expected is written down
by hand, and not derived from the table of routes.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kitspec.digest import Digest
from registry.routes import ROUTES, Endpoint
from tests.registry.auth.world import ANONYMOUS, EVERYBODY, SCHEMES, World, world
from tests.registry.kits import Kit, whole_kit
from tests.registry.wire import OCI_MANIFEST, Reply, encode, path_of

NAME = "team/kit"
SLICE = "v1.only.model.docs"

READERS = {"reader", "writer", "creator", "updater", "deleter", "admin"}
LAYER_READERS = {"serving", "documenter"}
PUSHERS = {"writer", "creator", "updater", "pusher", "admin"}
DELETERS = {"deleter", "admin"}
KNOWN = set(EVERYBODY) - {ANONYMOUS}

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
    """Attributes: allowed: roles that are let in; statuses: of an answer to who is."""

    ask: Ask
    allowed: set[str]
    statuses: tuple[int, ...] = (200,)


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


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
HUB_API = f"/hf/api/models/{NAME}"

# Several rows of a route where what is asked for makes a difference.
ROWS: dict[tuple[Endpoint, str], list[Row]] = {
    (Endpoint.BASE, "GET"): [Row(plain("GET", "/v2/"), KNOWN)],
    (Endpoint.CATALOG, "GET"): [Row(plain("GET", "/v2/_catalog"), set(EVERYBODY))],
    (Endpoint.BLOB, "GET"): [
        Row(of_kit("GET", layer("model")), READERS | {"serving"}),
        Row(of_kit("GET", layer("docs")), READERS | LAYER_READERS),
        Row(of_kit("GET", layer("dataset")), READERS),
        Row(of_kit("GET", lambda kit: f"/v2/{NAME}/blobs/{Digest.of(kit.config)}"), READERS | {"documenter"}),
        Row(plain("GET", f"/v2/{NAME}/blobs/{Digest.of(b'absent')}"), READERS, (404,)),
    ],
    (Endpoint.BLOB, "DELETE"): [Row(delete_a_blob, DELETERS, (202,))],
    (Endpoint.MANIFEST, "GET"): [
        Row(plain("GET", f"/v2/{NAME}/manifests/v1"), READERS),
        Row(plain("GET", f"/v2/{NAME}/manifests/{SLICE}"), READERS | {"serving"}),
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
        Row(plain("GET", f"{HUB_API}"), READERS | LAYER_READERS),
        Row(plain("GET", f"{HUB_API}/tree/main"), READERS | LAYER_READERS),
        Row(plain("GET", f"{HUB_API}/refs"), READERS | LAYER_READERS),
        Row(plain("GET", f"/hf/{NAME}/resolve/v1.only.datasets/data/train.csv"), READERS),
        Row(plain("GET", "/hf/api/models"), set(EVERYBODY)),
        Row(plain("GET", "/hf/api/whoami-v2"), KNOWN),
        Row(plain("GET", "/hf/nothing/here"), set(EVERYBODY), (404,)),
    ],
    (Endpoint.HUB, "POST"): [
        Row(plain("POST", f"{HUB_API}/paths-info/v1", headers=FORM, body=b"paths=x"), READERS | LAYER_READERS)
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
}
# Their answers are about the credentials that they are shown; tests/registry/auth/ has them elsewhere.
OF_CREDENTIALS = {(Endpoint.TOKEN, "GET"), (Endpoint.TOKEN, "POST")}
# Made with the password only, whoever asks.
WITH_PASSWORD = {(Endpoint.API_KEYS, "GET"), (Endpoint.API_KEYS, "POST"), (Endpoint.API_KEY, "DELETE")}


def test_every_route_has_a_row_and_every_row_a_route() -> None:
    routed = {(route.endpoint, route.method) for route in ROUTES}

    assert ROWS.keys() | OF_CREDENTIALS == routed
    assert len(ROUTES) == len(routed)


async def faults(world: World) -> list[str]:
    """Where the answer is another than the rows say; every row is asked by everybody, and what answers GET by HEAD, too."""
    kit = whole_kit()
    await kit.push(world.as_user("admin"), NAME)
    found = []
    for (endpoint, method), rows in ROWS.items():
        is_password_needed = (endpoint, method) in WITH_PASSWORD and world.scheme != "basic"
        for number, row in enumerate(rows):
            allowed = set() if is_password_needed else row.allowed
            for user in EVERYBODY:
                wanted = row.statuses if user in allowed else (401,) if user == ANONYMOUS else (403,)
                for asks_head in (False, True) if method == "GET" else (False,):
                    reply = await row.ask(Visit(world, user, kit, asks_head))
                    if fault := fault_of(reply, wanted):
                        found.append(f"{endpoint.name} {method} {number} by {user}, {asks_head=}: {fault}")
    return found


def fault_of(reply: Reply, wanted: tuple[int, ...]) -> str | None:
    if reply.status not in wanted:
        return f"{reply.status} {reply.body[:200]!r}; wanted {wanted}"
    if reply.status == 401 and not reply.headers.get("WWW-Authenticate"):
        return "401 without a challenge"
    return None


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_V_13_everybody_may_do_at_every_route_what_the_policy_says_and_nothing_else(
    storage: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    async with world(storage, tmp_path, scheme=scheme) as registry:
        assert not await faults(registry)


@pytest.mark.s3
@pytest.mark.timeout(600)  # some 3,000 requests
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_on_an_object_store_everybody_may_do_the_same(
    s3_storage: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    async with world(s3_storage, tmp_path, scheme=scheme) as registry:
        assert not await faults(registry)
