"""`.kitignore` has the rules of a `.dockerignore`; the cases are those of its reference, and what moby does beyond it."""

from __future__ import annotations

import pytest

from kitclient.ignore import IgnoreInvalid, IgnoreRules

CASES = [
    # lines, path, whether it stays out
    (["a.txt"], "a.txt", True),
    (["a.txt"], "b/a.txt", False),
    (["/a.txt"], "a.txt", True),
    (["./a.txt"], "a.txt", True),
    (["logs/"], "logs/today/a", True),
    (["*/temp*"], "somedir/temporary.txt", True),
    (["*/temp*"], "temporary.txt", False),
    (["*/temp*"], "a/b/temporary.txt", False),
    (["*/*/temp*"], "somedir/subdir/temporary.txt", True),
    (["temp?"], "tempa", True),
    (["temp?"], "temp", False),
    (["temp?"], "temp/", False),
    (["**/*.go"], "main.go", True),
    (["**/*.go"], "a/b/main.go", True),
    (["**/foo"], "barfoo", False),
    (["**foo"], "a/barfoo", True),
    (["**"], "anything/at/all", True),
    (["a/**"], "a/b/c", True),
    (["a/**"], "a", False),
    (["a/**/z"], "a/z", True),
    (["a/**/z"], "a/b/c/z", True),
    (["*"], "a/b", True),
    (["*.md", "!README.md"], "README.md", False),
    (["*.md", "!README*.md", "README-secret.md"], "README-secret.md", True),
    (["*.md", "README-secret.md", "!README*.md"], "README-secret.md", False),
    (["folder", "!folder/keep"], "folder/keep", False),
    (["folder", "!folder/keep"], "folder/drop", True),
    (["# a comment", "  a  "], "a", True),
    (["\\#a"], "#a", True),
    (["\\*"], "*", True),
    (["\\*"], "a", False),
    (["[a-c]x"], "bx", True),
    (["[a-c]x"], "dx", False),
    (["[^a-c]x"], "dx", True),
    (["a.b"], "axb", False),
    (["a+(b)|{c}$"], "a+(b)|{c}$", True),
    (["\ufeffa"], "a", True),
    ([], "a", False),
]


@pytest.mark.parametrize(("lines", "path", "ignored"), CASES)
def test_a_path_stays_out_as_docker_decides(lines, path, ignored):
    assert IgnoreRules(lines).ignores(path) is ignored


@pytest.mark.parametrize("line", ["!", "! ", "[a", "[]", "a\\"])
def test_a_pattern_that_cannot_be_read_is_refused_with_its_line(line):
    with pytest.raises(IgnoreInvalid, match="line 2"):
        IgnoreRules(["ok", line])


def test_only_an_exception_makes_a_walk_into_ignored_folders_worth_it():
    assert not IgnoreRules(["a"]).may_take_back
    assert IgnoreRules(["a", "!a/b"]).may_take_back
