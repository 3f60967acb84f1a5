"""The token endpoint, without HTTP: who gets a token for what, and how it is refused."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any
from urllib.parse import urlencode

import pytest

from kitspec.errors import QueryInvalid, Unauthorized
from registry.auth.api_keys import ApiKeys
from registry.auth.http_auth import BasicCredentials, BearerToken, Credentials
from registry.auth.identity import Grant, Identity
from registry.auth.issuers import OwnIssuer
from registry.auth.login import Login
from registry.auth.token_keys import Seal, TokenKeys
from registry.auth.token_service import FORM_SIZE_MAX, GrantRefused, TokenService
from registry.auth.tokens import TokenInvalid, parse_token
from storage_backends.memory import MemoryBackend
from tests.clock import BEGIN, Clock
from tests.registry.auth.logins import SERVICE

FORM = "application/x-www-form-urlencoded"
ALICE = BasicCredentials("alice", b"secret")


class Desk:
    """Passwords without the file, and API keys."""

    def __init__(self, keys: ApiKeys) -> None:
        self.passwords = {"alice": "1"}
        self.keys = keys

    def is_version(self, name: str, version: str) -> bool:
        return self.passwords.get(name) == version

    async def login(self, credentials: Credentials, address: str) -> Login:
        match credentials:
            case BasicCredentials(user="alice", password=b"secret"):
                return Login("alice", method="basic", binding=f"password:{self.passwords['alice']}")
            case BasicCredentials(user="ci", password=b"workload"):
                return Login("oidc:ci", frozenset({"builders"}), method="oidc", expires=BEGIN + 120)
            case BasicCredentials(user="alice", password=key) if key.startswith(b"mkr_"):
                return await self.keys.login(key.decode())
            case BearerToken(text="access"):
                return Login("alice", method="bearer")
            case _:
                raise Unauthorized("the user name or the password is wrong")


def granted(identity: Identity, kind: str, name: str, actions: Iterable[str]) -> frozenset[str]:
    """Everybody may pull from public/…; alice may do everything."""
    if identity.name == "alice":
        return frozenset(actions)
    return frozenset(actions) & {"pull"} if name.startswith("public/") else frozenset()


class Endpoint:
    def __init__(self, desk: Desk, issuer: OwnIssuer, service: TokenService, clock: Clock) -> None:
        self.desk = desk
        self.clock = clock
        self.issuer = issuer
        self.service = service

    async def get(self, query: str, credentials: Credentials | None = ALICE) -> dict[str, Any]:
        return await self.service.answer_get(query, credentials, "192.0.2.1")

    async def post(self, content_type: str = FORM, **form: Any) -> dict[str, Any]:
        complete = {"service": SERVICE, "client_id": "test", **form}
        content = urlencode(
            {name: value for name, value in complete.items() if value is not None}, doseq=True
        )
        return await self.service.answer_post(content.encode(), content_type, "192.0.2.1")

    async def access(self, reply: dict[str, Any]) -> Login:
        return await self.issuer.login(parse_token(reply["token"]))


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    backend, clock = MemoryBackend(), Clock()
    await backend.start()
    api_keys = ApiKeys(backend, is_user={"alice"}.__contains__, clock=clock)
    desk = Desk(api_keys)
    keys = TokenKeys(backend, rotation_s=1e6, keep_s=1e6, seal=Seal(None), clock=clock)
    await keys.start()
    issuer = OwnIssuer("own", SERVICE, keys, passwords=desk, keys=api_keys, clock=clock)  # type: ignore[arg-type]
    service = TokenService(issuer, desk, granted, access_life_s=300, refresh_life_s=3600, clock=clock)
    yield Endpoint(desk, issuer, service, clock)
    await backend.close()


async def test_a_token_says_who_and_for_what(endpoint: Endpoint) -> None:
    reply = await endpoint.get(f"service={SERVICE}&scope=repository:a/b:pull,push&scope=registry:catalog:*")

    assert reply["token"] == reply["access_token"]
    assert reply["expires_in"] == 300
    assert reply["issued_at"] == "2027-01-15T08:00:00Z"
    assert "refresh_token" not in reply
    login = await endpoint.access(reply)
    assert (login.name, login.method, login.expires) == ("alice", "bearer", BEGIN + 300)
    assert login.grants == (
        Grant("repository", "a/b", frozenset({"pull", "push"})),
        Grant("registry", "catalog", frozenset({"*"})),
    )


@pytest.mark.parametrize(
    ("query", "grants"),
    [
        ("", 0),
        ("service=other.example&scope=repository:a/b:pull", 1),
        ("scope=repository:a/b:pull", 1),
        ("scope=repository(plugin):a/b:pull", 1),
        ("scope=repository:host:5000/a:pull", 0),
        ("scope=*", 0),
        ("scope=repository:a/b:*", 1),
        ("scope=plugin:a/b:pull", 0),
        ("scope=repository:a/b:fly", 0),
        ("scope=%00%ff%zz", 0),
        ("scope=repository:a:pull%20repository:b:pull", 2),
        ("scope=" + "%20".join(f"repository:a{n}:pull" for n in range(50)), 50),
        ("&&&=&a=b&account=root", 0),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_A_05_what_is_not_understood_is_not_granted_and_no_error(
    query: str, grants: int, endpoint: Endpoint
) -> None:
    login = await endpoint.access(await endpoint.get(query))

    assert login.grants is not None
    assert len(login.grants) == grants


@pytest.mark.parametrize("count", [51, 1000])
async def test_A_05_L_24_too_many_scopes_are_refused(count: int, endpoint: Endpoint) -> None:
    scope = "%20".join(f"repository:a{number}:pull" for number in range(count))

    with pytest.raises(QueryInvalid, match="at most 50"):
        await endpoint.get(f"scope={scope}")
    with pytest.raises(QueryInvalid, match="parameters"):
        await endpoint.get("&".join(["scope=x"] * 1000))


async def test_L_24_a_token_that_no_header_could_carry_is_refused(endpoint: Endpoint) -> None:
    names = ["/".join([f"{number:03}" + "x" * 100, "y" * 100]) for number in range(40)]

    with pytest.raises(QueryInvalid, match="ask for fewer"):
        await endpoint.get("scope=" + "%20".join(f"repository:{name}:pull" for name in names))


async def test_A_08_an_anonymous_token_is_for_what_everybody_may(endpoint: Endpoint) -> None:
    reply = await endpoint.get(
        "offline_token=true&scope=repository:public/a:pull,push%20repository:private/a:pull", None
    )

    login = await endpoint.access(reply)
    assert login.is_anonymous
    assert login.grants == (Grant("repository", "public/a", frozenset({"pull"})),)
    assert "refresh_token" not in reply


async def test_a_token_does_not_outlive_what_it_was_made_of(endpoint: Endpoint) -> None:
    reply = await endpoint.get("offline_token=true", BasicCredentials("ci", b"workload"))

    login = await endpoint.access(reply)
    assert (login.name, login.groups, login.expires) == ("oidc:ci", {"builders"}, BEGIN + 120)
    assert reply["expires_in"] == 120
    assert "refresh_token" not in reply


async def test_a_token_is_not_exchanged_for_another_one(endpoint: Endpoint) -> None:
    with pytest.raises(Unauthorized, match="cannot be exchanged"):
        await endpoint.get("", BearerToken("access"))


async def test_V_14_a_token_ends_with_the_password_it_was_made_of(endpoint: Endpoint) -> None:
    reply = await endpoint.get("scope=repository:a/b:pull")
    login = await endpoint.access(reply)
    assert login.is_current()

    endpoint.desk.passwords["alice"] = "2"

    assert not login.is_current()
    with pytest.raises(TokenInvalid, match="changed or taken back"):
        await endpoint.access(reply)


async def test_a_password_gets_a_token_by_POST(endpoint: Endpoint) -> None:
    reply = await endpoint.post(
        grant_type="password",
        username="alice",
        password="secret",
        scope="repository:a/b:pull repository:x:fly",
    )

    assert (await endpoint.access(reply)).name == "alice"
    assert reply["scope"] == "repository:a/b:pull"
    assert "refresh_token" not in reply


async def test_a_refresh_token_gets_tokens_without_the_password(endpoint: Endpoint) -> None:
    first = await endpoint.post(
        grant_type="password", username="alice", password="secret", access_type="offline"
    )

    reply = await endpoint.post(
        grant_type="refresh_token", refresh_token=first["refresh_token"], scope="repository:a/b:push"
    )

    login = await endpoint.access(reply)
    assert (login.name, login.grants) == ("alice", (Grant("repository", "a/b", frozenset({"push"})),))


async def test_A_07_a_refresh_token_is_no_access_token_nor_the_other_way_round(endpoint: Endpoint) -> None:
    reply = await endpoint.get("offline_token=true")

    with pytest.raises(TokenInvalid, match="another kind"):
        await endpoint.issuer.login(parse_token(reply["refresh_token"]))
    with pytest.raises(GrantRefused) as refused:
        await endpoint.post(grant_type="refresh_token", refresh_token=reply["token"])
    assert (refused.value.error, refused.value.status) == ("invalid_grant", 401)


@pytest.mark.parametrize("change", ["password", "removed"])
async def test_A_06_a_refresh_token_ends_with_the_password(change: str, endpoint: Endpoint) -> None:
    reply = await endpoint.get("offline_token=true")
    if change == "password":
        endpoint.desk.passwords["alice"] = "2"
    else:
        del endpoint.desk.passwords["alice"]

    with pytest.raises(GrantRefused) as refused:
        await endpoint.post(grant_type="refresh_token", refresh_token=reply["refresh_token"])

    assert (refused.value.error, refused.value.status) == ("invalid_grant", 401)


async def test_what_comes_of_a_key_that_ends_ends_with_it(endpoint: Endpoint) -> None:
    text, _ = await endpoint.desk.keys.create("alice", label="", life_s=90, scopes=())
    key = BasicCredentials("alice", text.encode())

    refresh = (await endpoint.get("offline_token=true", key))["refresh_token"]
    reply = await endpoint.post(
        grant_type="refresh_token", refresh_token=refresh, access_type="offline", scope="repository:a/b:pull"
    )
    login = await endpoint.access(reply)

    assert login.expires == BEGIN + 90
    assert reply["expires_in"] == 90
    endpoint.clock.now += 89
    assert login.is_current()
    endpoint.clock.now += 1
    assert not login.is_current()
    with pytest.raises(TokenInvalid):
        await endpoint.access(reply)
    for token in (refresh, reply["refresh_token"]):
        with pytest.raises(GrantRefused):
            await endpoint.post(grant_type="refresh_token", refresh_token=token)


async def test_what_comes_of_a_refresh_token_ends_with_it(endpoint: Endpoint) -> None:
    refresh = (await endpoint.get("offline_token=true"))["refresh_token"]
    endpoint.clock.now += 3500

    reply = await endpoint.post(grant_type="refresh_token", refresh_token=refresh, access_type="offline")

    assert (await endpoint.access(reply)).expires == BEGIN + 3600
    endpoint.clock.now += 200
    with pytest.raises(GrantRefused, match="refresh token is not accepted"):
        await endpoint.post(grant_type="refresh_token", refresh_token=reply["refresh_token"])


async def test_A_06_a_refresh_token_of_another_service_or_user_is_refused(endpoint: Endpoint) -> None:
    refresh = (await endpoint.get("offline_token=true"))["refresh_token"]
    other = OwnIssuer("own", "other.example", endpoint.issuer._token_keys, passwords=None, keys=None)
    foreign = other.sign_refresh(Login("alice", binding="password:1"), life_s=3600)

    for more in ({"refresh_token": foreign}, {"refresh_token": refresh, "username": "bob"}):
        with pytest.raises(GrantRefused) as refused:
            await endpoint.post(grant_type="refresh_token", **more)
        assert refused.value.status == 401


@pytest.mark.parametrize(
    ("form", "error"),
    [
        ({"grant_type": None}, "invalid_request"),
        ({"service": None}, "invalid_request"),
        ({"client_id": None}, "invalid_request"),
        ({"username": None}, "invalid_request"),
        ({"password": None}, "invalid_request"),
        ({"username": ""}, "invalid_request"),
        ({"grant_type": ["password", "password"]}, "invalid_request"),
        ({"username": ["alice", "alice"]}, "invalid_request"),
        ({"grant_type": "client_credentials"}, "unsupported_grant_type"),
        ({"grant_type": "refresh_token"}, "invalid_request"),
        ({"grant_type": "refresh_token", "refresh_token": "nonsense"}, "invalid_grant"),
        ({"password": "wrong"}, "invalid_grant"),
        ({"password": "sec\0ret"}, "invalid_grant"),
        ({"username": "x" * 300}, "invalid_grant"),
        ({"scope": " ".join(["repository:a/b:pull"] * 51)}, "invalid_scope"),
        ({"content_type": "application/json"}, "invalid_request"),
        ({"content_type": ""}, "invalid_request"),
        ({"content_type": "multipart/form-data; boundary=x"}, "invalid_request"),
        ({f"x{number}": "y" for number in range(200)}, "invalid_request"),
    ],
    ids=lambda value: str(value)[:48],
)
async def test_A_06_a_POST_that_gets_no_token_says_why_in_a_way_clients_fall_back_from(
    form: dict[str, Any], error: str, endpoint: Endpoint
) -> None:
    complete = {"grant_type": "password", "username": "alice", "password": "secret", **form}

    with pytest.raises(GrantRefused) as refused:
        await endpoint.post(**complete)

    assert refused.value.error == error
    assert refused.value.status in {400, 401}
    assert "secret" not in refused.value.description


async def test_bytes_that_are_no_form_are_refused(endpoint: Endpoint) -> None:
    for content in (b"\xff\xfe", json.dumps({"grant_type": "password"}).encode(), b"%", b"=" * 100, b""):
        with pytest.raises(GrantRefused):
            await endpoint.service.answer_post(content, FORM, "")
    assert FORM_SIZE_MAX == 64 * 1024
