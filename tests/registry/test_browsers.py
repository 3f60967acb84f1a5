"""What a browser could be made to do with this registry: the U- rows of the threat model. There is no page of ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from kitspec.digest import Digest
from registry.routes import ROUTES, Endpoint
from tests.registry.auth.logins import basic, written
from tests.registry.conftest import Serve
from tests.registry.kits import tar_of, whole_kit
from tests.registry.wire import (
    OCI_MANIFEST,
    Reply,
    Wire,
    WireWith,
    assert_refused,
    encode,
    image,
    parse_reply,
)

NAME = "team/kit"
HOST = "https://reg.example"
ALICE = basic("alice", "secret")
WRITES = [
    ("POST", f"/v2/{NAME}/blobs/uploads/"),
    ("POST", f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(b'x')}"),
    ("POST", f"/v2/{NAME}/blobs/uploads/?mount={Digest.of(b'x')}&from=public/kit"),
    ("PATCH", f"/v2/{NAME}/blobs/uploads/{'0' * 32}"),
    ("PUT", f"/v2/{NAME}/blobs/uploads/{'0' * 32}?digest={Digest.of(b'x')}"),
    ("DELETE", f"/v2/{NAME}/blobs/uploads/{'0' * 32}"),
    ("PUT", f"/v2/{NAME}/manifests/v1"),
    ("DELETE", f"/v2/{NAME}/manifests/v1"),
    ("DELETE", f"/v2/{NAME}/blobs/{Digest.of(b'x')}"),
    ("POST", "/v2/_modelkit/apikeys"),
    ("DELETE", f"/v2/_modelkit/apikeys/{'0' * 32}"),
]
ELSEWHERE: list[Mapping[str, str]] = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "https://other.reg.example"},
    {"Sec-Fetch-Site": "cross-site", "Origin": HOST},
    {"Origin": "https://evil.example"},
    {"Origin": "https://reg.example.evil.example"},
    {"Origin": "https://reg.example@evil.example"},
    {"Origin": "https://reg.example:8443"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "https://evil.example/" + "x" * 2000},
]
FROM_HERE: list[Mapping[str, str]] = [
    {},
    {"Sec-Fetch-Site": "same-origin", "Origin": HOST},
    {"Sec-Fetch-Site": "none"},
    {"Origin": HOST},
    {"Origin": "HTTPS://REG.EXAMPLE"},
    {"Origin": "http://behind.proxy:5000", "Host": "behind.proxy:5000"},
]


@pytest.fixture
async def wire(serve: Serve, tmp_path: Path) -> AsyncIterator[Wire]:
    """A registry where alice may do everything."""
    users = written(tmp_path / "htpasswd", {"alice": "secret"})
    async with serve(auth={"htpasswd": {"path": str(users)}, "apikeys": {}}, http={"host": HOST}) as url:
        yield Wire(url)


def test_U_04_every_write_is_asked_here() -> None:
    of_reads = {Endpoint.HUB, Endpoint.TOKEN}
    writes = [route for route in ROUTES if route.method != "GET" and route.endpoint not in of_reads]

    assert len({(method, path.partition("?")[0]) for method, path in WRITES}) == len(writes)


@pytest.mark.parametrize("fields", ELSEWHERE, ids=str)
async def test_U_04_a_page_elsewhere_writes_nothing_with_what_a_browser_remembers(
    wire: Wire, fields: Mapping[str, str]
) -> None:
    for method, target in WRITES:
        reply = await wire(
            method, target, headers={**ALICE, "Content-Type": "text/plain", **fields}, body=b"x"
        )

        assert_refused(reply, 403, code="DENIED")
        assert len(reply.body) < 500
    assert (await wire("GET", "/v2/_catalog", headers=ALICE)).json() == {"repositories": []}


@pytest.mark.parametrize("fields", FROM_HERE, ids=str)
async def test_U_04_clients_and_pages_under_our_own_address_are_not_affected(
    wire: Wire, fields: Mapping[str, str]
) -> None:
    target = f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(b'x')}"

    assert (await wire("POST", target, headers={**ALICE, **fields}, body=b"x")).status == 201


async def test_U_04_where_nobody_logs_in_a_page_elsewhere_writes_nothing_either(registry_url: str) -> None:
    wire = Wire(registry_url)

    reply = await wire("POST", f"/v2/{NAME}/blobs/uploads/", headers={"Origin": "https://evil.example"})

    assert_refused(reply, 403, code="DENIED")


@pytest.mark.parametrize(("has_accounts", "status"), [(False, 201), (True, 401)])
async def test_A_38_a_page_whose_name_was_led_here_is_only_kept_out_where_somebody_logs_in(
    serve: Serve, tmp_path: Path, has_accounts: bool, status: int
) -> None:
    """DNS rebinding: to the browser we are the page's own server, of which it remembers no password."""
    users = written(tmp_path / "htpasswd", {"alice": "secret"})
    page = {
        "Host": "evil.example:5000",
        "Origin": "http://evil.example:5000",
        "Sec-Fetch-Site": "same-origin",
    }
    async with serve(auth={"htpasswd": {"path": str(users)}} if has_accounts else None) as url:
        reply = await Wire(url)(
            "POST", f"/v2/{NAME}/blobs/uploads/?digest={Digest.of(b'x')}", headers=page, body=b"x"
        )

    assert reply.status == status


async def test_U_04_what_a_page_elsewhere_asks_for_it_may_not_read(wire: Wire) -> None:
    """Neither a preflight nor an answer says that it may; what is read is sent, as to anybody with the password."""
    for fields in ELSEWHERE:
        asking = {**fields, "Access-Control-Request-Method": "PUT"}
        for reply in (
            await wire("GET", "/v2/_catalog", headers={**ALICE, **fields}),
            await wire("OPTIONS", f"/v2/{NAME}/manifests/v1", headers=asking),
        ):
            assert not [name for name in reply.headers if name.lower().startswith("access-control-")]


# ---- nothing that runs


async def test_U_01_there_is_no_page_and_no_answer_that_a_browser_takes_for_one(wire: Wire) -> None:
    accepting = {**ALICE, "Accept": "text/html,*/*"}
    targets = (
        "/",
        "/index.html",
        "/ui",
        "/favicon.ico",
        "/v2/",
        "/v2/_catalog",
        "/hf/",
        "/metrics",
        "/livez",
    )

    for target in targets:
        assert_no_page(await wire("GET", target, headers=accepting))
    for malformed in (
        b"GET / HTTP/9.9\r\nAccept: text/html\r\n\r\n",
        b"GET /<script>alert(1)</script> HTTP/1.1\r\nAccept: text/html\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nAccept: text/html\r\nHost: x\r\nX: " + b"<b>" * 5000 + b"\r\n\r\n",
        b"GET /v2/ HTTP/1.1\r\nAccept: text/html\r\nHost: x\r\n" + b"A: b\r\n" * 300 + b"\r\n",
    ):
        reply = parse_reply(await wire.converse([malformed]), "GET")
        assert 400 <= reply.status < 500
        assert_no_page(reply)


def assert_no_page(reply: Reply) -> None:
    assert reply.headers.get_content_type() in {"application/json", "text/plain"}
    assert reply.header("X-Content-Type-Options") == "nosniff"
    assert "Set-Cookie" not in reply.headers


async def test_U_01_no_answer_loses_nosniff_when_others_are_configured(serve: Serve) -> None:
    for headers, expected in (
        ({"X-Frame-Options": ["DENY"]}, ["nosniff"]),
        ({"x-content-type-options": ["nosniff"]}, ["nosniff"]),
    ):
        async with serve(http={"headers": headers}) as url:
            reply = await Wire(url)("GET", "/v2/")
            assert reply.headers.get_all("X-Content-Type-Options") == expected


@pytest.mark.parametrize(
    "media_type",
    ["text/html", "text/html; charset=utf-8", "image/svg+xml", "application/xhtml+xml", "text/xml"],
)
async def test_U_03_a_page_is_no_manifest(wire: Wire, media_type: str) -> None:
    await WireWith(wire, ALICE).push_image(NAME, "v1")
    for content in (
        encode(image()),
        encode({**image(), "mediaType": media_type}),
        b"<script>alert(1)</script>",
    ):
        reply = await wire(
            "PUT",
            f"/v2/{NAME}/manifests/page",
            headers={**ALICE, "Content-Type": media_type},
            body=content,
        )
        assert_refused(reply, 400, 415, code="MANIFEST_INVALID")
    assert (await wire("GET", f"/v2/{NAME}/manifests/page", headers=ALICE)).status == 404


XSS = [
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "<math><mtext><img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "data:text/html,<script>alert(1)</script>",
]


async def test_U_20_what_somebody_wrote_is_sent_as_data_and_never_as_a_page(wire: Wire) -> None:
    alice = WireWith(wire, ALICE)
    kit = whole_kit()
    kit.annotations = {f"key {text}": text for text in XSS} | {"org.opencontainers.image.description": XSS[0]}
    kit.layers[0][1]["description"] = XSS[1]
    kit.add("docs", "notes", tar_of({f"notes/{text}": text.encode() for text in XSS if "/" not in text}))
    kit.add(
        "docs", "pages", tar_of({"pages/README.md": "\n".join(XSS).encode(), "pages/x.html": XSS[0].encode()})
    )
    digest = await kit.push(alice, NAME)
    modelkit = f"/v2/{NAME}/_modelkit"

    for target in (
        f"/v2/{NAME}/manifests/v1",
        f"/v2/{NAME}/manifests/{digest}",
        f"/v2/{NAME}/blobs/{Digest.of(kit.config)}",
        f"/v2/{NAME}/referrers/{digest}?artifactType={quote(XSS[0])}",
        f"{modelkit}/files/v1",
        f"{modelkit}/files/v1/pages/README.md",
        f"{modelkit}/files/v1/pages/x.html",
        *(f"{modelkit}/files/v1/notes/{quote(text)}" for text in XSS if "/" not in text),
        f"{modelkit}/kitfile/v1",
        f"/hf/api/models/{NAME}",
        f"/hf/api/models/{NAME}/tree/main?recursive=true",
        f"/hf/{NAME}/resolve/v1/x.html",
        *(f"/hf/api/models?search={quote(text)}" for text in XSS),
        *(f"/v2/{NAME}/manifests/{quote(text, safe='')}" for text in XSS),
        *(f"/v2/{quote(text)}/tags/list" for text in XSS),
        *(f"/v2/_catalog?n={quote(text)}" for text in XSS),
        *(f"{modelkit}/files/v1?filter={quote(text)}" for text in XSS),
    ):
        reply = await alice("GET", target)

        assert reply.status < 500, target
        kind = reply.headers.get_content_type()
        assert kind in DATA or kind.startswith("application/vnd."), (target, kind)
        assert reply.header("X-Content-Type-Options") == "nosniff"


DATA = {"application/json", "application/octet-stream", "application/yaml", "text/markdown", "text/plain"}


async def test_U_31_a_table_is_sent_as_it_was_pushed_and_none_is_made_here(wire: Wire) -> None:
    alice, table = WireWith(wire, ALICE), b"=HYPERLINK(1),@x,+1,-1\r\n"
    kit = whole_kit()
    kit.add("dataset", "tables", tar_of({"tables/x.csv": table}))
    await kit.push(alice, NAME)

    assert (await alice("GET", f"/v2/{NAME}/_modelkit/files/v1/tables/x.csv")).body == table
    for target in (
        "/v2/_catalog",
        f"/v2/{NAME}/tags/list",
        f"/v2/{NAME}/_modelkit/files/v1",
        "/v2/_modelkit/apikeys",
    ):
        reply = await alice("GET", f"{target}?format=csv", headers={"Accept": "text/csv"})
        assert reply.headers.get_content_type() == "application/json"


DISGUISES = {
    "right to left": "\u202egnp.exe",
    "zero width": "te\u200bam",
    "another alphabet": "te\u0430m",
    "full width": "\uff54eam",
    "ANSI": "a\x1b[31mb",
    "C1": "a\x9bb",
    "bell": "a\x07b",
    "Turkish": "\u0130",
    "Kelvin": "\u212a",
}


@pytest.mark.parametrize("disguise", DISGUISES)
async def test_U_30_a_name_is_not_disguised(wire: Wire, disguise: str) -> None:
    alice, text = WireWith(wire, ALICE), quote(DISGUISES[disguise], safe="")
    await alice.push_image(NAME, "v1")

    for method, target in (
        ("GET", f"/v2/{text}/tags/list"),
        ("POST", f"/v2/{text}/blobs/uploads/"),
        ("GET", f"/v2/{NAME}/manifests/{text}"),
        ("GET", f"/hf/api/models/{text}"),
    ):
        assert_refused(await alice(method, target), 400, 404)
    reply = await alice(
        "PUT", f"/v2/{NAME}/manifests/{text}", headers={"Content-Type": OCI_MANIFEST}, body=encode(image())
    )
    assert_refused(reply, 400)
    assert reply.body.isascii()
    assert (await alice("GET", f"/v2/{NAME}/tags/list")).json()["tags"] == ["v1"]


# ---- no login page


async def test_U_10_V_21_nothing_leads_elsewhere_after_a_login(wire: Wire) -> None:
    for name in ("redirect", "redirect_uri", "next", "return_to", "url"):
        for target in (
            "//evil.example",
            "/%5cevil.example",
            "https:evil.example",
            "%0d%0aLocation:%20https://evil.example",
        ):
            for path in ("/v2/", "/v2/_catalog", "/hf/api/whoami-v2", "/login", "/v2/token", "/"):
                for headers in (ALICE, {}):
                    reply = await wire("GET", f"{path}?{name}={target}", headers=headers)
                    assert reply.status in {200, 401, 404}
                    assert "Location" not in reply.headers
                    assert "evil" not in str(reply.headers)


async def test_U_10_who_is_nobody_and_who_is_wrong_are_told_the_same(wire: Wire) -> None:
    """How fast they may try is of test_logging_in.py, and how long an answer takes of test_htpasswd.py (A-24)."""
    answers = [
        await wire("GET", "/v2/", headers=basic(user, password))
        for user, password in (
            ("alice", "wrong"),
            ("nobody", "wrong"),
            ("nobody", "secret"),
            ("Alice", "secret"),
        )
    ]

    assert {(reply.status, reply.body) for reply in answers} == {(401, answers[0].body)}
    assert len({reply.header("WWW-Authenticate") for reply in answers}) == 1


async def test_U_10_V_20_a_key_is_given_back_and_is_for_nobody_more_than_its_maker(wire: Wire) -> None:
    alice = WireWith(wire, ALICE)
    typed = {"Content-Type": "application/json"}
    for wish in (
        {"admin": True},
        {"owner": "root"},
        {"groups": ["admins"]},
        {"id": "0" * 32},
        {"key": "mkr_x"},
    ):
        reply = await alice("POST", "/v2/_modelkit/apikeys", headers=typed, body=encode(wish))
        assert_refused(reply, 400)
    made = (await alice("POST", "/v2/_modelkit/apikeys", headers=typed, body=b"{}")).json()
    with_key = {"Authorization": f"Bearer {made['key']}"}
    assert (await wire("GET", "/v2/", headers=with_key)).status == 200

    assert (await alice("DELETE", f"/v2/_modelkit/apikeys/{made['id']}")).status == 204

    assert_refused(await wire("GET", "/v2/", headers=with_key), 401)
