"""What LocalBackend promises beyond the contract: other processes, full and failing disks, power cuts."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from storage_backends import open_backend
from storage_backends.interface import (
    Leftover,
    ObjectMissing,
    StorageBackend,
    StorageFull,
    StorageUnavailable,
    UploadBusy,
    UploadMissing,
)
from storage_backends.local import LocalBackend
from storage_backends.memory import MemoryBackend
from tests.contracts.storage_contract import StorageContract, append, ignore, keys_of, said, store_content
from tests.storage_backends.story import check, tell


class TestLocal(StorageContract):
    @pytest.fixture
    async def backend(self, tmp_path: Path) -> AsyncIterator[StorageBackend]:
        backend = LocalBackend(tmp_path / "root")
        await backend.start()
        yield backend
        await backend.close()
        await backend.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
async def backend(root: Path) -> AsyncIterator[LocalBackend]:
    backend = LocalBackend(root)
    await backend.start()
    yield backend
    await backend.close()


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def temporary_files(root: Path) -> list[Path]:
    return list((root / "_store" / "tmp").iterdir())


# -- other processes


async def test_other_processes_lose_no_increment(backend: LocalBackend, root: Path) -> None:
    await backend.write("counter", b"0")
    increment = (
        "import asyncio, sys; from pathlib import Path\n"
        "from storage_backends.interface import PreconditionFailed\n"
        "from storage_backends.local import LocalBackend\n"
        "async def main():\n"
        "    backend = LocalBackend(Path(sys.argv[1])); await backend.start()\n"
        "    left = 100\n"
        "    while left:\n"
        "        content, info = await backend.read('counter', size_max=99)\n"
        "        try: await backend.write('counter', b'%d' % (int(content) + 1), expect=info.version)\n"
        "        except PreconditionFailed: continue\n"
        "        left -= 1\n"
        "    await backend.close()\n"
        "asyncio.run(main())\n"
    )

    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-W", "error", "-c", increment, str(root))
        for _ in range(2)
    ]

    assert [await process.wait() for process in processes] == [0, 0]
    assert (await backend.read("counter", size_max=99))[0] == b"200"


async def test_an_upload_is_taken_up_by_another_backend_on_the_folder(
    backend: LocalBackend, root: Path
) -> None:
    await append(await backend.begin_upload("u"), b"first", note=b"1")
    other = LocalBackend(root)
    await other.start()

    upload = await other.resume_upload("u")
    assert (upload.offset, upload.note) == (5, b"1")
    await append(upload, b"second", last=True)
    with pytest.raises(UploadBusy):
        await (await backend.resume_upload("u")).abort()
    await upload.commit("x")
    await other.close()

    assert (await backend.stat("x")).size == 11


async def test_a_lock_that_is_never_let_go_is_not_waited_for_for_ever(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage_backends.local_folder._LOCK_WAIT_S", 0.05)
    await backend.write("a", b"")
    (lock,) = (root / "_store" / "locks").iterdir()

    with lock.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageUnavailable, match="locked"):
            await backend.write("a", b"")

    await backend.write("a", b"")


async def test_what_others_are_writing_is_not_swept_away_and_what_the_dead_left_is(root: Path) -> None:
    first = LocalBackend(root)
    await first.start()
    temporary = root / "_store" / "tmp"
    (temporary / "dead").write_bytes(b"x")
    (temporary / "dead-upload").mkdir()
    (temporary / "dead-upload" / "data").write_bytes(b"x")
    (temporary / "link").symlink_to(root)
    os.mkfifo(temporary / "fifo")
    with (temporary / "alive").open("wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)

        second = LocalBackend(root)
        await second.start()

        assert [path.name for path in temporary_files(root)] == ["alive"]
    await first.close()
    await second.close()


# -- killed, and without power


@pytest.mark.parametrize("how", ["kill", "ENOSPC", "EIO"])
def test_X_03_whatever_call_the_story_breaks_off_at_nothing_acknowledged_is_lost(how: str) -> None:
    # A process that is killed loses nothing that a file system holds in memory: the fastest one will do.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        told = subprocess.run(
            [sys.executable, "-W", "error", "-m", "tests.storage_backends.break_off", folder, how],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    assert told.returncode == 0, told.stderr
    assert int(told.stdout) > 50


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[list[Path]]:
    mounted: list[Path] = []
    yield mounted
    for folder in reversed(mounted):
        subprocess.run(["umount", folder], check=True)


def mount(mounts: list[Path], folder: Path, *arguments: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this machine does not mount: {done.stderr.strip()}")
    mounts.append(folder)


@pytest.mark.slow
async def test_X_01_a_power_cut_after_each_step_loses_nothing_acknowledged(
    tmp_path: Path, mounts: list[Path]
) -> None:
    """The disk is an image: a copy of it holds what the kernel had written when the step was acknowledged."""
    image, live = tmp_path / "image", tmp_path / "live"
    with image.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    made = subprocess.run(["mkfs.ext4", "-q", "-F", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no ext4 image can be made here: {made.stderr.strip()}")
    mount(mounts, live, "-o", "loop,commit=300", str(image))
    acknowledged: list[str] = []
    copies: list[tuple[Path, list[str]]] = []

    def cut(step: str) -> None:
        acknowledged.append(step)
        copy = tmp_path / f"copy-{len(copies)}"
        subprocess.run(["cp", "--sparse=always", image, copy], check=True)
        copies.append((copy, list(acknowledged)))

    backend = LocalBackend(live / "root")
    await backend.start()
    await tell(backend, cut)
    await backend.close()

    assert len(copies) > 5
    for copy, steps in copies:
        after = tmp_path / f"{copy.name}-mounted"
        mount(mounts, after, "-o", "loop", str(copy))
        await check(after / "root", steps)


# -- full and failing disks


@pytest.fixture
async def small_disk(tmp_path: Path, mounts: list[Path]) -> AsyncIterator[LocalBackend]:
    mount(mounts, tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "none")
    backend = LocalBackend(tmp_path / "disk" / "root")
    await backend.start()
    yield backend
    await backend.close()


@pytest.mark.parametrize("size", [None, 5_000_000])
@pytest.mark.parametrize("last", [False, True])
async def test_INV_17_B_200_a_full_disk_keeps_nothing_of_an_append_and_recovers(
    small_disk: LocalBackend, tmp_path: Path, size: int | None, last: bool
) -> None:
    upload = await small_disk.begin_upload("u", note=b"begun")
    await append(upload, b"first", note=b"first")
    free = shutil.disk_usage(tmp_path / "disk").free

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(50):
            yield bytes(100_000)

    with pytest.raises(StorageFull) as caught:
        await upload.append(chunks(), observe=ignore, note=said(b"too much"), size=size, last=last)

    assert str(tmp_path) not in str(caught.value)
    assert shutil.disk_usage(tmp_path / "disk").free >= free
    for holder in (upload, await small_disk.resume_upload("u")):
        assert (holder.offset, holder.note) == (5, b"first")
    await append(upload, b"second", last=True)
    assert (await upload.commit("x")).size == 11


async def test_INV_17_a_full_disk_keeps_nothing_of_a_record_and_the_old_one_stays(
    small_disk: LocalBackend, tmp_path: Path
) -> None:
    old = await small_disk.write("a", b"old")

    with pytest.raises(StorageFull):
        await small_disk.write("a", bytes(5_000_000))
    with pytest.raises(StorageFull):
        await small_disk.write("b", bytes(5_000_000))

    assert await small_disk.stat("a") == old
    assert await keys_of(small_disk) == ["a"]
    assert temporary_files(tmp_path / "disk" / "root") == []
    await small_disk.write("a", b"new")
    await small_disk.probe()


class FailingSync:
    """Every fsync fails from now on, or the n-th alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int, nth: int | None = None) -> None:
        self._code = code
        self._nth = nth
        self._count = 0
        self._sync = os.fsync
        monkeypatch.setattr(os, "fsync", self)
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, descriptor: int) -> None:
        self._count += 1
        if self._nth in {None, self._count}:
            raise OSError(self._code, os.strerror(self._code))
        self._sync(descriptor)


@pytest.mark.parametrize("nth", [1, 2], ids=["file", "folder"])
@pytest.mark.parametrize("how", [LocalBackend.write, LocalBackend.create], ids=["write", "create"])
async def test_X_05_a_new_record_whose_fsync_failed_is_never_served(
    backend: LocalBackend,
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    how: Callable[[LocalBackend, str, bytes], Awaitable[object]],
    nth: int,
) -> None:
    FailingSync(monkeypatch, errno.EIO, nth)

    with pytest.raises(StorageUnavailable, match="EIO"):
        await how(backend, "a", b"1")

    assert await keys_of(backend) == []
    assert temporary_files(root) == []
    with pytest.raises(StorageUnavailable, match="fsync"):
        await backend.probe()


async def test_X_05_an_empty_record_whose_folder_was_not_synced_is_never_served(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingSync(monkeypatch, errno.EIO, nth=1)

    with pytest.raises(StorageUnavailable, match="EIO"):
        await backend.write("a", b"")

    assert await keys_of(backend) == []


@pytest.mark.parametrize("nth", [1, 2], ids=["file", "folder"])
async def test_X_05_B_202_content_whose_fsync_failed_is_never_served(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    upload = await backend.begin_upload("u")
    await append(upload, b"content", last=True)
    FailingSync(monkeypatch, errno.EIO, nth)

    with pytest.raises(StorageUnavailable, match="EIO") as caught:
        await upload.commit("x")

    assert str(root) not in str(caught.value)
    with pytest.raises(ObjectMissing):
        await backend.stat("x")
    with pytest.raises(UploadMissing):
        await upload.commit("x")
    assert files_below(root) == {"_store/layout"} | {file for file in files_below(root) if "/locks/" in file}
    for _ in range(2):
        with pytest.raises(StorageUnavailable, match="fsync"):
            await backend.probe()


async def test_X_05_an_append_whose_fsync_failed_discards_the_upload(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await backend.begin_upload("u")
    FailingSync(monkeypatch, errno.EIO, nth=1)

    with pytest.raises(StorageUnavailable):
        await append(upload, b"content")

    with pytest.raises(UploadMissing):
        await backend.resume_upload("u")
    with pytest.raises(StorageUnavailable):
        await backend.probe()


async def test_an_fsync_that_finds_the_disk_full_does_not_condemn_the_disk(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    FailingSync(monkeypatch, errno.ENOSPC, nth=1)

    with pytest.raises(StorageFull):
        await backend.write("a", b"")

    await backend.probe()
    await backend.write("a", b"", expect="")


@pytest.mark.parametrize(
    "code", [errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ESTALE]
)
async def test_B_206_a_store_that_cannot_be_written_is_unavailable_and_names_no_folder(
    backend: LocalBackend, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    await backend.write("a", b"1")

    def failing(path: str, *args: object, **kwargs: object) -> int:
        raise OSError(code, os.strerror(code), path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing)
        for call in (
            backend.write("a", b"2"),
            backend.delete("a"),
            backend.read("a", size_max=9),
            backend.begin_upload("u"),
            backend.probe(),
        ):
            with pytest.raises(StorageUnavailable) as caught:
                await call
            assert str(root) not in str(caught.value)

    assert (await backend.read("a", size_max=9))[0] == b"1"


async def test_a_record_that_is_not_in_the_page_cache_is_read_in_a_thread(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = await backend.write("a", b"content")
    preadv, flags = os.preadv, []

    def uncached(descriptor: int, buffers: list[bytearray], offset: int, flag: int) -> int:
        flags.append(flag)
        if flag:
            raise BlockingIOError(errno.EAGAIN, "would block")
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return preadv(descriptor, buffers, offset, flag)

    monkeypatch.setattr(os, "preadv", uncached)

    assert await backend.read("a", size_max=9) == (b"content", written)
    assert flags == [os.RWF_NOWAIT, 0]


async def test_a_record_that_was_cut_short_is_an_error(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.write("a", b"content")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset, flag: preadv(descriptor, [], 0, 0))

    with pytest.raises(StorageUnavailable, match="0 of 7"):
        await backend.read("a", size_max=9)


# -- the folder


async def test_published_content_is_read_only_and_records_are_not_for_others_to_write(
    backend: LocalBackend, root: Path
) -> None:
    await store_content(backend, "x", b"content")
    await backend.write("a", b"record")

    assert (root / "x").stat().st_mode & 0o777 == 0o444
    assert (root / "a").stat().st_mode & 0o777 == 0o644


async def test_content_of_another_size_under_the_key_is_an_error_and_stays(backend: LocalBackend) -> None:
    first = await store_content(backend, "x", b"content", "u1")

    with pytest.raises(StorageUnavailable, match="7 bytes"):
        await store_content(backend, "x", b"other content", "u2")

    assert await backend.stat("x") == first
    assert (await backend.resume_upload("u2")).offset == 0


async def test_folders_removed_behind_our_back_are_made_anew(backend: LocalBackend, root: Path) -> None:
    await backend.write("a/b/c", b"1")
    await store_content(backend, "d/e/f", b"1", "u1")
    shutil.rmtree(root / "a")
    shutil.rmtree(root / "d")

    await backend.write("a/b/c", b"2")
    await store_content(backend, "d/e/f", b"2", "u2")

    assert await keys_of(backend) == ["a/b/c", "d/e/f"]


async def test_an_upload_that_a_power_cut_tore_is_missing_and_swept_when_it_is_old(
    backend: LocalBackend, root: Path
) -> None:
    for upload_id in ("torn", "empty", "whole"):
        await append(await backend.begin_upload(upload_id), b"content", note=b"note")
    uploads = root / "_store" / "uploads"
    (uploads / "torn" / "state").write_bytes(b"7 00000000\nnote")
    (uploads / "empty" / "state").write_bytes(b"")
    (uploads / "junk").touch()

    for upload_id in ("torn", "empty", "junk"):
        with pytest.raises(UploadMissing):
            await backend.resume_upload(upload_id)
    for upload_id in ("torn", "whole", "junk"):
        os.utime(uploads / upload_id, (0, 0))

    for dry_run in (True, False):
        assert [upload.id async for upload in backend.uploads()] == ["whole"]
        assert {path.name for path in uploads.iterdir()} == {"torn", "whole", "empty", "junk"}
        swept = [leftover async for leftover in backend.sweep(age_s=3600, dry_run=dry_run)]
        assert swept == [Leftover("_store/uploads/torn", 22, 0)]

    assert {path.name for path in uploads.iterdir()} == {"whole", "empty", "junk"}
    assert temporary_files(root) == []
    assert (await backend.resume_upload("whole")).offset == 7


async def test_a_sweep_removes_what_the_dead_left_and_nothing_that_is_young_or_in_use(
    backend: LocalBackend, root: Path
) -> None:
    temporary = root / "_store" / "tmp"
    (temporary / "dead-upload").mkdir()
    (temporary / "dead-upload" / "data").write_bytes(b"12345")
    for name in ("dead", "alive", "young"):
        (temporary / name).write_bytes(b"123")
    for name in ("dead", "alive", "dead-upload"):
        os.utime(temporary / name, (1000, 1000))
    dead = {Leftover("_store/tmp/dead", 3, 1000), Leftover("_store/tmp/dead-upload", 5, 1000)}
    with (temporary / "alive").open("rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)

        would_go = {leftover async for leftover in backend.sweep(age_s=3600, dry_run=True)}
        assert len(temporary_files(root)) == 4
        went = {leftover async for leftover in backend.sweep(age_s=3600)}

        assert would_go == went == dead
        assert {path.name for path in temporary_files(root)} == {"alive", "young"}


async def test_content_that_was_touched_stays_read_only_and_keeps_its_file(
    backend: LocalBackend, root: Path
) -> None:
    await store_content(backend, "x", b"content")
    before = (root / "x").stat()

    await backend.touch("x")

    after = (root / "x").stat()
    assert (after.st_ino, after.st_mode & 0o777) == (before.st_ino, 0o444)


async def test_a_version_grows_also_when_the_clock_goes_back(backend: LocalBackend, root: Path) -> None:
    await backend.write("record", b"1")
    await store_content(backend, "content", b"1")

    for key in ("record", "content"):
        os.utime(root / key, (4_000_000_000, 4_000_000_000))
        versions = [(await backend.stat(key)).version] + [
            (await backend.touch(key)).version for _ in range(3)
        ]
        assert len(set(versions)) == 4


async def test_X_23_a_folder_of_somebody_else_is_refused(root: Path) -> None:
    root.mkdir()
    (root / "thesis.tex").touch()

    with pytest.raises(StorageUnavailable, match=r"thesis\.tex.*empty") as caught:
        await LocalBackend(root).start()

    assert str(root) not in str(caught.value)
    assert files_below(root) == {"thesis.tex"}


async def test_X_23_a_newer_layout_is_refused(root: Path) -> None:
    first = LocalBackend(root)
    await first.start()
    await first.close()
    (root / "_store" / "layout").chmod(0o644)
    (root / "_store" / "layout").write_text("2\n")

    with pytest.raises(StorageUnavailable, match="layout '2'"):
        await LocalBackend(root).start()


@pytest.mark.parametrize("below", ["", "below"])
async def test_X_23_a_file_in_place_of_the_folder_is_refused(root: Path, below: str) -> None:
    root.touch()

    with pytest.raises(StorageUnavailable, match="not a folder"):
        await LocalBackend(root / below).start()


async def test_X_23_backends_that_start_at_once_on_a_new_folder_all_work(root: Path) -> None:
    backends = [LocalBackend(root) for _ in range(6)]

    await asyncio.gather(*(backend.start() for backend in backends))

    await asyncio.gather(*(backend.write(f"k{index}", b"") for index, backend in enumerate(backends)))
    assert await keys_of(backends[0]) == [f"k{index}" for index in range(6)]
    for backend in backends:
        await backend.close()


async def test_without_durability_no_fsync_is_called(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FailingSync(monkeypatch, errno.EIO)
    backend = LocalBackend(root, durable=False)
    await backend.start()

    await backend.write("a", b"1")
    await backend.create("b", b"1")
    await store_content(backend, "x", b"content")
    await append(await backend.begin_upload("u"), b"content")
    await backend.delete("a")
    await backend.delete("b")
    await backend.probe()

    assert await keys_of(backend) == ["x"]
    await backend.close()


# -- places


def test_a_place_is_a_folder_a_file_url_or_memory() -> None:
    assert isinstance(open_backend("memory://"), MemoryBackend)
    for place in ("relative/folder", "/folder", "file:///folder/with%20space", "file://localhost/folder"):
        assert isinstance(open_backend(place), LocalBackend)


@pytest.mark.parametrize(
    "place", ["", "s3://bucket", "ftp://x/y", "file://host/folder", "file://relative", "://x"]
)
def test_another_place_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match=r"wanted|known"):
        open_backend(place)
