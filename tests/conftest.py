"""What holds in every test: nothing blocks the event loop, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, BlockBusterFunction, blockbuster_ctx

_OURS = ["registry", "storage_backends", "kitclient"]
# What blockbuster does not know of and a coroutine must not call either.
_ALSO_BLOCKING = (
    "os.open",
    "os.lstat",
    "os.fsync",
    "os.fdatasync",
    "os.ftruncate",
    "os.posix_fallocate",
    "os.pread",
    "os.preadv",
    "os.pwritev",
    "os.writev",
    "fcntl.flock",
    "shutil.rmtree",
)
_DESCRIPTORS = Path("/proc/self/fd")
_LETTING_GO_S = 5.0
# Its selector, and the pair of sockets that wakes it, are there as long as it is.
_OF_THE_LOOP = ("anon_inode:[eventpoll]", "socket:", "/proc/")


def _is_async(request: pytest.FixtureRequest) -> bool:
    function = getattr(request.node, "obj", None)
    return inspect.iscoroutinefunction(function)


@pytest.fixture(autouse=True)
def blockbuster(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """A blocking call of ours in the event loop fails the test."""
    if not _is_async(request):
        yield None
        return
    with blockbuster_ctx(_OURS) as blockbuster:
        for name in _ALSO_BLOCKING:
            blockbuster.functions[name] = BlockBusterFunction(None, name, scanned_modules=_OURS)
        for function in blockbuster.functions.values():
            # Measured: dearer by way of a thread than in the loop (docs/adr/0006). They wait for no other process, and
            # but for opening the file for no disk.
            function.can_block_in("storage_backends/local.py", {"_stat", "_opened_object", "_read"})
            function.activate()
        yield blockbuster


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """When an async test is over no task of it runs on, and no file or socket of it is open."""
    if not _is_async(request) or not _DESCRIPTORS.exists():
        yield
        return
    descriptors = _open_descriptors()
    request.getfixturevalue("no_task_is_left_behind")

    yield

    ends = time.monotonic() + _LETTING_GO_S
    while (kinds := _opened_since(descriptors)) and time.monotonic() < ends:
        # A thread of a pool lets go of its last call a moment after the call has ended.
        gc.collect()
    assert not kinds, f"open: {kinds}"


def _opened_since(descriptors: set[tuple[str, str]]) -> set[str]:
    # A number that was closed may be open again, for something else.
    return {name for _, name in _open_descriptors() - descriptors if not name.startswith(_OF_THE_LOOP)}


@pytest.fixture
async def no_task_is_left_behind() -> AsyncIterator[None]:
    before = asyncio.all_tasks()

    yield

    await asyncio.sleep(0)
    left = {
        task
        for task in asyncio.all_tasks() - before
        if not task.done() and task is not asyncio.current_task()
    }
    assert not left, f"tasks that run on: {left}"


def _open_descriptors() -> set[tuple[str, str]]:
    found = set()
    for descriptor in _DESCRIPTORS.iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add((descriptor.name, str(descriptor.readlink())))
    return found
