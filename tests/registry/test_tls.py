"""The certificate of the port: what is refused at the start, and what a running registry makes of new files."""

import asyncio
import socket
import ssl
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from registry.app import services_of
from registry.config import Tls
from registry.tls import ServerTls, TlsUnusable, tls_problems
from tests.authority import Authority
from tests.registry.conftest import configured, served


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


def common_name(certificate: bytes | None) -> str:
    assert certificate is not None
    return x509.load_der_x509_certificate(certificate).subject.rfc4514_string()


async def shown_name(context: ssl.SSLContext) -> str:
    """Whom a server with `context` says it is, by a handshake over a pair of sockets."""
    ours, theirs = socket.socketpair()
    done = asyncio.Event()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    accepting = asyncio.create_task(
        loop.connect_accepted_socket(lambda: asyncio.StreamReaderProtocol(reader, answer), ours, ssl=context)
    )
    _, writer = await asyncio.open_connection(sock=theirs, ssl=trusting, server_hostname="x")
    await accepting
    name = common_name(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    done.set()
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return name


def test_a_certificate_and_a_key_that_do_not_match_are_refused(authority: Authority) -> None:
    certificate, _ = authority.issue("one.example")
    _, key = authority.issue("two.example")

    (problem,) = tls_problems(Tls(certificate=certificate, key=key))

    assert problem.startswith("http.tls.key: belongs to another certificate")


def test_every_file_that_cannot_be_read_is_named_with_its_key(tmp_path: Path) -> None:
    absent = tmp_path / "absent"

    problems = tls_problems(Tls(certificate=absent, key=absent, clientcas=[absent]))

    assert [problem.partition(": ")[0] for problem in problems] == [
        "http.tls.clientcas.0",
        "http.tls.certificate",
        "http.tls.key",
    ]
    assert all(str(absent) in problem and "No such file" in problem for problem in problems)


def test_what_is_no_certificate_and_what_is_no_key_are_told_apart(
    authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.issue("one.example")
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("nonsense")

    assert tls_problems(Tls(certificate=nonsense, key=key))[0].startswith("http.tls.certificate: should be")
    assert tls_problems(Tls(certificate=certificate, key=nonsense))[0].startswith("http.tls.key: should be")


def test_an_encrypted_key_is_refused_and_nobody_is_asked(authority: Authority) -> None:
    certificate, key = authority.issue("one.example")
    loaded = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )

    (problem,) = tls_problems(Tls(certificate=certificate, key=key))

    assert problem.startswith("http.tls.key: is encrypted")


async def test_a_new_certificate_is_shown_by_the_running_context(authority: Authority) -> None:
    certificate, key = authority.issue("one.example")
    tls = await asyncio.to_thread(ServerTls, Tls(certificate=certificate, key=key))
    before = await shown_name(tls.context)
    for ours, new in zip((certificate, key), authority.issue("two.example"), strict=True):
        new.replace(ours)

    await tls.look()

    assert (before, await shown_name(tls.context)) == ("CN=one.example", "CN=two.example")


async def test_a_swapped_symlink_is_a_new_certificate(authority: Authority, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"version{number}"
        folder.mkdir()
        for path, name in zip(authority.issue(f"{number}.example"), ("crt", "key"), strict=True):
            path.replace(folder / name)
    current = tmp_path / "current"
    current.symlink_to("version1")
    tls = await asyncio.to_thread(ServerTls, Tls(certificate=current / "crt", key=current / "key"))

    (tmp_path / "next").symlink_to("version2")
    (tmp_path / "next").replace(current)
    await tls.look()

    assert await shown_name(tls.context) == "CN=2.example"


async def test_a_pair_that_does_not_match_leaves_the_old_one_and_is_logged_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = authority.issue("one.example")
    tls = await asyncio.to_thread(ServerTls, Tls(certificate=certificate, key=key))
    new_certificate, new_key = authority.issue("two.example")

    new_certificate.replace(certificate)
    await tls.look()
    await tls.look()
    name_meanwhile = await shown_name(tls.context)
    new_key.replace(key)
    await tls.look()

    assert name_meanwhile == "CN=one.example"
    assert [record.message for record in caplog.records].count("tls.certificate.unusable") == 1
    assert await shown_name(tls.context) == "CN=two.example"


async def test_a_registry_does_not_start_with_a_pair_that_does_not_match(authority: Authority) -> None:
    certificate, _ = authority.issue("one.example")
    _, key = authority.issue("two.example")
    config = configured({"inmemory": {}}, http={"tls": {"certificate": str(certificate), "key": str(key)}})

    with pytest.raises(TlsUnusable, match="belongs to another certificate"):
        async with served(config):
            pass


@pytest.mark.parametrize(
    ("headers", "seen"),
    [
        ({}, "max-age=31536000"),
        ({"strict-transport-security": "max-age=0"}, "max-age=0"),
    ],
)
async def test_browsers_are_told_to_come_by_https_where_tls_is_ours(
    authority: Authority, headers: dict[str, str], seen: str
) -> None:
    certificate, key = authority.issue("localhost")
    tls = {"certificate": str(certificate), "key": str(key)}
    config = configured({"inmemory": {}}, http={"tls": tls, "headers": headers})
    async with (
        served(config) as url,
        aiohttp.ClientSession() as session,
        session.get(f"{url.replace('http', 'https')}/v2/", ssl=False) as answer,
    ):
        assert answer.headers.getall("Strict-Transport-Security") == [seen]


async def test_over_plain_http_nobody_is_told_so() -> None:
    async with (
        served(configured({"inmemory": {}})) as url,
        aiohttp.ClientSession() as session,
        session.get(f"{url}/v2/") as answer,
    ):
        assert "Strict-Transport-Security" not in answer.headers


@pytest.mark.parametrize(
    ("http", "is_told"),
    [
        ({"addr": ":5000"}, True),
        ({"addr": "10.0.0.1:5000", "host": "http://registry.example"}, True),
        ({"addr": ":5000", "host": "https://registry.example"}, False),
        ({"addr": "127.0.0.1:5000"}, False),
        ({"addr": "[::1]:5000"}, False),
    ],
)
async def test_passwords_over_plain_http_beyond_loopback_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, http: dict[str, str], is_told: bool
) -> None:
    users = tmp_path / "users"
    users.write_bytes(b"")
    config = configured({"inmemory": {}}, http=http, auth={"htpasswd": {"path": str(users)}})

    async with services_of(config):
        pass

    assert ("auth.plain_http" in [record.message for record in caplog.records]) == is_told
