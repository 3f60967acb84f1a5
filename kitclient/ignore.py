"""Which files of a folder stay out of a kit: the rules of `.kitignore`, which are those of a `.dockerignore`.

One pattern a line, relative to the context folder; a line that begins with `#` is a comment; `!` takes a file back in;
the last pattern that matches decides. `*` and `?` do not cross a `/`, `**` does; `\\` takes the meaning from the next
character. What matches a folder matches all that is in it.

Source: the reference of Docker's build context, "dockerignore files"; corner cases as moby/patternmatcher decides them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass


class IgnoreInvalid(ValueError):
    """A pattern cannot be read; the message says which and why."""


@dataclass(frozen=True, slots=True)
class _Pattern:
    matches: re.Pattern[str]
    takes_back: bool


class IgnoreRules:
    """Patterns in the order they were written."""

    def __init__(self, lines: Sequence[str]) -> None:
        """Read the lines of a file.

        Raises:
            IgnoreInvalid: a pattern is not one.
        """
        self._patterns: list[_Pattern] = []
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix("\ufeff") if number == 1 else line
            if text.startswith("#") or not text.strip():
                continue
            self._patterns.append(_read_pattern(text.strip(), number))

    @property
    def may_take_back(self) -> bool:
        """Whether a file in an ignored folder may be wanted after all."""
        return any(pattern.takes_back for pattern in self._patterns)

    def ignores(self, path: str) -> bool:
        """Whether the file or folder at `path`, cleaned and relative to the context, stays out."""
        components = path.split("/")
        candidates = ["/".join(components[:count]) for count in range(len(components), 0, -1)]
        ignored = False
        for pattern in self._patterns:
            # A pattern that could not change the verdict is not tried.
            if pattern.takes_back == ignored and any(map(pattern.matches.fullmatch, candidates)):
                ignored = not pattern.takes_back
        return ignored


def _read_pattern(text: str, number: int) -> _Pattern:
    takes_back = text.startswith("!")
    pattern = text[1:].strip() if takes_back else text
    if not pattern:
        raise IgnoreInvalid(f"line {number}: `!` needs a pattern behind it")
    pattern = posixpath.normpath(pattern)
    # normpath keeps a second leading slash, which POSIX allows to mean something else.
    pattern = pattern.lstrip("/").strip() or "/"
    return _Pattern(_compile(pattern, number), takes_back)


def _compile(pattern: str, number: int) -> re.Pattern[str]:
    expression: list[str] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if pattern.startswith("**", position):
            piece, position = _double_star(pattern, position)
            expression.append(piece)
            continue
        if character == "*":
            expression.append("[^/]*")
        elif character == "?":
            expression.append("[^/]")
        elif character == "[":
            piece, position = _character_class(pattern, position, number)
            expression.append(piece)
            continue
        elif character == "\\":
            position += 1
            if position == len(pattern):
                raise IgnoreInvalid(f"line {number}: {pattern!a} ends in a backslash")
            expression.append(re.escape(pattern[position]))
        else:
            expression.append(re.escape(character))
        position += 1
    return re.compile("".join(expression))


def _double_star(pattern: str, position: int) -> tuple[str, int]:
    after = position + 2
    has_slash = pattern.startswith("/", after)
    after += has_slash
    if after == len(pattern):
        return ".*", after
    if position == 0 and not has_slash and not re.search(r"[*?\[\]\\]", pattern[after:]):
        # `**word` is "ends in word", also in the middle of a name.
        return ".*", after
    return "(?:.*/)?", after


def _character_class(pattern: str, position: int, number: int) -> tuple[str, int]:
    """`[a-z]` or `[^a-z]`; a `]` must be escaped to stand inside."""
    start = position + 1
    negated = pattern.startswith("^", start)
    start += negated
    members: list[str] = []
    cursor = start
    while cursor < len(pattern) and pattern[cursor] != "]":
        if pattern[cursor] == "\\":
            cursor += 1
            members.append(re.escape(pattern[cursor : cursor + 1]))
        else:
            members.append("-" if pattern[cursor] == "-" else re.escape(pattern[cursor]))
        cursor += 1
    if cursor >= len(pattern) or not members:
        raise IgnoreInvalid(f"line {number}: {pattern!a} opens a [ that is never closed, or holds nothing")
    try:
        expression = f"[{'^' if negated else ''}{''.join(members)}]"
        re.compile(expression)
    except re.error as error:
        raise IgnoreInvalid(f"line {number}: {pattern!a}: {error}") from error
    return expression, cursor + 1
