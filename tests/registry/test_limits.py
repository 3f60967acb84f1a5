"""The L- rows of the limits: at the limit, one over it, and far over it. None of them is answered with a 5xx, but for a full disk's 507.

Those of connections are in test_http_limits.py, of requests in flight in test_requests_in_flight.py, of quotas in test_quotas.py.
"""

import asyncio
import contextlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from kitspec.digest import Digest
from registry.config import Limits
from tests.registry.auth.logins import basic, written
from tests.registry.conftest import Serve, configured, served
from tests.registry.kits import Kit, compressed, tar_of
from tests.registry.wire import (
    LAYER,
    OCI_INDEX,
    OCI_MANIFEST,
    Wire,
    assert_refused,
    descriptor,
    encode,
    image,
    index,
    next_target,
)

MIB = 1024 * 1024
SOON_S = 20


@pytest.fixture
async def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


def deep(depth: int) -> bytes:
    """A manifest with something in it that nests so deep."""
    return encode(image(note="HERE")).replace(b'"HERE"', b"[" * (depth - 1) + b"]" * (depth - 1))


def wide(count: int) -> bytes:
    return encode(image(note=[0] * count))


def with_integer(digits: int) -> bytes:
    return encode(image(note="HERE")).replace(b'"HERE"', b"9" * digits)


def with_size(size: int) -> bytes:
    return encode(image()).replace(b'"size":2}', b'"size":%d}' % size)


def with_string(size: int) -> bytes:
    return encode(image(annotations={"a": "x" * size}))


@pytest.mark.parametrize(
    ("content", "is_taken"),
    [
        (deep(64), True),
        (deep(65), False),
        (deep(6400), False),
        (wide(190_000), True),
        (wide(200_001), False),
        (wide(2_000_000), False),
        (with_integer(300), True),
        (with_integer(301), False),
        (with_integer(30_000), False),
        (with_size(2**63), False),
        (with_size(2**6300), False),
        (with_string(MIB), True),
        (with_string(MIB + 1), False),
        (with_string(4 * MIB - 1000), False),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else value,
)
async def test_L_09_json_is_bounded_in_depth_nodes_integers_and_strings(
    wire: Wire, content: bytes, is_taken: bool
) -> None:
    await wire.push_image("lib/a")

    reply = await wire.put_manifest("lib/a", "v2", content, OCI_MANIFEST)

    if is_taken:
        assert reply.status == 201
    else:
        assert_refused(reply, 400, 413, code="MANIFEST_INVALID")


@pytest.mark.parametrize(("count", "is_taken"), [(20_000, True), (20_001, False)])
async def test_L_10_an_index_lists_no_more_than_twenty_thousand(
    wire: Wire, count: int, is_taken: bool
) -> None:
    await wire.push_blob("lib/a", b"{}")
    child = {"mediaType": "a/b", "digest": str(Digest.of(b"{}")), "size": 2}

    reply = await wire.put_manifest("lib/a", "wide", encode(index([child] * count)), OCI_INDEX)

    if is_taken:
        assert reply.status == 201
    else:
        assert_refused(reply, 400, code="MANIFEST_INVALID")


async def test_L_11_an_index_may_nest_eight_deep(wire: Wire) -> None:
    content, media_type = encode(image()), OCI_MANIFEST
    await wire.push_image("lib/a")
    statuses = []
    for _ in range(9):
        document = encode(index([descriptor(content, media_type)]))
        reply = await wire.put_manifest("lib/a", str(Digest.of(document)), document, OCI_INDEX)
        statuses.append(reply.status)
        content, media_type = document, OCI_INDEX

    assert statuses == [201] * 8 + [400]
    assert_refused(reply, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize(
    "name", ["/".join(["a" * 126, "a" * 128]), "/".join(["a" * 127] * 2), "a/" * 127 + "a"], ids=range(3)
)
async def test_L_12_a_name_of_255_characters_is_taken(wire: Wire, name: str) -> None:
    assert len(name) == 255

    await wire.push_image(name)

    assert (await wire("GET", f"/v2/{name}/tags/list")).json() == {"name": name, "tags": ["v1"]}


@pytest.mark.parametrize("name", ["a" * 129, "/".join(["a" * 127, "a" * 128]), "a" * 7_000], ids=range(3))
async def test_L_12_a_longer_name_is_400(wire: Wire, name: str) -> None:
    for method, rest in (("POST", "blobs/uploads/"), ("GET", "tags/list"), ("GET", "manifests/v1")):
        reply = await wire(method, f"/v2/{name}/{rest}")
        assert_refused(reply, 400, 404)
        assert reply.codes == ["NAME_INVALID"] if len(name) < 300 else ["NAME_UNKNOWN"]


async def test_L_12_a_tag_of_128_characters_is_taken_and_a_longer_one_is_not(wire: Wire) -> None:
    await wire.push_image("lib/a", "t" * 128)

    for length in (129, 7_000):
        tag = "t" * length
        assert_refused(await wire.put_manifest("lib/a", tag, image()), 400, 404)
        assert_refused(await wire("GET", f"/v2/lib/a/manifests/{tag}"), 400, 404)
        assert_refused(
            await wire.put_manifest("lib/a", f"{Digest.of(encode(image()))}?tag={tag}", image()), 400
        )
    assert (await wire("GET", "/v2/lib/a/tags/list")).json()["tags"] == ["t" * 128]


async def test_L_13_a_put_sets_45_tags_and_no_more(wire: Wire) -> None:
    await wire.push_blob("lib/a", b"{}")
    await wire.push_blob("lib/a", LAYER)

    async def put(count: int) -> int:
        query = "&".join(f"tag=t{number:02}" for number in range(count))
        reply = await wire.put_manifest("lib/a", f"{Digest.of(encode(image()))}?{query}", image())
        if reply.status != 201:
            assert_refused(reply, 400)
        return reply.status

    assert await put(46) == await put(127) == 400
    assert (await wire("GET", "/v2/lib/a/tags/list")).json()["tags"] in (None, [])
    assert await put(45) == 201
    assert len((await wire("GET", "/v2/lib/a/tags/list")).json()["tags"]) == 45


async def test_L_15_the_open_uploads_of_a_user_are_bounded_in_all_repositories(tmp_path: Path) -> None:
    users = written(tmp_path / "htpasswd", {"ann": "a", "bea": "b"})
    everything = ["read", "create", "update"]
    config = configured(
        {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        auth={"htpasswd": {"path": str(users)}},
        http={
            "accessControl": {
                "repositories": {"**": {"defaultPolicy": everything, "anonymousPolicy": everything}}
            }
        },
        limits={"uploadsperuser": 3},
    )
    ann, bea = basic("ann", "a"), basic("bea", "b")
    async with served(config) as url:
        wire = Wire(url)
        begun = [await wire("POST", f"/v2/lib/{name}/blobs/uploads/", headers=ann) for name in "abc"]
        refused = await wire("POST", "/v2/lib/d/blobs/uploads/", headers=ann)

        assert [reply.status for reply in begun] == [202] * 3
        assert_refused(refused, 429, code="TOOMANYREQUESTS")
        assert int(refused.header("Retry-After")) > 0
        error = refused.json()["errors"][0]
        assert "3 uploads of the user ann are open; 3 are allowed: finish or cancel some" in error["message"]
        assert error["detail"] == {"open": 3, "allowed": 3}
        for headers in (bea, {}):
            for _ in range(4 if not headers else 3):
                assert (await wire("POST", "/v2/lib/a/blobs/uploads/", headers=headers)).status == 202
        await wire("DELETE", begun[0].header("Location"), headers=ann)
        assert (await wire("POST", "/v2/lib/d/blobs/uploads/", headers=ann)).status == 202


async def test_L_17_what_would_touch_the_reserve_is_507_and_all_else_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is made by deleting and collecting, so those must work."""
    storage = {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}
    async with served(configured(storage)) as url:
        _, digest = await Wire(url).push_image("lib/a")
    size = 1_000_000 * 4096
    free = size * 5 // 100

    def status(_: object) -> os.statvfs_result:
        blocks = (size // 4096, free // 4096, free // 4096)
        return os.statvfs_result((4096, 4096, *blocks, 10, 10, 10, 0, 255))

    monkeypatch.setattr("storage_backends.local_folder.os.statvfs", status)
    async with served(configured(storage)) as url:
        wire = Wire(url)
        assert (await wire("POST", "/v2/lib/a/blobs/uploads/")).status == 202
        free -= 4096
        for target in ("/v2/lib/a/blobs/uploads/", f"/v2/lib/a/blobs/uploads/?digest={Digest.of(b'new')}"):
            reply = await wire("POST", target, body=b"new" if "digest" in target else b"")
            assert reply.status == 507
            assert "full" in reply.json()["errors"][0]["message"]
        assert (await wire("GET", f"/v2/lib/a/blobs/{Digest.of(LAYER)}")).body == LAYER
        assert (await wire("GET", "/readyz")).status == 200
        assert (await wire("DELETE", f"/v2/lib/a/manifests/{digest}")).status == 202
        assert (await wire("DELETE", f"/v2/lib/a/blobs/{Digest.of(LAYER)}")).status == 202
        free += 4096
        await wire.push_blob("lib/a", b"new")


async def test_L_18_a_page_is_clamped_and_says_where_the_next_is(serve: Serve) -> None:
    async with serve(tags={"maxtags": 3}, catalog={"maxentries": 3}, limits={"pagesize": 2}) as url:
        wire = Wire(url)
        for number in range(4):
            await wire.push_image("lib/a", f"t{number}")
            await wire.push_image(f"lib/b{number}")

        for target, key in (("/v2/lib/a/tags/list", "tags"), ("/v2/_catalog", "repositories")):
            for query, count in (("", 2), ("?n=3", 3), ("?n=4", 3), ("?n=300", 3), (f"?n={10**30}", 3)):
                reply = await wire("GET", target + query)
                assert reply.status == 200
                assert len(reply.json()[key]) == count, query
                assert next_target(reply) is not None


async def test_L_18_the_defaults_are_a_thousand_and_ten_thousand() -> None:
    config = configured({"inmemory": {}})

    assert (config.limits.pagesize, config.tags.maxtags, config.catalog.maxentries) == (1_000, 10_000, 10_000)


async def test_L_19_referrers_of_one_subject_are_bounded_and_429_says_so(serve: Serve) -> None:
    async with serve(limits={"referrerspersubject": 3}) as url:
        wire = Wire(url)
        _, subject = await wire.push_image("lib/a")
        pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
        pushed = [
            await wire.push_manifest("lib/a", f"r{n}", image(subject=pointer, annotations={"n": str(n)}))
            for n in range(3)
        ]
        for number in range(3, 6):
            more = image(subject=pointer, annotations={"n": str(number)})
            refused = await wire.put_manifest("lib/a", f"r{number}", more)
            assert_refused(refused, 429, code="TOOMANYREQUESTS")
            assert int(refused.header("Retry-After")) > 0
            assert "3" in refused.json()["errors"][0]["message"]

        listed = (await wire("GET", f"/v2/lib/a/referrers/{subject}")).json()["manifests"]
        assert sorted(entry["digest"] for entry in listed) == sorted(pushed)
        again = image(subject=pointer, annotations={"n": "0"})
        assert (await wire.put_manifest("lib/a", "again", again)).status == 201
        assert (await wire("DELETE", f"/v2/lib/a/manifests/{pushed[0]}")).status == 202
        await wire.push_manifest("lib/a", "r9", image(subject=pointer, annotations={"n": "9"}))


async def test_L_19_referrers_are_served_in_pages_of_a_size(serve: Serve) -> None:
    async with serve(limits={"referrerspagesize": "4KiB"}) as url:
        wire = Wire(url)
        _, subject = await wire.push_image("lib/a")
        pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
        for number in range(6):
            await wire.push_manifest(
                "lib/a", f"r{number}", image(subject=pointer, annotations={"n": str(number) * 900})
            )

        target: str | None = f"/v2/lib/a/referrers/{subject}"
        seen = pages = 0
        while target is not None:
            reply = await wire("GET", target)
            assert len(reply.body) <= 4096
            seen += len(reply.json()["manifests"])
            pages += 1
            target = next_target(reply)

        assert seen == 6
        assert pages > 1


def tar_with(
    name: str, *, pax_headers: dict[str, str] | None = None, tar_format: int = tarfile.PAX_FORMAT
) -> bytes:
    """A tar of one file, written by others than us."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tar_format) as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        member.pax_headers = pax_headers or {}
        tar.addfile(member, io.BytesIO(b"good"))
    return archive.getvalue()


def long_path(size: int) -> str:
    return "/".join(["d" * 99] * 50)[:size]


@pytest.mark.parametrize(
    ("layer", "compression", "is_indexed"),
    [
        (tar_with(long_path(4_095)), None, True),
        (tar_with(long_path(4_097)), None, False),
        (tar_with(long_path(4_095), tar_format=tarfile.GNU_FORMAT), None, True),
        (tar_with(long_path(4_099), tar_format=tarfile.GNU_FORMAT), None, False),
        (tar_with("f", pax_headers={"comment": "x" * (MIB - 17)}), None, True),
        (tar_with("f", pax_headers={"comment": "x" * (MIB - 16)}), None, False),
        (tar_of({"f": bytes(60 * MIB)}), "gzip", True),
        (tar_of({"f": bytes(70 * MIB)}), "gzip", False),
        (tar_of({"f": bytes(70 * MIB)}), "zstd", False),
    ],
    ids=[
        *("path", "longer path", "GNU name", "longer GNU name", "PAX block", "larger PAX block"),
        *("64 MiB at any ratio", "more than 200:1 of gzip", "more than 200:1 of zstd"),
    ],
)
async def test_L_21_a_layer_beyond_the_bounds_is_pushed_and_pulled_and_not_looked_into(
    wire: Wire, layer: bytes, compression: str | None, is_indexed: bool
) -> None:
    kit = Kit()
    kit.add("model", "m", layer, compression=compression)
    await kit.push(wire, "lib/a")

    for _ in range(2):  # what was refused is remembered
        reply = await wire("GET", "/v2/lib/a/_modelkit/files/v1")

        if is_indexed:
            assert reply.status == 200
        else:
            assert_refused(reply, 400, code="MANIFEST_INVALID")
            assert "cannot be looked into" in reply.body.decode()
    blob = compressed(layer, compression)
    assert (await wire("GET", f"/v2/lib/a/blobs/{Digest.of(blob)}")).body == blob


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_L_29_a_thousand_uploads_that_wait_take_less_than_200_mib(tmp_path: Path) -> None:
    """Of both sides, for client and server are this process. The reference's bound is of the server alone."""
    limits = {"connectionsperaddress": 2_000, "requestsperaddress": 2_000}
    async with served(configured({"filesystem": {"rootdirectory": str(tmp_path)}}, limits=limits)) as url:
        wire = Wire(url)
        uploads = [await wire.begin_upload(f"lib/{number % 5}") for number in range(1_000)]
        before = resident_bytes()
        writers = []
        try:
            for upload in uploads:
                _, writer = await asyncio.open_connection(wire.host, wire.port)
                writers.append(writer)
                head = f"PATCH {upload} HTTP/1.1\r\nHost: x\r\nContent-Length: {MIB}\r\n\r\n"
                writer.write(head.encode() + bytes(64 * 1024))
                await writer.drain()
            async with asyncio.timeout(SOON_S):
                while b"\nmodelreg_uploads_in_progress 1000.0\n" not in (await wire("GET", "/metrics")).body:
                    await asyncio.sleep(0.05)

            assert resident_bytes() - before < 200 * MIB
        finally:
            for writer in writers:
                writer.close()
            for writer in writers:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


def test_every_limit_of_the_manual_has_a_test() -> None:
    """By the number of its row; a limit that is added there without one fails here."""
    root = Path(__file__).parents[2]
    manual = (root / "docs" / "operations.md").read_text().partition("\n## Limits\n")[2].partition("\n## ")[0]
    rows = {cells[1].strip() for line in manual.splitlines() if len(cells := line.split("|")) > 4}
    numbers = {row for row in rows if row.startswith("L-")}
    tests = "".join(path.read_text() for path in (root / "tests").rglob("test_*.py"))

    assert len(numbers) > 10
    assert {number for number in numbers if f"_{number.replace('-', '_')}_" not in tests} == set()


def test_every_limit_of_the_configuration_is_in_the_manual() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = manual.partition("\n## Limits\n")[2].partition("\n## ")[0]

    assert {name for name in Limits.model_fields if f"`limits.{name}`" not in table} == set()
