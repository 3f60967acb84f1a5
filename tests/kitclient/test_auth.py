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


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


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
async def test_C_32_a_realm_that_is_not_to_be_trusted_is_not_asked(origin, realm, credential):
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
