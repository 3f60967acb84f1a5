"""Who makes tokens that are believed: this registry, a token server elsewhere, OpenID providers of workloads.

Each believes only what is signed with its own keys, says exactly its own `iss`, and is for this registry.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from registry.auth import api_keys, basic
from registry.auth.api_keys import ApiKeys
from registry.auth.auth_config import Oidc
from registry.auth.basic import Passwords
from registry.auth.identity import Grant
from registry.auth.key_sources import KeySource
from registry.auth.login import Login
from registry.auth.token_keys import ALGORITHM, TokenKeys
from registry.auth.tokens import (
    Claims,
    Envelope,
    Rules,
    TokenInvalid,
    grants_of,
    is_user_name,
    sign_token,
    verify_token,
)

_GROUPS_MAX: Final = 200
_REFRESH_TYPE: Final = "refresh+jwt"


class Issuer(Protocol):
    @property
    def name(self) -> str:
        """`iss` of its tokens."""
        ...

    async def login(self, envelope: Envelope) -> Login:
        """Whoever the token stands for.

        Raises:
            TokenInvalid: it is not to be believed.
            Unavailable: what it would take to tell cannot be had now.
        """
        ...


class ExternalIssuer:
    """Distribution's `auth.token`: somebody else decides who may do what, and says so in `access`."""

    def __init__(self, rules: Rules, keys: KeySource, clock: Callable[[], float] = time.time) -> None:
        self._rules = rules
        self._keys = keys
        self._clock = clock

    @property
    def name(self) -> str:
        return self._rules.issuer

    async def login(self, envelope: Envelope) -> Login:
        key = await self._keys.find(envelope)
        state = self._keys.state
        claims = verify_token(envelope, key, self._rules, now=self._clock())
        return Login(
            claims.subject,
            method="bearer",
            grants=grants_of(claims),
            expires=claims.expires,
            is_current=lambda: self._keys.state is state,
        )


class WorkloadIssuer:
    """An OpenID provider, whose tokens stand for CI jobs and service accounts. What they may do is the policy's."""

    def __init__(self, provider: Oidc, keys: KeySource, clock: Callable[[], float] = time.time) -> None:
        self._provider = provider
        self._keys = keys
        self._clock = clock
        self._rules = Rules(
            provider.issuer,
            frozenset(provider.audiences),
            frozenset(provider.signingalgorithms),
            # RFC 9068 has a type of its own for access tokens.
            frozenset({"", "jwt", "at+jwt"}),
        )

    @property
    def name(self) -> str:
        return self._provider.issuer

    async def login(self, envelope: Envelope) -> Login:
        key = await self._keys.find(envelope)
        state = self._keys.state
        claims = verify_token(envelope, key, self._rules, now=self._clock())
        for name, wanted in self._provider.requiredclaims.items():
            if claims.document.get(name) != wanted:
                raise TokenInvalid(f"the claim {name} is not what auth.oidc.requiredclaims asks for")
        return Login(
            self._name_of(claims),
            self._groups_of(claims),
            method="oidc",
            expires=claims.expires,
            is_current=lambda: self._keys.state is state,
        )

    def _name_of(self, claims: Claims) -> str:
        claim = self._provider.claimmapping.username
        name = claims.document.get(claim)
        if not isinstance(name, str) or not name:
            raise TokenInvalid(f"the claim {claim}, which is to be the user's name, is no text")
        prefixed = self._provider.prefix + name
        if not is_user_name(prefixed):
            raise TokenInvalid(f"the claim {claim} cannot be a user's name")
        return prefixed

    def _groups_of(self, claims: Claims) -> frozenset[str]:
        claim = self._provider.claimmapping.groups
        groups = claims.document.get(claim, []) if claim is not None else []
        if isinstance(groups, str):
            groups = [groups]
        if not isinstance(groups, list) or len(groups) > _GROUPS_MAX:
            raise TokenInvalid(f"the claim {claim} is no list of at most {_GROUPS_MAX} groups")
        names = [self._provider.prefix + group for group in groups if isinstance(group, str) and group]
        return frozenset(name for name in names if is_user_name(name))


class OwnIssuer:
    """The tokens of this registry.

    Each says what its login rested on, and is worth nothing from the moment that does not hold any more: a changed
    password, a removed user, a revoked API key and one that has ended end all tokens that were made of them.

    Args:
        passwords, keys: where bindings are looked up; None where nobody logs in so.
        service: `aud` of access tokens.
    """

    def __init__(
        self,
        name: str,
        service: str,
        token_keys: TokenKeys,
        *,
        passwords: Passwords | None,
        keys: ApiKeys | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._name = name
        self._token_keys = token_keys
        self._passwords = passwords
        self._keys = keys
        self._clock = clock
        self._refresh_audience = f"{service}/refresh"
        self._access = Rules(name, frozenset({service}), frozenset({ALGORITHM}), frozenset({"jwt"}))
        self._refresh = Rules(
            name, frozenset({self._refresh_audience}), frozenset({ALGORITHM}), frozenset({_REFRESH_TYPE})
        )
        self._service = service

    @property
    def name(self) -> str:
        return self._name

    async def login(self, envelope: Envelope) -> Login:
        claims = await self._verified(envelope, self._access)
        is_current = await self._binding_of(claims)
        groups = claims.document.get("groups", [])
        return Login(
            claims.subject,
            frozenset(groups),
            method="bearer",
            grants=grants_of(claims),
            expires=claims.expires,
            is_current=is_current,
        )

    async def login_to_refresh(self, envelope: Envelope) -> Login:
        """Whoever got a refresh token, as they logged in at that time, until it ends: nothing that is made of it outlives it.

        Raises:
            TokenInvalid: it is none, has ended, or its login does not hold any more.
        """
        claims = await self._verified(envelope, self._refresh)
        is_current = await self._binding_of(claims)
        access = claims.document.get("access")
        return Login(
            claims.subject,
            method="bearer",
            grants=grants_of(claims) if access is not None else None,
            expires=claims.expires,
            binding=claims.document["login"],
            is_current=is_current,
        )

    def sign_access(self, login: Login, access: Sequence[Grant], *, life_s: float) -> str:
        """A token for what is granted. It does not outlive the login that it is made of."""
        claims = self._claims(login, self._service, life_s)
        claims["access"] = _access_claim(access)
        if login.groups:
            claims["groups"] = sorted(login.groups)
        return self._sign(claims, "JWT")

    def sign_refresh(self, login: Login, *, life_s: float) -> str:
        """A token that stands for a password or an API key until that is changed, revoked or at its end."""
        assert login.binding, "what cannot be taken back is not given for long"
        claims = self._claims(login, self._refresh_audience, life_s)
        if login.grants is not None:
            claims["access"] = _access_claim(login.grants)
        return self._sign(claims, _REFRESH_TYPE)

    def _claims(self, login: Login, audience: str, life_s: float) -> dict[str, Any]:
        now = self._clock()
        end = now + life_s if login.expires is None else min(now + life_s, login.expires)
        return {
            "iss": self._name,
            "sub": login.name,
            "aud": audience,
            "iat": int(now),
            "nbf": int(now),
            "exp": int(end),
            "jti": secrets.token_urlsafe(12),
            "login": login.binding,
        }

    def _sign(self, claims: Mapping[str, Any], kind: str) -> str:
        key = self._token_keys.signing
        return sign_token(claims, key.private, ALGORITHM, key_id=key.id, type=kind)

    async def _verified(self, envelope: Envelope, rules: Rules) -> Claims:
        if envelope.chain:
            raise TokenInvalid("the header has x5c")
        key = await self._token_keys.find(envelope.key_id) if envelope.key_id is not None else None
        if key is None:
            raise TokenInvalid("no key with this kid is trusted")
        return verify_token(envelope, key, rules, now=self._clock())

    async def _binding_of(self, claims: Claims) -> Callable[[], bool]:
        """Whether what the token was made of still holds, to be asked again.

        Raises:
            TokenInvalid: it does not.
        """
        name, binding = claims.subject, claims.document.get("login")
        if binding == "":
            return lambda: True
        if isinstance(binding, str):
            passwords, keys = self._passwords, self._keys
            if binding.startswith(basic.BINDING) and passwords is not None:
                version = binding.removeprefix(basic.BINDING)
                if passwords.is_version(name, version):
                    return lambda: passwords.is_version(name, version)
            elif binding.startswith(api_keys.BINDING) and keys is not None:
                key_id = binding.removeprefix(api_keys.BINDING)
                if (key := await keys.find_live(name, key_id)) is not None:
                    return keys.current(key)
        raise TokenInvalid("what it was made of was changed or taken back")


def _access_claim(access: Sequence[Grant]) -> list[dict[str, object]]:
    return [{"type": grant.type, "name": grant.name, "actions": sorted(grant.actions)} for grant in access]
