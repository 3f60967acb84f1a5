"""Patterns for the paths of files in a ModelKit: `*.json`, `tokenizer/**`, `**/*.safetensors`.

`*` and `?` stand for characters of one component, `[a-z]` and `[!a-z]` for one of a set, `**` as a whole component for
any number of components. A pattern without a slash is about the whole path, as in shells: `*.json` is no `a/b.json`.

Matched without backtracking: the work is bounded by the length of the pattern times that of the path, whoever wrote them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kitspec.errors import FilterInvalid

PATTERN_LENGTH_MAX = 1024
_ANY_NUMBER = "**"
# A bracket that is not closed, or has nothing in it, stands for itself, as in shells.
_TOKEN = re.compile(r"\[(?P<negated>[!^])?+(?P<set>\][^\]]*|[^\]]+)\]|(?P<other>.)", re.DOTALL)

_T = TypeVar("_T")
_U = TypeVar("_U")


@dataclass(frozen=True, slots=True)
class _Set:
    """One character of (or, negated, none of) these ranges."""

    ranges: tuple[tuple[str, str], ...]
    negated: bool

    def __contains__(self, character: str) -> bool:
        return any(first <= character <= last for first, last in self.ranges) != self.negated


_Tokens = Sequence[str | _Set]
_STAR = "*"


class PathGlob:
    """A pattern, read once.

    Args:
        pattern: a leading `./` or `/` and a trailing `/` mean nothing; a folder's name alone means the folder itself.

    Raises:
        FilterInvalid: it is empty, too long, or leads out of the kit.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > PATTERN_LENGTH_MAX:
            raise FilterInvalid(
                f"a path pattern of {len(pattern)} characters; at most {PATTERN_LENGTH_MAX} are allowed"
            )
        components = [part for part in pattern.split("/") if part not in ("", ".")]
        if not components or ".." in components:
            raise FilterInvalid(
                f"not a path pattern: {pattern[:160]!a}; wanted one such as *.json or model/**"
            )
        self._components = [part if part == _ANY_NUMBER else _tokens(part) for part in components]

    def matches(self, path: str) -> bool:
        """Whether a cleaned path is one of those that are meant."""
        return _match(self._components, path.split("/"), _ANY_NUMBER, _component_matches)


def _component_matches(tokens: str | _Tokens, name: str) -> bool:
    return _match(tokens, name, _STAR, _character_matches)


def _character_matches(token: str | _Set, character: str) -> bool:
    return character in token if isinstance(token, _Set) else token in ("?", character)


def _tokens(component: str) -> _Tokens:
    tokens: list[str | _Set] = []
    for match in _TOKEN.finditer(component):
        if match["other"] is None:
            tokens.append(_Set(tuple(_ranges(match["set"])), match["negated"] is not None))
        elif match["other"] != _STAR or tokens[-1:] != [_STAR]:
            tokens.append(match["other"])
    return tokens


def _ranges(text: str) -> list[tuple[str, str]]:
    ranges = []
    position = 0
    while position < len(text):
        if text[position + 1 : position + 2] == "-" and position + 2 < len(text):
            ranges.append((text[position], text[position + 2]))
            position += 3
        else:
            ranges.append((text[position], text[position]))
            position += 1
    return ranges


def _match(
    pattern: Sequence[_T], items: Sequence[_U], any_number: object, fits: Callable[[_T, _U], bool]
) -> bool:
    """The classic: where it fails, the last `any_number` takes one item more; earlier ones need no second try."""
    at = position = 0
    star, resume = -1, 0
    while position < len(items):
        if at < len(pattern) and pattern[at] == any_number:
            star, resume = at, position
            at += 1
        elif at < len(pattern) and fits(pattern[at], items[position]):
            at += 1
            position += 1
        elif star >= 0:
            resume += 1
            at, position = star + 1, resume
        else:
            return False
    return all(rest == any_number for rest in pattern[at:])
