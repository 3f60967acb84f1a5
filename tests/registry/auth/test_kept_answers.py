"""An answer that is kept for one caller's credentials is given to nobody else, and no longer than they are worth something."""

from __future__ import annotations

import asyncio
import gc
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from registry import connection
from registry.answer_memo import AnswerMemo
from registry.auth import watched_file
from registry.auth.guard import Guard
from registry.auth.identity import ANONYMOUS, Identity
from registry.auth.policy import OPEN
from storage_backends.memory import MemoryBackend
from tests.registry.auth.logins import basic, bearer, written
from tests.registry.auth.test_access import guards, policy_without
from tests.registry.auth.world import ANONYMOUS as NOBODY
from tests.registry.auth.world import SCHEMES, World, password_of, world
from tests.registry.kits import whole_kit
from tests.registry.wire import encode, image

__all__ = ["guards"]  # a fixture

NAME = "team/kit"


class Line:
    """One connection that stays; each request is the same to the byte."""

    def __init__(self, registry: World, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._registry = registry
        self._reader, self.writer = reader, writer

    async def get(self, user: str, target: str = f"/v2/{NAME}/manifests/v1") -> tuple[int, bytes]:
        fields = {"Host": "x", **await self._registry.credentials(user)}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.writer.write(f"GET {target} HTTP/1.1\r\n{head}\r\n".encode())
        answer = await self._reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"Content-Length: (\d+)", answer)
        assert size is not None
        return int(answer.split()[1]), await self._reader.readexactly(int(size[1]))


@asynccontextmanager
async def connected(registry: World) -> AsyncIterator[Line]:
    reader, writer = await asyncio.open_connection(registry.wire.host, registry.wire.port)
    try:
        yield Line(registry, reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.fixture(autouse=True)
def files_are_looked_at_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_file, "LOOK_INTERVAL_S", 0.01)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """A name for each answer that a connection gave by itself."""
    given: list[bytes] = []
    give = connection.Connection._give_kept_answer

    def noting(self: connection.Connection, name: bytes) -> bool:
        is_given = give(self, name)
        if is_given:
            given.append(name)
        return is_given

    monkeypatch.setattr(connection.Connection, "_give_kept_answer", noting)
    return given


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_an_answer_is_kept_for_the_same_credentials_and_for_nobody_else(
    storage: dict[str, Any], tmp_path: Path, scheme: str, kept: list[bytes]
) -> None:
    async with world(storage, tmp_path, scheme=scheme) as registry:
        manifest, _ = await registry.as_user("admin").push_image(NAME, "v1")
        async with connected(registry) as line:
            for _ in range(4):
                assert await line.get("reader") == (200, encode(manifest))
                assert (await line.get("serving"))[0] == 403
                assert (await line.get(NOBODY))[0] == 401
                assert (await line.get("stranger"))[0] == 403
                assert await line.get("writer") == (200, encode(manifest))

        # All but the first of each of the two that were allowed.
        assert len(kept) == 6
        assert len(set(kept)) == 2


async def refreshed(registry: World, key: str) -> str:
    """An access token of a refresh token of an API key of the reader's."""
    more = {"service": "registry.example", "scope": f"repository:{NAME}:pull"}
    target = f"/v2/token?{urlencode({**more, 'offline_token': 'true'})}"
    refresh = (await registry.wire("GET", target, headers=basic("reader", key))).json()["refresh_token"]
    form = {**more, "grant_type": "refresh_token", "client_id": "test", "refresh_token": refresh}
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = await registry.wire("POST", "/v2/token", headers=headers, body=urlencode(form).encode())
    token: str = reply.json()["access_token"]
    return token


@pytest.mark.parametrize("is_token", [False, True], ids=["key", "refreshed token"])
async def test_an_answer_is_kept_no_longer_than_the_key_that_it_was_given_for_lives(
    storage: dict[str, Any], tmp_path: Path, is_token: bool, kept: list[bytes]
) -> None:
    async with world(storage, tmp_path, has_tokens=True) as registry:
        manifest, _ = await registry.as_user("admin").push_image(NAME, "v1")
        headers = {**basic("reader", password_of("reader")), "Content-Type": "application/json"}
        wish = encode({"expires_in": 3})
        key = (await registry.wire("POST", "/v2/_modelkit/apikeys", headers=headers, body=wish)).json()["key"]
        end = asyncio.get_running_loop().time() + 3
        registry.use("reader", bearer(await refreshed(registry, key) if is_token else key))

        async with connected(registry) as line:
            assert [await line.get("reader") for _ in range(3)] == [(200, encode(manifest))] * 3
            assert len(kept) == 2
            await asyncio.sleep(end - asyncio.get_running_loop().time())
            assert (await line.get("reader"))[0] == 401


async def test_a_layer_limited_reader_gets_the_slice_again_and_nothing_of_the_rest(
    storage: dict[str, Any], tmp_path: Path
) -> None:
    async with world(storage, tmp_path) as registry, connected(registry) as line:
        await whole_kit().push(registry.as_user("admin"), NAME)
        targets = [f"/v2/{NAME}/manifests/{tag}" for tag in ("v1", "v1.only.docs", "v1.only.datasets")]

        for _ in range(3):
            assert [(await line.get("serving", target))[0] for target in targets] == [403, 200, 403]
            assert [(await line.get("reader", target))[0] for target in targets] == [200, 200, 200]


async def test_V_14_a_policy_that_changed_is_in_force_for_kept_answers_at_once(
    storage: dict[str, Any], tmp_path: Path, guards: list[Guard]
) -> None:
    async with world(storage, tmp_path) as registry, connected(registry) as line:
        await registry.as_user("admin").push_image(NAME, "v1")
        for _ in range(3):
            assert (await line.get("reader"))[0] == 200
            assert (await line.get("writer"))[0] == 200

        guards[0].policy = policy_without("reader")

        assert (await line.get("reader"))[0] == 403
        assert (await line.get("writer"))[0] == 200


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_who_was_removed_is_given_no_kept_answer(
    storage: dict[str, Any], tmp_path: Path, scheme: str
) -> None:
    async with world(storage, tmp_path, scheme=scheme) as registry, connected(registry) as line:
        await registry.as_user("admin").push_image(NAME, "v1")
        for _ in range(3):
            assert (await line.get("reader"))[0] == 200

        written(registry.users_file, {"admin": password_of("admin")})

        async with asyncio.timeout(20):
            while (await registry.ask("reader", "GET", "/v2/")).status != 401:
                await asyncio.sleep(0.01)
        assert (await line.get("reader"))[0] == 401


async def test_an_api_key_that_was_revoked_opens_no_kept_answer(
    storage: dict[str, Any], tmp_path: Path
) -> None:
    async with world(storage, tmp_path, scheme="apikey") as registry, connected(registry) as line:
        await registry.as_user("admin").push_image(NAME, "v1")
        for _ in range(3):
            assert (await line.get("reader"))[0] == 200
        with_password = World(registry.wire, "basic", users_file=registry.users_file)
        (key,) = (await with_password.ask("reader", "GET", "/v2/_modelkit/apikeys")).json()["keys"]

        reply = await with_password.ask("reader", "DELETE", f"/v2/_modelkit/apikeys/{key['id']}")

        assert reply.status == 204
        assert (await line.get("reader"))[0] == 401


async def test_a_tag_that_moved_is_seen_at_once_by_whoever_may_read_it(
    storage: dict[str, Any], tmp_path: Path
) -> None:
    async with world(storage, tmp_path) as registry, connected(registry) as line:
        admin = registry.as_user("admin")
        await admin.push_image(NAME, "v1")
        for number in range(5):
            manifest = image(annotations={"n": str(number)})
            await admin.push_manifest(NAME, "v1", manifest)

            answers = [await line.get("reader") for _ in range(3)]

            assert answers == [(200, encode(manifest))] * 3


# ---- the memo by itself


class Proofs:
    """An authenticator that believes what it is told to."""

    def __init__(self) -> None:
        self.are_good = True

    async def identify(self, request: object) -> Identity:
        raise NotImplementedError

    def is_still(self, identity: Identity) -> bool:
        return self.are_good

    def challenge(self, *, scope: object, error: str | None) -> list[str]:
        return ["Basic"]


READER = Identity("reader", method="basic")


@pytest.mark.parametrize(
    ("identity", "is_kept"),
    [
        (ANONYMOUS, True),
        (READER, True),
        (replace(READER, expires=1e12), True),
        (replace(READER, expires=1.0), False),
        # It is the connection's, and not in the bytes of the request.
        (replace(READER, method="certificate"), False),
    ],
    ids=["anonymous", "reader", "not expired", "expired", "certificate"],
)
def test_what_an_identity_rests_on_is_looked_at_each_time(identity: Identity, is_kept: bool) -> None:
    proofs = Proofs()
    guard = Guard(OPEN, proofs)

    assert guard.is_still(identity) == is_kept
    proofs.are_good = False
    assert guard.is_still(identity) == (identity is ANONYMOUS)


def test_A_23_the_memo_holds_no_password() -> None:
    memo = AnswerMemo(MemoryBackend(), Guard(OPEN))
    for field in ("Authorization", "authorization", "AUTHORIZATION"):
        request = f"GET /v2/a/manifests/v1 HTTP/1.1\r\nHost: x\r\n{field}: Basic c2VjcmV0LWNhbmFyeQ==\r\n\r\n".encode()

        name = memo.name(request)

        assert b"c2VjcmV0LWNhbmFyeQ" not in name
        assert name == memo.name(request)
        assert name != memo.name(request.replace(b"c2Vj", b"c2Vk"))
        assert name != AnswerMemo(MemoryBackend(), Guard(OPEN)).name(request)


async def test_A_23_no_kept_answer_has_a_password_in_its_name(
    storage: dict[str, Any], tmp_path: Path
) -> None:
    async with world(storage, tmp_path) as registry, connected(registry) as line:
        await registry.as_user("admin").push_image(NAME, "v1")
        for _ in range(3):
            assert (await line.get("reader"))[0] == 200
        shown = (await registry.credentials("reader"))["Authorization"].encode()

        memos = [found for found in gc.get_objects() if isinstance(found, AnswerMemo) and found._answers]

        assert memos
        assert not [name for memo in memos for name in memo._answers if shown in name]
