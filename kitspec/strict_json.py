"""JSON from strangers: one meaning or an error, at a bounded cost.

What `json.loads` lets through and is refused here: other encodings than UTF-8, a byte order mark, duplicate keys, NaN and
Infinity, numbers too large for a float, lone surrogates, and nesting that would exhaust the stack.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from kitspec.errors import ContentInvalid
from kitspec.go_json import NumberText

DEPTH_MAX = 64
NODE_COUNT_MAX = 200_000
STRING_SIZE_MAX = 1024 * 1024
INTEGER_MAX = 2**63 - 1

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_A_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(content: bytes, *, numbers_as_text: bool = False) -> Any:  # noqa: ANN401  (any JSON)
    """The value that `content` holds.

    Args:
        numbers_as_text: give each number as `go_json.NumberText`, so that it can be written again as it stood.

    Raises:
        ContentInvalid: it is not JSON, ambiguous, or beyond the limits above.
    """
    _check_extent(content)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ContentInvalid(f"not UTF-8: byte {error.start} is {content[error.start]:#04x}") from error
    if text.startswith("\ufeff"):
        raise ContentInvalid("begins with a byte order mark; JSON is UTF-8 without one")
    try:
        document = (_TEXT_DECODER if numbers_as_text else _DECODER).decode(text)
    except json.JSONDecodeError as error:
        raise ContentInvalid(f"not JSON: {error}") from error
    if _SURROGATE.search(content) is not None:
        _check_surrogates(document)
    return document


def _check_extent(content: bytes) -> None:
    """Refuse depth, width and long strings before the parser meets them."""
    opened = content.count(b"{") + content.count(b"[")
    separators = content.count(b",")
    # Strings may hold brackets and commas: these counts are bounds, which small documents stay under.
    if opened <= DEPTH_MAX and opened + separators < NODE_COUNT_MAX and len(content) <= STRING_SIZE_MAX:
        return
    # Same length, no escaped quotes: now every odd piece between quotes is a string.
    plain = content.replace(b"\\\\", b"xx").replace(b'\\"', b"xx")
    if plain.count(b'"') > 4 * NODE_COUNT_MAX:  # a key and a value for each
        raise ContentInvalid(f"more than {NODE_COUNT_MAX} values")
    pieces = plain.split(b'"')
    if max(map(len, pieces[1::2]), default=0) > STRING_SIZE_MAX:
        raise ContentInvalid(f"a string of more than {STRING_SIZE_MAX} bytes")
    structure = b"".join(pieces[::2])
    opened = structure.count(b"{") + structure.count(b"[")
    if opened + structure.count(b",") >= NODE_COUNT_MAX:
        raise ContentInvalid(f"more than {NODE_COUNT_MAX} values")
    if opened > DEPTH_MAX and _depth(structure.translate(None, _NOT_A_BRACKET)) > DEPTH_MAX:
        raise ContentInvalid(f"nested deeper than {DEPTH_MAX}")


def _depth(brackets: bytes) -> int:
    depth = deepest = 0
    for bracket in brackets:
        if bracket in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def _check_surrogates(document: object) -> None:
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ContentInvalid("a lone surrogate (half of a \\ud800 … \\udfff pair) in a string") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in members if keys.count(key) > 1)
        raise ContentInvalid(f"the key {twice[:80]!a} stands twice in one object")
    return members


def _integer(text: str) -> int | float:
    if text == "-0":
        return -0.0  # a number, but not an integer of ours: int() would make a valid size of it
    if len(text) > 300:  # none that a float could hold
        raise ContentInvalid(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ContentInvalid(f"a number too large: {text[:40]}")
    return number


def _refuse_constant(text: str) -> None:
    raise ContentInvalid(f"{text} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_refuse_constant
)


def _checked_integer(text: str) -> NumberText:
    _integer(text)
    return NumberText(text)


def _checked_float(text: str) -> NumberText:
    _float(text)
    return NumberText(text)


_TEXT_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_int=_checked_integer,
    parse_float=_checked_float,
    parse_constant=_refuse_constant,
)
