"""Tokens, and the API keys of users, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aiohttp import web

from kitspec.errors import ContentInvalid, Denied, NameUnknown, QueryInvalid, Unauthorized, Unsupported
from kitspec.strict_json import parse_json
from registry.api.call import Call
from registry.auth.http_auth import format_challenge, parse_authorization
from registry.body import discard, pieces_of

if TYPE_CHECKING:
    from registry.auth.accounts import Accounts
    from registry.auth.api_keys import ApiKey, ApiKeys
    from registry.auth.token_service import TokenService

_FORM_SIZE_MAX = 64 * 1024
_WISH_SIZE_MAX = 16 * 1024
# The end of the year 9999.
_LAST_SECOND = 253402300799
# RFC 6749 5.1: nobody on the way keeps an answer with a token in it.
_NOT_KEPT = {"Cache-Control": "no-store", "Pragma": "no-cache"}


async def get_token(call: Call) -> web.StreamResponse:
    """GET /v2/token: a token for who shows a password, or for nobody in particular."""
    service = _token_service(call)
    try:
        credentials = parse_authorization(call.request.headers.getall("Authorization", ()))
        address = _accounts(call).authenticator.address_of(call.request)
        return _json(await service.answer_get(call.request.rel_url.raw_query_string, credentials, address))
    except Unauthorized as error:
        return _ask_for_password(call, json.loads(error.to_json()))


async def post_token(call: Call) -> web.StreamResponse:
    """POST /v2/token: the same, by OAuth 2; its refusals are of RFC 6749 and of the specification, in one."""
    from registry.auth.token_service import GrantRefused

    service = _token_service(call)
    address = _accounts(call).authenticator.address_of(call.request)
    try:
        content = await _read_body(call, _FORM_SIZE_MAX)
        if content is None:
            raise GrantRefused("invalid_request", f"a form of more than {_FORM_SIZE_MAX} bytes")  # noqa: TRY301 - said like the others
        return _json(await service.answer_post(content, call.headers.get("Content-Type", ""), address))
    except GrantRefused as refused:
        error = (
            Unauthorized(refused.description) if refused.status == 401 else QueryInvalid(refused.description)
        )
        body = json.loads(error.to_json()) | {
            "error": refused.error,
            "error_description": refused.description,
        }
        return _ask_for_password(call, body) if refused.status == 401 else _json(body, status=refused.status)


async def list_api_keys(call: Call) -> web.StreamResponse:
    """GET /v2/_modelkit/apikeys: the caller's keys, without their secrets, which nobody has."""
    keys = await _api_keys(call).list(call.identity.name)
    newest_first = sorted(keys, key=lambda key: key.created, reverse=True)
    return _json({"keys": [_described(key) for key in newest_first]})


async def create_api_key(call: Call) -> web.StreamResponse:
    """POST /v2/_modelkit/apikeys: a key, which is shown this once."""
    keys = _api_keys(call)
    if call.config.storage.maintenance.readonly.enabled:
        raise Unsupported("the registry is in read-only mode (storage.maintenance.readonly)")
    wish = await _read_wish(call)
    text, key = await keys.create(
        call.identity.name,
        label=_wished(wish, "label", str, ""),
        life_s=_wished(wish, "expires_in", int, None),
        scopes=_wished(wish, "scope", list, []),
    )
    described = _described(key)
    if call.services.audit is not None:
        await call.services.audit.tell("apikey.created", key=key.id, scope=described["scope"])
    return _json(described | {"key": text}, status=201)


async def delete_api_key(call: Call) -> web.StreamResponse:
    """DELETE /v2/_modelkit/apikeys/<id>: nobody is let in with it any more."""
    await _api_keys(call).revoke(call.identity.name, call.argument)
    if call.services.audit is not None:
        await call.services.audit.tell("apikey.revoked", key=call.argument)
    return web.Response(status=204)


def _accounts(call: Call) -> Accounts:
    accounts = call.services.accounts
    if accounts is None:
        raise NameUnknown("there are no accounts here (auth)")
    return accounts


def _token_service(call: Call) -> TokenService:
    service = _accounts(call).token_service
    if service is None:
        raise NameUnknown("no tokens are issued here (auth.token)")
    return service


def _api_keys(call: Call) -> ApiKeys:
    """The keys, for who has shown a password.

    Raises:
        NameUnknown: there are none.
        Denied: the caller has shown something less: a key or a token must not make a key that outlives it.
    """
    keys = _accounts(call).api_keys
    if keys is None:
        raise NameUnknown("there are no API keys here (auth.apikeys)")
    if call.identity.method != "basic":
        raise Denied(
            "API keys are made, listed and deleted with the password: send it (Basic), not a token or a key"
        )
    return keys


async def _read_body(call: Call, size_max: int) -> bytes | None:
    """The body; None for one that is larger."""
    parts: list[bytes] = []
    received = 0
    async for piece in pieces_of(call.request):
        received += len(piece)
        if received > size_max:
            if not await discard(call.request):
                call.request.protocol.force_close()
            return None
        parts.append(piece)
    return b"".join(parts)


async def _read_wish(call: Call) -> Mapping[str, Any]:
    # A page elsewhere cannot send this type with a browser's remembered password, not without asking us first.
    if call.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise QueryInvalid("wanted application/json")
    content = await _read_body(call, _WISH_SIZE_MAX)
    if content is None:
        raise QueryInvalid(f"a body of more than {_WISH_SIZE_MAX} bytes")
    try:
        wish = parse_json(content or b"{}")
    except ContentInvalid as error:
        raise QueryInvalid(str(error)) from error
    if not isinstance(wish, dict) or not wish.keys() <= {"label", "expires_in", "scope"}:
        raise QueryInvalid(
            'wanted an object with label, expires_in (seconds) and scope (["repository:a/b:pull"])'
        )
    return wish


def _wished(wish: Mapping[str, Any], name: str, kind: type, default: object) -> Any:  # noqa: ANN401 - any JSON
    value = wish.get(name)
    if value is None:
        return default
    is_spoiled = isinstance(value, list) and not all(isinstance(item, str) for item in value)
    if type(value) is not kind or is_spoiled:
        raise QueryInvalid(f"{name} is of another type than it should be")
    return value


def _described(key: ApiKey) -> dict[str, object]:
    from registry.auth.scopes import format_grant

    return {
        "id": key.id,
        "label": key.label,
        "created": _timestamp(key.created),
        "expires": _timestamp(key.expires) if key.expires is not None else None,
        "scope": [format_grant(scope) for scope in key.scopes],
    }


def _timestamp(seconds: float) -> str:
    """A time of RFC 3339; the last that it can write for one beyond that, as of keys that were made before there was a limit."""
    return (
        datetime.fromtimestamp(min(seconds, _LAST_SECOND), UTC)
        .isoformat(timespec="seconds")
        .replace("+00:00", "Z")
    )


def _ask_for_password(call: Call, body: Mapping[str, object]) -> web.StreamResponse:
    response = _json(body, status=401)
    auth = call.config.auth
    realm = auth.htpasswd.realm if auth is not None and auth.htpasswd is not None else "modelkit-registry"
    response.headers["WWW-Authenticate"] = format_challenge("Basic", realm=realm, charset="UTF-8")
    return response


def _json(body: Mapping[str, object], *, status: int = 200) -> web.Response:
    headers = {"Content-Type": "application/json", **_NOT_KEPT}
    return web.Response(status=status, body=json.dumps(body).encode(), headers=headers)
