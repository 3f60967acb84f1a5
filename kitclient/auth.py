"""Answering `401`: Basic, and the token handshake of the distribution project ("Token Authentication Specification").

Credentials go to the registry itself, and to a token service under one rule, the same for passwords and for identity
tokens: over https to the realm that the registry names; over plain http only when the registry itself is spoken to in
plain http, and then only to a realm on the registry's own host, or between two hosts that are both loopback. A realm
that breaks the rule is an error: it is not asked anonymously either. The realm's answer is never a redirect.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from yarl import URL

from kitclient.credentials import Credential, CredentialSource, basic
from kitclient.errors import ServerMisbehaved
from kitclient.origin import follow, is_local
from kitspec.errors import Denied, Unauthorized
from kitspec.http_fields import Challenge, parse_challenges

CLIENT_ID = "kitclient"
# Of a token whose answer does not say how long it lives.
_EXPIRES_IN_S = 60
# A token that ends while a request is on its way is no use; of a short life half is used.
_EXPIRY_MARGIN_S = 10.0
# What token services say that know only GET, as containerd has collected it; also of a token that they no longer know.
_GET_INSTEAD = frozenset({400, 401, 404, 405})
_TOKEN = re.compile(r"[\x21-\x7e]{1,65536}", re.ASCII)


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """What a token service said; the body bounded."""

    status: int
    body: bytes


class AskRealm(Protocol):
    """Sends one request to a token service; follows no redirect, adds no credentials of its own."""

    def __call__(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Mapping[str, str] | None
    ) -> Awaitable[TokenAnswer]: ...


@dataclass(frozen=True, slots=True)
class _Token:
    header: str
    expires: float


class Authorizer:
    """The `Authorization` of requests to one registry, a token for each scope.

    Args:
        origin: of the registry.
        host: as credentials know the registry.
    """

    def __init__(
        self,
        origin: URL,
        host: str,
        credentials: CredentialSource | None,
        ask: AskRealm,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._origin = origin
        self._host = host
        self._credentials = credentials
        self._ask = ask
        self._clock = clock
        self._basic: str | None = None
        self._bearer: Challenge | None = None
        self._tokens: dict[str, _Token] = {}
        # The identity token that a token service gave in exchange for the stored one; for this process only.
        self._renewed_identity: tuple[str, str] | None = None
        self._lock = asyncio.Lock()

    async def header(self, scope: str) -> str | None:
        """What to send with a request that needs `scope`, as far as is known without being challenged."""
        if self._basic is not None:
            return self._basic
        if self._bearer is None:
            return None
        async with self._lock:
            token = self._tokens.get(scope)
            if token is None or token.expires <= self._clock():
                token = await self._fetch(self._bearer, scope)
                self._tokens[scope] = token
            return token.header

    @property
    def was_asked(self) -> bool:
        """Whether the registry has asked for credentials."""
        return self._basic is not None or self._bearer is not None

    async def show_unasked(self) -> bool:
        """Show the name and password from now on though nobody has asked for them; whether there are any."""
        credential = await self._credential()
        self._basic = credential.basic if credential is not None else None
        return self._basic is not None

    async def advice(self) -> str:
        """What a user can do about a registry that refuses even what it had asked for."""
        if await self._credential() is None:
            return f"log in to {self._host} first"
        return f"the login that is kept for {self._host} does not do for this"

    async def answer(self, fields: Iterable[str], scope: str, *, used: str | None) -> str:
        """What to send with the second try of a request that was answered with 401.

        Args:
            fields: the `WWW-Authenticate` fields of the answer.
            used: what was sent with the first try.

        Raises:
            Unauthorized: there are no credentials, or they were refused.
        """
        challenges = {
            challenge.scheme: challenge for field in fields for challenge in parse_challenges(field)
        }
        if "bearer" in challenges:
            async with self._lock:
                token = self._tokens.get(scope)
                if token is None or token.header == used:
                    self._bearer, self._basic = challenges["bearer"], None
                    token = await self._fetch(
                        self._bearer, _union(scope, self._bearer.parameters.get("scope", ""))
                    )
                    self._tokens[scope] = token
                return token.header
        if "basic" not in challenges:
            raise Unauthorized(f"{self._host} asks for a kind of authentication that is not spoken here")
        credential = await self._credential()
        if credential is None or credential.basic is None:
            kept = "there are none" if credential is None else "a token is kept, which it does not take"
            raise Unauthorized(
                f"{self._host} asks for a name and a password and {kept}; log in to {self._host} first"
            )
        if used == credential.basic:
            raise Unauthorized(
                f"{self._host} refuses the name {credential.username!a} with its password; log in again"
            )
        self._basic = credential.basic
        return self._basic

    async def _credential(self) -> Credential | None:
        return await self._credentials(self._host) if self._credentials is not None else None

    async def _fetch(self, challenge: Challenge, scope: str) -> _Token:
        credential = await self._credential()
        if credential is not None and credential.registry_token:
            return _Token(f"Bearer {credential.registry_token}", float("inf"))
        realm = self._check_realm(challenge.parameters.get("realm", ""))
        service = challenge.parameters.get("service", "")
        if credential is not None and credential.identity_token:
            answer = await self._post(realm, service, scope, credential.identity_token)
            if answer.status not in _GET_INSTEAD:
                return self._parse(answer, realm, known=True)
        answer = await self._get(realm, service, scope, credential)
        return self._parse(answer, realm, known=credential is not None)

    async def _post(self, realm: URL, service: str, scope: str, identity_token: str) -> TokenAnswer:
        """Show an identity token ("Authenticating via OAuth2": the grant `refresh_token`)."""
        stored, renewed = self._renewed_identity or ("", "")
        form = {
            "grant_type": "refresh_token",
            "service": service,
            "client_id": CLIENT_ID,
            "scope": scope,
            "refresh_token": renewed if stored == identity_token else identity_token,
        }
        answer = await self._ask("POST", realm, headers={}, form=form)
        renewed = _renewed_identity(answer)
        if renewed:
            self._renewed_identity = identity_token, renewed
        return answer

    async def _get(self, realm: URL, service: str, scope: str, credential: Credential | None) -> TokenAnswer:
        """Show a name and password, or an identity token that is not taken by POST, or nothing."""
        query = [("service", service)] if service else []
        query += [("scope", one) for one in scope.split()]
        headers = {}
        if credential is not None and credential.basic is not None:
            query.append(("account", credential.username))
            headers["Authorization"] = credential.basic
        elif credential is not None:
            headers["Authorization"] = basic("", credential.identity_token)
        return await self._ask("GET", realm.extend_query(query), headers=headers, form=None)

    def _check_realm(self, text: str) -> URL:
        if "://" not in text:
            raise ServerMisbehaved(f"{self._host} names a token service that is not a URL: {text[:200]!a}")
        realm = follow(self._origin, text, origin=self._origin, what="token realm")
        both_loopback = is_local(realm.host or "") and is_local(self._origin.host or "")
        if realm.scheme == "http" and realm.host != self._origin.host and not both_loopback:
            raise ServerMisbehaved(
                f"{self._host} names a token service on another host over plain http, {realm.host}; "
                "credentials are not sent there"
            )
        return realm

    def _parse(self, answer: TokenAnswer, realm: URL, *, known: bool) -> _Token:
        if answer.status in {401, 403}:
            kind = Unauthorized if answer.status == 401 else Denied
            hint = "the credentials are refused" if known else f"log in to {self._host} first"
            raise kind(f"the token service {realm.host} answered {answer.status}: {hint}")
        if answer.status != 200:
            raise ServerMisbehaved(f"the token service {realm.host} answered {answer.status}; wanted 200")
        try:
            document = json.loads(answer.body)
            token = document.get("token") or document.get("access_token")
            expires_in = document.get("expires_in") or _EXPIRES_IN_S
        except (ValueError, AttributeError, RecursionError) as error:
            raise ServerMisbehaved(
                f"the token service {realm.host} did not answer with a JSON object"
            ) from error
        if (
            not isinstance(token, str)
            or _TOKEN.fullmatch(token) is None
            or type(expires_in) not in {int, float}
        ):
            raise ServerMisbehaved(f"the token service {realm.host} gave no usable token")
        life_s = expires_in if expires_in > 0 else _EXPIRES_IN_S
        return _Token(f"Bearer {token}", self._clock() + life_s - min(_EXPIRY_MARGIN_S, life_s / 2))


def _union(scope: str, more: str) -> str:
    """Both lists of scopes, in order, each once."""
    return " ".join(dict.fromkeys([*scope.split(), *more.split()]))


def _renewed_identity(answer: TokenAnswer) -> str:
    """The identity token that replaces the one shown, if the answer holds one."""
    try:
        token = json.loads(answer.body).get("refresh_token") if answer.status == 200 else ""
    except (ValueError, AttributeError, RecursionError):
        return ""
    return token if isinstance(token, str) else ""
