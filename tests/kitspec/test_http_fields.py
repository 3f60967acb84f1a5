import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.http_fields import (
    ByteSpan,
    Challenge,
    RangeNotSatisfiable,
    format_content_range,
    format_next_link,
    format_upload_range,
    parse_challenges,
    parse_entity_tags,
    parse_next_link,
    parse_range,
    parse_upload_range,
)


@pytest.mark.parametrize(
    ("field", "span"),
    [
        ("bytes=0-", ByteSpan(0, 1000)),
        ("bytes=-5", ByteSpan(995, 1000)),
        ("bytes=-5000", ByteSpan(0, 1000)),
        ("bytes=500-1499", ByteSpan(500, 1000)),
        ("bytes=0-0", ByteSpan(0, 1)),
        ("BYTES = 1-2", ByteSpan(1, 3)),
        ("bytes=0-100000000000000000000", ByteSpan(0, 1000)),
        ("bytes=0-1,5-6", None),
        ("bytes=" + ",".join(["0-0"] * 400), None),
        ("abc", None),
        ("items=0-1", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes=+1-2", None),
        ("bytes=1_0-20", None),
        ("bytes=٣-5", None),
        ("", None),
    ],
)
def test_B_59_a_range_is_one_span_or_ignored(field, span):
    assert parse_range(field, 1000) == span


@pytest.mark.parametrize("field", ["bytes=-0", "bytes=5-2", "bytes=1000-", "bytes=5000-", "bytes=500-0"])
def test_B_59_a_range_outside_is_not_satisfiable(field):
    with pytest.raises(RangeNotSatisfiable):
        parse_range(field, 1000)


@pytest.mark.parametrize("field", ["bytes=0-", "bytes=-1"])
def test_nothing_of_nothing_is_not_satisfiable(field):
    with pytest.raises(RangeNotSatisfiable):
        parse_range(field, 0)


@given(st.integers(1, 2**62), st.data())
def test_a_span_inside_is_itself(size, data):
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    span = ByteSpan(start, stop)

    assert parse_range(f"bytes={start}-{stop - 1}", size) == span
    assert format_content_range(span, size) == f"bytes {start}-{stop - 1}/{size}"
    assert parse_upload_range(f"{start}-{stop - 1}") == span
    assert span.size == stop - start


@given(st.text(), st.integers(0, 2**63))
def test_any_field_is_a_span_ignored_or_not_satisfiable(field, size):
    try:
        span = parse_range(f"bytes={field}", size)
    except RangeNotSatisfiable:
        return
    assert span is None or 0 <= span.start < span.stop <= size


@pytest.mark.parametrize(
    ("field", "span"),
    [
        ("0-2", ByteSpan(0, 3)),
        ("5-7", ByteSpan(5, 8)),
        ("bytes 0-9/10", ByteSpan(0, 10)),
        ("0-0", ByteSpan(0, 1)),
    ],
)
def test_B_44_B_45_the_place_of_a_chunk_is_read(field, span):
    assert parse_upload_range(field) == span


@pytest.mark.parametrize(
    "field", ["", "0", "-5", "5-", "5-2", "0-1,3-4", "a-b", "0x0-1", " 0-1", "0-1\n", "1-٣", "0-" + "9" * 30]
)
def test_B_46_what_is_no_place_of_a_chunk_is_refused(field):
    with pytest.raises(ValueError, match="not an upload range"):
        parse_upload_range(field)


def test_an_upload_says_what_it_holds():
    assert [format_upload_range(offset) for offset in (0, 1, 10)] == ["0-0", "0-0", "0-9"]


@pytest.mark.parametrize(
    ("field", "strongly", "weakly"),
    [
        ('"sha256:a"', True, True),
        ('W/"sha256:a"', False, True),
        ('"x", "sha256:a"', True, True),
        ('"x" , W/"sha256:a"', False, True),
        ("*", True, True),
        (" * ", True, True),
        ("sha256:a", False, False),
        ('"x"', False, False),
        ("", False, False),
        ('"sha256:a', False, False),
    ],
)
def test_B_60_entity_tags_match(field, strongly, weakly):
    tags = parse_entity_tags(field)

    assert tags.match_strongly("sha256:a") is strongly
    assert tags.match_weakly("sha256:a") is weakly


@pytest.mark.parametrize("target", ["/v2/_catalog?n=2&last=b", "https://reg.io/v2/a/tags/list?last=x;y"])
def test_a_link_parses_back_to_itself(target):
    assert parse_next_link(format_next_link(target)) == target


@pytest.mark.parametrize(
    ("field", "target"),
    [
        ("</a>; rel=next", "/a"),
        ('</p>; rel="prev", </n>; title=x; REL="last Next"', "/n"),
        ('</a>; rel="prev"', None),
        ("</a>", None),
        ("/a; rel=next", None),
        ("", None),
        ("<", None),
    ],
)
def test_the_next_link_is_found_among_others(field, target):
    assert parse_next_link(field) == target


@pytest.mark.parametrize(
    ("field", "challenges"),
    [
        ("Basic", [Challenge("basic", {})]),
        ('Basic realm="x"', [Challenge("basic", {"realm": "x"})]),
        (
            'Bearer realm="https://a/t?x=1,2",service="s",scope="repository:a:pull,push"',
            [
                Challenge(
                    "bearer",
                    {"realm": "https://a/t?x=1,2", "service": "s", "scope": "repository:a:pull,push"},
                )
            ],
        ),
        (
            'Basic realm="x", Bearer Realm=y',
            [Challenge("basic", {"realm": "x"}), Challenge("bearer", {"realm": "y"})],
        ),
        (r'Basic realm="a \"b\" \\"', [Challenge("basic", {"realm": 'a "b" \\'})]),
        ('Basic realm="x", realm="y"', [Challenge("basic", {"realm": "x"})]),
        ("Negotiate, Basic realm=x", [Challenge("negotiate", {}), Challenge("basic", {"realm": "x"})]),
        ("", []),
        ("=", []),
    ],
)
def test_challenges_are_told_apart(field, challenges):
    assert parse_challenges(field) == challenges


@given(st.text())
def test_any_field_is_read(field):
    parse_challenges(field)
    parse_next_link(field)
    parse_entity_tags(field)


@pytest.mark.parametrize("piece", ['"', "a=", 'a="b",', "</a>;", "W/", "a ", ", ", '"\\', "0-", "<>,"])
def test_L_30_fields_are_read_in_linear_time(piece):
    field = piece * (100_000 // len(piece))
    begun = time.process_time()

    parse_challenges(field)
    parse_next_link(field)
    parse_entity_tags(field)
    parse_range(f"bytes={field}", 10)

    assert time.process_time() - begun < 0.5  # quadratic: many seconds
