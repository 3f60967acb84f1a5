"""What a hostile registry may send, and that nothing comes of it. IDs: reference tables of the threat model."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

import pytest
from aiohttp import web
from yarl import URL

from kitclient.blob_stream import verified
from kitclient.credentials import Credential
from kitclient.errors import RegistryUnreachable, ServerMisbehaved, TransportRefused
from kitclient.image_layout import LayoutRegistry
from kitclient.origin import follow, is_local
from kitclient.transfer import Place, copy
from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.errors import BlobUnknown, DigestInvalid, ManifestUnknown, OciError, SizeInvalid, Unauthorized
from kitspec.media_types import OCI_INDEX, OCI_MANIFEST
from kitspec.names import Tag
from tests.contracts.registry_contract import (
    CONTENT,
    REPOSITORY,
    UNKNOWN,
    index_of,
    joined,
    manifest_of,
    push_blob,
    read_blob,
)
from tests.kitclient.peer import Answer, client, not_found, serving

SECRET = Credential("user", "canary-password")
TOKEN = "canary.token"
LOGINS = pytest.mark.parametrize("wanting", ["basic", "bearer"])


async def credentials(host: str) -> Credential:
    _ = host
    return SECRET


def basic_challenge() -> web.Response:
    return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="r"'})


def wanting_login(then: Answer) -> Answer:
    """Asks for Basic first."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return await then(request) if "Authorization" in request.headers else basic_challenge()

    return answer


def wanting_token(then: Answer) -> Answer:
    """Asks for a token first, and gives one."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return web.json_response({"token": TOKEN})
        if request.headers.get("Authorization") == f"Bearer {TOKEN}":
            return await then(request)
        field = f'Bearer realm="http://{request.host}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": field})

    return answer


def redirect_to(url: str, status: int = 307) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        _ = request
        return web.Response(status=status, headers={"Location": url})

    return answer


def content_of(content: bytes, **headers: str) -> Answer:
    async def answer(request: web.Request) -> web.Response:
        _ = request
        return web.Response(body=content, headers=headers)

    return answer


# ---- content that is not what was asked for


async def test_C_10_a_digest_that_is_a_path_never_leaves_its_manifest():
    document = json.loads(manifest_of(Descriptor("x", UNKNOWN, 2)))
    document["config"]["digest"] = "sha256:../../../../etc/passwd"
    content = json.dumps(document).encode()
    async with (
        serving(content_of(content, **{"Content-Type": OCI_MANIFEST})) as peer,
        client(peer) as registry,
    ):
        with pytest.raises(OciError, match="digest"):
            await copy(Place(registry, REPOSITORY), Tag("v1"), Place(registry, REPOSITORY))

        assert len(peer.requests) == 1


async def test_C_11_another_manifest_for_a_pinned_digest_is_refused():
    content = manifest_of(Descriptor("x", UNKNOWN, 2))
    headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": str(UNKNOWN)}
    async with serving(content_of(content, **headers)) as peer, client(peer) as registry:
        with pytest.raises(DigestInvalid, match="when asked for"):
            await registry.get_manifest(REPOSITORY, UNKNOWN)


@pytest.mark.parametrize("announced", [str(UNKNOWN), "sha512:zz", "", "sha256:../x", "sha512:" + "0" * 128])
async def test_C_11_the_digest_of_a_tag_is_that_of_the_bytes_whatever_a_header_says(announced):
    content = manifest_of(Descriptor("x", UNKNOWN, 2))
    headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": announced}
    async with serving(content_of(content, **headers)) as peer, client(peer) as registry:
        stored = await registry.get_manifest(REPOSITORY, Tag("v1"))

    assert stored.digest == Digest.of(content, stored.digest.algorithm)


async def test_C_12_a_layer_of_other_bytes_and_the_same_length_is_not_stored(tmp_path):
    flipped = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    config = Descriptor("application/x", Digest.of(b"{}"), 2)
    manifest = manifest_of(config, Descriptor("application/x", Digest.of(CONTENT), len(CONTENT)))

    async def answer(request: web.Request) -> web.Response:
        if "/manifests/" in request.path:
            return web.Response(body=manifest, headers={"Content-Type": OCI_MANIFEST})
        return web.Response(body=b"{}" if request.path.endswith(config.digest) else flipped)

    async with serving(answer) as peer, client(peer) as remote, LayoutRegistry(tmp_path) as local:
        with pytest.raises(DigestInvalid):
            await copy(Place(remote, REPOSITORY), Tag("v1"), Place(local, REPOSITORY), tags=(Tag("v1"),))

        with pytest.raises(BlobUnknown):
            await local.stat_blob(REPOSITORY, Digest.of(CONTENT))
        assert [name async for name in local.repositories()] == []
    assert not list((tmp_path / "ingest").glob(f"*{Digest.of(CONTENT).encoded}*"))


@pytest.mark.parametrize("lie", [{"Content-Length": "7"}, {"Docker-Content-Digest": str(UNKNOWN)}], ids=str)
async def test_C_11_what_a_head_says_counts_for_nothing(tmp_path, lie):
    """HEAD ≠ GET: what is pulled is what was sent, checked against the manifest."""
    config = Descriptor("application/x", Digest.of(b"{}"), 2)
    content = manifest_of(config)

    async def answer(request: web.Request) -> web.Response:
        if request.method == "HEAD":
            return web.Response(headers=lie)
        is_manifest = "/manifests/" in request.path
        return web.Response(
            body=content if is_manifest else b"{}",
            headers={"Content-Type": OCI_MANIFEST} if is_manifest else {},
        )

    async with serving(answer) as peer, client(peer) as remote, LayoutRegistry(tmp_path) as local:
        await copy(Place(remote, REPOSITORY), Tag("v1"), Place(local, REPOSITORY), tags=(Tag("v1"),))

        assert (await local.get_manifest(REPOSITORY, Tag("v1"))).content == content


async def test_C_12_a_verified_stream_ends_with_an_error_when_the_bytes_are_others():
    async with serving(content_of(CONTENT)) as peer, client(peer) as registry:
        async with registry.open_blob(REPOSITORY, Digest.of(CONTENT)) as body:
            assert await joined(verified(body, Digest.of(CONTENT))) == CONTENT
        async with registry.open_blob(REPOSITORY, UNKNOWN) as body:
            with pytest.raises(DigestInvalid):
                await joined(verified(body, UNKNOWN))


async def test_C_12_a_layer_of_another_length_is_refused_before_it_is_read(tmp_path):
    config = Descriptor("application/x", Digest.of(b"{}"), 2)

    async def answer(request: web.Request) -> web.Response:
        if "/manifests/" in request.path:
            return web.Response(body=manifest_of(config), headers={"Content-Type": OCI_MANIFEST})
        return web.Response(body=b"{} and more")

    async with serving(answer) as peer, client(peer) as remote, LayoutRegistry(tmp_path) as local:
        with pytest.raises(SizeInvalid):
            await copy(Place(remote, REPOSITORY), Tag("v1"), Place(local, REPOSITORY))


# ---- bodies and lists without end


async def endless(request: web.Request) -> web.StreamResponse:
    """As much as the other side takes, and its length unsaid."""
    response = web.StreamResponse(headers={"Content-Type": OCI_MANIFEST})
    await response.prepare(request)
    try:
        while True:
            await response.write(b" " * 65536)
    except ConnectionError:
        return response


@pytest.mark.parametrize("headers", [{}, {"Content-Length": str(2**40)}], ids=["endless", "1 TiB"])
async def test_C_14_a_manifest_is_read_up_to_4_mib_and_no_further(headers):
    async def answer(request: web.Request) -> web.StreamResponse:
        if not headers:
            return await endless(request)
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        return response

    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved, match="4194304"):
            await registry.get_manifest(REPOSITORY, Tag("v1"))


async def test_C_14_a_blob_whose_length_is_unsaid_is_not_read():
    async with serving(endless) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved, match="how many"):
            await read_blob(registry, UNKNOWN)


async def test_C_14_an_error_without_end_is_an_error():
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=400)
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        except ConnectionError:
            return response

    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(OciError):
            await registry.get_manifest(REPOSITORY, Tag("v1"))


@pytest.mark.parametrize("body", [b'{"tags":["a"]}', b'{"tags":[]}'])
async def test_C_14_a_list_that_continues_at_itself_ends(body):
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Link": f'<{request.path_qs}>; rel="next"'})

    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved, match="without end"):
            _ = [tag async for tag in registry.tags(REPOSITORY)]

        assert len(peer.requests) == 1


async def test_C_14_a_list_with_ever_new_pages_ends(monkeypatch):
    monkeypatch.setattr("kitclient.remote._PAGE_COUNT_MAX", 20)

    async def answer(request: web.Request) -> web.Response:
        page = int(request.query.get("page", "0")) + 1
        return web.json_response(
            {"tags": [f"t{page}"]}, headers={"Link": f'<{request.path}?page={page}>; rel="next"'}
        )

    async with serving(answer) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved, match="without end"):
            _ = [tag async for tag in registry.tags(REPOSITORY)]

        assert len(peer.requests) == 20


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"tags":"x"}', b'{"tags":[1]}', b'{"tags":["../x"]}', b"[" * 100_000], ids=str
)
async def test_C_14_a_list_that_is_none_is_refused(body):
    async with serving(content_of(body)) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved):
            _ = [tag async for tag in registry.tags(REPOSITORY)]


async def test_C_14_a_manifest_of_more_layers_than_anybody_has_is_refused(tmp_path):
    layer = {"mediaType": "a/b", "digest": str(UNKNOWN), "size": 2}
    document = json.loads(manifest_of(Descriptor("x", UNKNOWN, 2))) | {"layers": [layer] * 30_000}
    content = json.dumps(document, separators=(",", ":")).encode()
    assert len(content) <= 4 * 1024 * 1024
    headers = {"Content-Type": OCI_MANIFEST}
    async with serving(content_of(content, **headers)) as peer, client(peer) as remote:
        async with LayoutRegistry(tmp_path) as local:
            with pytest.raises(OciError, match="30000 descriptors"):
                await copy(Place(remote, REPOSITORY), Tag("v1"), Place(local, REPOSITORY))

        assert len(peer.requests) == 1


async def test_C_14_a_subject_that_refers_to_itself_is_listed_once():
    content = index_of(*[Descriptor(OCI_MANIFEST, UNKNOWN, 2)] * 3)
    async with serving(content_of(content, **{"Content-Type": OCI_INDEX})) as peer, client(peer) as registry:
        found = [descriptor.digest async for descriptor in registry.referrers(REPOSITORY, UNKNOWN)]

        assert found == [UNKNOWN]
        assert len(peer.requests) == 1


async def test_C_14_a_token_without_end_is_refused():
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path == "/token":
            return await endless(request)
        field = f'Bearer realm="http://{request.host}/token"'
        return web.Response(status=401, headers={"WWW-Authenticate": field})

    async with serving(answer) as peer, client(peer, credentials=credentials) as registry:
        with pytest.raises(ServerMisbehaved, match="1048576"):
            await registry.ping()


async def test_C_14_indexes_nested_without_end_are_refused(tmp_path):
    """Each index lists one more, made when it is asked for."""
    documents: dict[str, bytes] = {}
    child = index_of()
    for _ in range(40):
        documents[Digest.of(child)] = child
        child = index_of(Descriptor(OCI_INDEX, Digest.of(child), len(child)))

    async def answer(request: web.Request) -> web.Response:
        content = documents.get(request.path.rpartition("/")[2], child)
        return web.Response(body=content, headers={"Content-Type": OCI_INDEX})

    async with serving(answer) as peer, client(peer) as remote, LayoutRegistry(tmp_path) as local:
        with pytest.raises(ServerMisbehaved, match="levels"):
            await copy(Place(remote, REPOSITORY), Tag("v1"), Place(local, REPOSITORY))


# ---- where credentials go


def shown(wanting: str) -> str | None:
    """What a registry of this kind gets to see."""
    return SECRET.basic if wanting == "basic" else f"Bearer {TOKEN}"


def login_of(wanting: str) -> Callable[[Answer], Answer]:
    return wanting_login if wanting == "basic" else wanting_token


@LOGINS
@pytest.mark.parametrize("authority", ["127.0.0.1:{port}", "other.example:{port}"], ids=["port", "host"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_C_22_a_redirected_download_takes_no_credentials_along(authority, status, wanting):
    """V-67: neither the first Authorization nor a second. V-42: nor a token."""
    async with serving(content_of(CONTENT)) as store:
        target = f"http://{authority.format(port=store.port)}/blob?X-Signature=a%2Fb%3D&x=%20"
        answer = login_of(wanting)(redirect_to(target, status))
        async with serving(answer) as peer, client(peer, credentials=credentials) as registry:
            assert await read_blob(registry, Digest.of(CONTENT)) == CONTENT

        assert peer.authorizations[0] == []
        assert peer.authorizations[-1] == [shown(wanting)]
        assert store.authorizations == [[]]
        assert store.asked == ["GET /blob?X-Signature=a%2Fb%3D&x=%20"]


async def test_C_23_what_leads_away_and_back_takes_no_credentials_along():
    async with serving(not_found) as store:

        async def answer(request: web.Request) -> web.Response:
            if request.path == "/back":
                return web.Response(body=CONTENT)
            return web.Response(status=307, headers={"Location": f"http://{store.host}/away"})

        async with serving(wanting_login(answer)) as peer, client(peer, credentials=credentials) as registry:
            store.answer = redirect_to(f"http://{peer.host}/back")
            with pytest.raises(Unauthorized, match="it gets none"):
                await read_blob(registry, Digest.of(CONTENT))

            assert peer.requests[-1].path == "/back"
            assert peer.authorizations[-1] == []


@LOGINS
@pytest.mark.parametrize(
    "challenge",
    ['Basic realm="r"', 'Bearer realm="http://{host}/token",service="s"'],
    ids=["basic", "bearer"],
)
async def test_C_24_a_challenge_of_the_redirected_host_is_not_answered(challenge, wanting):
    async def store_answer(request: web.Request) -> web.Response:
        return web.Response(status=401, headers={"WWW-Authenticate": challenge.format(host=request.host)})

    async with serving(store_answer) as store:
        answer = login_of(wanting)(redirect_to(f"http://{store.host}/x"))
        async with serving(answer) as peer, client(peer, credentials=credentials) as registry:
            # The second time nothing is asked of us before the redirect.
            for _ in range(2):
                with pytest.raises(Unauthorized, match="it gets none"):
                    await read_blob(registry, UNKNOWN)

        assert store.asked == ["GET /x"] * 2
        assert store.authorizations == [[]] * 2


@pytest.mark.parametrize("authority", ["127.0.0.1:{port}", "other.example:{port}"], ids=["port", "host"])
async def test_C_20_an_upload_location_elsewhere_gets_no_credentials(authority):
    async def created(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=201)

    async with serving(created) as store:

        async def answer(request: web.Request) -> web.Response:
            if request.method == "HEAD":
                return web.Response(status=404)
            location = f"http://{authority.format(port=store.port)}/up?state=a%2Fb"
            return web.Response(status=202, headers={"Location": location})

        async with serving(wanting_login(answer)) as peer, client(peer, credentials=credentials) as registry:
            await registry_put(registry, CONTENT)

        assert store.asked == [f"PUT /up?state=a%2Fb&digest={Digest.of(CONTENT)}"]
        assert store.authorizations == [[]]


@LOGINS
async def test_C_20_an_upload_that_moves_elsewhere_leaves_the_credentials_behind(monkeypatch, wanting):
    monkeypatch.setattr("kitclient.remote_upload.CHUNK_SIZE", 4000)

    async def store_answer(request: web.Request) -> web.Response:
        await request.read()
        last = request.headers.get("Content-Range", "").rpartition("-")[2]
        headers = {"Location": f"http://{request.host}/up", "Range": f"0-{last}"}
        return web.Response(status=201 if request.method == "PUT" else 202, headers=headers)

    async with serving(store_answer) as store:

        async def answer(request: web.Request) -> web.Response:
            await request.read()
            if request.method == "HEAD":
                return web.Response(status=404)
            moved = request.method == "PATCH"
            location = f"http://{store.host}/up" if moved else "/v2/lib/a/blobs/uploads/1"
            return web.Response(status=202, headers={"Location": location, "Range": "0-3999"})

        async with (
            serving(login_of(wanting)(answer)) as peer,
            client(peer, credentials=credentials) as registry,
        ):
            await registry_put(registry, CONTENT)

        assert [request.method for request in store.requests] == ["PATCH", "PATCH", "PUT"]
        assert store.authorizations == [[]] * 3


async def registry_put(registry, content: bytes) -> None:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def read(offset: int):
        async def chunks():
            yield content[offset:]

        yield chunks()

    await registry.put_blob(REPOSITORY, Descriptor("application/x", Digest.of(content), len(content)), read)


@pytest.mark.parametrize(
    "location", ["/v2/lib/a/blobs/uploads/1", "/v2/lib/a/blobs/uploads/1?_state=a%3D", "1?x=y"]
)
async def test_C_21_an_upload_location_may_be_relative_and_have_a_query(location):
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        if request.method == "POST":
            return web.Response(status=202, headers={"Location": location})
        return web.Response(status=201)

    async with serving(wanting_login(answer)) as peer, client(peer, credentials=credentials) as registry:
        await registry_put(registry, CONTENT)

    sent = peer.requests[-1]
    assert sent.path == "/v2/lib/a/blobs/uploads/1"
    assert sent.query["digest"] == Digest.of(CONTENT)
    assert peer.authorizations[-1] == [SECRET.basic]


@pytest.mark.parametrize(
    "link",
    [
        "http://other.example/v2/lib/a/tags/list?last=x",
        "//other.example/v2/lib/a/tags/list",
        "/v2/secret/b/tags/list",
        "file:///etc/passwd",
        "http://127.0.0.1:1/v2/lib/a/tags/list",
    ],
)
async def test_C_25_a_list_that_continues_elsewhere_is_refused(link):
    async def answer(request: web.Request) -> web.Response:
        _ = request
        return web.json_response({"tags": ["a"]}, headers={"Link": f'<{link}>; rel="next"'})

    async with serving(wanting_login(answer)) as peer, client(peer, credentials=credentials) as registry:
        with pytest.raises(ServerMisbehaved):
            _ = [tag async for tag in registry.tags(REPOSITORY)]

        assert len(peer.requests) == 2


@pytest.mark.parametrize(
    "media_type", ["application/x", "application/vnd.oci.image.layer.nondistributable.v1.tar"]
)
@pytest.mark.parametrize("url", ["http://{host}/blob", "file:///etc/passwd", "gopher://x.example/"])
async def test_C_26_the_urls_of_a_descriptor_are_not_followed(tmp_path, media_type, url):
    """V-42: foreign layers. They come from the registry, or not at all."""
    config = Descriptor("application/x", Digest.of(b"{}"), 2)
    async with serving(content_of(CONTENT)) as store:
        urls = (url.format(host=store.host),)
        layer = Descriptor(media_type, Digest.of(CONTENT), len(CONTENT), urls=urls)
        manifest = manifest_of(config, layer)

        async def answer(request: web.Request) -> web.Response:
            if "/manifests/" in request.path:
                return web.Response(body=manifest, headers={"Content-Type": OCI_MANIFEST})
            return (
                web.Response(body=b"{}") if request.path.endswith(config.digest) else await not_found(request)
            )

        async with serving(answer) as peer, client(peer) as remote, LayoutRegistry(tmp_path) as local:
            # One that need not be distributed may be left out: what matters is where it is not looked for.
            with contextlib.suppress(OciError):
                await copy(Place(remote, REPOSITORY), Tag("v1"), Place(local, REPOSITORY))

    assert store.requests == []


@pytest.mark.parametrize("where", ["redirect", "upload location", "realm"])
@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.1:{port}/x", "http://169.254.169.254/x", "file:///etc/passwd", "gopher://x.example/"],
)
async def test_C_26_a_public_registry_cannot_send_us_into_our_own_network(where, target):
    """V-46."""
    async with serving(content_of(CONTENT)) as inside:
        url = target.format(port=inside.port)

        async def answer(request: web.Request) -> web.Response:
            _ = request
            if where == "realm":
                return web.Response(status=401, headers={"WWW-Authenticate": f'Bearer realm="{url}"'})
            return web.Response(status=307 if where == "redirect" else 202, headers={"Location": url})

        async with (
            serving(answer) as peer,
            client(peer, host="registry.example", credentials=credentials) as registry,
        ):
            asking = (
                registry_put(registry, CONTENT)
                if where == "upload location"
                else read_blob(registry, UNKNOWN)
            )
            with pytest.raises(ServerMisbehaved):
                await asking

    assert inside.requests == []


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://a.localhost./",
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://0.0.0.0/",
        "http://2130706433/",
        "http://127.1/",
        "http://0x7f000001/",
        "file:///etc/passwd",
        "gopher://x.example/",
        "ftp://x.example/",
        "http://user:word@x.example/",
        "http://x.example\\@registry.example/",
        "http://x.example/\r\nX: y",
        "http://x.example/ x",
        "http://x.example:99999/",
        "",
    ],
)
def test_C_26_a_url_into_our_own_network_or_of_another_kind_is_refused(target):
    origin = URL("http://registry.example/")

    with pytest.raises(ServerMisbehaved):
        follow(origin, target, origin=origin, what="Location")


def test_C_27_a_url_from_https_down_to_http_is_refused():
    origin = URL("https://registry.example/")

    for target in ("http://registry.example/x", "http://other.example/x"):
        with pytest.raises(ServerMisbehaved, match="down"):
            follow(origin, target, origin=origin, what="redirect")
    assert (
        follow(origin, "https://other.example/x?a=%2F", origin=origin, what="redirect").raw_query_string
        == "a=%2F"
    )
    with pytest.raises(ServerMisbehaved, match="down"):
        follow(URL("https://other.example/"), "http://third.example/", origin=origin, what="redirect")


@pytest.mark.parametrize(
    "host", ["example.com", "8.8.8.8", "2001:4860:4860::8888", "1e100.net", "localhost.example.com"]
)
def test_a_public_host_is_not_local(host):
    assert not is_local(host)


async def test_C_28_redirects_in_a_circle_end():
    async with serving(redirect_to("/v2/again")) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved, match="redirects"):
            await read_blob(registry, UNKNOWN)

        assert len(peer.requests) == 6


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_C_29_a_write_is_not_turned_into_a_read(status):
    async with serving(redirect_to("/v2/x", status)) as peer, client(peer) as registry:
        with pytest.raises(ServerMisbehaved, match="redirect"):
            await push_blob(registry, CONTENT)

        assert len(peer.requests) == 1


async def test_C_30_plain_http_on_the_https_port_is_an_error_and_no_downgrade():
    from kitclient.remote import RemoteRegistry

    async with serving(not_found) as peer, RemoteRegistry(peer.host) as registry:
        with pytest.raises(TransportRefused, match="--plain-http"):
            await registry.ping()

        assert peer.requests == []


async def test_C_33_credentials_never_pass_a_proxy_in_clear():
    async def answer(request: web.Request) -> web.Response:
        _ = request
        return basic_challenge()

    async with serving(answer) as proxy:
        settings = {"proxy": f"http://proxy-user:proxy-word@{proxy.host}", "credentials": credentials}
        async with client(proxy, host="registry.example", **settings) as registry:
            with pytest.raises(TransportRefused, match="proxy"):
                await registry.ping()

    assert proxy.authorizations == [[]]
    assert ["Proxy-Authorization" in request.headers for request in proxy.requests] == [True]


async def test_C_33_proxy_credentials_never_reach_the_registry(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy-user:proxy-word@127.0.0.1:1")
    async with serving(content_of(b"{}")) as peer, client(peer) as registry:
        await registry.ping()

    assert "Proxy-Authorization" not in peer.requests[0].headers


async def test_V_67_there_is_never_more_than_one_authorization_field():
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=CONTENT)

    async with serving(wanting_login(answer)) as peer, client(peer, credentials=credentials) as registry:
        for _ in range(3):
            await read_blob(registry, Digest.of(CONTENT))

    assert all(len(fields) <= 1 for fields in peer.authorizations)
    assert "Cookie" not in peer.requests[-1].headers


async def test_a_password_is_never_part_of_a_message(caplog):
    async with serving(wanting_login(not_found)) as peer, client(peer, credentials=credentials) as registry:
        with pytest.raises(ManifestUnknown) as refusal:
            await registry.get_manifest(REPOSITORY, Tag("v1"))

    assert SECRET.password not in f"{refusal.value!r}{SECRET!r}{caplog.text}"


async def test_a_server_that_says_nothing_is_given_up_on():
    gate = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        _ = request
        await gate.wait()
        return web.Response()

    async with serving(answer) as peer, client(peer) as registry:
        url = registry.transport.url("/v2/")
        with pytest.raises(RegistryUnreachable, match="silent"):
            async with registry.transport.request("GET", url, scope="", idle_s=0.05, retry=False):
                pass
        gate.set()
