"""Logging in, over the wire: passwords, tokens, keys, certificates, and every way in which they are refused."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import bcrypt
import pytest

from kitspec.http_fields import Challenge, parse_challenges
from registry import layout
from registry.auth import api_keys, token_keys, watched_file
from registry.auth.bruteforce import PAIR_FREE
from tests.registry.auth.logins import ISSUER, SERVICE, TestIssuer, basic, bearer, written
from tests.registry.conftest import Serve, configured, served
from tests.registry.wire import Reply, Wire, assert_refused, parse_reply

HOST = "https://reg.example"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
ALICE = basic("alice", "secret")


@pytest.fixture
def htpasswd(tmp_path: Path) -> Path:
    return written(tmp_path / "htpasswd", {"alice": "secret", "bob": "b0b"})


@pytest.fixture(autouse=True)
def files_are_looked_at_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_file, "LOOK_INTERVAL_S", 0.01)


class Registries:
    """Starts registries with accounts."""

    def __init__(self, serve: Serve, htpasswd: Path) -> None:
        self._serve = serve
        self._htpasswd = htpasswd

    def __call__(
        self, *, http: dict[str, Any] | None = None, **auth: Any
    ) -> AbstractAsyncContextManager[str]:
        sections = {"htpasswd": {"path": str(self._htpasswd)}, **auth}
        return self._serve(auth=sections, http={"host": HOST, **(http or {})})


@pytest.fixture
def registries(serve: Serve, htpasswd: Path) -> Registries:
    return Registries(serve, htpasswd)


@pytest.fixture
def registries_of_secret(tmp_path: Path, htpasswd: Path) -> Callable[[str], AbstractAsyncContextManager[str]]:
    """Starts registries on one folder, each with a secret of its own."""
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    auth = {"htpasswd": {"path": str(htpasswd)}, "token": {}}
    return lambda secret: served(configured(storage, auth=auth, http={"host": HOST, "secret": secret}))


@pytest.fixture
async def wire(registries: Registries) -> AsyncIterator[Wire]:
    """A registry with passwords, tokens and API keys."""
    async with registries(token={}, apikeys={}) as url:
        yield Wire(url)


def challenge_of(reply: Reply) -> Challenge:
    (challenge,) = parse_challenges(reply.header("WWW-Authenticate"))
    return challenge


async def token_of(
    wire: Wire, scope: str = "", headers: dict[str, str] | None = None, **query: str
) -> dict[str, Any]:
    target = f"/v2/token?{urlencode({'service': SERVICE, 'scope': scope, **query})}"
    reply = await wire("GET", target, headers=ALICE if headers is None else headers)
    assert reply.status == 200, reply.body
    document: dict[str, Any] = reply.json()
    return document


async def until(wire: Wire, status: int, headers: dict[str, str]) -> None:
    """Ask until the answer is `status`."""
    async with asyncio.timeout(20):
        while (await wire("GET", "/v2/", headers=headers)).status != status:
            await asyncio.sleep(0.01)


class TestPasswords:
    async def test_A_01_without_credentials_the_answer_is_a_challenge(self, registries: Registries) -> None:
        async with registries() as url:
            reply = await Wire(url)("GET", "/v2/")

            assert_refused(reply, 401, code="UNAUTHORIZED")
            assert challenge_of(reply) == Challenge(
                "basic", {"realm": "modelkit-registry", "charset": "UTF-8"}
            )

    async def test_A_01_where_nobody_is_asked_everybody_is_let_in(self, registry_url: str) -> None:
        assert (await Wire(registry_url)("GET", "/v2/")).status == 200
        assert (await Wire(registry_url)("GET", "/v2/token")).status == 404
        assert (await Wire(registry_url)("GET", "/v2/_modelkit/apikeys")).status == 404

    async def test_a_right_password_is_let_in(self, wire: Wire) -> None:
        for headers in (
            ALICE,
            basic("bob", "b0b"),
            {"Authorization": ALICE["Authorization"].replace("B", "b", 1)},
        ):
            assert (await wire("GET", "/v2/", headers=headers)).status == 200

    @pytest.mark.parametrize(
        "field",
        [
            "",
            "Basic",
            "Basic ",
            "Basic !!!!",
            "Basic YWxpY2U=",
            "Basic OnNlY3JldA==",
            "Basic YWxpY2U6c2VjAHJldA==",
            "Basic /////w==",
            "Basic YWxpY2U6" + "eHh4" * 24 + "eA==",
            "Basic " + "eHh4" * 1500,
            "bearer",
            "BEARER\tx",
            "Bearer  ",
            "Bearer a b",
            "Bearer mkr_",
            "Bearer " + "." * 7000,
            "Negotiate YWxpY2U6c2VjcmV0",
            "Digest username=alice",
        ],
        ids=lambda field: field[:24],
    )
    async def test_A_02_A_04_V_35_what_is_malformed_or_wrong_is_refused(self, field: str, wire: Wire) -> None:
        reply = await wire("GET", "/v2/a/b/tags/list", headers={"Authorization": field})

        assert_refused(reply, 401, code="UNAUTHORIZED")
        assert challenge_of(reply).scheme == "bearer"

    async def test_A_02_two_fields_are_refused(self, wire: Wire) -> None:
        head = f"GET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {ALICE['Authorization']}\r\n"
        answer = await wire.converse([f"{head}Authorization: Bearer x\r\n\r\n".encode()])

        assert answer.startswith(b"HTTP/1.1 401 ")

    async def test_V_16_there_is_no_default_user(self, registries: Registries, htpasswd: Path) -> None:
        htpasswd.write_bytes(b"")
        async with registries() as url:
            for headers in ({}, basic("admin", "admin"), basic("admin", "Harbor12345"), basic("root", "")):
                assert (await Wire(url)("GET", "/v2/", headers=headers)).status == 401

    async def test_A_21_A_23_V_14_a_change_of_the_file_counts_within_moments(
        self, wire: Wire, htpasswd: Path
    ) -> None:
        assert (await wire("GET", "/v2/", headers=ALICE)).status == 200

        written(htpasswd, {"alice": "another", "carol": "c"})

        await until(wire, 401, ALICE)
        assert (await wire("GET", "/v2/", headers=basic("alice", "another"))).status == 200
        assert (await wire("GET", "/v2/", headers=basic("carol", "c"))).status == 200
        assert (await wire("GET", "/v2/", headers=basic("bob", "b0b"))).status == 401

    async def test_A_21_a_broken_file_keeps_the_users_and_shows_in_the_metrics(
        self, wire: Wire, htpasswd: Path
    ) -> None:
        stale = b'modelreg_auth_source_stale{source="htpasswd"} '
        assert stale + b"0" in (await wire("GET", "/metrics", headers=ALICE)).body

        htpasswd.write_bytes(b"alice:no hash")

        async with asyncio.timeout(20):
            while stale + b"1" not in (await wire("GET", "/metrics", headers=ALICE)).body:
                await asyncio.sleep(0.01)
        assert (await wire("GET", "/v2/", headers=basic("bob", "b0b"))).status == 200

    async def test_guessing_is_slowed_down_for_who_guesses_only(self, wire: Wire) -> None:
        assert (await wire("GET", "/v2/", headers=ALICE)).status == 200
        for number in range(PAIR_FREE):
            assert (await wire("GET", "/v2/", headers=basic("alice", f"guess{number}"))).status == 401

        reply = await wire("GET", "/v2/", headers=basic("alice", "one more"))

        assert_refused(reply, 429, code="TOOMANYREQUESTS")
        assert reply.header("Retry-After") == "1"
        assert (await wire("GET", "/v2/", headers=ALICE)).status == 200
        assert (await wire("GET", "/v2/", headers=basic("bob", "b0b"))).status == 200

    async def test_a_proxy_that_is_trusted_says_whose_guess_it_was(
        self, serve: Serve, htpasswd: Path
    ) -> None:
        settings = {
            "auth": {"htpasswd": {"path": str(htpasswd)}},
            "limits": {"trustedproxies": ["127.0.0.1"]},
        }
        async with serve(**settings) as url:
            wire = Wire(url)

            async def guess(address: str) -> int:
                headers = basic("alice", "wrong") | {"X-Forwarded-For": address}
                return (await wire("GET", "/v2/", headers=headers)).status

            statuses = [await guess("192.0.2.1") for _ in range(PAIR_FREE + 1)]

            assert statuses == [401] * PAIR_FREE + [429]
            assert await guess("192.0.2.2") == 401

    async def test_A_22_what_needs_no_check_is_answered_while_others_are_checked(
        self, wire: Wire, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import threading

        assert (await wire("GET", "/v2/", headers=ALICE)).status == 200
        gate, really = threading.Event(), bcrypt.checkpw

        def slow(password: bytes, stored: bytes) -> bool:
            gate.wait()
            return really(password, stored)

        monkeypatch.setattr("registry.auth.htpasswd.bcrypt.checkpw", slow)
        guesses = [
            asyncio.create_task(wire("GET", "/v2/", headers=basic(f"user{number}", "x")))
            for number in range(40)
        ]
        try:
            for _ in range(20):
                assert (await wire("GET", "/v2/", headers=ALICE)).status == 200
            assert not any(guess.done() for guess in guesses)
        finally:
            gate.set()
        assert {reply.status for reply in await asyncio.gather(*guesses)} == {401}


class TestTokens:
    async def test_A_38_the_realm_is_what_the_operator_said_whatever_the_client_calls_us(
        self, wire: Wire
    ) -> None:
        for headers in (
            {},
            {"Host": "evil.example"},
            {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "http"},
            {"Forwarded": "host=evil.example"},
        ):
            reply = await wire("GET", "/v2/a/b/manifests/v1", headers=headers)
            assert challenge_of(reply) == Challenge(
                "bearer", {"realm": f"{HOST}/v2/token", "service": SERVICE, "scope": "repository:a/b:pull"}
            )
        reply = await wire("GET", "http://evil.example/v2/", headers={"Host": "evil.example"})
        assert challenge_of(reply).parameters["realm"] == f"{HOST}/v2/token"

    @pytest.mark.parametrize("host", [HOST, None])
    async def test_A_38_so_is_every_location_and_without_his_word_it_names_no_host(
        self, registries: Registries, host: str | None
    ) -> None:
        evil = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"}
        async with registries(http={"host": host}) as url:
            wire = Wire(url)
            for target in ("/v2/a/b/blobs/uploads/", "http://evil.example/v2/a/b/blobs/uploads/"):
                for query in ("", f"?digest={DIGEST}"):
                    reply = await wire(
                        "POST", target + query, headers=ALICE | evil, body=b"x" if query else b""
                    )
                    assert reply.header("Location").startswith(f"{host or ''}/v2/a/b/blobs/")
                    assert "evil" not in str(reply.headers)

    async def test_docker_s_flow_pushes_and_pulls(self, wire: Wire) -> None:
        challenge = challenge_of(await wire("POST", "/v2/a/b/blobs/uploads/"))
        assert challenge.parameters["scope"] == "repository:a/b:pull,push"

        token = await token_of(wire, challenge.parameters["scope"])

        reply = await wire("POST", "/v2/a/b/blobs/uploads/", headers=bearer(token["token"]))
        assert reply.status == 202
        reply = await wire(
            "PUT",
            f"{reply.header('Location').removeprefix(HOST)}?digest={DIGEST}",
            headers=bearer(token["token"]),
            body=b"x",
        )
        assert reply.status == 201
        assert (await wire("GET", f"/v2/a/b/blobs/{DIGEST}", headers=bearer(token["token"]))).body == b"x"

    async def test_a_token_is_not_kept_by_anybody_on_the_way(self, wire: Wire) -> None:
        reply = await wire("GET", "/v2/token", headers=ALICE)

        assert reply.header("Cache-Control") == "no-store"

    async def test_a_wrong_password_is_asked_for_again(self, wire: Wire) -> None:
        reply = await wire("GET", "/v2/token?scope=repository:a/b:pull", headers=basic("alice", "wrong"))

        assert_refused(reply, 401, code="UNAUTHORIZED")
        assert challenge_of(reply).scheme == "basic"

    @pytest.mark.parametrize(
        ("scope", "method", "path"),
        [
            ("repository:a/b:pull", "GET", "/v2/a/c/tags/list"),
            ("repository:a/b:pull", "POST", "/v2/a/b/blobs/uploads/"),
            ("repository:a/b:pull,push", "DELETE", "/v2/a/b/manifests/v1"),
            ("repository:a/b:delete", "GET", "/v2/a/b/tags/list"),
            ("repository:a/b:delete", "POST", "/v2/a/b/blobs/uploads/"),
            ("repository:a/b:*", "GET", "/v2/_catalog"),
            ("registry:catalog:*", "GET", "/v2/a/b/tags/list"),
            ("", "GET", "/v2/a/b/tags/list"),
        ],
    )
    async def test_A_09_V_13_a_token_for_something_else_is_not_enough_and_says_what_would_be(
        self, scope: str, method: str, path: str, wire: Wire
    ) -> None:
        token = (await token_of(wire, scope))["token"]

        reply = await wire(method, path, headers=bearer(token))

        assert_refused(reply, 401, code="UNAUTHORIZED")
        challenge = challenge_of(reply)
        assert challenge.parameters["error"] == "insufficient_scope"
        more = (await token_of(wire, challenge.parameters["scope"]))["token"]
        assert (await wire(method, path, headers=bearer(more))).status in {200, 202, 404}

    async def test_who_has_a_token_of_nobody_is_told_to_log_in(self, wire: Wire) -> None:
        asked = await wire("GET", "/v2/token?scope=repository:a/b:pull")

        reply = await wire("GET", "/v2/a/b/tags/list", headers=bearer(asked.json()["token"]))

        assert_refused(reply, 401, code="UNAUTHORIZED")
        assert "log in to the registry" in reply.json()["errors"][0]["message"]
        assert challenge_of(reply).parameters["error"] == "insufficient_scope"

    async def test_a_token_that_is_not_believed_says_so_in_the_challenge(self, wire: Wire) -> None:
        reply = await wire("GET", "/v2/", headers=bearer("a.b.c"))

        assert challenge_of(reply).parameters["error"] == "invalid_token"

    async def test_A_07_a_refresh_token_opens_nothing_but_the_token_endpoint(self, wire: Wire) -> None:
        refresh = (await token_of(wire, "", offline_token="true"))["refresh_token"]

        assert_refused(await wire("GET", "/v2/", headers=bearer(refresh)), 401)
        reply = await post(
            wire, grant_type="refresh_token", refresh_token=refresh, scope="repository:a/b:pull"
        )
        assert reply.status == 200
        assert reply.json()["scope"] == "repository:a/b:pull"
        assert (await wire("GET", "/v2/", headers=bearer(reply.json()["access_token"]))).status == 200

    async def test_A_06_A_23_V_14_everything_ends_with_the_password(self, wire: Wire, htpasswd: Path) -> None:
        tokens = await token_of(wire, "repository:a/b:pull", offline_token="true")
        assert (await wire("GET", "/v2/", headers=bearer(tokens["token"]))).status == 200

        written(htpasswd, {"bob": "b0b"})

        await until(wire, 401, bearer(tokens["token"]))
        reply = await post(wire, grant_type="refresh_token", refresh_token=tokens["refresh_token"])
        assert (reply.status, reply.json()["error"]) == (401, "invalid_grant")

    @pytest.mark.parametrize(
        ("form", "status", "error"),
        [
            ({"grant_type": "password", "username": "alice", "password": "wrong"}, 401, "invalid_grant"),
            ({"grant_type": "password", "username": "alice"}, 400, "invalid_request"),
            ({"grant_type": "magic"}, 400, "unsupported_grant_type"),
            ({}, 400, "invalid_request"),
            (
                {"grant_type": "password", "username": "alice", "password": "x" * 65_536},
                400,
                "invalid_request",
            ),
        ],
        ids=lambda value: str(value)[:70],
    )
    async def test_A_06_V_65_a_POST_that_is_refused_is_one_that_clients_fall_back_from(
        self, form: dict[str, str], status: int, error: str, wire: Wire
    ) -> None:
        reply = await post(wire, **form)

        assert (reply.status, reply.json()["error"]) == (status, error)
        assert reply.codes[0] in {"UNAUTHORIZED", "UNSUPPORTED"}
        assert_refused(reply, status)

    async def test_A_06_a_form_without_end_is_refused_before_its_end(self, wire: Wire) -> None:
        reply = await wire("POST", "/v2/token", headers=FORM, body=(b"x" * 65_536 for _ in range(3)))

        assert (reply.status, reply.json()["error"]) == (400, "invalid_request")

    @pytest.mark.parametrize("count", [51, 100])
    async def test_A_05_L_24_too_many_scopes_are_400(self, count: int, wire: Wire) -> None:
        scope = "%20".join(f"repository:a{number}:pull" for number in range(count))

        assert_refused(await wire("GET", f"/v2/token?scope={scope}", headers=ALICE), 400)

    async def test_A_36_tokens_outlive_a_restart(
        self, registries: Registries, storage: dict[str, Any]
    ) -> None:
        if "inmemory" in storage:
            pytest.skip("gone with the process")
        async with registries(token={}) as url:
            token = (await token_of(Wire(url), "repository:a/b:pull"))["token"]

        async with registries(token={}) as url:
            assert (await Wire(url)("GET", "/v2/", headers=bearer(token))).status == 200

    async def test_a_body_that_was_let_in_is_not_cut_when_its_token_ends(
        self, wire: Wire, htpasswd: Path
    ) -> None:
        token = (await token_of(wire, "repository:a/b:pull,push"))["token"]
        location = (await wire("POST", "/v2/a/b/blobs/uploads/", headers=bearer(token))).header("Location")

        reader, writer = await asyncio.open_connection(wire.host, wire.port)
        head = f"PATCH {location.removeprefix(HOST)} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        writer.write(
            f"{head}Connection: close\r\nExpect: 100-continue\r\nContent-Length: 11\r\n\r\n".encode()
        )
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        written(htpasswd, {"bob": "b0b"})
        await until(wire, 401, bearer(token))
        writer.write(b"hello world")
        reply = parse_reply(await reader.read(), "PATCH")
        writer.close()
        await writer.wait_closed()

        assert reply.status == 202
        assert reply.header("Range") == "0-10"
        assert (await wire("PUT", location.removeprefix(HOST), headers=bearer(token))).status == 401


DIGEST = "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


async def post(wire: Wire, **form: str) -> Reply:
    content = urlencode({"service": SERVICE, "client_id": "test", **form}).encode()
    return await wire("POST", "/v2/token", headers=FORM, body=content)


class TestApiKeys:
    async def made(self, wire: Wire, **wish: Any) -> dict[str, Any]:
        reply = await wire(
            "POST", "/v2/_modelkit/apikeys", headers=ALICE | JSON, body=json.dumps(wish).encode()
        )
        assert reply.status == 201, reply.body
        assert reply.header("Cache-Control") == "no-store"
        document: dict[str, Any] = reply.json()
        return document

    async def test_a_key_is_a_password_and_a_bearer_token(self, wire: Wire) -> None:
        key = (await self.made(wire, label="ci"))["key"]

        for headers in (bearer(key), basic("alice", key)):
            assert (await wire("POST", "/v2/a/b/blobs/uploads/", headers=headers)).status == 202
        assert_refused(await wire("GET", "/v2/", headers=basic("bob", key)), 401)
        assert "token" in await token_of(wire, "repository:a/b:pull", headers=basic("alice", key))

    async def test_a_key_with_a_scope_is_for_that_only(self, wire: Wire) -> None:
        key = (await self.made(wire, scope=["repository:a/b:pull"]))["key"]

        assert (await wire("GET", "/v2/a/b/tags/list", headers=bearer(key))).status == 404
        for method, path in (
            ("POST", "/v2/a/b/blobs/uploads/"),
            ("GET", "/v2/a/c/tags/list"),
            ("GET", "/v2/_catalog"),
        ):
            assert_refused(await wire(method, path, headers=bearer(key)), 401, 403)
        token = await token_of(wire, "repository:a/b:pull,push", headers=basic("alice", key))
        assert (await wire("GET", "/v2/a/b/tags/list", headers=bearer(token["token"]))).status == 404
        assert_refused(await wire("POST", "/v2/a/b/blobs/uploads/", headers=bearer(token["token"])), 401)

    async def test_a_key_is_listed_without_its_secret_and_taken_back_with_all_its_tokens(
        self, wire: Wire
    ) -> None:
        made = await self.made(wire, label="ci", expires_in=3600)
        tokens = await token_of(wire, "", headers=basic("alice", made["key"]), offline_token="true")
        assert (await wire("GET", "/v2/", headers=bearer(tokens["token"]))).status == 200

        listed = (await wire("GET", "/v2/_modelkit/apikeys", headers=ALICE)).json()["keys"]
        reply = await wire("DELETE", f"/v2/_modelkit/apikeys/{made['id']}", headers=ALICE)

        assert listed == [{name: value for name, value in made.items() if name != "key"}]
        assert reply.status == 204
        for headers in (bearer(made["key"]), basic("alice", made["key"]), bearer(tokens["token"])):
            assert_refused(await wire("GET", "/v2/", headers=headers), 401)
        reply = await post(wire, grant_type="refresh_token", refresh_token=tokens["refresh_token"])
        assert reply.status == 401

    async def test_a_key_of_before_that_ends_in_no_year_is_listed_with_the_last_one_that_there_is(
        self, wire: Wire, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(api_keys, "LIFE_MAX_S", 2.0**63)
        made = await self.made(wire, label="old", expires_in=2**62)
        monkeypatch.undo()

        (listed,) = (await wire("GET", "/v2/_modelkit/apikeys", headers=ALICE)).json()["keys"]

        assert listed["expires"] == made["expires"] == "9999-12-31T23:59:59Z"
        assert (await wire("GET", "/v2/", headers=bearer(made["key"]))).status == 200

    async def test_keys_are_managed_with_the_password_only(self, wire: Wire) -> None:
        made = await self.made(wire)
        token = (await token_of(wire, "repository:a/b:*"))["token"]

        for headers in (bearer(made["key"]), basic("alice", made["key"]), bearer(token)):
            for method, path in (
                ("GET", "/v2/_modelkit/apikeys"),
                ("POST", "/v2/_modelkit/apikeys"),
                ("DELETE", f"/v2/_modelkit/apikeys/{made['id']}"),
            ):
                assert_refused(await wire(method, path, headers=headers | JSON), 403, code="DENIED")
        assert_refused(await wire("GET", "/v2/_modelkit/apikeys"), 401)

    async def test_V_17_a_secret_that_is_nearly_right_or_no_ascii_is_wrong_and_no_error(
        self, wire: Wire
    ) -> None:
        key = (await self.made(wire))["key"]
        head, secret = key[:-43], key[-43:]
        for wrong in (
            head,
            head + secret[:-1],
            head + secret + "x",
            head + secret[:-1] + "\u00e9",
            head + "\u00e9" * 43,
            head + secret.swapcase(),
            "mkr_" + "\u212a" * 60,
            "\u00e9",
        ):
            assert_refused(await wire("GET", "/v2/", headers=basic("alice", wrong)), 401)
            as_sent = wrong.encode().decode("latin-1")
            assert_refused(await wire("GET", "/v2/", headers=bearer(as_sent)), 401)

    async def test_another_users_key_is_not_there(self, wire: Wire) -> None:
        made = await self.made(wire)
        bob = basic("bob", "b0b")

        assert (await wire("GET", "/v2/_modelkit/apikeys", headers=bob)).json() == {"keys": []}
        assert_refused(await wire("DELETE", f"/v2/_modelkit/apikeys/{made['id']}", headers=bob), 404)

    @pytest.mark.parametrize(
        "body",
        [
            b"[]",
            b"{",
            b'{"label": 5}',
            b'{"label": "a\\nb"}',
            b'{"expires_in": "60"}',
            b'{"expires_in": 0}',
            b'{"expires_in": 253402300800}',
            b'{"expires_in": 9223372036854775807}',
            b'{"expires_in": 1' + b"0" * 400 + b"}",
            b'{"expires_in": true}',
            b'{"scope": "repository:a/b:pull"}',
            b'{"scope": [5]}',
            b'{"scope": ["repository:*:pull"]}',
            b'{"owner": "root"}',
            b'{"label": "a", "label": "b"}',
            b"x" * 20_000,
        ],
        ids=lambda body: body[:30].decode(),
    )
    async def test_a_wish_that_cannot_be_meant_is_refused(self, body: bytes, wire: Wire) -> None:
        reply = await wire("POST", "/v2/_modelkit/apikeys", headers=ALICE | JSON, body=body)

        assert_refused(reply, 400)

    async def test_U_04_a_page_elsewhere_cannot_make_keys_with_a_browsers_password(self, wire: Wire) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            reply = await wire(
                "POST", "/v2/_modelkit/apikeys", headers=ALICE | {"Content-Type": kind}, body=b"{}"
            )
            assert_refused(reply, 400)


class TestElsewhere:
    @pytest.fixture
    def issuer(self) -> TestIssuer:
        return TestIssuer()

    @pytest.fixture
    def jwks(self, issuer: TestIssuer, tmp_path: Path) -> str:
        (tmp_path / "jwks.json").write_bytes(issuer.jwks())
        return str(tmp_path / "jwks.json")

    @pytest.mark.parametrize("actions", ["push", "pull,push", "*"])
    async def test_a_server_elsewhere_cannot_let_a_reader_of_some_layers_push(
        self, actions: str, registries: Registries, issuer: TestIssuer, jwks: str
    ) -> None:
        settings = {"realm": "https://auth.example", "service": SERVICE, "issuer": ISSUER, "jwks": jwks}
        policies = [
            {"users": ["alice"], "actions": ["read"], "layers": ["docs"]},
            {"users": ["alice", "bob"], "actions": ["create", "update"]},
        ]
        http = {"accessControl": {"repositories": {"a/*": {"policies": policies}}}}
        async with registries(token=settings, http=http) as url:
            access = [{"type": "repository", "name": "a/b", "actions": actions.split(",")}]

            for user, status in (("alice", 403), ("bob", 202)):
                headers = bearer(issuer.token(sub=user, access=access))
                reply = await Wire(url)("POST", "/v2/a/b/blobs/uploads/", headers=headers)
                assert reply.status == status

    async def test_tokens_of_a_server_elsewhere_decide(
        self, registries: Registries, issuer: TestIssuer, jwks: str
    ) -> None:
        realm = "https://auth.example/token"
        settings = {"realm": realm, "service": SERVICE, "issuer": ISSUER, "jwks": jwks}
        async with registries(token=settings) as url:
            wire = Wire(url)
            challenge = challenge_of(await wire("POST", "/v2/a/b/blobs/uploads/"))
            access = [{"type": "repository", "name": "a/b", "actions": ["pull", "push"]}]
            token = issuer.token(access=access)

            assert challenge.parameters["realm"] == realm
            assert (await wire("POST", "/v2/a/b/blobs/uploads/", headers=bearer(token))).status == 202
            assert_refused(await wire("POST", "/v2/a/c/blobs/uploads/", headers=bearer(token)), 401)
            assert_refused(await wire("GET", "/v2/", headers=bearer(TestIssuer().token(access=access))), 401)
            assert (await wire("GET", "/v2/", headers=ALICE)).status == 200
            assert_refused(await wire("GET", "/v2/token", headers=ALICE), 404)

    async def test_A_37_where_clocks_differ_too_much_the_log_says_clock(
        self, registries: Registries, issuer: TestIssuer, jwks: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        provider = {
            "issuer": ISSUER,
            "audiences": [SERVICE],
            "jwks": jwks,
            "requiredclaims": {"owner": "acme"},
        }
        now = int(time.time())
        async with registries(token={}, oidc=[provider]) as url:
            for skew, status in ((45, 200), (-45, 200), (90, 401)):
                moment = now + skew
                token = issuer.token(owner="acme", iat=moment, nbf=moment, exp=moment + 300)
                assert (await Wire(url)("GET", "/v2/", headers=bearer(token))).status == status

        refusals = [vars(record)["fields"] for record in caplog.records if record.msg == "token.refused"]
        assert len(refusals) == 1
        assert "clock" in refusals[0]["reason"]

    async def test_a_workload_logs_in_with_its_providers_token(
        self, registries: Registries, issuer: TestIssuer, jwks: str
    ) -> None:
        provider = {
            "issuer": ISSUER,
            "audiences": [SERVICE],
            "jwks": jwks,
            "requiredclaims": {"owner": "acme"},
        }
        async with registries(token={}, oidc=[provider]) as url:
            wire = Wire(url)
            token, other = issuer.token(sub="job", owner="acme"), issuer.token(sub="job", owner="evil")

            assert (await wire("POST", "/v2/a/b/blobs/uploads/", headers=bearer(token))).status == 202
            assert (await wire("GET", "/v2/", headers=basic("ci", token))).status == 200
            assert_refused(await wire("GET", "/v2/", headers=bearer(other)), 401)
            assert_refused(await wire("GET", "/v2/", headers=basic("ci", other)), 401)
            reply = await token_of(
                wire, "repository:a/b:pull", headers=basic("ci", token), offline_token="true"
            )
            assert "refresh_token" not in reply
            assert (await wire("GET", "/v2/a/b/tags/list", headers=bearer(reply["token"]))).status == 404


async def test_while_a_secret_is_replaced_replicas_with_either_sign_and_verify_their_own(
    registries_of_secret: Callable[[str], AbstractAsyncContextManager[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(token_keys, "_REREAD_INTERVAL_S", 0.0)
    async with registries_of_secret("old") as old, registries_of_secret("new") as new:
        wires = Wire(old), Wire(new)
        headers = [bearer((await token_of(wire))["token"]) for wire in wires]

        for _ in range(2):
            for here, there in (0, 1), (1, 0):
                assert_refused(await wires[here]("GET", "/v2/", headers=headers[there]), 401)
                assert (await wires[here]("GET", "/v2/", headers=headers[here])).status == 200
                assert await token_of(wires[here])

        (tmp_path / "registry" / layout.TOKEN_KEYS).unlink()
        assert_refused(await wires[0]("GET", "/v2/", headers=headers[1]), 401)
        reply = await wires[0]("GET", f"/v2/token?service={SERVICE}", headers=ALICE)
        assert (reply.status, reply.codes) == (503, ["UNAVAILABLE"])


async def test_V_15_A_26_secrets_are_in_no_log_no_metric_and_no_answer(
    registries: Registries, htpasswd: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    canary = "c4n4ry-p4ssw0rd"
    written(htpasswd, {"alice": canary})
    answers: list[bytes] = []
    async with registries(token={}, apikeys={}, http={"secret": "c4n4ry-s3cr3t"}) as url:
        wire = Wire(url)
        alice = basic("alice", canary)
        made = await wire("POST", "/v2/_modelkit/apikeys", headers=alice | JSON, body=b"{}")
        tokens = await token_of(wire, "repository:a/b:pull", headers=alice, offline_token="true")
        secrets = [
            canary,
            "c4n4ry-s3cr3t",
            alice["Authorization"].removeprefix("Basic "),
            made.json()["key"].rpartition("_")[2][-20:],
            *(tokens[name].rpartition(".")[2] for name in ("token", "refresh_token")),
        ]
        for headers in (
            basic("alice", canary + "-wrong"),
            bearer(tokens["token"] + "x"),
            bearer(tokens["refresh_token"]),
            bearer(made.json()["key"][:-1]),
            {"Authorization": f"Basic {canary}"},
            {"Authorization": f"Digest {canary}"},
        ):
            paths = ("/v2/", f"/v2/a/b/tags/list?password={canary}", f"/v2/token?password={canary}")
            answers += [(await wire("GET", path, headers=headers)).body for path in paths]
        answers.append(
            (await post(wire, grant_type="password", username="alice", password=canary + "x")).body
        )
        answers.append((await wire("GET", "/metrics", headers=alice)).body)
        answers.append(
            await wire.converse(
                [
                    f"GET http://alice:{canary}@reg/v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
                ]
            )
        )

    said = b"\n".join(answers).decode("latin-1") + "\n".join(
        f"{record.getMessage()} {record.__dict__}" for record in caplog.records
    )
    for secret in secrets:
        assert not re.search(re.escape(secret), said), secret[:12]
