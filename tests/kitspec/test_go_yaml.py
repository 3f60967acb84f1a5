"""Each expectation was written by kit 1.7, except where the name of the test says otherwise."""

import pytest

from kitspec.go_yaml import FlowList, format_float, sort_naturally, to_go_yaml


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("hi", "hi"), ("", '""'), ("yes", '"yes"'), ("y", '"y"'), ("N", '"N"'), ("on", '"on"'), ("True", '"True"'), ("null", '"null"'),
        ("~", '"~"'), ("1", '"1"'), ("0x1F", '"0x1F"'), ("0o17", '"0o17"'), ("0b1", '"0b1"'), ("1_000", '"1_000"'), ("1e3", '"1e3"'),
        ("1.", '"1."'), (".5", '".5"'), ("+1", '"+1"'), (".inf", '".inf"'), ("1:30", '"1:30"'), ("0777", '"0777"'), ("089", '"089"'),
        ("2020-01-01", '"2020-01-01"'), ("2020-1-1", '"2020-1-1"'), ("2020-01-01 10:00:00", '"2020-01-01 10:00:00"'),
        ("1e", "1e"), ("=", "="), ("<<", "<<"), ("0.1.0", "0.1.0"), ("a, b", "a, b"), ("it's", "it's"), ('say "x"', 'say "x"'),
        ("---", "'---'"), ("...", "'...'"), ("-", "'-'"), ("- a", "'- a'"), ("-a", "-a"), ("? a", "'? a'"), ("*a", "'*a'"), ("&a", "'&a'"),
        ("@a", "'@a'"), ("%a", "'%a'"), ("`a", "'`a'"), ("!a", "'!a'"), ("|", "'|'"), ("[a", "'[a'"), ("# x", "'# x'"), ("a #b", "'a #b'"),
        ("a#b", "a#b"), ("a:", "'a:'"), ("a: b", "'a: b'"), ("a:b", "a:b"), (" ", "' '"), ("trailing  ", "'trailing  '"), ("'q", "'''q'"),
        ("a\tb", r'"a\tb"'), ("a\x01b", r'"a\x01b"'), ("a\rb", r'"a\rb"'), ("😀", r'"\U0001F600"'), ("\ufeffx", r'"\uFEFF\x78"'),
        ("a\u00a0b", "a\u00a0b"), ("é", "é"), ("\x7f", r'"\x7F"'), ("\x85", r'"\N"'), ("a" * 200, "a" * 200),
        ("a\nb", "|-\n  a\n  b"), ("a\nb\n", "|\n  a\n  b"), (" lead\nb", "|2-\n   lead\n  b"), ("a\n\nb", "|-\n  a\n\n  b"),
        ("a\n\n", "|+\n  a\n"), ("a \nb", '"a \\nb"'), ("a\nb ", '"a\\nb "'), ("a\x01\nb", '"a\\x01\\nb"'), ('"\\\n\x01', '"\\"\\\\\\n\\x01"'),
    ],
)  # fmt: skip
def test_text_is_quoted_as_kit_quotes_it(text, written):
    assert to_go_yaml({"k": text}) == f"k: {written}\n"


@pytest.mark.parametrize(
    ("text", "written"),
    [("a\u2028b", r'"a\Lb"'), ("\nab", "|2-\n\n  ab"), ("\tab\nc", "|2-\n  \tab\n  c"), ("\n", "|2+\n")],
)
def test_text_that_kit_would_change_is_kept(text, written):
    assert to_go_yaml({"k": text}) == f"k: {written}\n"


@pytest.mark.parametrize(
    ("items", "written"),
    [
        (["A <a@x.org>", "B"], "[A <a@x.org>, B]"),
        (["1", "true", "x, y", "a: b"], """["1", "true", 'x, y', 'a: b']"""),
        (["a:b", "a?b", "[", "a\nb", ""], """['a:b', 'a?b', '[', "a\\nb", ""]"""),
    ],
)
def test_authors_stand_on_one_line(items, written):
    assert to_go_yaml({"k": FlowList(items)}) == f"k: {written}\n"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ([1, [2, 3], {"a": "b", "c": []}], "\n  - 1\n  - - 2\n    - 3\n  - a: b\n    c: []"),
        ({"a": {"b": {}}, "c": [[]]}, "\n  a:\n    b: {}\n  c:\n    - []"),
        ([None, True, False, 1.0], "\n  - null\n  - true\n  - false\n  - 1"),
        ({"x\ny": 1}, "\n  ? |-\n    x\n    y\n  : 1"),
        ({"\x85": [1, 2], "b": 1}, '\n  ? "\\N"\n  : - 1\n    - 2\n  b: 1'),
        ({"k" * 129: 1}, f"\n  ? {'k' * 129}\n  : 1"),
    ],
)
def test_collections_stand_in_blocks(value, written):
    assert to_go_yaml({"k": value}) == f"k:{written}\n"


def test_a_key_that_would_merge_is_quoted_unlike_kits():
    assert to_go_yaml({"<<": 1}) == '"<<": 1\n'


@pytest.mark.parametrize(
    ("number", "written"),
    [
        (0.0, "0"), (-0.0, "-0"), (1.0, "1"), (-3.0, "-3"), (0.5, "0.5"), (123456.0, "123456"), (1e6, "1e+06"), (1234567.0, "1.234567e+06"),
        (0.0001, "0.0001"), (0.00001, "1e-05"), (1e21, "1e+21"), (1e100, "1e+100"), (1.5e-7, "1.5e-07"), (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"), (123.456, "123.456"), (0.1 + 0.2, "0.30000000000000004"),
        (float("inf"), ".inf"), (float("-inf"), "-.inf"), (float("nan"), ".nan"),
    ],
)  # fmt: skip
def test_floats_are_written_as_go_writes_them(number, written):
    assert format_float(number) == written


@pytest.mark.parametrize(
    "keys",
    [
        ["A", "a9", "a10", "b"], ["a1", "a01", "a2"], ["a", "ab"], ["1", "a"], ["a1", "ab"], ["-1", "a"], ["a-", "a0"],
        ["x100", "x101"], ["v1.2", "v1.10"], ["", "a"], ["1a", "10"],
    ],
)  # fmt: skip
def test_keys_are_sorted_with_numbers_by_value(keys):
    assert list(sort_naturally(dict.fromkeys(reversed(keys)))) == keys
