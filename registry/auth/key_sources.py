"""Where the keys of issuers elsewhere come from: a file, a bundle of certificates, or an address that is asked.

What a token says about keys is only ever used to look one up among those that are trusted already. Nothing here opens a
file or an address that a token named.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import aiohttp
from cryptography import x509

from kitspec.errors import ContentInvalid, Unavailable
from kitspec.strict_json import parse_json
from registry.auth.auth_config import checked_fetched_url
from registry.auth.tokens import Envelope, TokenInvalid
from registry.auth.verification_keys import (
    FILE_SIZE_MAX,
    Keys,
    KeyUnusable,
    VerificationKey,
    key_of_chain,
    keys_of_certificates,
    parse_certificates,
    parse_jwks,
)
from registry.auth.watched_file import SourceObserver, WatchedFile
from registry.logs import log_event

logger = logging.getLogger(__name__)

_REFRESH_INTERVAL_S: Final = 600.0
# An issuer that has just rotated is asked at once; tokens with invented key ids must not make us ask all the time.
_ASK_INTERVAL_S: Final = 30.0
_ASK_TIMEOUT_S: Final = 10.0
_DISCOVERY_PATH: Final = "/.well-known/openid-configuration"

_UNKNOWN_KEY = "no key with this kid is trusted"


class KeySource(Protocol):
    """The keys of one issuer."""

    @property
    def state(self) -> object:
        """Another object whenever the keys that are trusted have changed."""
        ...

    async def start(self) -> None:
        """Raises: FileUnusable: nothing is known yet, and what should be is not sound."""
        ...

    async def watch(self) -> None:
        """Keep up with changes until cancelled."""
        ...

    async def find(self, envelope: Envelope) -> VerificationKey:
        """The key that must have signed `envelope`.

        Raises:
            TokenInvalid: none that is trusted.
            Unavailable: the keys could not be had yet.
        """
        ...


def by_id(keys: Keys, envelope: Envelope) -> VerificationKey:
    """Raises: TokenInvalid."""
    if envelope.chain:
        raise TokenInvalid("the header has x5c, and there is no bundle of certificates that it could lead to")
    key = keys.get(envelope.key_id) if envelope.key_id is not None else None
    if key is None:
        raise TokenInvalid(_UNKNOWN_KEY)
    return key


class JwksFile:
    """A key set in a file that is watched."""

    def __init__(self, path: Path, source: str, observer: SourceObserver) -> None:
        self._file = WatchedFile(path, source, parse_jwks, size_max=FILE_SIZE_MAX, observer=observer)
        self.start = self._file.start
        self.watch = self._file.watch

    @property
    def state(self) -> object:
        return self._file.value

    async def find(self, envelope: Envelope) -> VerificationKey:
        return by_id(self._file.value, envelope)


class CertificateBundle:
    """Distribution's `rootcertbundle`: a token brings a chain that leads to one of the certificates, or names a key of one."""

    def __init__(self, path: Path, source: str, observer: SourceObserver) -> None:
        self._file: WatchedFile[tuple[x509.Certificate, ...]] = WatchedFile(
            path, source, parse_certificates, size_max=FILE_SIZE_MAX, observer=observer
        )
        self.start = self._file.start
        self.watch = self._file.watch

    @property
    def state(self) -> object:
        return self._file.value

    async def find(self, envelope: Envelope) -> VerificationKey:
        if not envelope.chain:
            return by_id(keys_of_certificates(self._file.value, now=datetime.now(UTC)), envelope)
        try:
            return key_of_chain(envelope.chain, self._file.value)
        except KeyUnusable as error:
            raise TokenInvalid(str(error)) from error


class FetchedJwks:
    """A key set at an address, asked for every few minutes, and when a token has a key that is new.

    Args:
        url: of the key set; None to ask the issuer where it is (OpenID Connect Discovery 1.0, section 4).
        cafile: certificates that the address may show, instead of those that the machine trusts.
    """

    def __init__(
        self,
        issuer: str,
        url: str | None,
        *,
        cafile: Path | None,
        source: str,
        observer: SourceObserver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuer = issuer
        self._url = url
        self._cafile = cafile
        self._source = source
        self._observer = observer
        self._clock = clock
        self._keys: Keys | None = None
        self._content: bytes | None = None
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    @property
    def state(self) -> object:
        return self._keys

    async def start(self) -> None:
        """Asks, and goes on without an answer: the issuer may come up after us."""
        await self._ask()

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_INTERVAL_S if self._keys is not None else _ASK_INTERVAL_S)
            await self._ask()

    async def find(self, envelope: Envelope) -> VerificationKey:
        if self._keys is None or envelope.key_id not in self._keys:
            await self._ask_if_due()
        if self._keys is None:
            raise Unavailable("the keys of the token's issuer could not be fetched yet; try again later")
        return by_id(self._keys, envelope)

    async def _ask_if_due(self) -> None:
        async with self._asking:  # who comes while somebody asks waits for the answer
            if self._clock() - self._asked_at >= _ASK_INTERVAL_S:
                await self._ask()

    async def _ask(self) -> None:
        self._asked_at = self._clock()
        try:
            content = await self._fetch()
            if content != self._content:
                self._keys, self._content = parse_jwks(content), content
        except (OSError, TimeoutError, aiohttp.ClientError, ValueError) as error:
            reason = str(error) or type(error).__name__
            log_event(logger, logging.ERROR, "auth.source.unusable", source=self._source, problem=reason)
            self._observer.auth_source(self._source, is_stale=True)
        else:
            self._observer.auth_source(self._source, is_stale=False)

    async def _fetch(self) -> bytes:
        context = await asyncio.to_thread(ssl.create_default_context, cafile=self._cafile)
        connector = aiohttp.TCPConnector(ssl=context, limit=1)
        timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            url = self._url if self._url is not None else await self._discover(session)
            return await _get(session, url)

    async def _discover(self, session: aiohttp.ClientSession) -> str:
        """Where the issuer says its keys are."""
        content = await _get(session, self._issuer.rstrip("/") + _DISCOVERY_PATH)
        try:
            document = parse_json(content)
        except ContentInvalid as error:
            raise ValueError(f"the issuer's {_DISCOVERY_PATH}: {error}") from error
        if not isinstance(document, dict) or document.get("issuer") != self._issuer:
            raise ValueError(f"the issuer's {_DISCOVERY_PATH} is about another issuer")
        return checked_fetched_url(document.get("jwks_uri"))


async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
    """Not more than `FILE_SIZE_MAX`, and from nowhere else: a redirect is no answer."""
    async with session.get(url, allow_redirects=False, headers={"Accept": "application/json"}) as response:
        if response.status != 200:
            raise ValueError(f"{url} answered {response.status}; wanted 200")
        content = bytearray()
        async for piece in response.content.iter_any():
            content += piece
            if len(content) > FILE_SIZE_MAX:
                raise ValueError(f"{url} answered more than {FILE_SIZE_MAX} bytes")
        return bytes(content)
