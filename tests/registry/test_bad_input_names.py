"""Names, tags, digests and list queries as an attacker or a broken client writes them."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitspec.digest import Digest
from tests.registry.wire import (
    LAYER,
    OCI_MANIFEST,
    Reply,
    Wire,
    assert_discreet,
    assert_refused,
    descriptor,
    encode,
    image,
    index,
    next_target,
)


@pytest.fixture
def wire(registry_url: str) -> Wire:
    return Wire(registry_url)


async def assert_nothing_stored(wire: Wire) -> None:
    assert (await wire("GET", "/v2/_catalog")).json() == {"repositories": []}


@pytest.mark.parametrize(
    "target",
    ["/v2/%2e%2e/a/tags/list", "/v2/../a/tags/list", "/v2/lib/../a/tags/list", "/v2/..%2fa/tags/list"],
)
async def test_B_03_a_name_that_climbs_is_404(wire: Wire, target: str) -> None:
    await wire.push_image("a")

    assert_refused(await wire("GET", target), 404, 400)


async def test_B_04_an_escaped_slash_is_no_slash(wire: Wire) -> None:
    await wire.push_image("lib/a")

    assert_refused(await wire("GET", "/v2/lib%2Fa/tags/list"), 404)
    assert_refused(await wire("PUT", "/v2/lib%2fa/manifests/v1", body=encode(image())), 404)


@pytest.mark.parametrize(
    "target",
    [
        "/v2/lib//a/tags/list",
        "//v2/lib/a/tags/list",
        "/v2//lib/a/tags/list",
        "/v2/lib/a//tags/list",
        "/v2/lib/a/tags/list/",
    ],
)
async def test_B_05_doubled_and_trailing_slashes_are_404(wire: Wire, target: str) -> None:
    await wire.push_image("lib/a")

    assert_refused(await wire("GET", target), 404)


@pytest.mark.parametrize(
    "evil", ["%00", "%0d%0a", "%5c", "%ff", "%c0%ae", "%09", "%20", "%25", "\\", "a%", "%zz", "%u002e"]
)
@pytest.mark.parametrize("rest", ["tags/list", "manifests/v1", "blobs/uploads/"])
async def test_B_06_control_characters_and_bad_escapes_in_a_name_are_refused(
    wire: Wire, evil: str, rest: str
) -> None:
    method = "POST" if rest.startswith("blobs") else "GET"

    for name in (f"lib/{evil}", f"lib{evil}a", evil):
        reply = await wire(method, f"/v2/{name}/{rest}")
        assert reply.status in {400, 404}
        assert_discreet(reply)
    await assert_nothing_stored(wire)


@pytest.mark.parametrize("length", [256, 300, 4000, 8000])
async def test_B_07_a_name_that_is_too_long_is_refused(wire: Wire, length: int) -> None:
    for name in ("a" * length, "a/" * (length // 2) + "a" * (length % 2 + 1)):
        for method, rest in (("POST", "blobs/uploads/"), ("GET", "tags/list"), ("GET", "manifests/v1")):
            reply = await wire(method, f"/v2/{name}/{rest}")
            assert_refused(reply, 400, 404)
            if length <= 300:
                assert reply.status == 400
                assert reply.codes == ["NAME_INVALID"]


async def test_B_08_a_name_of_many_components_is_taken_up_to_255_characters(wire: Wire) -> None:
    fitting = "/".join(["a"] * 128)
    assert len(fitting) == 255

    await wire.push_image(fitting)
    too_many = await wire("POST", f"/v2/{'/'.join(['a'] * 200)}/blobs/uploads/")

    assert (await wire("GET", f"/v2/{fitting}/tags/list")).json()["name"] == fitting
    assert (await wire("GET", "/v2/_catalog")).json()["repositories"] == [fitting]
    assert_refused(too_many, 400, code="NAME_INVALID")


@pytest.mark.parametrize(
    "name",
    [
        "blobs",
        "manifests",
        "uploads",
        "referrers",
        "tags",
        "v2",
        "list",
        "lib/blobs",
        "lib/blobs/uploads",
        "blobs/uploads/x",
        "lib/manifests/v1",
        "tags/list",
        "tags/list/tags/list",
        "v2/v2",
        "referrers/blobs/uploads",
        "a/manifests/manifests",
    ],
)
async def test_B_09_a_repository_may_be_called_like_an_endpoint(wire: Wire, name: str) -> None:
    manifest, digest = await wire.push_image(name)
    upload = await wire.begin_upload(name)

    assert (await wire("GET", f"/v2/{name}/manifests/v1")).body == encode(manifest)
    assert (await wire("GET", f"/v2/{name}/blobs/{Digest.of(LAYER)}")).body == LAYER
    assert (await wire("GET", f"/v2/{name}/tags/list")).json() == {"name": name, "tags": ["v1"]}
    assert (await wire("GET", f"/v2/{name}/referrers/{digest}")).json()["manifests"] == []
    assert (await wire("GET", upload)).status == 204
    assert (await wire("GET", "/v2/_catalog")).json()["repositories"] == [name]
    assert (await wire("DELETE", f"/v2/{name}/manifests/{digest}")).status == 202


async def test_B_09_repositories_that_contain_each_other_stay_apart(wire: Wire) -> None:
    names = ["lib", "lib/blobs", "lib/blobs/uploads", "lib/manifests", "lib/tags"]
    for name in names:
        await wire.push_image(name, tag=name.replace("/", "-"))

    for name in names:
        assert (await wire("GET", f"/v2/{name}/tags/list")).json()["tags"] == [name.replace("/", "-")]
    assert (await wire("GET", "/v2/_catalog")).json()["repositories"] == names


async def test_B_09_a_repository_cannot_be_called_catalog(wire: Wire) -> None:
    assert_refused(await wire("POST", "/v2/_catalog/blobs/uploads/"), 400, 404)


async def test_B_10_a_tag_may_have_128_characters_and_no_more(wire: Wire) -> None:
    await wire.push_image("lib/a", "x" * 128)

    assert (await wire("GET", f"/v2/lib/a/manifests/{'x' * 128}")).status == 200
    assert_refused(await wire.put_manifest("lib/a", "x" * 129, image()), 400, 404)
    assert_refused(await wire("GET", f"/v2/lib/a/manifests/{'x' * 129}"), 400, 404)


@pytest.mark.parametrize(
    "tag",
    [
        ".bad",
        "-x",
        "a%20b",
        "%C3%BC",
        "sha256:short",
        "a%00",
        "a%0a",
        "a%2fb",
        "..",
        ".",
        "a%2f..%2f..%2fb",
        "a+b",
        "a,b",
        "~",
    ],
)
async def test_B_11_a_tag_outside_the_grammar_is_refused_and_nothing_is_stored(wire: Wire, tag: str) -> None:
    await wire.push_image("lib/a", "good")

    reply = await wire.put_manifest("lib/a", tag, image(annotations={"n": "2"}))

    assert_refused(reply, 400)
    assert (await wire("GET", "/v2/lib/a/tags/list")).json()["tags"] == ["good"]
    assert_refused(await wire("GET", f"/v2/lib/a/manifests/{tag}"), 400, 404)
    content = encode(image(annotations={"n": "2"}))
    assert_refused(await wire("GET", f"/v2/lib/a/manifests/{Digest.of(content)}"), 404)


async def test_B_12_latest_and_digest_shaped_tags_are_ordinary(wire: Wire) -> None:
    encoded = "a" * 64
    tags = sorted(["latest", f"sha256-{encoded}", f"sha256-{encoded}.sig", f"sha512-{encoded}"])

    for tag in tags:
        await wire.push_image("lib/a", tag)

    assert (await wire("GET", "/v2/lib/a/tags/list")).json()["tags"] == tags
    for tag in tags:
        assert (await wire("DELETE", f"/v2/lib/a/manifests/{tag}")).status == 202


async def test_B_12_a_fallback_tag_that_holds_no_index_does_not_harm_referrers(wire: Wire) -> None:
    _, subject = await wire.push_image("lib/a")
    await wire.push_image("lib/a", subject.replace(":", "-"))

    reply = await wire("GET", f"/v2/lib/a/referrers/{subject}")

    assert (reply.status, reply.json()["manifests"]) == (200, [])


async def test_B_12_a_fallback_index_and_the_api_name_a_referrer_once(wire: Wire) -> None:
    _, subject = await wire.push_image("lib/a")
    referrer = image(subject={"mediaType": OCI_MANIFEST, "digest": subject, "size": 1})
    digest = await wire.push_manifest("lib/a", "r", referrer)
    await wire.push_manifest(
        "lib/a", subject.replace(":", "-"), index([descriptor(encode(referrer), OCI_MANIFEST)])
    )

    listed = (await wire("GET", f"/v2/lib/a/referrers/{subject}")).json()["manifests"]

    assert [entry["digest"] for entry in listed] == [digest]


async def test_B_13_tags_that_differ_in_case_are_two_tags(wire: Wire) -> None:
    _, lower = await wire.push_image("lib/a", "tag")
    _, upper = await wire.push_image("lib/a", "TAG", annotations={"n": "2"})

    assert (await wire("GET", "/v2/lib/a/manifests/tag")).header("Docker-Content-Digest") == lower
    assert (await wire("GET", "/v2/lib/a/manifests/TAG")).header("Docker-Content-Digest") == upper
    await wire("DELETE", "/v2/lib/a/manifests/TAG")
    assert (await wire("GET", "/v2/lib/a/tags/list")).json()["tags"] == ["tag"]


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 65,
        "sha256:" + "a" * 63,
        "sha256:" + "a" * 64 + "%0a",
        "SHA256:" + "a" * 64,
        "sha256:" + "g" * 64,
        "sha256:" + "%D9%A3" * 64,
        "sha256:sha256:" + "a" * 57,
        "%20sha256:" + "a" * 64,
        "sha512:" + "a" * 64,
        "sha256:..%2f..%2fetc%2fpasswd",
        "sha256:../../etc/passwd",
        "sha256:%2e%2e",
        ":" + "a" * 64,
        "sha256%3A" + "A" * 64,
    ],
)
async def test_B_15_B_18_V_26_a_digest_outside_the_grammar_is_refused_everywhere(
    wire: Wire, digest: str
) -> None:
    await wire.push_image("lib/a")
    climbs = "/../" in digest
    statuses = (400, 404) if climbs else (400,)

    for method in ("GET", "DELETE"):
        assert_refused(await wire(method, f"/v2/lib/a/blobs/{digest}"), *statuses)
        assert_refused(await wire(method, f"/v2/lib/a/manifests/{digest}"), 400, 404)
    assert_refused(await wire("GET", f"/v2/lib/a/referrers/{digest}"), *statuses)
    assert_refused(await wire.put_manifest("lib/a", digest, image()), *statuses)
    assert_refused(await wire("POST", f"/v2/lib/a/blobs/uploads/?digest={digest}", body=LAYER), 400)
    upload = await wire.begin_upload("lib/a")
    assert_refused(await wire("PUT", f"{upload}?digest={digest}", body=LAYER), 400)


async def test_B_20_a_layers_digest_is_no_manifest(wire: Wire) -> None:
    await wire.push_image("lib/a")

    for method in ("GET", "DELETE"):
        reply = await wire(method, f"/v2/lib/a/manifests/{Digest.of(LAYER)}")
        assert_refused(reply, 404, code="MANIFEST_UNKNOWN")


async def test_B_21_V_11_a_blob_of_another_repository_is_unknown(wire: Wire) -> None:
    digest = await wire.push_blob("private/a", LAYER)
    await wire.push_blob("public/b", b"{}")
    await wire.push_manifest("public/b", "v1", image(layers=[]))
    target = f"/v2/public/b/blobs/{digest}"

    assert_refused(await wire("GET", target), 404, code="BLOB_UNKNOWN")
    assert (await wire("HEAD", target)).status == 404
    assert_refused(await wire("DELETE", target), 404, code="BLOB_UNKNOWN")
    empty_handed = await wire("POST", f"/v2/public/b/blobs/uploads/?digest={digest}")
    assert_refused(empty_handed, 400, code="DIGEST_INVALID")
    upload = await wire.begin_upload("public/b")
    assert_refused(await wire("PUT", f"{upload}?digest={digest}"), 400, code="DIGEST_INVALID")
    assert (await wire("HEAD", target)).status == 404


async def test_V_05_a_deleted_blob_does_not_come_back_by_another_repository(wire: Wire) -> None:
    digest = await wire.push_blob("lib/a", LAYER)
    await wire.push_blob("lib/b", LAYER)

    await wire("DELETE", f"/v2/lib/a/blobs/{digest}")

    assert (await wire("GET", f"/v2/lib/b/blobs/{digest}")).body == LAYER
    assert_refused(await wire("GET", f"/v2/lib/a/blobs/{digest}"), 404, code="BLOB_UNKNOWN")
    assert (await wire("HEAD", f"/v2/lib/a/blobs/{digest}")).status == 404


# --- listing -----------------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("n", [10**12, 2**63, 2**64, 10**400], ids=["10^12", "2^63", "2^64", "10^400"])
async def test_V_01_a_huge_n_costs_nothing(wire: Wire, n: int) -> None:
    for name in ("a", "b", "c"):
        await wire.push_image(name)
    before = resident_bytes()

    catalog = await wire("GET", f"/v2/_catalog?n={n}")
    tags = await wire("GET", f"/v2/a/tags/list?n={n}")

    assert (catalog.status, catalog.json()["repositories"]) == (200, ["a", "b", "c"])
    assert (tags.status, tags.json()["tags"]) == (200, ["v1"])
    assert resident_bytes() - before < 10 * 1024 * 1024


_NAMES = st.lists(st.text("ab-.", min_size=1, max_size=4), unique=True, min_size=1, max_size=6)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(endings=_NAMES, count=st.integers(1, 7))
async def test_V_08_pages_of_tags_together_are_all_tags(wire: Wire, endings: list[str], count: int) -> None:
    name = f"lib/{len(endings)}-{Digest.of(encode([endings, count])).encoded[:16]}"
    tags = sorted(f"v1{ending}" for ending in endings)
    for tag in tags:
        await wire.push_image(name, tag)

    seen: list[str] = []
    target: str | None = f"/v2/{name}/tags/list?n={count}"
    while target is not None:
        reply = await wire("GET", target)
        seen += reply.json()["tags"]
        target = next_target(reply)

    assert seen == tags


async def test_V_08_pages_of_the_catalog_together_are_all_repositories(wire: Wire) -> None:
    names = sorted(["a/math", "a/math-voila", "a/math/b", "a-math", "a", "a.b", "a_b", "a0", "ab", "a/b"])
    for name in names:
        await wire.push_image(name)

    for count in range(1, len(names) + 2):
        seen: list[str] = []
        target: str | None = f"/v2/_catalog?n={count}"
        while target is not None:
            reply = await wire("GET", target)
            seen += reply.json()["repositories"]
            target = next_target(reply)
        assert seen == names


async def test_B_34_a_doubled_query_is_answered_the_same_everywhere(wire: Wire) -> None:
    for tag in ("a", "b", "c"):
        await wire.push_image("lib/a", tag)

    def judged(reply: Reply, first: object, items: str) -> str:
        """First wins, or refused."""
        if reply.status == 400:
            assert_refused(reply, 400)
            return "refused"
        assert reply.json()[items] == first
        return "first wins"

    verdicts = {
        judged(await wire("GET", "/v2/lib/a/tags/list?n=1&n=2"), ["a"], "tags"),
        judged(await wire("GET", "/v2/lib/a/tags/list?last=b&last=a"), ["c"], "tags"),
        judged(await wire("GET", "/v2/_catalog?n=0&n=1"), [], "repositories"),
        judged(await wire("GET", "/v2/_catalog?last=z&last=a"), [], "repositories"),
    }
    assert len(verdicts) == 1


@pytest.mark.parametrize(
    "last", ["%00", "%ff", "../..", "a" * 3000, "%F0%9F%98%80", "'%3B--", "%0d%0aX-Evil:1"]
)
async def test_B_34_any_last_is_a_place_in_the_order_or_refused(wire: Wire, last: str) -> None:
    await wire.push_image("lib/a")

    for target in (f"/v2/lib/a/tags/list?n=1&last={last}", f"/v2/_catalog?n=1&last={last}"):
        reply = await wire("GET", target)
        assert reply.status in {200, 400}
        assert_discreet(reply)
        assert "X-Evil" not in reply.headers


async def test_B_36_referrers_of_what_is_no_digest_is_400(wire: Wire) -> None:
    assert_refused(await wire("GET", "/v2/lib/a/referrers/xyz"), 400, code="DIGEST_INVALID")


async def test_B_37_referrers_of_the_unknown_are_an_empty_index(wire: Wire) -> None:
    await wire.push_image("lib/a")

    for name in ("lib/a", "no/such"):
        reply = await wire("GET", f"/v2/{name}/referrers/{Digest.of(b'unknown')}")
        assert (reply.status, reply.json()["manifests"]) == (200, [])


@pytest.mark.parametrize(
    "query",
    [
        "artifactType=application/unknown",
        "artifactType=%00",
        f"artifactType={'x' * 5000}",
        "artifactType=application/unknown&artifactType=application/unknown2",
        "artifactType=%0d%0aX-Evil:1",
    ],
)
async def test_B_38_an_artifact_type_that_nothing_has_filters_everything(wire: Wire, query: str) -> None:
    _, subject = await wire.push_image("lib/a")
    pointer = {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1}
    await wire.push_manifest("lib/a", "r", image(subject=pointer, artifactType="application/x.y"))

    reply = await wire("GET", f"/v2/lib/a/referrers/{subject}?{query}")

    assert reply.status == 200
    assert reply.json()["manifests"] == []
    assert reply.header("OCI-Filters-Applied") == "artifactType"
    assert "X-Evil" not in reply.headers
