"""Who sent a request: one door for passwords, API keys, tokens and certificates; and what to say to who shows none.

    Authorization: Basic …    an API key (`mkr_…`), a workload's OpenID token as the password, or a password of htpasswd
    Authorization: Bearer …   an API key, or a token, whose `iss` says which issuer's keys it must be signed with
    none                      a client certificate, or nobody

The scheme that a challenge names is Bearer where there is a token service, and Basic otherwise. Never both: Docker's
client would then ask for a password also where an anonymous token is enough.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from aiohttp import web

from kitspec.errors import OciError, Unauthorized
from registry.auth import api_keys
from registry.auth.api_keys import ApiKeys
from registry.auth.auth_config import Clientcertificates
from registry.auth.basic import WRONG, Passwords
from registry.auth.client_address import FORWARDED_FOR, ClientAddresses
from registry.auth.client_certificates import login_of_certificate
from registry.auth.credential_memo import CredentialMemo
from registry.auth.http_auth import (
    BasicCredentials,
    Credentials,
    format_challenge,
    format_scope,
    parse_authorization,
)
from registry.auth.identity import ANONYMOUS, Authenticator, Identity, Scope
from registry.auth.issuers import Issuer
from registry.auth.login import Login
from registry.auth.tokens import Envelope, TokenInvalid, parse_token
from registry.auth.watched_file import SourceObserver
from registry.http_limits import address_group
from registry.logs import RateGate, log_event

logger = logging.getLogger(__name__)

_LOGGED_PER_SECOND: Final = 10


class LoginObserver(SourceObserver, Protocol):
    """Counts logins too; `registry.metrics.Metrics` is one."""

    def login(self, method: str, *, is_good: bool) -> None: ...


class RequestAuthenticator:
    """
    Args:
        passwords, keys, certificates: None where nobody logs in so.
        issuers: of bearer tokens, by name.
        workload_issuers: those whose tokens may stand in the place of a password, for clients that know only those.
        challenge: the scheme and the fixed parameters that answers name.
        trusted_proxies: whose `X-Forwarded-For` is believed.
    """

    def __init__(
        self,
        *,
        passwords: Passwords | None,
        keys: ApiKeys | None,
        issuers: Mapping[str, Issuer],
        workload_issuers: Mapping[str, Issuer],
        certificates: Clientcertificates | None,
        challenge: tuple[str, Mapping[str, str]],
        trusted_proxies: Sequence[str],
        observer: LoginObserver,
    ) -> None:
        self._passwords = passwords
        self._keys = keys
        self._issuers = issuers
        self._workload_issuers = workload_issuers
        self._certificates = certificates
        self._challenge = challenge
        self._addresses = ClientAddresses(trusted_proxies)
        self._observer = observer
        self._memo = CredentialMemo()
        self._gate = RateGate(_LOGGED_PER_SECOND)

    async def identify(self, request: web.BaseRequest) -> Identity:
        """Who sent `request`; `ANONYMOUS` where it carries no credentials.

        Raises:
            Unauthorized: the credentials are malformed, wrong or no longer good.
            TooManyRequests: too many wrong ones came before, or too many are being checked.
            Unavailable: what it would take to tell cannot be had now.
        """
        credentials = parse_authorization(request.headers.getall("Authorization", ()))
        if credentials is not None:
            return await self.login(credentials, self.address_of(request))
        if self._certificates is not None and request.transport is not None:
            shown: Mapping[str, Any] | None = request.transport.get_extra_info("peercert")
            login = login_of_certificate(shown, self._certificates) if shown else None
            if login is not None:
                return login
        return ANONYMOUS

    def is_still(self, identity: Identity) -> bool:
        """Whether what the identity was found out by still holds; answers at once."""
        return isinstance(identity, Login) and identity.is_current()

    def challenge(self, *, scope: Scope, error: str | None) -> Sequence[str]:
        """The value of `WWW-Authenticate`."""
        scheme, parameters = self._challenge
        named = dict(parameters)
        if scheme == "Bearer":
            if scope:
                named["scope"] = format_scope(scope)
            if error is not None:
                named["error"] = error
        return (format_challenge(scheme, **named),)

    def address_of(self, request: web.BaseRequest) -> str:
        """For whom wrong passwords are counted."""
        address = self._addresses.address_of(request.remote or "", request.headers.getall(FORWARDED_FOR, ()))
        return address_group((address,)) if address else ""

    async def login(self, credentials: Credentials, address: str) -> Login:
        """Whoever these credentials are of.

        Args:
            address: of the client.

        Raises:
            Unauthorized, TooManyRequests, Unavailable: as of `identify`.
        """
        key = self._memo.key_of(credentials)
        known = self._memo.find(key)
        if known is not None:
            return known
        method = "basic" if isinstance(credentials, BasicCredentials) else "bearer"
        try:
            login = await self._check(credentials, key, address)
        except OciError:
            self._observer.login(method, is_good=False)
            raise
        self._observer.login(method, is_good=True)
        self._memo.keep(key, login)
        return login

    async def _check(self, credentials: Credentials, key: bytes, address: str) -> Login:
        match credentials:
            case BasicCredentials(user=user, password=password):
                text = password.decode("ascii", "replace")
                if self._keys is not None and text.startswith(api_keys.PREFIX):
                    login = await self._login_by_key(self._keys, text, address)
                    if login.name != user:
                        raise Unauthorized(WRONG)
                    return login
                if self._workload_issuers and (envelope := _workload_token(text)) is not None:
                    return await self._login_by_token(envelope, self._workload_issuers, address)
                if self._passwords is not None:
                    return await self._passwords.login(credentials, key, address)
                raise Unauthorized(WRONG)
            case _:
                if self._keys is not None and credentials.text.startswith(api_keys.PREFIX):
                    return await self._login_by_key(self._keys, credentials.text, address)
                return await self._login_by_token(credentials.text, self._issuers, address)

    async def _login_by_key(self, keys: ApiKeys, text: str, address: str) -> Login:
        try:
            return await keys.login(text)
        except Unauthorized as error:
            self._log_refusal("apikey.refused", error.message, address)
            raise

    async def _login_by_token(
        self, token: str | Envelope, issuers: Mapping[str, Issuer], address: str
    ) -> Login:
        try:
            envelope = parse_token(token) if isinstance(token, str) else token
            return await _issuer_of(envelope, issuers).login(envelope)
        except TokenInvalid as error:
            self._log_refusal("token.refused", str(error), address)
            raise Unauthorized(f"the token is not accepted: {error}") from error

    def _log_refusal(self, event: str, reason: str, address: str) -> None:
        if self._gate.admit(time.time()):
            suppressed = self._gate.take_held()
            log_event(logger, logging.WARNING, event, reason=reason, remote=address, suppressed=suppressed)


def _issuer_of(envelope: Envelope, issuers: Mapping[str, Issuer]) -> Issuer:
    """Raises: TokenInvalid."""
    issuer = issuers.get(envelope.issuer) if envelope.issuer is not None else None
    if issuer is None:
        raise TokenInvalid("iss is nobody whose tokens are taken here")
    return issuer


def _workload_token(password: str) -> Envelope | None:
    """The token that stands in the place of a password; None for what is a password."""
    try:
        return parse_token(password)
    except TokenInvalid:
        return None


_: type[Authenticator] = RequestAuthenticator
