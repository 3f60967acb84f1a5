"""Keys of JWKS and certificates: what is taken, by which id, and for which algorithms."""

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from registry.auth.verification_keys import (
    JWS,
    KeyUnusable,
    key_of_chain,
    keys_of_certificates,
    libtrust_fingerprint,
    parse_certificates,
    parse_jwks,
    thumbprint,
    verification_key,
)

NOW = datetime(2026, 6, 1, tzinfo=UTC)
P256 = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)

# RFC 7638, section 3.1.
RFC_7638_KEY = {
    "kty": "RSA",
    "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknj"
    "hMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5"
    "hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw",
    "e": "AQAB",
    "alg": "RS256",
}


def jwk(key: Any, **more: Any) -> dict[str, Any]:
    name = {ec.EllipticCurvePublicKey: "ES256", rsa.RSAPublicKey: "RS256"}
    algorithm = next((name[kind] for kind in name if isinstance(key, kind)), "EdDSA")
    return {**JWS.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True), **more}


def key_set(*members: object) -> bytes:
    return json.dumps({"keys": members}).encode()


def test_a_key_without_an_id_is_found_by_its_thumbprint() -> None:
    assert list(parse_jwks(json.dumps(RFC_7638_KEY).encode())) == [
        "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    ]


@pytest.mark.parametrize(
    ("private", "algorithms"),
    [
        (ec.generate_private_key(ec.SECP256R1()), {"ES256"}),
        (ec.generate_private_key(ec.SECP384R1()), {"ES384"}),
        (ec.generate_private_key(ec.SECP521R1()), {"ES512"}),
        (RSA, {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
        (ed25519.Ed25519PrivateKey.generate(), {"EdDSA"}),
    ],
    ids=["P-256", "P-384", "P-521", "RSA", "Ed25519"],
)
def test_a_key_is_for_its_own_algorithms_only(private: Any, algorithms: set[str]) -> None:
    (key,) = parse_jwks(key_set(jwk(private.public_key(), kid="k"))).values()

    assert key.algorithms == algorithms


def test_the_alg_of_a_key_narrows_down_what_it_is_for() -> None:
    keys = parse_jwks(key_set(jwk(RSA.public_key(), kid="k", alg="RS256")))

    assert keys["k"].algorithms == {"RS256"}


def test_keys_for_other_uses_are_left_out() -> None:
    keys = parse_jwks(
        key_set(
            jwk(P256.public_key(), kid="sign", use="sig"),
            jwk(P256.public_key(), kid="encrypt", use="enc"),
            jwk(P256.public_key(), kid="wrap", key_ops=["wrapKey"]),
        )
    )

    assert set(keys) == {"sign"}


def test_a_key_that_cannot_be_used_does_not_take_the_others_with_it() -> None:
    keys = parse_jwks(
        key_set({"kty": "oct", "k": "c2VjcmV0", "kid": "secret"}, "text", jwk(P256.public_key(), kid="k"))
    )

    assert set(keys) == {"k"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"keys": {}}',
        b'{"keys": []}',
        b"\xff",
        key_set({"kty": "oct", "k": "c2VjcmV0"}),
        key_set({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}),
        key_set({"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"}),
        key_set({"kty": "EC", "crv": "P-256", "x": jwk(P256.public_key())["x"]}),
        key_set({"kty": "RSA", "n": "AQAB", "e": "AQAB"}),
        key_set({"kty": ["EC"]}),
        key_set({"kty": "OKP", "crv": "X25519", "x": "A" * 43}),
        key_set(jwk(P256.public_key(), kid=5)),
        key_set(jwk(P256.public_key(), kid="k", alg="HS256")),
        key_set(jwk(P256.public_key(), kid="k", alg="ES384")),
        key_set(jwk(P256.public_key(), kid="k"), jwk(RSA.public_key(), kid="k")),
        key_set(*[jwk(P256.public_key(), kid=str(number)) for number in range(101)]),
        key_set(jwk(rsa.generate_private_key(65537, 1024).public_key())),
    ],
    ids=[
        "nothing",
        "object",
        "list",
        "object for list",
        "empty",
        "bytes",
        "secret",
        "short EC",
        "secp256k1",
        "no y",
        "short RSA",
        "list for kty",
        "X25519",
        "number for kid",
        "HS256",
        "ES384 for P-256",
        "kid twice",
        "too many",
        "RSA 1024",
    ],
)
def test_what_has_no_key_to_use_is_refused(content: bytes) -> None:
    with pytest.raises(KeyUnusable):
        parse_jwks(content)


def test_V_15_a_private_key_in_a_key_set_is_not_looked_at() -> None:
    numbers = P256.private_numbers().private_value.to_bytes(32)
    private = base64.urlsafe_b64encode(numbers).rstrip(b"=").decode()

    (key,) = parse_jwks(key_set(jwk(P256.public_key(), kid="k", d=private))).values()

    assert isinstance(key.key, ec.EllipticCurvePublicKey)


@given(st.binary(max_size=200))
def test_any_content_is_keys_or_refused(content: bytes) -> None:
    with pytest.raises(KeyUnusable):
        parse_jwks(content)


def certificate(
    subject: str,
    key: Any,
    *,
    issuer: tuple[x509.Certificate, Any] | None = None,
    is_authority: bool = False,
    ends: datetime = NOW + timedelta(days=30),
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    signer = issuer[0].subject if issuer is not None else name
    signing = issuer[1] if issuer is not None else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(signer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
    )
    if is_authority:
        usage = x509.KeyUsage(
            *[False] * 5, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False
        )
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(signing, SHA256())


def der(*certificates: x509.Certificate) -> list[bytes]:
    return [item.public_bytes(Encoding.DER) for item in certificates]


@pytest.fixture
def keys() -> list[Any]:
    return [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]


def test_keys_of_a_bundle_are_found_by_both_of_their_ids(keys: list[Any]) -> None:
    pem = certificate("issuer", keys[0]).public_bytes(Encoding.PEM)

    found = keys_of_certificates(parse_certificates(pem), now=NOW)

    public = keys[0].public_key()
    assert set(found) == {thumbprint(public), libtrust_fingerprint(public)}


def test_the_fingerprint_of_libtrust_is_twelve_groups_of_four(keys: list[Any]) -> None:
    groups = libtrust_fingerprint(keys[0].public_key()).split(":")

    assert [len(group) for group in groups] == [4] * 12


def test_a_certificate_that_has_ended_has_no_key(keys: list[Any]) -> None:
    ended = certificate("issuer", keys[0], ends=NOW - timedelta(hours=1))

    assert keys_of_certificates([ended], now=NOW) == {}
    with pytest.raises(KeyUnusable, match="not valid now"):
        key_of_chain(der(ended), [ended], now=NOW)


@pytest.mark.parametrize(
    "content", [b"", b"text", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_what_is_no_bundle_is_refused(content: bytes) -> None:
    with pytest.raises(KeyUnusable, match="not a bundle"):
        parse_certificates(content)


def test_a_chain_that_leads_to_the_bundle_gives_the_first_key(keys: list[Any]) -> None:
    root = certificate("root", keys[0], is_authority=True)
    middle = certificate("middle", keys[1], issuer=(root, keys[0]), is_authority=True)
    leaf = certificate("leaf", keys[2], issuer=(middle, keys[1]))

    assert key_of_chain(der(leaf, middle), [root], now=NOW).key == keys[2].public_key()
    assert key_of_chain(der(leaf), [leaf], now=NOW).key == keys[2].public_key()


def test_A_31_a_chain_that_leads_nowhere_is_refused(keys: list[Any]) -> None:
    root = certificate("root", keys[0], is_authority=True)
    middle = certificate("middle", keys[1], issuer=(root, keys[0]), is_authority=True)
    leaf = certificate("leaf", keys[2], issuer=(middle, keys[1]))
    forged_root = certificate("root", keys[1], is_authority=True)
    forged = certificate("leaf", keys[2], issuer=(forged_root, keys[1]))
    ended = certificate("leaf", keys[2], issuer=(middle, keys[1]), ends=NOW - timedelta(hours=1))
    below_a_leaf = certificate("sub", keys[0], issuer=(leaf, keys[2]))

    chains = [
        der(leaf),  # the middle is missing
        der(certificate("leaf", keys[2])),  # signed by itself
        der(forged, forged_root),
        der(ended, middle),
        der(below_a_leaf, leaf, middle),
        [b"", b""],
        [b"nonsense"],
    ]
    for chain in chains:
        with pytest.raises(KeyUnusable):
            key_of_chain(chain, [root], now=NOW)


# Of a certificate: the tag of its version, which is 3, and the identifier of its key's kind (RFC 5280, 4.1; RFC 5480, 2.1.1).
VERSION_3 = bytes.fromhex("a003020102")
KIND_EC = bytes.fromhex("06072a8648ce3d0201")


@pytest.mark.parametrize("version", [1, 3, 127])
@pytest.mark.parametrize("place", [0, 1], ids=["leaf", "other"])
def test_a_chain_with_a_certificate_of_a_version_that_there_is_not_is_refused(
    place: int, version: int, keys: list[Any]
) -> None:
    root = certificate("root", keys[0], is_authority=True)
    middle = certificate("middle", keys[1], issuer=(root, keys[0]), is_authority=True)
    chain = der(certificate("leaf", keys[2], issuer=(middle, keys[1])), middle)
    chain[place] = chain[place].replace(VERSION_3, VERSION_3[:-1] + bytes([version]), 1)

    with pytest.raises(KeyUnusable, match="no chain"):
        key_of_chain(chain, [root], now=NOW)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (VERSION_3, bytes.fromhex("a003020103")),
        (KIND_EC, bytes.fromhex("06072a8648ce3d027f")),
        (bytes.fromhex("03420004"), bytes.fromhex("03420005")),
    ],
    ids=["version", "kind of key", "point"],
)
def test_a_bundle_with_a_certificate_that_cannot_be_used_is_refused(
    good: bytes, bad: bytes, keys: list[Any]
) -> None:
    (content,) = der(certificate("issuer", keys[0]))
    spoilt = base64.encodebytes(content.replace(good, bad, 1))
    pem = b"-----BEGIN CERTIFICATE-----\n" + spoilt + b"-----END CERTIFICATE-----\n"

    with pytest.raises(KeyUnusable):
        parse_certificates(pem)


@pytest.mark.parametrize("key", [object(), "text", b"bytes", None])
def test_what_is_no_key_is_refused(key: object) -> None:
    with pytest.raises(KeyUnusable):
        verification_key(key)
