"""HTTP fields that the specification gives a meaning to: parse and format; pure.

HTTP counts both ends of a range in; everywhere else in this project `stop` is exclusive. The turn is made here only.
Source: RFC 9110 (ranges, conditional requests, challenges), RFC 8288 (Link), distribution-spec 1.1.1 (Content-Range).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Nineteen digits reach beyond 2**63; int() alone would take "1_0", " 5" and "٣".
_DIGITS = "[0-9]{1,19}"
_RANGE_SPEC = re.compile(rf"(?P<first>{_DIGITS})?-(?P<last>[0-9]+)?", re.ASCII)
_CONTENT_RANGE = re.compile(rf"(?P<first>{_DIGITS})-(?P<last>{_DIGITS})", re.ASCII)
# 200 characters hold any single range; a list longer than that is an attack or a mistake.
_RANGE_LENGTH_MAX = 200


@dataclass(frozen=True, slots=True)
class ByteSpan:
    """Bytes `start` up to but without `stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class RangeNotSatisfiable(ValueError):
    """The range is well formed and no byte of the content lies in it."""


def parse_range(field: str, size: int) -> ByteSpan | None:
    """The one span that a `Range` field asks of `size` bytes; None when the field is to be ignored.

    Ignored, as RFC 9110 section 14.2 allows: other units, lists of several ranges, and what the grammar does not allow.

    Raises:
        RangeNotSatisfiable: the span lies outside, or its first byte is behind its last.
    """
    unit, equals, spec = field.partition("=")
    if not equals or unit.strip().lower() != "bytes" or len(spec) > _RANGE_LENGTH_MAX:
        return None
    match = _RANGE_SPEC.fullmatch(spec.strip())
    if match is None or (match["first"] is None and match["last"] is None):
        return None
    if match["first"] is None:
        suffix = int(match["last"])
        if suffix == 0 or size == 0:
            raise RangeNotSatisfiable(f"bytes={spec} of {size} bytes")
        return ByteSpan(max(0, size - suffix), size)
    first = int(match["first"])
    last = int(match["last"]) if match["last"] is not None else size - 1
    # RFC 9110 14.1.1 calls last < first invalid, to be ignored or refused; the conformance suite wants 416.
    if first >= size or last < first:
        raise RangeNotSatisfiable(f"bytes={spec} of {size} bytes")
    return ByteSpan(first, min(last + 1, size))


def format_content_range(span: ByteSpan, size: int) -> str:
    """`bytes first-last/size` of a 206."""
    return f"bytes {span.start}-{span.stop - 1}/{size}"


def parse_upload_range(field: str) -> ByteSpan:
    """`Content-Range: <start>-<end>` of a PATCH; the bare form of the specification, `bytes ` in front tolerated.

    Raises:
        ValueError: the grammar does not allow it.
    """
    match = _CONTENT_RANGE.fullmatch(field.removeprefix("bytes ").partition("/")[0])
    if match is None or int(match["last"]) < int(match["first"]):
        raise ValueError(f"not an upload range: {field[:80]!a}; wanted <start>-<end>")
    return ByteSpan(int(match["first"]), int(match["last"]) + 1)


def format_upload_range(offset: int) -> str:
    """`Range` of an upload that holds `offset` bytes: `0-<end>`; `0-0` when empty, as Distribution says it."""
    return f"0-{max(0, offset - 1)}"


@dataclass(frozen=True, slots=True)
class EntityTags:
    """The value of `If-Match` or `If-None-Match`."""

    any: bool
    tags: tuple[tuple[bool, str], ...]
    """(weak, opaque tag without quotes)"""

    def match_strongly(self, etag: str) -> bool:
        return self.any or any(not weak and tag == etag for weak, tag in self.tags)

    def match_weakly(self, etag: str) -> bool:
        return self.any or any(tag == etag for _, tag in self.tags)


_ENTITY_TAG = re.compile(r'\s*(?P<weak>W/)?"(?P<tag>[\x21\x23-\x7e\x80-\xff]*)"\s*(?:,|$)', re.ASCII)


def parse_entity_tags(field: str) -> EntityTags:
    """RFC 9110 section 13.1; what does not parse matches nothing."""
    if field.strip() == "*":
        return EntityTags(any=True, tags=())
    tags: list[tuple[bool, str]] = []
    position = 0
    while position < len(field):
        match = _ENTITY_TAG.match(field, position)
        if match is None:
            break
        tags.append((match["weak"] is not None, match["tag"]))
        position = match.end()
    return EntityTags(any=False, tags=tuple(tags))


def format_next_link(target: str) -> str:
    """`Link` to the next page, RFC 8288."""
    return f'<{target}>; rel="next"'


_LINK = re.compile(r"\s*<(?P<target>[^<>]*)>(?P<parameters>(?:\s*;\s*[^,;]+)*)\s*(?:,|$)")


def parse_next_link(field: str) -> str | None:
    """The target of the link whose relation is `next`, or None."""
    position = 0
    while position < len(field):
        match = _LINK.match(field, position)
        if match is None:
            return None
        for parameter in match["parameters"].split(";"):
            key, _, value = parameter.strip().partition("=")
            if key.strip().lower() == "rel" and "next" in value.strip().strip('"').lower().split():
                return match["target"]
        position = match.end()
    return None


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of `WWW-Authenticate`: a scheme in lower case and its parameters, names in lower case."""

    scheme: str
    parameters: dict[str, str]


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105  (RFC 9110's word for it)
_PARAMETER = re.compile(
    rf'\s*(?P<name>{_TOKEN})\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s,"]+))\s*'
)
_SCHEME = re.compile(rf"\s*(?P<scheme>{_TOKEN})(?:\s+|$|(?=,))")


def parse_challenges(field: str) -> list[Challenge]:
    """The challenges of `WWW-Authenticate`, RFC 9110 section 11.6.1; reading stops at what does not parse."""
    challenges: list[Challenge] = []
    position = 0
    while position < len(field):
        parameter = _PARAMETER.match(field, position)
        if parameter is not None and challenges:
            value = parameter["plain"]
            if value is None:
                value = re.sub(r"\\(.)", r"\1", parameter["quoted"])
            challenges[-1].parameters.setdefault(parameter["name"].lower(), value)
            position = parameter.end()
        else:
            scheme = _SCHEME.match(field, position)
            if scheme is None:
                break
            challenges.append(Challenge(scheme["scheme"].lower(), {}))
            position = scheme.end()
        while position < len(field) and field[position] in ", \t":
            position += 1
    return challenges
