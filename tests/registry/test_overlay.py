"""What is written to an overlay is read from it, and the store below never hears of it."""

from __future__ import annotations

import pytest

from registry import overlay
from registry.overlay import Overlay
from storage_backends.interface import ObjectMissing, ObjectTooLarge, PreconditionFailed
from storage_backends.memory import MemoryBackend


async def keys_of(backend: Overlay | MemoryBackend, prefix: str = "", after: str = "") -> list[str]:
    return [info.key async for info in backend.list(prefix, after=after)]


async def test_a_record_is_read_from_where_it_was_written_last() -> None:
    below = MemoryBackend()
    await below.write("a/stored", b"below")
    over = Overlay(below)

    await over.write("a/kept", b"above")
    replaced = await over.write("a/stored", b"newer")

    assert (await over.read("a/kept", size_max=9))[0] == b"above"
    assert await over.read("a/stored", size_max=9) == (b"newer", replaced)
    assert await over.stat("a/stored") == replaced
    assert over.version_at_once("a/stored") == replaced.version
    assert (await below.read("a/stored", size_max=9))[0] == b"below"
    assert await keys_of(below) == ["a/stored"]


async def test_a_list_has_both_in_order_and_each_once() -> None:
    below = MemoryBackend()
    for key in ("a/1", "a/3", "b/1"):
        await below.write(key, b"")
    over = Overlay(below)
    for key in ("a/2", "a/3", "a/4"):
        await over.write(key, b"x")

    assert await keys_of(over, "a/") == ["a/1", "a/2", "a/3", "a/4"]
    assert await keys_of(over, "a/", after="a/2") == ["a/3", "a/4"]


async def test_versions_are_compared_across_both() -> None:
    below = MemoryBackend()
    stored = await below.write("a", b"1")
    over = Overlay(below)

    with pytest.raises(PreconditionFailed):
        await over.write("a", b"2", expect="")
    kept = await over.write("a", b"2", expect=stored.version)
    with pytest.raises(PreconditionFailed):
        await over.write("a", b"3", expect=stored.version)
    with pytest.raises(PreconditionFailed):
        await over.delete("a", expect=stored.version)
    await over.delete("a", expect=kept.version)

    assert (await over.read("a", size_max=9))[0] == b"1"


async def test_a_record_that_is_too_large_is_not_read() -> None:
    over = Overlay(MemoryBackend())
    await over.write("a", b"1234")

    with pytest.raises(ObjectTooLarge):
        await over.read("a", size_max=3)


async def test_the_oldest_is_forgotten_when_there_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "_SIZE_MAX", 10)
    over = Overlay(MemoryBackend())

    await over.write("old", b"12345")
    await over.write("new", b"1234567")

    with pytest.raises(ObjectMissing):
        await over.stat("old")
    assert (await over.read("new", size_max=9))[0] == b"1234567"
