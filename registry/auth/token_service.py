"""The token endpoint: who you are goes in, a token for what you may do comes out.

    GET  ?service=…&scope=repository:team/llm:pull,push&offline_token=true     with Basic, or without credentials
    POST grant_type=password|refresh_token&service=…&client_id=…&scope=…       a form

Less granted than asked for, down to nothing, is no error: the registry says 401 or 403 when the token is not enough.
Source: CNCF Distribution's "Token Authentication Specification" and "OAuth2 Token Authentication"; RFC 6749 for POST.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol
from urllib.parse import parse_qsl

from kitspec.errors import QueryInvalid, Unauthorized
from registry.auth.basic import WRONG
from registry.auth.http_auth import Credentials, basic_credentials
from registry.auth.identity import Grant, Identity
from registry.auth.issuers import OwnIssuer
from registry.auth.login import Login
from registry.auth.scopes import SCOPES_MAX, count_scopes, format_grant, parse_scopes
from registry.auth.tokens import TokenInvalid, parse_token

FORM_SIZE_MAX: Final = 64 * 1024
"""V-65: the form is parsed here, and not by aiohttp."""

# L-24: an aiohttp server takes no header beyond 8,190 bytes, and other registries are no more generous.
_TOKEN_SIZE_MAX = 6 * 1024
_PARAMETERS_MAX = 128

Granted = Callable[[Identity, str, str, Iterable[str]], frozenset[str]]
"""Which of the actions somebody may do: (identity, type, name, actions)."""

NOBODY: Final = Login("")
"""Who asks for a token without credentials."""


class LoginDesk(Protocol):
    """Checks credentials; `registry.auth.authenticator.RequestAuthenticator` is one."""

    async def login(self, credentials: Credentials, address: str) -> Login:
        """Raises: Unauthorized, TooManyRequests, Unavailable."""
        ...


class GrantRefused(Exception):
    """A POST that gets no token.

    Attributes:
        error: of RFC 6749, section 5.2.
        status: one that containerd answers with a GET (400, 401), never 403 or 500.
    """

    def __init__(self, error: str, description: str, *, status: int = 400) -> None:
        super().__init__(description)
        self.error = error
        self.description = description
        self.status = status


class TokenService:
    """
    Args:
        access_life_s, refresh_life_s: of the tokens.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        issuer: OwnIssuer,
        desk: LoginDesk,
        granted: Granted,
        *,
        access_life_s: float,
        refresh_life_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._issuer = issuer
        self._desk = desk
        self._granted = granted
        self._access_life_s = access_life_s
        self._refresh_life_s = refresh_life_s
        self._clock = clock

    async def answer_get(
        self, query: str, credentials: Credentials | None, address: str
    ) -> dict[str, object]:
        """
        Args:
            query: of the URL, as it was sent.
            credentials: None for an anonymous token.

        Raises:
            QueryInvalid: too many scopes, or parameters.
            Unauthorized, TooManyRequests: of the credentials.
        """
        parameters = _parameters(query)
        login = await self._desk.login(credentials, address) if credentials is not None else NOBODY
        if login.method == "bearer":
            raise Unauthorized("a token cannot be exchanged for another one; log in with a password or a key")
        is_offline = parameters.get("offline_token", [""])[0] == "true"
        granted = self._granted_to(login, parameters.get("scope", []))
        return self._reply(login, granted, is_offline=is_offline)

    async def answer_post(self, content: bytes, content_type: str, address: str) -> dict[str, object]:
        """
        Args:
            content: of the body, at most `FORM_SIZE_MAX` bytes.

        Raises:
            GrantRefused: no token.
            TooManyRequests, Unavailable: not now.
        """
        form = _Form(content, content_type)
        kind = form.one("grant_type")
        form.one("service")
        form.one("client_id")
        is_offline = form.one("access_type", default="online") == "offline"
        match kind:
            case "password":
                login = await self._login_by_password(form, address)
            case "refresh_token":
                login = await self._login_to_refresh(form)
            case _:
                raise GrantRefused("unsupported_grant_type", "grant_type is password or refresh_token")
        try:
            granted = self._granted_to(login, form.all("scope"))
            reply = self._reply(login, granted, is_offline=is_offline)
        except QueryInvalid as error:
            raise GrantRefused("invalid_scope", error.message) from error
        return reply | {"scope": " ".join(format_grant(grant) for grant in granted)}

    async def _login_by_password(self, form: _Form, address: str) -> Login:
        user, password = form.one("username"), form.one("password")
        try:
            credentials = basic_credentials(_as_sent(user), _as_sent(password))
            return await self._desk.login(credentials, address)
        except Unauthorized as error:
            raise GrantRefused("invalid_grant", error.message, status=401) from error

    async def _login_to_refresh(self, form: _Form) -> Login:
        text = form.one("refresh_token")
        try:
            login = await self._issuer.login_to_refresh(parse_token(text))
        except TokenInvalid as error:
            raise GrantRefused(
                "invalid_grant", f"the refresh token is not accepted: {error}", status=401
            ) from error
        if form.one("username", default=login.name) != login.name:
            raise GrantRefused("invalid_grant", WRONG, status=401)
        return login

    def _reply(self, login: Login, granted: Sequence[Grant], *, is_offline: bool) -> dict[str, object]:
        now = self._clock()
        token = self._issuer.sign_access(login, granted, life_s=self._access_life_s)
        if len(token) > _TOKEN_SIZE_MAX:
            raise QueryInvalid(
                f"a token for all of these scopes has {len(token)} bytes; at most {_TOKEN_SIZE_MAX} are given: ask for fewer"
            )
        life_s = (
            self._access_life_s if login.expires is None else min(self._access_life_s, login.expires - now)
        )
        reply: dict[str, object] = {
            "token": token,
            "access_token": token,
            # Never less: older clients would take it for no time at all. Clocks have more leeway than that.
            "expires_in": max(60, int(life_s)),
            "issued_at": datetime.fromtimestamp(now, UTC)
            .isoformat(timespec="seconds")
            .replace("+00:00", "Z"),
        }
        # Only for what can be taken back: a refresh token of nobody, or of a CI job's token, would outlive its reason.
        if is_offline and login.binding:
            reply["refresh_token"] = self._issuer.sign_refresh(login, life_s=self._refresh_life_s)
        return reply

    def _granted_to(self, login: Login, scopes: Sequence[str]) -> list[Grant]:
        if (count := count_scopes(scopes)) > SCOPES_MAX:
            raise QueryInvalid(f"{count} scopes; at most {SCOPES_MAX} are allowed in one token")
        granted = []
        for wish in parse_scopes(scopes):
            actions = self._granted(login, wish.type, wish.name, wish.actions)
            if actions:
                granted.append(Grant(wish.type, wish.name, actions))
        return granted


class _Form:
    """An `application/x-www-form-urlencoded` body; what is meant once and comes twice is refused."""

    def __init__(self, content: bytes, content_type: str) -> None:
        if content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
            raise GrantRefused("invalid_request", "wanted a form (application/x-www-form-urlencoded)")
        try:
            self._values = _parameters(content.decode("ascii"))
        except (UnicodeDecodeError, QueryInvalid) as error:
            raise GrantRefused("invalid_request", "not a form, or too many parameters") from error

    def one(self, name: str, *, default: str | None = None) -> str:
        values = self._values.get(name, [])
        if len(values) > 1:
            raise GrantRefused("invalid_request", f"{name} is given {len(values)} times; wanted once")
        value = values[0] if values else default
        if not value:
            raise GrantRefused("invalid_request", f"{name} is missing")
        return value

    def all(self, name: str) -> list[str]:
        return self._values.get(name, [])


def _parameters(text: str) -> dict[str, list[str]]:
    """Values by name; bytes that are not UTF-8 survive as surrogates, for passwords may hold them.

    Raises:
        QueryInvalid: there are too many.
    """
    try:
        pairs = parse_qsl(
            text, keep_blank_values=True, max_num_fields=_PARAMETERS_MAX, errors="surrogateescape"
        )
    except ValueError as error:
        raise QueryInvalid(f"more than {_PARAMETERS_MAX} parameters") from error
    values: dict[str, list[str]] = {}
    for name, value in pairs:
        values.setdefault(name, []).append(value)
    return values


def _as_sent(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
