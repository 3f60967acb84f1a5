"""Where a storage backend's errors become the registry's: the one border between the two trees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kitspec.errors import StorageFull, Unavailable
from storage_backends import interface as storage


@contextmanager
def translated() -> Iterator[None]:
    """Faults of the store, as answers a client can act on. What a caller can expect (a missing key) passes through."""
    try:
        yield
    except storage.StorageFull as error:
        raise StorageFull("the registry's storage is full; nothing was stored") from error
    except storage.StorageUnavailable as error:
        raise Unavailable("the registry's storage does not answer; try again later") from error
