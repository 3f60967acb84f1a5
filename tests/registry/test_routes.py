"""Every path leads to one endpoint or to none, and every endpoint to one handler."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.routes import LABELS, ROUTES, Endpoint, Target, methods_of, route_of, target_of

# Names made of the words of the paths themselves: whatever a repository is called, its paths are its own.
WORDS = st.sampled_from(["a", "blobs", "uploads", "manifests", "tags", "list", "referrers", "v2", "_x"])
NAMES = st.lists(WORDS, min_size=1, max_size=5).map("/".join)


@given(NAMES)
def test_B_09_any_name_is_routed_without_ambiguity(name: str) -> None:
    assert target_of(f"/v2/{name}/blobs/sha256:ab") == Target(Endpoint.BLOB, name, "sha256:ab")
    assert target_of(f"/v2/{name}/manifests/v1") == Target(Endpoint.MANIFEST, name, "v1")
    assert target_of(f"/v2/{name}/referrers/sha256:ab") == Target(Endpoint.REFERRERS, name, "sha256:ab")
    assert target_of(f"/v2/{name}/blobs/uploads/0a1b") == Target(Endpoint.UPLOAD, name, "0a1b")
    uploads, tags = target_of(f"/v2/{name}/blobs/uploads/"), target_of(f"/v2/{name}/tags/list")
    assert uploads is not None
    assert tags is not None
    assert (uploads.endpoint, uploads.name) == (Endpoint.UPLOADS, name)
    assert (tags.endpoint, tags.name) == (Endpoint.TAGS, name)


@given(st.text(alphabet="/v2abl%.~_-:ostgmnif0", max_size=60))
def test_no_path_makes_the_router_fail(path: str) -> None:
    target = target_of("/" + path)

    assert target is None or target.endpoint in Endpoint


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/",
        "/V2/",
        "//v2/",
        "/v2//a/tags/list",
        "/v2/a//b/tags/list",
        "/v2/a/tags/list/",
        "/v2/_catalog/",
        "/v2/%5fcatalog",
        "/v2/a%2fb/tags/list",
        "/v2/%2e%2e/a/tags/list",
        "/v2/a/blobs/sha256:ab/",
        "/v2/manifests/v1",
        "/v2/" + "a/" * 3000 + "tags/list",
    ],
)
def test_a_path_that_is_none_of_ours_leads_nowhere(path: str) -> None:
    assert target_of(path) is None


def test_an_escape_in_an_argument_is_undone_once() -> None:
    target = target_of("/v2/a/manifests/sha256%3Aab%2500")

    assert target == Target(Endpoint.MANIFEST, "a", "sha256:ab%00")


@pytest.mark.parametrize("endpoint", Endpoint, ids=lambda endpoint: endpoint.name)
def test_every_endpoint_has_a_label_and_a_route_and_says_its_methods(endpoint: Endpoint) -> None:
    assert endpoint in LABELS
    routes = [route for route in ROUTES if route.endpoint is endpoint]
    assert routes
    assert methods_of(endpoint) == ", ".join(
        sorted(
            {route.method for route in routes}
            | ({"HEAD"} if any(r.method == "GET" for r in routes) else set())
        )
    )


def test_no_method_but_those_of_the_table_is_answered() -> None:
    for endpoint in Endpoint:
        for method in ("TRACE", "CONNECT", "OPTIONS", "get", ""):
            assert route_of(endpoint, method) is None
