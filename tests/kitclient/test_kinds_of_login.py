"""kitclient at our registry with every kind of login that the registry takes and a client can keep."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlencode

import pytest

from kitclient.credentials import Credential
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import Denied, Unauthorized
from kitspec.media_types import OCI_MANIFEST
from kitspec.names import RepositoryName, Tag
from tests.contracts.registry_contract import CONTENT, manifest_of, push_blob
from tests.kitclient.ours import seen_by
from tests.registry.auth import world as accounts
from tests.registry.auth.logins import basic
from tests.registry.auth.world import World, password_of

TEAM = RepositoryName("team/kit")
DIGEST = Digest.of(CONTENT)
MANIFEST = manifest_of(Descriptor("application/x", DIGEST, len(CONTENT)))


async def password(world: World, user: str) -> Credential:
    _ = world
    return Credential(user, password_of(user))


async def api_key(world: World, user: str) -> str:
    headers = {**basic(user, password_of(user)), "Content-Type": "application/json"}
    reply = await world.wire("POST", "/v2/_modelkit/apikeys", headers=headers, body=b"{}")
    key: str = reply.json()["key"]
    return key


async def key_as_password(world: World, user: str) -> Credential:
    return Credential(user, await api_key(world, user))


async def key_as_it_is(world: World, user: str) -> Credential:
    return Credential(registry_token=await api_key(world, user))


async def identity_token(world: World, user: str) -> Credential:
    """As `docker login` keeps it: what the token service gives to be asked again with."""
    form = {
        "grant_type": "password",
        "username": user,
        "password": password_of(user),
        "service": "registry.example",
        "client_id": "docker",
        "access_type": "offline",
    }
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = await world.wire("POST", "/v2/token", headers=headers, body=urlencode(form).encode())
    return Credential(identity_token=reply.json()["refresh_token"])


KINDS: dict[str, tuple[str, Callable[[World, str], Awaitable[Credential]]]] = {
    "Basic with a password": ("basic", password),
    "Basic with an API key": ("basic", key_as_password),
    "Bearer for a password": ("bearer", password),
    "Bearer for an API key": ("bearer", key_as_password),
    "Bearer for an identity token": ("bearer", identity_token),
    "an API key as Bearer": ("bearer", key_as_it_is),
}


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_of_login_pushes_and_pulls_as_far_as_it_may(tmp_path: Path, kind: str):
    scheme, log_in = KINDS[kind]
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    async with accounts.world(storage, tmp_path, scheme=scheme) as world:
        async with seen_by(world, await log_in(world, "writer")) as writer:
            assert await writer.log_in()
            await push_blob(writer, CONTENT, name=TEAM)
            await writer.put_manifest(TEAM, MANIFEST, OCI_MANIFEST, tags=(Tag("v1"),))
        async with seen_by(world, await log_in(world, "reader")) as reader:
            assert (await reader.get_manifest(TEAM, Tag("v1"))).content == MANIFEST
            async with reader.open_blob(TEAM, DIGEST) as body:
                assert b"".join([piece async for piece in body]) == CONTENT
            with pytest.raises((Denied, Unauthorized), match=r"login that is kept|may not|denied"):
                await reader.put_manifest(TEAM, MANIFEST, OCI_MANIFEST, tags=(Tag("v2"),))
        async with seen_by(world, None) as nobody:
            with pytest.raises(Unauthorized, match="log in to registry"):
                await nobody.get_manifest(TEAM, Tag("v1"))


WRONG = {
    "password": Credential("writer", "canary"),
    "user": Credential("nobody", password_of("writer")),
    "identity token": Credential(identity_token="canary.canary.canary"),
    "registry token": Credential(registry_token="canary"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_C_37_a_wrong_login_of_any_kind_is_refused(tmp_path: Path, scheme: str, wrong: str):
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    async with (
        accounts.world(storage, tmp_path, scheme=scheme) as world,
        seen_by(world, WRONG[wrong]) as client,
    ):
        with pytest.raises(Unauthorized) as refusal:
            await client.log_in()

    assert "canary" not in str(refusal.value)


async def test_C_37_a_wrong_login_is_found_out_where_everybody_may_read(tmp_path: Path):
    """Nobody is asked for a password there."""
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    access = {"repositories": {"**": {"anonymousPolicy": ["read"]}}}
    async with accounts.world(storage, tmp_path, access=access) as world:
        async with seen_by(world, WRONG["password"]) as client:
            with pytest.raises(Unauthorized):
                await client.log_in()
        async with seen_by(world, await password(world, "writer")) as client:
            assert await client.log_in()
