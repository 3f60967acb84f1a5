"""Keys below a folder, in the order an object store lists them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from storage_backends.checks import INTERNAL, is_component

Entry = tuple[str, os.stat_result]


def walk(root: str, prefix: str, after: str) -> Iterator[Entry]:
    """Files whose keys begin with `prefix` and are greater than `after`, in ASCII order of the whole key.

    A folder counts as its name with the slash that follows: `a-b` comes before `a/b`, and `a.b` too. Opens only
    folders that may hold such keys; keeps the names of the folders on the way to the current key, nothing else. What is
    neither folder nor regular file, or bears a name no key can have, is passed over.
    """
    if prefix.startswith(f"{INTERNAL}/"):
        return
    folder, _, start = prefix.rpartition("/")
    above = f"{folder}/" if folder else ""
    stack = [iter(_names(root, above, start, after))]
    while stack:
        key = next(stack[-1], None)
        if key is None:
            stack.pop()
        elif key.endswith("/"):
            stack.append(iter(_names(root, key, "", after)))
        else:
            try:
                status = os.lstat(f"{root}/{key}")
            except (FileNotFoundError, NotADirectoryError):
                continue
            if stat.S_ISREG(status.st_mode):
                yield key, status


def _names(root: str, above: str, start: str, after: str) -> list[str]:
    """Keys of the files and, with a slash, of the folders in folder `above`, sorted, that begin with `start`."""
    keys = []
    try:
        with os.scandir(f"{root}/{above}") as entries:
            for entry in entries:
                name = entry.name
                if not name.startswith(start) or not is_component(name) or (not above and name == INTERNAL):
                    continue
                key = f"{above}{name}"
                if entry.is_dir(follow_symlinks=False):
                    key += "/"
                    # All below are smaller than `after`, unless `after` is below itself.
                    if key <= after and not after.startswith(key):
                        continue
                elif key <= after or not entry.is_file(follow_symlinks=False):
                    continue
                keys.append(key)
    except (FileNotFoundError, NotADirectoryError):
        return []
    keys.sort()
    return keys
