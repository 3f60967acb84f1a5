"""V-15: what is secret is shown to every route, right and wrong, in each place where somebody might put it, and then looked for.

A real process, with everything that writes something down: logs, metrics, the audit file, events, the store, errors.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, quote_plus, urlencode, urlsplit

import pytest

from registry.config_sources import ConfigInvalid, load_config
from registry.routes import ROUTES, Endpoint
from tests.registry.auth.logins import basic, bearer, written
from tests.registry.auth.test_matrix import PATHS
from tests.registry.kits import whole_kit
from tests.registry.test_notifications import Receiver
from tests.registry.wire import Body, Reply, Wire, WireWith, encode, parse_reply

ROOT = Path(__file__).parents[3]
NAME = "team/kit"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}
SOON_S = 30.0
# Where somebody might put a secret. What a parameter of ours is wrong about is said to who sent it, of course.
QUERY_WORDS = (
    "password",
    "access_token",
    "token",
    "refresh_token",
    "X-Amz-Signature",
    "key",
    "account",
    "client_id",
)


def canary(name: str) -> str:
    """A secret nobody else has, with characters that look different in Base64, in a URL and in JSON."""
    return f'{name}?"/+~{secrets.token_urlsafe(12)}'


@dataclass
class Canaries:
    """What is to be found nowhere, by what it is."""

    of: dict[str, str] = field(default_factory=dict)

    def named(self, name: str) -> str:
        return self.of.setdefault(name, canary(name))

    def found(self, text: bytes) -> list[str]:
        return [name for name, secret in self.of.items() if any(form in text for form in forms(secret))]


def forms(secret: str) -> Iterator[bytes]:
    """A secret as it may have been written down."""
    content = secret.encode()
    texts = {
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        content.hex(),
    }
    for text in texts:
        yield text.encode()
        yield text.encode().swapcase() if "%" in text else text.encode()
    for before in range(3):
        # Wherever in a longer text it stands, what is in the middle of its Base64 is one of three.
        encoded = base64.b64encode(bytes(before) + content)
        middle = encoded[-(-before * 8 // 6) : len(encoded) - 4]
        yield middle
        yield middle.replace(b"+", b"-").replace(b"/", b"_")


@pytest.mark.parametrize("before", ["", "a", "ab", "abc:"])
def test_a_canary_is_found_in_every_form(before: str) -> None:
    canaries = Canaries()
    secret = canaries.named("password")
    text = f"{before}{secret}!"

    for written_down in (
        text,
        quote(text),
        quote_plus(text),
        json.dumps(text),
        base64.b64encode(text.encode()).decode(),
        base64.urlsafe_b64encode(text.encode()).decode(),
        text.encode().hex(),
    ):
        assert canaries.found(f"x{written_down}x".encode()) == ["password"]
    assert not canaries.found(canary("password").encode())


@dataclass
class Running:
    """The command, and everything that it lets out of its hands."""

    wire: Wire
    folder: Path
    answers: list[bytes] = field(default_factory=list)

    async def ask(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: Body = b""
    ) -> Reply:
        reply = await self.wire(method, target, headers=headers, body=body)
        assert reply.status < 500, (method, target, reply.body)
        is_a_token = target.startswith("/v2/token") and reply.status == 200
        self.answers += [b"" if is_a_token else reply.body, str(reply.headers).encode()]
        return reply

    async def converse(self, request: bytes) -> Reply:
        answer = await self.wire.converse([request])
        self.answers.append(answer)
        return parse_reply(answer, "GET")


@asynccontextmanager
async def running(folder: Path, tree: Mapping[str, Any]) -> AsyncIterator[Running]:
    """`modelkit-registry serve`, until the end of the block; what it prints is in `log` and `out`."""
    (folder / "config.yml").write_text(json.dumps(tree))
    log, out = folder / "log", folder / "out"
    with log.open("wb") as errors, out.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", "from registry.cli import main; main()", "serve", "--config", folder / "config.yml"),
            stdout=output,
            stderr=errors,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
        )
        try:
            async with asyncio.timeout(SOON_S):
                while (match := re.search(rb'address(?:=|": ")\S*?:(\d+)', log.read_bytes())) is None:
                    assert process.returncode is None, log.read_bytes()
                    await asyncio.sleep(0.02)
            yield Running(Wire(f"http://127.0.0.1:{int(match[1])}"), folder)
        finally:
            if process.returncode is None:
                process.terminate()
            async with asyncio.timeout(SOON_S):
                assert await process.wait() == 0


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = Receiver(listener.getsockname()[1])
        async with await asyncio.start_server(receiver.serve, sock=listener):
            yield receiver


@pytest.mark.parametrize("formatter", ["text", "json"])
async def test_V_15_A_26_a_secret_is_written_down_nowhere(
    tmp_path: Path, receiver: Receiver, formatter: str
) -> None:
    store = tmp_path / "store"
    storage = {"filesystem": {"rootdirectory": str(store)}, "durability": "none"}
    canaries = Canaries()

    await drive_everything(tmp_path, storage, receiver, canaries, formatter=formatter)

    stored = [path for path in store.rglob("*") if path.is_file()]
    assert len(stored) > 20
    for path in [*stored, *(path for path in (tmp_path / "tmp").rglob("*") if path.is_file())]:
        assert not canaries.found(path.read_bytes()), path
        assert not canaries.found(os.fsencode(path.relative_to(tmp_path))), path


@pytest.mark.s3
async def test_V_15_A_26_neither_are_those_of_the_object_store(
    tmp_path: Path, receiver: Receiver, s3_storage: dict[str, Any]
) -> None:
    canaries = Canaries({"secret key": s3_storage["s3"]["secretkey"]})
    storage = {**s3_storage, "redirect": {"minsize": 1}}

    await drive_everything(tmp_path, storage, receiver, canaries, formatter="json")

    assert "signature" in canaries.of


async def drive_everything(
    folder: Path, storage: Mapping[str, Any], receiver: Receiver, canaries: Canaries, *, formatter: str
) -> None:
    """Show all canaries to all routes, and look for them in everything but the store."""
    (folder / "tmp").mkdir()
    password = canaries.named("password")
    users = written(folder / "htpasswd", {"alice": password, "bob": canaries.named("bob's")})
    (folder / "hmac").write_text(canaries.named("HMAC"))
    endpoints = [
        {
            "name": "ci",
            "url": f"{receiver.url}&token={quote(canaries.named('hook'), safe='')}",
            "headers": {"Authorization": [f"Bearer {canaries.named('hook bearer')}"]},
            "secret_file": str(folder / "hmac"),
        },
        # Nobody is there: every try is logged.
        {
            "name": "gone",
            "url": f"http://127.0.0.1:1/?key={quote(canaries.named('gone'))}",
            "secret": canaries.named("HMAC 2"),
        },
    ]
    rules = {"**": {"policies": [{"users": ["alice"], "actions": ["read", "create", "update", "delete"]}]}}
    tree = {
        "workers": 1,
        "log": {"level": "debug", "formatter": formatter, "audit": str(folder / "audit")},
        "storage": storage,
        "auth": {"htpasswd": {"path": str(users)}, "token": {}, "apikeys": {}},
        "http": {
            "addr": "127.0.0.1:0",
            "host": "http://reg.example",
            "secret": canaries.named("sealing"),
            "draintimeout": 5,
            "accessControl": {"repositories": rules, "metrics": {"users": ["alice"]}},
        },
        # So that guesses come from everywhere, and are checked, and not slowed down.
        "limits": {"trustedproxies": ["127.0.0.1"]},
        "journal": {"poll": 0.2},
        "notifications": {
            "endpoints": [{"allowprivate": True, "backoff": 0.1, **each} for each in endpoints]
        },
    }
    async with running(folder, tree) as registry:
        await show_to_all_routes(registry, canaries, password)
        await show_malformed(registry, canaries)
        await receiver.until(1)
        await registry.ask("GET", "/metrics", headers=basic("alice", password))
        async with asyncio.timeout(SOON_S):
            while b"gone" not in (folder / "log").read_bytes():
                await asyncio.sleep(0.02)

    log, audit = (folder / "log").read_bytes(), (folder / "audit").read_bytes()
    assert log.count(b" access " if formatter == "text" else b'"access"') > 30
    assert {json.loads(line)["action"] for line in audit.splitlines()} >= {
        "push",
        "login",
        "login.refused",
        "denied",
    }
    assert any(b"modelreg_" in answer for answer in registry.answers)
    told = [body for _, _, body in receiver.received]
    for what, texts in {
        "log": log.splitlines(),
        "output": [(folder / "out").read_bytes()],
        "audit": audit.splitlines(),
        "answer": registry.answers,
        "event": told,
    }.items():
        for text in texts:
            assert not canaries.found(text), (what, canaries.found(text), text[:2000])


async def show_to_all_routes(registry: Running, canaries: Canaries, password: str) -> None:
    """Every way of saying who one is, and every way of getting it wrong; what deletes comes last."""
    alice = basic("alice", password)
    kit = whole_kit()
    await kit.push(WireWith(registry.wire, alice), NAME)
    await find_out_what_the_registry_makes(registry, canaries, alice, kit.manifest["layers"][0]["digest"])
    shown = list(credentials(canaries, alice))
    for route in sorted(ROUTES, key=lambda route: route.method == "DELETE"):
        for number, fields in enumerate(shown):
            for method in ("HEAD", "GET") if route.method == "GET" else (route.method,):
                headers = {**fields, "X-Forwarded-For": f"192.0.2.{number}"}
                await show(registry, canaries, method, route.endpoint, headers)


async def find_out_what_the_registry_makes(
    registry: Running, canaries: Canaries, alice: Mapping[str, str], layer: str
) -> None:
    """Tokens, a key, and the signature of an address in the store are told in these answers, and in no others."""
    scope = {"scope": f"repository:{NAME}:pull,push,delete", "offline_token": "true"}
    tokens = (await registry.wire("GET", f"/v2/token?{urlencode(scope)}", headers=alice)).json()
    made = (await registry.wire("POST", "/v2/_modelkit/apikeys", headers=alice | JSON, body=b"{}")).json()
    sent = await registry.wire("GET", f"/v2/{NAME}/blobs/{layer}", headers=alice)
    canaries.of |= {"token": tokens["token"], "refresh token": tokens["refresh_token"], "key": made["key"]}
    canaries.of |= {f"{name}'s end": secret[-20:] for name, secret in list(canaries.of.items())[-3:]}
    if sent.status == 307:
        (canaries.of["signature"],) = parse_qs(urlsplit(sent.header("Location")).query)["X-Amz-Signature"]


async def show(
    registry: Running, canaries: Canaries, method: str, endpoint: Endpoint, fields: Mapping[str, str]
) -> None:
    """The same request with a secret in its query, and without."""
    body = b""
    if endpoint is Endpoint.TOKEN and method == "POST":
        guess = {"grant_type": "password", "username": "alice", "password": canaries.named("form")}
        taken = {"grant_type": "refresh_token", "refresh_token": canaries.of["refresh token"][:-3]}
        for form in (guess, taken):
            body = urlencode({"service": "x", "client_id": "x", **form}).encode()
            await registry.ask(method, PATHS[endpoint], headers={**FORM, **fields}, body=body)
    elif endpoint is Endpoint.API_KEYS:
        body, fields = encode({"password": canaries.named("JSON"), "label": 5}), {**JSON, **fields}
    for query in ("", "?" + urlencode(dict.fromkeys(QUERY_WORDS, canaries.named("query")))):
        await registry.ask(method, f"{PATHS[endpoint]}{query}", headers=fields, body=body)


def credentials(canaries: Canaries, alice: Mapping[str, str]) -> Iterable[Mapping[str, str]]:
    """Headers with secrets in them, right ones first."""
    wrong = canaries.named("wrong")
    token, key = canaries.of["token"], canaries.of["key"]
    yield alice
    yield bearer(token)
    yield bearer(key)
    yield basic("alice", key)
    yield {}
    yield basic("alice", wrong)
    yield basic("bob", canaries.of["bob's"])  # who may do nothing
    yield basic(canaries.named("no name") * 20, wrong)
    yield bearer(token[:-2])
    yield bearer(canaries.of["refresh token"])
    yield bearer(key[:-1] + ("0" if key[-1] != "0" else "1"))
    yield bearer(quote(canaries.named("bearer"), safe=""))
    yield {"Authorization": f"Basic {wrong}"}
    yield {"Authorization": f"Digest username=alice, response={wrong}"}
    yield {"Authorization": f"Bearer a {wrong}"}
    yield {"Authorization": wrong}
    yield {"Cookie": f"session={canaries.named('cookie')}", "Proxy-Authorization": f"Basic {wrong}"}
    yield {
        "X-Api-Key": wrong,
        "X-Registry-Auth": wrong,
        "Referer": f"https://alice:{quote(wrong)}@reg.example/",
    }
    yield {
        "Content-Range": wrong,
        "Range": wrong,
        "If-None-Match": wrong,
        "Content-Type": wrong,
        "Accept": wrong,
    }


async def show_malformed(registry: Running, canaries: Canaries) -> None:
    """What is no HTTP, or too much of it: the parser's own words are not ours."""
    secret = canaries.named("malformed")
    target, text = quote(secret, safe=""), secret.encode()
    host = b"Host: x\r\nConnection: close\r\n"
    for head in (
        b"GET http://alice:%b@reg.example/v2/ HTTP/1.1\r\n" % target.encode(),
        b"GET http://alice:%b@reg.example/v2/%b HTTP/1.1\r\n" % (target.encode(), NAME.encode()),
        b"GET /v2/?token=%b HTTP/9.9\r\n" % text,
        b"GET /v2/?token=%b x HTTP/1.1\r\n" % text,
        b"GET /v2/?token=%b\r\n" % text,
        b"G\x00T /v2/?token=%b HTTP/1.1\r\n" % text,
        b"GET /v2/?token=%b HTTP/1.1\r\n" % (text + b"x" * 9000),
        b"GET /v2/ HTTP/1.1\r\nAuthorization: Bearer %b\r\n" % (text + b"x" * 9000),
        b"GET /v2/ HTTP/1.1\r\nAuthorization: Bearer %b\x00\r\n" % text,
        b"GET /v2/ HTTP/1.1\r\nAuthorization : Bearer %b\r\n" % text,
        b"GET /v2/ HTTP/1.1\r\nAuthorization: Bearer\r\n %b\r\n" % text,
        b"GET /v2/ HTTP/1.1\r\nAuthorization Bearer %b\r\n" % text,
        b"GET /v2/ HTTP/1.1\r\n%b: x\r\n" % text,
        b"GET /v2/ HTTP/1.1\r\nAuthorization: Bearer %b\xff\xfe\r\n" % text,
        b"GET /v2/ HTTP/1.1\r\nContent-Length: %b\r\n" % text,
        b"GET /v2/ HTTP/1.1\r\nTransfer-Encoding: %b\r\n" % text,
        b"%b /v2/ HTTP/1.1\r\n" % text.replace(b"/", b""),
        b"POST /v2/token HTTP/1.1\r\nTransfer-Encoding: chunked\r\n%b\r\n%b\r\n" % (host, text),
        text + b"\r\n",
    ):
        reply = await registry.converse(head + host + b"\r\n")
        assert 400 <= reply.status < 500, head


@pytest.mark.parametrize(
    "mistaken",
    [
        {"http": {"secret": ["SECRET"]}},
        {"http": {"secret": {"SECRET": 1}}},
        {"http": {"secret": "SECRET", "secret_file": "/none"}},
        {"http": {"host": "https://alice:SECRET@reg.example"}},
        {"auth": {"token": {"realm": "https://alice:SECRET@reg.example/v2/token"}}},
        {"auth": {"oidc": [{"issuer": "https://a:SECRET@idp.example", "audiences": ["x"]}]}},
        {"storage": {"s3": {"bucket": "b", "accesskey": "a", "secretkey": ["SECRET"]}}},
        {"storage": {"s3": {"bucket": "b", "secretkey": "SECRET"}}},
        {
            "storage": {
                "s3": {"bucket": "b", "regionendpoint": "https://a:SECRET@s3.example", "secretkey": "SECRET"}
            }
        },
        {"notifications": {"endpoints": [{"name": "a b", "url": "https://x.example/", "secret": "SECRET"}]}},
        {"notifications": {"endpoints": [{"name": "a", "url": "https://u:SECRET@x.example/"}]}},
        {
            "notifications": {
                "endpoints": [{"name": "a", "url": "https://x.example/", "secret": {"is": "SECRET"}}]
            }
        },
        {"notifications": {"endpoints": [{"name": "a", "url": "https://x.example/?SECRET\n"}]}},
        {
            "notifications": {
                "endpoints": [
                    {
                        "name": "a",
                        "url": "https://x.example/",
                        "headers": {"Authorization": "Bearer SECRET\n"},
                    }
                ]
            }
        },
    ],
    ids=json.dumps,
)
def test_V_15_what_is_wrong_with_a_configuration_is_said_without_its_secrets(
    tmp_path: Path, mistaken: Mapping[str, Any]
) -> None:
    secret = secrets.token_hex(12)
    (tmp_path / "config.yml").write_text(json.dumps(mistaken).replace("SECRET", secret))

    with pytest.raises(ConfigInvalid) as caught:
        load_config(tmp_path / "config.yml")

    assert caught.value.problems
    assert secret not in "\n".join(caught.value.problems)
