"""Tell the story again and again, each time breaking it off one system call later, until it is told to its end.

    python -m tests.storage_backends.break_off FOLDER kill|ENOSPC|EIO

`kill` ends the process with SIGKILL before the n-th call, an error's name makes the n-th call fail. Each telling has a
process of its own, forked from this one, which has no threads. Prints how many points there were.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from storage_backends.interface import StorageError
from storage_backends.local import LocalBackend
from tests.storage_backends.story import check, tell

_CALLS = (
    *(
        "open",
        "close",
        "write",
        "pwritev",
        "posix_fallocate",
        "ftruncate",
        "fsync",
        "fdatasync",
        "fchmod",
        "utime",
    ),
    *("rename", "link", "unlink", "rmdir", "mkdir", "scandir", "fstat", "lstat"),
)
# Without room nothing can be made; what is there can be read, closed and removed.
_CALLS_THAT_FAIL = (
    "open",
    "write",
    "pwritev",
    "posix_fallocate",
    "fsync",
    "fdatasync",
    "rename",
    "link",
    "mkdir",
)
_LIMIT = 1000
# Exit status of a story that was broken by an error.
_BROKEN = 3


def break_at(turn: int, how: str) -> Callable[[], bool]:
    """From now on, break the `turn`-th of the calls that are looked at; whether it came so far."""
    numbers = count(1)

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def broken(*args: Any, **kwargs: Any) -> Any:
            if next(numbers) == turn:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))
            return call(*args, **kwargs)

        return broken

    for name in _CALLS if how == "kill" else _CALLS_THAT_FAIL:
        setattr(os, name, wrap(getattr(os, name)))
    if how == "kill":
        fcntl.flock = wrap(fcntl.flock)
    return lambda: next(numbers) > turn


def in_a_process(work: Callable[[], None]) -> int:
    """The exit status of a child that does `work`; negative when a signal ended it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 (the child must end here)
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tell_broken(root: Path, turn: int, how: str, acknowledgements: int) -> None:
    async def told() -> None:
        backend = LocalBackend(root)
        await backend.start()
        write, temporary = os.write, root / "_store" / "tmp"
        was_reached = break_at(turn, how)
        try:
            await tell(backend, lambda step: write(acknowledgements, f"{step}\n".encode()) and None)
        except StorageError as error:
            left = list(temporary.iterdir())
            if str(root) in str(error) or left:
                raise AssertionError(f"a folder in the message, or left behind: {left}") from error
        os._exit(_BROKEN if was_reached() else 0)

    asyncio.run(told())


def start_killed(root: Path, turn: int) -> None:
    break_at(turn, "kill")
    asyncio.run(LocalBackend(root).start())


def sweep(folder: Path, how: str) -> int:
    for turn in range(1, _LIMIT):
        root = folder / str(turn)
        receiving, sending = os.pipe()
        status = in_a_process(partial(tell_broken, root, turn, how, sending))
        os.close(sending)
        with os.fdopen(receiving) as file:
            acknowledged = file.read().splitlines()
        if status not in {0, _BROKEN, -signal.SIGKILL}:
            sys.exit(f"turn {turn}: the story ended with {status} after {acknowledged}")
        if how == "kill":
            in_a_process(partial(start_killed, root, 1 + turn % 40))  # a recovery may be killed too
        if in_a_process(lambda: asyncio.run(check(root, acknowledged, may_discard=how != "kill"))):  # noqa: B023
            sys.exit(f"turn {turn}: wrong after {acknowledged}")
        shutil.rmtree(root)
        if status == 0:
            return turn - 1
    sys.exit(f"the story has more than {_LIMIT} turns")


if __name__ == "__main__":
    sys.stdout.write(f"{sweep(Path(sys.argv[1]), sys.argv[2])}\n")
