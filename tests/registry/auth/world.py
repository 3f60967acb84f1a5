"""A registry with accounts and a policy, and one user for each kind of right; what the tests of access start from."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.registry.auth.logins import basic, bearer, written
from tests.registry.conftest import configured, served
from tests.registry.wire import Body, Reply, Wire, encode

ANONYMOUS = "anonymous"
# Right by right, in team/**. The stranger has an account and nothing else.
ACTIONS: Mapping[str, list[str]] = {
    "reader": ["read"],
    "writer": ["read", "create", "update"],
    "creator": ["read", "create"],
    "updater": ["read", "update"],
    "pusher": ["create", "update"],
    "deleter": ["read", "delete"],
}
# The borrower reads as serving does, and would push if that gave them no more to read.
USERS = (*ACTIONS, "admin", "serving", "documenter", "borrower", "stranger")
EVERYBODY = (ANONYMOUS, *USERS)
ACCESS: dict[str, Any] = {
    "repositories": {
        "team/**": {
            "policies": [
                *({"users": [user], "actions": actions} for user, actions in ACTIONS.items()),
                {"users": ["serving"], "actions": ["read"], "layers": ["model", "docs"]},
                {"users": ["documenter"], "actions": ["read"], "layers": ["kitfile", "docs"]},
                {"users": ["borrower"], "actions": ["read"], "layers": ["model", "docs"]},
                {"users": ["borrower"], "actions": ["create", "update"]},
            ]
        },
        "public/**": {"anonymousPolicy": ["read"]},
        "own/**": {"policies": [{"users": ["serving", "stranger"], "actions": ["read", "create", "update"]}]},
        "other/**": {"policies": [{"users": ["writer"], "actions": ["create", "update"]}]},
    },
    "adminPolicy": {"users": ["admin"], "actions": ["read", "create", "update", "delete"]},
}
SCHEMES = ("basic", "bearer", "apikey")
# Credentials that can be for less than their owner may.
LIMITED_SCHEMES = ("basic apikey", "apikey", "bearer", "bearer of apikey")
HOST = "http://registry.example"
TOKEN_SCOPES = [
    "registry:catalog:*",
    "registry:metrics:*",
    *(f"repository:{name}:pull,push,delete" for name in ("team/kit", "public/kit", "own/kit", "other/kit")),
]


class World:
    """The registry as its users see it.

    Args:
        scheme: how they show who they are.
        scopes: what their tokens and keys are for, the admin's excepted; empty for all.
    """

    def __init__(self, wire: Wire, scheme: str, *, users_file: Path, scopes: Sequence[str] = ()) -> None:
        self.wire = wire
        self.scheme = scheme
        self.users_file = users_file
        self.scopes = scopes
        self._credentials: dict[str, Mapping[str, str]] = {}

    @staticmethod
    def wire_of(url: str) -> Wire:
        return Wire(url)

    async def credentials(self, user: str) -> Mapping[str, str]:
        """The header of a user; none for anonymous."""
        if user not in self._credentials:
            self._credentials[user] = await self._log_in(user)
        return self._credentials[user]

    def use(self, user: str, credentials: Mapping[str, str]) -> None:
        """Other credentials for a user, from now on."""
        self._credentials[user] = credentials

    async def _log_in(self, user: str) -> Mapping[str, str]:
        if user == ANONYMOUS:
            return {}
        with_password = basic(user, password_of(user))
        if self.scheme == "basic":
            return with_password
        scopes = () if user == "admin" else self.scopes
        if self.scheme == "bearer":
            return bearer(await self.token(user, scopes or TOKEN_SCOPES))
        headers = {**with_password, "Content-Type": "application/json"}
        wish = encode({"scope": list(scopes)})
        reply = await self.wire("POST", "/v2/_modelkit/apikeys", headers=headers, body=wish)
        assert reply.status == 201, reply.body
        key = reply.json()["key"]
        match self.scheme:
            case "basic apikey":
                return basic(user, key)
            case "bearer of apikey":
                return bearer(await self.token(user, scopes or TOKEN_SCOPES, password=key))
        return bearer(key)

    async def token(self, user: str, scopes: Sequence[str], *, password: str | None = None) -> str:
        query = urlencode([("service", "registry.example"), *(("scope", scope) for scope in scopes)])
        headers = basic(user, password or password_of(user)) if user != ANONYMOUS else {}
        reply = await self.wire("GET", f"/v2/token?{query}", headers=headers)
        assert reply.status == 200, reply.body
        token: str = reply.json()["token"]
        return token

    async def ask(
        self,
        user: str,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body = b"",
    ) -> Reply:
        return await self.wire(
            method, target, headers={**(headers or {}), **await self.credentials(user)}, body=body
        )

    def as_user(self, user: str) -> UserWire:
        """The helpers of `Wire`, as this user."""
        return UserWire(self, user)


class UserWire(Wire):
    """`Wire`, with the credentials of one user on every request."""

    def __init__(self, world: World, user: str) -> None:
        self.host, self.port = world.wire.host, world.wire.port
        self._world, self._user = world, user

    async def __call__(
        self, method: str, target: str, *, headers: Mapping[str, str] | None = None, body: Body = b""
    ) -> Reply:
        return await self._world.ask(self._user, method, target, headers=headers, body=body)


def password_of(user: str) -> str:
    return f"password of {user}"


@asynccontextmanager
async def world(
    storage: dict[str, Any],
    folder: Path,
    *,
    scheme: str = "basic",
    access: dict[str, Any] | None = None,
    has_tokens: bool = False,
    scopes: Sequence[str] = (),
) -> AsyncIterator[World]:
    """A registry with accounts for everybody.

    Args:
        folder: of the test's own.
        access: `http.accessControl`; `{}` for none.
        has_tokens: whether tokens are issued also where nobody needs one.
        scopes: of the users' tokens and keys, the admin's excepted; empty for all.
    """
    users = written(folder / "htpasswd", {user: password_of(user) for user in USERS})
    auth: dict[str, Any] = {"htpasswd": {"path": str(users)}, "apikeys": {}}
    if scheme.startswith("bearer") or has_tokens:
        auth["token"] = {}
    access = ACCESS if access is None else access
    http = {"host": HOST, **({"accessControl": access} if access else {})}
    async with served(configured(storage, auth=auth, http=http)) as url:
        yield World(Wire(url), scheme, users_file=users, scopes=scopes)


def message_of(reply: Reply) -> str:
    text: str = json.loads(reply.body)["errors"][0]["message"]
    return text
