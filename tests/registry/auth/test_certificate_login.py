"""Client certificates over real TLS."""

import asyncio
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.registry.auth.logins import basic, written
from tests.registry.conftest import configured, served
from tests.registry.wire import Reply, parse_reply


class Authority:
    """Makes certificates, in files."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        own = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.file.write_bytes(own.sign(self._key, SHA256()).public_bytes(Encoding.PEM))

    def issued(self, name: str) -> tuple[Path, Path]:
        """A certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = self._builder(subject, key).add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
        )
        certificate, private = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate.write_bytes(builder.sign(self._key, SHA256()).public_bytes(Encoding.PEM))
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, private

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "ca")


def settings(tmp_path: Path, authority: Authority, **tls: Any) -> dict[str, Any]:
    certificate, key = authority.issued("localhost")
    server = {"certificate": str(certificate), "key": str(key), "clientcas": [str(authority.file)], **tls}
    htpasswd = written(tmp_path / "htpasswd", {"alice": "secret"})
    auth = {"htpasswd": {"path": str(htpasswd)}, "clientcertificates": {"prefix": "cert:"}}
    control = {"repositories": {"**": {"policies": [{"users": ["cert:job"], "actions": ["read"]}]}}}
    return {"auth": auth, "http": {"tls": server, "accessControl": control}}


async def ask(url: str, authority: Authority, shown: tuple[Path, Path] | None, **headers: str) -> Reply:
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
        assert (await ask(url, authority, authority.issued("job"))).status == 404
        assert (await ask(url, authority, authority.issued("other"))).status == 403
        # What it says of itself is "cert:job": the user "job" is somebody else.
        assert (await ask(url, authority, authority.issued("cert"))).status == 403


async def test_credentials_win_over_a_certificate(tmp_path: Path, authority: Authority) -> None:
    async with served(configured({"inmemory": {}}, **settings(tmp_path, authority))) as url:
        job = authority.issued("job")

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
        stranger = Authority(tmp_path, "stranger").issued("job")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await ask(url, authority, stranger)
