"""Conditional requests and ranges on content with a strong entity tag, mostly its digest.

Source: RFC 9110 sections 13.2.2 (precedence) and 14.2 (ranges).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from kitspec.errors import RangeInvalid
from kitspec.http_fields import ByteSpan, RangeNotSatisfiable, parse_entity_tags, parse_range


class Verdict(enum.Enum):
    GO_ON = 200
    NOT_MODIFIED = 304
    PRECONDITION_FAILED = 412


def verdict_of(headers: Mapping[str, str], etag: str) -> Verdict:
    """What a GET or HEAD is answered with, given its preconditions.

    Dates are not compared: nothing here has a modification date, so `If-(Un)Modified-Since` is to be ignored.
    """
    if_match = headers.get("If-Match")
    if if_match is not None and not parse_entity_tags(if_match).match_strongly(etag):
        return Verdict.PRECONDITION_FAILED
    if_none_match = headers.get("If-None-Match")
    if if_none_match is not None and parse_entity_tags(if_none_match).match_weakly(etag):
        return Verdict.NOT_MODIFIED
    return Verdict.GO_ON


def span_of(headers: Mapping[str, str], method: str, etag: str, size: int) -> ByteSpan | None:
    """The part of `size` bytes that is asked for; None for all of it.

    Raises:
        RangeInvalid: the range lies outside the content.
    """
    field = headers.get("Range")
    if field is None or method != "GET":
        return None
    if_range = headers.get("If-Range")
    # A date never matches: there is no Last-Modified it could have come from.
    if if_range is not None and not parse_entity_tags(if_range).match_strongly(etag):
        return None
    try:
        return parse_range(field, size)
    except RangeNotSatisfiable as error:
        raise RangeInvalid(f"the range {error} cannot be served", size=size) from error
