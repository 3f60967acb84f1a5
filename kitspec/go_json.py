"""JSON text as Go's encoding/json writes it: digests of configs and manifests depend on every byte.

Compact; keys in the order given; `<`, `>`, `&`, U+2028 and U+2029 escaped, other text as it is.
Source: the documentation of encoding/json, Marshal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal

_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})
_quote = json.JSONEncoder(ensure_ascii=False).encode


class NumberText(str):
    """A number as its JSON text, to be written as it is."""

    __slots__ = ()


def to_go_json(value: object) -> bytes:
    """`value`: dicts (in their order), lists and tuples, str, int, float, NumberText, bool, None; nothing else."""
    return _write(value).translate(_ESCAPES).encode()


def _write(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join([f"{_quote(str(key))}:{_write(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([_write(item) for item in value]) + "]"
    if isinstance(value, float):
        return format_float(value)
    if isinstance(value, NumberText):
        return str(value)
    return _quote(value)


def format_float(number: float) -> str:
    """The shortest digits that give `number` back; an exponent below 1e-6 and from 1e21 on."""
    shortest = repr(number)
    if number == 0 or 1e-6 <= abs(number) < 1e21:
        return format(Decimal(shortest), "f").removesuffix(".0")
    mantissa, _, exponent = shortest.partition("e")
    sign, digits = exponent[0], exponent[1:]
    return f"{mantissa}e{sign}{digits.removeprefix('0') if sign == '-' else digits}"
