"""Small records, remembered in memory and checked against the store on every use.

A record that was written by another worker or replica is seen at once, because the remembered value is used only while
the store still has the version it was read from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from storage_backends.interface import ObjectMissing, StorageBackend

T = TypeVar("T")

# What an entry weighs beyond its bytes: key, version, the objects around them (measured with tracemalloc: 0.6 KiB).
_ENTRY_OVERHEAD = 640


class RecordCache(Generic[T]):
    """Records of one kind, decoded once.

    Args:
        decode: makes the value of a record's bytes.
        record_size_max: bytes; a larger record is not one of ours.
        size_max: bytes of all remembered records together.
        on_lookup: told of each look-up of a record that exists, whether it was remembered.
    """

    def __init__(
        self,
        backend: StorageBackend,
        decode: Callable[[bytes], T],
        *,
        record_size_max: int,
        size_max: int,
        on_lookup: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._backend = backend
        self._decode = decode
        self._record_size_max = record_size_max
        self._size_max = size_max
        self._on_lookup = on_lookup
        self._size = 0
        self._entries: OrderedDict[str, tuple[str, int, T]] = OrderedDict()

    async def get(self, key: str) -> T:
        """The record at `key`, as it is in the store now.

        Raises:
            ObjectMissing: there is none.
        """
        return (await self.get_versioned(key))[0]

    async def get_versioned(self, key: str) -> tuple[T, str]:
        """The record and the version it was read at, for compare-and-set."""
        try:
            # What is not remembered is read at once: where the store is a network away, its version alone costs as much.
            if key in self._entries:
                info = await self._backend.stat(key)
                entry = self._entries.get(key)
                if entry is not None and entry[0] == info.version:
                    self._on_lookup(True)
                    self._entries.move_to_end(key)
                    return entry[2], info.version
            content, info = await self._backend.read(key, size_max=self._record_size_max)
        except ObjectMissing:
            self.forget(key)
            raise
        self._on_lookup(False)
        value = self._decode(content)
        self._remember(key, info.version, len(content) + _ENTRY_OVERHEAD, value)
        return value, info.version

    async def refresh(self, key: str) -> None:
        """Read a record anew that is remembered and no longer what it was."""
        if key in self._entries:
            with suppress(ObjectMissing):
                await self.get_versioned(key)

    def forget_all(self) -> None:
        self._entries.clear()
        self._size = 0

    def forget(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size -= entry[1]

    def _remember(self, key: str, version: str, weight: int, value: T) -> None:
        self.forget(key)
        self._entries[key] = (version, weight, value)
        self._size += weight
        while self._size > self._size_max:
            _, (_, weight, _) = self._entries.popitem(last=False)
            self._size -= weight
