"""A push that outlives its tokens: each is replaced, and the upload goes on from where the registry has it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from kitclient.credentials import Credential
from kitclient.remote import RemoteRegistry
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import Unavailable
from kitspec.media_types import OCI_MANIFEST
from kitspec.names import RepositoryName, Tag
from tests.contracts.registry_contract import CONTENT, REPOSITORY, joined, manifest_of
from tests.kitclient.ours import seen_by
from tests.kitclient.peer import Peer, client, serving
from tests.kitclient.test_remote_retries import UploadServer, put
from tests.registry.auth import world as accounts
from tests.registry.auth.world import password_of

DIGEST = Digest.of(CONTENT)
SECRET = Credential("user", "canary-password")
TEAM = RepositoryName("team/kit")
# The registry writes whole seconds into a token: with this it lives for 1.5 s at least.
LIFE_S = 2.5


async def credentials(host: str) -> Credential:
    _ = host
    return SECRET


class Expiring(UploadServer):
    """An upload server with a token service, whose tokens live for a number of requests.

    Attributes:
        life: requests that a token is good for.
        moment: what has happened to a body that comes with a token that has ended: the answer comes before the body
            ("before"), in the middle of it with what came kept ("within"), or when all of it is kept ("after").
    """

    def __init__(self, *, life: int, moment: str = "before") -> None:
        super().__init__()
        self.life, self.moment = life, moment
        self.tokens: list[int] = []
        self.refused: list[str] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            self.tokens.append(self.life)
            return web.json_response({"token": f"t{len(self.tokens) - 1}"})
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme == "Bearer" and self.tokens[int(token[1:])] > 0:
            self.tokens[int(token[1:])] -= 1
            return await super().__call__(request)
        self.refused.append(request.method)
        if request.method == "PATCH" and self.moment == "within":
            self.kept += await request.content.readexactly(1000)
        elif request.method == "PATCH" and self.moment == "after":
            self.kept += await request.read()
        challenge = f'Bearer realm="http://{request.host}/token",service="s",error="invalid_token"'
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitclient.remote_upload.CHUNK_SIZE", 2000)


def sent(peer: Peer, method: str) -> int:
    return sum(request.method == method for request in peer.requests)


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("life", [2, 3, 5])
async def test_a_push_goes_on_from_the_uploads_offset_when_its_token_ends(life: int, moment: str):
    server = Expiring(life=life, moment=moment)
    async with serving(server) as peer, client(peer, credentials=credentials) as registry:
        offsets = await put(registry, CONTENT)

    assert server.stored == {DIGEST: CONTENT}
    assert "PATCH" in server.refused
    assert sent(peer, "POST") - server.refused.count("POST") == 1, "one session from end to end"
    if moment == "within":
        assert any(offset % 2000 == 1000 for offset in offsets)
    if moment == "after":
        assert len(set(offsets)) == len(offsets), "what has arrived is not sent again"


async def test_a_closing_put_gets_another_token():
    # One for the session, and one for each chunk.
    server = Expiring(life=1 + len(range(0, len(CONTENT), 2000)))
    async with serving(server) as peer, client(peer, credentials=credentials) as registry:
        await put(registry, CONTENT)

    assert server.refused == ["POST", "PUT"]
    assert server.stored == {DIGEST: CONTENT}


async def test_a_blob_of_one_request_is_sent_again_in_the_same_session(monkeypatch):
    monkeypatch.setattr("kitclient.remote_upload.CHUNK_SIZE", len(CONTENT))
    server = Expiring(life=1)
    async with serving(server) as peer, client(peer, credentials=credentials) as registry:
        await prime(registry)
        server.tokens[-1], server.life = 1, 3
        await put(registry, CONTENT)

    assert server.refused.count("PUT") == 1
    assert server.sessions == 1
    assert server.stored == {DIGEST: CONTENT}


async def prime(registry: RemoteRegistry) -> None:
    """Have the token for pushing fetched."""
    url = registry.transport.url(f"/v2/{REPOSITORY}/blobs/uploads/1")
    async with registry.transport.request("DELETE", url, scope=f"repository:{REPOSITORY}:pull,push"):
        pass


@pytest.mark.parametrize("whole", [True, False])
async def test_a_registry_that_takes_no_token_for_a_body_is_given_up_on(monkeypatch, whole: bool):
    monkeypatch.setattr("kitclient.remote_upload.CHUNK_SIZE", len(CONTENT) if whole else 2000)
    server = Expiring(life=1000)

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method in {"PATCH", "PUT"}:
            server.tokens[:] = [0] * len(server.tokens)
        return await server(request)

    async with serving(answer) as peer, client(peer, credentials=credentials) as registry:
        with pytest.raises(Exception, match="authorization"):
            await put(registry, CONTENT)

        assert sent(peer, "PATCH") + sent(peer, "PUT") <= registry.transport.retry.tries
    assert server.stored == {}


async def append(registry: RemoteRegistry, content: bytes) -> None:
    """As `pack --push` does, which makes a layer while it sends it and cannot make it again."""

    async def chunks() -> AsyncIterator[bytes]:
        for position in range(0, len(content), 700):
            yield content[position : position + 700]

    upload = await registry.begin_upload(REPOSITORY)
    await upload.append(chunks(), at=0)
    await upload.commit(Digest.of(content))


@pytest.mark.parametrize("moment", ["before", "within", "after"])
@pytest.mark.parametrize("life", [2, 3, 5])
async def test_a_stream_that_cannot_be_read_again_goes_on_too(monkeypatch, life: int, moment: str):
    monkeypatch.setattr("kitclient.remote_upload._PIECE_SIZE", 2000)
    server = Expiring(life=life, moment=moment)
    async with serving(server) as peer, client(peer, credentials=credentials) as registry:
        await append(registry, CONTENT)

    assert server.stored == {DIGEST: CONTENT}
    assert "PATCH" in server.refused


@pytest.mark.parametrize("fault", ["break", "busy", "lost reply"])
async def test_a_stream_that_cannot_be_read_again_survives_what_passes(monkeypatch, fault: str):
    monkeypatch.setattr("kitclient.remote_upload._PIECE_SIZE", 2000)
    server = UploadServer()
    server.faults = ["", fault]
    async with serving(server) as peer, client(peer) as registry:
        await append(registry, CONTENT)

    assert server.stored == {DIGEST: CONTENT}


async def test_a_stream_ends_where_a_registry_is_busy_for_good(monkeypatch):
    monkeypatch.setattr("kitclient.remote_upload._PIECE_SIZE", 2000)
    server = UploadServer()
    server.faults = ["", *["busy"] * 100]
    async with serving(server) as peer, client(peer) as registry:
        with pytest.raises(Unavailable):
            await append(registry, CONTENT)

        assert sent(peer, "PATCH") == 1 + registry.transport.retry.tries


# ---- our registry

WRITER = Credential("writer", password_of("writer"))


class Tokens:
    """When the registry's newest token ends, in seconds since 1970."""

    ends = 0.0

    async def wait(self) -> None:
        await asyncio.sleep(max(0.0, self.ends - time.time() + 0.02))


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Tokens:
    """Tokens of our registry live for seconds, which it does not say: a client learns it by a 401."""
    from registry.auth.issuers import OwnIssuer

    tokens, sign = Tokens(), OwnIssuer.sign_access

    def sign_briefly(self: Any, login: Any, access: Any, *, life_s: float) -> str:
        _ = life_s
        tokens.ends = max(tokens.ends, float(int(time.time() + LIFE_S)))
        return sign(self, login, access, life_s=LIFE_S)

    monkeypatch.setattr(OwnIssuer, "sign_access", sign_briefly)
    monkeypatch.setattr("registry.auth.tokens.LEEWAY_S", 0.0)
    return tokens


async def test_a_long_push_to_our_registry_survives_the_end_of_its_tokens(tokens: Tokens, tmp_path: Path):
    """An hour's push in small: every chunk is sent after the token of the chunk before has ended."""
    content = CONTENT[:5000]
    digest = Digest.of(content)
    offsets: list[int] = []

    @asynccontextmanager
    async def read(offset: int) -> AsyncIterator[AsyncIterator[bytes]]:
        async def chunks() -> AsyncIterator[bytes]:
            yield content[offset:]

        if offset and offset not in offsets:
            await tokens.wait()
        offsets.append(offset)
        yield chunks()

    manifest = manifest_of(Descriptor("application/x", digest, len(content)))
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    async with accounts.world(storage, tmp_path, scheme="bearer") as world, seen_by(world, WRITER) as ours:
        await ours.put_blob(TEAM, Descriptor("application/x", digest, len(content)), read)
        await tokens.wait()
        await ours.put_manifest(TEAM, manifest, OCI_MANIFEST, tags=(Tag("v1"),))
        stored = await ours.get_manifest(TEAM, Tag("v1"))
        async with ours.open_blob(TEAM, digest) as body:
            assert await joined(body) == content

    assert stored.content == manifest
    assert offsets == [0, 2000, 2000, 4000, 4000]
