"""A-21: a file of the operator's that changes while we serve."""

import os
from pathlib import Path

import pytest

from registry.auth import watched_file
from registry.auth.watched_file import FileUnusable, WatchedFile
from tests.registry.auth.logins import Sources


def parsed(content: bytes) -> str:
    text = content.decode("ascii")
    if "broken" in text:
        raise ValueError("it is broken")
    return text


@pytest.fixture
def sources() -> Sources:
    return Sources()


@pytest.fixture
async def watched(tmp_path: Path, sources: Sources) -> WatchedFile[str]:
    (tmp_path / "file").write_text("one")
    file = WatchedFile(tmp_path / "file", "test", parsed, size_max=100, observer=sources)
    await file.start()
    return file


async def test_A_21_what_is_written_in_place_is_taken_over(watched: WatchedFile[str], tmp_path: Path) -> None:
    assert watched.value == "one"

    (tmp_path / "file").write_text("two")
    await watched.look()

    assert watched.value == "two"


async def test_A_21_what_replaces_the_file_is_taken_over(watched: WatchedFile[str], tmp_path: Path) -> None:
    (tmp_path / "new").write_text("two")
    (tmp_path / "new").replace(tmp_path / "file")
    await watched.look()

    assert watched.value == "two"


async def test_A_21_the_symlink_swap_of_kubernetes_is_taken_over(tmp_path: Path, sources: Sources) -> None:
    for version in ("one", "two"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "file").write_text(version)
        os.utime(tmp_path / version / "file", (1, 1))
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "file").symlink_to("..data/file")
    watched = WatchedFile(tmp_path / "file", "test", parsed, size_max=100, observer=sources)
    await watched.start()

    (tmp_path / "..data_tmp").symlink_to("two")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    await watched.look()

    assert watched.value == "two"


async def test_a_change_that_times_do_not_show_is_seen_while_the_file_is_fresh(
    watched: WatchedFile[str], tmp_path: Path
) -> None:
    status = (tmp_path / "file").stat()

    (tmp_path / "file").write_text("two")
    os.utime(tmp_path / "file", ns=(status.st_atime_ns, status.st_mtime_ns))
    await watched.look()

    assert watched.value == "two"


async def test_A_21_a_file_cut_to_nothing_means_nothing(watched: WatchedFile[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    await watched.look()

    assert watched.value == ""


@pytest.mark.parametrize("problem", ["gone", "broken", "too large", "a folder", "not text"])
async def test_A_21_a_file_that_is_not_sound_changes_nothing_and_raises_an_alert(
    problem: str,
    watched: WatchedFile[str],
    tmp_path: Path,
    sources: Sources,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "file"
    path.unlink()
    match problem:
        case "broken":
            path.write_text("broken")
        case "too large":
            path.write_text("x" * 101)
        case "a folder":
            path.mkdir()
        case "not text":
            path.write_bytes(b"\xff")
    await watched.look()
    await watched.look()

    assert watched.value == "one"
    assert sources.stale == {"test": True}
    assert [record.message for record in caplog.records] == ["auth.source.unusable"]


async def test_A_21_a_file_that_is_sound_again_ends_the_alert(
    watched: WatchedFile[str], tmp_path: Path, sources: Sources
) -> None:
    (tmp_path / "file").write_text("broken")
    await watched.look()
    assert sources.stale == {"test": True}

    (tmp_path / "file").write_text("two")
    await watched.look()

    assert watched.value == "two"
    assert sources.stale == {"test": False}


async def test_what_means_the_same_is_the_same_object(watched: WatchedFile[str], tmp_path: Path) -> None:
    before = watched.value

    (tmp_path / "new").write_text("one")
    (tmp_path / "new").replace(tmp_path / "file")
    await watched.look()

    assert watched.value is before


async def test_a_file_that_is_not_sound_at_the_start_is_an_error(tmp_path: Path, sources: Sources) -> None:
    missing = WatchedFile(tmp_path / "missing", "test", parsed, size_max=100, observer=sources)

    with pytest.raises(FileUnusable, match="cannot be read"):
        await missing.start()


async def test_a_file_that_has_not_changed_is_not_read_again(
    watched: WatchedFile[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(tmp_path / "file", (1, 1))
    monkeypatch.setattr(watched_file, "_FRESH_NS", -1)
    await watched.look()

    monkeypatch.setattr(watched, "_parse", None)
    monkeypatch.setattr(watched, "_content", b"another")
    await watched.look()

    assert watched.value == "one"
