"""`Authorization` and `WWW-Authenticate`, as text: parse the one, format the other; pure.

Source: RFC 9110 section 11 (grammar), RFC 7617 (Basic), RFC 6750 (Bearer), the token specification of CNCF Distribution.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kitspec.errors import Unauthorized
from registry.auth.identity import Scope

USER_NAME_SIZE_MAX = 255

# RFC 9110 11.4: credentials = auth-scheme [ 1*SP ( token68 / … ) ]; both schemes here have a token68.
_CREDENTIALS = re.compile(
    r"(?P<scheme>[A-Za-z]{1,32}) {1,16}(?P<token68>[A-Za-z0-9._~+/-]{1,65536}=*)", re.ASCII
)
# RFC 7617 2: "user-id and password MUST NOT contain any control characters".
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")
_QUOTABLE = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class BasicCredentials:
    """A name and a password, the password as the bytes that were sent: what they spell is the client's affair."""

    user: str
    password: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class BearerToken:
    text: str = field(repr=False)


Credentials = BasicCredentials | BearerToken


def parse_authorization(fields: Sequence[str]) -> Credentials | None:
    """What the `Authorization` fields of a request say; None where there is none, or Basic without name and password.

    Raises:
        Unauthorized: there are several, or what is there is malformed or of another scheme.
    """
    if not fields:
        return None
    if len(fields) > 1:
        raise Unauthorized(f"{len(fields)} Authorization fields; wanted one")
    match = _CREDENTIALS.fullmatch(fields[0])
    scheme = match["scheme"].lower() if match is not None else ""
    if match is None or scheme not in {"basic", "bearer"}:
        raise Unauthorized(
            "the Authorization field is malformed; wanted Basic or Bearer, a space, and credentials"
        )
    return _parse_basic(match["token68"]) if scheme == "basic" else BearerToken(match["token68"])


def _parse_basic(token68: str) -> BasicCredentials | None:
    try:
        decoded = base64.b64decode(token68, validate=True)
    except ValueError as error:
        raise Unauthorized("the Basic credentials are not base64") from error
    # The decoder takes any number of `=` at the end: one spelling only.
    if base64.b64encode(decoded) != token68.encode():
        raise Unauthorized("the Basic credentials are not base64 in its one spelling")
    if decoded == b":":
        # What podman and skopeo send when they are asked for a password and have none.
        return None
    user, colon, password = decoded.partition(b":")
    if not colon:
        raise Unauthorized("the Basic credentials have no colon between name and password")
    return basic_credentials(user, password)


def basic_credentials(user: bytes, password: bytes) -> BasicCredentials:
    """A name and a password that arrived as bytes.

    Raises:
        Unauthorized: they cannot be anybody's.
    """
    if not user or len(user) > USER_NAME_SIZE_MAX:
        raise Unauthorized(f"a user name has 1 to {USER_NAME_SIZE_MAX} bytes, not {len(user)}")
    if _CONTROL.search(user) or _CONTROL.search(password):
        raise Unauthorized("user names and passwords have no control characters (RFC 7617)")
    try:
        return BasicCredentials(user.decode(), password)
    except UnicodeDecodeError as error:
        raise Unauthorized("the user name is not UTF-8") from error


def format_challenge(scheme: str, /, **parameters: str) -> str:
    """One value of `WWW-Authenticate`: the parameters quoted, in the order given.

    Raises:
        ValueError: a value holds what would need an escape, or could end the field: that is a bug of the caller.
    """
    for value in parameters.values():
        if _QUOTABLE.fullmatch(value) is None:
            raise ValueError(f"cannot stand in a challenge: {value!a}")
    return f"{scheme} " + ",".join(f'{name}="{value}"' for name, value in parameters.items())


def format_scope(scope: Scope) -> str:
    """`repository:team/llm:pull,push registry:catalog:*`, as challenges and tokens write it."""
    return " ".join(f"{kind}:{name}:{','.join(actions)}" for kind, name, actions in scope)
