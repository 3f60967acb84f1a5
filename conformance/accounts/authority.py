"""A certificate authority as a company has one: nobody's programs know it until they are told."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALID_FOR = timedelta(days=1)


@dataclass(frozen=True)
class Certificates:
    """Files, in PEM.

    Attributes:
        authority: what a client must trust.
        certificate: of the server, by the authority.
        key: of the server.
    """

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path, *addresses: str) -> Certificates:
    """A new authority, and what a server at these addresses shows; the authority's own key is kept nowhere."""
    folder.mkdir(parents=True)
    made = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority, server = _named("The authority of this run"), _named("The registry of this run")
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())

    # With all that strict verifiers ask for: Python 3.13 takes no authority without the two identifiers and keyUsage.
    of_authority = (
        _certificate(authority, authority, authority_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_signs_certificates(), critical=True)
        .add_extension(identifier, critical=False)
    )
    of_server = (
        _certificate(server, authority, server_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address(text)) for text in addresses]),
            critical=False,
        )
    )
    made.authority.write_bytes(of_authority.sign(authority_key, SHA256()).public_bytes(Encoding.PEM))
    made.certificate.write_bytes(of_server.sign(authority_key, SHA256()).public_bytes(Encoding.PEM))
    made.key.touch(0o600)
    made.key.write_bytes(server_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return made


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + _VALID_FOR)
    )


def _signs_certificates() -> x509.KeyUsage:
    return x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
