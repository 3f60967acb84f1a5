"""A folder is walked in the order of an object store, and no further than asked."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_backends.local_listing import walk

NAMES = st.text(alphabet="-./0aA_~!", min_size=1, max_size=3).filter(
    lambda name: "/" not in name and name.strip(".")
)
KEYS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
BEGINNINGS = KEYS.flatmap(lambda key: st.integers(0, len(key)).map(lambda size: key[:size]))


def without_keys_below_keys(keys: set[str]) -> list[str]:
    return [key for key in keys if not any(key.startswith(f"{other}/") for other in keys)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("listing")


@settings(max_examples=200, deadline=None)
@given(
    keys=st.sets(KEYS, max_size=12).map(without_keys_below_keys),
    prefix=BEGINNINGS,
    after=BEGINNINGS | st.text(),
)
def test_V_08_any_set_of_keys_is_listed_sorted_whatever_prefix_and_page(
    folder: Path, keys: list[str], prefix: str, after: str
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as root:
        for key in keys:
            path = Path(root, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

        listed = [key for key, _ in walk(root, prefix, after)]

    assert listed == sorted(key for key in keys if key.startswith(prefix) and key > after)


def test_V_09_what_is_no_object_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a" / "empty").mkdir(parents=True)
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "not a key").touch()
    (tmp_path / "a" / "ünïcode").touch()
    (tmp_path / "a" / "line\nbreak").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff")).touch()
    (tmp_path / "a" / "link").symlink_to("file")
    (tmp_path / "a" / "linked-folder").symlink_to("empty")
    (tmp_path / "a" / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "a" / "fifo")
    (tmp_path / "_store" / "tmp").mkdir(parents=True)
    (tmp_path / "_store" / "layout").touch()

    assert [key for key, _ in walk(str(tmp_path), "", "")] == ["a/file"]


@pytest.fixture
def opened_folders(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened = []
    scandir = os.scandir

    def counting(path: str) -> Iterator[os.DirEntry[str]]:
        opened.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    return opened


def test_only_folders_that_may_hold_wanted_keys_are_opened(tmp_path: Path, opened_folders: list[str]) -> None:
    for index in range(30):
        (tmp_path / f"d{index:02}" / "e").mkdir(parents=True)
        (tmp_path / f"d{index:02}" / "e" / "file").touch()

    assert [key for key, _ in walk(str(tmp_path), "d1", "d18/e/file")] == ["d19/e/file"]
    assert [Path(path).relative_to(tmp_path) for path in opened_folders] == [
        Path(name) for name in (".", "d18", "d18/e", "d19", "d19/e")
    ]

    opened_folders.clear()
    assert [key for key, _ in walk(str(tmp_path), "d07/e/f", "")] == ["d07/e/file"]
    assert opened_folders == [f"{tmp_path}/d07/e/"]
