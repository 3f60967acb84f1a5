"""A short life of a store, told step by step, and what must be true of its folder however the story broke off.

A step is acknowledged when it returned. After a crash at any point all that was acknowledged is there, the step that was
under way took effect as a whole or not at all, and a new start leaves nothing lying about.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from storage_backends.interface import ObjectMissing, UploadMissing
from storage_backends.local import LocalBackend

FIRST, SECOND = b"first" * 1000, b"second" * 300_000
_STEPS = (
    "record absent",
    "record 1",
    "record 2",
    "begun",
    "appended first",
    "appended second",
    "committed",
    "small committed",
    "deleted",
    "empty",
    "logged",
)
_KEPT = {"empty": ("links/one", b""), "logged": ("log/one", b"line\n" * 2000)}


async def _chunks(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 400_000):
        yield content[start : start + 400_000]


def _ignore(piece: bytes) -> None:
    del piece


async def tell(backend: LocalBackend, acknowledge: Callable[[str], None]) -> None:
    acknowledge("record absent")
    info = await backend.write("records/one", b"1", expect="")
    acknowledge("record 1")
    await backend.write("records/one", b"2" * 5000, expect=info.version)
    acknowledge("record 2")
    upload = await backend.begin_upload("large", note=b"begun")
    acknowledge("begun")
    await upload.append(_chunks(FIRST), observe=_ignore, note=lambda: b"first")
    acknowledge("appended first")
    upload = await backend.resume_upload("large")
    await upload.append(_chunks(SECOND), observe=_ignore, note=lambda: b"second", size=len(SECOND))
    acknowledge("appended second")
    await upload.commit("content/de/large")
    acknowledge("committed")
    upload = await backend.begin_upload("small")
    await upload.append(_chunks(FIRST), observe=_ignore, note=lambda: b"", size=len(FIRST), last=True)
    await upload.commit("content/ad/small")
    acknowledge("small committed")
    await backend.delete("records/one")
    acknowledge("deleted")
    await backend.write(*_KEPT["empty"])
    acknowledge("empty")
    await backend.create(*_KEPT["logged"])
    acknowledge("logged")


async def check(root: Path, acknowledged: list[str], *, may_discard: bool = False) -> None:
    """Open the folder that the story left, look, and leave nothing of it behind.

    Args:
        may_discard: an fsync may have failed, so an upload may be gone although its offset was acknowledged (D5).

    Raises:
        AssertionError: what must be true is not.
    """
    assert tuple(acknowledged) == _STEPS[: len(acknowledged)]
    reached = len(acknowledged) - 1
    backend = LocalBackend(root)
    await backend.start()
    try:
        await backend.probe()
        await _check_record(backend, reached)
        for step, (key, content) in _KEPT.items():
            await _check_kept(backend, key, content, reached, step)
        await _check_content(backend, "content/de/large", FIRST + SECOND, reached, "committed")
        await _check_content(backend, "content/ad/small", FIRST, reached, "small committed")
        await _check_upload(backend, reached, may_discard=may_discard)
        for upload_id in [upload.id async for upload in backend.uploads()]:
            await (await backend.resume_upload(upload_id)).abort()
        keys = [info.key async for info in backend.list("")]
    finally:
        await backend.close()
    files = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    litter = {file for file in files if not file.startswith("_store/locks/")} - {*keys, "_store/layout"}
    assert not litter, f"left behind: {litter}"
    assert list((root / "_store" / "uploads").iterdir()) == []


async def _check_record(backend: LocalBackend, reached: int) -> None:
    possible: list[bytes | None] = [None, b"1", b"2" * 5000]
    allowed = possible[reached : reached + 2] if reached < 2 else [b"2" * 5000]
    if reached >= _STEPS.index("small committed"):
        allowed = [None] if reached >= _STEPS.index("deleted") else [b"2" * 5000, None]
    try:
        found: bytes | None = (await backend.read("records/one", size_max=9999))[0]
    except ObjectMissing:
        found = None
    assert found in allowed, f"after {_STEPS[reached]!r} the record is {found!r}"


async def _check_kept(backend: LocalBackend, key: str, content: bytes, reached: int, step: str) -> None:
    try:
        found, _ = await backend.read(key, size_max=99_999)
    except ObjectMissing:
        assert reached < _STEPS.index(step), f"{key} is lost after {_STEPS[reached]!r}"
    else:
        assert reached + 1 >= _STEPS.index(step), f"{key} is there too early, after {_STEPS[reached]!r}"
        assert found == content


async def _check_content(backend: LocalBackend, key: str, content: bytes, reached: int, step: str) -> None:
    try:
        async with backend.deliver(key) as delivery:
            found = await asyncio.to_thread(os.pread, delivery.file.fileno(), len(content) + 1, 0)
    except ObjectMissing:
        assert reached < _STEPS.index(step), f"{key} is lost after {_STEPS[reached]!r}"
    else:
        assert reached + 1 >= _STEPS.index(step), f"{key} is there too early, after {_STEPS[reached]!r}"
        assert found == content


async def _check_upload(backend: LocalBackend, reached: int, *, may_discard: bool) -> None:
    try:
        upload = await backend.resume_upload("large")
    except UploadMissing:
        lost = _STEPS.index("appended first") <= reached <= _STEPS.index("appended second")
        assert may_discard or not lost or await _is_there(backend, "content/de/large"), (
            f"lost after {_STEPS[reached]!r}"
        )
        return
    kept = b"".join([piece async for piece in upload.replay()])
    states = {b"begun": b"", b"first": FIRST, b"second": FIRST + SECOND}
    assert kept == states[upload.note]
    least = {"appended first": len(FIRST), "appended second": len(FIRST + SECOND)}.get(_STEPS[reached], 0)
    assert upload.offset >= least
    assert reached < _STEPS.index("committed")


async def _is_there(backend: LocalBackend, key: str) -> bool:
    try:
        await backend.stat(key)
    except ObjectMissing:
        return False
    return True
