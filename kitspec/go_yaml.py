"""YAML as Go's yaml.v3 reads scalars and as kit writes it: block style, two spaces, never folded.

Resolution is YAML 1.2's core schema with yaml.v3's additions (0b, 0777, 1_000, dates); what YAML 1.1 would take for something
else than text is quoted. Where yaml.v3 writes what reads back as something else, this does not follow: text with U+2028 or
U+2029 stands in double quotes, a line break or a tab at the beginning of text is kept, and the key `<<` is quoted. Source: YAML 1.2.2; the documentation of yaml.v3; what kit 1.7 was seen to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from functools import cmp_to_key

_INTEGER = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|0[oO]?[0-7]+|0[bB][01]+|[1-9][0-9]*|0)", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?", re.ASCII)
_TIMESTAMP = re.compile(
    r"(?P<year>[0-9]{4})-(?P<month>[0-9]{1,2})-(?P<day>[0-9]{1,2})"
    r"(?:(?P<separator>[Tt ])(?P<hour>[0-9]{1,2}):(?P<minute>[0-9]{1,2}):(?P<second>[0-9]{1,2})"
    r"(?:\.(?P<fraction>[0-9]+))?(?P<zone>Z|[-+][0-9]{2}:[0-9]{2})?)?",
    re.ASCII,
)
_WORDS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_OLD_BOOLEANS = frozenset(
    ["y", "Y", "yes", "Yes", "YES", "on", "On", "ON", "n", "N", "no", "No", "NO", "off", "Off", "OFF"]
)
# Longer digits than any number has only cost time.
_NUMBER_LENGTH_MAX = 400


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """The value of a plain scalar; a date becomes text in the form of RFC 3339, as in JSON."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > _NUMBER_LENGTH_MAX or not (text[0] in "+-." or "0" <= text[0] <= "9"):
        return text
    timestamp = _TIMESTAMP.fullmatch(text)
    if timestamp is not None:
        return _resolve_timestamp(timestamp) or text
    digits = text if text[0] == "." else text.replace("_", "")
    if _INTEGER.fullmatch(digits) is not None:
        number = _integer(digits)
        if -(2**63) <= number < (2**64 if digits[0] != "+" else 2**63):
            return number
    if _FLOAT.fullmatch(digits) is not None:
        return float(digits)
    return text


def _integer(digits: str) -> int:
    unsigned = digits.lstrip("+-")
    if unsigned[0] == "0" and unsigned.isdigit():
        return int(digits, 8)
    return int(digits, 0)


def _resolve_timestamp(match: re.Match[str]) -> str | None:
    # A space and a zone together are not among yaml.v3's forms; neither is a T without a zone.
    separator, zone = match["separator"], match["zone"]
    if separator is not None and (separator == " ") != (zone is None):
        return None
    numbers = [int(match[part] or 0) for part in ("year", "month", "day", "hour", "minute", "second")]
    try:
        offset = UTC if zone in (None, "Z") else _zone(zone)
        moment = datetime(*numbers, tzinfo=offset)  # type: ignore[arg-type,misc]
    except ValueError:
        return None
    fraction = (match["fraction"] or "")[:9].rstrip("0")
    text = moment.replace(tzinfo=None).isoformat() + (f".{fraction}" if fraction else "")
    return f"{text}{'Z' if not moment.utcoffset() else zone}"


def _zone(text: str) -> timezone:
    offset = timedelta(hours=int(text[1:3]), minutes=int(text[4:6]))
    return timezone(-offset if text[0] == "-" else offset)


class FlowList(list[str]):
    """A list of text that is written on one line: `[a, b]`."""


def to_go_yaml(document: Mapping[str, object]) -> str:
    """`document`: mappings, lists, str, int, float, bool, None; keys in their order, see `sort_naturally`."""
    return "".join(_block(document, 0))


def sort_naturally(members: Mapping[str, object]) -> dict[str, object]:
    """Members in yaml.v3's order of map keys: letters after other characters, numbers by value."""
    return {key: members[key] for key in sorted(members, key=cmp_to_key(_compare_naturally))}


def _compare_naturally(one: str, other: str) -> int:
    after_digit = False
    for position, (a, b) in enumerate(zip(one, other, strict=False)):
        if a == b:
            after_digit = a.isdecimal()
            continue
        if a.isalpha() and b.isalpha():
            return -1 if a < b else 1
        if a.isalpha() or b.isalpha():
            return -1 if a.isalpha() == after_digit else 1
        return _compare_numbers(one, other, position)
    return len(one) - len(other)


def _compare_numbers(one: str, other: str, position: int) -> int:
    """At the first difference, neither side a letter: by the value of the digits from here on."""
    leading = 0
    if "0" in (one[position], other[position]):
        before = position - 1
        while before >= 0 and one[before].isdecimal():
            if one[before] != "0":
                leading = 1
                break
            before -= 1
    a, a_digits = _digits(one, position, leading)
    b, b_digits = _digits(other, position, leading)
    if a != b:
        return -1 if a < b else 1
    if a_digits != b_digits:
        return -1 if a_digits < b_digits else 1
    return -1 if one[position] < other[position] else 1


def _digits(text: str, start: int, number: int) -> tuple[int, int]:
    stop = start
    while stop < len(text) and text[stop].isdecimal():
        number = number * 10 + ord(text[stop]) - ord("0")
        stop += 1
    return number, stop


def format_float(number: float) -> str:
    """As strconv's `%g` with the shortest digits: an exponent below 1e-4 and from 1e6 on."""
    if number != number:  # noqa: PLR0124  (the test for NaN)
        return ".nan"
    if number in (float("inf"), float("-inf")):
        return ".inf" if number > 0 else "-.inf"
    if number == 0:
        return "-0" if str(number)[0] == "-" else "0"
    mantissa, _, exponent = f"{number:.17e}".partition("e")
    for precision in range(17):
        shorter = f"{number:.{precision}e}"
        if float(shorter) == number:
            mantissa, _, exponent = shorter.partition("e")
            break
    if int(exponent) < -4 or int(exponent) >= 6:
        return f"{mantissa}e{exponent}"
    decimals = max(0, len(mantissa.lstrip("-").replace(".", "")) - 1 - int(exponent))
    return f"{number:.{decimals}f}"


def _block(value: object, indent: int, *, continues_line: bool = False) -> Iterator[str]:
    """The lines of a collection; the first without its margin when it stands behind `- ` or `: `."""
    margin = "" if continues_line else " " * indent
    if isinstance(value, Mapping):
        for key, item in value.items():
            is_simple = _is_simple_key(str(key))
            head = _scalar(str(key), indent) if key != "<<" else '"<<"'  # plain, it would merge
            yield f"{margin}{head}:" if is_simple else f"{margin}? {head}\n{' ' * indent}:"
            yield from _value(item, indent, continues_line=not is_simple)
            margin = " " * indent
    else:
        assert isinstance(value, list)
        for item in value:
            yield f"{margin}-"
            yield from _value(item, indent, continues_line=True)
            margin = " " * indent


def _value(value: object, indent: int, *, continues_line: bool) -> Iterator[str]:
    if isinstance(value, FlowList):
        yield f" [{', '.join(_scalar(item, indent, in_flow=True) for item in value)}]\n"
    elif isinstance(value, Mapping | list) and value:
        yield " " if continues_line else "\n"
        yield from _block(value, indent + 2, continues_line=continues_line)
    elif isinstance(value, Mapping):
        yield " {}\n"
    elif isinstance(value, list):
        yield " []\n"
    else:
        yield f" {_scalar(value, indent)}\n"


_BREAK = re.compile("[\n\r\x85\u2028\u2029]")


def _is_simple_key(text: str) -> bool:
    """Fits before a colon; otherwise it stands behind a question mark."""
    return len(text.encode()) <= 128 and _BREAK.search(text) is None


def _scalar(value: object, indent: int, *, in_flow: bool = False) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case float():
            return format_float(value)
        case str():
            return _text(value, indent, in_flow=in_flow)
        case _:
            return str(value)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Which styles a text allows."""

    plain: bool
    single_quoted: bool
    literal: bool


def _text(text: str, indent: int, *, in_flow: bool) -> str:
    shape = _shape(text, in_flow=in_flow)
    if "\n" in text:
        return _literal(text, indent + 2) if shape.literal and not in_flow else _double_quoted(text)
    if not _reads_as_text(text) or not shape.single_quoted:
        return _double_quoted(text)
    if shape.plain:
        return text
    return "'" + text.replace("'", "''") + "'"


def _reads_as_text(text: str) -> bool:
    """Not something else in YAML 1.2 or 1.1."""
    if text in _OLD_BOOLEANS or _SEXAGESIMAL.fullmatch(text) is not None:
        return False
    return resolve_scalar(text) is text


_PRINTABLE = re.compile("[\n\x20-\x7e\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd]*")
_LINE_SEPARATORS = re.compile("[\u2028\u2029]")
_FIRST = frozenset(",[]{}#&*!|>'\"%@`")
_FLOW = frozenset(",?[]{}:")


def _shape(text: str, *, in_flow: bool) -> _Shape:
    special = (
        _PRINTABLE.fullmatch(text.replace("\t", "")) is None or _LINE_SEPARATORS.search(text) is not None
    )
    tabbed = "\t" in text
    edges = text[:1] in (" ", "\n") or text[-1:] in (" ", "\n")
    space_before_break = " \n" in text
    space_after_break = "\n " in text
    plain = not (special or tabbed or edges or "\n" in text or _has_indicator(text, in_flow=in_flow))
    return _Shape(
        plain=plain,
        single_quoted=not (special or tabbed or space_before_break or space_after_break),
        literal=not (special or space_before_break or text[-1:] == " "),
    )


def _has_indicator(text: str, *, in_flow: bool) -> bool:
    first, second = text[:1], text[1:2]
    if text.startswith(("---", "...")) or first in _FIRST:
        return True
    if first in ("-", "?", ":") and second in ("", " ", "\t", "\n"):
        return True
    if ": " in text or text.endswith(":") or " #" in text:
        return True
    return in_flow and (first in ("?", ":") or any(character in _FLOW for character in text))


def _literal(text: str, indent: int) -> str:
    hint = "2" if text[0] in " \n\t" else ""
    chomp = "" if text.endswith("\n") else "-"
    if text == "\n" or text.endswith("\n\n"):
        chomp = "+"
    lines = [f"{' ' * indent}{line}" if line else "" for line in text.removesuffix("\n").split("\n")]
    return "\n".join([f"|{hint}{chomp}", *lines])


_DOUBLE_QUOTED_ESCAPES = {
    "\0": "\\0",
    "\a": "\\a",
    "\b": "\\b",
    "\t": "\\t",
    "\n": "\\n",
    "\v": "\\v",
    "\f": "\\f",
    "\r": "\\r",
    "\x1b": "\\e",
    '"': '\\"',
    "\\": "\\\\",
    "\x85": "\\N",
    "\xa0": "\\_",
    "\u2028": "\\L",
    "\u2029": "\\P",
}


def _double_quoted(text: str) -> str:
    # yaml.v3 looks for a byte order mark at the beginning of the text and then escapes all of it.
    everything = text.startswith("\ufeff")
    return f'"{"".join([_escape(character, everything=everything) for character in text])}"'


def _escape(character: str, *, everything: bool) -> str:
    is_shown = _PRINTABLE.fullmatch(character) is not None and character not in '\n"\\\u2028\u2029'
    if is_shown and not everything:
        return character
    code = ord(character)
    if character in _DOUBLE_QUOTED_ESCAPES:
        return _DOUBLE_QUOTED_ESCAPES[character]
    if code <= 0xFF:
        return f"\\x{code:02X}"
    return f"\\u{code:04X}" if code <= 0xFFFF else f"\\U{code:08X}"
