"""Files get their names when all of them are verified; nothing is written through, over or beside what is there."""

from __future__ import annotations

import itertools
import os
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from kitclient.folders import PathRefused
from kitclient.staging import Existing, LayerTree, Staging


def stage(staging: Staging, key: str, files: dict[str, bytes], folders: tuple[str, ...] = ()):
    tree = staging.layer(key)
    for path in folders:
        tree.make_folder(path)
    for path, content in files.items():
        _write(tree, path, content)
    tree.keep()
    return {key: tree.members}


def _write(tree: LayerTree, path: str, content: bytes) -> None:
    file = tree.create_file(path, 0o644)
    os.write(file, content)
    tree.close_file(path, file)


def tree_of(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "here" / "target"
    folder.mkdir(parents=True)
    return folder


def test_nothing_is_visible_before_it_is_placed_and_nothing_else_afterwards(target: Path):
    with Staging(target) as staging:
        layers = stage(staging, "k", {"a/b": b"1", "c": b"2"}, folders=("a", "empty"))
        assert tree_of(target) == {}
        staging.place(layers, Existing.REFUSE)

    assert tree_of(target) == {"a": None, "a/b": b"1", "c": b"2", "empty": None}
    assert list(target.parent.iterdir()) == [target]


def test_layers_that_share_a_folder_are_merged_with_what_is_there(target: Path):
    (target / "a").mkdir()
    (target / "a" / "mine").write_bytes(b"0")

    with Staging(target) as staging:
        layers = stage(staging, "k", {"a/b/c": b"1"}, folders=("a", "a/b"))
        layers |= stage(staging, "l", {"a/b/d": b"2", "e/f": b"3"}, folders=("a", "a/b"))
        staging.place(layers, Existing.REFUSE)

    assert {path: content for path, content in tree_of(target).items() if content} == {
        "a/mine": b"0",
        "a/b/c": b"1",
        "a/b/d": b"2",
        "e/f": b"3",
    }


def test_T_15_a_file_that_exists_is_refused_before_any_other_is_placed(target: Path):
    (target / "z").write_bytes(b"mine")

    with Staging(target) as staging:
        layers = stage(staging, "k", {"a": b"1", "z": b"2"})
        with pytest.raises(PathRefused, match=r"path .z. already exists"):
            staging.place(layers, Existing.REFUSE)

    assert tree_of(target) == {"z": b"mine"}


def test_T_15_an_existing_file_is_skipped_or_replaced_as_asked_and_never_written_into(target: Path):
    (target / "z").write_bytes(b"mine")
    os.link(target / "z", target / "other-name")

    with Staging(target) as staging:
        assert staging.place(stage(staging, "k", {"a": b"1", "z": b"2"}), Existing.SKIP) == ["z"]
    assert (target / "z").read_bytes() == b"mine"

    with Staging(target) as staging:
        staging.place(stage(staging, "k", {"z": b"2"}), Existing.REPLACE)
    assert tree_of(target) == {"a": b"1", "other-name": b"mine", "z": b"2"}


def test_T_15_a_read_only_file_is_replaced_and_one_in_use_keeps_its_readers(target: Path):
    (target / "z").write_bytes(b"mine")
    (target / "z").chmod(0o400)

    with (target / "z").open("rb") as reader, Staging(target) as staging:
        staging.place(stage(staging, "k", {"z": b"2"}), Existing.REPLACE)
        assert reader.read() == b"mine"

    assert (target / "z").read_bytes() == b"2"


@pytest.mark.parametrize("existing", Existing)
@pytest.mark.parametrize("obstacle", ["folder", "link", "fifo"])
def test_T_15_what_is_no_file_is_never_replaced(target: Path, existing: Existing, obstacle: str):
    path = target / "z"
    {"folder": path.mkdir, "link": lambda: path.symlink_to("/etc/passwd"), "fifo": lambda: os.mkfifo(path)}[
        obstacle
    ]()

    with Staging(target) as staging:
        layers = stage(staging, "k", {"a": b"1", "z": b"2"})
        with pytest.raises(PathRefused, match="'z' is"):
            staging.place(layers, existing)

    assert [entry.name for entry in target.iterdir()] == ["z"]


def test_T_14_a_link_where_a_folder_is_wanted_is_never_followed(target: Path, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (target / "a").symlink_to(outside)

    for existing in Existing:
        with Staging(target) as staging:
            layers = stage(staging, "k", {"a/b": b"1"}, folders=("a",))
            with pytest.raises(PathRefused, match="symbolic link"):
                staging.place(layers, existing)
        with Staging(target) as staging:
            layers = stage(staging, "k", {"a/b": b"1"})
            with pytest.raises(PathRefused, match="symbolic link"):
                staging.place(layers, existing)

    assert list(outside.iterdir()) == []


def test_T_14_a_folder_swapped_for_a_link_while_files_are_placed_never_leads_outside(
    target: Path, tmp_path: Path
):
    outside = tmp_path / "outside"
    outside.mkdir()
    (target / "a").mkdir()
    stop = threading.Event()

    def swap() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            aside = tmp_path / f"aside-{number}"
            # Whatever fails, fails because files are being placed at that moment.
            with suppress(OSError):
                (target / "a").rename(aside)
                (target / "a").symlink_to(outside)
                (target / "a").unlink()
                aside.rename(target / "a")

    attacker = threading.Thread(target=swap)
    attacker.start()
    try:
        for turn in range(60):
            with Staging(target) as staging:
                layers = stage(staging, "k", {f"a/{turn}-{n}": b"1" for n in range(5)}, folders=("a",))
                with suppress(PathRefused, OSError):
                    staging.place(layers, Existing.REPLACE)
    finally:
        stop.set()
        attacker.join()

    assert list(outside.iterdir()) == []


def test_T_14_a_target_that_is_a_link_is_not_entered_by_itself(target: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(target)

    with pytest.raises(OSError, match=r"Not a directory|symbolic"), Staging(link):
        pass


def test_a_layer_that_brings_a_path_twice_is_refused(target: Path):
    with Staging(target) as staging:
        tree = staging.layer("k")
        _write(tree, "a", b"1")
        with pytest.raises(PathRefused, match="twice"):
            tree.create_file("a", 0o644)
        with pytest.raises(PathRefused, match="is a file"):
            tree.make_folder("a/b")
        tree.close()


@pytest.mark.parametrize("second", ["a", "a/b"])
def test_two_layers_that_bring_one_path_are_refused(target: Path, second: str):
    with Staging(target) as staging:
        layers = stage(staging, "k", {"a": b"1"}) | stage(staging, "l", {second: b"2"})
        with pytest.raises(PathRefused, match="'a'"):
            staging.place(layers, Existing.REPLACE)

    assert tree_of(target) == {}


def test_what_fails_half_way_is_taken_back(target: Path, monkeypatch: pytest.MonkeyPatch):
    (target / "there").mkdir()
    link = os.link
    calls = []

    def fail_third(*args, **keywords):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        link(*args, **keywords)

    monkeypatch.setattr(os, "link", fail_third)
    with Staging(target) as staging:
        files = {"folder/a": b"1", "there/b": b"2", "new/c": b"3", "new/d": b"4", "e": b"5"}
        layers = stage(staging, "k", files, folders=("folder",))
        with pytest.raises(OSError, match="Input/output error"):
            staging.place(layers, Existing.REFUSE)

    assert tree_of(target) == {"there": None}


def die_with(target: Path, work) -> None:
    """Run `work(staging)` in a process that is killed inside."""
    child = os.fork()
    if child == 0:
        with Staging(target) as staging:
            work(staging)
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_INV_C2_a_verified_layer_of_a_killed_unpack_is_taken_over_and_the_rest_removed(target: Path):
    def work(staging: Staging) -> None:
        stage(staging, "k", {"a": b"1"}, folders=("f",))
        stage(staging, "unwanted", {"b": b"1"})
        _write(staging.layer("half"), "c", b"1")

    die_with(target, work)
    with Staging(target) as staging:
        staging.keep_only(["k", "half"])
        members = staging.verified("k")
        assert members is not None
        assert staging.verified("half") is None
        assert staging.verified("unwanted") is None
        staging.place({"k": members}, Existing.REFUSE)

    assert tree_of(target) == {"a": b"1", "f": None}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("moves", range(6))
def test_INV_C2_a_placing_that_was_killed_goes_on(target: Path, moves: int, monkeypatch: pytest.MonkeyPatch):
    (target / "a").mkdir()
    files = {"a/1": b"1", "a/2": b"2", "b": b"3", "c/d": b"4"}

    def work(staging: Staging) -> None:
        layers = stage(staging, "k", files, folders=("a", "c"))
        count = 0

        def counted(call):
            def wrapper(*args, **keywords):
                nonlocal count
                if count == moves:
                    os._exit(9)
                count += 1
                return call(*args, **keywords)

            return wrapper

        os.link, os.unlink, os.rename = counted(os.link), counted(os.unlink), counted(os.rename)
        staging.place(layers, Existing.REFUSE)

    die_with(target, work)
    with Staging(target) as staging:
        members = staging.verified("k")
        assert members is not None
        staging.place({"k": members}, Existing.REFUSE)

    assert {path: content for path, content in tree_of(target).items() if content} == files
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_changed_after_it_was_verified_is_not_taken_over(target: Path):
    die_with(target, lambda staging: stage(staging, "k", {"a": b"1"}))
    (folder,) = [path for path in target.parent.iterdir() if path != target]
    (folder / "k" / "a").write_bytes(b"2")

    with Staging(target) as staging:
        assert staging.verified("k") is None


def test_two_unpacks_to_one_target_do_not_touch_each_other(target: Path):
    with Staging(target) as one, Staging(target) as other:
        layers = stage(one, "k", {"a": b"1"})
        other.keep_only([])
        assert other.verified("k") is None
        other.place(stage(other, "k", {"b": b"1"}), Existing.REFUSE)
        one.place(layers, Existing.REFUSE)

    assert tree_of(target) == {"a": b"1", "b": b"1"}


def test_a_working_folder_that_others_may_write_is_not_used(target: Path):
    planted = target.parent / f".{target.name}.kitclient-0"
    planted.mkdir()
    planted.chmod(0o777)

    with Staging(target) as staging:
        staging.place(stage(staging, "k", {"a": b"1"}), Existing.REFUSE)

    assert stat.S_IMODE(planted.stat().st_mode) == 0o777
    assert tree_of(target) == {"a": b"1"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_where_the_folder_above_cannot_be_written_the_target_holds_the_working_folder(target: Path):
    target.parent.chmod(0o500)
    try:
        with Staging(target) as staging:
            staging.place(stage(staging, "k", {"a": b"1"}), Existing.REFUSE)
    finally:
        target.parent.chmod(0o700)

    assert tree_of(target) == {"a": b"1"}
