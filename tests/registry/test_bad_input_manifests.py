"""Manifests as an attacker or a broken client writes them."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from kitspec.digest import Digest
from tests.registry.wire import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    DOCKER_SIGNED,
    LAYER,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Wire,
    assert_discreet,
    assert_refused,
    descriptor,
    encode,
    image,
    index,
)

MANIFEST_SIZE_MAX = 4 * 1024 * 1024
FOREIGN_LAYER = "application/vnd.oci.image.layer.nondistributable.v1.tar"


@pytest.fixture
async def wire(registry_url: str) -> Wire:
    """A registry whose repository lib/a holds the config and the layer of `image()`, and no manifest."""
    wire = Wire(registry_url)
    await wire.push_blob("lib/a", b"{}")
    await wire.push_blob("lib/a", LAYER)
    return wire


async def assert_rejects(
    wire: Wire,
    content: bytes | dict[str, Any],
    *statuses: int,
    code: str | None = None,
    media_type: str = OCI_MANIFEST,
) -> None:
    """`content` is refused, by tag and by digest, and leaves nothing."""
    raw = content if isinstance(content, bytes) else encode(content)
    by_digest = str(Digest.of(raw))
    for reference in ("bad", by_digest):
        assert_refused(await wire.put_manifest("lib/a", reference, raw, media_type), *statuses, code=code)
    for reference in ("bad", by_digest):
        assert_refused(await wire("GET", f"/v2/lib/a/manifests/{reference}"), 404)


def padded(size: int) -> bytes:
    """A sound manifest of exactly `size` bytes."""
    pads = {f"pad{number}": "x" * 1_000_000 for number in range(4)}
    bare = len(encode(image(annotations={**pads, "last": ""})))
    return encode(image(annotations={**pads, "last": "x" * (size - bare)}))


async def test_B_80_a_manifest_of_the_greatest_size_is_taken_and_a_byte_more_is_413(wire: Wire) -> None:
    for size in (MANIFEST_SIZE_MAX - 1, MANIFEST_SIZE_MAX):
        content = padded(size)
        assert (await wire.put_manifest("lib/a", "big", content, OCI_MANIFEST)).status == 201
        assert (await wire("GET", "/v2/lib/a/manifests/big")).body == content

    await assert_rejects(wire, padded(MANIFEST_SIZE_MAX + 1), 413, code="MANIFEST_INVALID")


async def test_B_80_V_02_an_endless_manifest_is_413_soon_after_the_limit(wire: Wire) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 256 * 1024 * 1024:
            yield b" " * 65_536
            sent += 65_536

    reply = await wire(
        "PUT", "/v2/lib/a/manifests/big", headers={"Content-Type": OCI_MANIFEST}, body=endless()
    )

    assert_refused(reply, 413)
    # The kernel's buffers on both sides take some more; what matters is that the reading stops.
    assert sent < 64 * 1024 * 1024


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
async def test_B_83_a_document_that_is_not_plain_utf_8_is_400(wire: Wire, encoding: str) -> None:
    await assert_rejects(wire, json.dumps(image()).encode(encoding), 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize(
    "evil", [b"\xff", b"\xc0\xae", b"\xed\xa0\x80", b"\\ud800", b"\xf5\x80\x80\x80", b"\n", b"\0"]
)
async def test_B_84_invalid_text_inside_a_string_is_400(wire: Wire, evil: bytes) -> None:
    content = encode(image(annotations={"a": "HERE"})).replace(b"HERE", evil)

    await assert_rejects(wire, content, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize(
    "doubled",
    [
        b'{"schemaVersion":2,"layers":[],"layers":[],',
        b'{"schemaVersion":2,"schemaVersion":2,',
        b'{"annotations":{"a":"1","a":"2"},"schemaVersion":2,',
    ],
)
async def test_B_85_doubled_keys_are_400(wire: Wire, doubled: bytes) -> None:
    content = encode(image()).replace(b'{"schemaVersion":2,', doubled, 1)

    await assert_rejects(wire, content, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"2",
        b'"manifest"',
        b"{}",
        b"not json",
        encode(image()) + b"x",
        encode(image())[:-1],
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        encode(image()).replace(b"{", b"{/* */", 1),
        encode(image(note="HERE")).replace(b'"HERE"', b"[" * 70 + b"]" * 70),
    ],
    ids=range(14),
)
async def test_L_09_what_is_no_manifest_is_400(wire: Wire, content: bytes) -> None:
    await assert_rejects(wire, content, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize(
    "size",
    [
        "1.5",
        '"2"',
        "true",
        "null",
        str(2**63),
        "1e3",
        "1e400",
        "-0",
        "-1",
        "NaN",
        "Infinity",
        "9" * 5_000,
        "[]",
        "1000.0",
        "01000",
    ],
    ids=lambda size: size[:12],
)
@pytest.mark.parametrize("place", ["config", "layer"])
async def test_B_88_a_size_that_is_no_count_is_400(wire: Wire, size: str, place: str) -> None:
    found = b'"size":2}' if place == "config" else b'"size":1000}'
    content = encode(image())
    assert found in content

    await assert_rejects(wire, content.replace(found, f'"size":{size}}}'.encode()), 400)


@pytest.mark.parametrize("size", [0, 999, 1001, 2**40])
async def test_B_89_a_size_that_is_not_the_blobs_is_400(wire: Wire, size: int) -> None:
    layer = {**descriptor(LAYER, OCI_LAYER), "size": size}

    reply = await wire.put_manifest("lib/a", "bad", image(layers=[layer]))

    assert_refused(reply, 400)
    assert reply.codes[0] in {"MANIFEST_INVALID", "SIZE_INVALID"}


async def test_B_89_a_size_that_is_not_the_childs_is_400(wire: Wire) -> None:
    child = image()
    await wire.push_manifest("lib/a", "child", child)
    entry = {**descriptor(encode(child), OCI_MANIFEST), "size": 1}

    assert_refused(await wire.put_manifest("lib/a", "bad", index([entry])), 400)


@pytest.mark.parametrize("version", ["1", '"2"', "2.0", "3", "null", "true", "-2", "{}"])
async def test_B_90_a_schema_version_other_than_2_is_400(wire: Wire, version: str) -> None:
    content = encode(image()).replace(b'"schemaVersion":2', f'"schemaVersion":{version}'.encode())

    await assert_rejects(wire, content, 400, code="MANIFEST_INVALID")


async def test_B_90_a_missing_schema_version_is_400(wire: Wire) -> None:
    manifest = image()
    del manifest["schemaVersion"]

    await assert_rejects(wire, manifest, 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize("missing", ["config", "layers"])
async def test_B_91_a_manifest_without_config_or_layers_is_400(wire: Wire, missing: str) -> None:
    manifest = image()
    del manifest[missing]

    await assert_rejects(wire, manifest, 400, code="MANIFEST_INVALID")


async def test_B_91_layers_of_null_are_none_and_the_bytes_stay(wire: Wire) -> None:
    content = encode(image(layers=None))

    reply = await wire.put_manifest("lib/a", "empty", content, OCI_MANIFEST)

    assert reply.status == 201
    assert (await wire("GET", "/v2/lib/a/manifests/empty")).body == content


@pytest.mark.parametrize(
    "manifest",
    [
        image(config=None),
        image(config=[]),
        image(config="sha256:" + "a" * 64),
        image(layers={}),
        image(layers="x"),
        image(layers=[None]),
        image(layers=["x"]),
        image(layers=[{}]),
        image(layers=[[descriptor(LAYER, OCI_LAYER)]]),
        image(layers=[{**descriptor(LAYER, OCI_LAYER), "digest": 5}]),
        image(layers=[{**descriptor(LAYER, OCI_LAYER), "digest": "sha256:short"}]),
        image(layers=[{**descriptor(LAYER, OCI_LAYER), "digest": "sha256:../../etc/passwd"}]),
        image(layers=[{**descriptor(LAYER, OCI_LAYER), "mediaType": 7}]),
        image(mediaType=5),
        image(artifactType=5),
        image(subject=[]),
        image(subject="sha256:" + "a" * 64),
    ],
    ids=range(17),
)
async def test_B_91_a_value_of_the_wrong_type_is_400(wire: Wire, manifest: dict[str, Any]) -> None:
    await assert_rejects(wire, manifest, 400)


async def test_B_92_an_unknown_layer_is_named(wire: Wire) -> None:
    missing = descriptor(b"missing", OCI_LAYER)

    reply = await wire.put_manifest("lib/a", "bad", image(layers=[descriptor(LAYER, OCI_LAYER), missing]))

    assert_refused(reply, 400, code="MANIFEST_BLOB_UNKNOWN")
    assert missing["digest"] in json.dumps(reply.json()["errors"][0].get("detail"))


async def test_B_94_V_29_a_foreign_layer_is_never_fetched(wire: Wire) -> None:
    asked = asyncio.Event()
    server = await asyncio.start_server(lambda _reader, writer: (asked.set(), writer.close()), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    layer = descriptor(b"elsewhere", FOREIGN_LAYER, urls=[f"http://127.0.0.1:{port}/layer"])

    reply = await wire.put_manifest("lib/a", "foreign", image(layers=[layer]))
    pulled = await wire("GET", f"/v2/lib/a/blobs/{layer['digest']}")
    server.close()

    # The official suite pushes non-distributable layers, so they are taken; the blob stays unknown here.
    assert reply.status == 201
    assert_refused(pulled, 404, code="BLOB_UNKNOWN")
    assert not asked.is_set()


async def test_B_94_urls_do_not_excuse_an_ordinary_layer(wire: Wire) -> None:
    layer = descriptor(b"elsewhere", OCI_LAYER, urls=["http://127.0.0.1:9/layer"])

    await assert_rejects(wire, image(layers=[layer]), 400, code="MANIFEST_BLOB_UNKNOWN")


@pytest.mark.parametrize(
    "declared", [OCI_INDEX, DOCKER_MANIFEST, "application/x.other", "", OCI_MANIFEST.upper()]
)
async def test_B_95_V_10_a_media_type_that_is_not_the_headers_is_400(wire: Wire, declared: str) -> None:
    await assert_rejects(wire, image(mediaType=declared), 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize(
    "field", [None, "", "text/html", "application/json", "application/octet-stream", "x", "a/b/c", "\xff"]
)
async def test_B_96_a_content_type_that_is_no_manifest_is_415_or_400(wire: Wire, field: str | None) -> None:
    headers = {} if field is None else {"Content-Type": field}

    for manifest in (image(), {name: value for name, value in image().items() if name != "mediaType"}):
        reply = await wire("PUT", "/v2/lib/a/manifests/bad", headers=headers, body=encode(manifest))
        assert_refused(reply, 400, 415)
    assert_refused(await wire("GET", "/v2/lib/a/manifests/bad"), 404)


@pytest.mark.parametrize(
    "field", [f"{OCI_MANIFEST};charset=utf-8", f"{OCI_MANIFEST} ; a=b; c=d", OCI_MANIFEST.upper()]
)
async def test_B_96_a_content_type_may_have_parameters_and_any_case(wire: Wire, field: str) -> None:
    reply = await wire.put_manifest("lib/a", "v1", encode(image()), field)

    assert reply.status == 201
    assert (await wire("GET", "/v2/lib/a/manifests/v1")).header("Content-Type") == OCI_MANIFEST


@pytest.mark.parametrize("more", [{"manifests": []}, {"manifests": [descriptor(b"{}", OCI_MANIFEST)]}])
async def test_B_97_V_10_a_manifest_that_is_also_an_index_is_400(wire: Wire, more: dict[str, Any]) -> None:
    await assert_rejects(wire, image(**more), 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize("more", [{"layers": []}, {"config": descriptor(b"{}", OCI_CONFIG)}])
async def test_B_97_V_10_an_index_that_is_also_a_manifest_is_400(wire: Wire, more: dict[str, Any]) -> None:
    await assert_rejects(wire, index(**more), 400, code="MANIFEST_INVALID", media_type=OCI_INDEX)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_B_98_a_put_by_a_wrong_digest_is_400(wire: Wire, algorithm: str) -> None:
    wrong = Digest.of(b"other", algorithm)

    reply = await wire.put_manifest("lib/a", wrong, image())

    assert_refused(reply, 400, code="DIGEST_INVALID")
    for reference in (wrong, Digest.of(encode(image())), Digest.of(encode(image()), "sha512")):
        assert_refused(await wire("GET", f"/v2/lib/a/manifests/{reference}"), 404)


async def test_B_99_a_put_by_sha512_keeps_that_digest(wire: Wire) -> None:
    digest = Digest.of(encode(image()), "sha512")

    reply = await wire.put_manifest("lib/a", digest, image())

    assert (reply.status, reply.header("Docker-Content-Digest")) == (201, digest)
    assert (await wire("GET", f"/v2/lib/a/manifests/{digest}")).header("Docker-Content-Digest") == digest


@pytest.mark.parametrize(
    "subject",
    [
        descriptor(b"unknown", OCI_MANIFEST),
        {**descriptor(b"unknown", OCI_MANIFEST), "size": 0},
        {**descriptor(b"unknown", OCI_MANIFEST), "size": 2**40},
        {**descriptor(b"unknown", OCI_MANIFEST), "mediaType": "application/x.other"},
    ],
)
async def test_B_100_a_subject_may_be_unknown_or_described_wrongly(
    wire: Wire, subject: dict[str, Any]
) -> None:
    for manifest in (image(subject=subject), index(subject=subject)):
        reply = await wire.put_manifest("lib/a", "r", manifest)

        assert reply.status == 201
        assert reply.header("OCI-Subject") == subject["digest"]
        listed = (await wire("GET", f"/v2/lib/a/referrers/{subject['digest']}")).json()["manifests"]
        assert str(Digest.of(encode(manifest))) in [entry["digest"] for entry in listed]


@pytest.mark.parametrize(
    "digest", ["sha256:short", "", "latest", "md5:d41d8cd98f00b204e9800998ecf8427e", 5, None]
)
async def test_B_100_a_subject_without_a_digest_is_400(wire: Wire, digest: object) -> None:
    subject = {"mediaType": OCI_MANIFEST, "digest": digest, "size": 2}

    await assert_rejects(wire, image(subject=subject), 400)


async def test_B_101_an_empty_index_is_an_index(wire: Wire) -> None:
    digest = await wire.push_manifest("lib/a", "empty", index())

    assert (await wire("GET", f"/v2/lib/a/manifests/{digest}")).body == encode(index())


async def test_B_101_an_index_with_an_unknown_child_is_400_and_names_it(wire: Wire) -> None:
    child = descriptor(b"unknown", OCI_MANIFEST)

    reply = await wire.put_manifest("lib/a", "bad", index([child]))

    assert_refused(reply, 400, code="MANIFEST_BLOB_UNKNOWN")
    assert child["digest"] in reply.body.decode()


async def test_B_101_a_child_in_another_repository_does_not_count(wire: Wire) -> None:
    manifest, _ = await wire.push_image("lib/other")

    document = index([descriptor(encode(manifest), OCI_MANIFEST)])

    assert_refused(await wire.put_manifest("lib/a", "bad", document), 400, code="MANIFEST_BLOB_UNKNOWN")


async def test_B_101_an_index_may_name_ten_thousand_children(wire: Wire) -> None:
    await wire.push_manifest("lib/a", "child", image())
    child = descriptor(encode(image()), OCI_MANIFEST)

    reply = await wire.put_manifest("lib/a", "wide", index([child] * 10_000))

    assert reply.status == 201


async def test_L_10_more_than_twenty_thousand_descriptors_are_400(wire: Wire) -> None:
    child = {"mediaType": "a/b", "digest": str(Digest.of(b"{}")), "size": 2}
    document = encode(index([child] * 20_001))
    assert len(document) < MANIFEST_SIZE_MAX

    assert_refused(await wire.put_manifest("lib/a", "bad", document, OCI_INDEX), 400, code="MANIFEST_INVALID")


async def test_B_101_L_11_indexes_nest_to_a_bound(wire: Wire) -> None:
    content = encode(image())
    media_type = OCI_MANIFEST
    await wire.put_manifest("lib/a", str(Digest.of(content)), content, media_type)
    statuses = []
    for _ in range(50):
        document = encode(index([descriptor(content, media_type)]))
        reply = await wire.put_manifest("lib/a", str(Digest.of(document)), document, OCI_INDEX)
        statuses.append(reply.status)
        if reply.status != 201:
            assert_refused(reply, 400)
            break
        content, media_type = document, OCI_INDEX

    assert statuses[:7] == [201] * 7
    assert statuses[-1] == 400


@pytest.mark.parametrize(
    "annotations", [{"a": 1}, {"a": None}, {"a": ["x"]}, {"a": {}}, {"a": True}, [], "x", 5]
)
async def test_B_103_annotations_that_are_not_texts_are_400(wire: Wire, annotations: object) -> None:
    await assert_rejects(wire, image(annotations=annotations), 400, code="MANIFEST_INVALID")
    layer = {**descriptor(LAYER, OCI_LAYER), "annotations": annotations}
    await assert_rejects(wire, image(layers=[layer]), 400, code="MANIFEST_INVALID")


@pytest.mark.parametrize(
    "annotations",
    [
        {"": "empty key"},
        {str(n): "" for n in range(100000)},
        {"nul": "a\x00b"},
        {"long": "x" * 1000000},
        {"html": "<script>alert(1)</script>"},
        {"line": "a\r\nX-Evil: 1"},
        {"emoji": "😀"},
    ],
    ids=["empty key", "100,000 keys", "NUL", "1 MB", "html", "line break", "emoji"],
)
async def test_B_103_odd_annotations_are_kept_to_the_byte(wire: Wire, annotations: dict[str, str]) -> None:
    _, subject = await wire.push_image("lib/a", "subject")
    pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
    content = encode(image(annotations=annotations, subject=pointer))

    reply = await wire.put_manifest("lib/a", "odd", content, OCI_MANIFEST)

    assert reply.status == 201
    assert (await wire("GET", "/v2/lib/a/manifests/odd")).body == content
    listed = await wire("GET", f"/v2/lib/a/referrers/{subject}")
    assert listed.json()["manifests"][0]["annotations"] == annotations
    assert "X-Evil" not in listed.headers


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (base64.b64encode(b"{}").decode(), 201),
        (base64.b64encode(b"[]").decode(), 400),
        (base64.b64encode(b"{} ").decode(), 400),
        ("not base64!", 400),
        ("e30", 400),
        ("e3 0=", 400),
        (5, 400),
    ],
)
async def test_B_104_inline_data_must_be_what_the_descriptor_says(
    wire: Wire, data: object, status: int
) -> None:
    manifest = image(config=descriptor(b"{}", OCI_CONFIG, data=data))

    reply = await wire.put_manifest("lib/a", "inline", manifest)

    if status == 201:
        assert reply.status == 201
    else:
        assert_refused(reply, 400, code="MANIFEST_INVALID")


async def test_B_105_docker_manifests_and_lists_are_taken(wire: Wire) -> None:
    manifest = image(mediaType=DOCKER_MANIFEST)
    digest = await wire.push_manifest("lib/a", "docker", manifest)
    entry = descriptor(encode(manifest), DOCKER_MANIFEST, platform={"architecture": "amd64", "os": "linux"})
    await wire.push_manifest("lib/a", "list", index([entry], mediaType=DOCKER_LIST))

    got = await wire("GET", f"/v2/lib/a/manifests/{digest}")
    assert (got.header("Content-Type"), got.body) == (DOCKER_MANIFEST, encode(manifest))
    assert (await wire("GET", "/v2/lib/a/manifests/list")).header("Content-Type") == DOCKER_LIST


async def test_B_105_a_signed_schema_1_manifest_is_refused(wire: Wire) -> None:
    content = encode(
        {"schemaVersion": 1, "name": "lib/a", "tag": "v1", "fsLayers": [], "history": [], "signatures": []}
    )

    await assert_rejects(wire, content, 400, 415, media_type=DOCKER_SIGNED)
    await assert_rejects(wire, content, 400, 415, media_type=OCI_MANIFEST)


async def test_B_106_one_manifest_put_many_ways_at_once_is_one_manifest(wire: Wire) -> None:
    digest = Digest.of(encode(image()))
    references = ["v1", "v2", digest, "v1", digest, f"{digest}?tag=v3"]

    replies = await asyncio.gather(
        *(wire.put_manifest("lib/a", reference, image()) for reference in references)
    )

    assert {(reply.status, reply.header("Docker-Content-Digest")) for reply in replies} == {(201, digest)}
    for reference in ("v1", "v2", "v3", digest):
        assert (await wire("GET", f"/v2/lib/a/manifests/{reference}")).body == encode(image())


@pytest.mark.parametrize(
    "query", ["tag=.bad", "tag=", "tag=a&tag=-x", "tag=a%20b", "tag=sha256:x", f"tag={'x' * 129}", "tag=a,b"]
)
async def test_B_107_an_invalid_tag_parameter_is_400_and_nothing_is_stored(wire: Wire, query: str) -> None:
    digest = Digest.of(encode(image()))

    reply = await wire.put_manifest("lib/a", f"{digest}?{query}", image())

    assert_refused(reply, 400)
    assert_refused(await wire("GET", f"/v2/lib/a/manifests/{digest}"), 404)
    assert_refused(await wire("GET", "/v2/lib/a/manifests/a"), 404)


async def test_B_107_too_many_tag_parameters_are_400_or_414(wire: Wire) -> None:
    digest = Digest.of(encode(image()))

    reply = await wire.put_manifest(
        "lib/a", f"{digest}?" + "&".join(f"tag=t{n}" for n in range(1_000)), image()
    )

    assert reply.status in {400, 414}
    assert_discreet(reply)
    assert_refused(await wire("GET", f"/v2/lib/a/manifests/{digest}"), 404)


async def test_B_107_a_doubled_tag_parameter_counts_once(wire: Wire) -> None:
    digest = Digest.of(encode(image()))

    reply = await wire.put_manifest("lib/a", f"{digest}?tag=a&tag=a&tag=b", image())

    assert reply.status == 201
    named = [word.strip() for field in reply.headers.get_all("OCI-Tag") or [] for word in field.split(",")]
    assert sorted(named) == ["a", "b"]


async def test_B_107_a_tag_parameter_beside_a_tag_path_is_400(wire: Wire) -> None:
    assert_refused(await wire.put_manifest("lib/a", "v1?tag=v2", image()), 400)
    assert_refused(await wire("GET", "/v2/lib/a/manifests/v1"), 404)


@pytest.mark.parametrize(
    "accept",
    [
        None,
        "*/*",
        DOCKER_MANIFEST,
        "text/html",
        "application/*;q=0",
        "x" * 7_000,
        f"{OCI_INDEX};q=1, {OCI_MANIFEST};q=0",
        ";;;,,,",
    ],
    ids=lambda accept: str(accept)[:20],
)
async def test_B_109_the_stored_type_is_served_whatever_is_accepted(wire: Wire, accept: str | None) -> None:
    await wire.push_manifest("lib/a", "v1", image())

    reply = await wire("GET", "/v2/lib/a/manifests/v1", headers={} if accept is None else {"Accept": accept})

    assert (reply.status, reply.header("Content-Type"), reply.body) == (200, OCI_MANIFEST, encode(image()))


KIT_CONFIG = "application/vnd.kitops.modelkit.config.v1+json"


@pytest.mark.parametrize(
    "config",
    [
        b"not json",
        b"{}",
        b'{"manifestVersion":"1.0.0","code":null,"unknown":1}',
        b'{"manifestVersion":"1.0.0","datasets":[{"path":"../x"}]}',
        b'{"manifestVersion":"1.0.0","model":{"path":"lib/a:v1"}}',
        b"a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n",
        json.dumps({"manifestVersion": "1.0.0", "docs": [{"path": str(n)} for n in range(100_000)]}).encode(),
    ],
    ids=["not JSON", "empty", "null part", "climbing path", "own reference", "YAML bomb", "100,000 parts"],
)
async def test_B_110_the_registry_takes_any_content_as_a_modelkits_config(wire: Wire, config: bytes) -> None:
    await wire.push_blob("lib/a", config)

    digest = await wire.push_manifest("lib/a", "kit", image(config=descriptor(config, KIT_CONFIG), layers=[]))

    assert (await wire("GET", "/v2/lib/a/manifests/kit")).header("Docker-Content-Digest") == digest
    assert (await wire("GET", "/v2/lib/a/tags/list")).json()["tags"] == ["kit"]


ReferenceOf = Callable[[dict[str, Any]], str]


@pytest.mark.parametrize(
    "reference_of", [lambda _: "latest", lambda m: str(Digest.of(encode(m)))], ids=["tag", "digest"]
)
async def test_V_10_what_was_refused_cannot_be_pulled(wire: Wire, reference_of: ReferenceOf) -> None:
    manifest = {**image(), **index()}

    assert_refused(await wire.put_manifest("lib/a", reference_of(manifest), encode(manifest), OCI_INDEX), 400)
    assert_refused(await wire("GET", f"/v2/lib/a/manifests/{reference_of(manifest)}"), 404)
