"""The local store and kill -9: at any moment, and by several processes at once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kitspec.descriptor import Descriptor
from kitspec.digest import Digest
from kitspec.media_types import OCI_MANIFEST
from tests.contracts.registry_contract import REPOSITORY, manifest_of

LAYERS = [random.Random(number).randbytes(3_000_000) for number in range(3)]
BLOBS = {Digest.of(content): content for content in [b"{}", *LAYERS]}
MANIFEST = manifest_of(
    *(Descriptor("application/x", digest, len(content)) for digest, content in BLOBS.items())
)

PULL = """
import asyncio, sys
from pathlib import Path
from kitclient.image_layout import LayoutRegistry
from kitclient.remote import RemoteRegistry
from kitclient.transfer import Place, copy
from kitspec.names import RepositoryName, Tag

async def main(host, folder, tag):
    name = RepositoryName("lib/a")
    async with RemoteRegistry(host, plain_http=True) as remote, LayoutRegistry(Path(folder), host) as local:
        print("begun", flush=True)
        await copy(Place(remote, name), Tag("v1"), Place(local, name), tags=(Tag(tag),))

asyncio.run(main(*sys.argv[1:]))
"""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed is what this is for."""


class Source:
    """A registry with one artifact, in threads; it counts the bytes of each blob that it sends, and can stop there."""

    def __init__(self) -> None:
        self.sent: dict[Digest, int] = dict.fromkeys(BLOBS, 0)
        self.hold_at: int | None = None
        self.reached = threading.Event()
        self.may_go_on = threading.Event()
        self._lock = threading.Lock()
        source = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                source.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        reference = request.path.rpartition("/")[2]
        if "/manifests/" in request.path:
            self.send(request, 200, MANIFEST, {"Content-Type": OCI_MANIFEST})
            return
        digest = Digest(reference)
        content = BLOBS[digest]
        field = request.headers.get("Range", "")
        if not field:
            self.send(request, 200, content, {}, digest)
            return
        start = int(field.removeprefix("bytes=").partition("-")[0])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send(request, 206, content[start:], headers, digest)

    def send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        content: bytes,
        headers: dict[str, str],
        digest: Digest | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        try:
            for position in range(0, len(content), 65536):
                piece = content[position : position + 65536]
                request.wfile.write(piece)
                if digest is not None:
                    self.count(digest, len(piece))
        except (BrokenPipeError, ConnectionResetError):
            request.close_connection = True

    def count(self, digest: Digest, size: int) -> None:
        with self._lock:
            self.sent[digest] += size
            is_held = self.hold_at is not None and sum(self.sent.values()) >= self.hold_at
        if is_held:
            self.reached.set()
            self.may_go_on.wait(60)

    def hold(self, moment: int | None) -> None:
        """Send `moment` bytes of blobs from now on, and no more before `release`."""
        self.sent = dict.fromkeys(BLOBS, 0)
        self.hold_at, self.reached, self.may_go_on = moment, threading.Event(), threading.Event()

    def release(self) -> None:
        self.hold_at = None
        self.may_go_on.set()


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    thread = threading.Thread(target=source.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield source
    source.server.shutdown()
    source.server.server_close()
    thread.join()


def pull(source: Source, folder: Path, tag: str = "v1") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PULL, source.host, str(folder), tag],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()


def stored(folder: Path) -> set[Digest]:
    """The blobs of the store; each is checked against its name."""
    found = set()
    for path in (folder / "blobs" / "sha256").iterdir():
        digest = Digest(f"sha256:{path.name}")
        assert Digest.of(path.read_bytes()) == digest
        found.add(digest)
    return found


def tags(folder: Path) -> list[str]:
    index = json.loads((folder / "index.json").read_bytes())
    return sorted(
        entry["annotations"]["org.opencontainers.image.ref.name"].rpartition(":")[2]
        for entry in index["manifests"]
    )


def kill_and_pull_again(source: Source, folder: Path, moments: list[int]) -> None:
    for moment in moments:
        source.hold(moment)
        process = pull(source, folder)
        assert source.reached.wait(60)
        kill(process)
        source.release()
        verified = stored(folder)
        source.hold(None)

        finish(pull(source, folder))

        assert stored(folder) == {*BLOBS, Digest.of(MANIFEST)}
        assert tags(folder) == ["v1"]
        assert [path.name for path in (folder / "ingest").iterdir()] == ["index.lock"]
        for digest in verified & BLOBS.keys():
            assert source.sent[digest] == 0, "a verified layer was fetched again"
        for path in (folder / "blobs" / "sha256").iterdir():
            path.unlink()
        (folder / "index.json").unlink()


def test_INV_C2_a_pull_that_was_killed_is_completed_by_the_next(source, tmp_path):
    kill_and_pull_again(source, tmp_path, [1, 5_000_000, 8_900_000])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_INV_C2_a_pull_may_be_killed_anywhere(source, tmp_path):
    whole = sum(map(len, LAYERS))
    kill_and_pull_again(source, tmp_path, [whole * step // 24 + 1 for step in range(24)])


def test_INV_C2_bytes_on_the_disk_are_not_fetched_again(source, tmp_path):
    """Two kills, and in all hardly more than the artifact crosses the wire."""
    crossed = 0
    for _ in range(2):
        source.hold(3_500_000)
        process = pull(source, tmp_path)
        assert source.reached.wait(60)
        kill(process)
        source.release()
        crossed += sum(source.sent.values())
    source.hold(None)

    finish(pull(source, tmp_path))

    assert stored(tmp_path) == {*BLOBS, Digest.of(MANIFEST)}
    # What was on the wire or in a buffer at a kill goes again: some megabytes of sockets for each.
    assert crossed + sum(source.sent.values()) < 2.5 * sum(map(len, LAYERS))


def test_INV_C4_pulls_at_once_share_the_work_and_corrupt_nothing(source, tmp_path):
    processes = [pull(source, tmp_path, tag) for tag in ("a", "b", "c")]

    for process in processes:
        finish(process)

    assert stored(tmp_path) == {*BLOBS, Digest.of(MANIFEST)}
    assert tags(tmp_path) == ["a", "b", "c"]
    assert source.sent == {digest: len(content) for digest, content in BLOBS.items()}
    assert [path.name for path in (tmp_path / "ingest").iterdir()] == ["index.lock"]


def test_INV_C4_a_killed_writers_lock_stops_nobody(source, tmp_path):
    source.hold(1_000_000)
    first = pull(source, tmp_path, "a")
    assert source.reached.wait(60)
    second = pull(source, tmp_path, "b")
    assert second.stdout is not None
    assert second.stdout.readline() == b"begun\n"

    kill(first)
    source.release()
    finish(second)

    assert tags(tmp_path) == ["b"]
    assert REPOSITORY in (tmp_path / "index.json").read_text()
