"""The keys that this registry signs its tokens with: one record in the store, shared by all replicas.

A new key takes over when the newest is `rotation_s` old; the others verify until every token that they signed has ended.
Whoever meets a token of a key that it does not know reads the record again, so a new key counts everywhere at once.

Whoever can read a private key can make tokens for anybody. Where `http.secret` is set the keys are sealed with it
(AES-256-GCM, a key of HKDF-SHA256): then reading the store, or a backup of it, is not enough.

While a secret is replaced some replicas have the old one and some the new one. Each signs and verifies with the keys that it
can unseal, and writes the others back as they are.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from kitspec.errors import Unavailable
from registry import layout
from registry.auth.verification_keys import VerificationKey, thumbprint, verification_key
from registry.logs import log_event
from storage_backends.interface import ObjectMissing, PreconditionFailed, StorageBackend, StorageError

logger = logging.getLogger(__name__)

ALGORITHM: Final = "ES256"

_RECORD_SIZE_MAX: Final = 64 * 1024
_LOOK_INTERVAL_S: Final = 60.0
# Tokens with keys that nobody has can be invented by the thousand.
_REREAD_INTERVAL_S: Final = 2.0
_NONCE_SIZE: Final = 12
# Replicas have two secrets at a time while one is replaced. A secret that is another at each start must not fill the record.
_FOREIGN_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class SigningKey:
    """
    Attributes:
        id: the RFC 7638 thumbprint of its public half.
        created: seconds since 1970.
    """

    id: str
    created: float
    private: ec.EllipticCurvePrivateKey


class Seal:
    """Hides private keys from who can read the store.

    Args:
        secret: shared by all replicas; None leaves them in the clear.
    """

    def __init__(self, secret: str | None) -> None:
        self._cipher = None
        if secret is not None:
            derivation = HKDF(SHA256(), length=32, salt=None, info=b"modelkit-registry token keys")
            self._cipher = AESGCM(derivation.derive(secret.encode()))

    def wrap(self, content: bytes, context: str) -> Mapping[str, str]:
        if self._cipher is None:
            return {"private": base64.b64encode(content).decode()}
        nonce = secrets.token_bytes(_NONCE_SIZE)
        sealed = nonce + self._cipher.encrypt(nonce, content, context.encode())
        return {"sealed": base64.b64encode(sealed).decode()}

    def unwrap(self, entry: Mapping[str, Any], context: str) -> bytes:
        """Raises: ValueError: it was sealed with another secret, or is broken."""
        if "private" in entry:
            return base64.b64decode(entry["private"], validate=True)
        sealed = base64.b64decode(entry["sealed"], validate=True)
        if self._cipher is None:
            raise ValueError("sealed, and http.secret is not set")
        try:
            return self._cipher.decrypt(sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:], context.encode())
        except InvalidTag as error:
            raise ValueError("sealed with another http.secret") from error


class TokenKeys:
    """
    Args:
        rotation_s: age at which a key is followed by another.
        keep_s: how long tokens live that were signed with a key; it verifies for so long after the next took over.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        backend: StorageBackend,
        *,
        rotation_s: float,
        keep_s: float,
        seal: Seal,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._rotation_s = rotation_s
        self._keep_s = keep_s
        self._seal = seal
        self._clock = clock
        self._keys: Sequence[SigningKey] = ()
        self._public: Mapping[str, VerificationKey] = {}
        # Entries of the record that another secret seals.
        self._foreign: Sequence[Mapping[str, Any]] = ()
        self._are_stored = False
        self._version: str | None = None
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def start(self) -> None:
        """Have a key to sign with: the record's, or a new one, which the store keeps.

        Raises:
            StorageError: the store cannot be used.
        """
        await self._follow()

    async def watch(self) -> None:
        """Rotate when it is time, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_INTERVAL_S)
            try:
                await self._follow()
            except StorageError as error:
                log_event(logger, logging.WARNING, "auth.keys.unread", reason=str(error))

    @property
    def signing(self) -> SigningKey:
        """The newest key.

        Raises:
            Unavailable: there is none, since somebody deleted the record; `watch` makes one within a minute.
        """
        if not self._keys:
            raise Unavailable("there is no key to sign tokens with; one is made within a minute: try again")
        return self._keys[-1]

    def known(self, key_id: str) -> VerificationKey | None:
        """The public key of this id, as far as it is known here."""
        return self._public.get(key_id)

    async def find(self, key_id: str) -> VerificationKey | None:
        """The public key of this id, looked for in the store if it is not known here."""
        key = self._public.get(key_id)
        if key is None and self._clock() - self._read_at >= _REREAD_INTERVAL_S:
            async with self._reading:
                if key_id not in self._public and self._clock() - self._read_at >= _REREAD_INTERVAL_S:
                    await self._read()
            key = self._public.get(key_id)
        return key

    async def _follow(self) -> None:
        """Read the record, and write it anew while our newest key is too old, not in it, or there is none."""
        while True:
            version = await self._read()
            now = self._clock()
            is_due = not self._keys or now - self.signing.created >= self._rotation_s
            if not is_due and self._are_stored:
                return
            kept = [key for key, end in zip(self._keys, self._ends(now), strict=True) if end > now]
            keys = [*kept, _new_key(now)] if is_due else kept
            foreign = self._lasting_foreign(now)
            try:
                await self._backend.write(layout.TOKEN_KEYS, self._record(keys, foreign), expect=version)
            except PreconditionFailed:
                continue  # somebody else was first: theirs will do
            event = "auth.keys.rotated" if is_due else "auth.keys.restored"
            log_event(logger, logging.INFO, event, key=keys[-1].id, kept=len(kept), foreign=len(foreign))

    def _ends(self, now: float) -> list[float]:
        """Until when each key verifies: `keep_s` after the next one took over; the last one's is from now on."""
        successors = [key.created for key in self._keys[1:]]
        return [taken_over + self._keep_s for taken_over in (*successors, now)][: len(self._keys)]

    def _lasting_foreign(self, now: float) -> Sequence[Mapping[str, Any]]:
        """The newest keys of others, without those whose tokens have ended: whoever has one follows it when it is old."""
        lasting_s = self._rotation_s + _LOOK_INTERVAL_S + self._keep_s
        lasting = [entry for entry in self._foreign if entry["created"] + lasting_s > now]
        return sorted(lasting, key=lambda entry: float(entry["created"]))[-_FOREIGN_MAX:]

    async def _read(self) -> str:
        """Take over what the record says; its version, "" where there is none."""
        self._read_at = self._clock()
        try:
            content, info = await self._backend.read(layout.TOKEN_KEYS, size_max=_RECORD_SIZE_MAX)
        except ObjectMissing:
            self._take_over((), ())
            self._version = ""
            return ""
        if info.version != self._version:
            self._take_over(*self._parse(content))
            self._version = info.version
        return info.version

    def _take_over(self, keys: Sequence[SigningKey], foreign: Sequence[Mapping[str, Any]]) -> None:
        """Where there are keys of others only, ours were thrown away, and not taken back: we stay with them."""
        self._foreign = foreign
        self._are_stored = bool(keys) or not foreign
        if self._are_stored:
            self._keys = keys
            self._public = {key.id: verification_key(key.private.public_key()) for key in keys}

    def _parse(self, content: bytes) -> tuple[Sequence[SigningKey], Sequence[Mapping[str, Any]]]:
        """The keys of a record, the oldest first, and the entries that cannot be unsealed."""
        keys, foreign = [], []
        for entry in json.loads(content)["keys"]:
            try:
                private = load_der_private_key(self._seal.unwrap(entry, entry["id"]), password=None)
            except ValueError as error:
                log_event(logger, logging.WARNING, "auth.keys.unusable", key=entry["id"], reason=str(error))
                foreign.append(entry)
                continue
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            keys.append(SigningKey(entry["id"], entry["created"], private))
        return sorted(keys, key=lambda key: key.created), foreign

    def _record(self, keys: Sequence[SigningKey], foreign: Sequence[Mapping[str, Any]]) -> bytes:
        entries = [
            {
                "id": key.id,
                "created": key.created,
                **self._seal.wrap(
                    key.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()), key.id
                ),
            }
            for key in keys
        ]
        return json.dumps({"keys": [*entries, *foreign], "nonce": secrets.token_hex(8)}).encode()


def _new_key(now: float) -> SigningKey:
    private = ec.generate_private_key(ec.SECP256R1())
    return SigningKey(thumbprint(private.public_key()), now, private)
