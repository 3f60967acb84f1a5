"""JSON Web Tokens, strictly: what is signed, by whom, for whom, until when. Pure.

PyJWT makes and checks the signatures. The envelope and the claims are checked here, because libraries are lenient in
places where that became a hole: keys named by a token's own header (CVE-2025-24976), unknown critical headers
(CVE-2026-32597), algorithms chosen by the token (CVE-2022-29217), issuers that match in part, tokens of a million dots
(CVE-2025-30204). The algorithm that a token names is only compared with what its key is for.

Source: RFC 7515, 7519, 8725; CNCF Distribution's token specification for `access`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import jwt

from kitspec.errors import ContentInvalid, NameInvalid
from kitspec.names import RepositoryName
from kitspec.strict_json import parse_json
from registry.auth.identity import Grant
from registry.auth.verification_keys import JWS, VerificationKey

TOKEN_SIZE_MAX: Final = 16 * 1024
LEEWAY_S: Final = 60.0
"""Clocks of issuer and registry may differ by so much."""

ACCESS_ENTRIES_MAX: Final = 1000
ACTIONS: Final = frozenset({"pull", "push", "delete", "*"})

_AUDIENCES_MAX = 100
_KEY_ID_LENGTH_MAX = 256
_SUBJECT_LENGTH_MAX = 255
_NUMERIC_DATE_MAX = 2.0**40
_SEGMENT = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# A key that a token brings along proves nothing; what is critical is not understood here; `b64` changes what is signed.
_REFUSED_IN_HEADER = ("jwk", "jku", "x5u", "crit", "b64", "zip")
_CLOCK = "if it is no old token, the clock of its issuer or of this registry is wrong"


class TokenInvalid(Exception):
    """A token that is not to be believed. The message is for the log: it says what is wrong, and nothing of the token."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A token that is well-formed; nobody has looked at its signature.

    Attributes:
        claims: not to be believed yet.
        chain: certificates in DER that the header brings along, the signer's first; not to be believed either.
    """

    algorithm: str
    key_id: str | None
    type: str
    chain: tuple[bytes, ...]
    claims: Mapping[str, Any]
    signed: bytes
    signature: bytes

    @property
    def issuer(self) -> str | None:
        issuer = self.claims.get("iss")
        return issuer if isinstance(issuer, str) else None


@dataclass(frozen=True, slots=True)
class Rules:
    """What a token must say.

    Attributes:
        issuer: exactly.
        audiences: one of them must be among the token's.
        algorithms: those that are taken at all; the key narrows them down to what it is made for.
        types: what `typ` may be, in lower case; "" where there is none.
    """

    issuer: str
    audiences: frozenset[str]
    algorithms: frozenset[str]
    types: frozenset[str] = frozenset({"", "jwt"})


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token that is to be believed says.

    Attributes:
        subject: "" for nobody in particular.
        expires: seconds since 1970.
        document: all of it.
    """

    subject: str
    expires: float
    document: Mapping[str, Any]


def parse_token(text: str) -> Envelope:
    """Raises: TokenInvalid."""
    if len(text) > TOKEN_SIZE_MAX or text.count(".") != 2:
        raise TokenInvalid(f"{len(text)} characters with {text.count('.')} dots are no JWT")
    header_part, claims_part, signature_part = text.split(".")
    header = _parse_object(_decoded(header_part, "header"), "header")
    signature = _decoded(signature_part, "signature")
    claims = _parse_object(_decoded(claims_part, "claims"), "claims")
    for name in _REFUSED_IN_HEADER:
        if name in header:
            raise TokenInvalid(f"the header has {name}, which is never taken")
    algorithm, key_id, kind = header.get("alg"), header.get("kid"), header.get("typ", "")
    if not isinstance(algorithm, str) or not isinstance(kind, str):
        raise TokenInvalid("the header has no alg, or a typ that is no text")
    if key_id is not None and not (isinstance(key_id, str) and 0 < len(key_id) <= _KEY_ID_LENGTH_MAX):
        raise TokenInvalid("the header has a kid that cannot be one")
    signed = f"{header_part}.{claims_part}".encode()
    return Envelope(algorithm, key_id, kind.lower(), _chain_of(header), claims, signed, signature)


def verify_token(envelope: Envelope, key: VerificationKey, rules: Rules, *, now: float) -> Claims:
    """Believe a token, or not.

    Args:
        key: found by `kid` among those that are trusted, or in a chain that was verified.
        now: seconds since 1970.

    Raises:
        TokenInvalid: the reason comes from the first rule that is broken, the signature's before any of the claims.
    """
    if envelope.algorithm not in rules.algorithms or envelope.algorithm not in key.algorithms:
        raise TokenInvalid(f"alg {envelope.algorithm[:20]!a} is not what the key is for")
    if envelope.type not in rules.types:
        raise TokenInvalid(f"typ {envelope.type[:40]!a} is another kind of token")
    if not JWS.get_algorithm_by_name(envelope.algorithm).verify(envelope.signed, key.key, envelope.signature):
        raise TokenInvalid("the signature is wrong")
    claims = envelope.claims
    if claims.get("iss") != rules.issuer:
        raise TokenInvalid("iss is not this issuer")
    if rules.audiences.isdisjoint(_audiences_of(claims)):
        raise TokenInvalid("aud does not name this registry")
    expires = _check_times(claims, now)
    return Claims(_subject_of(claims), expires, claims)


def sign_token(
    claims: Mapping[str, Any],
    key: Any,  # noqa: ANN401 - a private key, of whichever kind
    algorithm: str,
    *,
    key_id: str,
    type: str = "JWT",  # noqa: A002 - the header's name without its vowels
) -> str:
    return jwt.encode(dict(claims), key, algorithm, headers={"kid": key_id, "typ": type})


def grants_of(claims: Claims) -> tuple[Grant, ...]:
    """What the token's `access` allows; an entry that is malformed allows nothing.

    Names are compared as text by whoever decides: a `*` in one is no name of a repository, and no grant.
    """
    access = claims.document.get("access")
    if not isinstance(access, list) or len(access) > ACCESS_ENTRIES_MAX:
        return ()
    grants = (_grant_of(entry) for entry in access)
    return tuple(grant for grant in grants if grant is not None)


def is_scope_name(kind: str, name: str) -> bool:
    """Whether a grant could be for this: a repository, the catalog, or the metrics."""
    if kind == "registry":
        return name in ("catalog", "metrics")
    if kind != "repository":
        return False
    try:
        RepositoryName(name)
    except NameInvalid:
        return False
    return True


def _grant_of(entry: object) -> Grant | None:
    if not isinstance(entry, dict):
        return None
    kind, name, actions = entry.get("type"), entry.get("name"), entry.get("actions")
    if not isinstance(kind, str) or not isinstance(name, str) or not isinstance(actions, list):
        return None
    known = frozenset(action for action in actions if isinstance(action, str)) & ACTIONS
    return Grant(kind, name, known) if known and is_scope_name(kind, name) else None


def decode_base64url(text: str) -> bytes:
    """Unpadded base64url in its one spelling (RFC 7515 section 2).

    Raises:
        ValueError: it is something else.
    """
    if _SEGMENT.fullmatch(text) is None:
        raise ValueError("characters outside of base64url")
    try:
        content = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError("not base64url") from error
    if base64.urlsafe_b64encode(content).rstrip(b"=") != text.encode():
        raise ValueError("bits that mean nothing are set")
    return content


def _decoded(part: str, what: str) -> bytes:
    try:
        return decode_base64url(part)
    except ValueError as error:
        raise TokenInvalid(f"the {what}: {error}") from error


def _parse_object(content: bytes, what: str) -> Mapping[str, Any]:
    try:
        document = parse_json(content)
    except ContentInvalid as error:
        raise TokenInvalid(f"the {what}: {error}") from error
    if not isinstance(document, dict):
        raise TokenInvalid(f"the {what} is no JSON object")
    return document


def _chain_of(header: Mapping[str, Any]) -> tuple[bytes, ...]:
    chain = header.get("x5c", [])
    if not isinstance(chain, list) or len(chain) > 10 or not all(isinstance(text, str) for text in chain):
        raise TokenInvalid("x5c is no list of certificates")
    try:
        return tuple(base64.b64decode(text, validate=True) for text in chain)
    except ValueError as error:
        raise TokenInvalid("x5c is no list of certificates") from error


def _audiences_of(claims: Mapping[str, Any]) -> Collection[str]:
    audience = claims.get("aud")
    if isinstance(audience, str):
        return (audience,)
    if not isinstance(audience, list) or len(audience) > _AUDIENCES_MAX:
        return ()
    # One that is no text spoils the list: whoever wrote it means something that is not understood here.
    return audience if all(isinstance(text, str) for text in audience) else ()


def _check_times(claims: Mapping[str, Any], now: float) -> float:
    """`exp`. Raises: TokenInvalid."""
    expires, issued = _time_of(claims, "exp"), _time_of(claims, "iat")
    if expires is None or issued is None:
        raise TokenInvalid("exp and iat must be there")
    begins = _time_of(claims, "nbf")
    late = max(issued, begins if begins is not None else issued) - now
    if late > LEEWAY_S:
        raise TokenInvalid(f"it begins {late:.0f} s in the future: {_CLOCK}")
    if expires + LEEWAY_S <= now:
        raise TokenInvalid(f"it ended {now - expires:.0f} s ago: {_CLOCK}")
    return expires


def _time_of(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if value is None:
        return None
    if type(value) not in {int, float} or not 0 <= value < _NUMERIC_DATE_MAX:
        raise TokenInvalid(f"{name} is no time")
    return float(value)


def _subject_of(claims: Mapping[str, Any]) -> str:
    subject = claims.get("sub", "")
    if not isinstance(subject, str) or not is_user_name(subject, can_be_empty=True):
        raise TokenInvalid("sub cannot be a name")
    return subject


def is_user_name(text: str, *, can_be_empty: bool = False) -> bool:
    """Whether this can be somebody's name, in policies and logs."""
    return (bool(text) or can_be_empty) and len(text) <= _SUBJECT_LENGTH_MAX and not _CONTROL.search(text)
