"""`kitclient login` and what it is for, from the command line: passwords, certificates, and who gets to see them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import stat
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kitclient import cli
from kitclient.credentials import Credential
from kitclient.image_layout import LayoutRegistry
from kitclient.stores import is_loopback
from tests.authority import Authority
from tests.kitclient.kit_server import serving_kits
from tests.kitclient.peer import Answer, serving

GOOD = Credential("ann", "canary:password").basic
REGISTRY_TOKEN = "canary.token"


@dataclass
class Result:
    code: object
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Run = Callable[..., Awaitable[Result]]


@pytest.fixture
def kitclient(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in a thread of its own, with what it reads from stdin."""
    monkeypatch.setenv("KITCLIENT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))

    def call(arguments: tuple[object, ...]) -> object:
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code
        raise AssertionError("main does not return")

    async def run(*arguments: object, stdin: io.StringIO | str = "") -> Result:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        code = await asyncio.to_thread(call, arguments)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def kept(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """What is in the credentials file."""
    path = tmp_path / "home/credentials.json"

    def read() -> dict[str, Any]:
        return json.loads(path.read_text())["auths"] if path.exists() else {}

    return read


async def basic(request: web.Request) -> web.Response:
    if request.headers.get("Authorization") == GOOD:
        return web.Response(text="{}")
    return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="r"'})


async def bearer(request: web.Request) -> web.Response:
    if request.path == "/token":
        form = await request.post()
        shown = request.headers.get("Authorization") == GOOD or form.get("refresh_token") == "canary:password"
        return web.json_response({"token": REGISTRY_TOKEN}) if shown else web.Response(status=401)
    if request.headers.get("Authorization") == f"Bearer {REGISTRY_TOKEN}":
        return web.Response(text="{}")
    field = f'Bearer realm="http://{request.host}/token",service="s"'
    return web.Response(status=401, headers={"WWW-Authenticate": field})


async def letting_everybody_in(request: web.Request) -> web.Response:
    """Anonymous clients may come in; who shows a password must show the right one."""
    return await basic(request) if "Authorization" in request.headers else web.Response(text="{}")


SERVERS = {"basic": basic, "bearer": bearer, "anonymous": letting_everybody_in}


@pytest.mark.parametrize("kind", SERVERS)
async def test_C_37_login_verifies_before_it_stores(kitclient: Run, kept, tmp_path: Path, kind: str):
    async with serving(SERVERS[kind]) as peer:
        login = ("login", peer.host, "-u", "ann", "--password-stdin", "-vv")
        wrong = await kitclient(*login, stdin="canary-wrong\n")
        assert wrong.code == 1
        assert kept() == {}

        right = await kitclient(*login, stdin="canary:password\n")

    assert (right.code, right.err) == (0, "")
    assert right.out.endswith("Log in successful\n")
    assert list(kept()) == [peer.host]
    assert stat.S_IMODE((tmp_path / "home/credentials.json").stat().st_mode) == 0o600
    assert "canary" not in wrong.said + right.said


async def test_C_37_a_wrong_login_keeps_the_one_before(kitclient: Run, kept):
    async with serving(basic) as peer:
        await kitclient("login", peer.host, "-u", "ann", "--password-stdin", stdin="canary:password")
        before = kept()
        assert (await kitclient("login", peer.host, "-u", "ann", "--password-stdin", stdin="other")).code == 1

    assert kept() == before


@pytest.mark.parametrize(
    "stdin", ["canary:password", "canary:password\n", "canary:password\r\n", "canary:password\nmore"]
)
async def test_C_37_the_password_is_the_first_line_of_stdin(kitclient: Run, stdin: str):
    async with serving(basic) as peer:
        assert (await kitclient("login", peer.host, "-u", "ann", "--password-stdin", stdin=stdin)).code == 0


async def test_C_37_a_password_among_the_arguments_is_warned_of(kitclient: Run):
    async with serving(basic) as peer:
        result = await kitclient("login", peer.host, "-u", "ann", "-p", "canary:password")

    assert result.code == 0
    assert "--password-stdin" in result.err
    assert "canary" not in result.said


async def test_C_37_a_password_is_asked_for_without_showing_it(kitclient: Run, monkeypatch):
    asked: list[str] = []

    def hidden(prompt: str) -> str:
        asked.append(prompt)
        return "canary:password"

    monkeypatch.setattr("click.termui.hidden_prompt_func", hidden)
    monkeypatch.setattr("click.termui.visible_prompt_func", lambda _: "ann")
    async with serving(basic) as peer:
        result = await kitclient("login", peer.host, stdin=Terminal())

    assert result.code == 0
    assert len(asked) == 1
    assert "canary" not in result.said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "no terminal.*--password-stdin"),
        (("-u", "ann"), "no terminal.*--password-stdin"),
        (("-u", "ann", "-p", "x", "--password-stdin"), "exclude each other"),
        (("-u", "ann", "--password-stdin"), "password is wanted"),
        (("-u", "ann:bo", "-p", "x"), "no colon"),
    ],
)
async def test_C_37_what_cannot_be_a_login_is_refused_before_anything_is_asked(
    kitclient: Run, options, words
):
    async with serving(basic) as peer:
        result = await kitclient("login", peer.host, *options)

    assert result.code == 1
    assert peer.requests == []
    assert re.search(words, result.err)


async def test_C_37_a_password_in_the_registrys_name_is_refused_and_not_repeated(kitclient: Run):
    result = await kitclient(
        "login", "https://ann:canary@reg.example", "-u", "ann", "--password-stdin", stdin="x"
    )

    assert result.code == 1
    assert "canary" not in result.said


@pytest.mark.parametrize(("answer", "warns"), [(bearer, False), (letting_everybody_in, True)])
async def test_C_34_without_a_name_the_password_is_an_identity_token(
    kitclient: Run, kept, answer: Answer, warns: bool
):
    async with serving(answer) as peer:
        result = await kitclient("login", peer.host, "--password-stdin", stdin="canary:password")

    assert result.code == 0
    assert kept() == {peer.host: {"identitytoken": "canary:password"}}
    assert ("nobody has looked at it" in result.err) == warns


async def test_logout_forgets_and_is_no_error_twice(kitclient: Run, kept):
    async with serving(basic) as peer:
        await kitclient("login", peer.host, "-u", "ann", "--password-stdin", stdin="canary:password")
        for _ in range(2):
            result = await kitclient("logout", peer.host)
            assert (result.code, result.out) == (0, f"Successfully logged out from {peer.host}\n")

    assert kept() == {}


async def test_logout_does_not_say_that_it_succeeded_when_the_helper_did_not_erase(
    kitclient: Run, tmp_path: Path, monkeypatch
):
    program = tmp_path / "bin/docker-credential-locked"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat > /dev/null; echo keychain is locked; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/credentials.json").write_text('{"credsStore": "locked"}')

    result = await kitclient("logout", "reg.example")

    assert (result.code, result.out) == (1, "")
    assert "keychain is locked" in result.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"auths": {"https://reg.example": {"auth": "YW5uOmNhbmFyeQ=="}}}', "still found in {path}"),
        ("{", "cannot be told: {path} is not JSON"),
    ],
)
async def test_logout_warns_of_what_docker_still_knows(
    kitclient: Run, tmp_path: Path, content: str, words: str
):
    path = tmp_path / "docker/config.json"
    path.parent.mkdir()
    path.write_text(content)

    result = await kitclient("logout", "reg.example")

    assert (result.code, result.out) == (0, "Successfully logged out from reg.example\n")
    assert words.format(path=path) in result.err
    assert "canary" not in result.said
    assert path.read_text() == content


# ---- TLS


async def test_a_private_authority_is_named_by_an_option_or_a_folder_of_its_host(
    kitclient: Run, kept, tmp_path: Path
):
    authority = Authority(tmp_path)
    context = authority.issue("127.0.0.1").server_context()
    async with serving(basic, tls=context) as peer:
        login = ("login", peer.host, "-u", "ann", "--password-stdin")
        unknown = await kitclient(*login, stdin="canary:password")
        named = await kitclient(*login, "--tls-cert", authority.file, stdin="canary:password")
        unverified = await kitclient(*login, "--no-tls-verify", stdin="canary:password")
        as_in_kit = await kitclient(*login, "--tls-verify=false", stdin="canary:password")
        folder = tmp_path / "home/certs.d" / peer.host
        folder.mkdir(parents=True)
        (folder / "ca.crt").write_bytes(authority.file.read_bytes())
        found = await kitclient(*login, stdin="canary:password")

    assert unknown.code == 1
    assert "--tls-cert" in unknown.err
    assert [result.code for result in (named, unverified, as_in_kit, found)] == [0] * 4
    assert peer.authorizations == [[], [GOOD]] * 4


@pytest.mark.parametrize("way", ["options", "environment", "folder"])
async def test_our_certificate_is_named_by_options_the_environment_or_a_folder(
    kitclient: Run, tmp_path: Path, monkeypatch, way: str
):
    authority = Authority(tmp_path)
    ours = authority.issue("ann")
    context = authority.issue("127.0.0.1").server_context(client_authority=authority.file)
    async with serving(basic, tls=context) as peer:
        login = ["login", peer.host, "-u", "ann", "--password-stdin", "--tls-cert", authority.file]
        if way == "options":
            login += ["--cert", ours.certificate, "--key", ours.key]
        elif way == "environment":
            monkeypatch.setenv("KITCLIENT_CLIENT_CERT", str(ours.certificate))
            monkeypatch.setenv("KITCLIENT_CLIENT_KEY", str(ours.key))
        else:
            folder = tmp_path / "home/certs.d" / peer.host
            folder.mkdir(parents=True)
            (folder / "client.cert").write_bytes(ours.certificate.read_bytes())
            (folder / "client.key").write_bytes(ours.key.read_bytes())
        result = await kitclient(*login, stdin="canary:password")

    assert (result.code, result.err) == (0, "")


# ---- plain HTTP


async def test_C_30_plain_http_is_taken_of_this_machine_only_where_nothing_says_tls(
    kitclient: Run, tmp_path: Path
):
    """As docker does for 127.0.0.0/8; who names an authority or a certificate means TLS, here too."""
    authority = Authority(tmp_path)
    async with serving(basic) as peer:
        login = ("login", peer.host, "-u", "ann", "--password-stdin")
        found = await kitclient(*login, stdin="canary:password")
        asked = len(peer.requests)
        refused = await kitclient(*login, "--tls-cert", authority.file, stdin="canary:password")

    assert found.code == 0
    assert refused.code == 1
    assert "--plain-http" in refused.err
    assert len(peer.requests) == asked


async def test_C_30_a_registry_of_this_machine_that_fails_tls_is_not_spoken_to_in_clear(
    kitclient: Run, tmp_path: Path
):
    context = Authority(tmp_path).issue("127.0.0.1").server_context()
    async with serving(basic, tls=context) as peer:
        result = await kitclient("login", peer.host, "-u", "ann", "--password-stdin", stdin="canary:password")

    assert result.code == 1
    assert "not trusted" in result.err
    assert peer.requests == []


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("localhost", True),
        ("localhost:5000", True),
        ("127.0.0.1:5000", True),
        ("127.9.9.9", True),
        ("[::1]:5000", True),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("127.1", False),
        ("10.0.0.1:5000", False),
        ("0.0.0.0", False),
        ("registry.example:5000", False),
    ],
)
def test_C_30_this_machine_is_named_by_its_own_names_only(host: str, is_ours: bool):
    assert is_loopback(host) == is_ours


# ---- a hostile registry, from the command line


async def command(*arguments: object) -> int:
    """Run the command line in a process of its own; its exit code."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kitclient.cli", *map(str, arguments), stdout=DEVNULL, stderr=DEVNULL
    )
    return await process.wait()


async def test_C_12_unpack_from_a_registry_that_changes_a_layer_leaves_nothing_and_exits_1(tmp_path: Path):
    context, store, target = tmp_path / "context", tmp_path / "store", tmp_path / "out"
    context.mkdir()
    (context / "w.bin").write_bytes(b"weights")
    (context / "Kitfile").write_text("manifestVersion: 1.0.0\nmodel: {path: w.bin}")
    assert await command("--config", store, "pack", context, "-t", "reg.example/org/kit:v1") == 0

    layout = LayoutRegistry(store / "storage", "reg.example")
    async with layout, serving_kits(layout, store / "storage") as (server, peer):
        unpack = ("--config", tmp_path / "home", "unpack", f"{peer.host}/org/kit:v1", "-d", target)
        server.change_content = lambda content: content.replace(b"weights", b"Weights")
        assert await command(*unpack) == 1
        assert not target.exists()
        server.change_content = lambda content: content
        assert await command(*unpack) == 0

    assert (target / "w.bin").read_bytes() == b"weights"
