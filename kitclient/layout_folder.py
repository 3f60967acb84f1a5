"""The folder of an OCI image layout: its index and its blobs. Plain blocking functions, safe between processes.

    oci-layout                  {"imageLayoutVersion": "1.0.0"}
    index.json                  every manifest of every repository: one entry per tag, one for an untagged manifest
    blobs/<algorithm>/<hex>     content, shared by all repositories; verified, synced and never changed again
    ingest/                     what is not yet whole: see kitclient/ingest.py
    ingest/index.lock           held by whoever changes index.json or deletes a blob

An entry is named by `org.opencontainers.image.ref.name`, which holds the whole reference, `host/name:tag`; an untagged
one says its repository in `ml.modelkit-registry.repository`. Entries with other names are other tools': kept, and what
they need is kept. Why so: docs/adr/0007-local-storage.md.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kitclient.errors import StoreUnusable
from kitspec.digest import ENCODED_LENGTH, Digest
from kitspec.errors import DigestInvalid, NameInvalid, TagInvalid
from kitspec.names import RepositoryName, Tag

REF_NAME = "org.opencontainers.image.ref.name"
REPOSITORY = "ml.modelkit-registry.repository"

# Whoever holds the lock reads and writes a few small files; a minute means that it hangs.
_LOCK_TIMEOUT_S = 60
# A partial download is worth keeping for the next try, not for ever.
INGEST_KEPT_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of index.json.

    Attributes:
        repository: `host/name`; empty for an entry that another tool named in its own way.
        tag: None for an untagged manifest.
    """

    repository: str
    tag: Tag | None
    digest: Digest
    size: int
    media_type: str
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of the index, and the blobs that are to go with it."""

    entries: list[Entry]
    drop: set[Digest]


class ImageLayout:
    """The folder. Every method may block on the disk; none keeps anything in memory that another process changes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ingest = root / "ingest"
        self._index = root / "index.json"

    def create(self) -> None:
        """Make the folder a layout, unless it is one, and drop what was left half-done long ago.

        Raises:
            StoreUnusable: it cannot be written, or it is a layout of a version that nobody knows.
        """
        try:
            for algorithm in ENCODED_LENGTH:
                (self.root / "blobs" / algorithm).mkdir(parents=True, exist_ok=True)
            self.ingest.mkdir(exist_ok=True)
            marker = self.root / "oci-layout"
            if not marker.exists():
                self.write_file(marker, b'{"imageLayoutVersion":"1.0.0"}')
            elif json.loads(marker.read_bytes()).get("imageLayoutVersion") != "1.0.0":
                raise StoreUnusable(
                    f"{marker}: not a version of the image layout that is known; wanted 1.0.0"
                )
            with self.change():
                self._sweep()
        except (OSError, ValueError, AttributeError) as error:
            raise StoreUnusable(f"the local store {self.root} cannot be used: {error}") from error

    def blob_path(self, digest: Digest) -> Path:
        return self.root / "blobs" / digest.algorithm / digest.encoded

    def blob_size(self, digest: Digest) -> int | None:
        """Size of a blob; None when it is not here."""
        try:
            return self.blob_path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def blobs(self, *, older_than_s: float) -> Iterator[Digest]:
        """Every blob that nobody wrote lately."""
        limit = time.time() - older_than_s
        for algorithm in ENCODED_LENGTH:
            for path in (self.root / "blobs" / algorithm).iterdir():
                with suppress(DigestInvalid, FileNotFoundError):
                    digest = Digest(f"{algorithm}:{path.name}")
                    if path.stat().st_mtime < limit:
                        yield digest

    def entries(self) -> list[Entry]:
        """What index.json lists, as of now."""
        return [_entry(document) for document in self._read_index()["manifests"]]

    @contextmanager
    def change(self) -> Iterator[Change]:
        """The entries, to be changed in place and written back as one; nobody else changes them meanwhile.

        Nothing is written when the block raises. What the block drops goes after the index no longer lists it.

        Raises:
            StoreUnusable: another process has held the lock for a minute.
        """
        lock = FileLock(self.ingest / "index.lock", timeout=_LOCK_TIMEOUT_S)
        try:
            lock.acquire(poll_interval=0.01)
        except Timeout as error:
            raise StoreUnusable(
                f"another process holds {lock.lock_file} since {_LOCK_TIMEOUT_S} s"
            ) from error
        try:
            document = self._read_index()
            change = Change([_entry(line) for line in document["manifests"]], set())
            before = list(change.entries)
            yield change
            if change.entries != before or not self._index.exists():
                document["manifests"] = [entry.document for entry in change.entries]
                self.write_file(self._index, json.dumps(document, separators=(",", ":")).encode())
            for digest in change.drop:
                self.blob_path(digest).unlink(missing_ok=True)
        finally:
            lock.release()

    def write_file(self, path: Path, content: bytes, *, mode: int = 0o666) -> None:
        """Put `content` at `path`: whole and durable, or not at all."""
        temporary = self.ingest / f"tmp-{secrets.token_hex(16)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def _read_index(self) -> dict[str, Any]:
        try:
            document = json.loads(self._index.read_bytes())
        except FileNotFoundError:
            document = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json"}
        except (ValueError, RecursionError) as error:
            raise StoreUnusable(f"{self._index} is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise StoreUnusable(f"{self._index} is not an image index")
        if document.get("manifests") is None:
            document["manifests"] = []
        return document

    def _sweep(self) -> None:
        """Remove what nobody has touched for a week; a file in use is younger, its writer writes.

        And locks of partial files that are gone: their writer was killed when its blob had its final name already.
        """
        limit = time.time() - INGEST_KEPT_S
        for path in self.ingest.iterdir():
            if path.name == "index.lock":
                continue
            with suppress(OSError):
                if path.stat().st_mtime < limit:
                    path.unlink()
                elif path.suffix == ".lock" and not path.with_suffix("").exists():
                    _remove_idle_lock(path)


def _remove_idle_lock(path: Path) -> None:
    """Remove a lock that nobody holds; while it is held, so that whoever waits for it sees that it has no name any more."""
    lock = FileLock(path, timeout=0)
    with suppress(Timeout), lock:
        if not path.with_suffix("").exists():
            path.unlink(missing_ok=True)


def manifest_entry(repository: str, tag: Tag | None, digest: Digest, size: int, media_type: str) -> Entry:
    """The line of index.json for a manifest of `repository`."""
    annotations = {REF_NAME: f"{repository}:{tag}"} if tag is not None else {REPOSITORY: repository}
    document = {"mediaType": media_type, "digest": str(digest), "size": size, "annotations": annotations}
    return Entry(repository, tag, digest, size, media_type, document)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable: a crash can keep a file and lose its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(document: object) -> Entry:
    if not isinstance(document, dict):
        raise StoreUnusable("index.json holds an entry that is not an object")
    try:
        digest, size, media_type = Digest(document["digest"]), document["size"], document["mediaType"]
    except (KeyError, TypeError, DigestInvalid) as error:
        raise StoreUnusable(f"index.json holds an entry that is no descriptor: {error}") from error
    annotations = document.get("annotations") or {}
    repository, tag = _names(annotations.get(REF_NAME), annotations.get(REPOSITORY))
    return Entry(repository, tag, digest, size, media_type, document)


def _names(ref_name: object, repository: object) -> tuple[str, Tag | None]:
    tag: Tag | None = None
    try:
        if isinstance(ref_name, str):
            repository, _, label = ref_name.rpartition(":")
            tag = Tag(label)
        if isinstance(repository, str):
            host, _, name = repository.partition("/")
            RepositoryName(name)
            if host:
                return repository, tag
    except (NameInvalid, TagInvalid):
        pass
    return "", None
