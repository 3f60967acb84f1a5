"""What a client was told to be here stays here for a while: the writers' half of collection (garbage.py has the other).

Whoever is told that a blob is here will not push it, and lists it in a manifest later. So every such answer (a commit, a mount,
HEAD, the check of a manifest's references) leaves the record that it rests on younger than a quarter of the grace time: an older one is
touched, which gives it a new version. The collector removes only what is older than the grace time, and only the version that it
saw, so that one of two always holds: it sees the touch, or its removal is refused.

A request that takes longer than a quarter of the grace time, from its check to its write, cannot rely on that. It touches what it
rests on once more behind its write, whatever the age, and takes the write back where something is gone
(docs/adr/0016-collection.md has the proof).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final

from storage_backends.interface import ObjectInfo, StorageBackend

# One quarter for how old a record may be, one for how long a request may take; half is left for clocks that are seconds off.
_SHARE: Final = 4


class Freshness:
    """
    Args:
        grace_s: for how long what nothing refers to is kept; None where nothing is ever written or collected.
    """

    def __init__(self, backend: StorageBackend, *, grace_s: float | None) -> None:
        self._backend = backend
        self._age_max = None if grace_s is None else grace_s / _SHARE

    def promise(self) -> Promise:
        """Begin a request whose answer will rest on what is here."""
        return Promise(self._backend, self._age_max)


class Promise:
    """What one answer rests on."""

    def __init__(self, backend: StorageBackend, age_max: float | None) -> None:
        self._backend = backend
        self._age_max = age_max
        self._began = asyncio.get_running_loop().time()
        self._keys: set[str] = set()

    async def rest_on(self, info: ObjectInfo) -> None:
        """Raises: ObjectMissing: it was removed since `info` was told."""
        if self._age_max is None:
            return
        self._keys.add(info.key)
        if info.modified < self._backend.now() - self._age_max:
            await self._backend.touch(info.key)

    async def renew(self, *, also: Iterable[str] = ()) -> None:
        """Call it when what the answer promises is written.

        Args:
            also: keys that were written meanwhile and have to be there, too.

        Raises:
            ObjectMissing: it took long, and something is gone: take back what was written.
        """
        if self._age_max is None or asyncio.get_running_loop().time() - self._began < self._age_max:
            return
        for key in (*self._keys, *also):
            await self._backend.touch(key)
