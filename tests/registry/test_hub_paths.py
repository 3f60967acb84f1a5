"""A path below /hf/ has one meaning or none, whatever repositories, revisions and files are called."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.errors import NameInvalid, NameUnknown, OciError
from kitspec.names import RepositoryName
from registry.hub_paths import HubPath, HubPathUnknown, parse_hub_path


@pytest.mark.parametrize(
    ("raw", "meant"),
    [
        ("api/models", HubPath("list")),
        ("team/llm/api/datasets", HubPath("list", "dataset", "team/llm")),
        ("api/whoami-v2", HubPath("whoami")),
        ("a/b/api/whoami-v2", HubPath("whoami", endpoint="a/b")),
        ("api/models/gpt2", HubPath("info", "model", "", "gpt2")),
        ("api/models/ns/name", HubPath("info", "model", "", "ns/name")),
        ("api/datasets/ns/name", HubPath("info", "dataset", "", "ns/name")),
        ("a/b/api/models/c/d", HubPath("info", "model", "a/b", "c/d")),
        ("api/models/gpt2/revision/v1", HubPath("info", "model", "", "gpt2", "v1")),
        ("api/models/ns/name/revision/refs%2Fpr%2F1", HubPath("info", "model", "", "ns/name", "refs/pr/1")),
        ("api/models/ns/name/tree/main", HubPath("tree", "model", "", "ns/name", "main")),
        ("api/models/ns/name/tree/main/a%2Fb/c", HubPath("tree", "model", "", "ns/name", "main", "a/b/c")),
        ("api/models/ns/name/tree/main/", HubPath("tree", "model", "", "ns/name", "main")),
        ("api/models/gpt2/tree/v1/refs", HubPath("tree", "model", "", "gpt2", "v1", "refs")),
        ("api/models/ns/name/paths-info/v1", HubPath("paths-info", "model", "", "ns/name", "v1")),
        ("api/models/ns/name/refs", HubPath("refs", "model", "", "ns/name")),
        ("api/models/ns/name/commits/main", HubPath("commits", "model", "", "ns/name", "main")),
        ("api/models/ns/name/auth-check", HubPath("auth-check", "model", "", "ns/name")),
        ("ns/name/resolve/v1/a/b.bin", HubPath("file", "model", "", "ns/name", "v1", "a/b.bin")),
        ("ns/name/raw/v1/a", HubPath("file", "model", "", "ns/name", "v1", "a")),
        ("gpt2/resolve/v1.only.model/a", HubPath("file", "model", "", "gpt2", "v1.only.model", "a")),
        ("a/b/c/d/resolve/v1/x", HubPath("file", "model", "a/b", "c/d", "v1", "x")),
        ("datasets/ns/name/resolve/v1/x", HubPath("file", "dataset", "", "ns/name", "v1", "x")),
        ("a/b/datasets/c/d/resolve/v1/x", HubPath("file", "dataset", "a/b", "c/d", "v1", "x")),
        ("datasets/squad/resolve/v1/x", HubPath("file", "dataset", "", "squad", "v1", "x")),
        ("a/datasets/datasets/b/resolve/v1/x", HubPath("file", "dataset", "a", "datasets/b", "v1", "x")),
        (
            "Qwen/Qwen3-8B/resolve/Main/README.md",
            HubPath("file", "model", "", "qwen/qwen3-8b", "Main", "README.md"),
        ),
        # The first word that can be the Hub's is.
        (
            "ns/name/resolve/main/api/models/x",
            HubPath("file", "model", "", "ns/name", "main", "api/models/x"),
        ),
        (
            "ns/name/resolve/resolve/resolve/raw",
            HubPath("file", "model", "", "ns/name", "resolve", "resolve/raw"),
        ),
        ("resolve/x/resolve/v1/f", HubPath("file", "model", "", "resolve/x", "v1", "f")),
        ("team/api/resolve/v1/f", HubPath("file", "model", "", "team/api", "v1", "f")),
        ("api/models/ns/refs", HubPath("refs", "model", "", "ns")),
        # Undone once.
        ("a/b/resolve/v%2531/%252e", HubPath("file", "model", "", "a/b", "v%31", "%2e")),
        ("a/b/resolve/v1/%ff%00", HubPath("file", "model", "", "a/b", "v1", "\ufffd\0")),
    ],
)
def test_a_path_of_a_client_is_understood(raw: str, meant: HubPath) -> None:
    assert parse_hub_path(raw) == meant


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        ("", HubPathUnknown),
        ("api", HubPathUnknown),
        ("models/a", HubPathUnknown),
        ("resolve/v1/x", HubPathUnknown),
        ("ns/name/resolve/v1", HubPathUnknown),
        ("ns/name/blob/main/x", HubPathUnknown),
        ("api/validate-yaml", HubPathUnknown),
        ("api/repos/create", HubPathUnknown),
        ("api/whoami-v2/x", HubPathUnknown),
        ("api/models/a/b/c", HubPathUnknown),
        ("api/models/a/b/refs/c", HubPathUnknown),
        ("api/models/a/b/revision", HubPathUnknown),
        ("api/models/a/b/tree", HubPathUnknown),
        ("api/models/a/b/paths-info/v1/x", HubPathUnknown),
        ("api/models/a/b/discussions", HubPathUnknown),
        ("api/models/K\u212a/b", HubPathUnknown),
        ("api/models/", NameInvalid),
        ("api/models//b", NameInvalid),
        ("api/models/a/b/", HubPathUnknown),
        ("/api/models/a/b", NameInvalid),
        ("//resolve/v1/x", NameInvalid),
        ("a//b/resolve/v1/x", NameInvalid),
        ("../b/resolve/v1/x", NameInvalid),
        ("a%2Fb/resolve/v1/x", NameInvalid),
        ("a/_b/resolve/v1/x", NameInvalid),
        ("a/b%00/resolve/v1/x", NameInvalid),
        ("a/../b/api/models", NameInvalid),
        ("a/" * 130 + "b/resolve/v1/x", NameInvalid),
        ("api/spaces/a/b", NameUnknown),
        ("api/kernels/a/b", NameUnknown),
    ],
)
def test_a_path_that_asks_nothing_is_refused(raw: str, kind: type[OciError]) -> None:
    with pytest.raises(kind):
        parse_hub_path(raw)


WORDS = ("api", "datasets", "models", "raw", "refs", "resolve", "revision", "tree", "whoami-v2")
COMPONENTS = st.from_regex(r"[a-z0-9]{1,6}([._-][a-z0-9]{1,4})?", fullmatch=True).filter(
    lambda text: text not in WORDS
)
ENDPOINTS = st.lists(COMPONENTS, max_size=4).map("/".join)
IDS = st.lists(COMPONENTS, min_size=1, max_size=2).map("/".join)
# What huggingface_hub leaves of a file name and of a revision unescaped.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(ENDPOINTS, IDS, TEXTS, TEXTS)
def test_whatever_files_and_revisions_are_called_they_are_read_as_they_were_meant(
    endpoint: str, id_: str, revision: str, file: str
) -> None:
    base = f"{endpoint}/" if endpoint else ""
    escaped = quote(revision, safe="")

    path = parse_hub_path(f"{base}{id_}/resolve/{escaped}/{quote(file)}")
    dataset = parse_hub_path(f"{base}datasets/{id_}/resolve/{escaped}/{quote(file)}")
    tree = parse_hub_path(f"{base}api/datasets/{id_}/tree/{escaped}/{quote(file, safe='')}")

    assert path.name == RepositoryName(f"{base}{id_}")
    assert (path.operation, path.kind, path.revision, path.path) == ("file", "model", revision, file)
    assert dataset == HubPath("file", "dataset", endpoint, id_, revision, file)
    assert tree == HubPath("tree", "dataset", endpoint, id_, revision, file)


@given(st.text(st.sampled_from("abpimodels/resv%2.-_tdk"), max_size=60))
def test_no_path_is_more_than_refused(raw: str) -> None:
    path: HubPath | None = None
    with suppress(NameInvalid, NameUnknown, HubPathUnknown):
        path = parse_hub_path(raw)

    assert path is None or path.operation in {"list", "whoami"} or RepositoryName(path.name)
