"""What tokens are asked for: what is understood, and what is passed over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.auth.identity import Grant
from registry.auth.scopes import count_scopes, format_grant, parse_scopes


def pull(name: str = "a/b", *actions: str) -> Grant:
    return Grant("repository", name, frozenset(actions or ("pull",)))


@pytest.mark.parametrize(
    ("text", "grants"),
    [
        ("repository:a/b:pull", [pull()]),
        ("repository:a/b:push,pull", [pull("a/b", "pull", "push")]),
        ("repository:a/b:*", [pull("a/b", "*")]),
        ("repository:a/b:pull,fly", [pull()]),
        ("repository(plugin):a/b:pull", [pull()]),
        ("registry:metrics:*", [Grant("registry", "metrics", frozenset({"*"}))]),
        ("registry:catalog:*", [Grant("registry", "catalog", frozenset({"*"}))]),
        ("repository:a:pull repository:b:pull", [pull("a"), pull("b")]),
        ("repository:a:pull  repository:a:push", [pull("a", "pull", "push")]),
        ("repository:reg.example:5000/a/b:pull", []),
        ("repository:*:pull", []),
        ("repository:a/*:pull", []),
        ("repository:A/b:pull", []),
        ("repository:../b:pull", []),
        ("repository:a/b:", []),
        ("repository:a/b:PULL", []),
        ("repository::pull", []),
        ("repository:a/b", []),
        ("plugin:a/b:pull", []),
        ("registry:secrets:*", []),
        (":::::", []),
        ("", []),
        ("repository:a/b:pull\0", []),
        ("repository:" + "a" * 300 + ":pull", []),
    ],
)
def test_A_05_scopes_are_understood_or_passed_over(text: str, grants: list[Grant]) -> None:
    assert parse_scopes([text]) == grants


def test_A_05_words_are_counted_whatever_they_mean() -> None:
    assert count_scopes(["a b", "", "  c "]) == 3


@given(
    st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,2}", fullmatch=True),
    st.sets(st.sampled_from(["pull", "push", "delete", "*"]), min_size=1),
)
def test_what_is_formatted_parses_back(name: str, actions: set[str]) -> None:
    grant = Grant("repository", name, frozenset(actions))

    assert parse_scopes([format_grant(grant)]) == [grant]


@given(st.lists(st.text(max_size=60), max_size=5))
def test_any_text_is_scopes_or_nothing(texts: list[str]) -> None:
    for grant in parse_scopes(texts):
        assert parse_scopes([format_grant(grant)]) == [grant]
