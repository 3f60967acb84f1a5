"""The token handshake, and to whom a password is shown."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from aiohttp import web
from yarl import URL

from kitclient.auth import Authorizer, TokenAnswer
from kitclient.credentials import Credential
from kitclient.errors import ServerMisbehaved
from kitspec.digest import Digest
from kitspec.errors import Denied, Unauthorized
from kitspec.names import Tag
from tests.clock import Clock
from tests.contracts.registry_contract import CONTENT, REPOSITORY, push_blob, read_blob
from tests.kitclient.peer import client, serving

SECRET = Credential("user", "canary:password")
IDENTITY = Credential(identity_token="canary-identity")


def knows(credential: Credential | None):
    async def source(host: str) -> Credential | None:
        _ = host
        return credential

    return source


class Realm:
    """A token service without HTTP: what it was asked, and what it answers."""

    def __init__(self, *answers: tuple[int, Any]) -> None:
        self.asked: list[tuple[str, URL, dict[str, str], dict[str, str] | None]] = []
        self.answers = list(answers) or [(200, {"token": "t"})] * 100

    async def __call__(self, method, url, *, headers, form) -> TokenAnswer:
        self.asked.append((method, url, dict(headers), dict(form) if form else None))
        status, document = self.answers.pop(0)
        return TokenAnswer(status, document if isinstance(document, bytes) else json.dumps(document).encode())


def bearer(realm: str = "https://auth.example/token", scope: str = "repository:lib/a:pull") -> list[str]:
    return [f'Bearer realm="{realm}",service="registry.example",scope="{scope}"']


def authorizer(
    realm: Realm,
    credential: Credential | None = None,
    *,
    origin: str = "https://registry.example/",
    clock=None,
) -> Authorizer:
    return Authorizer(URL(origin), "registry.example", knows(credential), realm, clock=clock or Clock())


async def test_nothing_is_sent_before_it_is_asked_for():
    realm = Realm()

    assert await authorizer(realm, SECRET).header("repository:lib/a:pull") is None
    assert realm.asked == []


async def test_without_credentials_a_token_is_asked_for_anonymously():
    realm = Realm()

    header = await authorizer(realm).answer(bearer(), "repository:lib/a:pull", used=None)

    assert header == "Bearer t"
    ((method, url, headers, form),) = realm.asked
    assert (method, headers, form) == ("GET", {}, None)
    assert url.query.getall("scope") == ["repository:lib/a:pull"]
    assert url.query["service"] == "registry.example"


async def test_a_password_goes_to_the_token_service_as_basic():
    realm = Realm((200, {"access_token": "t"}))

    await authorizer(realm, SECRET).answer(bearer(), "repository:lib/a:pull", used=None)

    ((method, url, headers, _),) = realm.asked
    assert method == "GET"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == b"user:canary:password"
    assert url.query["account"] == "user"
    assert "canary" not in str(url)


async def test_an_identity_token_is_posted_as_a_refresh_token():
    realm = Realm()

    await authorizer(realm, IDENTITY).answer(bearer(), "repository:lib/a:pull,push", used=None)

    ((method, url, headers, form),) = realm.asked
    assert (method, headers) == ("POST", {})
    assert "canary" not in str(url)
    assert form == {
        "grant_type": "refresh_token",
        "service": "registry.example",
        "client_id": "kitclient",
        "scope": "repository:lib/a:pull,push repository:lib/a:pull",
        "refresh_token": "canary-identity",
    }


@pytest.mark.parametrize("status", [400, 401, 404, 405])
@pytest.mark.parametrize(
    ("credential", "shown"),
    [
        (IDENTITY, b":canary-identity"),
        (Credential("user", "canary:password", "canary-identity"), b"user:canary:password"),
    ],
    ids=["token", "token and password"],
)
async def test_a_token_service_that_takes_no_post_is_asked_by_get(status, credential, shown):
    realm = Realm((status, {}), (200, {"token": "t"}))

    assert (
        await authorizer(realm, credential).answer(bearer(), "repository:lib/a:pull", used=None) == "Bearer t"
    )

    (post, *_), (get, url, headers, form) = realm.asked
    assert (post, get, form) == ("POST", "GET", None)
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")) == shown
    assert "canary" not in str(url)


@pytest.mark.parametrize(
    ("status", "kind"), [(403, Denied), (307, ServerMisbehaved), (415, ServerMisbehaved)]
)
async def test_any_other_answer_to_the_post_is_the_answer(status, kind):
    realm = Realm((status, {}))

    with pytest.raises(kind):
        await authorizer(realm, IDENTITY).answer(bearer(), "x", used=None)

    assert len(realm.asked) == 1


async def test_an_identity_token_that_is_refused_both_ways_is_an_error_without_it():
    with pytest.raises(Unauthorized) as refusal:
        await authorizer(Realm((400, {"error": "invalid_grant"}), (401, {})), IDENTITY).answer(
            bearer(), "x", used=None
        )

    assert "canary" not in str(refusal.value)


@pytest.mark.parametrize("more", [5, "", None, []], ids=str)
async def test_an_identity_token_is_replaced_by_the_one_that_the_service_gives(more):
    """A service may take each of them once only (RFC 6749 section 6)."""
    answers = [
        {"token": "a", "refresh_token": "second"},
        {"token": "b", "refresh_token": more},
        {"token": "c"},
    ]
    realm = Realm(*[(200, answer) for answer in answers])
    subject = authorizer(realm, IDENTITY)

    for scope in ("x", "y", "z"):
        await subject.answer(bearer(), scope, used=None)

    assert [form["refresh_token"] for _, _, _, form in realm.asked if form] == [
        "canary-identity",
        "second",
        "second",
    ]


async def test_C_34_a_token_is_no_password_for_basic():
    with pytest.raises(Unauthorized, match="a token is kept"):
        await authorizer(Realm(), IDENTITY).answer(['Basic realm="x"'], "x", used=None)


async def test_a_registry_that_changes_from_basic_to_bearer_is_followed():
    subject = authorizer(Realm(), SECRET)

    assert await subject.answer(['Basic realm="x"'], "x", used=None) == SECRET.basic
    assert await subject.answer(bearer(), "x", used=SECRET.basic) == "Bearer t"
    assert await subject.header("x") == "Bearer t"


@pytest.mark.parametrize(
    ("said", "good_for"),
    [(2, 1.0), (1.5, 0.75), (20, 10.0), (300, 290.0), (0, 50.0), (-5, 50.0), (None, 50.0)],
)
async def test_a_token_is_used_as_long_as_it_is_said_to_live(said, good_for):
    clock, realm = Clock(), Realm(*[(200, {"token": f"t{n}", "expires_in": said}) for n in range(2)])
    subject = authorizer(realm, clock=clock)
    await subject.answer(bearer(), "x", used=None)

    clock.now += good_for - 0.01
    assert await subject.header("x") == "Bearer t0"
    clock.now += 0.02
    assert await subject.header("x") == "Bearer t1"


async def test_a_registry_token_is_shown_as_it_is():
    realm = Realm()

    header = await authorizer(realm, Credential(registry_token="as-is")).answer(bearer(), "x", used=None)

    assert header == "Bearer as-is"
    assert realm.asked == []


async def test_a_token_is_kept_for_its_scope_until_shortly_before_it_ends():
    clock, realm = Clock(), Realm(*[(200, {"token": f"t{number}", "expires_in": 300}) for number in range(5)])
    subject = authorizer(realm, clock=clock)
    pull, push = "repository:lib/a:pull", "repository:lib/a:pull,push"

    assert await subject.answer(bearer(), pull, used=None) == "Bearer t0"
    assert await subject.header(pull) == "Bearer t0"
    assert await subject.header(push) == "Bearer t1"
    clock.now += 289
    assert await subject.header(pull) == "Bearer t0"
    clock.now += 2
    assert await subject.header(pull) == "Bearer t2"
    assert await subject.answer(bearer(), pull, used="Bearer t2") == "Bearer t3"
    assert await subject.answer(bearer(), pull, used="Bearer t2") == "Bearer t3"


@pytest.mark.parametrize(
    ("origin", "realm"),
    [
        ("https://registry.example/", "http://registry.example/token"),
        ("https://registry.example/", "http://auth.example/token"),
        ("https://registry.example/", "https://127.0.0.1/token"),
        ("https://registry.example/", "https://user:word@auth.example/token"),
        ("https://registry.example/", "file:///etc/passwd"),
        ("https://registry.example/", "/token"),
        ("https://registry.example/", ""),
        ("http://registry.example/", "http://evil.example/token"),
        ("http://127.0.0.1:5000/", "http://evil.example/token"),
        ("http://registry.example/", "http://127.0.0.1:5000/token"),
        ("https://registry.example/", "https://auth.example\\\\@registry.example/"),
    ],
)
@pytest.mark.parametrize("credential", [SECRET, IDENTITY, None], ids=["password", "identity", "none"])
async def test_C_26_C_32_a_realm_that_is_not_to_be_trusted_is_not_asked(origin, realm, credential):
    service = Realm()

    with pytest.raises(ServerMisbehaved):
        await authorizer(service, credential, origin=origin).answer(bearer(realm), "x", used=None)

    assert service.asked == []


@pytest.mark.parametrize(
    ("origin", "realm"),
    [
        ("https://registry.example/", "https://auth.example/token?x=y"),
        ("https://registry.example/", "https://registry.example:8443/token"),
        ("http://registry.example:5000/", "http://registry.example:5001/token"),
        ("http://registry.example:5000/", "https://auth.example/token"),
        ("http://127.0.0.1:5000/", "http://localhost:5001/token"),
    ],
)
async def test_a_realm_by_the_rules_is_asked(origin, realm):
    service = Realm()

    await authorizer(service, SECRET, origin=origin).answer(bearer(realm), "x", used=None)

    assert str(service.asked[0][1]).startswith(realm)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((401, {}), Unauthorized),
        ((403, {}), Denied),
        ((302, {}), ServerMisbehaved),
        ((404, {}), ServerMisbehaved),
        ((200, b"not json"), ServerMisbehaved),
        ((200, []), ServerMisbehaved),
        ((200, {}), ServerMisbehaved),
        ((200, {"token": 5}), ServerMisbehaved),
        ((200, {"token": "two words"}), ServerMisbehaved),
        ((200, {"token": "line\r\nX-Evil: 1"}), ServerMisbehaved),
        ((200, {"token": "t", "expires_in": "soon"}), ServerMisbehaved),
        ((200, {"token": "t", "expires_in": True}), ServerMisbehaved),
        ((200, b"[" * 100_000), ServerMisbehaved),
    ],
    ids=str,
)
async def test_what_is_no_token_is_refused(answer, kind):
    with pytest.raises(kind) as refusal:
        await authorizer(Realm(answer), SECRET).answer(bearer(), "x", used=None)

    assert "canary" not in str(refusal.value)


async def test_C_32_without_credentials_basic_is_not_answered():
    with pytest.raises(Unauthorized, match="log in"):
        await authorizer(Realm()).answer(['Basic realm="x"'], "x", used=None)


async def test_basic_is_remembered_and_refused_once():
    subject = authorizer(Realm(), SECRET)

    header = await subject.answer(['Basic realm="x"'], "x", used=None)

    assert header == SECRET.basic == await subject.header("anything")
    with pytest.raises(Unauthorized, match="refuses") as refusal:
        await subject.answer(['Basic realm="x"'], "x", used=header)
    assert "canary" not in str(refusal.value)


async def test_bearer_is_preferred_to_basic_and_the_unknown_refused():
    assert (
        await authorizer(Realm(), SECRET).answer(['Basic realm="x"', *bearer()], "x", used=None) == "Bearer t"
    )
    with pytest.raises(Unauthorized, match="kind of authentication"):
        await authorizer(Realm(), SECRET).answer(["Negotiate"], "x", used=None)
    with pytest.raises(Unauthorized, match="kind of authentication"):
        await authorizer(Realm(), SECRET).answer([], "x", used=None)


async def test_the_whole_handshake_over_http():
    async def token(request: web.Request) -> web.Response:
        scope = " ".join(request.query.getall("scope"))
        return web.json_response({"token": scope.replace(":", ".").replace(" ", "+").replace("/", "-")})

    async with serving(token) as realm:

        async def answer(request: web.Request) -> web.Response:
            await request.read()
            needed = "pull" if request.method in {"GET", "HEAD"} else "pull,push"
            if f"repository.lib-a.{needed}" not in request.headers.get("Authorization", ""):
                challenge = (
                    f'Bearer realm="http://{realm.host}/token",service="s",scope="repository:lib/a:{needed}"'
                )
                return web.Response(status=401, headers={"WWW-Authenticate": challenge})
            if request.method == "POST":
                return web.Response(status=202, headers={"Location": "/v2/lib/a/blobs/uploads/1"})
            status = {"PATCH": 202, "PUT": 201}.get(request.method, 200)
            return web.Response(status=status, body=CONTENT if request.method == "GET" else b"")

        async with serving(answer) as peer, client(peer, credentials=knows(SECRET)) as registry:
            assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT
            assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT
            await push_blob(registry, CONTENT)

    assert realm.authorizations == [[SECRET.basic]] * 2
    assert all("canary" not in str(fields) and SECRET.basic not in fields for fields in peer.authorizations)
    assert peer.authorizations[0] == []
    assert [len(fields) for fields in peer.authorizations[1:]] == [1] * (len(peer.requests) - 1)


async def test_C_32_a_token_service_that_redirects_is_not_followed():
    """V-42: a redirect from the token service."""
    async with serving(answer_ok) as elsewhere:

        async def token(request: web.Request) -> web.Response:
            _ = request
            return web.Response(status=307, headers={"Location": f"http://{elsewhere.host}/"})

        async with serving(token) as realm:

            async def answer(request: web.Request) -> web.Response:
                _ = request
                challenge = f'Bearer realm="http://{realm.host}/token",service="s"'
                return web.Response(status=401, headers={"WWW-Authenticate": challenge})

            async with serving(answer) as peer, client(peer, credentials=knows(SECRET)) as registry:
                with pytest.raises(ServerMisbehaved, match="307"):
                    await registry.get_manifest(REPOSITORY, Tag("v1"))

        assert elsewhere.requests == []


async def answer_ok(request: web.BaseRequest) -> web.Response:
    _ = request
    return web.json_response({"token": "t"})
