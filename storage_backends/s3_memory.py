"""Memory for the parts of uploads: blocks that are used again, so that it is bounded however many uploads there are.

What arrives by way of the event loop is copied once, into memory that is warm by now. To keep the pieces as they came would save
that, and leave the heap in pieces too. What a thread reads from a socket, it reads into a block.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from typing import Final

MEMORY_MAX: Final = 64 * 1024 * 1024
"""Bytes of parts that one upload holds, or several together; what waits to become one (local_intake.py) comes on top."""

# Hashed by another thread while the next one fills, and sent by one system call or a few.
BLOCK_SIZE: Final = 1024 * 1024


class Blocks:
    """What all uploads of one process gather their parts in.

    An upload that finds them used up makes its part as small as S3 takes, and gathers no other while one is on its way. So the bound
    is exceeded by at most one such part for each upload, and nobody ever waits for what somebody else holds.
    """

    def __init__(self, size_max: int = MEMORY_MAX) -> None:
        self._count_max = size_max // BLOCK_SIZE
        self._count_out = 0
        self._free: list[memoryview] = []
        self._lock = threading.Lock()

    @property
    def are_used_up(self) -> bool:
        return self._count_out >= self._count_max

    def take(self) -> memoryview:
        with self._lock:
            self._count_out += 1
            if self._free:
                return self._free.pop()
        # Pages of its own: what goes back to the heap stays in the process. They count once they are written to.
        return memoryview(mmap.mmap(-1, BLOCK_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def give_back(self, blocks: list[memoryview]) -> None:
        with self._lock:
            self._count_out -= len(blocks)
            room = self._count_max - self._count_out - len(self._free)
            self._free += blocks[: max(0, room)]


class Gathered:
    """The bytes of a part, in blocks that go back when nobody has it any more."""

    def __init__(self, blocks: Blocks) -> None:
        self._pool = blocks
        self._blocks: list[memoryview] = []
        self._size = 0

    def __del__(self) -> None:
        self._pool.give_back(self._blocks)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        for number, block in enumerate(self._blocks):
            yield block[: self._size - number * BLOCK_SIZE]

    def __bytes__(self) -> bytes:
        return b"".join(self)

    def room(self) -> memoryview:
        """Where the next bytes go, at most a block; `grow` says how many there are."""
        filled = self._size - (len(self._blocks) - 1) * BLOCK_SIZE if self._blocks else BLOCK_SIZE
        if filled == BLOCK_SIZE:
            self._blocks.append(self._pool.take())
            filled = 0
        return self._blocks[-1][filled:]

    def grow(self, size: int) -> None:
        self._size += size

    def add(self, piece: memoryview) -> None:
        while piece:
            room = self.room()
            taken = piece[: len(room)]
            room[: len(taken)] = taken
            self.grow(len(taken))
            piece = piece[len(taken) :]
