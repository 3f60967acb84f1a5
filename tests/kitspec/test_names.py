import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.digest import Digest
from kitspec.errors import NameInvalid, ReferenceInvalid, TagInvalid
from kitspec.names import Reference, RepositoryName, Tag, ViewName, view_of

DIGEST = Digest.of(b"")


@pytest.mark.parametrize(
    "name", ["a", "a/b", "a.b", "a_b", "a__b", "a---b", "0/1", "v2/blobs/uploads", "a" * 128]
)
def test_a_repository_name_is_its_text(name):
    assert RepositoryName(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "a/",
        "/a",
        "a//b",
        "A",
        "a.",
        ".a",
        "a..b",
        "a___b",
        "_",
        "-a",
        "ü",
        "a b",
        "a\n",
        "..",
        "a/../b",
        "a\0",
        "٣",
    ],
)
def test_B_06_what_is_no_repository_name_is_refused(name):
    with pytest.raises(NameInvalid):
        RepositoryName(name)


@pytest.mark.parametrize("length", [256, 300, 8000])
def test_B_07_a_long_name_is_refused(length):
    with pytest.raises(NameInvalid, match="at most 255"):
        RepositoryName("a" * length)


def test_B_08_many_components_are_a_name_up_to_its_length():
    assert RepositoryName("/".join("a" * 128))

    with pytest.raises(NameInvalid):
        RepositoryName("/".join("a" * 129))
    with pytest.raises(NameInvalid, match="component"):
        RepositoryName("a" * 129)


def test_B_10_a_tag_has_at_most_128_characters():
    assert Tag("a" * 128)

    with pytest.raises(TagInvalid):
        Tag("a" * 129)


@pytest.mark.parametrize("tag", ["", ".bad", "-x", "a b", "ü", "sha256:short", "a\n", "a/b", "a\0"])
def test_B_11_what_is_no_tag_is_refused(tag):
    with pytest.raises(TagInvalid):
        Tag(tag)


@pytest.mark.parametrize(
    "tag", ["latest", f"sha256-{DIGEST.encoded}", f"sha256-{DIGEST.encoded}.sig", "_", "A"]
)
def test_B_12_odd_tags_are_ordinary(tag):
    assert Tag(tag) == tag
    assert view_of(Tag(tag)) is None


@pytest.mark.parametrize(
    ("tag", "view"),
    [
        ("v1.only.model", ViewName(Tag("v1"), ("model",), None)),
        ("v1.only.model.datasets_train", ViewName(Tag("v1"), ("model", "datasets_train"), None)),
        ("v1.as.image", ViewName(Tag("v1"), (), "image")),
        ("1.2.only.model.as.image", ViewName(Tag("1.2"), ("model",), "image")),
    ],
)
def test_a_tag_may_name_a_view(tag, view):
    assert view_of(Tag(tag)) == view


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("foo", Reference("localhost", RepositoryName("foo"))),
        ("a/b/c", Reference("localhost", RepositoryName("a/b/c"))),
        ("foo:v1", Reference("localhost", RepositoryName("foo"), Tag("v1"))),
        ("localhost/foo:v1", Reference("localhost", RepositoryName("foo"), Tag("v1"))),
        ("reg.io/foo:1,2", Reference("reg.io", RepositoryName("foo"), Tag("1"), further_tags=(Tag("2"),))),
        ("Reg.IO:5000/foo", Reference("Reg.IO:5000", RepositoryName("foo"))),
        ("host:1/foo", Reference("host:1", RepositoryName("foo"))),
        ("127.0.0.1:5000/a/b", Reference("127.0.0.1:5000", RepositoryName("a/b"))),
        ("[::1]:5000/foo:1", Reference("[::1]:5000", RepositoryName("foo"), Tag("1"))),
        (f"foo@{DIGEST}", Reference("localhost", RepositoryName("foo"), digest=DIGEST)),
        (f"foo:v1@{DIGEST}", Reference("localhost", RepositoryName("foo"), digest=DIGEST)),
        (DIGEST, Reference("localhost", None, digest=DIGEST)),
        (f"localhost/_@{DIGEST}", Reference("localhost", None, digest=DIGEST)),
    ],
)
def test_a_reference_is_read_as_kit_reads_it(text, reference):
    assert Reference.parse(text) == reference


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("S/x:1", "repository ('S/x') name must be lowercase"),
        ("-foo/x", "must start and end with a letter or number"),
        ("foo//x", "not a repository name"),
        ("/x", "must start and end"),
        ("", "0 characters"),
        ("a" * 1025, "1025 characters"),
        ("foo:", "not a tag"),
        ("foo:1:2", "not a tag"),
        ("foo:a,", "not a tag"),
        ("foo@sha256:12", "not a digest"),
        (f"foo:a,b@{DIGEST}", "a digest and several tags"),
        ("a:b/foo", "not a registry"),
        ("-x.y/foo", "not a registry"),
        ("x..y/foo", "not a registry"),
        ("x.y:99999/foo", "not a registry"),
        ("evil.com\\@reg.io/foo", "not a registry"),
        ("user@x.y/foo", "not a registry"),
        ("https://x.y/foo", "not a registry"),
        ("x.y\n/foo", "not a registry"),
    ],
)
def test_what_is_no_reference_is_refused_with_a_hint(text, hint):
    with pytest.raises(ReferenceInvalid, match=re.escape(hint)):
        Reference.parse(text)


def test_the_default_registry_is_the_callers():
    assert Reference.parse("foo", default_registry="reg.io").registry == "reg.io"


def test_display_leaves_out_what_nobody_typed():
    assert Reference.parse("localhost/foo:1").display == "foo:1"
    assert Reference.parse("reg.io/foo:1").display == "reg.io/foo:1"
    assert Reference.parse(DIGEST).display == DIGEST
    assert Reference.parse("localhost/_").display == ""
    assert str(Reference.parse("localhost/_")) == "localhost/_"


COMPONENTS = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)
TAGS = st.from_regex(re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}", re.ASCII), fullmatch=True)
HOSTS = st.sampled_from(["localhost", "reg.io", "h:5000", "[2001:db8::1]:443", "10.0.0.1"])


@given(HOSTS, st.lists(COMPONENTS, min_size=1, max_size=3), st.lists(TAGS, max_size=3))
def test_a_reference_parses_back_to_itself(host, components, tags):
    reference = Reference(
        host,
        RepositoryName("/".join(components)),
        tag=Tag(tags[0]) if tags else None,
        further_tags=tuple(Tag(tag) for tag in tags[1:]),
    )

    assert Reference.parse(str(reference)) == reference


@given(st.text())
def test_any_text_is_a_reference_or_refused(text):
    try:
        reference = Reference.parse(text)
    except ReferenceInvalid:
        return
    assert Reference.parse(str(reference)) == reference
