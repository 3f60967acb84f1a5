"""Storage backends: bytes under keys, on a disk, in memory, in an object store. Knows nothing of OCI."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from storage_backends.interface import StorageBackend
from storage_backends.local import LocalBackend
from storage_backends.memory import MemoryBackend

__all__ = ["LocalBackend", "MemoryBackend", "StorageBackend", "open_backend"]


def open_backend(place: str, *, durable: bool = True) -> StorageBackend:
    """The backend for a folder, a `file://` URL or `memory://`; `start` opens it.

    Args:
        durable: see LocalBackend.

    Raises:
        ValueError: no such kind of place.
    """
    scheme, separator, _ = place.partition("://")
    if not separator:
        if not place:
            raise ValueError("no place to store in; wanted a folder, file:// or memory://")
        return LocalBackend(Path(place).expanduser(), durable=durable)
    match scheme.lower():
        case "memory":
            return MemoryBackend()
        case "file":
            url = urlsplit(place)
            if (
                url.netloc not in {"", "localhost"}
                or not url.path.startswith("/")
                or url.query
                or url.fragment
            ):
                raise ValueError(f"not a folder of this machine: {place!r}; wanted file:///folder")
            return LocalBackend(Path(unquote(url.path)), durable=durable)
        case _:
            raise ValueError(f"unknown storage {scheme!r}; known are a folder, file:// and memory://")
