"""Users and their password hashes, as `htpasswd -B` writes them; pure but for the time that a check takes.

One line for each user, `name:hash`; empty lines and lines that begin with `#` are skipped. bcrypt only: the other
hashes of htpasswd (MD5, SHA-1, crypt) are broken by guessing, and a line with one of them is refused rather than never let in.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import bcrypt

from registry.auth.http_auth import USER_NAME_SIZE_MAX

FILE_SIZE_MAX: Final = 16 * 1024 * 1024

# What `bcrypt` takes into account; it refuses more, and other programs cut the rest off without a word.
_PASSWORD_SIZE_MAX = 72
# 2**15 rounds are 1.7 s here. A cost of 31 would keep a thread busy for a day.
_COST_MAX = 15
# Of the decoy where there is nobody: what `htpasswd -B` (5) and our manual (10) suggest.
_COST_DEFAULT = 10
_HASH = re.compile(rb"\$2[aby]\$(?P<cost>0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class HtpasswdInvalid(ValueError):
    """The file has a line that cannot be meant; the message has its number, and nothing of its content."""


@dataclass(frozen=True, slots=True)
class Users:
    """Everybody in the file.

    Attributes:
        cost_max: the highest cost of all hashes; every wrong password takes as long as this cost does.
    """

    hashes: Mapping[str, bytes]
    cost_max: int

    def hash_of(self, name: str) -> bytes | None:
        return self.hashes.get(name)

    def version_of(self, name: str) -> str | None:
        """A text that changes when the user's password does; None for somebody unknown. No secret, and tells none."""
        stored = self.hashes.get(name)
        if stored is None:
            return None
        digest = hashlib.sha256(b"modelkit-registry password\0" + stored).digest()
        return base64.urlsafe_b64encode(digest[:12]).decode()

    def is_password(self, name: str, password: bytes) -> bool:
        """Whether this is the password of `name`. Blocks for 2 ** cost rounds.

        A wrong one takes as long as the highest cost in the file, whoever is named: time must not tell who exists.
        """
        stored = self.hashes.get(name)
        if stored is None:
            _matches(password, _decoy(self.cost_max))
            return False
        if _matches(password, stored):
            return True
        # 2**c + (2**c + 2**(c+1) + … + 2**(max-1)) = 2**max rounds in all.
        for cost in range(_cost_of(stored), self.cost_max):
            _matches(password, _decoy(cost))
        return False


def parse_htpasswd(content: bytes) -> Users:
    """Raises: HtpasswdInvalid."""
    hashes: dict[str, bytes] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        entry = line.strip()
        if not entry or entry.startswith(b"#"):
            continue
        name, stored = _parse_entry(entry, number)
        if name in hashes:
            raise HtpasswdInvalid(f"line {number}: a user who stands in the file already")
        hashes[name] = stored
    cost_max = max((_cost_of(stored) for stored in hashes.values()), default=_COST_DEFAULT)
    return Users(MappingProxyType(hashes), cost_max)


NOBODY: Final = Users(MappingProxyType({}), _COST_DEFAULT)


def _parse_entry(entry: bytes, number: int) -> tuple[str, bytes]:
    raw_name, colon, stored = entry.partition(b":")
    if not colon:
        raise HtpasswdInvalid(f"line {number}: no colon; wanted name:hash")
    try:
        name = raw_name.decode()
    except UnicodeDecodeError:
        raise HtpasswdInvalid(f"line {number}: the name is not UTF-8") from None
    if not 0 < len(raw_name) <= USER_NAME_SIZE_MAX or _CONTROL.search(name):
        raise HtpasswdInvalid(
            f"line {number}: a name has 1 to {USER_NAME_SIZE_MAX} bytes without control characters"
        )
    if _HASH.fullmatch(stored) is None:
        raise HtpasswdInvalid(f"line {number}: not a bcrypt hash; make one with `htpasswd -B`")
    if _cost_of(stored) > _COST_MAX:
        raise HtpasswdInvalid(
            f"line {number}: a cost of {_cost_of(stored)}; more than {_COST_MAX} takes seconds a login"
        )
    return name, stored


def _cost_of(stored: bytes) -> int:
    return int(stored[4:6])


@functools.lru_cache(maxsize=32)
def _decoy(cost: int) -> bytes:
    """A hash that no password has, of a cost."""
    return b"$2b$%02d$" % cost + b"." * 53


def _matches(password: bytes, stored: bytes) -> bool:
    """Takes the same time for a password that is too long to be right."""
    is_match = bcrypt.checkpw(password[:_PASSWORD_SIZE_MAX], stored)
    return is_match and len(password) <= _PASSWORD_SIZE_MAX
