"""Proxies: which one, and who sees whose credentials."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from yarl import URL

from kitclient.credentials import Credential
from kitclient.errors import TransportRefused
from kitclient.proxies import Proxies
from kitclient.tls import TlsOptions
from tests.authority import Authority, self_signed
from tests.kitclient.peer import client, serving

SECRET = Credential("user", "canary-password")
PROXY_LOGIN = "Basic " + base64.b64encode(b"proxy-user:canary/proxy").decode()


async def credentials(host: str) -> Credential:
    _ = host
    return SECRET


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@dataclass
class Tunnel:
    """A proxy that connects every CONNECT to one port of this machine, and remembers all that it can read.

    Attributes:
        status: what it answers to CONNECT.
    """

    target: int
    port: int = 0
    status: int = 200
    heads: list[str] = field(default_factory=list)
    passed: bytearray = field(default_factory=bytearray)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(f"HTTP/1.1 {self.status} x\r\n\r\n".encode())
            if self.status == 200:
                theirs, onwards = await asyncio.open_connection("127.0.0.1", self.target)
                with contextlib.closing(onwards):
                    await asyncio.gather(self.relay(reader, onwards), self.relay(theirs, writer))

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65536):
                self.passed += piece
                writer.write(piece)
            writer.close()


@asynccontextmanager
async def tunnel(target: int) -> AsyncIterator[Tunnel]:
    proxy = Tunnel(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for task in proxy.tasks:
            task.cancel()
        await asyncio.gather(*proxy.tasks, return_exceptions=True)


async def answer(request: web.Request) -> web.Response:
    if "Authorization" not in request.headers:
        return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="r"'})
    return web.Response(text="{}")


@pytest.mark.parametrize("way", ["option", "HTTPS_PROXY", "https_proxy"])
async def test_C_33_through_a_tunnel_each_credential_reaches_its_own_side_only(
    tmp_path: Path, monkeypatch, way
):
    authority = Authority(tmp_path)
    context = authority.issue().server_context()
    async with serving(answer, tls=context) as peer, tunnel(peer.port) as proxy:
        url = f"http://proxy-user:canary%2Fproxy@127.0.0.1:{proxy.port}"
        if way != "option":
            monkeypatch.setenv(way, url)
        async with client(
            peer,
            host="registry.example",
            plain_http=False,
            tls=TlsOptions(ca_files=(authority.file,)),
            credentials=credentials,
            proxy=url if way == "option" else None,
        ) as registry:
            await registry.ping()

    assert peer.authorizations == [[], [SECRET.basic]]
    assert all("Proxy-Authorization" not in request.headers for request in peer.requests)
    assert proxy.heads
    for head in proxy.heads:
        assert head.startswith(f"CONNECT registry.example:{peer.port} HTTP/1.1\r\n")
        assert f"Proxy-Authorization: {PROXY_LOGIN}\r\n" in head
        assert "\r\nAuthorization" not in head
    assert SECRET.password.encode() not in proxy.passed
    assert SECRET.basic is not None
    assert SECRET.basic.encode() not in proxy.passed


@pytest.mark.parametrize(("status", "words"), [(407, "wants a name"), (502, "502")])
async def test_C_33_a_proxy_that_refuses_is_named_without_its_password(status: int, words: str):
    async with serving(answer) as peer, tunnel(peer.port) as proxy:
        proxy.status = status
        settings = {"proxy": f"http://proxy-user:canary@127.0.0.1:{proxy.port}", "plain_http": False}
        async with client(peer, host="registry.example", **settings) as registry:
            with pytest.raises(TransportRefused, match=words) as refusal:
                await registry.ping()

    assert peer.requests == []
    assert "canary" not in str(refusal.value)


async def test_a_proxy_that_is_not_there_is_said_to_be():
    async with serving(answer) as peer:
        settings = {"proxy": "http://proxy-user:canary@127.0.0.1:1", "plain_http": False}
        async with client(peer, host="registry.example", **settings) as registry:
            with pytest.raises(TransportRefused, match="no connection to the proxy") as refusal:
                await registry.ping()

    assert "canary" not in str(refusal.value)


async def test_C_33_a_proxy_is_verified_even_where_a_registry_is_not(tmp_path: Path):
    context = self_signed(tmp_path, "127.0.0.1").server_context()
    async with serving(answer, tls=context) as proxy:
        settings = {"proxy": f"https://proxy-user:canary@{proxy.host}", "plain_http": False}
        unverified = TlsOptions(verify=False)
        async with client(proxy, host="registry.example", tls=unverified, **settings) as registry:
            with pytest.raises(TransportRefused, match="an https proxy would go unverified"):
                await registry.ping()

    assert proxy.requests == []


@pytest.mark.parametrize(
    "text", ["socks5://user:canary@proxy:1080", "http://user:canary@proxy:99999", "http://", "file:///canary"]
)
def test_C_33_what_is_no_proxy_is_refused_without_being_quoted(text: str):
    with pytest.raises(TransportRefused, match="wanted http") as refusal:
        Proxies(text)

    assert "canary" not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "is_proxied"),
    [
        ("https://registry.example/", True),
        ("https://other.example/", False),
        ("https://sub.other.example/", False),
        ("https://another.example/", True),
        ("https://third.example:5000/", False),
        ("https://third.example/", True),
        ("https://8.8.4.4/", False),
        ("https://8.9.0.1/", True),
        ("https://[2001:4860::1]/", False),
        # This machine and its network, by any spelling of an address.
        ("https://localhost:5000/", False),
        ("https://127.0.0.1/", False),
        ("https://10.0.0.1/", False),
        ("http://registry.example/", False),
    ],
)
def test_C_33_the_environment_says_which_hosts_have_a_proxy(monkeypatch, url: str, is_proxied):
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    monkeypatch.setenv(
        "NO_PROXY", "other.example, third.example:5000, 8.8.0.0/16,2001:4860::/32,not/a/network,"
    )

    assert Proxies(None).find(URL(url)) == (URL("http://proxy.example:3128") if is_proxied else None)


def test_an_option_is_for_every_host(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")

    assert Proxies("https://proxy.example").find(URL("https://127.0.0.1/")) == URL("https://proxy.example")
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example")
    assert Proxies(None).find(URL("https://registry.example/")) is None
