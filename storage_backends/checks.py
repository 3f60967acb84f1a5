"""What callers hand in, checked alike for all backends: what one store takes, every store takes."""

from __future__ import annotations

import re

from storage_backends.interface import Span, SpanChoice

INTERNAL = "_store"
"""First component of what a backend keeps for itself; no key begins with it."""

# An object store takes 1024 bytes of key, a file system 255 of a component.
KEY_SIZE_MAX = 1024
_COMPONENT = r"(?!\.{1,2}(?:/|\Z))[!-.0-~]{1,255}"
_KEY = re.compile(rf"(?!{INTERNAL}(?:/|\Z)){_COMPONENT}(?:/{_COMPONENT})*")
_PREFIX = re.compile(rf"(?:{_COMPONENT}/)*[!-.0-~]{{0,255}}")
_UPLOAD_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOTE_SIZE_MAX = 64 * 1024


def check_key(key: str) -> None:
    """Raises: ValueError."""
    if not is_key(key):
        raise ValueError(
            f"not a key: {key!r}; wanted at most {KEY_SIZE_MAX} bytes of printable ASCII, in components of 1 to 255 "
            f"bytes with a '/' between, none of them '.' or '..', the first not {INTERNAL!r}"
        )


def is_key(name: str) -> bool:
    return len(name) <= KEY_SIZE_MAX and _KEY.fullmatch(name) is not None


def check_prefix(prefix: str) -> None:
    """What a key may begin with, the last component being cut anywhere.

    Raises: ValueError.
    """
    if len(prefix) > KEY_SIZE_MAX or _PREFIX.fullmatch(prefix) is None:
        raise ValueError(f"no key begins with {prefix!r}")


def is_component(name: str) -> bool:
    """Whether a key may have `name` between its slashes."""
    return "/" not in name and _PREFIX.fullmatch(name) is not None and name not in {"", ".", ".."}


def is_upload_id(name: str) -> bool:
    return _UPLOAD_ID.fullmatch(name) is not None


def check_upload_id(upload_id: str) -> None:
    """Raises: ValueError."""
    if not is_upload_id(upload_id):
        raise ValueError(f"not the id of an upload: {upload_id!r}; wanted 1 to 64 of [A-Za-z0-9_-]")


def check_note(note: bytes) -> None:
    """Raises: ValueError."""
    if len(note) > _NOTE_SIZE_MAX:
        raise ValueError(f"a note of {len(note)} bytes; at most {_NOTE_SIZE_MAX} are kept")


def checked_span(choice: SpanChoice, size: int) -> Span:
    """The span that is chosen of an object.

    Raises:
        ValueError: it does not lie inside.
    """
    span = choice(size) if callable(choice) else choice
    if span is None:
        return Span(0, size)
    if not 0 <= span.start <= span.stop <= size:
        raise ValueError(f"bytes {span.start} to {span.stop} of an object of {size}")
    return span
