"""What a store must keep for N processes to share it, tried on the store itself. Runs in the thread that calls.

Stores that speak S3 and ignore a condition say 200 and overwrite: nothing but trying tells them from others.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from storage_backends.interface import ObjectMissing, PreconditionFailed, StorageUnavailable
from storage_backends.s3_client import S3Client
from storage_backends.s3_format import PROBES

# In the order in which a listing must show them: that of their bytes.
_NAMES: Final = ("B", "a!", "a-b", "a0", "ab", "b", "~")


def probe(client: S3Client) -> None:
    """Write, read and remove an object.

    Raises:
        StorageFull, StorageUnavailable: one of them failed.
    """
    key = PROBES + secrets.token_hex(8)
    content = secrets.token_bytes(32)
    client.again(lambda: client.put(key, content))
    read = client.again(lambda: client.get(key).read())
    client.again(lambda: client.delete(key))
    if read != content:
        raise _broken("a read after a write gives something else")


def check_promises(client: S3Client) -> None:
    """Raises: StorageUnavailable: the store breaks a promise; the message says which."""
    folder = f"{PROBES}{secrets.token_hex(8)}/"
    try:
        _check_conditions(client, folder + "b")
        _check_listing(client, folder)
    finally:
        with suppress(StorageUnavailable):
            for name in _NAMES:
                client.again(lambda name=name: client.delete(folder + name))  # type: ignore[misc]


def _check_conditions(client: S3Client, key: str) -> None:
    first = client.again(lambda: client.put(key, b"1"))
    _refused(
        client, lambda: client.put(key, b"2", expect=""), "a create where an object is (If-None-Match: *)"
    )
    second = client.again(lambda: client.put(key, b"3"))
    _refused(client, lambda: client.put(key, b"4", expect=first), "an overwrite of an old version (If-Match)")
    _refused(client, lambda: client.delete(key, expect=first), "a delete of an old version (If-Match)")
    body = client.again(lambda: client.get(key, span="bytes=-2"))
    if (body.read(), body.version) != (b"3", second):
        raise _broken("a read after a write gives something else")
    if client.again(lambda: client.put(key, b"5", expect=second)) in {first, second}:
        raise _broken("two objects with different bytes have the same ETag")
    client.again(lambda: client.delete(key))
    _refused(client, lambda: client.put(key, b"6", expect=second), "an overwrite of what is gone (If-Match)")


def _refused(client: S3Client, call: Callable[[], object], what: str) -> None:
    try:
        client.again(call)
    except (PreconditionFailed, ObjectMissing):
        return
    raise _broken(f"{what} is done, where it must be refused with 412")


def _check_listing(client: S3Client, folder: str) -> None:
    for name in reversed(_NAMES):
        client.again(lambda name=name: client.put(folder + name, b""))  # type: ignore[misc]
    if _names(client, folder) != list(_NAMES):
        raise _broken("a listing after a write is not complete, or not in the order of the bytes of the keys")
    if _names(client, folder, after="a-b") != ["a0", "ab", "b", "~"]:
        raise _broken("a listing does not begin behind the key that was asked for (StartAfter)")
    client.again(lambda: client.delete(folder + "ab"))
    if "ab" in _names(client, folder):
        raise _broken("a listing shows what was deleted")


def _names(client: S3Client, folder: str, after: str = "") -> list[str]:
    entries, _ = client.again(lambda: client.list(folder, after=folder + after if after else ""))
    return [entry.key.removeprefix(folder) for entry in entries]


def _broken(what: str) -> StorageUnavailable:
    return StorageUnavailable(f"this object store cannot be used: {what}; use one that keeps to S3")
