"""Users, credentials and issuers for tests of authentication. The cheapest bcrypt there is: 16 rounds."""

import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bcrypt
from cryptography.hazmat.primitives.asymmetric import ec

from registry.auth.tokens import sign_token
from registry.auth.verification_keys import JWS, thumbprint

ISSUER = "https://issuer.example"
SERVICE = "reg.example"


def htpasswd(users: Mapping[str, str], *, cost: int = 4) -> bytes:
    return b"".join(
        name.encode() + b":" + bcrypt.hashpw(password.encode(), bcrypt.gensalt(cost)) + b"\n"
        for name, password in users.items()
    )


def written(path: Path, users: Mapping[str, str]) -> Path:
    path.write_bytes(htpasswd(users))
    return path


def basic(user: str | bytes, password: str | bytes) -> dict[str, str]:
    parts = [text.encode() if isinstance(text, str) else text for text in (user, password)]
    return {"Authorization": "Basic " + base64.b64encode(b":".join(parts)).decode()}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class Sources:
    """Remembers what it is told of sources and logins."""

    def __init__(self) -> None:
        self.stale: dict[str, bool] = {}
        self.logins: list[tuple[str, bool]] = []

    def auth_source(self, source: str, *, is_stale: bool) -> None:
        self.stale[source] = is_stale

    def login(self, method: str, *, is_good: bool) -> None:
        self.logins.append((method, is_good))


class TestIssuer:
    """Somebody elsewhere who signs tokens."""

    __test__ = False

    def __init__(self, name: str = ISSUER) -> None:
        self.name = name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.key_id = thumbprint(self.key.public_key())

    def jwks(self) -> bytes:
        jwk = JWS.get_algorithm_by_name("ES256").to_jwk(self.key.public_key(), as_dict=True)
        return json.dumps({"keys": [jwk | {"kid": self.key_id, "use": "sig"}]}).encode()

    def claims(self, **claims: Any) -> dict[str, Any]:
        now = int(time.time())
        complete = {
            "iss": self.name,
            "sub": "alice",
            "aud": SERVICE,
            "iat": now,
            "nbf": now,
            "exp": now + 300,
        }
        return {name: value for name, value in {**complete, **claims}.items() if value is not None}

    def token(self, **claims: Any) -> str:
        return sign_token(self.claims(**claims), self.key, "ES256", key_id=self.key_id)
