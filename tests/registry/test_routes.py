"""Every path leads to one endpoint or to none, and every endpoint to one handler."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.errors import NameInvalid
from kitspec.names import RepositoryName
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


@given(st.text(alphabet="/v2abl%.~_-:ostgmnif0dek", max_size=60))
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


# ---- the extension: what is behind `_modelkit` may be called anything

FILE_WORDS = st.sampled_from(
    [
        "a",
        "_modelkit",
        "files",
        "v1",
        "manifests",
        "blobs",
        "uploads",
        "tags",
        "list",
        "v2",
        "..",
        "%",
        "é ?#",
        "",
    ]
)
FILE_PATHS = st.lists(FILE_WORDS, min_size=1, max_size=6).map("/".join).filter(bool)
REFERENCES = st.sampled_from(["v1", "v1.only.model.as.image", "sha256:ab", "_", "files", "_modelkit"])


@given(NAMES, REFERENCES, FILE_PATHS)
def test_any_file_of_any_repository_is_routed_without_ambiguity(name: str, reference: str, path: str) -> None:
    below = f"/v2/{name}/_modelkit"

    assert target_of(f"{below}/files/{reference}") == Target(Endpoint.FILES, name, reference)
    assert target_of(f"{below}/kitfile/{reference}") == Target(Endpoint.KITFILE, name, reference)
    assert target_of(f"{below}/archive/{reference}") == Target(Endpoint.ARCHIVE, name, reference)
    assert target_of(f"{below}/tensors/{reference}") == Target(Endpoint.TENSORS, name, reference)
    for safe in ("", "/"):
        sent = quote(path, safe=safe)
        assert target_of(f"{below}/files/{reference}/{sent}") == Target(Endpoint.FILE, name, reference, path)
        assert target_of(f"{below}/tensors/{reference}/{sent}") == Target(
            Endpoint.TENSORS_OF_FILE, name, reference, path
        )


@given(
    st.lists(
        st.sampled_from(["v2", "a", "_modelkit", "files", "archive", "v1", "manifests", "", "%2f", "%"]),
        max_size=9,
    )
)
def test_whoever_decides_on_access_sees_the_repository_that_is_served(parts: list[str]) -> None:
    """Every way of reading a path but ours is one in which the name is no name."""
    target = target_of("/v2/" + "/".join(parts))

    if target is not None and target.name:
        assert "%" not in target.name
        if "/_modelkit/" in f"/{target.name}/":
            with pytest.raises(NameInvalid):
                RepositoryName(target.name)


def test_escapes_in_a_reference_and_a_path_are_undone_once() -> None:
    target = target_of("/v2/a/_modelkit/files/sha256%3Aab/b%2Fc%252F%2e%2e/%FF+d")

    assert target == Target(Endpoint.FILE, "a", "sha256:ab", "b/c%2F../\ufffd+d")


@pytest.mark.parametrize(
    "path",
    [
        "/v2/_modelkit/files/v1",
        "/v2//_modelkit/files/v1",
        "/v2/a/_modelkit",
        "/v2/a/_modelkit/",
        "/v2/a/_modelkit/files",
        "/v2/a/_modelkit/files/",
        "/v2/a/_modelkit/files/v1/",
        "/v2/a/_modelkit/files//x",
        "/v2/a/_modelkit//files/v1",
        "/v2/a//_modelkit/files/v1",
        "/v2/a//b/_modelkit/files/v1",
        "/v2/a/_modelkit/Files/v1",
        "/v2/a/_modelkit/file/v1",
        "/v2/a/_modelkit/kitfile/v1/x",
        "/v2/a/_modelkit/archive/v1/x",
        "/v2/a/_Modelkit/files/v1",
        "/v2/a/%5fmodelkit/files/v1",
        "/v2/a/_modelkit%2ffiles/v1",
        "/v2/a%2fb/_modelkit/files/v1",
        "/v2/%61/_modelkit/files/v1",
        "/a/_modelkit/files/v1",
        "/v2/a/_modelkit/kitfile/v1/_modelkit/files/v1",
        "/v2/_oci/ext/discover/",
        "/v2/a/_oci/ext/discover",
        "/v2/_oci/ext/",
        "/v2/%5foci/ext/discover",
    ],
)
def test_a_path_below_the_extension_that_is_none_of_ours_leads_nowhere(path: str) -> None:
    assert target_of(path) is None


def test_what_belongs_to_the_specification_does_so_whatever_the_name_would_be() -> None:
    """The name is refused behind: a component does not begin with `_`."""
    target = target_of("/v2/a/_modelkit/manifests/v1")

    assert target == Target(Endpoint.MANIFEST, "a/_modelkit", "v1")
    with pytest.raises(NameInvalid):
        RepositoryName(target.name)


def test_a_path_of_a_file_may_be_longer_than_any_name() -> None:
    path = "/".join(["n" * 255] * 20)

    assert target_of(f"/v2/a/_modelkit/files/v1/{path}") == Target(Endpoint.FILE, "a", "v1", path)


def test_a_long_path_that_nearly_fits_costs_little() -> None:
    """Matching is linear: a quadratic one would take minutes."""
    for part in ("/_modelkit", "/_modelkit/files", "/_modelkit/files/", "/a/_modelkit/archive/v1/x", "/"):
        target_of("/v2/a" + part * 40_000 + "%")
