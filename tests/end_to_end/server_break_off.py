"""Push to a server that is killed at a system call; start it again; look. Then the same, one call later, to the end.

    python -m tests.end_to_end.server_break_off FOLDER STRIDE FIRST

Every STRIDE-th call from FIRST on is a point to be killed at. Prints how many points there were. Each server has a
process of its own, forked from this one, which has no threads.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kitspec.digest import Digest
from kitspec.media_types import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from registry.app import run_worker
from registry.config import Config
from tests.storage_backends.break_off import break_at

CONFIG, SMALL, LARGE = b"{}", b"small" * 100, bytes(range(256)) * 12_000
CUT = 1_500_000
_POINTS_MAX = 3000


def manifest_of(layer: bytes) -> bytes:
    def described(content: bytes, media_type: str) -> dict[str, object]:
        return {"mediaType": media_type, "digest": Digest.of(content), "size": len(content)}

    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": described(CONFIG, OCI_CONFIG),
            "layers": [described(layer, OCI_LAYER)],
        }
    ).encode()


FIRST_MANIFEST, SECOND_MANIFEST = manifest_of(SMALL), manifest_of(LARGE)


class Died(Exception):
    """The server went away."""


@dataclass
class Client:
    """One connection, and what the server has acknowledged on it."""

    port: int
    blobs: list[bytes] = field(default_factory=list)
    upload: tuple[str, int] | None = None
    tags: list[bytes] = field(default_factory=list)
    """Manifests that `v1` was acknowledged to point at, in order."""

    def __post_init__(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        try:
            fields = {
                "Content-Length": str(len(body)),
                **{k.replace("_", "-"): v for k, v in headers.items()},
            }
            self.connection.request(method, path, body, fields)
            response = self.connection.getresponse()
            return response.status, response.headers, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Died from error

    def expect(
        self, status: int, *request: str, body: bytes = b"", **headers: str
    ) -> http.client.HTTPMessage:
        got, fields, answer = self.ask(*request, body=body, **headers)
        assert got == status, (request, got, answer)
        return fields

    def push(self) -> None:
        """A blob in one PUT, a tag; a blob in two PATCHes, the tag moved."""
        for content in (CONFIG, SMALL):
            location = self.expect(202, "POST", "/v2/lib/a/blobs/uploads/")["Location"]
            self.expect(201, "PUT", f"{location}?digest={Digest.of(content)}", body=content)
            self.blobs.append(content)
        self.push_manifest(FIRST_MANIFEST)
        location = self.expect(202, "POST", "/v2/lib/a/blobs/uploads/")["Location"]
        self.upload = (location, 0)
        for start, stop in ((0, CUT), (CUT, len(LARGE))):
            span = f"{start}-{stop - 1}"
            self.expect(202, "PATCH", location, body=LARGE[start:stop], Content_Range=span)
            self.upload = (location, stop)
        self.finish_upload()
        self.push_manifest(SECOND_MANIFEST)

    def finish_upload(self) -> None:
        assert self.upload is not None
        location, _ = self.upload
        self.upload = None
        self.expect(201, "PUT", f"{location}?digest={Digest.of(LARGE)}")
        self.blobs.append(LARGE)

    def push_manifest(self, content: bytes) -> None:
        self.expect(201, "PUT", "/v2/lib/a/manifests/v1", body=content, Content_Type=OCI_MANIFEST)
        self.tags.append(content)

    def check(self, before: Client) -> None:
        """All that was acknowledged to `before` is here, whole; what was not is here whole or not at all."""
        for content in before.blobs:
            status, _, body = self.ask("GET", f"/v2/lib/a/blobs/{Digest.of(content)}")
            assert (status, body == content) == (200, True), f"an acknowledged blob: {status}"
        status, _, body = self.ask("GET", "/v2/lib/a/manifests/v1")
        last = before.tags[-1] if before.tags else None
        following = {None: FIRST_MANIFEST, FIRST_MANIFEST: SECOND_MANIFEST}.get(last)
        assert (body in (last, following)) if status == 200 else last is None, f"the tag: {status}"
        if status == 200:
            for layer in json.loads(body)["layers"]:
                assert self.ask("GET", f"/v2/lib/a/blobs/{layer['digest']}")[0] == 200, "a torn artifact"
        if before.upload is not None:
            self.go_on(*before.upload)

    def go_on(self, location: str, acknowledged: int) -> None:
        """The upload that was under way goes on where the server says, which is at least what it had acknowledged."""
        status, fields, _ = self.ask("GET", location)
        assert status == 204, f"an upload with {acknowledged} bytes: {status}"
        stop = int(fields["Range"].partition("-")[2])
        offset = stop + 1 if stop else 0
        assert offset >= acknowledged, f"{offset} of {acknowledged} acknowledged bytes"
        if offset < len(LARGE):
            span = f"{offset}-{len(LARGE) - 1}"
            self.expect(202, "PATCH", location, body=LARGE[offset:], Content_Range=span)
        self.upload = (location, len(LARGE))
        self.finish_upload()


def serve(listener: socket.socket, root: Path, prepare: Callable[[], object]) -> None:
    logging.disable()
    config = Config.model_validate(
        {
            "workers": 1,
            "log": {"accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(root)}},
            "health": {"storagedriver": {"enabled": False}},
        }
    )
    listener.setblocking(False)
    asyncio.run(run_worker(config, listener, stop=asyncio.Event(), ready=lambda: prepare() and None))


class ServerProcess:
    """A server in a process of its own. `prepare` runs in it once it is ready."""

    def __init__(self, root: Path, prepare: Callable[[], object]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
            self.process = os.fork()
            if self.process == 0:
                try:
                    serve(listener, root, prepare)
                finally:
                    os._exit(1)

    def end(self) -> int:
        """Kill it, if it lives; how it ended."""
        os.kill(self.process, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def kill_at(root: Path, turn: int) -> bool:
    """Whether there was a `turn`-th call."""
    server = ServerProcess(root, partial(break_at, turn, "kill"))
    client = Client(server.port)
    try:
        client.push()
        was_killed = False
    except Died:
        was_killed = True
    server.end()

    server = ServerProcess(root, lambda: None)
    again = Client(server.port)
    again.check(client)
    again.push()
    again.check(again)
    server.end()
    litter = list((root / "_store" / "tmp").iterdir())
    assert not litter, f"left lying about: {litter}"
    check_whole(root)
    return was_killed


def check_whole(root: Path) -> None:
    """Nothing that is stored contradicts anything else. In a process of its own: this one has no threads, and is forked."""
    command = [sys.executable, "-c", "from registry.cli import main; main()", "fsck", "--storage", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def main(folder: Path, stride: int, first: int) -> int:
    for points, turn in enumerate(range(first, _POINTS_MAX, stride)):
        root = folder / str(turn)
        if not kill_at(root, turn):
            return points
        shutil.rmtree(root)
    sys.exit(f"the push has more than {_POINTS_MAX} points")


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))}\n")
