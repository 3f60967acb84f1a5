"""All that authentication is made of, put together from the configuration; its files, keys and threads live in here."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from registry.auth.api_keys import ApiKeys
from registry.auth.auth_config import Apikeys, Auth, Htpasswd, Oidc, Token
from registry.auth.authenticator import LoginObserver, RequestAuthenticator
from registry.auth.basic import Passwords
from registry.auth.bruteforce import Backoff
from registry.auth.htpasswd import FILE_SIZE_MAX, parse_htpasswd
from registry.auth.issuers import ExternalIssuer, Issuer, OwnIssuer, WorkloadIssuer
from registry.auth.key_sources import CertificateBundle, FetchedJwks, JwksFile, KeySource
from registry.auth.password_checks import PasswordChecks, usable_threads
from registry.auth.token_keys import Seal, TokenKeys
from registry.auth.token_service import Granted, TokenService
from registry.auth.tokens import LEEWAY_S, Rules
from registry.auth.watched_file import WatchedFile
from registry.background import running
from registry.config import Config
from registry.logs import log_event
from storage_backends.interface import StorageBackend

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accounts:
    """
    Attributes:
        token_service: None where tokens are issued elsewhere, or not at all.
        api_keys: None where there are none.
    """

    authenticator: RequestAuthenticator
    token_service: TokenService | None
    api_keys: ApiKeys | None


@asynccontextmanager
async def open_accounts(
    config: Config, auth: Auth, backend: StorageBackend, observer: LoginObserver, granted: Granted
) -> AsyncIterator[Accounts]:
    """Read what `auth` names, and follow it.

    Args:
        backend: keeps token keys and API keys.
        granted: the policy's word on what a token may be for, asked each time one is issued.

    Raises:
        FileUnusable: a file of users or keys cannot be read or understood.
        StorageError: the store cannot be used.
    """
    _warn_of_plain_http(config)
    async with AsyncExitStack() as stack:
        yield await _Opening(stack, config, auth, backend, observer).accounts(granted)


def token_realm(config: Config, token: Token) -> str:
    """Where clients are sent for tokens: what the operator says, never what a client called us (A-38)."""
    if token.realm is not None:
        return token.realm
    return f"{config.http.host}{config.http.prefix}v2/token"


def token_service_name(config: Config, token: Token) -> str:
    """`service` of challenges, and `aud` of tokens."""
    return token.service or urlsplit(token_realm(config, token)).netloc


def _challenge(config: Config, auth: Auth) -> tuple[str, Mapping[str, str]]:
    if auth.token is not None:
        service = token_service_name(config, auth.token)
        return "Bearer", {"realm": token_realm(config, auth.token), "service": service}
    realm = auth.htpasswd.realm if auth.htpasswd is not None else "modelkit-registry"
    return "Basic", {"realm": realm, "charset": "UTF-8"}


class _Opening:
    """The parts, in the order in which one needs the other.

    Args:
        stack: closes what was opened.
    """

    def __init__(
        self,
        stack: AsyncExitStack,
        config: Config,
        auth: Auth,
        backend: StorageBackend,
        observer: LoginObserver,
    ) -> None:
        self._stack = stack
        self._config = config
        self._auth = auth
        self._backend = backend
        self._observer = observer

    async def accounts(self, granted: Granted) -> Accounts:
        auth = self._auth
        passwords = await self._passwords(auth.htpasswd) if auth.htpasswd is not None else None
        keys = self._api_keys(auth.apikeys, passwords)
        workload_issuers: dict[str, Issuer] = {
            provider.issuer: await self._workload_issuer(provider, f"oidc.{number}")
            for number, provider in enumerate(auth.oidc)
        }
        issuers = dict(workload_issuers)
        own: OwnIssuer | None = None
        if auth.token is not None and auth.token.is_external:
            issuers[auth.token.issuer] = await self._external_issuer(auth.token)
        elif auth.token is not None:
            issuers[auth.token.issuer] = own = await self._own_issuer(auth.token, passwords, keys)
        authenticator = RequestAuthenticator(
            passwords=passwords,
            keys=keys,
            issuers=issuers,
            workload_issuers=workload_issuers,
            certificates=auth.clientcertificates,
            challenge=_challenge(self._config, auth),
            trusted_proxies=self._config.limits.trustedproxies,
            observer=self._observer,
        )
        service: TokenService | None = None
        if own is not None and auth.token is not None:
            access_s, refresh_s = auth.token.expiration, auth.token.refreshexpiration
            service = TokenService(
                own, authenticator, granted, access_life_s=access_s, refresh_life_s=refresh_s
            )
        return Accounts(authenticator, service, keys)

    async def _passwords(self, htpasswd: Htpasswd) -> Passwords:
        users = WatchedFile(
            htpasswd.path, "htpasswd", parse_htpasswd, size_max=FILE_SIZE_MAX, observer=self._observer
        )
        await users.start()
        if not users.value.hashes:
            log_event(
                logger, logging.WARNING, "auth.nobody", path=str(htpasswd.path), effect="nobody can log in"
            )
        await self._stack.enter_async_context(running(users.watch, "follow htpasswd"))
        threads = usable_threads(self._config.worker_count)
        checks = await self._stack.enter_async_context(PasswordChecks(threads))
        return Passwords(lambda: users.value, checks, Backoff())

    def _api_keys(self, settings: Apikeys | None, passwords: Passwords | None) -> ApiKeys | None:
        if settings is None or passwords is None:
            return None
        return ApiKeys(
            self._backend,
            is_user=passwords.is_user,
            expiration_max_s=settings.expirationmax,
            per_user_max=settings.peruser,
        )

    async def _workload_issuer(self, provider: Oidc, source: str) -> WorkloadIssuer:
        keys = self._keys(provider.issuer, provider.jwks, provider.cafile, source)
        return WorkloadIssuer(provider, await self._started(keys))

    async def _external_issuer(self, token: Token) -> ExternalIssuer:
        assert token.service is not None
        rules = Rules(token.issuer, frozenset({token.service}), frozenset(token.signingalgorithms))
        keys: KeySource
        if token.rootcertbundle is not None:
            keys = CertificateBundle(token.rootcertbundle, "rootcertbundle", self._observer)
        else:
            keys = self._keys(token.issuer, token.jwks, token.cafile, "jwks")
        return ExternalIssuer(rules, await self._started(keys))

    async def _own_issuer(self, token: Token, passwords: Passwords | None, keys: ApiKeys | None) -> OwnIssuer:
        secret = self._config.http.secret
        if secret is None:
            log_event(
                logger,
                logging.WARNING,
                "auth.keys.unsealed",
                effect="whoever can read the storage can make tokens; set http.secret",
            )
        token_keys = TokenKeys(
            self._backend,
            rotation_s=token.keyrotation,
            keep_s=max(token.expiration, token.refreshexpiration) + LEEWAY_S,
            seal=Seal(secret.get_secret_value() if secret is not None else None),
        )
        await token_keys.start()
        await self._stack.enter_async_context(running(token_keys.watch, "rotate token keys"))
        service = token_service_name(self._config, token)
        return OwnIssuer(token.issuer, service, token_keys, passwords=passwords, keys=keys)

    def _keys(self, issuer: str, jwks: str | Path | None, cafile: Path | None, source: str) -> KeySource:
        if isinstance(jwks, Path):
            return JwksFile(jwks, source, self._observer)
        return FetchedJwks(issuer, jwks, cafile=cafile, source=source, observer=self._observer)

    async def _started(self, source: KeySource) -> KeySource:
        await source.start()
        await self._stack.enter_async_context(running(source.watch, "follow token keys"))
        return source


def _warn_of_plain_http(config: Config) -> None:
    """Passwords over plain HTTP are read by everybody on the way; a proxy with TLS in front is told by `http.host`."""
    host = config.http.addr.rpartition(":")[0]
    is_loopback = host in {"localhost", "[::1]"} or host.startswith("127.")
    has_tls = config.http.tls.certificate is not None or (config.http.host or "").startswith("https://")
    if not is_loopback and not has_tls:
        log_event(
            logger,
            logging.WARNING,
            "auth.plain_http",
            address=config.http.addr,
            effect="passwords and tokens cross the network in the clear; give http.tls, or http.host with https://",
        )
