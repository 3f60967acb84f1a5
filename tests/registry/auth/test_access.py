"""What the policy says, kept at every door and by every way around it; the rows of reference/security.md have their IDs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kitspec.digest import Digest
from registry import app
from registry.auth.guard import Guard
from registry.auth.policy import Policy
from registry.auth.policy_config import AccessControl
from tests.registry.auth.logins import basic, bearer, written
from tests.registry.auth.world import ACCESS, ANONYMOUS, World, message_of, password_of, world
from tests.registry.wire import (
    LAYER,
    OCI_MANIFEST,
    Reply,
    assert_refused,
    encode,
    image,
    next_target,
    path_of,
)

NAME = "team/kit"
SECRET = b"what only team may read"


@pytest.fixture
async def registry(storage: dict[str, Any], tmp_path: Path) -> AsyncIterator[World]:
    async with world(storage, tmp_path) as registry:
        yield registry


@pytest.fixture
async def with_tokens(storage: dict[str, Any], tmp_path: Path) -> AsyncIterator[World]:
    async with world(storage, tmp_path, scheme="bearer") as registry:
        yield registry


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[Guard]:
    """The guards of registries that are started, so that a policy can be put in the place of another."""
    made: list[Guard] = []

    def make(*arguments: Any) -> Guard:
        made.append(Guard(*arguments))
        return made[-1]

    monkeypatch.setattr(app, "Guard", make)
    return made


def policy_without(user: str) -> Policy:
    document = json.loads(json.dumps(ACCESS))
    for rules in document["repositories"].values():
        rules["policies"] = [rule for rule in rules.get("policies", []) if user not in rule["users"]]
    document["repositories"]["team/**"]["policies"].append({"users": ["somebody"], "actions": ["read"]})
    policy = Policy.from_config(AccessControl.model_validate(document), None)
    policy.is_for_everybody = False
    return policy


async def put(
    registry: World, user: str, reference: str, manifest: dict[str, Any], name: str = NAME
) -> Reply:
    headers = {"Content-Type": OCI_MANIFEST}
    return await registry.ask(
        user, "PUT", f"/v2/{name}/manifests/{reference}", headers=headers, body=encode(manifest)
    )


async def tags(registry: World) -> list[str]:
    listed: list[str] = (await registry.ask("admin", "GET", f"/v2/{NAME}/tags/list")).json()["tags"]
    return listed


# ---- other repositories' blobs


async def test_V_11_A_12_a_digest_opens_no_blob_of_a_repository_that_may_not_be_read(
    registry: World,
) -> None:
    admin = registry.as_user("admin")
    digest = await admin.push_blob(NAME, SECRET)
    await admin.push_blob("public/kit", b"x")
    await admin.push_blob("own/kit", b"x")

    for user in (ANONYMOUS, "stranger", "reader"):
        for method in ("GET", "HEAD"):
            reply = await registry.ask(user, method, f"/v2/public/kit/blobs/{digest}")
            assert reply.status == 404
    for query in (f"mount={digest}&from={NAME}", f"mount={digest}"):
        reply = await registry.ask("stranger", "POST", f"/v2/own/kit/blobs/uploads/?{query}")
        assert reply.status == 202
    reply = await registry.ask("stranger", "POST", f"/v2/own/kit/blobs/uploads/?digest={digest}")
    assert_refused(reply, 400, code="DIGEST_INVALID")
    assert (await registry.ask("stranger", "GET", f"/v2/own/kit/blobs/{digest}")).status == 404


async def test_A_10_what_may_not_be_read_is_mounted_as_if_it_were_not_there(registry: World) -> None:
    admin = registry.as_user("admin")
    digest = await admin.push_blob(NAME, SECRET)
    await admin.push_blob("other/kit", b"x")  # where the writer pushes and does not read

    absent = Digest.of(b"absent")
    for source in (NAME, "other/kit", "nowhere/at/all"):
        refused = await registry.ask(
            "stranger", "POST", f"/v2/own/kit/blobs/uploads/?mount={digest}&from={source}"
        )
        missing = await registry.ask(
            "stranger", "POST", f"/v2/own/kit/blobs/uploads/?mount={absent}&from={source}"
        )
        assert (refused.status, missing.status) == (202, 202)
        assert refused.headers.keys() == missing.headers.keys()


async def test_a_blob_is_mounted_from_where_it_may_be_read_named_or_found(registry: World) -> None:
    admin = registry.as_user("admin")
    named, found = await admin.push_blob(NAME, SECRET), await admin.push_blob(NAME, b"another")

    for query, digest in ((f"mount={named}&from={NAME}", named), (f"mount={found}", found)):
        reply = await registry.ask("writer", "POST", f"/v2/other/kit/blobs/uploads/?{query}")
        assert reply.status == 201
        assert reply.header("Docker-Content-Digest") == digest


@pytest.mark.parametrize(
    "query",
    [
        "from=team/kit&from=public/kit",
        "from=team/kit&from=team/kit",
        "from=",
        "from=../team/kit",
        "from=team%252Fkit",
        "from=team//kit",
        "from=/team/kit",
        "from=Team/kit",
        "from=own/kit&from=team/kit",
        f"mount={Digest.of(b'another')}&from=team/kit",
        f"mount={Digest.of(SECRET)}",
    ],
)
async def test_A_11_the_source_of_a_mount_is_one_name_and_read_one_way(registry: World, query: str) -> None:
    digest = await registry.as_user("admin").push_blob(NAME, SECRET)

    reply = await registry.ask("stranger", "POST", f"/v2/own/kit/blobs/uploads/?mount={digest}&{query}")

    assert_refused(reply, 400)


async def test_A_11_a_source_in_the_body_is_none_and_the_target_is_no_way_around(registry: World) -> None:
    digest = await registry.as_user("admin").push_blob(NAME, SECRET)
    target, form = "/v2/own/kit/blobs/uploads/", {"Content-Type": "application/x-www-form-urlencoded"}

    for query, body in (
        ("", f"mount={digest}&from={NAME}".encode()),
        (f"?mount={digest}", f"from={NAME}".encode()),
        (f"?mount={digest}&from=own/kit", b""),
        (f"?mount={digest}&from=team%2Fkit", b""),
    ):
        reply = await registry.ask("stranger", "POST", f"{target}{query}", headers=form, body=body)
        assert reply.status == 202
    assert (await registry.ask("admin", "GET", f"/v2/own/kit/blobs/{digest}")).status == 404


# ---- tags that may be made and not moved


@pytest.mark.parametrize("tag", ["latest", "v1", "main", "_"])
async def test_V_12_who_may_create_tags_moves_none_whatever_it_is_called(registry: World, tag: str) -> None:
    admin = registry.as_user("admin")
    _, digest = await admin.push_image(NAME, tag)
    manifest = image(annotations={"by": "creator"})
    other = Digest.of(encode(manifest))

    refused = [
        await put(registry, "creator", tag, manifest),
        await put(registry, "creator", f"{other}?tag={tag}", manifest),
        await put(registry, "creator", f"{other}?tag=fresh&tag={tag}", manifest),
    ]

    for reply in refused:
        assert_refused(reply, 403, code="DENIED")
        assert tag in message_of(reply)
    assert await tags(registry) == [tag]
    head = await registry.ask("reader", "HEAD", f"/v2/{NAME}/manifests/{tag}")
    assert head.header("Docker-Content-Digest") == digest


async def test_the_same_push_once_more_moves_nothing_and_is_no_mistake(registry: World) -> None:
    manifest, _ = await registry.as_user("admin").push_image(NAME, "v1")

    assert (await put(registry, "creator", "v1", manifest)).status == 201


async def test_of_two_who_create_a_tag_at_once_one_does(registry: World) -> None:
    await registry.as_user("admin").push_image(NAME, "v1")
    manifests = [image(annotations={"n": str(number)}) for number in range(12)]

    replies = await asyncio.gather(*(put(registry, "creator", "new", manifest) for manifest in manifests))

    assert sorted(reply.status for reply in replies) == [201] + [403] * 11
    (winner,) = (n for n, reply in enumerate(replies) if reply.status == 201)
    stored = await registry.ask("reader", "GET", f"/v2/{NAME}/manifests/new")
    assert stored.body == encode(manifests[winner])


async def test_who_may_update_tags_creates_none(registry: World) -> None:
    await registry.as_user("admin").push_image(NAME, "v1")
    manifest = image(annotations={"by": "updater"})

    assert (await put(registry, "updater", "v1", manifest)).status == 201
    assert_refused(await put(registry, "updater", "v2", manifest), 403, code="DENIED")
    assert await tags(registry) == ["v1"]


async def test_a_manifest_with_several_tags_is_not_deleted_by_its_digest_where_collisions_are_detected(
    storage: dict[str, Any], tmp_path: Path
) -> None:
    actions = ["read", "create", "update", "delete", "detectManifestCollision"]
    access = {"repositories": {"**": {"policies": [{"users": ["writer"], "actions": actions}]}}}
    async with world(storage, tmp_path, access=access) as registry:
        writer = registry.as_user("writer")
        manifest, digest = await writer.push_image(NAME, "v1")
        await writer.push_manifest(NAME, "v2", manifest)

        reply = await writer("DELETE", f"/v2/{NAME}/manifests/{digest}")
        assert_refused(reply, 403, code="DENIED")
        assert "v1, v2" in message_of(reply)
        assert (await writer("DELETE", f"/v2/{NAME}/manifests/v2")).status == 202
        assert (await writer("DELETE", f"/v2/{NAME}/manifests/{digest}")).status == 202


# ---- what nobody is told


async def test_A_08_V_19_without_credentials_what_is_private_and_what_is_not_there_are_the_same(
    registry: World,
) -> None:
    admin = registry.as_user("admin")
    _, digest = await admin.push_image(NAME, "v1")
    for method in ("GET", "HEAD"):
        answers = [
            await registry.ask(ANONYMOUS, method, target)
            for target in (
                f"/v2/{NAME}/manifests/v1",
                f"/v2/{NAME}/manifests/v2",
                f"/v2/{NAME}/manifests/{digest}",
                f"/v2/{NAME}/blobs/{Digest.of(LAYER)}",
                "/v2/team/none/manifests/v1",
                "/v2/nobody/none/manifests/v1",
                f"/v2/{NAME}/_modelkit/files/v1",
                f"/v2/nobody/none/referrers/{digest}",
                f"/v2/{NAME}/tags/list",
            )
        ]
        assert {(reply.status, reply.body) for reply in answers} == {(401, answers[0].body)}


async def test_A_08_what_everybody_may_read_is_read_without_credentials_and_not_written(
    registry: World,
) -> None:
    manifest, _ = await registry.as_user("admin").push_image("public/kit", "v1")

    assert (await registry.ask(ANONYMOUS, "GET", "/v2/public/kit/manifests/v1")).body == encode(manifest)
    assert (await registry.ask("stranger", "GET", "/v2/public/kit/manifests/v1")).status == 200
    assert_refused(await put(registry, ANONYMOUS, "v2", manifest, "public/kit"), 401)
    assert_refused(await put(registry, "stranger", "v2", manifest, "public/kit"), 403)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v2/_catalog", 401),
        ("/v2/_catalog?n=1", 401),
        ("http://elsewhere.example/v2/_catalog", 401),
        ("/v2/_catalog/", 404),
        ("//v2/_catalog", 404),
        ("/v2//_catalog", 404),
        ("/v2/%5fcatalog", 404),
        ("/V2/_catalog", 404),
        ("/v2/./_catalog", 404),
        ("/v2/x/../_catalog", 404),
        ("/v2/_catalog;x", 404),
    ],
)
async def test_V_18_no_spelling_of_the_catalogues_path_leads_around_the_policy(
    storage: dict[str, Any], tmp_path: Path, target: str, status: int
) -> None:
    async with world(storage, tmp_path, access={}) as registry:
        await registry.as_user("admin").push_image(NAME, "v1")

        assert_refused(await registry.ask(ANONYMOUS, "GET", target), status)


async def test_lists_show_what_may_be_read_and_name_nothing_else(registry: World) -> None:
    admin = registry.as_user("admin")
    names = ["public/a", "public/b", "team/a", "team/b", "zoo/a"]
    for name in names:
        await admin.push_blob(name, b"x")

    seen: dict[str, list[str]] = {}
    for user in (ANONYMOUS, "stranger", "reader", "serving", "admin"):
        target, seen[user] = "/v2/_catalog?n=1", []
        while target:
            reply = await registry.ask(user, "GET", target)
            seen[user] += reply.json()["repositories"]
            target = next_target(reply) or ""
            assert user == "admin" or "zoo" not in target

    assert seen == {
        ANONYMOUS: names[:2],
        "stranger": names[:2],
        "reader": names[:4],
        "serving": names[:4],
        "admin": names,
    }


async def test_the_hubs_cursor_names_no_repository_that_may_not_be_read(registry: World) -> None:
    admin = registry.as_user("admin")
    for name in ("public/a", "team/a", "zoo/a", "public/b"):
        await admin.push_image(name, "v1")

    for user in (ANONYMOUS, "stranger"):
        reply = await registry.ask(user, "GET", "/hf/api/models?limit=1")
        assert reply.status == 200
        assert b"team" not in reply.body
        assert "team" not in str(reply.headers.get("Link"))


async def test_the_hub_says_who_one_is_and_refuses_in_its_clients_words(registry: World) -> None:
    await registry.as_user("admin").push_image(NAME, "v1")

    assert (await registry.ask("reader", "GET", "/hf/api/whoami-v2")).json()["name"] == "reader"
    refused = await registry.ask(ANONYMOUS, "GET", f"/hf/api/models/{NAME}")
    assert (refused.status, refused.header("X-Error-Code")) == (401, "RepoNotFound")
    denied = await registry.ask("stranger", "GET", f"/hf/api/models/{NAME}")
    assert (denied.status, denied.header("X-Error-Code")) == (403, "GatedRepo")


async def test_metrics_are_for_whom_the_policy_names(storage: dict[str, Any], tmp_path: Path) -> None:
    access = {
        "repositories": {"**": {"defaultPolicy": ["read"]}},
        "metrics": {"users": ["reader"]},
    }
    async with world(storage, tmp_path, access=access) as registry:
        assert (await registry.ask("reader", "GET", "/metrics")).status == 200
        assert_refused(await registry.ask("writer", "GET", "/metrics"), 403)
        assert_refused(await registry.ask(ANONYMOUS, "GET", "/metrics"), 401)
    access["metrics"] = {"anonymousPolicy": ["read"]}
    async with world(storage, tmp_path, access=access) as registry:
        assert (await registry.ask(ANONYMOUS, "GET", "/metrics")).status == 200


async def test_no_byte_of_a_body_is_asked_for_before_it_may_be_sent(registry: World) -> None:
    for target in (f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(LAYER)}", f"/v2/{NAME}/manifests/v1"):
        method = "POST" if "uploads" in target else "PUT"
        for user, status in ((ANONYMOUS, b"401"), ("reader", b"403")):
            fields = "".join(
                f"{key}: {value}\r\n" for key, value in (await registry.credentials(user)).items()
            )
            head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1000000\r\n{fields}\r\n"
            assert (await registry.wire.first_answer(head.encode())).startswith(b"HTTP/1.1 " + status)


# ---- tokens


async def test_A_09_V_13_a_token_is_for_what_it_says_and_the_answer_says_what_is_missing(
    with_tokens: World,
) -> None:
    registry = with_tokens
    _, digest = await registry.as_user("admin").push_image(NAME, "v1")
    blobs = f"/v2/{NAME}/blobs"
    cases = [
        ("pull", "GET", "/v2/team/other/manifests/v1", "repository:team/other:pull"),
        ("pull", "PUT", f"/v2/{NAME}/manifests/v1", f"repository:{NAME}:pull,push"),
        ("pull", "POST", f"{blobs}/uploads/", f"repository:{NAME}:pull,push"),
        ("push", "GET", f"/v2/{NAME}/manifests/v1", f"repository:{NAME}:pull"),
        ("pull,push", "DELETE", f"/v2/{NAME}/manifests/{digest}", f"repository:{NAME}:delete"),
        ("pull,push", "DELETE", f"{blobs}/{Digest.of(LAYER)}", f"repository:{NAME}:delete"),
        ("delete", "GET", f"/v2/{NAME}/tags/list", f"repository:{NAME}:pull"),
        ("pull", "GET", "/v2/_catalog", "registry:catalog:*"),
        ("pull", "GET", "/metrics", "registry:metrics:*"),
        ("pull", "GET", f"/hf/api/models/{NAME}x", f"repository:{NAME}x:pull"),
    ]
    for actions, method, target, wanted in cases:
        token = await registry.token("admin", [f"repository:{NAME}:{actions}"])
        reply = await registry.wire(method, target, headers=bearer(token))

        assert_refused(reply, 401, code="UNAUTHORIZED")
        challenge = reply.header("WWW-Authenticate")
        assert f'scope="{wanted}"' in challenge
        assert 'error="insufficient_scope"' in challenge
    # What no token would help with is said, too.
    token = await registry.token("reader", [f"repository:{NAME}:pull,push"])
    assert_refused(
        await registry.wire("POST", f"{blobs}/uploads/", headers=bearer(token)), 403, code="DENIED"
    )


async def test_a_mount_asks_for_a_token_for_both_repositories(with_tokens: World) -> None:
    reply = await with_tokens.ask(
        ANONYMOUS, "POST", f"/v2/{NAME}/blobs/uploads/?mount={Digest.of(LAYER)}&from=own/kit"
    )

    assert_refused(reply, 401)
    assert f'scope="repository:{NAME}:pull,push repository:own/kit:pull"' in reply.header("WWW-Authenticate")


async def test_an_anonymous_token_is_for_what_everybody_may_read(with_tokens: World) -> None:
    manifest, _ = await with_tokens.as_user("admin").push_image("public/kit", "v1")
    scopes = ["repository:public/kit:pull,push", f"repository:{NAME}:pull"]
    headers = bearer(await with_tokens.token(ANONYMOUS, scopes))

    assert (await with_tokens.wire("GET", "/v2/", headers=headers)).status == 200
    pulled = await with_tokens.wire("GET", "/v2/public/kit/manifests/v1", headers=headers)
    assert pulled.body == encode(manifest)
    for name in (NAME, "own/kit"):
        refused = await with_tokens.wire("GET", f"/v2/{name}/manifests/v1", headers=headers)
        assert_refused(refused, 401)


async def test_V_25_A_15_a_token_allows_nothing_that_the_policy_has_taken_away(
    storage: dict[str, Any], tmp_path: Path, guards: list[Guard]
) -> None:
    async with world(storage, tmp_path, scheme="bearer") as registry:
        await registry.as_user("admin").push_image(NAME, "v1")
        assert (await registry.ask("writer", "GET", f"/v2/{NAME}/manifests/v1")).status == 200

        guards[0].policy = policy_without("writer")

        assert_refused(await registry.ask("writer", "GET", f"/v2/{NAME}/manifests/v1"), 403)
        assert_refused(await registry.ask("writer", "POST", f"/v2/{NAME}/blobs/uploads/"), 403)


async def test_V_14_who_leaves_a_group_has_lost_its_rights_with_the_next_request(
    storage: dict[str, Any], tmp_path: Path, guards: list[Guard]
) -> None:
    access = {
        "groups": {"team": {"users": ["reader"]}},
        "repositories": {"team/**": {"policies": [{"groups": ["team"], "actions": ["read"]}]}},
        "adminPolicy": ACCESS["adminPolicy"],
    }
    async with world(storage, tmp_path, access=access) as registry:
        await registry.as_user("admin").push_image(NAME, "v1")
        assert (await registry.ask("reader", "GET", f"/v2/{NAME}/manifests/v1")).status == 200

        access["groups"] = {"team": {"users": ["writer"]}}
        policy = Policy.from_config(AccessControl.model_validate(access), None)
        guards[0].policy = policy

        assert_refused(await registry.ask("reader", "GET", f"/v2/{NAME}/manifests/v1"), 403)
        assert (await registry.ask("writer", "GET", f"/v2/{NAME}/manifests/v1")).status == 200


# ---- uploads


async def test_A_13_an_upload_is_its_owners_and_for_others_it_is_not_there(registry: World) -> None:
    content = b"x" * 100
    path = await registry.as_user("writer").begin_upload(NAME)

    for user, status in (("creator", 404), ("pusher", 404), ("admin", 404), (ANONYMOUS, 401)):
        replies = [
            await registry.ask(user, "PATCH", path, body=content),
            await registry.ask(user, "PUT", f"{path}?digest={Digest.of(content)}", body=content),
            await registry.ask(user, "GET", path),
            await registry.ask(user, "DELETE", path),
        ]
        assert [reply.status for reply in replies] == [status] * 4
    reply = await registry.ask("writer", "PUT", f"{path}?digest={Digest.of(content)}", body=content)
    assert reply.status == 201


async def test_A_13_an_upload_is_its_owners_whichever_way_they_log_in(with_tokens: World) -> None:
    content = b"x" * 100
    with_password = basic("writer", password_of("writer"))
    reply = await with_tokens.wire("POST", f"/v2/{NAME}/blobs/uploads/", headers=with_password)
    path = path_of(reply.header("Location"))

    reply = await with_tokens.ask("writer", "PATCH", path, body=content)
    assert reply.status == 202


async def test_A_14_a_right_that_is_gone_is_gone_in_the_middle_of_an_upload(
    storage: dict[str, Any], tmp_path: Path, guards: list[Guard]
) -> None:
    async with world(storage, tmp_path) as registry:
        path = await registry.as_user("writer").begin_upload(NAME)
        assert (await registry.ask("writer", "PATCH", path, body=SECRET)).status == 202

        guards[0].policy = policy_without("writer")

        reply = await registry.ask("writer", "PUT", f"{path}?digest={Digest.of(SECRET)}")
        assert_refused(reply, 403, code="DENIED")
        reply = await registry.ask("admin", "GET", f"/v2/{NAME}/blobs/{Digest.of(SECRET)}")
        assert reply.status == 404


async def test_A_14_who_is_removed_from_the_file_of_users_does_not_end_an_upload(
    storage: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.auth.watched_file.LOOK_INTERVAL_S", 0.01)
    async with world(storage, tmp_path) as registry:
        path = await registry.as_user("writer").begin_upload(NAME)

        written(registry.users_file, {"admin": password_of("admin")})

        async with asyncio.timeout(20):
            while (await registry.ask("writer", "GET", "/v2/")).status != 401:
                await asyncio.sleep(0.01)
        reply = await registry.ask("writer", "PUT", f"{path}?digest={Digest.of(SECRET)}", body=SECRET)
        assert_refused(reply, 401)


# ---- configurations


async def test_with_accounts_and_no_policy_whoever_is_known_may_do_everything_and_nobody_else_anything(
    storage: dict[str, Any], tmp_path: Path
) -> None:
    async with world(storage, tmp_path, access={}) as registry:
        await registry.as_user("stranger").push_image(NAME, "v1")

        assert (await registry.ask("reader", "GET", f"/v2/{NAME}/manifests/v1")).status == 200
        assert (await registry.ask("reader", "GET", "/metrics")).status == 200
        assert (await registry.ask("reader", "DELETE", f"/v2/{NAME}/manifests/v1")).status == 202
        for target in ("/v2/", "/v2/_catalog", f"/v2/{NAME}/manifests/v1", "/hf/api/models", "/metrics"):
            assert_refused(await registry.ask(ANONYMOUS, "GET", target), 401)


async def test_a_policy_without_accounts_is_kept_for_everybody(serve: Any) -> None:
    access = {"repositories": {"public/**": {"anonymousPolicy": ["read", "create"]}}}
    async with serve(http={"accessControl": access}) as url:
        registry = World(World.wire_of(url), "basic", users_file=Path())
        anonymous = registry.as_user(ANONYMOUS)
        await anonymous.push_image("public/kit", "v1")

        assert (await anonymous("GET", "/v2/")).status == 200
        assert_refused(await anonymous("GET", f"/v2/{NAME}/manifests/v1"), 403, code="DENIED")
        assert_refused(await anonymous("DELETE", "/v2/public/kit/manifests/v1"), 403, code="DENIED")
