"""Public keys that tokens are verified with, from a JWKS, from certificates, or our own; pure.

Each key knows the algorithms it is for, and only those are tried with it: no token can have an RSA key taken for an HMAC
secret, or a P-384 key for ES256. A key is found by its id, which is the JWK's `kid` or, without one, the RFC 7638
thumbprint; keys of certificates also by the older fingerprint of libtrust, which Docker's own token servers use.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import jwt
from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import verification

from kitspec.errors import ContentInvalid
from kitspec.strict_json import parse_json

FILE_SIZE_MAX: Final = 1024 * 1024
KEYS_MAX: Final = 100
_RSA_BITS_MIN: Final = 2048
_RSA_BITS_MAX: Final = 16384
_ALGORITHM_OF_CURVE: Final = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
_RSA_ALGORITHMS: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_PUBLIC_MEMBERS: Final = ("kty", "crv", "x", "y", "n", "e")
_PARSER_OF_TYPE: Final = {"EC": "ES256", "RSA": "RS256", "OKP": "EdDSA"}

JWS: Final = jwt.PyJWS()
"""The library's algorithms, by name. Those that take a secret are in it, and never reached: no key has their name."""

# What the library says of a certificate, as it is read, compared and verified: most of it is no ValueError.
_CERTIFICATE_ERRORS: Final = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.AttributeNotFound,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
    InternalError,
    verification.VerificationError,
)

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey


class KeyUnusable(ValueError):
    """A key that nothing is to be verified with."""


@dataclass(frozen=True, slots=True)
class VerificationKey:
    key: PublicKey
    algorithms: frozenset[str]


Keys = Mapping[str, VerificationKey]
"""By their ids."""


def verification_key(key: object) -> VerificationKey:
    """Raises: KeyUnusable."""
    match key:
        case ec.EllipticCurvePublicKey():
            algorithm = _ALGORITHM_OF_CURVE.get(key.curve.name)
            if algorithm is None:
                raise KeyUnusable(f"the curve {key.curve.name}; wanted P-256, P-384 or P-521")
            return VerificationKey(key, frozenset({algorithm}))
        case rsa.RSAPublicKey():
            if not _RSA_BITS_MIN <= key.key_size <= _RSA_BITS_MAX:
                raise KeyUnusable(
                    f"an RSA key of {key.key_size} bits; wanted {_RSA_BITS_MIN} to {_RSA_BITS_MAX}"
                )
            return VerificationKey(key, _RSA_ALGORITHMS)
        case ed25519.Ed25519PublicKey():
            return VerificationKey(key, frozenset({"EdDSA"}))
        case _:
            raise KeyUnusable("a key that is neither EC, RSA nor Ed25519")


def thumbprint(key: PublicKey) -> str:
    """RFC 7638, with SHA-256: what Distribution and we take for a key's id."""
    algorithm = JWS.get_algorithm_by_name(_parser_of(key))
    members: dict[str, Any] = algorithm.to_jwk(key, as_dict=True)
    required = {name: members[name] for name in sorted(_PUBLIC_MEMBERS) if name in members}
    canonical = json.dumps(required, separators=(",", ":"), sort_keys=True).encode()
    return base64.urlsafe_b64encode(hashlib.sha256(canonical).digest()).rstrip(b"=").decode()


def libtrust_fingerprint(key: PublicKey) -> str:
    """`PYYO:TEWU:…`: the id of keys in Docker's older token servers."""
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    text = base64.b32encode(hashlib.sha256(der).digest()[:30]).decode()
    return ":".join(text[start : start + 4] for start in range(0, len(text), 4))


def parse_jwks(content: bytes) -> Keys:
    """The keys of a JSON Web Key Set (RFC 7517), or of a single JWK. Keys that are not for signatures are left out.

    Raises:
        KeyUnusable: it is no key set, or none of its keys can be used; the message never holds a key.
    """
    try:
        document = parse_json(content)
    except ContentInvalid as error:
        raise KeyUnusable(f"not a JSON Web Key Set: {error}") from error
    members = document.get("keys", [document]) if isinstance(document, dict) else None
    if not isinstance(members, list) or len(members) > KEYS_MAX:
        raise KeyUnusable(f'not a JSON Web Key Set: wanted {{"keys": […]}} with at most {KEYS_MAX} keys')
    keys: dict[str, VerificationKey] = {}
    problems: list[str] = []
    for position, member in enumerate(members):
        try:
            parsed = _parse_jwk(member)
        except KeyUnusable as error:
            problems.append(f"key {position}: {error}")
            continue
        if parsed is not None:
            key_id, key = parsed
            if keys.setdefault(key_id, key) is not key:
                raise KeyUnusable(f"key {position}: the kid of another key")
    if not keys:
        raise KeyUnusable("no key that could be used" + "".join(f"; {problem}" for problem in problems[:3]))
    return keys


def _parse_jwk(member: object) -> tuple[str, VerificationKey] | None:
    if not isinstance(member, dict):
        raise KeyUnusable("no JSON object")
    kind, use, operations = member.get("kty"), member.get("use", "sig"), member.get("key_ops", ["verify"])
    if use != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    parser = _PARSER_OF_TYPE.get(kind) if isinstance(kind, str) else None
    if parser is None:
        raise KeyUnusable("a kty that is neither EC, RSA nor OKP")
    # A private key that somebody put there by mistake is not even looked at.
    public = {name: member[name] for name in _PUBLIC_MEMBERS if isinstance(member.get(name), str)}
    try:
        key = verification_key(JWS.get_algorithm_by_name(parser).from_jwk(public))
    except (jwt.exceptions.PyJWTError, ValueError, TypeError, KeyError) as error:
        reason = str(error) if isinstance(error, KeyUnusable) else "malformed"
        raise KeyUnusable(reason) from error
    key_id, algorithm = member.get("kid", ""), member.get("alg")
    if not isinstance(key_id, str):
        raise KeyUnusable("a kid that is no text")
    if algorithm is not None:
        if algorithm not in key.algorithms:
            raise KeyUnusable("an alg that is not for keys of this kind")
        key = VerificationKey(key.key, frozenset({algorithm}))
    return key_id or thumbprint(key.key), key


def parse_certificates(content: bytes) -> tuple[x509.Certificate, ...]:
    """The certificates of a PEM bundle.

    Raises:
        KeyUnusable: it is none.
    """
    try:
        certificates = x509.load_pem_x509_certificates(content)
    except _CERTIFICATE_ERRORS as error:
        raise KeyUnusable("not a bundle of certificates in PEM") from error
    if len(certificates) > KEYS_MAX:
        raise KeyUnusable(f"{len(certificates)} certificates; at most {KEYS_MAX} are taken")
    for certificate in certificates:
        _key_of(certificate)
    return tuple(certificates)


def keys_of_certificates(certificates: Sequence[x509.Certificate], *, now: datetime) -> Keys:
    """The keys of those that are valid now, by both of their ids."""
    keys: dict[str, VerificationKey] = {}
    for certificate in certificates:
        if certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            key = _key_of(certificate)
            keys[thumbprint(key.key)] = keys[libtrust_fingerprint(key.key)] = key
    return keys


def key_of_chain(
    chain: Sequence[bytes], roots: Sequence[x509.Certificate], *, now: datetime | None = None
) -> VerificationKey:
    """The key of the first certificate of `chain`, if the chain leads to one of `roots`.

    Raises:
        KeyUnusable: it does not.
    """
    try:
        leaf, *others = (x509.load_der_x509_certificate(der) for der in chain)
    except _CERTIFICATE_ERRORS as error:
        raise KeyUnusable("no chain of certificates") from error
    moment = now or datetime.now(UTC)
    if leaf in roots:
        if not leaf.not_valid_before_utc <= moment <= leaf.not_valid_after_utc:
            raise KeyUnusable("the certificate is not valid now")
        return _key_of(leaf)
    # Certificates of token servers are made for nothing but signing: no name, no usage has to be there.
    policy = verification.PolicyBuilder().store(verification.Store(list(roots))).time(moment)
    policy = policy.extension_policies(
        ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(),
        ee_policy=verification.ExtensionPolicy.permit_all(),
    )
    try:
        policy.build_client_verifier().verify(leaf, others)
    except _CERTIFICATE_ERRORS as error:
        raise KeyUnusable("the chain of certificates leads to none that is trusted") from error
    return _key_of(leaf)


def _key_of(certificate: x509.Certificate) -> VerificationKey:
    try:
        key = certificate.public_key()
    except _CERTIFICATE_ERRORS as error:
        raise KeyUnusable("a certificate with a key that cannot be read") from error
    return verification_key(key)


def _parser_of(key: PublicKey) -> str:
    match key:
        case ec.EllipticCurvePublicKey():
            return _PARSER_OF_TYPE["EC"]
        case rsa.RSAPublicKey():
            return _PARSER_OF_TYPE["RSA"]
        case _:
            return _PARSER_OF_TYPE["OKP"]
