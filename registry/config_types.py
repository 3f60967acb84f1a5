"""What every section of the configuration is made of: the base of sections, durations, sizes, addresses, paths.

Apart from `config.py`, so that a section that has a module of its own can be written with them and be part of `Config`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    WithJsonSchema,
    model_validator,
)

_DURATION = re.compile(r"(?:[0-9]{1,12}(?:\.[0-9]{1,9})?(?:ns|us|µs|ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"([0-9.]+)(ns|us|µs|ms|s|m|h)", re.ASCII)
_SECONDS_OF = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_SIZE = re.compile(r"([0-9]{1,15}) ?([KMGTPkmgtp]i?)?B?", re.ASCII)
_POWERS = " KMGTP"
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}", re.ASCII)
_NUMBER_AT_THE_END = re.compile(r"(?:\A|\.)[0-9]+\Z", re.ASCII)
_ORIGIN = re.compile(r"https?://(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)


def parse_duration(value: object) -> float:
    """Seconds of a Go duration ("1h30m", "10s", "250ms") or of a plain number, which counts seconds."""
    if type(value) in {int, float}:
        seconds = float(value)  # type: ignore[arg-type]
    elif isinstance(value, str) and _DURATION.fullmatch(value):
        seconds = sum(float(n) * _SECONDS_OF[unit] for n, unit in _DURATION_PART.findall(value))
    else:
        raise ValueError('should be a duration like "10s", "1h30m" or a number of seconds')
    if not 0 <= seconds < 1e10:
        raise ValueError("should not be negative, nor longer than three centuries")
    return seconds


def parse_size(value: object) -> int:
    """Bytes of "4MiB", "10GB", "512" or of a plain number."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        number, unit = match.groups()
        if unit is None:
            return int(number)
        base = 1024 if unit[-1] in "iI" else 1000
        return int(number) * int(base ** _POWERS.index(unit[0].upper()))
    raise ValueError('should be a size like "4MiB", "10GB" or a number of bytes')


def parse_address(value: object) -> str:
    if isinstance(value, str):
        host, colon, port = value.rpartition(":")
        is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
        if colon and is_port and (not host or _is_host(host)):
            return value
    raise ValueError('should be an address like "127.0.0.1:5000", ":5000" or "[::1]:5000"')


def _is_host(text: str) -> bool:
    try:
        if text.startswith("[") and text.endswith("]"):
            ipaddress.IPv6Address(text[1:-1])
        elif _NUMBER_AT_THE_END.search(text):  # of no name; the resolver would take some for addresses
            ipaddress.IPv4Address(text)
        else:
            return _HOST_NAME.fullmatch(text) is not None
    except ValueError:
        return False
    return True


def is_origin(text: str) -> bool:
    """Whether it is the http:// or https:// address of a host, with a port or without, and nothing behind."""
    try:
        return _ORIGIN.fullmatch(text) is not None and urlsplit(text).port != 0
    except ValueError:  # too large a port, or no IPv6 address
        return False


def parse_network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """A network, or one address, which is a network of one."""
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return ipaddress.ip_network(value)
    raise ValueError('should be a network or an address, like "10.0.0.0/8" or "fd00::/8"')


def _listed(value: object) -> tuple[object, ...]:
    if isinstance(value, list | tuple):
        return tuple(value)
    raise ValueError('should be a list of networks, like ["10.0.0.0/8"]')


def expanded(path: str | Path) -> Path:
    """A path of the operator's, with the home that `~` at its beginning stands for. Raises: ValueError: there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError("names the home of a user that this machine does not know") from error


def _path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return expanded(value)
    raise ValueError("should be the path of a file or a folder")


def _not_empty(value: SecretStr | None) -> SecretStr | None:
    if value is not None and not value.get_secret_value():
        raise ValueError("should not be empty")
    return value


Seconds = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": _DURATION.pattern}, {"type": "number", "minimum": 0}]}
    ),
]
Timeout = Annotated[Seconds, Field(gt=0)]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {"anyOf": [{"type": "string", "pattern": _SIZE.pattern}, {"type": "integer", "minimum": 0}]}
    ),
]
Count = Annotated[int, Field(gt=0)]
CountOrAny = Annotated[int, Field(ge=0)]
"""0 for no limit."""
Address = Annotated[
    str, BeforeValidator(parse_address), WithJsonSchema({"type": "string", "pattern": ":[0-9]+$"})
]
Network = Annotated[
    ipaddress.IPv4Network | ipaddress.IPv6Network,
    BeforeValidator(parse_network),
    WithJsonSchema({"type": "string"}),
]
Networks = Annotated[tuple[Network, ...], BeforeValidator(_listed)]
FilePath = Annotated[Path, BeforeValidator(_path), WithJsonSchema({"type": "string"})]

# Checked around the union, not within: config_sources.py knows secrets by their `SecretStr | None`.
Secret = Annotated[SecretStr | None, AfterValidator(_not_empty)]


class Section(BaseModel):
    """A mapping of the file. Unknown keys are refused; a key with nothing after it (`delete:`) is its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_defaults(cls, value: object) -> object:
        return {} if value is None else value
