"""Keys that users make for their programs, and take back: one record in the store for each.

    mkr_<user><id>_<secret>     <user>: 16 hex digits of a digest of the owner's name; <id>: 16 random ones;
                                <secret>: 256 random bits, of which the store has the SHA-256

A key is its owner, for as long as the owner is a user: it may do what its owner may, or less, if it was made with a scope.
It outlives a change of the owner's password; keys are taken back by themselves. A secret of 256 bits needs no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kitspec.errors import Denied, NameUnknown, QueryInvalid, Unauthorized
from registry import layout
from registry.auth.identity import Grant
from registry.auth.login import Login
from registry.auth.scopes import format_grant, parse_scopes
from registry.records import RecordCache
from storage_backends.interface import ObjectMissing, StorageBackend

PREFIX: Final = "mkr_"
"""What every key begins with; a JWT cannot."""
BINDING: Final = "apikey:"
# A century. A longer life is a mistake, and ends in a year that no calendar of the answers has.
LIFE_MAX_S: Final = 100 * 365.25 * 24 * 3600

# How long a key that was taken back through another replica may still be taken, where the store cannot be asked at once.
_TRUST_S: Final = 10.0
_RECORD_SIZE_MAX: Final = 64 * 1024
_CACHE_SIZE_MAX: Final = 4 * 1024 * 1024
_LABEL_LENGTH_MAX: Final = 100
_TEXT = re.compile(r"mkr_(?P<id>[0-9a-f]{32})_(?P<secret>[A-Za-z0-9_-]{43})", re.ASCII)
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

WRONG = "the API key is wrong, has ended, or was taken back"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as the store has it.

    Attributes:
        id: its public half.
        created, expires: seconds since 1970; None is for ever.
        scopes: what it is limited to; empty for all that its owner may.
        secret_hash: SHA-256 of its secret half, in hex.
    """

    id: str
    owner: str
    label: str
    created: float
    expires: float | None
    scopes: tuple[Grant, ...]
    secret_hash: str

    def to_record(self) -> bytes:
        document = {
            "owner": self.owner,
            "label": self.label,
            "created": self.created,
            "expires": self.expires,
            "scopes": [format_grant(scope) for scope in self.scopes],
            "secret": self.secret_hash,
        }
        return json.dumps(document).encode()

    @classmethod
    def from_record(cls, key_id: str, content: bytes) -> ApiKey:
        document: dict[str, Any] = json.loads(content)
        return cls(
            key_id,
            document["owner"],
            document["label"],
            document["created"],
            document["expires"],
            tuple(parse_scopes(document["scopes"])),
            document["secret"],
        )


class ApiKeys:
    """
    Args:
        is_user: whether the owner of a key is a user now.
        expiration_max_s: longest life of a key, if less than `LIFE_MAX_S`; 0 for any up to that, or none.
        per_user_max: keys of one user.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        backend: StorageBackend,
        *,
        is_user: Callable[[str], bool],
        expiration_max_s: float = 0.0,
        per_user_max: int = 50,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._is_user = is_user
        self._expiration_max_s = expiration_max_s
        self._per_user_max = per_user_max
        self._clock = clock
        self._records: RecordCache[bytes] = RecordCache(
            backend, bytes, record_size_max=_RECORD_SIZE_MAX, size_max=_CACHE_SIZE_MAX
        )

    async def create(
        self, owner: str, *, label: str, life_s: float | None, scopes: Sequence[str]
    ) -> tuple[str, ApiKey]:
        """A new key, with its text, which nobody can be told a second time.

        Args:
            life_s: None for as long as is allowed, which may be for ever.

        Raises:
            QueryInvalid: the wish cannot be granted as it stands.
            Denied: the user has as many as are allowed.
        """
        if len(label) > _LABEL_LENGTH_MAX or _CONTROL.search(label):
            raise QueryInvalid(
                f"a label has at most {_LABEL_LENGTH_MAX} characters, none of them a control character"
            )
        parsed = parse_scopes(scopes)
        if len(parsed) != len(scopes):
            raise QueryInvalid('a scope that is none; wanted for instance "repository:team/llm:pull"')
        existing = await self.list(owner)
        if len(existing) >= self._per_user_max:
            raise Denied(
                f"{owner} has {len(existing)} API keys, which is as many as are allowed; delete one first"
            )
        now = self._clock()
        secret = secrets.token_urlsafe(32)
        key = ApiKey(
            _user_part(owner) + secrets.token_hex(8),
            owner,
            label,
            now,
            self._end(now, life_s),
            tuple(parsed),
            _hash_of(secret),
        )
        await self._backend.write(_record_key(key.id), key.to_record(), expect="")
        return f"{PREFIX}{key.id}_{secret}", key

    async def list(self, owner: str) -> Sequence[ApiKey]:
        """All keys of a user, ended ones too, in no order that means something."""
        prefix = layout.api_keys_prefix(_user_part(owner))
        keys = []
        async for info in self._backend.list(prefix):
            key_id = _user_part(owner) + info.key.removeprefix(prefix)
            key = await self._read(key_id)
            if key is not None and key.owner == owner:
                keys.append(key)
        return keys

    async def revoke(self, owner: str, key_id: str) -> None:
        """Take a key back: nobody is let in with it from now on.

        Raises:
            NameUnknown: the user has no such key.
        """
        key = await self._read(key_id) if _ID.fullmatch(key_id) else None
        if key is None or key.owner != owner:
            raise NameUnknown(f"{owner} has no API key {key_id[:40]!a}")
        await self._backend.delete(_record_key(key_id))

    async def login(self, text: str) -> Login:
        """Whoever sent this key.

        Raises:
            Unauthorized: it lets nobody in.
        """
        match = _TEXT.fullmatch(text)
        key = await self._read(match["id"]) if match is not None else None
        offered = _hash_of(match["secret"] if match is not None else "")
        wanted = key.secret_hash if key is not None else _hash_of(secrets.token_urlsafe(32))
        is_right = hmac.compare_digest(offered.encode(), wanted.encode())
        if key is None or not is_right or not self._is_live(key):
            raise Unauthorized(WRONG)
        return Login(
            key.owner,
            method="apikey",
            grants=key.scopes or None,
            expires=key.expires,
            binding=f"{BINDING}{key.id}",
            is_current=self.current(key),
        )

    async def find_live(self, owner: str, key_id: str) -> ApiKey | None:
        """The key of `owner` with this id, if it lets somebody in."""
        key = await self._read(key_id) if _ID.fullmatch(key_id) else None
        return key if key is not None and key.owner == owner and self._is_live(key) else None

    def current(self, key: ApiKey) -> Callable[[], bool]:
        """Whether a key that was just read still lets somebody in: a question that can be asked again and again, at once."""
        location = _record_key(key.id)
        version = self._backend.version_at_once(location)
        until = self._clock() + _TRUST_S

        def is_current() -> bool:
            if not self._is_live(key):
                return False
            if version is None:  # a store across a network: believed for a moment
                return self._clock() < until
            # "" is a key that was taken back before it was asked for the first time.
            return version != "" and self._backend.version_at_once(location) == version

        return is_current

    def _is_live(self, key: ApiKey) -> bool:
        return self._is_user(key.owner) and (key.expires is None or self._clock() < key.expires)

    def _end(self, now: float, life_s: float | None) -> float | None:
        longest = min(self._expiration_max_s or LIFE_MAX_S, LIFE_MAX_S)
        if life_s is None:
            return now + longest if self._expiration_max_s else None
        if not 0 < life_s <= longest:
            # As text: there are integers that are no float.
            raise QueryInvalid(f"a life of {str(life_s)[:40]} s; wanted more than 0, at most {longest:.10g}")
        return now + life_s

    async def _read(self, key_id: str) -> ApiKey | None:
        try:
            return ApiKey.from_record(key_id, await self._records.get(_record_key(key_id)))
        except ObjectMissing:
            return None


def _record_key(key_id: str) -> str:
    return layout.api_key_key(key_id[:16], key_id[16:])


def _user_part(owner: str) -> str:
    return hashlib.sha256(b"modelkit-registry user\0" + owner.encode()).hexdigest()[:16]


def _hash_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
