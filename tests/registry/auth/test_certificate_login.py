"""Client certificates over real TLS."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.authority import Authority, Issued
from tests.registry.auth.logins import basic, written
from tests.registry.conftest import configured, served
from tests.registry.wire import Reply, parse_reply


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


def settings(tmp_path: Path, authority: Authority, **tls: Any) -> dict[str, Any]:
    certificate, key = authority.issue("localhost")
    server = {"certificate": str(certificate), "key": str(key), "clientcas": [str(authority.file)], **tls}
    htpasswd = written(tmp_path / "htpasswd", {"alice": "secret"})
    auth = {"htpasswd": {"path": str(htpasswd)}, "clientcertificates": {"prefix": "cert:"}}
    control = {"repositories": {"**": {"policies": [{"users": ["cert:job"], "actions": ["read"]}]}}}
    return {"auth": auth, "http": {"tls": server, "accessControl": control}}


async def ask(url: str, authority: Authority, shown: Issued | None, **headers: str) -> Reply:
    context = await asyncio.to_thread(ssl.create_default_context, cafile=str(authority.file))
    if shown is not None:
        context.load_cert_chain(*shown)
    port = int(url.rpartition(":")[2])
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost"
    )
    try:
        fields = {"Host": "localhost", "Connection": "close", **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"GET /v2/a/b/tags/list HTTP/1.1\r\n{head}\r\n".encode())
        answer = await reader.read()
        if not answer:
            raise ConnectionError("the server closed without an answer")
        return parse_reply(answer, "GET")
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_a_certificate_is_a_name_for_the_policy(tmp_path: Path, authority: Authority) -> None:
    async with served(configured({"inmemory": {}}, **settings(tmp_path, authority))) as url:
        assert (await ask(url, authority, authority.issue("job"))).status == 404
        assert (await ask(url, authority, authority.issue("other"))).status == 403
        # What it says of itself is "cert:job": the user "job" is somebody else.
        assert (await ask(url, authority, authority.issue("cert"))).status == 403


async def test_credentials_win_over_a_certificate(tmp_path: Path, authority: Authority) -> None:
    async with served(configured({"inmemory": {}}, **settings(tmp_path, authority))) as url:
        job = authority.issue("job")

        assert (await ask(url, authority, job, **basic("alice", "secret"))).status == 403
        assert (await ask(url, authority, job, **basic("alice", "wrong"))).status == 401


async def test_who_shows_none_gets_no_connection_or_logs_in_otherwise(
    tmp_path: Path, authority: Authority
) -> None:
    async with served(configured({"inmemory": {}}, **settings(tmp_path, authority))) as url:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(url, authority, None)
    optional = settings(tmp_path, authority, clientauth="verify-client-cert-if-given")
    async with served(configured({"inmemory": {}}, **optional)) as url:
        assert (await ask(url, authority, None)).status == 401
        assert (await ask(url, authority, None, **basic("alice", "secret"))).status == 403
        stranger = Authority(tmp_path, "stranger").issue("job")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(url, authority, stranger)
