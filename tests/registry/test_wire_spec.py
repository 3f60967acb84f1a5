"""What the distribution specification asks and no public suite checks, requirement by requirement.

Names give the endpoint. Source: distribution-spec 1.1.1 and its main branch (967efdc); RFC 9110 where they are silent.
"""

import json

import pytest

from kitspec.digest import Digest
from tests.registry.wire import (
    LAYER,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Wire,
    assert_refused,
    descriptor,
    encode,
    image,
    index,
    next_target,
    path_of,
)

ABSENT = Digest.of(b"nobody pushed this")


@pytest.fixture
def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a", "0", "a/b", "a.b", "a_b", "a__b", "a-b", "a---b", "a.b_c-d/e__f/0", "a/b/c/d/e"]
)
async def test_a_name_of_the_grammar_is_a_repository(wire: Wire, name: str) -> None:
    digest = await wire.push_blob(name, b"content")

    assert (await wire("GET", f"/v2/{name}/blobs/{digest}")).body == b"content"


@pytest.mark.parametrize(
    "name", ["A", "a/B", "a..b", "a___b", "a.-b", "-a", "a-", "a/-b", "_a", "a/.b", "a+b", "a:b", "a~"]
)
async def test_a_name_outside_the_grammar_is_refused(wire: Wire, name: str) -> None:
    assert_refused(await wire("POST", f"/v2/{name}/blobs/uploads/"), 400, 404)
    assert_refused(await wire("GET", f"/v2/{name}/tags/list"), 400, 404)


@pytest.mark.parametrize(
    "tag", ["a", "_a", "A", "0", "a.b-c_d", "V1", "1.0.0-rc.1", "x" * 128, "a..b", "a--", "a."]
)
async def test_a_tag_of_the_grammar_is_kept(wire: Wire, tag: str) -> None:
    _, digest = await wire.push_image("lib/a", tag)

    assert (await wire("GET", f"/v2/lib/a/manifests/{tag}")).header("Docker-Content-Digest") == digest
    assert (await wire("GET", "/v2/lib/a/tags/list")).json() == {"name": "lib/a", "tags": [tag]}


async def test_end_3_a_reference_with_a_colon_is_never_a_tag(wire: Wire) -> None:
    await wire.push_image("lib/a")

    assert_refused(await wire.put_manifest("lib/a", "v1:v2", image()), 400)
    assert_refused(await wire("GET", "/v2/lib/a/manifests/v1:v2"), 400, 404)


# --- errors, and HTTP where the specification is silent -----------------------------------------------------------------


async def test_an_unknown_path_is_404(wire: Wire) -> None:
    for target in (
        "/v2/lib/a",
        "/v2/lib/a/",
        "/v2/lib/a/blobs/",
        "/v2/lib/a/unknown/x",
        "/v1/",
        "/v2/lib/a/manifests/",
    ):
        assert_refused(await wire("GET", target), 404)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/v2/"),
        ("PUT", "/v2/lib/a/tags/list"),
        ("POST", f"/v2/lib/a/blobs/{ABSENT}"),
        ("PATCH", "/v2/lib/a/manifests/v1"),
        ("PUT", "/v2/lib/a/blobs/uploads/"),
        ("DELETE", f"/v2/lib/a/referrers/{ABSENT}"),
        ("TRACE", "/v2/"),
        ("PROPFIND", "/v2/_catalog"),
    ],
)
async def test_a_method_that_is_not_supported_is_405_and_names_those_that_are(
    wire: Wire, method: str, target: str
) -> None:
    reply = await wire(method, target)

    assert_refused(reply, 405, code="UNSUPPORTED")
    allowed = {word.strip() for word in reply.header("Allow").split(",")}
    assert allowed
    assert method not in allowed


async def test_head_answers_as_get_without_the_body(wire: Wire) -> None:
    _, manifest = await wire.push_image("lib/a")
    layer = Digest.of(LAYER)

    targets = (
        "/v2/",
        f"/v2/lib/a/blobs/{layer}",
        f"/v2/lib/a/manifests/{manifest}",
        "/v2/lib/a/manifests/v1",
        "/v2/lib/a/tags/list",
    )
    for target in targets:
        get, head = await wire("GET", target), await wire("HEAD", target)
        assert head.status == get.status == 200
        assert head.body == b""
        for name in ("Content-Length", "Content-Type", "Docker-Content-Digest", "ETag"):
            assert head.headers.get(name) == get.headers.get(name), (target, name)


async def test_head_of_what_is_absent_is_404_without_a_body(wire: Wire) -> None:
    await wire.push_image("lib/a")

    for target in (
        f"/v2/lib/a/blobs/{ABSENT}",
        f"/v2/lib/a/manifests/{ABSENT}",
        "/v2/lib/a/manifests/absent",
    ):
        reply = await wire("HEAD", target)
        assert (reply.status, reply.body) == (404, b"")


async def test_ns_is_ignored(wire: Wire) -> None:
    _, digest = await wire.push_image("lib/a")

    for target in ("/v2/lib/a/manifests/v1", f"/v2/lib/a/blobs/{Digest.of(LAYER)}", "/v2/lib/a/tags/list"):
        assert (await wire("GET", f"{target}?ns=docker.io")).status == 200
    assert (await wire("GET", "/v2/lib/a/manifests/v1?ns=x")).header("Docker-Content-Digest") == digest


async def test_end_1_the_base_says_which_api_it_speaks(wire: Wire) -> None:
    reply = await wire("GET", "/v2/")

    assert reply.status == 200
    assert reply.header("Docker-Distribution-Api-Version") == "registry/2.0"


# --- end-2: blobs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_end_2_a_blob_carries_its_digest_and_its_length(wire: Wire, algorithm: str) -> None:
    digest = await wire.push_blob("lib/a", LAYER, algorithm)

    for method in ("GET", "HEAD"):
        reply = await wire(method, f"/v2/lib/a/blobs/{digest}")
        assert reply.header("Docker-Content-Digest") == digest
        assert reply.header("Content-Length") == str(len(LAYER))
        assert reply.header("Accept-Ranges") == "bytes"


async def test_end_2_an_etag_that_is_still_good_gives_304(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)
    target = f"/v2/lib/a/blobs/{digest}"
    etag = (await wire("GET", target)).header("ETag")

    for field in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        reply = await wire("GET", target, headers={"If-None-Match": field})
        assert (reply.status, reply.body) == (304, b""), field
        assert reply.header("ETag") == etag
    assert (await wire("GET", target, headers={"If-None-Match": '"other"'})).status == 200


async def test_end_2_if_match_guards_a_blob(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)
    target = f"/v2/lib/a/blobs/{digest}"
    etag = (await wire("GET", target)).header("ETag")

    assert (await wire("GET", target, headers={"If-Match": etag})).status == 200
    assert (await wire("GET", target, headers={"If-Match": "*"})).status == 200
    assert (await wire("GET", target, headers={"If-Match": '"other"'})).status == 412


async def test_end_2_if_range_decides_between_the_part_and_the_whole(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)
    target = f"/v2/lib/a/blobs/{digest}"
    etag = (await wire("GET", target)).header("ETag")

    part = await wire("GET", target, headers={"Range": "bytes=1-3", "If-Range": etag})
    whole = await wire("GET", target, headers={"Range": "bytes=1-3", "If-Range": '"other"'})

    assert (part.status, part.body) == (206, LAYER[1:4])
    assert (whole.status, whole.body) == (200, LAYER)


async def test_end_2_a_range_of_an_unknown_unit_is_ignored(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={"Range": "items=0-1"})

    assert (reply.status, reply.body) == (200, LAYER)


async def test_end_2_a_range_on_head_is_ignored(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    reply = await wire("HEAD", f"/v2/lib/a/blobs/{digest}", headers={"Range": "bytes=0-1"})

    assert (reply.status, reply.header("Content-Length")) == (200, str(len(LAYER)))


async def test_end_2_a_range_of_an_empty_blob_is_416(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", b"")

    reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={"Range": "bytes=0-0"})

    assert_refused(reply, 416)
    assert reply.header("Content-Range") == "bytes */0"


async def test_end_2_a_blob_is_never_compressed_on_the_way(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    reply = await wire("GET", f"/v2/lib/a/blobs/{digest}", headers={"Accept-Encoding": "gzip, deflate, zstd"})

    assert "Content-Encoding" not in reply.headers
    assert (reply.body, reply.header("Content-Length")) == (LAYER, str(len(LAYER)))


async def test_end_2_a_blob_digest_that_is_none_is_refused(wire: Wire) -> None:
    for digest in ("sha256:short", "md5:d41d8cd98f00b204e9800998ecf8427e", "latest", "sha256:"):
        assert_refused(await wire("GET", f"/v2/lib/a/blobs/{digest}"), 400, code="DIGEST_INVALID")


# --- end-3: manifests, read ----------------------------------------------------------------------------------------


async def test_end_3_a_manifest_of_an_unknown_repository_is_404(wire: Wire) -> None:
    assert_refused(await wire("GET", "/v2/no/such/manifests/v1"), 404)
    assert_refused(await wire("GET", f"/v2/no/such/manifests/{ABSENT}"), 404)


async def test_end_3_a_manifest_comes_back_with_its_bytes_type_digest_and_length(wire: Wire) -> None:
    await wire.push_blob("lib/a", b"{}")
    await wire.push_blob("lib/a", LAYER)
    content = json.dumps(image(unknown={"kept": [1, 2.5, None]}), indent=3).encode() + b"\n"
    await wire.put_manifest("lib/a", "v1", content, OCI_MANIFEST)

    for reference in ("v1", str(Digest.of(content))):
        reply = await wire("GET", f"/v2/lib/a/manifests/{reference}")
        assert reply.body == content
        assert reply.header("Content-Type") == OCI_MANIFEST
        assert reply.header("Docker-Content-Digest") == Digest.of(content)
        assert reply.header("Content-Length") == str(len(content))


async def test_end_3_an_etag_that_is_still_good_gives_304_until_the_tag_moves(wire: Wire) -> None:
    await wire.push_image("lib/a", "v1")
    target = "/v2/lib/a/manifests/v1"
    etag = (await wire("GET", target)).header("ETag")

    assert (await wire("GET", target, headers={"If-None-Match": etag})).status == 304
    await wire.push_image("lib/a", "v1", annotations={"now": "another"})
    moved = await wire("GET", target, headers={"If-None-Match": etag})

    assert moved.status == 200
    assert moved.header("ETag") != etag


# --- end-4 to end-6, end-13, end-14: uploads -----------------------------------------------------------------------


async def test_end_4a_every_upload_has_its_own_location_and_it_needs_no_query(wire: Wire) -> None:
    locations = {await wire.begin_upload("lib/a") for _ in range(5)}

    assert len(locations) == 5
    assert not any("?" in location for location in locations)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_end_4c_the_algorithm_may_be_announced(wire: Wire, algorithm: str) -> None:
    begun = await wire("POST", f"/v2/lib/a/blobs/uploads/?digest-algorithm={algorithm}")
    assert begun.status == 202
    digest = Digest.of(LAYER, algorithm)

    done = await wire("PUT", f"{path_of(begun.header('Location'))}?digest={digest}", body=LAYER)

    assert (done.status, done.header("Docker-Content-Digest")) == (201, digest)
    assert (await wire("GET", f"/v2/lib/a/blobs/{digest}")).body == LAYER


async def test_end_4c_an_algorithm_that_is_not_spoken_is_400(wire: Wire) -> None:
    for algorithm in ("md5", "blake3", "", "sha256%0a"):
        reply = await wire("POST", f"/v2/lib/a/blobs/uploads/?digest-algorithm={algorithm}")
        assert_refused(reply, 400, code="DIGEST_INVALID")


@pytest.mark.parametrize(
    "digest", ["md5:d41d8cd98f00b204e9800998ecf8427e", "blake3:" + "0" * 64, "sha256:" + "0" * 63]
)
async def test_an_unsupported_digest_is_400_whichever_way_content_is_pushed(wire: Wire, digest: str) -> None:
    await wire.push_image("lib/a")
    upload = await wire.begin_upload("lib/a")

    assert_refused(await wire("PUT", f"{upload}?digest={digest}", body=LAYER), 400, code="DIGEST_INVALID")
    assert_refused(
        await wire("POST", f"/v2/lib/a/blobs/uploads/?digest={digest}", body=LAYER),
        400,
        code="DIGEST_INVALID",
    )
    assert_refused(await wire.put_manifest("lib/a", digest, image()), 400)


async def test_end_5_a_chunk_may_be_any_size_and_the_upload_says_what_it_holds(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")

    first = await wire("PATCH", upload, headers={"Content-Range": "0-0"}, body=LAYER[:1])
    second = await wire(
        "PATCH", path_of(first.header("Location")), headers={"Content-Range": "1-9"}, body=LAYER[1:10]
    )
    asked = await wire("GET", path_of(second.header("Location")))
    done = await wire("PUT", f"{path_of(asked.header('Location'))}?digest={Digest.of(LAYER[:10])}")

    assert (first.status, first.header("Range")) == (202, "0-0")
    assert (second.status, second.header("Range")) == (202, "0-9")
    assert (asked.status, asked.header("Range")) == (204, "0-9")
    assert done.status == 201


@pytest.mark.parametrize(
    "field", ["5-2", "a-b", "0-", "-5", "0-9, 10-19", "٣-٤".encode().decode("latin-1"), "0 - 9"]
)
async def test_end_5_a_content_range_outside_the_grammar_is_refused_and_the_upload_goes_on(
    wire: Wire, field: str
) -> None:
    upload = await wire.begin_upload("lib/a")

    assert_refused(await wire("PATCH", upload, headers={"Content-Range": field}, body=LAYER[:10]), 400, 416)
    done = await wire("PUT", f"{upload}?digest={Digest.of(LAYER)}", body=LAYER)

    assert done.status == 201


async def test_end_13_an_upload_that_holds_nothing_says_0_0(wire: Wire) -> None:
    reply = await wire("GET", await wire.begin_upload("lib/a"))

    assert (reply.status, reply.header("Range"), reply.body) == (204, "0-0", b"")


async def test_an_upload_that_never_was_is_404_for_every_method(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    unknown = upload.rpartition("/")[0] + "/00000000-0000-4000-8000-000000000000"

    for method, query in (("GET", ""), ("PATCH", ""), ("PUT", f"?digest={Digest.of(b'')}"), ("DELETE", "")):
        assert_refused(await wire(method, unknown + query), 404, code="BLOB_UPLOAD_UNKNOWN")


async def test_an_upload_is_known_in_its_own_repository_only(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    moved = upload.replace("/lib/a/", "/lib/b/")

    for method, query in (("GET", ""), ("PATCH", ""), ("PUT", f"?digest={Digest.of(b'')}"), ("DELETE", "")):
        assert_refused(await wire(method, moved + query), 404, code="BLOB_UPLOAD_UNKNOWN")
    assert (await wire("GET", upload)).status == 204


async def test_end_14_an_upload_that_was_cancelled_is_gone(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    await wire("PATCH", upload, body=LAYER)

    assert (await wire("DELETE", upload)).status == 204
    assert_refused(await wire("GET", upload), 404, code="BLOB_UPLOAD_UNKNOWN")
    assert_refused(await wire("PUT", f"{upload}?digest={Digest.of(LAYER)}"), 404, code="BLOB_UPLOAD_UNKNOWN")
    assert_refused(await wire("GET", f"/v2/lib/a/blobs/{Digest.of(LAYER)}"), 404, code="BLOB_UNKNOWN")


async def test_end_6_an_upload_that_was_closed_is_gone(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    await wire("PUT", f"{upload}?digest={Digest.of(LAYER)}", body=LAYER)

    assert_refused(await wire("GET", upload), 404, code="BLOB_UPLOAD_UNKNOWN")


async def test_an_unfinished_upload_is_invisible(wire: Wire) -> None:
    upload = await wire.begin_upload("lib/a")
    await wire("PATCH", upload, body=LAYER)

    assert_refused(await wire("GET", f"/v2/lib/a/blobs/{Digest.of(LAYER)}"), 404)
    assert_refused(await wire("GET", "/v2/lib/a/tags/list"), 404, code="NAME_UNKNOWN")


# --- end-7: manifests, write -----------------------------------------------------------------------------------------


async def test_end_7a_parameters_of_the_content_type_are_ignored(wire: Wire) -> None:
    await wire.push_image("lib/a")

    reply = await wire.put_manifest("lib/a", "v2", encode(image()), f"{OCI_MANIFEST}; charset=utf-8")
    got = await wire("GET", "/v2/lib/a/manifests/v2")

    assert reply.status == 201
    assert got.header("Content-Type") == OCI_MANIFEST


async def test_end_7a_a_missing_config_or_layer_is_manifest_blob_unknown_and_nothing_is_stored(
    wire: Wire,
) -> None:
    await wire.push_blob("lib/a", b"{}")
    manifest = image(layers=[descriptor(b"missing", OCI_LAYER)])

    reply = await wire.put_manifest("lib/a", "v1", manifest)

    assert_refused(reply, 400, code="MANIFEST_BLOB_UNKNOWN")
    assert_refused(await wire("GET", "/v2/lib/a/manifests/v1"), 404)
    assert_refused(await wire("GET", f"/v2/lib/a/manifests/{Digest.of(encode(manifest))}"), 404)
    assert_refused(
        await wire.put_manifest("lib/a", "v1", image(config=descriptor(b"no", OCI_CONFIG), layers=[])), 400
    )


async def test_end_7a_a_blob_of_another_repository_does_not_count(wire: Wire) -> None:
    await wire.push_image("lib/a")

    assert_refused(await wire.put_manifest("lib/b", "v1", image()), 400, code="MANIFEST_BLOB_UNKNOWN")


async def test_end_7a_an_index_of_what_is_missing_is_manifest_blob_unknown(wire: Wire) -> None:
    document = index([descriptor(b"missing", OCI_MANIFEST)])

    assert_refused(await wire.put_manifest("lib/a", "v1", document), 400, code="MANIFEST_BLOB_UNKNOWN")


async def test_end_7a_a_manifest_without_a_media_type_takes_it_from_the_header(wire: Wire) -> None:
    await wire.push_image("lib/a")
    manifest = image()
    del manifest["mediaType"]

    reply = await wire.put_manifest("lib/a", "bare", manifest, OCI_MANIFEST)

    assert reply.status == 201
    assert (await wire("GET", "/v2/lib/a/manifests/bare")).header("Content-Type") == OCI_MANIFEST


async def test_end_7a_a_tag_moves_to_what_was_put_last(wire: Wire) -> None:
    _, first = await wire.push_image("lib/a")
    _, second = await wire.push_image("lib/a", annotations={"n": "2"})

    assert (await wire("GET", "/v2/lib/a/manifests/v1")).header("Docker-Content-Digest") == second
    assert (await wire("GET", f"/v2/lib/a/manifests/{first}")).status == 200


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
async def test_end_7b_ten_tags_at_once_are_each_set_and_named(wire: Wire, algorithm: str) -> None:
    await wire.push_image("lib/a")
    manifest = image(annotations={"n": "2"})
    digest = Digest.of(encode(manifest), algorithm)
    tags = [f"t{n}" for n in range(10)]

    reply = await wire.put_manifest("lib/a", f"{digest}?" + "&".join(f"tag={tag}" for tag in tags), manifest)

    assert reply.status == 201
    named = [word.strip() for field in reply.headers.get_all("OCI-Tag") or [] for word in field.split(",")]
    assert sorted(named) == tags
    for tag in tags:
        assert (await wire("GET", f"/v2/lib/a/manifests/{tag}")).header("Docker-Content-Digest") == digest


# --- end-8: tags, and the catalog -----------------------------------------------------------------------------------


async def test_end_8_tags_are_sorted_and_paged_by_link(wire: Wire) -> None:
    tags = ["B", "_x", "a", "a-1", "a.1", "a1", "aa", "b", "v1", "v1-rc", "v10", "v2"]
    for tag in reversed(tags):
        await wire.push_image("lib/a", tag)

    for count in (1, 2, 5, len(tags), 100):
        seen: list[str] = []
        target: str | None = f"/v2/lib/a/tags/list?n={count}"
        while target is not None:
            reply = await wire("GET", target)
            page = reply.json()["tags"]
            assert len(page) == count or next_target(reply) is None
            seen += page
            target = next_target(reply)
        assert seen == sorted(tags)


async def test_end_8_last_is_exclusive_and_need_not_exist(wire: Wire) -> None:
    for tag in ("a", "b", "d"):
        await wire.push_image("lib/a", tag)

    assert (await wire("GET", "/v2/lib/a/tags/list?last=b")).json()["tags"] == ["d"]
    assert (await wire("GET", "/v2/lib/a/tags/list?last=c")).json()["tags"] == ["d"]
    assert (await wire("GET", "/v2/lib/a/tags/list?last=a&n=1")).json()["tags"] == ["b"]
    assert (await wire("GET", "/v2/lib/a/tags/list?last=z")).json()["tags"] == []


async def test_end_8_n_of_zero_is_an_empty_list_without_a_link(wire: Wire) -> None:
    await wire.push_image("lib/a")

    reply = await wire("GET", "/v2/lib/a/tags/list?n=0")

    assert reply.json() == {"name": "lib/a", "tags": []}
    assert "Link" not in reply.headers


@pytest.mark.parametrize("n", ["-1", "x", "1.5", "%2B5", "1_0", "%D9%A3", ""])
async def test_end_8_an_n_that_is_no_count_is_400(wire: Wire, n: str) -> None:
    await wire.push_image("lib/a")

    assert_refused(await wire("GET", f"/v2/lib/a/tags/list?n={n}"), 400)


async def test_end_8_an_unknown_repository_is_404(wire: Wire) -> None:
    assert_refused(await wire("GET", "/v2/no/such/tags/list"), 404, code="NAME_UNKNOWN")


async def test_the_catalog_lists_every_repository_once_in_order_and_paged(wire: Wire) -> None:
    names = ["a", "a-b", "a/b", "a/b-c", "a/b/c", "a0", "b"]
    for name in reversed(names):
        await wire.push_image(name)

    for count in (1, 3, 100):
        seen: list[str] = []
        target: str | None = f"/v2/_catalog?n={count}"
        while target is not None:
            reply = await wire("GET", target)
            seen += reply.json()["repositories"]
            target = next_target(reply)
        assert seen == sorted(names)
    assert (await wire("GET", "/v2/_catalog?last=a/b")).json()["repositories"] == [
        "a/b-c",
        "a/b/c",
        "a0",
        "b",
    ]


# --- end-12: referrers -----------------------------------------------------------------------------------------------


async def test_end_12_a_digest_that_is_none_is_400(wire: Wire) -> None:
    for digest in ("xyz", "sha256:short", "sha256:" + "A" * 64, "md5:d41d8cd98f00b204e9800998ecf8427e"):
        assert_refused(await wire("GET", f"/v2/lib/a/referrers/{digest}"), 400, code="DIGEST_INVALID")


async def test_end_12_the_artifact_type_is_the_manifests_or_its_configs_or_none_for_an_index(
    wire: Wire,
) -> None:
    _, subject = await wire.push_image("lib/a")
    pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
    own = await wire.push_manifest("lib/a", "own", image(subject=pointer, artifactType="application/x.own"))
    configs = await wire.push_manifest("lib/a", "configs", image(subject=pointer))
    no_type = await wire.push_manifest("lib/a", "none", index(subject=pointer))

    listed = (await wire("GET", f"/v2/lib/a/referrers/{subject}")).json()["manifests"]
    types = {entry["digest"]: entry.get("artifactType") for entry in listed}

    assert types == {own: "application/x.own", configs: OCI_CONFIG, no_type: None}


async def test_end_12_annotations_come_along_exactly(wire: Wire) -> None:
    _, subject = await wire.push_image("lib/a")
    pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
    notes = {"org.example.note": 'quotes " and ü', "b": ""}
    await wire.push_manifest("lib/a", "with", image(subject=pointer, annotations=notes))

    (entry,) = (await wire("GET", f"/v2/lib/a/referrers/{subject}")).json()["manifests"]

    assert entry["annotations"] == notes


async def test_end_12_a_deleted_referrer_is_no_longer_listed(wire: Wire) -> None:
    _, subject = await wire.push_image("lib/a")
    pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
    referrer = await wire.push_manifest("lib/a", "with", image(subject=pointer))

    await wire("DELETE", f"/v2/lib/a/manifests/{referrer}")

    assert (await wire("GET", f"/v2/lib/a/referrers/{subject}")).json()["manifests"] == []


async def test_end_12_what_a_fallback_tag_lists_counts_where_it_has_the_subject(wire: Wire) -> None:
    _, subject = await wire.push_image("lib/a")
    pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
    referrer, stranger = image(subject=pointer), image(annotations={"of": "nothing"})
    digest = await wire.push_manifest("lib/a", "referrer", referrer)
    await wire.push_manifest("lib/a", "stranger", stranger)
    entries = [descriptor(encode(manifest), OCI_MANIFEST) for manifest in (referrer, stranger)]
    await wire.push_manifest("lib/a", subject.replace(":", "-"), index(entries))

    listed = (await wire("GET", f"/v2/lib/a/referrers/{subject}")).json()["manifests"]

    assert [entry["digest"] for entry in listed] == [digest]


async def test_end_12_a_list_that_no_manifest_can_hold_is_paged_by_link(wire: Wire) -> None:
    _, subject = await wire.push_image("lib/a")
    pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
    pushed = set()
    for number in range(6):
        notes = {"n": str(number), "long": "x" * 900_000}
        pushed.add(await wire.push_manifest("lib/a", f"r{number}", image(subject=pointer, annotations=notes)))

    seen: list[str] = []
    pages = 0
    target: str | None = f"/v2/lib/a/referrers/{subject}"
    while target is not None:
        reply = await wire("GET", target)
        assert reply.header("Content-Type") == OCI_INDEX
        assert len(reply.body) <= 4 * 1024 * 1024
        seen += [entry["digest"] for entry in reply.json()["manifests"]]
        pages += 1
        target = next_target(reply)

    assert sorted(seen) == sorted(pushed)
    assert pages > 1


# --- end-9, end-10, end-11: deletes and mounts ------------------------------------------------------------------------


async def test_end_9_a_deleted_tag_leaves_the_manifest_and_its_other_tags(wire: Wire) -> None:
    _, digest = await wire.push_image("lib/a", "v1")
    await wire.push_image("lib/a", "v2")

    assert (await wire("DELETE", "/v2/lib/a/manifests/v1")).status == 202
    assert_refused(await wire("GET", "/v2/lib/a/manifests/v1"), 404, code="MANIFEST_UNKNOWN")
    assert (await wire("GET", "/v2/lib/a/manifests/v2")).header("Docker-Content-Digest") == digest
    assert (await wire("GET", f"/v2/lib/a/manifests/{digest}")).status == 200


async def test_end_9_a_deleted_manifest_takes_all_its_tags_along(wire: Wire) -> None:
    _, digest = await wire.push_image("lib/a", "v1")
    await wire.push_image("lib/a", "v2")
    await wire.push_image("lib/a", "other", annotations={"n": "2"})

    assert (await wire("DELETE", f"/v2/lib/a/manifests/{digest}")).status == 202
    for reference in ("v1", "v2", digest):
        assert_refused(await wire("GET", f"/v2/lib/a/manifests/{reference}"), 404, code="MANIFEST_UNKNOWN")
    assert (await wire("GET", "/v2/lib/a/tags/list")).json()["tags"] == ["other"]


async def test_end_9_and_end_10_what_is_absent_or_in_an_unknown_repository_is_404(wire: Wire) -> None:
    await wire.push_image("lib/a")

    for name in ("lib/a", "no/such"):
        for target in ("manifests/absent", f"manifests/{ABSENT}", f"blobs/{ABSENT}"):
            assert_refused(await wire("DELETE", f"/v2/{name}/{target}"), 404)


async def test_end_10_a_deleted_blob_can_be_pushed_again(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    assert (await wire("DELETE", f"/v2/lib/a/blobs/{digest}")).status == 202
    assert_refused(await wire("GET", f"/v2/lib/a/blobs/{digest}"), 404, code="BLOB_UNKNOWN")
    await wire.push_blob("lib/a", LAYER)

    assert (await wire("GET", f"/v2/lib/a/blobs/{digest}")).body == LAYER


async def test_end_11_a_mount_from_a_repository_that_does_not_exist_is_an_upload(wire: Wire) -> None:
    reply = await wire("POST", f"/v2/lib/b/blobs/uploads/?mount={Digest.of(LAYER)}&from=no/such")

    assert reply.status == 202
    done = await wire("PUT", f"{path_of(reply.header('Location'))}?digest={Digest.of(LAYER)}", body=LAYER)
    assert done.status == 201


async def test_end_11_a_mounted_blob_outlives_its_source(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)

    mounted = await wire("POST", f"/v2/lib/b/blobs/uploads/?mount={digest}&from=lib/a")
    await wire("DELETE", f"/v2/lib/a/blobs/{digest}")

    assert (mounted.status, path_of(mounted.header("Location"))) == (201, f"/v2/lib/b/blobs/{digest}")
    assert (await wire("GET", f"/v2/lib/b/blobs/{digest}")).body == LAYER


async def test_an_artifact_with_the_empty_config_is_an_ordinary_manifest(wire: Wire) -> None:
    await wire.push_blob("lib/a", b"{}")
    manifest = image(
        config=descriptor(b"{}", OCI_EMPTY),
        layers=[descriptor(b"{}", OCI_EMPTY)],
        artifactType="application/x.y",
    )

    digest = await wire.push_manifest("lib/a", "artifact", manifest)

    assert (await wire("GET", f"/v2/lib/a/manifests/{digest}")).body == encode(manifest)
