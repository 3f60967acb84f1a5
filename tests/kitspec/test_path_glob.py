"""Patterns for paths: what they mean, what they may cost, and what is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitspec import path_glob
from kitspec.errors import FilterInvalid
from kitspec.path_glob import PATTERN_LENGTH_MAX, PathGlob


@pytest.mark.parametrize(
    ("pattern", "wanted", "unwanted"),
    [
        ("*.json", ["config.json", ".json"], ["model/config.json", "config.jsonl", "json"]),
        ("model/*", ["model/a", "model/."], ["model", "model/a/b", "models/a"]),
        ("model/**", ["model", "model/a", "model/a/b"], ["models/a", "a/model"]),
        ("**", ["a", "a/b", "a/b/c"], []),
        ("**/*.safetensors", ["a.safetensors", "m/a.safetensors", "m/n/a.safetensors"], ["m/safetensors"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["a", "b", "a/b/c", "ab", "x/a/b"]),
        ("**/a/**/a/**", ["a/a", "x/a/y/a/z", "a/a/a"], ["a", "x/a/y"]),
        ("a**b", ["ab", "axxb"], ["a/b", "a/x/b"]),
        ("***", ["a", "abc"], ["a/b"]),
        ("?.bin", ["1.bin", "é.bin", "\U0001f600.bin"], [".bin", "12.bin", "/.bin"]),
        ("[a-c]x[!0-9]", ["axb", "cx-"], ["dxb", "ax1", "ax"]),
        ("[^a]", ["b", "^"], ["a", ""]),
        ("[]a]", ["]", "a"], ["[]a]", "b"]),
        ("[!]a]", ["b", "["], ["]", "a"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[*?[]", ["*", "?", "["], ["a", "**"]),
        ("[z-a]", [], ["a", "z", "-"]),
        ("models", ["models"], ["models/a", "model"]),
        ("./a//b/", ["a/b"], ["a", "./a/b"]),
        ("/a", ["a"], ["b/a"]),
        ("a.b+c(d)|$", ["a.b+c(d)|$"], ["axb+c(d)|$", "a.bbc(d)"]),
        ("a b%20\n", ["a b%20\n"], ["a b \n"]),
        ("A", ["A"], ["a"]),
    ],
)
def test_a_pattern_means_these_paths_and_not_those(pattern, wanted, unwanted):
    glob = PathGlob(pattern)

    assert [path for path in wanted if not glob.matches(path)] == []
    assert [path for path in unwanted if glob.matches(path)] == []


@pytest.mark.parametrize("pattern", ["[", "[a", "[]", "[!]", "[^]", "a[", "a]b", "[/]", "]"])
def test_a_bracket_that_is_not_closed_or_holds_nothing_stands_for_itself(pattern):
    assert PathGlob(pattern).matches(pattern)
    assert not PathGlob(pattern).matches("a")
    assert not PathGlob(pattern).matches("/")


@pytest.mark.parametrize("pattern", ["", "/", ".", "./", "//", "..", "../a", "a/../b", "a/..", "**/.."])
def test_a_pattern_that_means_nothing_or_leads_out_is_refused(pattern):
    with pytest.raises(FilterInvalid, match="not a path pattern"):
        PathGlob(pattern)


def test_a_pattern_that_is_too_long_is_refused_and_not_repeated():
    PathGlob("a" * PATTERN_LENGTH_MAX)

    with pytest.raises(FilterInvalid, match=f"{PATTERN_LENGTH_MAX + 1} characters") as caught:
        PathGlob("a" * (PATTERN_LENGTH_MAX + 1))

    assert len(str(caught.value)) < 200


# ---- against a matcher that is slow and obviously right: every way of dividing is tried

CHARACTERS = "ab]-"
TOKENS = {
    "a": {"a"},
    "b": {"b"},
    "-": {"-"},
    "?": set(CHARACTERS),
    "[ab]": {"a", "b"},
    "[!a]": {"b", "]", "-"},
    "[^a-b]": {"]", "-"},
    "[]-]": {"]", "-"},
    "[b-a]": set(),
}
"""One character of these."""
COMPONENTS = (
    st.lists(st.sampled_from(["*", *TOKENS]), min_size=1, max_size=5)
    .map(tuple)
    .filter(lambda component: component != ("*", "*"))
)
PATTERNS = st.lists(st.just("**") | COMPONENTS, min_size=1, max_size=5)
PATHS = st.lists(st.text(CHARACTERS, min_size=1, max_size=4), min_size=1, max_size=5)


def divides(pattern, items, any_number, fits):
    if not pattern:
        return not items
    if pattern[0] == any_number:
        return any(divides(pattern[1:], items[cut:], any_number, fits) for cut in range(len(items) + 1))
    return bool(items) and fits(pattern[0], items[0]) and divides(pattern[1:], items[1:], any_number, fits)


def slowly_matches(pattern, path):
    return divides(
        pattern,
        path,
        "**",
        lambda component, name: divides(component, name, "*", lambda token, one: one in TOKENS[token]),
    )


@given(PATTERNS, PATHS)
def test_a_pattern_matches_what_the_slow_matcher_matches(pattern, path):
    text = "/".join("".join(component) for component in pattern)

    assert PathGlob(text).matches("/".join(path)) == slowly_matches(pattern, path)


@given(st.data(), PATTERNS)
def test_a_path_made_to_a_pattern_is_matched(data, pattern):
    def character(token):
        return data.draw(st.sampled_from(sorted(TOKENS[token])))

    def name(component):
        return "".join(
            data.draw(st.text(CHARACTERS, max_size=3)) if token == "*" else character(token)
            for token in component
        )

    path = []
    for component in pattern:
        if component == "**":
            path += data.draw(st.lists(st.text(CHARACTERS, min_size=1, max_size=2), max_size=3))
        elif "[b-a]" not in component:
            path.append(name(component))
    if all("[b-a]" not in component for component in pattern) and path and all(path):
        assert PathGlob("/".join("".join(component) for component in pattern)).matches("/".join(path))


# ---- what it costs


@pytest.fixture
def steps(monkeypatch):
    """Comparisons so far, of characters and of components."""
    counted = []
    for name in ("_character_matches", "_component_matches"):
        compare = getattr(path_glob, name)
        monkeypatch.setattr(
            path_glob, name, lambda *pair, compare=compare: counted.append(None) or compare(*pair)
        )
    return counted


@pytest.mark.parametrize(
    "pattern",
    [
        "a*" * 100 + "b",
        "*a" * 100 + "b",
        "*" + "a" * 200 + "b",
        "*" * 1000 + "b",
        "**/" * 100 + "b",
        "**/a/" * 100 + "b",
        "**/*a*a*a*a*b",
        "**/" + "a*" * 60 + "/**/" + "*a" * 60 + "/b",
        "*[!b]" * 100 + "b",
        "?" * 500 + "*b",
        "[" * 1000,
        "*[" * 500,
    ],
)
@pytest.mark.parametrize(
    "path",
    ["a" * 255, "/".join(["a"] * 128), "/".join(["a" * 31] * 128), "/".join(["a" * 255] * 16)],
    ids=["a long name", "deep", "long and deep", "long names"],
)
def test_the_work_is_bounded_by_the_length_of_the_pattern_times_that_of_the_path(steps, pattern, path):
    assert not PathGlob(pattern).matches(path)

    assert len(steps) <= len(pattern) * len(path)
