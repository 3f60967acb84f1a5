"""HTTP as an attacker or a broken client speaks it."""

import asyncio
import logging
import re
import socket
from pathlib import Path

import pytest

from kitspec.digest import Digest
from registry.routes import ROUTES, Endpoint, Route, target_of
from tests.registry.conftest import Serve
from tests.registry.test_bad_input_names import resident_bytes
from tests.registry.wire import (
    LAYER,
    OCI_MANIFEST,
    Wire,
    assert_discreet,
    assert_refused,
    assert_refused_by_parser,
    encode,
    image,
    parse_reply,
)

MIB = 1024 * 1024


@pytest.fixture
def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


GET_BASE = b"GET /v2/ HTTP/1.1\r\nHost: x\r\n"
PUT_MANIFEST = b"PUT /v2/lib/a/manifests/v1 HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        PUT_MANIFEST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        PUT_MANIFEST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        PUT_MANIFEST + b"Content-Length: +3\r\n\r\nabc",
        PUT_MANIFEST + b"Content-Length: 3, 3\r\n\r\nabc",
        PUT_MANIFEST + b"Content-Length: -1\r\n\r\n",
        PUT_MANIFEST + b"Content-Length: 0x3\r\n\r\nabc",
        PUT_MANIFEST + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
        PUT_MANIFEST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        PUT_MANIFEST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        PUT_MANIFEST + b"Content-Length : 3\r\n\r\nabc",
        GET_BASE + b"X-Folded: a\r\n b\r\n\r\n",
        GET_BASE + b"Host: y\r\n\r\n",
        GET_BASE + b"No colon\r\n\r\n",
        GET_BASE + b"X-Nul: a\0b\r\n\r\n",
        GET_BASE + b"X-Return: a\rb\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\n\r\n",
        b"GET /v2/\r\n\r\n",
        b"GET /v2/ HTTP/9.9\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v2/\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n",
    ],
    ids=lambda content: repr(content.removeprefix(PUT_MANIFEST).removeprefix(GET_BASE)[:60]),
)
async def test_B_120_V_62_what_could_be_read_in_two_ways_is_400_and_the_connection_ends(
    wire: Wire, request_bytes: bytes
) -> None:
    answer = await wire.converse([request_bytes])

    assert len(re.findall(rb"HTTP/1\.[01] \d{3} ", answer)) <= 1
    if answer:
        assert_refused_by_parser(answer, 400, 501, 505)
    assert (await wire("GET", "/v2/_catalog")).json() == {"repositories": []}


async def test_B_120_a_bare_line_feed_smuggles_no_second_request(wire: Wire) -> None:
    answer = await wire.converse(
        [b"GET /v2/ HTTP/1.1\nHost: x\nConnection: close\n\nGET /livez HTTP/1.1\r\nHost: x\r\n\r\n"]
    )

    assert answer.count(b"HTTP/1.1 2") <= 1


async def test_B_120_an_absolute_target_is_judged_by_its_path(wire: Wire) -> None:
    answer = await wire.converse(
        [b"GET http://evil.example/v2/_catalog HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]
    )

    reply = parse_reply(answer, "GET")
    assert reply.status in {200, 400, 404}
    assert_discreet(reply)
    assert b"evil" not in answer


@pytest.mark.parametrize(
    "target", ["*", "evil.example:443", "http://", "?", "/%", "/v2/?" + "a" * 20_000, "/" + "a" * 20_000]
)
@pytest.mark.parametrize("method", ["GET", "OPTIONS", "CONNECT"])
async def test_B_120_an_odd_target_is_refused(wire: Wire, method: str, target: str) -> None:
    answer = await wire.converse(
        [f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()]
    )

    if answer:
        reply = parse_reply(answer, method)
        assert 400 <= reply.status < 500
        assert_discreet(reply)


@pytest.mark.parametrize(
    "target",
    ["/v2/_catalog/", "//v2/_catalog", "/v2/%5fcatalog", "/V2/_catalog", "/v2/./_catalog", "/v2/_CATALOG"],
)
async def test_V_18_a_path_that_only_looks_like_an_endpoint_is_404(wire: Wire, target: str) -> None:
    assert_refused(await wire("GET", target), 404)


async def test_B_123_v2_without_a_slash_is_the_base_or_leads_there(wire: Wire) -> None:
    reply = await wire("GET", "/v2")

    assert reply.status in {200, 301, 308}
    if reply.status != 200:
        assert reply.header("Location").endswith("/v2/")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Long": "a" * 9_000},
        {f"X-{n}": "a" for n in range(200)},
        {"Authorization": "Bearer " + "." * 9_000},
    ],
    ids=["long field", "many fields", "long token"],
)
async def test_L_07_a_header_over_the_bounds_is_400_or_431(wire: Wire, headers: dict[str, str]) -> None:
    reply = await wire("GET", "/v2/", headers=headers)

    assert reply.status in {400, 431}
    assert_discreet(reply)


@pytest.mark.parametrize(
    "value", ["a\x80b", "\xff\xfe", "%0d%0aX-Evil: 1", "x" * 5_000, "\x1b[31m", "{}", "${jndi:ldap://x}"]
)
@pytest.mark.parametrize(
    "name",
    [
        "X-Request-Id",
        "User-Agent",
        "Accept",
        "Range",
        "If-None-Match",
        "Authorization",
        "Host",
        "Content-Range",
    ],
)
async def test_odd_field_values_change_nothing(wire: Wire, name: str, value: str) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={name: value})

    assert reply.status in {200, 206, 304, 400, 401, 416}
    assert_discreet(reply)
    assert "X-Evil" not in reply.headers
    assert all("\x1b" not in text for text in reply.headers.values())


async def test_B_124_L_02_a_body_that_stalls_is_ended_and_its_upload_goes_on(serve: Serve) -> None:
    async with serve(limits={"bodyidletimeout": 1.0}) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        reader, writer = await asyncio.open_connection(wire.host, wire.port)
        writer.write(
            f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode() + LAYER[:10]
        )

        async with asyncio.timeout(20):
            ended = await reader.read()
        writer.close()

        assert ended == b"" or b" 408 " in ended.splitlines()[0]
        await wire.until_held(upload, "0-9")
        rest = await wire("PATCH", upload, headers={"Content-Range": "10-999"}, body=LAYER[10:])
        assert rest.status == 202
        assert (await wire("PUT", f"{upload}?digest={Digest.of(LAYER)}")).status == 201


async def test_B_127_a_client_that_is_gone_leaves_no_stack_trace(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    digest = await wire.push_blob("lib/a", bytes(8 * MIB))
    requests = [
        f"GET /v2/lib/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
        PUT_MANIFEST + b"Content-Length: 100\r\n\r\nabc",
        b"POST /v2/lib/a/blobs/uploads/?digest=sha256:"
        + b"a" * 64
        + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc",
    ]

    with caplog.at_level(logging.WARNING):
        for request in requests * 5:
            gone = socket.create_connection((wire.host, wire.port))
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            gone.sendall(request)
            gone.close()
        assert (await wire("GET", "/v2/")).status == 200

    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []


async def test_parser_errors_leave_no_stack_trace(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(20):
            await wire.converse([b"\x16\x03\x01 \x1b[31m not HTTP\r\n\r\n"])

    assert all(record.exc_info is None for record in caplog.records)
    assert all("\x1b" not in record.getMessage() for record in caplog.records)


async def test_V_06_deletes_that_are_switched_off_are_405_and_change_nothing(serve: Serve) -> None:
    async with serve(storage={"delete": {"enabled": False}}) as url:
        wire = Wire(url)
        _, digest = await wire.push_image("lib/a")
        layer = Digest.of(LAYER)

        for target in ("manifests/v1", f"manifests/{digest}", f"blobs/{layer}"):
            assert_refused(await wire("DELETE", f"/v2/lib/a/{target}"), 405, code="UNSUPPORTED")
            assert (await wire("GET", f"/v2/lib/a/{target}")).status == 200
        # Giving up an upload is no deletion of content.
        assert (await wire("DELETE", await wire.begin_upload("lib/a"))).status == 204


async def test_read_only_mode_refuses_writes_and_serves_reads(serve: Serve) -> None:
    async with serve(storage={"maintenance": {"readonly": {"enabled": True}}}) as url:
        wire = Wire(url)
        assert (await wire("GET", "/v2/")).status == 200
        for method, target in (
            ("POST", "/v2/lib/a/blobs/uploads/"),
            ("PUT", "/v2/lib/a/manifests/v1"),
            ("DELETE", f"/v2/lib/a/blobs/{Digest.of(LAYER)}"),
        ):
            assert_refused(await wire(method, target), 405, 503)


async def test_B_54_L_14_a_blob_over_the_limit_is_413_before_it_is_read(serve: Serve) -> None:
    async with serve(limits={"blobsize": 1_000}) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        digest = Digest.of(b"x" * 1_001)
        for method, target in (
            ("PATCH", upload),
            ("PUT", f"{upload}?digest={digest}"),
            ("POST", f"/v2/lib/a/blobs/uploads/?digest={digest}"),
        ):
            for more in (b"", b"Expect: 100-continue\r\n"):
                head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1001\r\n".encode()
                answer = await wire.first_answer(head + more + b"\r\n")
                assert answer.startswith(b"HTTP/1.1 413 ")

        assert (await wire("GET", upload)).header("Range") == "0-0"
        chunked = await wire("PATCH", upload, body=[b"x" * 600, b"x" * 600])
        assert_refused(chunked, 413, code="SIZE_INVALID")
        await wire.push_blob("lib/a", b"x" * 1_000)


async def test_B_54_L_14_a_large_blob_over_the_limit_is_413_before_it_is_asked_for(serve: Serve) -> None:
    """Large enough for a thread to read it."""
    async with serve(limits={"blobsize": MIB}) as url:
        wire = Wire(url)
        upload = await wire.begin_upload("lib/a")
        fields = f"Host: x\r\nConnection: close\r\nContent-Length: {MIB + 1}\r\nExpect: 100-continue\r\n"

        answer = await wire.first_answer(f"PATCH {upload} HTTP/1.1\r\n{fields}\r\n".encode())

        assert answer.startswith(b"HTTP/1.1 413 ")


async def test_expect_100_continue_is_answered_before_the_body(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    reader, writer = await asyncio.open_connection(wire.host, wire.port)
    head = f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"

    async with asyncio.timeout(10):
        writer.write(head.encode())
        interim = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"abc")
        final = await reader.read()
    writer.close()

    assert interim.startswith(b"HTTP/1.1 100 ")
    assert final.startswith(b"HTTP/1.1 202 ")


async def test_expect_100_continue_is_not_answered_where_the_request_will_fail(wire: Wire) -> None:
    unknown = "/v2/lib/a/blobs/uploads/00000000-0000-4000-8000-000000000000"
    head = f"PATCH {unknown} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"

    answer = await wire.first_answer(head.encode())

    assert answer.startswith(b"HTTP/1.1 404 ")


async def test_L_15_open_uploads_are_bounded_and_429_says_when_to_come_back(serve: Serve) -> None:
    async with serve(limits={"uploads": 5, "uploadsperrepository": 3}) as url:
        wire = Wire(url)
        begun = [await wire.begin_upload("lib/a") for _ in range(3)]
        refused = await wire("POST", "/v2/lib/a/blobs/uploads/")

        assert_refused(refused, 429, code="TOOMANYREQUESTS")
        assert int(refused.header("Retry-After")) > 0
        await wire.begin_upload("lib/b")
        await wire.begin_upload("lib/b")
        assert_refused(await wire("POST", "/v2/lib/b/blobs/uploads/"), 429, code="TOOMANYREQUESTS")
        await wire("DELETE", begun[0])
        assert (await wire("POST", "/v2/lib/a/blobs/uploads/")).status == 202


DIGEST = Digest.of(LAYER)
TARGETS = {
    Endpoint.BASE: "/v2/",
    Endpoint.CATALOG: "/v2/_catalog",
    Endpoint.BLOB: f"/v2/lib/a/blobs/{DIGEST}",
    Endpoint.UPLOADS: "/v2/lib/a/blobs/uploads/",
    Endpoint.UPLOAD: "/v2/lib/a/blobs/uploads/none",
    Endpoint.MANIFEST: "/v2/lib/a/manifests/v1",
    Endpoint.TAGS: "/v2/lib/a/tags/list",
    Endpoint.REFERRERS: f"/v2/lib/a/referrers/{DIGEST}",
    Endpoint.DISCOVERY: "/v2/_oci/ext/discover",
    Endpoint.FILES: "/v2/lib/a/_modelkit/files/v1",
    Endpoint.FILE: "/v2/lib/a/_modelkit/files/v1/f",
    Endpoint.KITFILE: "/v2/lib/a/_modelkit/kitfile/v1",
    Endpoint.ARCHIVE: "/v2/lib/a/_modelkit/archive/v1",
    Endpoint.TENSORS: "/v2/lib/a/_modelkit/tensors/v1",
    Endpoint.TENSORS_OF_FILE: "/v2/lib/a/_modelkit/tensors/v1/f",
    Endpoint.HUB: "/hf/api/models/lib/a/paths-info/v1",
    Endpoint.LIVE: "/livez",
    Endpoint.READY: "/readyz",
    Endpoint.STARTED: "/startupz",
    Endpoint.METRICS: "/metrics",
    Endpoint.TOKEN: "/v2/token",
    Endpoint.API_KEYS: "/v2/_modelkit/apikeys",
    Endpoint.API_KEY: f"/v2/_modelkit/apikeys/{'0' * 16}",
}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.endpoint.name}")
async def test_V_33_no_route_reads_a_body_without_bound_into_memory(wire: Wire, route: Route) -> None:
    target = TARGETS[route.endpoint]
    found = target_of(target)
    assert found is not None
    assert found.endpoint is route.endpoint
    if route.endpoint is Endpoint.UPLOAD:
        target = f"{await wire.begin_upload('lib/a')}?digest={DIGEST}"
    before = resident_bytes()

    reply = await wire(route.method, target, headers={"Content-Type": OCI_MANIFEST}, body=[bytes(MIB)] * 64)

    assert_discreet(reply)
    # A blob in the memory backend is in memory, as it must be, until its digest turns out to be wrong.
    if route.endpoint is not Endpoint.UPLOAD:
        assert resident_bytes() - before < 32 * MIB


async def test_V_34_metrics_do_not_grow_with_what_clients_invent(wire: Wire) -> None:
    async def ask(numbers: range) -> set[bytes]:
        for number in numbers:
            agent = {"User-Agent": f"agent-{number}"}
            await wire("GET", f"/v2/name-{number}/tags/list", headers=agent)
            await wire("GET", f"/v2/lib/a/manifests/tag-{number}", headers=agent)
            await wire("GET", f"/path-{number}", headers=agent)
            await wire(f"METHOD{number}", "/v2/", headers=agent)
        lines = (await wire("GET", "/metrics")).body.splitlines()
        return {line.rpartition(b" ")[0] for line in lines if not line.startswith(b"#")}

    await ask(range(1))
    first = await ask(range(1, 5))
    second = await ask(range(5, 60))

    assert first
    assert second == first


async def test_every_answer_names_its_request_and_not_the_software_below(wire: Wire) -> None:
    for target in ("/v2/", "/nowhere", "/v2/lib/a/manifests/none"):
        reply = await wire("GET", target)
        assert reply.header("X-Request-Id")
        assert "aiohttp" not in str(reply.headers)
        assert "Python" not in str(reply.headers)
        assert reply.header("X-Content-Type-Options") == "nosniff"


async def test_a_trace_echoes_nothing(wire: Wire) -> None:
    reply = await wire("TRACE", "/v2/", headers={"Authorization": "Basic c2VjcmV0"})

    assert_refused(reply, 405)
    assert b"c2VjcmV0" not in reply.body


async def test_local_storage_names_no_folder_in_any_error(registry_url: str, tmp_path: Path) -> None:
    wire = Wire(registry_url)
    replies = [
        await wire("GET", f"/v2/lib/a/blobs/{Digest.of(b'none')}"),
        await wire("GET", "/v2/lib/a/manifests/none"),
        await wire(
            "PUT", "/v2/lib/a/manifests/v1", headers={"Content-Type": OCI_MANIFEST}, body=encode(image())
        ),
        await wire("GET", "/v2/none/tags/list"),
        await wire("PATCH", "/v2/lib/a/blobs/uploads/none", body=b"x"),
    ]

    for reply in replies:
        assert_refused(reply, 400, 404)
        assert str(tmp_path).encode() not in reply.body
