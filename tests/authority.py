"""A private certificate authority, and servers with certificates of it, good and bad."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

HOST = "registry.example"
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class Issued(NamedTuple):
    """A certificate with what a server sends with it, and its key, in files."""

    certificate: Path
    key: Path

    def server_context(self, *, client_authority: Path | None = None) -> ssl.SSLContext:
        """TLS as a server speaks it; with an authority it wants a certificate of its clients."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # What is too weak for a client must be sent before it can be refused.
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.load_cert_chain(self.certificate, self.key)
        if client_authority is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_authority)
        return context


class Authority:
    """Makes certificates, in files of a folder; `file` is its own."""

    def __init__(
        self,
        folder: Path,
        name: str = "authority",
        *,
        above: Authority | None = None,
        bits: int | None = None,
    ) -> None:
        self._folder = folder
        self.key = _new_key(bits)
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = folder / f"{name}.pem"
        issuer = above or self
        self.certificate = self._signed(self.name, self.key, issuer, is_authority=True)
        self.file.write_bytes(self.certificate)

    def issue(
        self,
        name: str = HOST,
        *more: str,
        days: int = 1,
        bits: int | None = None,
        sha1: bool = False,
        passphrase: bytes | None = None,
        with_chain: bool = True,
    ) -> Issued:
        """A certificate for a host.

        Args:
            more: hosts that it is for as well.
            days: until it ends; negative: since it ended.
            bits: of an RSA key, in place of one on a curve.
            with_chain: send ours along, for who trusts only the authority above.
        """
        key = _new_key(bits)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(subject, key, self, days=days, sha1=sha1, hosts=(name, *more))
        return self._written(name, certificate + (self.certificate if with_chain else b""), key, passphrase)

    def _written(self, name: str, certificate: bytes, key: _Key, passphrase: bytes | None = None) -> Issued:
        issued = Issued(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        issued.certificate.write_bytes(certificate)
        protection = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        issued.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
        return issued

    def _signed(
        self,
        subject: x509.Name,
        key: _Key,
        issuer: Authority,
        *,
        days: int = 1,
        sha1: bool = False,
        hosts: Sequence[str] = (),
        is_authority: bool = False,
    ) -> bytes:
        begin, end = sorted(
            [datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(days=days)]
        )
        begin = begin if days > 0 else begin - timedelta(days=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False
            )
        )
        if is_authority:
            usage = x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=True,
                crl_sign=True,
                encipher_only=False,
                decipher_only=False,
            )
            builder = builder.add_extension(usage, critical=True)
        if hosts:
            names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(issuer.key, SHA256())
        return _with_sha1(certificate, issuer.key) if sha1 else certificate.public_bytes(Encoding.PEM)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _new_key(bits: int | None = None) -> _Key:
    if bits is None:
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def _with_sha1(certificate: x509.Certificate, key: _Key) -> bytes:
    """The same certificate, signed as nobody should any more; the library does not, so it is put together by hand."""
    assert isinstance(key, rsa.RSAPrivateKey)
    modern, old = (bytes.fromhex(f"2a864886f70d0101{end}") for end in ("0b", "05"))
    signed = certificate.tbs_certificate_bytes.replace(modern, old)
    signature = key.sign(signed, PKCS1v15(), SHA1())
    whole = certificate.public_bytes(Encoding.DER).replace(modern, old)
    return ssl.DER_cert_to_PEM_cert(whole.replace(certificate.signature, signature)).encode()


def self_signed(folder: Path, name: str = HOST) -> Issued:
    """A certificate that its own key has signed."""
    authority = Authority(folder, f"self-signed {name}")
    authority.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = authority._signed(authority.name, authority.key, authority, hosts=[name])
    return authority._written(name, certificate, authority.key)
