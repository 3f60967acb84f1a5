import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec.errors import ContentInvalid
from kitspec.strict_json import DEPTH_MAX, NODE_COUNT_MAX, STRING_SIZE_MAX, parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_good_json_is_read_as_everybody_reads_it(value, ensure_ascii):
    content = json.dumps(value, ensure_ascii=ensure_ascii).encode()

    assert parse_json(content) == value


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_B_83_other_encodings_than_plain_utf_8_are_refused(encoding):
    with pytest.raises(ContentInvalid):
        parse_json('{"a": "é"}'.encode(encoding))


def test_B_84_invalid_utf_8_in_a_string_is_refused():
    with pytest.raises(ContentInvalid, match="not UTF-8: byte 7 is 0xff"):
        parse_json(b'{"a": "\xff"}')


@pytest.mark.parametrize("content", [b'{"a": 1, "a": 1}', b'[{"b": {"c": 1, "\\u0063": 2}}]'])
def test_B_85_a_key_twice_is_refused(content):
    with pytest.raises(ContentInvalid, match="stands twice"):
        parse_json(content)


@pytest.mark.parametrize(
    "content",
    [
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e400",
        b"[-1e999]",
        b"9" * 5000,
        b"9" * 301,
        b"01",
        b"+1",
        b".5",
        b"1_0",
    ],
)
def test_B_88_numbers_that_are_none_are_refused(content):
    with pytest.raises(ContentInvalid):
        parse_json(content)


def test_minus_zero_is_not_an_integer():
    assert type(parse_json(b"-0")) is float


@pytest.mark.parametrize("text", [r'"\ud800"', r'{"\uDFFF": 1}', r'["a", "\udc00\ud800"]'])
def test_a_lone_surrogate_is_refused(text):
    with pytest.raises(ContentInvalid, match="surrogate"):
        parse_json(text.encode())


def test_a_pair_of_surrogates_is_a_character():
    assert parse_json(rb'"\ud83d\ude00"') == "😀"


@pytest.mark.parametrize(
    "content", [b"", b"{", b'"a', b"[1,]", b"{'a': 1}", b'"\n"', b"1 2", b'{"a" 1}', b"\x00"]
)
def test_what_is_no_json_is_refused(content):
    with pytest.raises(ContentInvalid):
        parse_json(content)


def nested(depth):
    return b"[" * depth + b"]" * depth


def test_depth_is_taken_up_to_its_limit():
    assert parse_json(nested(DEPTH_MAX))
    assert parse_json(b"[" + b",".join([nested(DEPTH_MAX - 1)] * 3) + b"]")


@pytest.mark.parametrize(
    "content",
    [nested(DEPTH_MAX + 1), nested(100_000), b"[" * 100_000, b'{"a":' * 100_000, b'"\\\\",' + b"[" * 100],
    ids=["one more", "100,000", "open", "objects", "behind an escape"],
)
def test_depth_beyond_its_limit_is_refused_before_it_costs_stack(content):
    with pytest.raises(ContentInvalid, match=r"nested deeper|not JSON"):
        parse_json(content)


def test_brackets_and_commas_in_strings_do_not_count():
    text = '[{"\\"\\\\,' * 50_000

    assert parse_json(json.dumps([text]).encode()) == [text]


@pytest.mark.parametrize(
    ("content", "accepted"),
    [
        (b"[" + b"0," * (NODE_COUNT_MAX - 2) + b"0]", True),
        (b"[" + b"0," * (NODE_COUNT_MAX - 1) + b"0]", False),
        (b"[" + b"[]," * NODE_COUNT_MAX + b"0]", False),
        (b"[" * 65 + b'"' * (4 * NODE_COUNT_MAX + 2), False),
    ],
    ids=["at the limit", "one more", "lists", "quotes"],
)
def test_values_are_counted(content, accepted):
    if accepted:
        assert len(parse_json(content)) == NODE_COUNT_MAX - 1
    else:
        with pytest.raises(ContentInvalid, match="more than 200000 values"):
            parse_json(content)


def test_a_string_has_a_limit():
    assert len(parse_json(b'"' + b"a" * STRING_SIZE_MAX + b'"')) == STRING_SIZE_MAX

    with pytest.raises(ContentInvalid, match="a string of more than"):
        parse_json(b'"' + b"a" * (STRING_SIZE_MAX + 1) + b'"')
    with pytest.raises(ContentInvalid, match="a string of more than"):
        parse_json(b'"' + b'\\"' * (STRING_SIZE_MAX // 2 + 1) + b'"')


@given(st.binary())
def test_any_bytes_are_read_or_refused(content):
    with contextlib.suppress(ContentInvalid):
        parse_json(content)
