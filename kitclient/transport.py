"""HTTP to one registry: connection, retries, redirects, authorization. What the requests mean is in `remote`.

Redirects are followed here and not by aiohttp, so that one place decides who sees the credentials: the registry's own
scheme, host and port, until a redirect has led away from it, and nobody else. Bodies come undecoded: digests are of
the bytes as stored. Every wait has a limit on silence, none on the whole: a transfer of a day is legal.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import importlib.metadata
import random
import re
import socket
import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

import aiohttp
from aiohttp.abc import AbstractResolver
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from yarl import URL

from kitclient.auth import Authorizer, TokenAnswer
from kitclient.credentials import CredentialSource, canonical_host
from kitclient.errors import ClientError, RegistryUnreachable, ServerMisbehaved, TransportRefused
from kitclient.origin import follow, is_same_origin
from kitclient.proxies import Proxies
from kitclient.tls import TlsContexts, TlsOptions, explained, tls_contexts, tls_error_of
from kitspec.errors import OciError, RangeInvalid, Unauthorized, UploadOutOfOrder, error_from_response

_REDIRECTS_MAX = 5
_ERROR_BODY_MAX = 64 * 1024
_TOKEN_BODY_MAX = 1024 * 1024
_CONNECT_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 60.0
# A presigned URL in a Location may be long.
_FIELD_SIZE_MAX = 32 * 1024
_READ_BUFFER_SIZE = 1024 * 1024
USER_AGENT = f"kitclient/{importlib.metadata.version('modelkit-registry')}"
_UPLOAD_RANGE = re.compile(r"(?:bytes[= ])?0-(?P<end>-1|[0-9]{1,18})", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)

Body = Callable[[], IO[bytes] | AsyncIterable[bytes]]
"""Makes the body anew for each try."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again: after 408, 429, 5xx and broken connections; waiting 250 ms, doubled each time, jittered, up to 3 s.

    Attributes:
        tries: the first one included.
        retry_after_max_s: a server that asks for a longer rest is not waited for.
    """

    tries: int = 6
    wait_first_s: float = 0.25
    wait_max_s: float = 3.0
    retry_after_max_s: float = 60.0
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    def attempts(self) -> AsyncRetrying:
        """An iterator of tries; the last error is raised as it is."""
        return AsyncRetrying(
            stop=stop_after_attempt(self.tries),
            wait=self._wait,
            retry=retry_if_exception(self._may_help),
            sleep=self.sleep,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after_s if isinstance(error, Refusal) else None
        if asked is not None:
            return asked
        return self.pause_s(state.attempt_number)

    def pause_s(self, attempt: int) -> float:
        """How long to wait after the `attempt`-th try, counted from 1."""
        longest = min(self.wait_max_s, self.wait_first_s * 2 ** (attempt - 1))
        # Jitter keeps many clients from coming back as one; it guards nothing.
        return random.uniform(longest / 2, longest)  # noqa: S311

    def _may_help(self, error: BaseException) -> bool:
        """Whether the next try may fare better."""
        if isinstance(error, Refusal):
            return error.is_transient and (error.retry_after_s or 0) <= self.retry_after_max_s
        return isinstance(error, RegistryUnreachable) and not isinstance(error, TransportRefused)


class Refusal(Exception):
    """An answer of 400 or above, on its way out of a try; callers of `request` see the error that it carries."""

    def __init__(
        self, error: OciError, *, status: int, retry_after_s: float | None, answer: aiohttp.ClientResponse
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status
        self.retry_after_s = retry_after_s
        self.headers = answer.headers

    @property
    def is_transient(self) -> bool:
        return self.status in {408, 429} or self.status >= 500


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    url: URL
    scope: str
    headers: Mapping[str, str]
    body: Body | None
    missing: tuple[type[OciError], ...]
    idle_s: float


class Transport:
    """The one HTTP door to a registry; an async context manager."""

    def __init__(
        self,
        host: str,
        *,
        plain_http: bool = False,
        tls: TlsOptions | None = None,
        proxy: str | None = None,
        credentials: CredentialSource | None = None,
        connections: int = 16,
        user_agent: str,
        retry: RetryPolicy | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self.host = canonical_host(host)
        api = "registry-1.docker.io" if self.host == "docker.io" else self.host
        self.origin = URL(f"{'http' if plain_http else 'https'}://{api}/")
        self.retry = retry or RetryPolicy()
        self._tls = tls or TlsOptions()
        self._contexts = TlsContexts()
        self._proxies = Proxies(proxy)
        self._connections = connections
        self._user_agent = user_agent
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None
        self.authorizer = Authorizer(self.origin, self.host, credentials, self._ask_realm)

    async def open(self) -> None:
        # Reading the system's certificates takes longer than many a request: without options the library's will do.
        if self._tls != TlsOptions():
            self._contexts = await asyncio.to_thread(tls_contexts, self._tls)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, resolver=self._resolver),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"User-Agent": self._user_agent, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT_S, sock_read=IDLE_TIMEOUT_S),
            read_bufsize=_READ_BUFFER_SIZE,
            max_line_size=_FIELD_SIZE_MAX,
            max_field_size=_FIELD_SIZE_MAX,
            trust_env=False,  # it would take passwords from ~/.netrc
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def url(self, path: str, query: Mapping[str, str] | None = None) -> URL:
        url = self.origin.join(URL(path))
        return url.with_query(query) if query else url

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: URL,
        *,
        scope: str,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
        missing: tuple[type[OciError], ...] = (),
        retry: bool = True,
        idle_s: float = IDLE_TIMEOUT_S,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer, below 400, its body not yet read.

        Args:
            scope: of the token that is needed, as the token specification writes it.
            missing: the errors that a 404 can be; the first when its body says none of them.
            retry: whether the request is tried again after what may pass.
            idle_s: how long the server may be silent.

        Raises:
            OciError: what the registry answered.
            ClientError: it could not be reached, or misbehaves.
        """
        request = _Request(method, url, scope, headers or {}, body, missing, idle_s)
        answer: aiohttp.ClientResponse | None = None
        try:
            async for attempt in self.retry.attempts():
                with attempt:
                    try:
                        answer = await self._try(request)
                    except Refusal as refusal:
                        if not retry:
                            raise refusal.error from None
                        raise
                    except RegistryUnreachable as error:
                        if not retry:
                            raise _NotAgain(error) from error
                        raise
        except Refusal as refusal:
            raise refusal.error from None
        except _NotAgain as stopped:
            raise stopped.error from stopped.error.__cause__
        assert answer is not None
        try:
            yield answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.translate(error, url) from error
        finally:
            # A body that was read to its end gives the connection back; any other closes it.
            if answer.content.is_eof():
                answer.release()
            else:
                answer.close()

    # ---- one try

    async def _try(self, request: _Request) -> aiohttp.ClientResponse:
        authorization = await self.authorizer.header(request.scope)
        answer, is_ours = await self._send(request, authorization)
        if answer.status == 401 and is_ours:
            fields = answer.headers.getall("WWW-Authenticate", [])
            answer.close()
            authorization = await self.authorizer.answer(fields, request.scope, used=authorization)
            answer, is_ours = await self._send(request, authorization)
        if answer.status < 400:
            return answer
        try:
            content = await self._read_error(answer)
            refusal = self._refusal(answer, content, request.missing, is_ours=is_ours)
            if answer.status == 401 and is_ours:
                advice = await self.authorizer.advice()
                refusal.error = Unauthorized(
                    f"{refusal.error.message}; {advice}", detail=refusal.error.detail
                )
            raise refusal
        finally:
            answer.close()

    async def _send(
        self, request: _Request, authorization: str | None
    ) -> tuple[aiohttp.ClientResponse, bool]:
        """The first answer that is no redirect, and whether it is the registry's own."""
        url, is_ours = request.url, True
        for _ in range(_REDIRECTS_MAX + 1):
            # Once led away, for good: a store that sends us back could choose what our credentials are used for.
            is_ours = is_ours and is_same_origin(url, self.origin)
            answer = await self._send_once(request, url, authorization if is_ours else None)
            if answer.status not in {301, 302, 303, 307, 308}:
                return answer, is_ours
            location = answer.headers.get("Location", "")
            answer.close()
            if request.method not in {"GET", "HEAD"} and answer.status not in {307, 308}:
                raise ServerMisbehaved(
                    f"{self.host} answered {request.method} with the redirect {answer.status}"
                )
            url = follow(url, location, origin=self.origin, what="redirect")
        raise ServerMisbehaved(f"{self.host} redirects more than {_REDIRECTS_MAX} times")

    async def _send_once(
        self, request: _Request, url: URL, authorization: str | None
    ) -> aiohttp.ClientResponse:
        assert self._session is not None, "use it as an async context manager"
        headers = dict(request.headers)
        proxy = self._proxies.find(url)
        if authorization is not None:
            if proxy is not None and url.scheme == "http":
                raise TransportRefused(
                    f"credentials for {self.host} are not sent over plain http through a proxy; "
                    f"use https, or name {self.host} in NO_PROXY"
                )
            headers["Authorization"] = authorization
        try:
            return await self._session.request(
                request.method,
                url,
                headers=headers,
                data=request.body() if request.body is not None else None,
                allow_redirects=False,
                proxy=proxy,
                ssl=self._context_for(url, proxy),
                timeout=aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT_S, sock_read=request.idle_s),
            )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.translate(error, url) from error

    async def _ask_realm(
        self, method: str, url: URL, *, headers: Mapping[str, str], form: Mapping[str, str] | None
    ) -> TokenAnswer:
        assert self._session is not None
        proxy = self._proxies.find(url)
        if proxy is not None and url.scheme == "http":
            raise TransportRefused(
                f"the token service {url.host} is not asked over plain http through a proxy"
            )
        try:
            async with self._session.request(
                method,
                url,
                headers=headers,
                data=form,
                allow_redirects=False,
                proxy=proxy,
                ssl=self._context_for(url, proxy),
            ) as answer:
                body = await read_bounded(answer, _TOKEN_BODY_MAX, what=f"the answer of {url.host}")
                if answer.status in {408, 429} or answer.status >= 500:
                    raise self._refusal(answer, body, (), is_ours=False)
                return TokenAnswer(answer.status, body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self.translate(error, url) from error

    async def _read_error(self, answer: aiohttp.ClientResponse) -> bytes:
        """What there is of an error's body; it only words the message."""
        try:
            return await answer.content.read(_ERROR_BODY_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return b""

    def _refusal(
        self,
        answer: aiohttp.ClientResponse,
        content: bytes,
        missing: tuple[type[OciError], ...],
        *,
        is_ours: bool,
    ) -> Refusal:
        path = answer.url.path
        otherwise = f"{answer.url.host} answered {answer.status} to {answer.method} {path}"
        error = error_from_response(answer.status, content, otherwise=otherwise)
        if not is_ours and isinstance(error, Unauthorized):
            error = Unauthorized(
                f"{answer.url.host}, where {self.host} sent us, wants credentials; it gets none"
            )
        if answer.status == 404 and missing and not isinstance(error, missing):
            error = missing[0](error.message, detail=error.detail)
        elif answer.status == 416:
            error = _range_error(answer, error)
        elif answer.status == 400 and b"HTTPS server" in content:
            error = OciError(f"{self.host} speaks https; leave --plain-http out")
        return Refusal(
            error,
            status=answer.status,
            retry_after_s=_retry_after(answer.headers.get("Retry-After")),
            answer=answer,
        )

    # ---- the way out

    def _context_for(self, url: URL, proxy: URL | None) -> ssl.SSLContext | bool:
        if not is_same_origin(url, self.origin):
            return self._contexts.elsewhere
        if proxy is not None and proxy.scheme == "https" and not self._tls.verify:
            # The HTTP library has one context for both connections.
            raise TransportRefused(
                "an https proxy would go unverified, too; name the registry's authority with --tls-cert FILE "
                "in place of --no-tls-verify"
            )
        return self._contexts.own

    def translate(self, error: Exception, url: URL) -> ClientError:  # noqa: PLR0911 (a table)
        """What an error of the HTTP library means to a user."""
        host = url.authority if url.host != self.origin.host else self.host
        if (tls_error := tls_error_of(error)) is not None:
            return TransportRefused(explained(tls_error, host))
        match error:
            case aiohttp.ClientHttpProxyError():
                hint = "; it wants a name and a password" if error.status == 407 else ""
                return TransportRefused(f"the proxy on the way to {host} answered {error.status}{hint}")
            case aiohttp.ClientProxyConnectionError():
                return TransportRefused(f"no connection to the proxy on the way to {host}")
            case aiohttp.ClientConnectorDNSError():
                kind = RegistryUnreachable if error.errno == socket.EAI_AGAIN else TransportRefused
                return kind(f"no address is known for {host}: check its name")
            case aiohttp.ClientConnectorError():
                return RegistryUnreachable(f"no connection to {host}: {error.strerror or error}")
            case TimeoutError():
                return RegistryUnreachable(f"{host} was silent for too long")
            case aiohttp.ClientResponseError() if "Expected HTTP" in str(error) or "status line" in str(
                error
            ):
                return TransportRefused(
                    f"{host} does not speak plain http; leave --plain-http out if it speaks https"
                )
            case _:
                return RegistryUnreachable(f"the connection to {host} broke: {type(error).__name__} {error}")


class _NotAgain(Exception):
    def __init__(self, error: RegistryUnreachable) -> None:
        super().__init__(str(error))
        self.error = error


async def read_bounded(answer: aiohttp.ClientResponse, size_max: int, *, what: str) -> bytes:
    """A whole body of at most `size_max` bytes.

    Raises:
        ServerMisbehaved: it is longer; no more than that is read.
    """
    if (answer.content_length or 0) > size_max:
        raise ServerMisbehaved(f"{what} has {answer.content_length} bytes; at most {size_max} are taken")
    pieces: list[bytes] = []
    size = 0
    async for piece in answer.content.iter_any():
        size += len(piece)
        if size > size_max:
            raise ServerMisbehaved(f"{what} is longer than {size_max} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _range_error(answer: aiohttp.ClientResponse, error: OciError) -> OciError:
    """What 416 means: for bytes to read where they end, for bytes to write where they go on."""
    if answer.method in {"GET", "HEAD"}:
        _, _, size = answer.headers.get("Content-Range", "").rpartition("*/")
        return RangeInvalid(error.message, size=int(size) if _NUMBER.fullmatch(size) else 0)
    offset = parse_upload_offset(answer.headers.get("Range", ""))
    return UploadOutOfOrder(error.message, offset=offset or 0, detail=error.detail)


def parse_upload_offset(field: str) -> int | None:
    """Bytes that an upload holds, from the `Range` of an answer; None when it does not say.

    `0-0` is what registries say of an empty upload and of one byte: it is taken for empty.
    """
    match = _UPLOAD_RANGE.fullmatch(field.strip())
    if match is None:
        return None
    end = int(match["end"])
    return 0 if end <= 0 else end + 1


def _retry_after(field: str | None) -> float | None:
    """Seconds, from either form of RFC 9110 section 10.2.3; None when it does not parse."""
    if field is None:
        return None
    if _NUMBER.fullmatch(field.strip()):
        return float(field)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(field).timestamp() - time.time())
    return None
