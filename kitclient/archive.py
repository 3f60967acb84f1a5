"""A layer's blob on its way to files: hashed, inflated and written, each byte once, while the next ones arrive.

Only regular files and folders come out, with mode 0644 or 0755 masked by the umask; no owner, no time, no attribute of
the archive's. What comes out is in a `LayerTree`; nobody sees it before the blob's digest was found right.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterable
from concurrent.futures import Executor

from kitclient.compression import UnpackLimit
from kitclient.ingest import WRITE_SIZE
from kitclient.kit_files import PathChoice
from kitclient.layer_reading import FileSink, LayerPlan, read_layer
from kitclient.progress import BlobProgress
from kitclient.staging import LayerTree

EVERYTHING = PathChoice()


async def extract(
    plan: LayerPlan,
    chunks: AsyncIterable[bytes],
    tree: LayerTree,
    *,
    choice: PathChoice = EVERYTHING,
    limit: UnpackLimit,
    threads: Executor,
    progress: BlobProgress,
) -> None:
    """Write a layer into `tree`, which its caller keeps or drops.

    Args:
        chunks: the blob's bytes, unverified.
        choice: the paths that are written; the rest is only verified.
        threads: at least two at a time: one hashes while the other writes.

    Raises:
        DigestInvalid, SizeInvalid: the bytes are not the blob.
        LayerBroken, LayerTarInvalid, PathRefused: they are, and no layer may be like that.
    """
    sink = TreeSink(tree, limit, choice)
    await read_layer(plan, chunks, sink, limit=limit, threads=threads, progress=progress)


class TreeSink:
    """Writes what is wanted into a tree, and counts it."""

    def __init__(self, tree: LayerTree, limit: UnpackLimit, choice: PathChoice) -> None:
        self._tree = tree
        self._limit = limit
        self._choice = choice
        self._path = ""
        self._file = -1

    def folder(self, path: str, mode: int) -> None:
        _ = mode
        if path in self._choice:
            self._limit.add_entry()
            self._tree.make_folder(path)

    def begin(self, path: str, mode: int, offset: int | None) -> None:
        _ = offset
        if path in self._choice:
            self._limit.add_entry()
            self._path = path
            self._file = self._tree.create_file(path, safe_mode(mode))

    def write(self, piece: bytes | memoryview) -> None:
        if self._file < 0:
            return
        self._limit.add_bytes(len(piece), 0, 0)
        view = memoryview(piece)
        while view:
            view = view[os.write(self._file, view[:WRITE_SIZE]) :]

    def end(self) -> None:
        self.close()

    def close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            self._tree.close_file(self._path, file)


def safe_mode(mode: int) -> int:
    """0755 for what its owner may run, else 0644; the umask takes its share when the file is made."""
    return 0o755 if mode & 0o100 else 0o644


_: type[FileSink] = TreeSink
